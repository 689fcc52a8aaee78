//! The fence in Postgres over `tokio-postgres` and `deadpool-postgres`.
//!
//! The schema is `writethrough`, installed by [`PostgresFence::migrate`]. A writing statement
//! carries the guard like this, in one round trip:
//!
//! ```sql
//! UPDATE items SET name = $3 FROM writethrough.guard($1) WHERE items.id = $2 RETURNING *
//! ```
//!
//! With `NULL` in the place of [`Guard::parameter`](super::Guard::parameter) the same statement runs without a
//! guard: for writers without an epoch, while nobody caches.
//!
//! In a transaction of several statements, `SELECT writethrough.guard($1)` comes first. The
//! function refuses to run above READ COMMITTED, where it could not see a newer epoch.

use deadpool_postgres::{Object, Pool, PoolError};
use tokio_postgres::error::Severity;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error, Row, SimpleQueryMessage};

use super::database::{self, Database, EpochTable, Parameter, RowSeen, UnfitDatabase};
use crate::driver::{self, Answer, Connection, DriverError, Rows, Transaction};
use crate::error::OpError;
use crate::migration::{self, MigrateError, Migration};

/// Keeps the epoch in Postgres, for any number of nodes, over a pool of `deadpool-postgres`.
pub type PostgresFence = EpochTable<Pool>;

/// Whether a statement failed because its guard refused: nothing was written, start again.
#[must_use]
pub fn is_fenced(error: &Error) -> bool {
    error.answer().is_some_and(|answer| answer.is_fenced())
}

/// Sorts the error of a writing statement, or of a commit, by what it says about the effect. It may have
/// come from Postgres or from a pooler in front of it.
///
/// - [`OpError::Fenced`]: the guard refused.
/// - [`OpError::Rejected`]: the server answered that the statement failed, so nothing was written.
/// - [`OpError::Unknown`]: everything else. An answer that ends the session (`FATAL`, `PANIC`), or that is
///   about the connection (SQLSTATE class 08) or an unknown completion (40003), may have come while the
///   commit was under way; and no answer says nothing.
///
/// For statements that were sent. That no connection could be had is [`OpError::Rejected`].
#[must_use]
pub fn op_error(error: Error) -> OpError<Error> {
    driver::op_error(error)
}

/// Whether the server's answer says that what it was sent had no effect.
pub(crate) fn is_without_effect(error: &Error) -> bool {
    let answer = error.answer();
    answer.is_some_and(|answer| answer.is_without_effect())
}

/// Whether a statement failed only because it was prepared before the schema changed, or on another
/// connection of a pooler. It had no effect; prepared anew, on another connection, it may work.
#[must_use]
pub fn is_stale_statement(error: &Error) -> bool {
    let answer = error.answer();
    answer.is_some_and(|answer| answer.is_stale_statement())
}

/// Whether a statement failed because the epoch row, or what belongs to it, is gone.
#[must_use]
pub fn is_missing(error: &Error) -> bool {
    error.answer().is_some_and(|answer| answer.is_missing())
}

/// Makes the migrations that were not made yet, in order, and notes them in the table `history`.
///
/// A schema that a newer program has changed is accepted when each newer migration promises to be
/// compatible with this one by its name, as in `add_colour_compatible_from_2`. When nothing is to be
/// done, nothing is locked, and no right is needed but to read `history`.
///
/// # Errors
///
/// [`MigrateError`].
///
/// # Cancellation
///
/// Leaves nothing: all is one transaction.
pub async fn migrate_schema(
    client: &mut Client,
    history: &'static str,
    lock: i64,
    migrations: &[Migration],
) -> Result<(), MigrateError<Error>> {
    migration::migrate(client, history, lock, migrations).await
}

impl PostgresFence {
    /// A fence over a pool of its own, two connections are enough: the poll must not wait behind
    /// the service's queries. The pool must connect to the primary and should bound its waits.
    #[must_use]
    pub fn new(pool: Pool) -> Self {
        Self::over(pool)
    }

