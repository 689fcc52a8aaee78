//! Writes in a transaction that the library begins, guards and commits.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::{Instant, timeout_at};

use super::set::Changes;
use super::{Commit, Write, sealed};
use crate::error::{OpError, Unavailable, WriteError};
use crate::fence::Guard;
use crate::key::WriteSet;
use crate::write::{self, Written};

/// A pool of connections to the store, on which the library can begin, guard and commit a transaction.
///
/// Implemented for the pools of the drivers that this library knows; nobody else can.
pub trait Driver: sealed::Sealed + Clone + Send + Sync + 'static {
    /// What the operation of [`Write::transaction`] is handed.
    type Transaction: Send + 'static;
    /// The error of the driver, which the operation's own error is made of.
    type Error: Send + 'static;
    /// A connection whose transaction is open. It is closed when it is dropped.
    #[doc(hidden)]
    type Connection: Send + 'static;

    /// Begins and guards a transaction, in one round trip. The guard's refusal is
    /// [`OpError::Fenced`], that there was no connection [`Unavailable::NoConnection`].
    #[doc(hidden)]
    fn begin(
        &self,
        begin: Begin,
    ) -> impl Future<Output = Result<Self::Connection, OpError<Self::Error>>> + Send;

    /// Makes what the operation is handed. The library has the connection back when that is dropped.
    #[doc(hidden)]
    fn lend(connection: Lent<Self::Connection>) -> Self::Transaction;

    /// Commits, in one round trip, and gives the connection back to its pool if it is clean. The commit
    /// of a transaction that has failed before, which Postgres answers with ROLLBACK, is
    /// [`OpError::Rejected`].
    #[doc(hidden)]
    fn commit(
        connection: Self::Connection,
    ) -> impl Future<Output = Result<Ended, OpError<Self::Error>>> + Send;

    /// Rolls back, and gives the connection back to its pool if it is clean.
    #[doc(hidden)]
    fn roll_back(connection: Self::Connection) -> impl Future<Output = ()> + Send;

    /// Whether a statement of the transaction failed only for want of its preparation, so that the same
    /// attempt may well succeed on another connection.
    #[doc(hidden)]
    fn is_stale(connection: &Self::Connection) -> bool;
}

/// A connection in the hands of an operation.
#[doc(hidden)]
pub type Lent<C> = OwnedMutexGuard<C>;

/// How a transaction begins.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct Begin {
    /// What `writethrough.guard` is given; none when the database has nothing to check.
    pub(crate) epoch: Option<i64>,
    /// The longest that the server may work on one statement of it, or wait for the next one.
    pub(crate) bound: Duration,
}

/// Which transaction has committed.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The one that the library began.
    Guarded,
    /// Not that one: the operation had ended it by itself, so some of its statements had no guard.
    Unguarded,
}

impl<C: Changes, X: Clone + Send + 'static> Write<'_, C, X> {
    /// Runs the write in a transaction of `pool`. The operation is handed the transaction, which is
    /// guarded already, a slot for each key, and a copy of the context. It makes the [`Commit`] that it
    /// returns from the transaction itself; the library sends the COMMIT after that.
    ///
    /// Beginning with the guard is one round trip, and so is the commit. The transaction is READ
    /// COMMITTED, and the server ends each of its statements, and its waits between them, at
    /// [`crate::Settings::write_timeout`] at the latest, whatever the session says.
    ///
    /// The value that is cached must be what the transaction leaves behind. `RETURNING` answers before
    /// `AFTER` triggers run: if one of them changes the row again, read it again at the end of the
    /// transaction, or cache nothing.
    ///
    /// # Errors
    ///
    /// - [`WriteError::Rejected`] with the operation's own error, or with the driver's when the store
    ///   refused to begin or to commit: a deferred constraint, or a statement whose error the operation
    ///   did not pass on. Rolled back.
    /// - [`WriteError::Unavailable`] when there was no connection, or no COMMIT was sent within
    ///   [`crate::Settings::write_timeout`]. Nothing was written.
    /// - [`WriteError::Indeterminate`] when the COMMIT was sent, and its answer did not come or says
    ///   nothing.
    ///
    /// # Cancellation
    ///
    /// The write runs on a task of its own: dropping this future gives up its answer, not the write.
    /// A connection whose transaction was not ended is closed, never given back to the pool.
    ///
    /// # Consistency
    ///
    /// When this returns `Ok`, no read that starts afterwards, on any node, sees anything older. The
    /// operation must not end the transaction by itself: one that sends a `COMMIT` of its own counts as
    /// unguarded ([`crate::Stats::unguarded_writes`]), and costs the whole cache each time.
    pub async fn transaction<P, T, E, Op, F>(
        self,
        pool: &P,
        op: Op,
    ) -> Result<Written<T>, WriteError<E>>
    where
        P: Driver,
        Op: Fn(P::Transaction, C::Slots, X) -> F + Send + Sync + 'static,
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
                let run = move |transaction| op(transaction, slots, context);
                attempt(pool.clone(), Begin { epoch, bound }, deadline, run)
            })
        };
        self.engine.engine.write(set, operation).await
    }
}

