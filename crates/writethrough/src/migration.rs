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
use std::fmt;
use std::hash::{Hash, Hasher};

use siphasher::sip::SipHasher13;

use crate::driver::{Connection, DriverError, Transaction, is_busy_lock};

/// What to do about a row or a schema that somebody has removed. All nodes may go on running.
pub(crate) const MISSING: &str = "the epoch row is missing; run `DROP SCHEMA IF EXISTS writethrough CASCADE; \
     DROP TABLE IF EXISTS writethrough_schema_history` and start a node, which makes it anew";

/// The longest wait for a lock: the one of the migrations, and those of the tables they change.
const LOCK_TIMEOUT: &str = "5s";
/// The longest that one statement of a migration may take.
const STATEMENT_TIMEOUT: &str = "50s";
/// What stands before the oldest version that a migration is compatible with.
const PROMISE: &str = "_compatible_from_";

/// The table in which the fence's own migrations are noted.
const HISTORY: &str = "writethrough_schema_history";
/// Keeps two nodes from migrating at once; any fixed number that nobody else uses.
const LOCK: i64 = 0x7772_6974_6574_6801;

/// The migrations that install the schema `writethrough`, in order, as text for a migration tool of your
/// own. Each is to be run once, in a transaction. [`crate::PostgresFence::migrate`] does it by itself, and
/// is not to be used on a database that another tool has migrated.
pub const MIGRATIONS: &[Migration] = &[
    Migration::new(1, "epoch", include_str!("../migrations/V1__epoch.sql")),
    Migration::new(2, "history", include_str!("../migrations/V2__history.sql")),
];

/// One step of a schema, as SQL text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Migration {
    /// Counts from 1.
    pub version: i32,
    /// Letters, digits and `_`. It may end with a promise, as in `add_colour_compatible_from_2`.
    pub name: &'static str,
    /// Statements that are run in one transaction.
    pub sql: &'static str,
}

impl Migration {
    /// A migration; it is never changed once it is published.
    #[must_use]
    pub const fn new(version: i32, name: &'static str, sql: &'static str) -> Self {
        Self { version, name, sql }
    }

    /// What is noted of its content, as the crate `refinery` counts it: databases have been migrated with
    /// that.
    fn checksum(&self) -> String {
        let mut hasher = SipHasher13::new();
        self.name.hash(&mut hasher);
        self.version.hash(&mut hasher);
        self.sql.hash(&mut hasher);
        hasher.finish().to_string()
    }
}

impl fmt::Display for Migration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "V{}__{}", self.version, self.name)
    }
}

/// The schema could not be installed. `E` is the error of the driver.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError<E> {
    /// The database could not be asked.
    #[error("the schema could not be looked at")]
    Database(#[source] E),
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
        error: E,
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

impl<E: DriverError> MigrateError<E> {
    /// Whether it stays until somebody mends it, so that trying again does not help.
    #[must_use]
    pub fn needs_mending(&self) -> bool {
        match self {
            Self::Newer { .. } | Self::Divergent { .. } | Self::Missing(_) => true,
            // Rights, and names that are taken or missing.
            Self::Database(_) | Self::Failed { .. } => {
                self.code().is_some_and(|code| code.starts_with("42"))
            }
            Self::Locked { .. } => false,
        }
    }

    /// The SQLSTATE of the server's answer, if that is the reason.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Database(error) | Self::Failed { error, .. } => {
                error.answer().map(|answer| answer.code)
            }
            _ => None,
        }
    }
}

