//! What the library asks of a driver of Postgres: to send a text, and to tell what the server answered. What
//! an answer means is decided here, once for all drivers.

use std::error::Error;

use crate::error::OpError;

/// The SQLSTATE with which `writethrough.guard` refuses.
pub(crate) const FENCED_SQLSTATE: &str = "WT001";
/// The SQLSTATE with which `writethrough.guard` says that there is no epoch row.
const MISSING_SQLSTATE: &str = "WT002";
/// A lock was not had in time.
const LOCK_NOT_AVAILABLE: &str = "55P03";

/// What the server has answered to a statement that failed.
#[derive(Debug)]
pub struct Answer<'a> {
    /// The SQLSTATE.
    pub(crate) code: &'a str,
    /// Its severity is an error's, and neither ends the session nor is unknown.
    pub(crate) plain_error: bool,
    pub(crate) message: &'a str,
    pub(crate) routine: Option<&'a str>,
}

impl Answer<'_> {
    pub(crate) fn is_fenced(&self) -> bool {
        self.code == FENCED_SQLSTATE
    }

    /// Source: PostgreSQL's documentation, "Message Severity Levels" and "PostgreSQL Error Codes".
    pub(crate) fn is_without_effect(&self) -> bool {
        self.plain_error && !self.code.starts_with("08") && self.code != "40003"
    }

    pub(crate) fn is_stale_statement(&self) -> bool {
        match self.code {
            // No such prepared statement, and one of that name already.
            "26000" | "42P05" => true,
            // "cached plan must not change result type"; the code has other uses.
            "0A000" => {
                self.routine == Some("RevalidateCachedQuery")
                    || self.message.contains("cached plan")
            }
            // "cache lookup failed for type 16421": dropped since.
            "XX000" => self.message.starts_with("cache lookup failed"),
            _ => false,
        }
    }

    /// The epoch row is gone, or a table, a column, a function or the schema that belongs to it.
    pub(crate) fn is_missing(&self) -> bool {
        [MISSING_SQLSTATE, "42P01", "42703", "42883", "3F000"].contains(&self.code)
    }

    /// It does not go away by itself: something is missing, a right is, or the server is read-only.
    pub(crate) fn needs_mending(&self) -> bool {
        self.is_missing() || ["42501", "25006"].contains(&self.code)
    }
}

/// The error of a driver.
pub trait DriverError: Error + Send + Sync + Sized + 'static {
    /// The server's answer, if that is what it is.
    fn answer(&self) -> Option<Answer<'_>>;
}

/// Sorts the error of a writing statement by what it says about the effect.
pub(crate) fn op_error<E: DriverError>(error: E) -> OpError<E> {
    let answer = error.answer();
    if answer.as_ref().is_some_and(Answer::is_fenced) {
        return OpError::Fenced;
    }
    if answer.is_some_and(|answer| answer.is_without_effect()) {
        OpError::Rejected(error)
    } else {
        OpError::Unknown(error)
    }
}

/// Rows as text; null is empty.
pub(crate) type Rows = Vec<Vec<String>>;

/// Whatever takes texts of SQL: a connection, or a transaction of one.
pub trait Connection: Send {
    /// The driver's.
    type Error: DriverError;
    /// Rolled back when it is dropped.
    type Transaction<'a>: Transaction<Error = Self::Error>
    where
        Self: 'a;

    /// Begins a transaction.
    fn begin(&mut self) -> impl Future<Output = Result<Self::Transaction<'_>, Self::Error>> + Send;

    /// Sends a text without parameters, unprepared, so that it passes every pooler.
    fn run(&mut self, text: &str) -> impl Future<Output = Result<Rows, Self::Error>> + Send;
}

/// A transaction that takes texts of SQL.
pub trait Transaction: Send {
    /// The driver's.
    type Error: DriverError;

    /// As [`Connection::run`].
    fn run(&mut self, text: &str) -> impl Future<Output = Result<Rows, Self::Error>> + Send;
    /// Commits.
    fn commit(self) -> impl Future<Output = Result<(), Self::Error>> + Send;
    /// Rolls back.
    fn roll_back(self) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

pub(crate) fn is_busy_lock(error: &impl DriverError) -> bool {
    let answer = error.answer();
    answer.is_some_and(|answer| answer.code == LOCK_NOT_AVAILABLE)
}
