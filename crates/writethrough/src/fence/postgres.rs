//! The fence in Postgres: one row, one advisory lock, and a guard that is part of the user's own
//! statement or transaction.
//!
//! The schema is `writethrough`, installed by [`PostgresFence::migrate`]. A writing statement
//! carries the guard like this, in one round trip:
//!
//! ```sql
//! UPDATE items SET name = $3 FROM writethrough.guard($1) WHERE items.id = $2 RETURNING *
//! ```
//!
//! With `NULL` in the place of [`Guard::parameter`] the same statement runs without a guard: for writers
//! without an epoch, while nobody caches.
//!
//! In a transaction of several statements, `SELECT writethrough.guard($1)` comes first. The
//! function refuses to run above READ COMMITTED, where it could not see a newer epoch.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use deadpool_postgres::{Object, Pool};
use tokio_postgres::error::{Severity, SqlState};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};
use writethrough_protocol::{Epoch, EpochRow, HistoryId, Mode, Proposal, ServerId, Sighting};

pub use super::migration::{MigrateError, migrate_schema};
use super::{Fence, Guard};
use crate::error::{FenceError, Fenced, OpError, chain};

mod schema {
    refinery::embed_migrations!("migrations");
}

/// The SQLSTATE with which `writethrough.guard` refuses.
pub const FENCED_SQLSTATE: &str = "WT001";
/// The SQLSTATE with which `writethrough.guard` says that there is no epoch row.
const MISSING_SQLSTATE: &str = "WT002";
/// The table of the migrations that were made.
const HISTORY: &str = "writethrough_schema_history";
/// Keeps two nodes from migrating at once; any fixed number that nobody else uses.
const MIGRATION_LOCK: i64 = 0x7772_6974_6574_6801;

/// Whether a statement failed because its guard refused: nothing was written, start again.
#[must_use]
pub fn is_fenced(error: &tokio_postgres::Error) -> bool {
    error
        .code()
        .is_some_and(|code| code.code() == FENCED_SQLSTATE)
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
///
/// Source: PostgreSQL's documentation, "Message Severity Levels" and "PostgreSQL Error Codes".
#[must_use]
pub fn op_error(error: tokio_postgres::Error) -> OpError<tokio_postgres::Error> {
    if is_fenced(&error) {
        return OpError::Fenced;
    }
    if is_without_effect(&error) {
        OpError::Rejected(error)
    } else {
        OpError::Unknown(error)
    }
}

/// Whether the server's answer says that what it was sent had no effect.
pub(crate) fn is_without_effect(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|answer| {
        let ended = match answer.parsed_severity() {
            Some(severity) => matches!(severity, Severity::Fatal | Severity::Panic),
            None => matches!(answer.severity(), "FATAL" | "PANIC"),
        };
        let code = answer.code().code();
        !ended && !code.starts_with("08") && code != "40003"
    })
}

/// Whether a statement failed only because it was prepared before the schema changed, or on another
/// connection of a pooler. It had no effect; prepared anew, on another connection, it may work.
#[must_use]
pub fn is_stale_statement(error: &tokio_postgres::Error) -> bool {
    let Some(answer) = error.as_db_error() else {
        return false;
    };
    match answer.code().code() {
        // No such prepared statement, and one of that name already.
        "26000" | "42P05" => true,
        // "cached plan must not change result type"; the code has other uses.
        "0A000" => {
            answer.routine() == Some("RevalidateCachedQuery")
                || answer.message().contains("cached plan")
        }
        // "cache lookup failed for type 16421": dropped since.
        "XX000" => answer.message().starts_with("cache lookup failed"),
        _ => false,
    }
}