/// Makes the migrations that were not made yet, in order, and notes them in the table `history`.
pub(crate) async fn migrate<C: Connection>(
    connection: &mut C,
    history: &'static str,
    lock: i64,
    migrations: &[Migration],
) -> Result<(), MigrateError<C::Error>> {
    use MigrateError::Database;

    let mut looked = connection.begin().await.map_err(Database)?;
    match made(&mut looked, history).await {
        Ok(made) if to_do(history, migrations, &made)?.is_empty() => return Ok(()),
        Ok(_) => {}
        // No such table.
        Err(error) if error.answer().is_some_and(|answer| answer.code == "42P01") => {}
        Err(error) => return Err(Database(error)),
    }
    looked.roll_back().await.map_err(Database)?;

    let mut transaction = connection.begin().await.map_err(Database)?;
    let bounds = format!(
        "SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT}'"
    );
    transaction.run(&bounds).await.map_err(Database)?;
    let take = format!("SELECT pg_advisory_xact_lock({lock})");
    if let Err(error) = transaction.run(&take).await {
        if !is_busy_lock(&error) {
            return Err(Database(error));
        }
        transaction.roll_back().await.map_err(Database)?;
        let holder = holder(connection, lock).await.map_err(Database)?;
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
    transaction.run(&table).await.map_err(failed(history))?;
    // Somebody else may have been faster.
    let made = made(&mut transaction, history).await.map_err(Database)?;
    for migration in to_do(history, migrations, &made)? {
        let note = format!(
            "INSERT INTO {history} (version, name, applied_on, checksum) VALUES ({}, '{}', \
             to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), '{}')",
            migration.version,
            migration.name,
            migration.checksum()
        );
        for text in [migration.sql, &note] {
            transaction
                .run(text)
                .await
                .map_err(failed(&migration.to_string()))?;
        }
    }
    transaction.commit().await.map_err(failed(history))
}

/// Makes the fence's own migrations, and looks whether what they made is still there.
pub(crate) async fn install<C: Connection>(
    connection: &mut C,
) -> Result<(), MigrateError<C::Error>> {
    migrate(connection, HISTORY, LOCK, MIGRATIONS).await?;
    match connection
        .run("SELECT true FROM writethrough.row_seen")
        .await
    {
        Ok(rows) if !rows.is_empty() => Ok(()),
        Ok(_) => Err(MigrateError::Missing(MISSING)),
        Err(error) if error.answer().is_some_and(|answer| answer.is_missing()) => {
            Err(MigrateError::Missing(MISSING))
        }
        Err(error) => Err(MigrateError::Database(error)),
    }
}

/// The name and the checksum of a migration that was made.
type Made = BTreeMap<i32, (String, String)>;

async fn made<T: Transaction>(transaction: &mut T, history: &str) -> Result<Made, T::Error> {
    let look = format!("SELECT version, name, checksum FROM {history}");
    let rows = transaction.run(&look).await?;
    let row = |row: Vec<String>| {
        let [version, name, checksum] = <[String; 3]>::try_from(row).ok()?;
        Some((version.parse().ok()?, (name, checksum)))
    };
    Ok(rows.into_iter().filter_map(row).collect())
}

/// What is still to be done, if this program can use what is there.
fn to_do<'a, E>(
    history: &'static str,
    migrations: &'a [Migration],
    made: &Made,
) -> Result<Vec<&'a Migration>, MigrateError<E>> {
    let known = migrations.iter().map(|one| one.version).max().unwrap_or(0);
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
        match made.get(&migration.version) {
            None => missing.push(migration),
            Some((_, checksum)) if *checksum == migration.checksum() => {}
            Some((name, _)) => {
                return Err(MigrateError::Divergent {
                    history,
                    found: format!("V{}__{name}", migration.version),
                    migration: migration.to_string(),
                });
            }
        }
    }
    missing.sort_by_key(|migration: &&Migration| migration.version);
    Ok(missing)
}

/// Who holds the lock, in words.
async fn holder<C: Connection>(connection: &mut C, lock: i64) -> Result<String, C::Error> {
    let look = format!(
        "SELECT 'process ' || pid || ' (application `' || coalesce(application_name, '') || '`, ' \
             || coalesce(state, 'an unknown state') || ')' \
         FROM pg_locks LEFT JOIN pg_stat_activity USING (pid) \
         WHERE locktype = 'advisory' AND granted AND objsubid = 1 \
         AND (classid::bigint << 32 | objid::bigint) = {lock} \
         AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    );
    let rows = connection.run(&look).await?;
    let holder = rows.into_iter().flatten().next();
    Ok(holder.unwrap_or_else(|| "a session that has ended since".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::Answer;

    /// The error of no driver.
    #[derive(Debug, thiserror::Error)]
    #[error("never")]
    struct Never;

    impl DriverError for Never {
        fn answer(&self) -> Option<Answer<'_>> {
            None
        }
    }

    fn known() -> Vec<Migration> {
        vec![
            Migration::new(1, "first", "SELECT 1"),
            Migration::new(2, "second", "SELECT 1"),
        ]
    }

    fn after(names: &[(i32, &str)]) -> Result<usize, MigrateError<Never>> {
        let known = known();
        let mut made: Made = known
            .iter()
            .map(|one| {
                let (name, checksum) = (one.name.to_owned(), one.checksum());
                (one.version, (name, checksum))
            })
            .collect();
        made.extend(
            names
                .iter()
                .map(|(version, name)| (*version, ((*name).to_owned(), "7".into()))),
        );
        to_do("history", &known, &made).map(|missing| missing.len())
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
        let missing = to_do::<Never>("history", &known, &Made::new()).unwrap();
        let versions: Vec<_> = missing.iter().map(|one| one.version).collect();
        assert_eq!(versions, [1, 2]);
    }

    /// Databases carry these numbers, which the crate `refinery` made of the same texts: were they others,
    /// a node would refuse a schema that it made itself before an upgrade.
    #[test]
    fn checksums_are_those_that_databases_were_migrated_with() {
        let checksums: Vec<String> = MIGRATIONS.iter().map(Migration::checksum).collect();
        assert_eq!(checksums, ["17460332124441815515", "7829452821805538129"]);
    }
}