    /// Tests on two connections that the server's advisory locks lock, and that a function which
    /// waited for one sees what was committed meanwhile: the guard rests on both, and some engines
    /// that speak Postgres' protocol answer these functions and do nothing. The fence does it by
    /// itself before it first believes a server, and again when the server is another one.
    ///
    /// # Errors
    ///
    /// [`UnfitDatabase`].
    ///
    /// # Cancellation
    ///
    /// Leaves at most a row in `writethrough.self_test`, which nobody reads.
    pub async fn self_test(holder: &mut Client, waiter: &mut Client) -> Result<(), UnfitDatabase> {
        database::self_test(holder, waiter).await
    }

    /// Installs or upgrades the schema `writethrough`; safe to call from every node at start. For a
    /// migration tool of your own there is [`crate::migration::MIGRATIONS`].
    ///
    /// # Errors
    ///
    /// [`MigrateError`] when the database refuses or cannot be reached.
    ///
    /// # Cancellation
    ///
    /// Leaves nothing: all migrations are one transaction.
    pub async fn migrate(client: &mut Client) -> Result<(), MigrateError<Error>> {
        migration::install(client).await
    }
}

impl DriverError for Error {
    fn answer(&self) -> Option<Answer<'_>> {
        let answer = self.as_db_error()?;
        Some(Answer {
            code: answer.code().code(),
            plain_error: match answer.parsed_severity() {
                Some(severity) => severity == Severity::Error,
                None => !matches!(answer.severity(), "FATAL" | "PANIC"),
            },
            message: answer.message(),
            routine: answer.routine(),
        })
    }
}

fn rows(answer: Vec<SimpleQueryMessage>) -> Rows {
    let rows = answer.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let texts = rows.map(|row| {
        let texts = (0..row.len()).map(|at| row.get(at).unwrap_or_default().to_owned());
        texts.collect()
    });
    texts.collect()
}

impl Connection for Client {
    type Error = Error;
    type Transaction<'a> = tokio_postgres::Transaction<'a>;

    async fn begin(&mut self) -> Result<Self::Transaction<'_>, Error> {
        self.transaction().await
    }

    async fn run(&mut self, text: &str) -> Result<Rows, Error> {
        self.simple_query(text).await.map(rows)
    }
}

impl Transaction for tokio_postgres::Transaction<'_> {
    type Error = Error;

    async fn run(&mut self, text: &str) -> Result<Rows, Error> {
        self.simple_query(text).await.map(rows)
    }

    async fn commit(self) -> Result<(), Error> {
        self.commit().await
    }

    async fn roll_back(self) -> Result<(), Error> {
        self.rollback().await
    }
}

impl Database for Pool {
    type Error = Error;
    type PoolError = PoolError;
    type Pooled = Object;
    type Connection = Client;

    async fn take(&self) -> Result<Object, PoolError> {
        self.get().await
    }

    fn connection(pooled: &mut Object) -> &mut Client {
        pooled
    }

    fn close(pooled: Object) {
        drop(Object::take(pooled));
    }

    fn has_idle(&self) -> bool {
        self.status().available > 0
    }

    fn max_size(&self) -> usize {
        self.status().max_size
    }

    async fn ask(
        pooled: &mut Object,
        statement: &'static str,
        parameters: &[Parameter<'_>],
    ) -> Result<Option<RowSeen>, Error> {
        let (types, values): (Vec<Type>, Vec<&(dyn ToSql + Sync)>) = parameters
            .iter()
            .map(|parameter| -> (Type, &(dyn ToSql + Sync)) {
                match parameter {
                    Parameter::Number(number) => (Type::INT8, number),
                    Parameter::Text(text) => (Type::TEXT, text),
                    Parameter::Flag(flag) => (Type::BOOL, flag),
                }
            })
            .unzip();
        let prepared = pooled.prepare_typed_cached(statement, &types).await?;
        let row = pooled.query_opt(&prepared, &values).await?;
        row.as_ref().map(seen).transpose()
    }

    fn forget_statements(&self) {
        self.manager().statement_caches.clear();
    }
}

fn seen(row: &Row) -> Result<RowSeen, Error> {
    Ok(RowSeen {
        number: row.try_get(0)?,
        cached_on: row.try_get(1)?,
        settled: row.try_get(2)?,
        trouble_seconds: row.try_get(3)?,
        history: row.try_get(4)?,
        in_its_history: row.try_get(5)?,
        read_only: row.try_get(6)?,
    })
}