/// The database cannot guard writes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnfitDatabase {
    /// A lock that one connection holds alone did not make another one wait.
    #[error(
        "its advisory locks lock nothing (one connection held a lock alone, and another one got it \
         too), so it cannot guard writes; use PostgreSQL itself, or an engine whose advisory locks work"
    )]
    NoLocks,
    /// A function that waited for a lock did not see what was committed meanwhile.
    #[error(
        "a function that waits for a lock does not see what is committed meanwhile, so it cannot \
         guard writes; use PostgreSQL itself, with READ COMMITTED"
    )]
    OldSnapshot,
    /// The test could not be made.
    #[error("its locks could not be tested")]
    Untested(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What to do about a row or a schema that somebody has removed. All nodes may go on running.
const MISSING: &str = "the epoch row is missing; run `DROP SCHEMA IF EXISTS writethrough CASCADE; \
     DROP TABLE IF EXISTS writethrough_schema_history` and start a node, which makes it anew";

/// The longest that a poll on a new connection goes on when nobody waits for it any more.
const FIRST_POLL: Duration = Duration::from_secs(3);

/// How long the lock of the self-test is waited for, in vain.
const SELF_TEST_WAIT: Duration = Duration::from_millis(20);

/// Keeps the epoch in Postgres, for any number of nodes.
pub struct PostgresFence {
    pool: Pool,
    /// Held by a poll on a new connection.
    first_poll: Arc<tokio::sync::Mutex<()>>,
    /// The server that passed the test of its locks.
    tested: tokio::sync::Mutex<Option<String>>,
    /// Whether the last poll found the server read-only.
    read_only: AtomicBool,
}

/// A pooled connection that is thrown away unless its work was seen to end: the reply to an
/// abandoned query would hold up whoever came next.
struct Lent(Option<Object>);

impl Lent {
    fn give_back(mut self) {
        self.0.take();
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(object) = self.0.take() {
            drop(Object::take(object));
        }
    }
}

fn failed(error: impl std::error::Error + 'static) -> FenceError {
    let reason = chain(&error);
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(error) = cause {
        if error.downcast_ref().is_some_and(needs_mending) {
            return FenceError::Broken(reason);
        }
        cause = error.source();
    }
    FenceError::Away(reason)
}

/// Whether the server answered with something that does not go away by itself.
fn needs_mending(error: &tokio_postgres::Error) -> bool {
    let refused = [
        SqlState::INSUFFICIENT_PRIVILEGE,
        SqlState::READ_ONLY_SQL_TRANSACTION,
    ];
    is_missing(error) || error.code().is_some_and(|code| refused.contains(code))
}

/// Whether a statement failed because the epoch row, or what belongs to it, is gone.
#[must_use]
pub fn is_missing(error: &tokio_postgres::Error) -> bool {
    let gone = [
        SqlState::UNDEFINED_TABLE,
        SqlState::UNDEFINED_COLUMN,
        SqlState::UNDEFINED_FUNCTION,
        SqlState::INVALID_SCHEMA_NAME,
    ];
    error
        .code()
        .is_some_and(|code| code.code() == MISSING_SQLSTATE || gone.contains(code))
}

impl fmt::Debug for PostgresFence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresFence").finish_non_exhaustive()
    }
}

impl PostgresFence {
    /// A fence over a pool of its own, two connections are enough: the poll must not wait behind
    /// the service's queries. The pool must connect to the primary and should bound its waits.
    #[must_use]
    pub fn new(pool: Pool) -> Self {
        Self {
            pool,
            first_poll: Arc::default(),
            tested: tokio::sync::Mutex::new(None),
            read_only: AtomicBool::new(false),
        }
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
        let untested = |error: tokio_postgres::Error| UnfitDatabase::Untested(Box::new(error));
        // An own lock and an own row: other nodes, and writes under way, have nothing to do with it.
        let lock = fastrand::i64(..);
        let insert = "INSERT INTO writethrough.self_test (lock, number) VALUES ($1, 1)";
        holder.execute(insert, &[&lock]).await.map_err(untested)?;
        let held = holder.transaction().await.map_err(untested)?;
        held.execute("SELECT pg_advisory_xact_lock($1)", &[&lock])
            .await
            .map_err(untested)?;
        let update = "UPDATE writethrough.self_test SET number = 2 WHERE lock = $1";
        held.execute(update, &[&lock]).await.map_err(untested)?;

        let refused = waiter.transaction().await.map_err(untested)?;
        let brief = format!("SET LOCAL lock_timeout = {}", SELF_TEST_WAIT.as_millis());
        refused.batch_execute(&brief).await.map_err(untested)?;
        let shared = refused
            .execute("SELECT pg_advisory_xact_lock_shared($1)", &[&lock])
            .await;
        match shared {
            Ok(_) => return Err(UnfitDatabase::NoLocks),
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {}
            Err(error) => return Err(untested(error)),
        }
        refused.rollback().await.map_err(untested)?;

        let look = async {
            let statement = "SELECT writethrough.self_test_guard($1)";
            waiter.query_one(statement, &[&lock]).await
        };
        let release = async {
            // Time for the other connection to get as far as its lock. Were it later, it would see
            // the change all the same, and the test would only prove less.
            tokio::time::sleep(SELF_TEST_WAIT).await;
            held.commit().await
        };
        let (seen, released) = tokio::join!(look, release);
        released.map_err(untested)?;
        let number: i64 = seen.and_then(|row| row.try_get(0)).map_err(untested)?;
        let delete = "DELETE FROM writethrough.self_test WHERE lock = $1";
        holder.execute(delete, &[&lock]).await.map_err(untested)?;
        if number == 2 {
            Ok(())
        } else {
            Err(UnfitDatabase::OldSnapshot)
        }
    }

