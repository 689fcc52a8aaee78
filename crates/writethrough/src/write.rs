//! Writes: announce, write guarded, end, acknowledge.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};
use tracing::Instrument;
use writethrough_protocol::write::{
    AfterBegin, AfterEnd, AfterWrite, Outcome, after_begin, after_end, after_write,
};
use writethrough_protocol::{Epoch, Mode, WritePermit};

use crate::announce::Announced;
use crate::cache::observed::Observed;
use crate::clock;
use crate::engine::Engine;
pub(crate) use crate::engine::NewValue;
use crate::error::{Indeterminate, OpError, Unavailable, WriteError};
use crate::fence::Guard;
use crate::key::{Frame, Key, MAX_KEYS, WriteSet};
use crate::runtime;
use crate::stats::Counter;
use crate::supervisor;
use crate::turns::Held;

/// How long a write waits for its turn.
const TURN_WAIT: Duration = Duration::from_secs(1);

/// What a write may do now.
enum Permit {
    Cached(Epoch, Arc<Frame>, Observed),
    Bypass(Epoch),
    /// The cache of this epoch cannot be reached from here: end the epoch first.
    Leave(Epoch),
}

/// What a committed operation hands to the engine: its output, and the new values to cache.
#[derive(Debug)]
pub(crate) struct Commit<T> {
    pub(crate) output: T,
    pub(crate) values: HashMap<Key, NewValue>,
}

impl<T> Commit<T> {
    /// A commit that caches nothing: the keys of the write are left empty.
    pub(crate) fn new(output: T) -> Self {
        Self {
            output,
            values: HashMap::new(),
        }
    }
}

/// An acknowledged write.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Written<T> {
    /// The operation's output.
    pub output: T,
    /// Time spent waiting for the cache.
    pub cache_time: Duration,
    /// The epoch that the write was made in.
    pub epoch: Epoch,
}

/// Counts a write under way, so that shutdown waits for it, and one that was ended before its end.
struct UnderWay {
    engine: Arc<Engine>,
    /// A task has it, and has not come to its end.
    unfinished: bool,
}

impl UnderWay {
    fn new(engine: Arc<Engine>) -> Self {
        engine.writes.send_modify(|count| *count += 1);
        Self {
            engine,
            unfinished: false,
        }
    }

    /// The task has come to its end.
    fn finish(mut self) {
        self.unfinished = false;
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.engine.writes.send_modify(|count| *count -= 1);
        if !self.unfinished {
            return;
        }
        let why = if std::thread::panicking() {
            "its operation panicked"
        } else {
            "its runtime ended"
        };
        let first = self.engine.counters.abandoned_writes.get() == 0;
        self.engine.counters.abandoned_writes.add(1);
        if first {
            tracing::error!(
                "a write was ended half-way, because {why}: it may have been made, and its keys are \
                 read from the store until its intents lapse; further ones are counted as \
                 `abandoned_writes`"
            );
        }
    }
}

