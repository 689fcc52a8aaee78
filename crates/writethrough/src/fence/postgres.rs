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
//! In a transaction of several statements, `SELECT writethrough.guard($1)` comes first. The
//! function refuses to run above READ COMMITTED, where it could not see a newer epoch.

use std::time::Duration;

use async_trait::async_trait;
use deadpool_postgres::{Object, Pool};
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Row};
use writethrough_protocol::{Epoch, EpochRow, Mode, Proposal, ServerId, Sighting};

use super::{Fence, Guard};
use crate::error::{FenceError, Fenced};

mod schema {
    refinery::embed_migrations!("migrations");
}

/// The SQLSTATE with which `writethrough.guard` refuses.
pub const FENCED_SQLSTATE: &str = "WT001";
/// Keeps two nodes from migrating at once; any fixed number that nobody else uses.
const MIGRATION_LOCK: i64 = 0x7772_6974_6574_6801;

/// Whether a statement failed because its guard refused: nothing was written, start again.
#[must_use]
pub fn is_fenced(error: &tokio_postgres::Error) -> bool {
    error
        .code()
        .is_some_and(|code| code.code() == FENCED_SQLSTATE)
}

/// The schema could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// A statement failed.
    #[error("migration lock: {0}")]
    Lock(#[from] tokio_postgres::Error),
    /// A migration failed, or the installed ones differ from those of this version.
    #[error("migration: {0}")]
    Migration(#[from] refinery::Error),
}

/// Keeps the epoch in Postgres, for any number of nodes.
pub struct PostgresFence {
    pool: Pool,
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

fn failed(error: impl std::error::Error) -> FenceError {
    FenceError(describe(&error))
}

fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

impl PostgresFence {
    /// A fence over a pool of its own, two connections are enough: the poll must not wait behind
    /// the service's queries. The pool must connect to the primary and should bound its waits.
    #[must_use]
    pub fn new(pool: Pool) -> Self {
        Self { pool }
    }

    /// Installs or upgrades the schema `writethrough`; safe to call from every node at start.
    ///
    /// # Errors
    ///
    /// [`MigrateError`] when the database refuses or cannot be reached.
    ///
    /// # Cancellation
    ///
    /// Each migration is one transaction; dropped half-way, the rest is done by the next call.
    pub async fn migrate(client: &mut Client) -> Result<(), MigrateError> {
        client
            .execute("SELECT pg_advisory_lock($1)", &[&MIGRATION_LOCK])
            .await?;
        let mut runner = schema::migrations::runner();
        runner.set_migration_table_name("writethrough_schema_history");
        let migrated = runner.run_async(client).await;
        client
            .execute("SELECT pg_advisory_unlock($1)", &[&MIGRATION_LOCK])
            .await?;
        migrated?;
        Ok(())
    }

    async fn query(
        &self,
        statement: &str,
        types: &[Type],
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Option<Row>, FenceError> {
        let lent = Lent(Some(self.pool.get().await.map_err(failed)?));
        let Some(client) = &lent.0 else {
            return Ok(None);
        };
        let prepared = client
            .prepare_typed_cached(statement, types)
            .await
            .map_err(failed)?;
        let row = client
            .query_opt(&prepared, parameters)
            .await
            .map_err(failed)?;
        lent.give_back();
        Ok(row)
    }

    async fn sighting(
        &self,
        statement: &str,
        types: &[Type],
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Sighting, FenceError> {
        let row = self
            .query(statement, types, parameters)
            .await?
            .ok_or_else(|| FenceError("the epoch row is missing; run the migrations".into()))?;
        let number: i64 = row.try_get(0).map_err(failed)?;
        let cached_on: Option<String> = row.try_get(1).map_err(failed)?;
        let settled: bool = row.try_get(2).map_err(failed)?;
        let trouble_seconds: Option<f64> = row.try_get(3).map_err(failed)?;
        Ok(Sighting {
            row: EpochRow {
                number: Epoch(number.unsigned_abs()),
                mode: cached_on.map_or(Mode::Bypass, |id| Mode::Cached(ServerId::new(id))),
                settled,
            },
            trouble_age: trouble_seconds.map(|age| Duration::from_secs_f64(age.clamp(0.0, 1e9))),
        })
    }
}

fn number(epoch: Epoch) -> i64 {
    i64::try_from(epoch.0).unwrap_or(i64::MAX)
}

#[async_trait]
impl Fence for PostgresFence {
    async fn poll(&self) -> Result<Sighting, FenceError> {
        self.sighting("SELECT * FROM writethrough.sighting", &[], &[])
            .await
    }

    async fn propose(&self, proposal: &Proposal) -> Result<Sighting, FenceError> {
        let server = match &proposal.mode {
            Mode::Bypass => None,
            Mode::Cached(server) => Some(server.as_str()),
        };
        self.sighting(
            "SELECT * FROM writethrough.propose($1, $2, $3)",
            &[Type::INT8, Type::TEXT, Type::BOOL],
            &[&number(proposal.from), &server, &proposal.settled],
        )
        .await
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

    async fn enter(&self, epoch: Epoch) -> Result<Guard, Fenced> {
        Ok(Guard::in_database(epoch))
    }
}
