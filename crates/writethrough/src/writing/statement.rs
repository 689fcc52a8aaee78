//! Writes of one statement, which is guarded and committed in its own round trip.

use std::sync::Arc;

use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};

use super::set::{Changes, Slot, Values};
use super::transaction::{Ran, attempts};
use super::{Begin, Commit, Driver, Ended, Lent, Write};
use crate::error::{OpError, Unavailable, WriteError};
use crate::fence::Guard;
use crate::format::Format;
use crate::key::WriteSet;
use crate::write::{self, Written};

/// A pool whose driver can send several messages without waiting for the answer to the first.
///
/// Implemented for the pools of the drivers that this library knows; nobody else can.
pub trait Pipeline: Driver {
    /// What the operation of [`Write::statement`] is handed.
    type Statement: Send + 'static;

    /// Takes a connection out of the pool. Nothing is sent yet.
    #[doc(hidden)]
    fn take(&self) -> impl Future<Output = Result<Self::Connection, OpError<Self::Error>>> + Send;

    /// Makes what the operation is handed. The library has the connection back when that is dropped.
    #[doc(hidden)]
    fn lend_for_one(connection: Lent<Self::Connection>, begin: Begin) -> Self::Statement;

    /// What became of the statement.
    #[doc(hidden)]
    fn performed(connection: &Self::Connection) -> Performed;
}

/// What became of a single statement.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Performed {
    /// It was not sent.
    Nothing,
    /// The guard refused.
    Fenced,
    /// It failed, and was rolled back.
    NoEffect,
    /// It was sent, and nothing was heard of it that tells more.
    Unknown,
    /// It has committed.
    Committed(Ended),
}

/// Stands for a statement that has committed, and makes the commit that the operation returns.
#[derive(Debug)]
#[must_use = "the operation must return the commit that this makes"]
pub struct Done {
    values: Values,
}

impl Done {
    pub(crate) fn new() -> Self {
        Self {
            values: Values::default(),
        }
    }

    /// Caches the value that the statement has left in the store.
    pub fn cache<V, F: Format<V>>(&mut self, slot: &Slot<V, F>, value: &V) {
        self.values.cache(slot, value);
    }

    /// Caches that there is no such value now, as after a delete.
    pub fn absent<V, F>(&mut self, slot: &Slot<V, F>) {
        self.values.absent(slot);
    }

    /// Makes the commit that the operation returns.
    pub fn commit<T>(self, output: T) -> Commit<T> {
        self.values.commit(output)
    }
}

impl<C: Changes, X: Clone + Send + 'static> Write<'_, C, X> {
    /// Runs the write with one statement: the fast form of [`Write::transaction`]. The statement is sent
    /// together with the guard before it and the COMMIT behind it, so that a write of one statement is
    /// one round trip to the store (and one more when a connection prepares it for the first time).
    ///
    /// The operation is handed the statement to be given its text and parameters, a slot for each key, and
    /// a copy of the context. What the statement answers comes with a [`Done`], which makes the [`Commit`].
    /// By then it has committed.
    ///
    /// # Errors
    ///
    /// - [`WriteError::Rejected`] with the operation's own error. Nothing was written if the statement was
    ///   not sent, or if it is the statement that failed. But an error that the operation returns *after*
    ///   its statement has changed rows cannot take them back: the write stands, and caches nothing.
    ///   So choose the rows in the statement itself, and return an error only when it found none.
    /// - [`WriteError::Unavailable`] when there was no connection, or nothing was sent within
    ///   [`crate::Settings::write_timeout`].
    /// - [`WriteError::Indeterminate`] when it was sent, and its answer did not come or says nothing.
    ///
    /// # Cancellation
    ///
    /// The write runs on a task of its own: dropping this future gives up its answer, not the write.
    ///
    /// # Consistency
    ///
    /// When this returns `Ok`, no read that starts afterwards, on any node, sees anything older.
    pub async fn statement<P, T, E, Op, F>(
        self,
        pool: &P,
        op: Op,
    ) -> Result<Written<T>, WriteError<E>>
    where
        P: Pipeline,
        Op: Fn(P::Statement, C::Slots, X) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Commit<T>, E>> + Send + 'static,
        T: Send + 'static,
        E: From<P::Error> + Send + 'static,
    {
        let mut set = WriteSet::default();
        let slots = self.changes.announce(&mut set);
        let (context, pool, op) = (self.context, pool.clone(), Arc::new(op));
        let bound = self.engine.engine.settings.write_timeout;
        let operation = move |guard: Guard| {
            // Not later than the engine's own bound, which counts from after this.
            let deadline = Instant::now() + bound;
            let epoch = guard.to_check();
            let (context, slots) = (context.clone(), slots.clone());
            let (pool, op) = (pool.clone(), op.clone());
            attempts(guard, move || {
                let (context, slots, op) = (context.clone(), slots.clone(), op.clone());
                let run = move |statement| op(statement, slots, context);
                attempt(pool.clone(), Begin { epoch, bound }, deadline, run)
            })
        };
        let written = self.engine.engine.write(set, operation).await?;
        let output = written.output.map_err(WriteError::Rejected)?;
        Ok(Written {
            output,
            cache_time: written.cache_time,
            epoch: written.epoch,
        })
    }
}

