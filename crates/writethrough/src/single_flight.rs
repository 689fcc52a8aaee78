//! The loads of this process that are under way, and who shares which of them.
//!
//! Under a lease: a read may share a load when it has seen the load's lease (or, for a page, its
//! stamp) intact after it began itself. The token is the proof, so the token is the key.
//!
//! Past the cache there is no lease: a read may share a load that *begins* after the read did. So
//! there is one load running and one forming for each key, and nobody joins the one that runs.
//!
//! The number of loads at once is bounded; one more is refused at once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, Semaphore, SemaphorePermit, watch};
use tokio::time::{Instant, timeout_at};
use writethrough_protocol::{Payload, Token};

/// How long after a slow load the store still counts as slow.
const SLOW_FOR: Duration = Duration::from_secs(10);

/// How a load stands for those who share it. A sender that is gone without an end was dropped.
#[derive(Debug, Clone)]
enum State {
    Running,
    /// None: what was loaded has no form in which it could be shared.
    Loaded(Option<Payload>),
    Failed,
}

/// What a read that shared a load got of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Shared {
    /// What was loaded; `None` when it cannot be shared.
    Loaded(Option<Payload>),
    /// The load failed.
    Failed,
    /// The load was given up: look again.
    Dropped,
    /// It took longer than the read waits.
    TimedOut,
}

/// A load of this process to wait for.
pub(crate) struct Follower(watch::Receiver<State>);

/// The part of a read in the load under one lease.
pub(crate) enum Role {
    Lead(Leader),
    Follow(Follower),
}

/// The part of a read in the next load past the cache.
pub(crate) enum Turn {
    Lead(Forming),
    Follow(Follower),
}

type Name = (Token, Option<String>);

/// The loads of one key past the cache.
#[derive(Default)]
struct Queue {
    /// Held by the load that runs.
    running: Arc<tokio::sync::Mutex<()>>,
    /// The load that has not begun, so that everybody may still share it.
    forming: Option<watch::Receiver<State>>,
    /// How many loads run or form.
    places: usize,
}

/// All loads under way.
pub(crate) struct SingleFlight {
    leased: Mutex<HashMap<Name, watch::Receiver<State>>>,
    direct: Mutex<HashMap<String, Queue>>,
    permits: Semaphore,
    limit: usize,
    waiting: AtomicU64,
    slow: Mutex<Option<Slow>>,
}

/// The last load that was slow.
#[derive(Debug, Clone, Copy)]
struct Slow {
    took: Duration,
    ended: Instant,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics between two changes of what is inside.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SingleFlight {
    /// No loads; at most `limit` at once.
    pub(crate) fn new(limit: usize) -> Self {
        let limit = limit.min(Semaphore::MAX_PERMITS);
        Self {
            leased: Mutex::default(),
            direct: Mutex::default(),
            permits: Semaphore::new(limit),
            limit,
            waiting: AtomicU64::new(0),
            slow: Mutex::default(),
        }
    }

    /// The right to load, or `None` when too many loads are under way.
    pub(crate) fn permit(&self) -> Option<SemaphorePermit<'_>> {
        self.permits.try_acquire().ok()
    }

    /// How many loads are under way now.
    pub(crate) fn under_way(&self) -> u64 {
        self.limit.saturating_sub(self.permits.available_permits()) as u64
    }

    /// Announces a load under a token that nobody else has seen yet.
    pub(crate) fn lead(self: &Arc<Self>, token: Token, page: Option<&str>) -> Leader {
        let name = (token, page.map(str::to_owned));
        let (sender, receiver) = watch::channel(State::Running);
        lock(&self.leased).insert(name.clone(), receiver);
        Leader {
            loads: self.clone(),
            name,
            sender,
        }
    }

    /// The load of this process under this token: to wait for, or, if there is none, to do. `page`
    /// names the query when the token is a collection's.
    pub(crate) fn lead_or_follow(self: &Arc<Self>, token: Token, page: Option<&str>) -> Role {
        let name = (token, page.map(str::to_owned));
        let mut leased = lock(&self.leased);
        if let Some(load) = leased.get(&name) {
            return Role::Follow(Follower(load.clone()));
        }
        let (sender, receiver) = watch::channel(State::Running);
        leased.insert(name.clone(), receiver);
        Role::Lead(Leader {
            loads: self.clone(),
            name,
            sender,
        })
    }