/// Makes an attempt, and once more if it was rolled back for want of a statement's preparation.
pub(super) async fn attempts<T, E, F>(
    guard: Guard,
    mut attempt: impl FnMut() -> F,
) -> Result<write::Commit<T>, OpError<E>>
where
    F: Future<Output = Ran<T, E>>,
{
    let mut ran = attempt().await;
    if matches!(ran, Ran::Stale(_)) {
        ran = attempt().await;
    }
    match ran {
        Ran::Committed(commit, ended) => {
            if ended == Ended::Guarded {
                guard.was_checked();
            }
            Ok(commit)
        }
        Ran::Stale(error) => Err(OpError::Rejected(error)),
        Ran::Failed(error) => Err(error),
    }
}

/// How an attempt ended.
pub(super) enum Ran<T, E> {
    Committed(write::Commit<T>, Ended),
    /// Rolled back, for want of a statement's preparation.
    Stale(E),
    Failed(OpError<E>),
}

async fn attempt<P, T, E, F>(
    pool: P,
    begin: Begin,
    deadline: Instant,
    run: impl FnOnce(P::Transaction) -> F,
) -> Ran<T, E>
where
    P: Driver,
    E: From<P::Error>,
    F: Future<Output = Result<Commit<T>, E>>,
{
    let connection = match timeout_at(deadline, pool.begin(begin)).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return Ran::Failed(error.map(E::from)),
        Err(_) => return Ran::Failed(OpError::Unavailable(Unavailable::TimedOut)),
    };
    let open = Arc::new(Mutex::new(connection));
    let lent = open.clone().lock_owned().await;
    let result = timeout_at(deadline, run(P::lend(lent))).await;
    // None while the operation has left its transaction somewhere; whoever drops it closes it.
    let connection = Arc::into_inner(open).map(Mutex::into_inner);
    match (result, connection) {
        (Ok(Ok(commit)), Some(connection)) => {
            match timeout_at(deadline, P::commit(connection)).await {
                Ok(Ok(ended)) => Ran::Committed(commit.0, ended),
                Ok(Err(error)) => Ran::Failed(error.map(E::from)),
                Err(_) => Ran::Failed(OpError::TimedOut),
            }
        }
        (Ok(Err(error)), Some(connection)) => {
            let stale = P::is_stale(&connection);
            // If it takes too long, the connection is closed.
            let _ = timeout_at(deadline, P::roll_back(connection)).await;
            if stale {
                Ran::Stale(error)
            } else {
                Ran::Failed(OpError::Rejected(error))
            }
        }
        (Ok(Err(error)), None) => Ran::Failed(OpError::Rejected(error)),
        (Ok(Ok(_)), None) => Ran::Failed(OpError::Unavailable(Unavailable::NotCommitted)),
        (Err(_), _) => Ran::Failed(OpError::Unavailable(Unavailable::TimedOut)),
    }
}