    /// Tests the server's locks if this one has not passed the test yet.
    async fn tested(&self, server: String) -> Result<(), FenceError> {
        let mut tested = self.tested.lock().await;
        if tested.as_ref() == Some(&server) {
            return Ok(());
        }
        if self.pool.status().max_size < 2 {
            return Err(FenceError::Broken("its pool needs two connections".into()));
        }
        let mut holder = Lent(Some(self.pool.get().await.map_err(failed)?));
        let mut waiter = Lent(Some(self.pool.get().await.map_err(failed)?));
        if let (Some(holder), Some(waiter)) = (&mut holder.0, &mut waiter.0) {
            let passed = Self::self_test(holder, waiter).await;
            passed.map_err(|unfit| match unfit {
                UnfitDatabase::Untested(_) => failed(unfit),
                _ => FenceError::Broken(unfit.to_string()),
            })?;
        }
        holder.give_back();
        waiter.give_back();
        *tested = Some(server);
        Ok(())
    }

    /// Installs or upgrades the schema `writethrough`; safe to call from every node at start.
    ///
    /// # Errors
    ///
    /// [`MigrateError`] when the database refuses or cannot be reached.
    ///
    /// # Cancellation
    ///
    /// Leaves nothing: all migrations are one transaction.
    pub async fn migrate(client: &mut Client) -> Result<(), MigrateError> {
        let migrations = schema::migrations::runner();
        let migrations = migrations.get_migrations();
        migrate_schema(client, HISTORY, MIGRATION_LOCK, migrations).await?;
        match client
            .query_typed("SELECT FROM writethrough.row_seen", &[])
            .await
        {
            Ok(rows) if !rows.is_empty() => Ok(()),
            Ok(_) => Err(MigrateError::Missing(MISSING)),
            Err(error) if is_missing(&error) => Err(MigrateError::Missing(MISSING)),
            Err(error) => Err(error.into()),
        }
    }

    /// Polls. On a new connection the poll goes on when nobody waits for it any more: where it takes
    /// longer to connect than a poll may, the next one finds the connection made. Otherwise none would
    /// ever be.
    async fn poll_row(&self) -> Result<Option<Row>, FenceError> {
        const POLL: &str = "SELECT row_seen.*, current_setting('transaction_read_only') = 'on' \
                            FROM writethrough.row_seen";
        let runtime = match tokio::runtime::Handle::try_current() {
            Ok(runtime) if self.pool.status().available == 0 => runtime,
            _ => return self.query(POLL, &[], &[]).await,
        };
        let alone = self.first_poll.clone().lock_owned().await;
        let pool = self.pool.clone();
        let poll = runtime.spawn(async move {
            let row = tokio::time::timeout(FIRST_POLL, query(&pool, POLL, &[], &[])).await;
            drop(alone);
            row
        });
        poll.await.map_err(failed)?.map_err(failed)?
    }