    /// The next load of a key past the cache: to wait for, or, if none is forming, to do.
    pub(crate) fn join(self: &Arc<Self>, name: &str) -> Turn {
        let mut direct = lock(&self.direct);
        let queue = direct.entry(name.to_owned()).or_default();
        if let Some(forming) = &queue.forming {
            return Turn::Follow(Follower(forming.clone()));
        }
        let (sender, receiver) = watch::channel(State::Running);
        queue.forming = Some(receiver);
        queue.places += 1;
        Turn::Lead(Forming {
            running: queue.running.clone(),
            place: Place {
                loads: self.clone(),
                name: name.to_owned(),
                sender,
                forming: true,
            },
        })
    }

    /// Waits for a load to end, until `give_up`.
    pub(crate) async fn outcome(&self, mut load: Follower, give_up: Instant) -> Shared {
        let _waiting = Waiting::new(&self.waiting);
        let ended = load.0.wait_for(|state| !matches!(state, State::Running));
        match timeout_at(give_up, ended).await {
            Err(_) => Shared::TimedOut,
            Ok(Err(_)) => Shared::Dropped,
            Ok(Ok(state)) => match &*state {
                State::Loaded(payload) => Shared::Loaded(payload.clone()),
                State::Failed | State::Running => Shared::Failed,
            },
        }
    }

    /// How many readers wait for the load of another now.
    pub(crate) fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Takes note of how long a load took, and says once when loads begin to be slow and when they
    /// no longer are. Returns whether this one was slow.
    pub(crate) fn took(&self, took: Duration, slow: Duration) -> bool {
        let is_slow = took >= slow;
        let mut last = lock(&self.slow);
        let was_slow = last.is_some_and(|slow| slow.ended.elapsed() < SLOW_FOR);
        if is_slow {
            if !was_slow {
                tracing::warn!(
                    took_ms = took.as_millis() as u64,
                    "loads from the store are slow; the reads of one key share one load"
                );
            }
            *last = Some(Slow {
                took,
                ended: Instant::now(),
            });
        } else if last.is_some() && !was_slow {
            *last = None;
            tracing::info!("loads from the store are no longer slow");
        }
        is_slow
    }

    /// How long the last slow load took, and how long ago it ended; `None` when none was slow lately.
    pub(crate) fn slow(&self) -> Option<(Duration, Duration)> {
        let slow = (*lock(&self.slow))?;
        let ago = slow.ended.elapsed();
        (ago < SLOW_FOR).then_some((slow.took, ago))
    }
}

/// Counts one waiting reader, however its wait ends.
struct Waiting<'a>(&'a AtomicU64);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The duty to say how a load ended. Dropped without a word, its followers look again.
pub(crate) struct Leader {
    loads: Arc<SingleFlight>,
    name: Name,
    sender: watch::Sender<State>,
}

impl Leader {
    /// Hands what was loaded, or found, to everyone who follows; `None` when it cannot be shared.
    pub(crate) fn loaded(&self, payload: Option<Payload>) {
        self.sender.send_replace(State::Loaded(payload));
    }

    /// Tells everyone who follows that the load failed. Whoever looks again does not find it.
    pub(crate) fn failed(&self) {
        self.leave();
        self.sender.send_replace(State::Failed);
    }

    fn leave(&self) {
        let mut leased = lock(&self.loads.leased);
        let own = self.sender.subscribe();
        if leased
            .get(&self.name)
            .is_some_and(|load| load.same_channel(&own))
        {
            leased.remove(&self.name);
        }
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.leave();
    }
}

/// The place of one load in the queue of its key.
struct Place {
    loads: Arc<SingleFlight>,
    name: String,
    sender: watch::Sender<State>,
    forming: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut direct = lock(&self.loads.direct);
        let Some(queue) = direct.get_mut(&self.name) else {
            return;
        };
        if self.forming {
            queue.forming = None;
        }
        queue.places -= 1;
        if queue.places == 0 {
            direct.remove(&self.name);
        }
    }
}

/// A load past the cache that has not begun.
pub(crate) struct Forming {
    place: Place,
    running: Arc<tokio::sync::Mutex<()>>,
}

/// A load past the cache that runs; nobody joins it any more.
pub(crate) struct Running {
    place: Place,
    _turn: OwnedMutexGuard<()>,
}

impl Forming {
    /// Waits until the load before this one has ended, and begins. `None` when it took too long.
    pub(crate) async fn begin(self, give_up: Instant) -> Option<Running> {
        let Self { mut place, running } = self;
        let turn = timeout_at(give_up, running.lock_owned()).await.ok()?;
        if let Some(queue) = lock(&place.loads.direct).get_mut(&place.name) {
            queue.forming = None;
        }
        place.forming = false;
        Some(Running { place, _turn: turn })
    }
}

