//! The fence in Postgres, whatever the driver: its statements, and the test of what the guard rests on.
//!
//! A driver says how to get a connection and how to send a statement ([`Database`]); nothing is decided
//! there.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Mutex;
use writethrough_protocol::{Epoch, EpochRow, HistoryId, Mode, Proposal, ServerId, Sighting};

use super::{Fence, Guard};
use crate::driver::{Answer, Connection, DriverError, Transaction, is_busy_lock};
use crate::error::{FenceError, Fenced, chain};
use crate::migration::MISSING;

/// The longest that a poll on a new connection goes on when nobody waits for it any more.
const FIRST_POLL: Duration = Duration::from_secs(3);
/// How long the lock of the self-test is waited for, in vain.
const SELF_TEST_WAIT: Duration = Duration::from_millis(20);

/// The columns of each statement that shows the row, in the order of [`RowSeen`].
macro_rules! seen {
    ($from:literal) => {
        concat!(
            "SELECT seen.*, current_setting('transaction_read_only') = 'on' FROM ",
            $from,
            " AS seen"
        )
    };
}

const POLL: &str = seen!("writethrough.row_seen");
const PROPOSE: &str = seen!("writethrough.propose($1, $2, $3)");
const BEGIN_HISTORY: &str = seen!("writethrough.begin_history($1, $2, $3)");
const MARK_SETTLED: &str =
    "UPDATE writethrough.epoch SET settled = true WHERE number = $1 AND NOT settled";
const REPORT_TROUBLE: &str = "UPDATE writethrough.epoch SET trouble_at = clock_timestamp()";

/// A parameter of a statement.
#[derive(Debug)]
pub enum Parameter<'a> {
    /// Of type `int8`.
    Number(i64),
    /// Of type `text`.
    Text(Option<&'a str>),
    /// Of type `bool`.
    Flag(bool),
}

/// A pool of connections to the database that keeps the row.
pub trait Database: Clone + Send + Sync + 'static {
    /// The driver's.
    type Error: DriverError;
    /// The error of the pool, in whose chain of causes the driver's may stand.
    type PoolError: Error + Send + Sync + 'static;
    /// A connection that goes back to the pool when it is dropped.
    type Pooled: Send + 'static;
    /// What is in it.
    type Connection: Connection<Error = Self::Error>;

    /// Takes a connection.
    fn take(&self) -> impl Future<Output = Result<Self::Pooled, Self::PoolError>> + Send;
    /// The connection itself.
    fn connection(pooled: &mut Self::Pooled) -> &mut Self::Connection;
    /// Closes a connection, so that the pool does not have it any more.
    fn close(pooled: Self::Pooled);
    /// Whether a connection is there that need not be made.
    fn has_idle(&self) -> bool;
    /// The most connections that it makes.
    fn max_size(&self) -> usize;
    /// Sends a statement of the fence and returns the row that it shows.
    fn ask(
        pooled: &mut Self::Pooled,
        statement: &'static str,
        parameters: &[Parameter<'_>],
    ) -> impl Future<Output = Result<Option<RowSeen>, Self::Error>> + Send;
    /// Forgets the statements that connections have prepared.
    fn forget_statements(&self);
}

/// The row as a statement shows it.
#[derive(Debug)]
pub struct RowSeen {
    pub(super) number: i64,
    pub(super) cached_on: Option<String>,
    pub(super) settled: bool,
    pub(super) trouble_seconds: Option<f64>,
    pub(super) history: String,
    pub(super) in_its_history: bool,
    pub(super) read_only: bool,
}

impl RowSeen {
    fn sighting(self) -> Sighting {
        let on = |id| Mode::Cached(ServerId::new(id));
        Sighting {
            in_its_history: self.in_its_history,
            row: EpochRow {
                history: HistoryId::new(self.history),
                number: Epoch(self.number.unsigned_abs()),
                mode: self.cached_on.map_or(Mode::Bypass, on),
                settled: self.settled,
            },
            trouble_age: self
                .trouble_seconds
                .map(|age| Duration::from_secs_f64(age.clamp(0.0, 1e9))),
        }
    }
}