/// The inner result is the operation's: an error of it can come after the commit.
async fn attempt<P, T, E, F>(
    pool: P,
    begin: Begin,
    deadline: Instant,
    run: impl FnOnce(P::Statement) -> F,
) -> Ran<Result<T, E>, E>
where
    P: Pipeline,
    E: From<P::Error>,
    F: Future<Output = Result<Commit<T>, E>>,
{
    let connection = match timeout_at(deadline, pool.take()).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return Ran::Failed(error.map(E::from)),
        Err(_) => return Ran::Failed(OpError::Unavailable(Unavailable::TimedOut)),
    };
    let open = Arc::new(Mutex::new(connection));
    let lent = open.clone().lock_owned().await;
    let result = timeout_at(deadline, run(P::lend_for_one(lent, begin))).await;
    // None while the operation has left its statement somewhere, where it may be sent yet.
    let connection = Arc::into_inner(open).map(Mutex::into_inner);
    let performed = connection.as_ref().map_or(Performed::Unknown, P::performed);
    let stale = connection.as_ref().is_some_and(P::is_stale);
    if let Some(connection) = connection {
        // If it takes too long, the connection is closed.
        let _ = timeout_at(deadline, P::roll_back(connection)).await;
    }
    match (performed, result) {
        (Performed::Committed(ended), Ok(Ok(Commit(commit)))) => {
            let (output, values) = (Ok(commit.output), commit.values);
            Ran::Committed(write::Commit { output, values }, ended)
        }
        (Performed::Committed(ended), Ok(Err(error))) => {
            Ran::Committed(write::Commit::new(Err(error)), ended)
        }
        (Performed::Fenced, _) => Ran::Failed(OpError::Fenced),
        (Performed::Nothing | Performed::NoEffect, Ok(Err(error))) if stale => Ran::Stale(error),
        (Performed::Nothing | Performed::NoEffect, Ok(Err(error))) => {
            Ran::Failed(OpError::Rejected(error))
        }
        (Performed::Nothing | Performed::NoEffect, Ok(Ok(_))) => {
            Ran::Failed(OpError::Unavailable(Unavailable::NotCommitted))
        }
        (Performed::Nothing | Performed::NoEffect, Err(_)) => {
            Ran::Failed(OpError::Unavailable(Unavailable::TimedOut))
        }
        (Performed::Unknown, Ok(Err(error))) => Ran::Failed(OpError::Unknown(error)),
        (Performed::Unknown | Performed::Committed(_), _) => Ran::Failed(OpError::TimedOut),
    }
}