    async fn query(
        &self,
        statement: &str,
        types: &[Type],
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, FenceError> {
        query(&self.pool, statement, types, parameters).await
    }

    async fn sighting(
        &self,
        statement: &str,
        types: &[Type],
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Sighting, FenceError> {
        let row = self.query(statement, types, parameters).await?;
        let row = row.ok_or_else(|| FenceError::Broken(MISSING.to_owned()))?;
        sighting(&row).map_err(failed)
    }
}

async fn query(
    pool: &Pool,
    statement: &str,
    types: &[Type],
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<Option<Row>, FenceError> {
    let lent = Lent(Some(pool.get().await.map_err(failed)?));
    let Some(client) = &lent.0 else {
        return Ok(None);
    };
    let row = async {
        let prepared = client.prepare_typed_cached(statement, types).await?;
        client.query_opt(&prepared, parameters).await
    };
    let row = row.await.map_err(|error| {
        // The connection is thrown away; the others must not fail in their turn.
        if is_stale_statement(&error) {
            pool.manager().statement_caches.clear();
        }
        if is_missing(&error) {
            return FenceError::Broken(format!("{MISSING} ({})", chain(&error)));
        }
        failed(error)
    })?;
    lent.give_back();
    Ok(row)
}

fn sighting(row: &Row) -> Result<Sighting, tokio_postgres::Error> {
    let number: i64 = row.try_get(0)?;
    let cached_on: Option<String> = row.try_get(1)?;
    let settled: bool = row.try_get(2)?;
    let trouble_seconds: Option<f64> = row.try_get(3)?;
    let history: String = row.try_get(4)?;
    let in_its_history: bool = row.try_get(5)?;
    Ok(Sighting {
        in_its_history,
        row: EpochRow {
            history: HistoryId::new(history),
            number: Epoch(number.unsigned_abs()),
            mode: cached_on.map_or(Mode::Bypass, |id| Mode::Cached(ServerId::new(id))),
            settled,
        },
        trouble_age: trouble_seconds.map(|age| Duration::from_secs_f64(age.clamp(0.0, 1e9))),
    })
}

fn number(epoch: Epoch) -> i64 {
    i64::try_from(epoch.0).unwrap_or(i64::MAX)
}

#[async_trait]
impl Fence for PostgresFence {
    async fn poll(&self) -> Result<Sighting, FenceError> {
        let row = self.poll_row().await?;
        let row = row.ok_or_else(|| FenceError::Broken(MISSING.to_owned()))?;
        let sighting = sighting(&row).map_err(failed)?;
        let read_only = row.try_get(6).map_err(failed)?;
        self.read_only.store(read_only, Ordering::Relaxed);
        // Another history is on another server, or on one that was restored.
        let server = format!("{} {}", sighting.row.history, sighting.in_its_history);
        self.tested(server).await?;
        Ok(sighting)
    }

    async fn propose(&self, proposal: &Proposal) -> Result<Sighting, FenceError> {
        match proposal {
            Proposal::Next {
                from,
                mode,
                settled,
            } => {
                let server = match mode {
                    Mode::Bypass => None,
                    Mode::Cached(server) => Some(server.as_str()),
                };
                self.sighting(
                    "SELECT * FROM writethrough.propose($1, $2, $3)",
                    &[Type::INT8, Type::TEXT, Type::BOOL],
                    &[&number(*from), &server, settled],
                )
                .await
            }
            Proposal::NewHistory { from, above } => {
                let leap = i64::try_from(Proposal::LEAP).unwrap_or(i64::MAX);
                self.sighting(
                    "SELECT * FROM writethrough.begin_history($1, $2, $3)",
                    &[Type::INT8, Type::INT8, Type::INT8],
                    &[&number(*from), &number(*above), &leap],
                )
                .await
            }
        }
    }

    async fn mark_settled(&self, epoch: Epoch) -> Result<(), FenceError> {
        let statement =
            "UPDATE writethrough.epoch SET settled = true WHERE number = $1 AND NOT settled";
        self.query(statement, &[Type::INT8], &[&number(epoch)])
            .await
            .map(drop)
    }

    async fn report_trouble(&self) -> Result<(), FenceError> {
        let statement = "UPDATE writethrough.epoch SET trouble_at = clock_timestamp()";
        self.query(statement, &[], &[]).await.map(drop)
    }

    fn refuses_changes(&self) -> Option<FenceError> {
        let read_only = self.read_only.load(Ordering::Relaxed);
        read_only.then(|| FenceError::Broken("the database is read-only".to_owned()))
    }

    async fn enter(&self, epoch: Epoch) -> Result<Guard, Fenced> {
        Ok(Guard::in_database(epoch))
    }
}
