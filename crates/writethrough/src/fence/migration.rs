//! Installs and upgrades tables in Postgres: the fence's own, and those of a service that does it alike.
//!
//! All is done in one transaction under one advisory lock, which ends with it: a lock of the session
//! would stay behind in a pooler that lends each transaction another connection. Both the lock and the
//! transaction are bounded, so that no attempt outlives the next.
//!
//! A migration is never changed once it is published. It says by its name whether programs from before
//! it may go on: `V3__add_colour_compatible_from_2` works with programs that know nothing newer than
//! version 2. Without such a promise they are refused.

use std::collections::BTreeMap;

use refinery::Migration;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Transaction};

/// The longest wait for a lock: the one of the migrations, and those of the tables they change.
const LOCK_TIMEOUT: &str = "5s";
/// The longest that one statement of a migration may take.
const STATEMENT_TIMEOUT: &str = "50s";
/// What stands before the oldest version that a migration is compatible with.
const PROMISE: &str = "_compatible_from_";

/// The schema could not be installed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// The database could not be asked.
    #[error("the schema could not be looked at")]
    Database(#[from] tokio_postgres::Error),
    /// Another session keeps the lock of the migrations.
    #[error(
        "the advisory lock {lock} of the migrations is held by {holder}; it is tried again; a session that \
         does not end by itself is ended with `SELECT pg_terminate_backend(PID)`"
    )]
    Locked {
        /// The lock's number.
        lock: i64,
        /// Who holds it: process id, application and state.
        holder: String,
    },
    /// A migration failed; nothing of it is left.
    #[error("migration {migration} failed")]
    Failed {
        /// Its name.
        migration: String,
        /// Why.
        #[source]
        error: tokio_postgres::Error,
    },
    /// A newer version of the program has changed the schema, without a promise to this one.
    #[error(
        "the schema was made by a newer version of this program: `{history}` has {migration}, and this \
         program knows nothing after version {known}; use a program that is as new"
    )]
    Newer {
        /// The table of the migrations that were made.
        history: &'static str,
        /// The migration that is not known.
        migration: String,
        /// The newest version that is known.
        known: i32,
    },
    /// A migration that was made is not the one that this program has under its version.
    #[error(
        "`{history}` has {found}, which is not this program's {migration}; use the program that made the \
         schema, or another database"
    )]
    Divergent {
        /// The table of the migrations that were made.
        history: &'static str,
        /// What is there.
        found: String,
        /// What should be there.
        migration: String,
    },
    /// The schema was installed, and what it needs is gone.
    #[error("{0}")]
    Missing(&'static str),
}

impl MigrateError {
    /// Whether it stays until somebody mends it, so that trying again does not help.
    #[must_use]
    pub fn needs_mending(&self) -> bool {
        match self {
            Self::Newer { .. } | Self::Divergent { .. } | Self::Missing(_) => true,
            // Rights, and names that are taken or missing.
            Self::Database(error) | Self::Failed { error, .. } => error
                .code()
                .is_some_and(|code| code.code().starts_with("42")),
            Self::Locked { .. } => false,
        }
    }

    /// The server's answer, if that is the reason.
    #[must_use]
    pub fn code(&self) -> Option<&SqlState> {
        match self {
            Self::Database(error) | Self::Failed { error, .. } => error.code(),
            _ => None,
        }
    }
}

/// Makes the migrations that were not made yet, in order, and notes them in the table `history`.
///
/// A schema that a newer program has changed is accepted when each newer migration promises to be
/// compatible with this one by its name, as in `V3__add_colour_compatible_from_2`. When nothing is to be
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
) -> Result<(), MigrateError> {
    let looked = client.transaction().await?;
    match made(&looked, history).await {
        Ok(made) if to_do(history, migrations, &made)?.is_empty() => return Ok(()),
        Ok(_) => {}
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => {}
        Err(error) => return Err(error.into()),
    }
    looked.rollback().await?;

    let transaction = client.transaction().await?;
    let bounds = format!(
        "SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT}'"
    );
    transaction.batch_execute(&bounds).await?;
    let take = format!("SELECT pg_advisory_xact_lock({lock})");
    if let Err(error) = transaction.batch_execute(&take).await {
        if error.code() != Some(&SqlState::LOCK_NOT_AVAILABLE) {
            return Err(error.into());
        }
        transaction.rollback().await?;
        let holder = holder(client, lock).await?;
        return Err(MigrateError::Locked { lock, holder });
    }
    let failed = |migration: &str| {
        let migration = migration.to_owned();
        move |error| MigrateError::Failed { migration, error }
    };
    let table = format!(
        "CREATE TABLE IF NOT EXISTS {history} (version int4 PRIMARY KEY, name varchar(255), \
         applied_on varchar(255), checksum varchar(255))"
    );
    transaction
        .batch_execute(&table)
        .await
        .map_err(failed(history))?;
    // Somebody else may have been faster.
    let made = made(&transaction, history).await?;
    for migration in to_do(history, migrations, &made)? {
        let note = format!(
            "INSERT INTO {history} (version, name, applied_on, checksum) VALUES ({}, '{}', \
             to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), '{}')",
            migration.version(),
            migration.name(),
            migration.checksum()
        );
        for statement in [migration.sql().unwrap_or_default(), &note] {
            transaction
                .batch_execute(statement)
                .await
                .map_err(failed(&migration.to_string()))?;
        }
    }
    transaction.commit().await.map_err(failed(history))
}