impl Running {
    /// Hands what was loaded to everyone who joined while the load was forming, if anybody did.
    pub(crate) fn loaded(&self, payload: impl FnOnce() -> Option<Payload>) {
        if self.place.sender.receiver_count() > 0 {
            self.place.sender.send_replace(State::Loaded(payload()));
        }
    }

    /// Tells everyone who joined that the load failed.
    pub(crate) fn failed(&self) {
        self.place.sender.send_replace(State::Failed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn loads() -> Arc<SingleFlight> {
        Arc::new(SingleFlight::new(2))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn value() -> Option<Payload> {
        Some(Some(Bytes::from_static(b"v")))
    }

    fn follower(role: Role) -> Follower {
        match role {
            Role::Follow(follower) => follower,
            Role::Lead(_) => panic!("nobody leads"),
        }
    }

    #[tokio::test]
    async fn followers_get_the_outcome_or_learn_that_there_is_none() {
        let loads = loads();
        let leader = loads.lead(Token(1), None);
        for other in [(Token(2), None), (Token(1), Some("page"))] {
            assert!(matches!(
                loads.lead_or_follow(other.0, other.1),
                Role::Lead(_)
            ));
        }
        let [a, b] = [(); 2].map(|()| follower(loads.lead_or_follow(Token(1), None)));
        leader.loaded(value());
        drop(leader);
        for follower in [a, b] {
            assert_eq!(
                loads.outcome(follower, soon()).await,
                Shared::Loaded(value())
            );
        }

        let leader = loads.lead(Token(3), None);
        let dropped = follower(loads.lead_or_follow(Token(3), None));
        drop(leader);
        assert_eq!(loads.outcome(dropped, soon()).await, Shared::Dropped);

        let leader = loads.lead(Token(4), None);
        let [failed, late] = [(); 2].map(|()| follower(loads.lead_or_follow(Token(4), None)));
        assert_eq!(loads.outcome(late, Instant::now()).await, Shared::TimedOut);
        leader.failed();
        assert_eq!(loads.outcome(failed, soon()).await, Shared::Failed);
        assert_eq!(loads.waiting(), 0);
        // Whoever looks again would be told of the same failure a second time, and the leader takes its own
        // entry away, not the next one's.
        let Role::Lead(_next) = loads.lead_or_follow(Token(4), None) else {
            panic!("the failed load is found again")
        };
        drop(leader);
        follower(loads.lead_or_follow(Token(4), None));
    }

    #[tokio::test]
    async fn past_the_cache_one_load_runs_and_one_forms_and_nobody_joins_the_running_one() {
        let loads = loads();
        let Turn::Lead(first) = loads.join("k") else {
            panic!("nobody was there")
        };
        let Turn::Follow(early) = loads.join("k") else {
            panic!("the first has not begun")
        };
        let running = first.begin(soon()).await.unwrap();
        let Turn::Lead(second) = loads.join("k") else {
            panic!("the running load was joined")
        };
        let Turn::Follow(later) = loads.join("k") else {
            panic!("the second is forming")
        };
        let Turn::Lead(other) = loads.join("another key") else {
            panic!("keys have nothing to do with each other")
        };
        assert!(other.begin(Instant::now()).await.is_some());
        running.loaded(value);
        drop(running);
        assert_eq!(loads.outcome(early, soon()).await, Shared::Loaded(value()));
        let running = second.begin(soon()).await.unwrap();
        running.failed();
        drop(running);
        assert_eq!(loads.outcome(later, soon()).await, Shared::Failed);
        assert!(lock(&loads.direct).is_empty(), "nothing is left behind");
    }

    #[tokio::test]
    async fn a_load_that_is_given_up_before_it_begins_frees_its_place() {
        let loads = loads();
        let Turn::Lead(first) = loads.join("k") else {
            panic!("nobody was there")
        };
        let running = first.begin(soon()).await.unwrap();
        let Turn::Lead(second) = loads.join("k") else {
            panic!("none is forming")
        };
        let Turn::Follow(follower) = loads.join("k") else {
            panic!("one is forming")
        };
        assert!(second.begin(Instant::now()).await.is_none(), "one runs");
        assert_eq!(loads.outcome(follower, soon()).await, Shared::Dropped);
        assert!(matches!(loads.join("k"), Turn::Lead(_)));
        drop(running);
        assert!(lock(&loads.direct).is_empty(), "nothing is left behind");
    }

    #[tokio::test]
    async fn one_load_more_than_the_limit_is_refused() {
        let loads = loads();
        let _two = (loads.permit().unwrap(), loads.permit().unwrap());
        assert_eq!(loads.under_way(), 2);
        assert!(loads.permit().is_none());
    }
}
