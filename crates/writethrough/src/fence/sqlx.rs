//! The fence in Postgres over `sqlx`.

use ::sqlx::pool::PoolConnection;
use ::sqlx::postgres::{PgConnection, PgDatabaseError, PgPoolOptions, PgRow, PgSeverity};
use ::sqlx::{AssertSqlSafe, Error, PgPool, Postgres, Row, ValueRef};

use super::database::{self, Database, EpochTable, Parameter, RowSeen, UnfitDatabase};
use crate::driver::{self, Answer, Connection, DriverError, Rows, Transaction};
use crate::error::OpError;
use crate::migration::{self, MigrateError};

/// Keeps the epoch in Postgres, for any number of nodes, over a pool of `sqlx`.
pub type SqlxFence = EpochTable<PgPool>;

/// The connections of a fence that makes its own: one polls, and a test of the server's locks needs two.
const CONNECTIONS: u32 = 2;
/// How long a connection of the fence's own is waited for.
const CONNECT: std::time::Duration = std::time::Duration::from_secs(3);

/// Returns whether a statement failed because its guard refused: nothing was written, start again.
#[must_use]
pub fn is_fenced(error: &Error) -> bool {
    error.answer().is_some_and(|answer| answer.is_fenced())
}

/// Sorts the error of a writing statement, or of a commit, by what it says about the effect, as
/// `writethrough::postgres::op_error` does for the other driver.
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

/// Returns whether a statement failed because the epoch row, or what belongs to it, is gone.
#[must_use]
pub fn is_missing(error: &Error) -> bool {
    error.answer().is_some_and(|answer| answer.is_missing())
}

/// Returns whether a statement failed only because it was prepared before the schema changed, or on another
/// connection of a pooler. It had no effect; prepared anew, on another connection, it may work.
#[must_use]
pub fn is_stale_statement(error: &Error) -> bool {
    let answer = error.answer();
    answer.is_some_and(|answer| answer.is_stale_statement())
}

impl SqlxFence {
    /// Makes a fence with two connections of its own, made as those of the service's `pool` are: a poll
    /// that waits for a connection behind the service's queries would cost the node its read lease, and so
    /// its cache, when it needs it most.
    ///
    /// What the pool does to its connections after they are made (`after_connect`) is not done to these;
    /// where that is needed, there is [`SqlxFence::on`].
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime, as `sqlx` does.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        let connect = (*pool.connect_options()).clone();
        let own = PgPoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(CONNECT)
            // A dead connection costs one poll; the test costs each poll a round trip.
            .test_before_acquire(false);
        Self::over(own.connect_lazy_with(connect))
    }

    /// Makes a fence on exactly this pool, of two connections at least, that nothing else should use.
    #[must_use]
    pub fn on(pool: PgPool) -> Self {
        Self::over(pool)
    }

    /// Tests on two connections what the guard rests on: that the server's advisory locks lock, and that a
    /// function which waited for one sees what was committed meanwhile. Some engines that speak Postgres'
    /// protocol answer these functions and do nothing. The fence does it by itself before it first believes
    /// a server, and again when the server is another one.
    ///
    /// # Errors
    ///
    /// [`UnfitDatabase`].
    ///
    /// # Cancellation
    ///
    /// Leaves at most a row in `writethrough.self_test`, which nobody reads.
    pub async fn self_test(
        holder: &mut PgConnection,
        waiter: &mut PgConnection,
    ) -> Result<(), UnfitDatabase> {
        database::self_test(holder, waiter).await
    }

    /// Installs or upgrades the schema `writethrough`; safe to call from every node at start. For a
    /// migration tool of your own, `sqlx`'s for one, there is [`crate::migration::MIGRATIONS`].
    ///
    /// # Errors
    ///
    /// [`MigrateError`] when the database refuses or cannot be reached.
    ///
    /// # Cancellation
    ///
    /// Leaves nothing: all migrations are one transaction.
    pub async fn migrate(connection: &mut PgConnection) -> Result<(), MigrateError<Error>> {
        migration::install(connection).await
    }
}

impl DriverError for Error {
    fn answer(&self) -> Option<Answer<'_>> {
        let answer = self.as_database_error()?;
        let answer = answer.try_downcast_ref::<PgDatabaseError>()?;
        Some(Answer {
            code: answer.code(),
            plain_error: answer.severity() == PgSeverity::Error,
            message: answer.message(),
            routine: answer.routine(),
        })
    }
}

/// Sends a text without parameters, and returns its rows as text.
pub(crate) async fn run(connection: &mut PgConnection, text: &str) -> Result<Rows, Error> {
    // Every text is made of constants and numbers.
    let text = ::sqlx::raw_sql(AssertSqlSafe(text.to_owned()));
    let rows = text.fetch_all(connection).await?;
    rows.iter().map(texts).collect()
}

/// What an unprepared statement shows, which comes as text.
fn texts(row: &PgRow) -> Result<Vec<String>, Error> {
    let text = |at| {
        let value = row.try_get_raw(at)?;
        let text = if value.is_null() {
            ""
        } else {
            value.as_str().map_err(Error::Decode)?
        };
        Ok(text.to_owned())
    };
    (0..row.len()).map(text).collect()
}

impl Connection for PgConnection {
    type Error = Error;
    type Transaction<'a> = ::sqlx::Transaction<'a, Postgres>;

    async fn begin(&mut self) -> Result<Self::Transaction<'_>, Error> {
        ::sqlx::Connection::begin(self).await
    }

    async fn run(&mut self, text: &str) -> Result<Rows, Error> {
        run(self, text).await
    }
}

impl Transaction for ::sqlx::Transaction<'_, Postgres> {
    type Error = Error;

    async fn run(&mut self, text: &str) -> Result<Rows, Error> {
        run(self, text).await
    }

    async fn commit(self) -> Result<(), Error> {
        self.commit().await
    }

    async fn roll_back(self) -> Result<(), Error> {
        self.rollback().await
    }
}

impl Database for PgPool {
    type Error = Error;
    type PoolError = Error;
    type Pooled = PoolConnection<Postgres>;
    type Connection = PgConnection;

    async fn take(&self) -> Result<Self::Pooled, Error> {
        self.acquire().await
    }

    fn connection(pooled: &mut Self::Pooled) -> &mut PgConnection {
        pooled
    }

    fn close(pooled: Self::Pooled) {
        drop(pooled.detach());
    }

    fn has_idle(&self) -> bool {
        self.num_idle() > 0
    }

    fn max_size(&self) -> usize {
        usize::try_from(self.options().get_max_connections()).unwrap_or(usize::MAX)
    }

    async fn ask(
        pooled: &mut Self::Pooled,
        statement: &'static str,
        parameters: &[Parameter<'_>],
    ) -> Result<Option<RowSeen>, Error> {
        let mut query = ::sqlx::query(statement);
        for parameter in parameters {
            query = match parameter {
                Parameter::Number(number) => query.bind(*number),
                Parameter::Text(text) => query.bind(*text),
                Parameter::Flag(flag) => query.bind(*flag),
            };
        }
        let row = query.fetch_optional(&mut **pooled).await?;
        row.as_ref().map(seen).transpose()
    }

    /// Each connection fails once and is closed for it: the pool cannot reach the others.
    fn forget_statements(&self) {}
}

fn seen(row: &PgRow) -> Result<RowSeen, Error> {
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
