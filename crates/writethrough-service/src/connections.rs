//! The places for client connections: how many there are, and which connection gives way when all are
//! taken. A new connection never waits for an idle one: it may be a probe's.
//!
//! Above the limit there are a few spare places, on which probes are answered even when every connection
//! has a request under way.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use crate::metrics::{Dropped, Metrics};
use crate::middleware::access::Caller;
use crate::middleware::load_shed::Admitted;
use crate::throttle::Throttle;

/// Connections above the limit.
pub(crate) const SPARE: usize = 32;
/// A connection gives way only when it has been idle for this long: a client that sends one request
/// after the other is not idle in between.
const IDLE_AT_LEAST: Duration = Duration::from_millis(250);
/// How often somebody who waits for a place looks whether a connection has become idle meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

static FULL: Throttle = Throttle::new(Duration::from_secs(10));

// What `Connection::state` holds besides the time since which it is idle.
const BUSY: u64 = 0;
/// The answer is decided, and on its way to the client.
const ANSWERED: u64 = 1;
/// It has to go.
const GIVES_WAY: u64 = u64::MAX;

/// All places.
pub struct Places {
    limit: usize,
    started: Instant,
    taken: Mutex<Taken>,
    freed: Notify,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Taken {
    next: u64,
    open: HashMap<u64, Arc<Connection>>,
    /// How many of them had to give way, and are there still.
    going: usize,
    /// Those that were idle when somebody looked, the longest first, and since when. Whoever has become
    /// idle later is behind all of these.
    idle: VecDeque<(u64, Arc<Connection>)>,
}

/// A client connection, and what it is doing.
pub struct Connection {
    number: u64,
    spare: bool,
    /// Had to give way.
    goes: AtomicBool,
    state: AtomicU64,
    started: Instant,
    gives_way: Notify,
    /// Held until the answer is out.
    admitted: Mutex<Option<Admitted>>,
}

/// Who sends a request, and on which connection. The server puts it into each request's extensions.
#[derive(Clone)]
pub struct Origin {
    /// Who.
    pub caller: Caller,
    /// On which.
    pub connection: Arc<Connection>,
}

/// A place that is taken; free again when it is dropped.
pub struct Place {
    places: Arc<Places>,
    connection: Arc<Connection>,
}

impl Places {
    /// Places for `limit` connections, and the spare ones.
    #[must_use]
    pub fn new(limit: usize, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            limit,
            started: Instant::now(),
            taken: Mutex::default(),
            freed: Notify::new(),
            metrics,
        })
    }

    /// Takes a place for a connection. When there is none the connection that was idle for the longest
    /// time gives way; when none is idle it waits.
    pub async fn take(self: &Arc<Self>) -> Place {
        loop {
            if let Some(place) = self.try_take() {
                return place;
            }
            let _ = timeout(LOOK_AGAIN, self.freed.notified()).await;
        }
    }

    fn try_take(self: &Arc<Self>) -> Option<Place> {
        let mut taken = self.taken();
        let open = taken.open.len();
        while open >= self.limit + taken.going && self.make_room(&mut taken) {}
        if open >= self.limit + SPARE {
            return None;
        }
        let spare = open >= self.limit + taken.going;
        let number = taken.next;
        taken.next += 1;
        let connection = Arc::new(Connection {
            number,
            spare,
            goes: AtomicBool::new(false),
            state: AtomicU64::new(microseconds(self.started)),
            started: self.started,
            gives_way: Notify::new(),
            admitted: Mutex::default(),
        });
        taken.open.insert(number, connection.clone());
        self.metrics.connections().inc();
        Some(Place {
            places: self.clone(),
            connection,
        })
    }

    /// Has the connection that was idle for the longest time give way, if one was for long enough.
    pub fn give_way(&self) -> bool {
        self.make_room(&mut self.taken())
    }

    fn make_room(&self, taken: &mut Taken) -> bool {
        let latest = microseconds(self.started).saturating_sub(IDLE_AT_LEAST.as_micros() as u64);
        if taken.idle.is_empty() {
            let idle = taken.open.values().filter_map(|connection| {
                let since = connection.state.load(Ordering::Acquire);
                (since > ANSWERED && since <= latest).then(|| (since, connection.clone()))
            });
            let mut idle: Vec<_> = idle.collect();
            idle.sort_unstable_by_key(|(since, connection)| (*since, connection.number));
            taken.idle = idle.into();
        }
        while let Some((since, connection)) = taken.idle.pop_front() {
            let gone = connection.state.compare_exchange(
                since,
                GIVES_WAY,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            if gone.is_ok() {
                connection.goes.store(true, Ordering::Relaxed);
                taken.going += 1;
                connection.gives_way.notify_one();
                self.metrics.dropped(Dropped::Idle);
                if let Some(count) = FULL.pass() {
                    tracing::warn!(
                        "all {} places for client connections are taken: {count} idle ones had to \
                         give way to new ones",
                        self.limit
                    );
                }
                return true;
            }
        }
        false
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Never one of the other states.
fn microseconds(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_micros()).map_or(GIVES_WAY - 1, |now| now + ANSWERED + 1)
}

impl Place {
    /// The connection that has the place.
    #[must_use]
    pub fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Whoever still knows the connection must not keep its request's place.
        drop(self.connection.admitted().take());
        let mut taken = self.places.taken();
        taken.open.remove(&self.connection.number);
        taken.going -= usize::from(self.connection.goes.load(Ordering::Relaxed));
        drop(taken);
        self.places.metrics.connections().dec();
        self.places.freed.notify_one();
    }
}

