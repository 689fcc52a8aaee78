//! Postgres by `tokio-postgres` and `deadpool-postgres`: the fence's own functions, and what the
//! operations of writes are handed.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};

use deadpool_postgres::{ClientWrapper, Object, Pool};
use tokio_postgres::{Error, SimpleQueryMessage};

use crate::error::{NoConnection, OpError, Unavailable};
pub use crate::fence::postgres::{
    FENCED_SQLSTATE, MigrateError, UnfitDatabase, is_fenced, is_missing, is_stale_statement,
    migrate_schema, op_error,
};
use crate::writing::{Begin, Ended, sealed};

mod transaction;

pub use transaction::Transaction;

/// A connection of a pool with a transaction that is open. It is closed when it is dropped, unless the
/// transaction was seen to end: neither an open transaction nor the reply to an abandoned statement may
/// meet whoever comes next.
#[doc(hidden)]
#[derive(Debug)]
pub struct Connection {
    /// Some until it is given back.
    object: Option<Object>,
    pool: Pool,
    /// A statement failed only for want of its preparation.
    stale: AtomicBool,
}

impl Deref for Connection {
    type Target = ClientWrapper;

    fn deref(&self) -> &ClientWrapper {
        match &self.object {
            Some(object) => object,
            None => unreachable!("a connection is given back last of all"),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(object) = self.object.take() {
            drop(Object::take(object));
        }
    }
}

impl Connection {
    async fn of(pool: &Pool) -> Result<Self, OpError<Error>> {
        let object = pool.get().await.map_err(|error| {
            OpError::Unavailable(Unavailable::NoConnection(NoConnection::new(error)))
        })?;
        Ok(Self {
            object: Some(object),
            pool: pool.clone(),
            stale: AtomicBool::new(false),
        })
    }

    fn give_back(mut self) {
        self.object = None;
    }

    /// Notes why a statement failed, if that is the connection's fault.
    fn noted<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if let Err(error) = &result
            && is_stale_statement(error)
        {
            self.stale.store(true, Ordering::Relaxed);
        }
        result
    }

    async fn roll_back(self) {
        if self.stale.load(Ordering::Relaxed) {
            // When one is stale, those of the other connections will be, too.
            self.pool.manager().statement_caches.clear();
        } else if self.batch_execute("ROLLBACK").await.is_ok() {
            self.give_back();
        }
    }
}

/// The setting by which the end of a transaction is known to be that of the one which was begun.
const MARK: &str = "begun";

/// Ends the transaction. In one that has failed, the first statement fails too, so that the commit is
/// not taken for one.
const END: &str = "SELECT current_setting('writethrough.write', true); COMMIT";

/// Begins a transaction with its bounds and its guard.
fn begin(begin: Begin) -> String {
    let guard = match begin.epoch {
        Some(epoch) => format!("; SELECT writethrough.guard({epoch})"),
        None => String::new(),
    };
    let bound = begin.bound.as_millis();
    // At most the bound, and less where the session has less; 0 is none.
    let limit = |name| {
        format!(
            "set_config('{name}', least({bound}, nullif(extract(epoch FROM \
             current_setting('{name}')::interval) * 1000, 0))::bigint::text, true)"
        )
    };
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
         SELECT set_config('writethrough.write', '{MARK}', true), {}, {}{guard}",
        limit("statement_timeout"),
        limit("idle_in_transaction_session_timeout"),
    )
}

/// Which transaction the answer to [`END`] is about.
fn ended(answer: &[SimpleQueryMessage]) -> Ended {
    let marked = answer.iter().any(|message| match message {
        SimpleQueryMessage::Row(row) => row.try_get(0).ok().flatten() == Some(MARK),
        _ => false,
    });
    if marked {
        Ended::Guarded
    } else {
        Ended::Unguarded
    }
}

impl sealed::Sealed for Pool {}
