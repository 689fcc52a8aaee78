//! One connection, lent to an operation.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};

use deadpool_postgres::{ClientWrapper, Object, Pool};
use tokio_postgres::{Error, SimpleQueryMessage};

use crate::error::{NoConnection, OpError, Unavailable};
use crate::fence::postgres::is_stale_statement;
use crate::writing::text::MARK;
use crate::writing::{Ended, Performed, sealed};

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
    pub(super) stale: AtomicBool,
    /// What became of the one statement that it was lent for.
    pub(super) performed: Performed,
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
    pub(super) async fn of(pool: &Pool) -> Result<Self, OpError<Error>> {
        let object = pool.get().await.map_err(|error| {
            OpError::Unavailable(Unavailable::NoConnection(NoConnection::new(error)))
        })?;
        Ok(Self {
            object: Some(object),
            pool: pool.clone(),
            stale: AtomicBool::new(false),
            performed: Performed::Nothing,
        })
    }

    pub(super) fn give_back(mut self) {
        self.object = None;
    }

    /// Notes why a statement failed, if that is the connection's fault.
    pub(super) fn noted<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if let Err(error) = &result
            && is_stale_statement(error)
        {
            self.stale.store(true, Ordering::Relaxed);
        }
        result
    }

    pub(super) async fn roll_back(self) {
        let is_stale = self.stale.load(Ordering::Relaxed);
        if is_stale {
            // When one is stale, those of the other connections will be, too.
            self.pool.manager().statement_caches.clear();
        }
        let is_clean = match self.performed {
            _ if is_stale => false,
            Performed::Committed(_) => true,
            Performed::Unknown => false,
            _ => self.batch_execute("ROLLBACK").await.is_ok(),
        };
        if is_clean {
            self.give_back();
        }
    }
}

/// Which transaction the answer to the end of one is about.
pub(super) fn ended(answer: &[SimpleQueryMessage]) -> Ended {
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