impl Connection {
    /// Whether it is one above the limit: it may ask how the service is, once.
    #[must_use]
    pub fn is_spare(&self) -> bool {
        self.spare
    }

    /// Whether the answer to the request under way is the connection's last.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.spare || self.goes.load(Ordering::Relaxed)
    }

    /// A request has come. One that arrives while its connection is about to give way is served still.
    pub(crate) fn begins(&self) {
        self.state.store(BUSY, Ordering::Release);
    }

    /// Keeps a request's place among those that are served until its answer is out.
    pub(crate) fn holds(&self, admitted: Admitted) {
        *self.admitted() = Some(admitted);
    }

    /// The answer is decided, and about to be sent.
    pub(crate) fn answers(&self) {
        self.state.store(ANSWERED, Ordering::Release);
    }

    /// All that there was to send has been sent.
    pub(crate) fn sent(&self) {
        if self.state.load(Ordering::Acquire) == ANSWERED {
            drop(self.admitted().take());
            self.state
                .store(microseconds(self.started), Ordering::Release);
        }
    }

    /// Waits until the connection has to give way to another and has no request under way.
    pub(crate) async fn gives_way(&self) {
        loop {
            self.gives_way.notified().await;
            if self.state.load(Ordering::Acquire) == GIVES_WAY {
                return;
            }
        }
    }

    fn admitted(&self) -> MutexGuard<'_, Option<Admitted>> {
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_millis(251);

    fn places(limit: usize) -> Arc<Places> {
        Places::new(limit, Arc::new(Metrics::new()))
    }

    async fn gives_way(place: &Place) -> bool {
        timeout(Duration::from_millis(1), place.connection.gives_way())
            .await
            .is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_idle_connection_gives_way_and_a_busy_one_never() {
        let places = places(3);
        let (busy, oldest, newer) = (
            places.take().await,
            places.take().await,
            places.take().await,
        );
        busy.connection.begins();
        tokio::time::sleep(IDLE).await;
        // Idle for no time at all, though it was opened first.
        newer.connection.begins();
        newer.connection.answers();
        newer.connection.sent();
        let next = places.take().await;
        assert!(!next.connection.is_spare());
        assert!(gives_way(&oldest).await);
        assert!(!gives_way(&busy).await && !gives_way(&newer).await);
        tokio::time::sleep(IDLE).await;
        let _one_more = places.take().await;
        // Its client has sent a request in this moment: it is answered, and then the connection ends.
        newer.connection.begins();
        assert!(!gives_way(&newer).await && newer.connection.is_last());
        assert!(!gives_way(&next).await && !next.connection.is_last());
    }

    #[tokio::test(start_paused = true)]
    async fn with_all_connections_busy_there_are_spare_places_and_then_a_wait() {
        let places = places(2);
        let mut all = Vec::new();
        for _ in 0..2 + SPARE {
            all.push(places.take().await);
        }
        let spare: Vec<_> = all
            .iter()
            .map(|place| place.connection.is_spare())
            .collect();
        assert_eq!(spare.iter().filter(|spare| **spare).count(), SPARE);
        assert!(!spare[0] && !spare[1]);
        for place in &all {
            place.connection.begins();
        }
        let wait = tokio::spawn({
            let places = places.clone();
            async move { places.take().await }
        });
        tokio::time::sleep(IDLE).await;
        assert!(!wait.is_finished());
        all.swap_remove(0);
        assert!(wait.await.unwrap().connection.is_spare());
    }

    #[tokio::test(start_paused = true)]
    async fn spare_places_are_given_back_as_soon_as_connections_are_idle() {
        let places = places(2);
        let mut all = Vec::new();
        for _ in 0..2 + SPARE {
            all.push(places.take().await);
        }
        tokio::time::sleep(IDLE).await;
        let waits = tokio::spawn({
            let places = places.clone();
            async move { places.take().await }
        });
        tokio::task::yield_now().await;
        let mut stay = Vec::new();
        for place in all {
            if !gives_way(&place).await {
                stay.push(place);
            }
        }
        assert_eq!(stay.len(), 1);
        assert!(!waits.await.unwrap().connection.is_spare());
        assert_eq!(places.taken().open.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_among_requests_is_held_until_the_answer_is_out() {
        let admission = crate::middleware::load_shed::Admission::new(1, Default::default());
        let places = places(1);
        let place = places.take().await;
        place.connection.begins();
        place.connection.holds(admission.enter().await.unwrap());
        // Something is flushed before the answer.
        place.connection.sent();
        place.connection.answers();
        assert!(admission.enter().await.is_none());
        place.connection.sent();
        assert!(admission.enter().await.is_some());
        // One that breaks off gives it back as well.
        place.connection.begins();
        place.connection.holds(admission.enter().await.unwrap());
        drop(place);
        assert!(admission.enter().await.is_some());
    }
}