fn number(epoch: Epoch) -> i64 {
    i64::try_from(epoch.0).unwrap_or(i64::MAX)
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
    Untested(#[source] Box<dyn Error + Send + Sync>),
}

/// Keeps the epoch in Postgres, for any number of nodes, over connections of the pool `P`.
///
/// It is one row that all nodes poll, one advisory lock that writes share and a change of the epoch holds
/// alone, and a guard that is part of the user's own statement or transaction.
pub struct EpochTable<P> {
    pool: P,
    /// Held by a poll on a new connection.
    first_poll: Arc<Mutex<()>>,
    /// The server that passed the test of its locks.
    tested: Mutex<Option<String>>,
    /// Whether the last poll found the server read-only.
    read_only: AtomicBool,
}

impl<P> fmt::Debug for EpochTable<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EpochTable").finish_non_exhaustive()
    }
}

/// A pooled connection that is closed unless its work was seen to end: the reply to an abandoned query
/// would hold up whoever came next.
struct Lent<P: Database>(Option<P::Pooled>);

impl<P: Database> Lent<P> {
    async fn take(pool: &P) -> Result<Self, FenceError> {
        let pooled = pool.take().await;
        Ok(Self(Some(pooled.map_err(failed::<P::Error>)?)))
    }

    fn give_back(mut self) {
        self.0.take();
    }
}

impl<P: Database> Drop for Lent<P> {
    fn drop(&mut self) {
        if let Some(pooled) = self.0.take() {
            P::close(pooled);
        }
    }
}

/// The failure with its causes in words, and whether it goes away by itself. `E` is the driver's error.
fn failed<E: DriverError>(error: impl Error + 'static) -> FenceError {
    let reason = chain(&error);
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(error) = cause {
        let answer = error.downcast_ref::<E>().and_then(E::answer);
        if answer.is_some_and(|answer| answer.needs_mending()) {
            return FenceError::Broken(reason);
        }
        cause = error.source();
    }
    FenceError::Away(reason)
}

impl<P: Database> EpochTable<P> {
    pub(super) fn over(pool: P) -> Self {
        Self {
            pool,
            first_poll: Arc::default(),
            tested: Mutex::new(None),
            read_only: AtomicBool::new(false),
        }
    }

    /// Tests the server's locks if this one has not passed the test yet.
    async fn tested(&self, server: String) -> Result<(), FenceError> {
        let mut tested = self.tested.lock().await;
        if tested.as_ref() == Some(&server) {
            return Ok(());
        }
        if self.pool.max_size() < 2 {
            return Err(FenceError::Broken("its pool needs two connections".into()));
        }
        let mut holder = Lent::take(&self.pool).await?;
        let mut waiter = Lent::take(&self.pool).await?;
        if let (Some(holder), Some(waiter)) = (&mut holder.0, &mut waiter.0) {
            let passed = self_test(P::connection(holder), P::connection(waiter)).await;
            passed.map_err(|unfit| match unfit {
                UnfitDatabase::Untested(_) => failed::<P::Error>(unfit),
                _ => FenceError::Broken(unfit.to_string()),
            })?;
        }
        holder.give_back();
        waiter.give_back();
        *tested = Some(server);
        Ok(())
    }

    /// Polls. On a new connection the poll goes on when nobody waits for it any more: where it takes
    /// longer to connect than a poll may, the next one finds the connection made. Otherwise none would
    /// ever be.
    async fn poll_row(&self) -> Result<Option<RowSeen>, FenceError> {
        let runtime = match tokio::runtime::Handle::try_current() {
            Ok(runtime) if !self.pool.has_idle() => runtime,
            _ => return ask(&self.pool, POLL, &[]).await,
        };
        let alone = self.first_poll.clone().lock_owned().await;
        let pool = self.pool.clone();
        let poll = runtime.spawn(async move {
            let row = tokio::time::timeout(FIRST_POLL, ask(&pool, POLL, &[])).await;
            drop(alone);
            row
        });
        poll.await
            .map_err(failed::<P::Error>)?
            .map_err(failed::<P::Error>)?
    }