/// The name and the checksum of a migration that was made.
type Made = BTreeMap<i32, (String, String)>;

async fn made(transaction: &Transaction<'_>, history: &str) -> Result<Made, tokio_postgres::Error> {
    let look = format!("SELECT version, name, checksum FROM {history}");
    // Unnamed, so that it passes every pooler.
    let rows = transaction.query_typed(&look, &[]).await?;
    rows.iter()
        .map(|row| Ok((row.try_get(0)?, (row.try_get(1)?, row.try_get(2)?))))
        .collect()
}

/// What is still to be done, if this program can use what is there.
fn to_do<'a>(
    history: &'static str,
    migrations: &'a [Migration],
    made: &Made,
) -> Result<Vec<&'a Migration>, MigrateError> {
    let known = migrations.iter().map(Migration::version).max().unwrap_or(0);
    for (version, (name, _)) in made.range(known + 1..) {
        let promised = name
            .rsplit_once(PROMISE)
            .and_then(|(_, from)| from.parse().ok());
        if promised.is_none_or(|from: i32| known < from) {
            return Err(MigrateError::Newer {
                history,
                migration: format!("V{version}__{name}"),
                known,
            });
        }
    }
    let mut missing = Vec::new();
    for migration in migrations {
        match made.get(&migration.version()) {
            None => missing.push(migration),
            Some((_, checksum)) if *checksum == migration.checksum().to_string() => {}
            Some((name, _)) => {
                return Err(MigrateError::Divergent {
                    history,
                    found: format!("V{}__{name}", migration.version()),
                    migration: migration.to_string(),
                });
            }
        }
    }
    missing.sort_by_key(|migration| migration.version());
    Ok(missing)
}

/// Who holds the lock, in words.
async fn holder(client: &Client, lock: i64) -> Result<String, tokio_postgres::Error> {
    let look = format!(
        "SELECT pid, coalesce(application_name, ''), coalesce(state, 'an unknown state') \
         FROM pg_locks LEFT JOIN pg_stat_activity USING (pid) \
         WHERE locktype = 'advisory' AND granted AND objsubid = 1 \
         AND (classid::bigint << 32 | objid::bigint) = {lock} \
         AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    );
    let rows = client.query_typed(&look, &[]).await?;
    let Some(row) = rows.first() else {
        return Ok("a session that has ended since".to_owned());
    };
    let (pid, application, state): (i32, String, String) =
        (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    Ok(format!(
        "process {pid} (application `{application}`, {state})"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HISTORY: &str = "history";

    fn known() -> Vec<Migration> {
        ["V1__first", "V2__second"]
            .map(|name| Migration::unapplied(name, "SELECT 1").unwrap())
            .to_vec()
    }

    fn after(names: &[(i32, &str)]) -> Result<usize, MigrateError> {
        let known = known();
        let mut made: Made = known
            .iter()
            .map(|one| {
                let (name, checksum) = (one.name().to_owned(), one.checksum().to_string());
                (one.version(), (name, checksum))
            })
            .collect();
        made.extend(
            names
                .iter()
                .map(|(version, name)| (*version, ((*name).to_owned(), "7".into()))),
        );
        to_do(HISTORY, &known, &made).map(|missing| missing.len())
    }

    #[test]
    fn a_newer_schema_is_accepted_if_each_newer_migration_promises_it() {
        assert_eq!(after(&[]).unwrap(), 0);
        assert_eq!(after(&[(3, "a_compatible_from_2")]).unwrap(), 0);
        assert_eq!(
            after(&[(3, "a_compatible_from_1"), (5, "b_compatible_from_2")]).unwrap(),
            0
        );
        for refused in [
            &[(3, "a")] as &[_],
            &[(3, "a_compatible_from_3")],
            &[(3, "a_compatible_from_")],
            &[(3, "a"), (4, "b_compatible_from_2")],
            &[(3, "a_compatible_from_2"), (4, "b")],
        ] {
            let error = after(refused).unwrap_err();
            assert!(
                matches!(error, MigrateError::Newer { known: 2, .. }),
                "{error}"
            );
            assert!(error.needs_mending());
        }
    }

    #[test]
    fn another_migration_under_a_known_version_is_refused() {
        let error = after(&[(2, "other_compatible_from_1")]).unwrap_err();
        let line = error.to_string();
        assert!(
            line.contains("V2__other") && line.contains("V2__second"),
            "{line}"
        );
    }

    #[test]
    fn what_is_missing_is_made_in_order() {
        let mut known = known();
        known.reverse();
        let missing = to_do(HISTORY, &known, &Made::new()).unwrap();
        let versions: Vec<_> = missing.iter().map(|one| one.version()).collect();
        assert_eq!(versions, [1, 2]);
    }
}