impl Engine {
    /// Runs a write on a task of its own, and counts it.
    pub(crate) async fn write<T, E, Op, F>(
        self: &Arc<Self>,
        set: WriteSet,
        op: Op,
    ) -> Result<Written<T>, WriteError<E>>
    where
        Op: FnMut(Guard) -> F + Send + 'static,
        F: Future<Output = Result<Commit<T>, OpError<E>>> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        // Counted before the check, so that shutdown either sees this write or stops it here.
        let mut under_way = UnderWay::new(self.clone());
        if *self.stopping.borrow() {
            return Err(WriteError::Unavailable(Unavailable::ShuttingDown));
        }
        self.still_alive()?;
        let set = set.distinct();
        if set.len() > MAX_KEYS {
            return Err(WriteError::Unavailable(Unavailable::TooManyKeys));
        }
        under_way.unfinished = true;
        let write = async move {
            let engine = &under_way.engine;
            let result = engine.write_guarded(set, op).await;
            match &result {
                Ok(_) => engine.counters.writes.add(1),
                Err(WriteError::Indeterminate(_)) => engine.counters.indeterminate_writes.add(1),
                Err(_) => {}
            }
            under_way.finish();
            result
        };
        let runtime = runtime::current().unwrap_or_else(|_| self.runtime.clone());
        match runtime.spawn(write.in_current_span()).await {
            Ok(result) => result,
            // The operation panicked, or the runtime is shutting down.
            Err(_) => Err(WriteError::Indeterminate(Indeterminate::Abandoned)),
        }
    }

    async fn write_guarded<T, E, Op, F>(
        &self,
        set: WriteSet,
        mut op: Op,
    ) -> Result<Written<T>, WriteError<E>>
    where
        Op: FnMut(Guard) -> F,
        F: Future<Output = Result<Commit<T>, OpError<E>>>,
    {
        let deadline = Instant::now() + self.settings.write_deadline;
        let mut cache_time = Duration::ZERO;
        let mut turn = None;
        loop {
            let permit = self
                .write_permit(deadline)
                .await
                .ok_or_else(|| self.no_epoch())?;
            let (epoch, announced) = match permit {
                Permit::Bypass(epoch) => (epoch, None),
                // What cannot be announced key by key is written when nobody uses the cache, and the guard
                // keeps it so until it has committed.
                Permit::Cached(epoch, ..) | Permit::Leave(epoch) if let Some(name) = set.whole => {
                    let reason = format!("a write changes all of `{name}`");
                    supervisor::end_epoch(self, epoch, reason, deadline).await;
                    self.still_alive()?;
                    continue;
                }
                // Nothing to announce.
                Permit::Cached(epoch, ..) | Permit::Leave(epoch) if set.len() == 0 => (epoch, None),
                Permit::Leave(epoch) => {
                    // Others find out at the same time, not after each other.
                    turn = None;
                    let reason = supervisor::unconnected(self);
                    supervisor::end_epoch(self, epoch, reason, deadline).await;
                    self.still_alive()?;
                    continue;
                }
                Permit::Cached(epoch, frame, session) => {
                    if turn.is_none() {
                        let held = self.turn(&set, deadline).await?;
                        let waited = held.waited;
                        turn = Some(held);
                        // The epoch may be over by now.
                        if waited {
                            continue;
                        }
                    }
                    let started = Instant::now();
                    let announced = Announced::place(self, &set, epoch, &frame, session).await;
                    cache_time += started.elapsed();
                    match (after_begin(announced.is_ok()), announced) {
                        (AfterBegin::Write, announced) => (epoch, announced.ok()),
                        (AfterBegin::ProposeBypass, announced) => {
                            let why = announced.err().map(|error| error.to_string());
                            let why = why.unwrap_or_default();
                            let reason = format!("a write could not be announced: {why}");
                            turn = None;
                            supervisor::end_epoch(self, epoch, reason, deadline).await;
                            self.still_alive()?;
                            continue;
                        }
                    }
                }
            };
            let (result, guarded) = match self.fence.enter(epoch).await {
                Err(_) => (Err(OpError::Fenced), true),
                Ok(guard) => {
                    let witness = guard.witness();
                    (self.run(op(guard)).await, witness.guarded())
                }
            };
            let step = after_write(outcome(&result));
            let announced = match (step, announced) {
                (AfterWrite::Withdraw | AfterWrite::Restart, Some(announced)) => {
                    announced.withdraw(self).await;
                    None
                }
                (_, announced) => announced,
            };
            match result {
                Ok(commit) => {
                    let ended = self
                        .end(&set, epoch, announced, commit.values, guarded, deadline)
                        .await
                        .ok_or(WriteError::Indeterminate(Indeterminate::NotSettled))?;
                    return Ok(Written {
                        output: commit.output,
                        cache_time: cache_time + ended,
                        epoch,
                    });
                }
                Err(_) if step == AfterWrite::Restart => {
                    self.poll_now.notify_one();
                    if !self.wait_until(deadline, |number| number > epoch).await {
                        return Err(self.no_epoch());
                    }
                }
                Err(error) => return Err(failure(error)),
            }
        }
    }

    /// Ends a committed write: replaces its intents by its values, or, if that fails, ends its epoch.
    /// Returns the time spent waiting for the cache, or `None` when neither could be done in time.
    async fn end(
        &self,
        set: &WriteSet,
        epoch: Epoch,
        announced: Option<Announced>,
        mut values: HashMap<Key, NewValue>,
        guarded: bool,
        deadline: Instant,
    ) -> Option<Duration> {
        let misuse = self.misuse(set, &mut values, guarded);
        let mut cache_time = Duration::ZERO;
        if let Some(announced) = announced {
            let started = Instant::now();
            let ended = announced.end(self, values).await;
            cache_time = started.elapsed();
            let announced_for = announced.age();
            if after_end(ended.is_ok(), announced_for, self.settings.intent)
                == AfterEnd::ProposeBypass
            {
                let reason = match ended {
                    Err(error) => format!("a write could not be ended: {error}"),
                    Ok(()) => format!(
                        "a write took {announced_for:?}, longer than its announcement lasts"
                    ),
                };
                if !self.leave_and_settle(epoch, reason, deadline).await {
                    return None;
                }
            }
        }
        if let Some(reason) = misuse
            && !self.leave_all(epoch, guarded, reason, deadline).await
        {
            return None;
        }
        Some(cache_time)
    }

    /// Why no epoch could be had in time.
    fn no_epoch<E>(&self) -> WriteError<E> {
        WriteError::Unavailable(match self.fence_broken() {
            Some(reason) => Unavailable::FenceBroken(reason),
            None => Unavailable::Fence,
        })
    }

    fn still_alive<E>(&self) -> Result<(), WriteError<E>> {
        match self.ended.get() {
            None => Ok(()),
            Some(_) => Err(WriteError::Unavailable(Unavailable::TaskEnded)),
        }
    }

    /// Runs the operation within its bound. It is polled first when the time is over, so that one which
    /// keeps to the same bound by itself can still tell how it ended.
    async fn run<T, E>(
        &self,
        op: impl Future<Output = Result<Commit<T>, OpError<E>>>,
    ) -> Result<Commit<T>, OpError<E>> {
        timeout(self.settings.write_timeout, op)
            .await
            .unwrap_or(Err(OpError::TimedOut))
    }

    /// Waits until this node may write, for a moment also for a cache connection that was just
    /// lost: most come back at once.
    async fn write_permit(&self, deadline: Instant) -> Option<Permit> {
        let mut changed = self.changed.subscribe();
        let mut patience: Option<Instant> = None;
        loop {
            changed.borrow_and_update();
            let (permit, frame, session) = {
                let view = self.view();
                let permit = view.node.write_permit(clock::now());
                (permit, view.frame.clone(), view.session.clone())
            };
            let wake = match (permit, session) {
                (WritePermit::Bypass(epoch), _) => return Some(Permit::Bypass(epoch)),
                (WritePermit::Cached(epoch), Some(session)) => {
                    let session = Observed::new(session, Some(epoch));
                    return Some(Permit::Cached(epoch, frame, session));
                }
                (WritePermit::Cached(epoch) | WritePermit::Unreachable(epoch), session) => {
                    let until = *patience
                        .get_or_insert_with(|| Instant::now() + self.settings.reconnect_grace);
                    if session.is_some() || self.waited_in_vain(until) {
                        return Some(Permit::Leave(epoch));
                    }
                    until.max(Instant::now() + self.settings.reconnect_grace / 4)
                }
                (WritePermit::Wait(Some(active_at)), _) => clock::wake_at(active_at),
                (WritePermit::Wait(None), _) => deadline,
            };
            let waits = matches!(permit, WritePermit::Wait(_));
            if Instant::now() >= deadline || (waits && self.fence_broken().is_some()) {
                return None;
            }
            // Whether it changed or the time came: look again.
            let _ = timeout_at(wake.min(deadline), changed.changed()).await;
        }
    }

    /// Waits until the newest epoch seen passes the test.
    pub(crate) async fn wait_until(&self, deadline: Instant, test: impl Fn(Epoch) -> bool) -> bool {
        let mut changed = self.changed.subscribe();
        let reached = || self.view().node.row().is_some_and(|row| test(row.number));
        while !reached() {
            if self.fence_broken().is_some() {
                return false;
            }
            if timeout_at(deadline, changed.changed()).await.is_err() {
                return reached();
            }
        }
        true
    }

    /// Ends `epoch` and waits until its successor is active: by then no node believes anything
    /// that `epoch` has left in the cache.
    async fn leave_and_settle(&self, epoch: Epoch, reason: String, deadline: Instant) -> bool {
        if !supervisor::end_epoch(self, epoch, reason, deadline).await {
            return false;
        }
        let mut changed = self.changed.subscribe();
        loop {
            changed.borrow_and_update();
            let permit = self.view().node.write_permit(clock::now());
            let wake = match permit {
                WritePermit::Wait(Some(active_at)) => clock::wake_at(active_at),
                WritePermit::Wait(None) => deadline,
                _ => return true,
            };
            if Instant::now() >= deadline {
                return false;
            }
            let _ = timeout_at(wake.min(deadline), changed.changed()).await;
        }
    }

    /// What the operation of a committed write did that may have left something stale in the cache, if
    /// it did. Takes away the values that must not be stored.
    fn misuse(
        &self,
        set: &WriteSet,
        values: &mut HashMap<Key, NewValue>,
        guarded: bool,
    ) -> Option<String> {
        if !guarded {
            values.clear();
            return Some(
                self.misused(
                    &self.counters.unguarded_writes,
                    "a write was not guarded: put `Guard::parameter` into its statement, as \
                 `writethrough.guard($1)`"
                        .to_owned(),
                ),
            );
        }
        if values.is_empty() {
            return None;
        }
        let announced: HashSet<&Key> = set.keys.iter().collect();
        let mut entity = None;
        values.retain(|key, _| {
            let is_announced = announced.contains(key);
            if !is_announced {
                entity = key.as_str().split(':').next().map(str::to_owned);
            }
            is_announced
        });
        // The rest of the key may be nobody's business.
        let entity = entity?;
        Some(self.misused(
            &self.counters.unannounced_writes,
            format!(
                "a write had a value to cache under a key `{entity}:*` that it had not announced: name \
                 it in the write"
            ),
        ))
    }

    /// Counts a fault of the program; the first of its kind is logged as an error.
    fn misused(&self, counter: &Counter, reason: String) -> String {
        if counter.get() == 0 {
            tracing::error!("{reason}. The write stands; what is cached is given up each time");
        }
        counter.add(1);
        reason
    }

    /// Ends `epoch`, unless nothing is cached in it, and all others in which something stale may have
    /// been cached: after a write without a guard any that was over before the write had committed.
    async fn leave_all(
        &self,
        epoch: Epoch,
        guarded: bool,
        reason: String,
        deadline: Instant,
    ) -> bool {
        let newest = || {
            let row = self.view().node.row().cloned();
            row.map_or((epoch, true), |row| (row.number, row.mode == Mode::Bypass))
        };
        if guarded {
            let (number, bypass) = newest();
            // The guard kept the epoch until the write had committed, and any later one began after it.
            return (number == epoch && bypass)
                || self.leave_and_settle(epoch, reason, deadline).await;
        }
        loop {
            if !self
                .leave_and_settle(newest().0.max(epoch), reason.clone(), deadline)
                .await
            {
                return false;
            }
            // Seen in bypass after the write: what was cached before is over.
            if newest().1 {
                return true;
            }
        }
    }

    /// Waits for the write's turn.
    async fn turn<E>(&self, set: &WriteSet, deadline: Instant) -> Result<Held, WriteError<E>> {
        let until = deadline.min(Instant::now() + TURN_WAIT);
        let turn = self.turns.take(set, self.settings.max_writers);
        match tokio::time::timeout_at(until, turn).await {
            Ok(turn) => Ok(turn),
            Err(_) => {
                if self.counters.refused_writes.get() == 0 {
                    tracing::warn!(
                        "a write was refused: {} s long others of the same value or collection had all \
                         turns; further ones are counted as refused writes",
                        TURN_WAIT.as_secs()
                    );
                }
                self.counters.refused_writes.add(1);
                Err(WriteError::Unavailable(Unavailable::Busy))
            }
        }
    }
}

/// What the operation's answer says about the database write.
fn outcome<T, E>(result: &Result<Commit<T>, OpError<E>>) -> Outcome {
    match result {
        Ok(_) => Outcome::Committed,
        Err(OpError::Fenced) => Outcome::Fenced,
        Err(OpError::Rejected(_) | OpError::Unavailable(_)) => Outcome::NoEffect,
        Err(OpError::Unknown(_) | OpError::TimedOut) => Outcome::Unknown,
    }
}

/// What the caller is told when the operation did not commit.
fn failure<E>(error: OpError<E>) -> WriteError<E> {
    match error {
        OpError::Fenced => WriteError::Unavailable(Unavailable::Fence),
        OpError::Rejected(error) => WriteError::Rejected(error),
        OpError::Unavailable(why) => WriteError::Unavailable(why),
        OpError::Unknown(error) => WriteError::Indeterminate(Indeterminate::Store(error)),
        OpError::TimedOut => WriteError::Indeterminate(Indeterminate::TimedOut),
    }
}