    async fn sighting(
        &self,
        statement: &'static str,
        parameters: &[Parameter<'_>],
    ) -> Result<Sighting, FenceError> {
        let row = ask(&self.pool, statement, parameters).await?;
        let row = row.ok_or_else(|| FenceError::Broken(MISSING.to_owned()))?;
        Ok(row.sighting())
    }
}

async fn ask<P: Database>(
    pool: &P,
    statement: &'static str,
    parameters: &[Parameter<'_>],
) -> Result<Option<RowSeen>, FenceError> {
    let mut lent = Lent::take(pool).await?;
    let Some(pooled) = &mut lent.0 else {
        return Ok(None);
    };
    let row = P::ask(pooled, statement, parameters).await;
    let row = row.map_err(|error| {
        let answer = error.answer();
        // The connection is closed; the others must not fail in their turn.
        if answer.as_ref().is_some_and(Answer::is_stale_statement) {
            pool.forget_statements();
        }
        if answer.is_some_and(|answer| answer.is_missing()) {
            return FenceError::Broken(format!("{MISSING} ({})", chain(&error)));
        }
        failed::<P::Error>(error)
    })?;
    lent.give_back();
    Ok(row)
}

/// Tests on two connections that advisory locks lock, and that a function which waited for one sees what
/// was committed meanwhile.
pub(super) async fn self_test<C: Connection>(
    holder: &mut C,
    waiter: &mut C,
) -> Result<(), UnfitDatabase> {
    let untested = |error: C::Error| UnfitDatabase::Untested(Box::new(error));
    // An own lock and an own row: other nodes, and writes under way, have nothing to do with it.
    let lock = fastrand::i64(1 << 32..);
    let insert = format!("INSERT INTO writethrough.self_test (lock, number) VALUES ({lock}, 1)");
    holder.run(&insert).await.map_err(untested)?;
    let mut held = holder.begin().await.map_err(untested)?;
    let hold = format!(
        "SELECT pg_advisory_xact_lock({lock}); \
         UPDATE writethrough.self_test SET number = 2 WHERE lock = {lock}"
    );
    held.run(&hold).await.map_err(untested)?;

    let mut refused = waiter.begin().await.map_err(untested)?;
    let brief = format!("SET LOCAL lock_timeout = {}", SELF_TEST_WAIT.as_millis());
    refused.run(&brief).await.map_err(untested)?;
    let share = format!("SELECT pg_advisory_xact_lock_shared({lock})");
    match refused.run(&share).await {
        Ok(_) => return Err(UnfitDatabase::NoLocks),
        Err(error) if is_busy_lock(&error) => {}
        Err(error) => return Err(untested(error)),
    }
    refused.roll_back().await.map_err(untested)?;

    let look = format!("SELECT writethrough.self_test_guard({lock})");
    let release = async {
        // Time for the other connection to get as far as its lock. Were it later, it would see
        // the change all the same, and the test would only prove less.
        tokio::time::sleep(SELF_TEST_WAIT).await;
        held.commit().await
    };
    let (seen, released) = tokio::join!(waiter.run(&look), release);
    released.map_err(untested)?;
    let seen = seen.map_err(untested)?;
    let delete = format!("DELETE FROM writethrough.self_test WHERE lock = {lock}");
    holder.run(&delete).await.map_err(untested)?;
    if seen == [["2"]] {
        Ok(())
    } else {
        Err(UnfitDatabase::OldSnapshot)
    }
}

#[async_trait]
impl<P: Database> Fence for EpochTable<P> {
    async fn poll(&self) -> Result<Sighting, FenceError> {
        let row = self.poll_row().await?;
        let row = row.ok_or_else(|| FenceError::Broken(MISSING.to_owned()))?;
        self.read_only.store(row.read_only, Ordering::Relaxed);
        let sighting = row.sighting();
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
                let parameters = [
                    Parameter::Number(number(*from)),
                    Parameter::Text(server),
                    Parameter::Flag(*settled),
                ];
                self.sighting(PROPOSE, &parameters).await
            }
            Proposal::NewHistory { from, above } => {
                let leap = i64::try_from(Proposal::LEAP).unwrap_or(i64::MAX);
                let parameters = [number(*from), number(*above), leap].map(Parameter::Number);
                self.sighting(BEGIN_HISTORY, &parameters).await
            }
        }
    }

    async fn mark_settled(&self, epoch: Epoch) -> Result<(), FenceError> {
        let parameters = [Parameter::Number(number(epoch))];
        ask(&self.pool, MARK_SETTLED, &parameters).await.map(drop)
    }

    async fn report_trouble(&self) -> Result<(), FenceError> {
        ask(&self.pool, REPORT_TROUBLE, &[]).await.map(drop)
    }

    fn refuses_changes(&self) -> Option<FenceError> {
        let read_only = self.read_only.load(Ordering::Relaxed);
        read_only.then(|| FenceError::Broken("the database is read-only".to_owned()))
    }

    async fn enter(&self, epoch: Epoch) -> Result<Guard, Fenced> {
        Ok(Guard::in_database(epoch))
    }
}
