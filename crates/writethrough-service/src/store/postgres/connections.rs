//! The connections for items: who gets one, who waits and for how long, and what is kept for whom.
//!
//! A write first takes a turn at its row, so that a locked row holds a few connections and not all. Then
//! it takes one of the places of writes: the rest of the pool is for reads. When the server has no room
//! for as many connections as were asked for, the places become fewer, and whoever comes waits for them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use deadpool_postgres::{Object, Pool, PoolError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout_at};

use super::bounds::POOL_WAIT;
use super::room::{Ask, Room, is_full};
use crate::causes::chain;
use crate::item::ItemId;
use crate::store::{PoolUse, StoreError, StoreFailure};

/// Writes that may wait for their turn at one row; more are refused at once.
const MOST_WAITING: usize = 256;
/// Writes of one row that hold a connection: one runs, one waits for its lock, one is on its way.
const MOST_AT_A_ROW: usize = 3;
/// How long the server is not asked for one more connection after it has refused one.
const ROOM_PAUSE: Duration = Duration::from_secs(5);
/// The pause before it is asked again by whoever has no other connection to wait for.
const NONE_PAUSE: Duration = Duration::from_millis(50);

/// What a connection is for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Purpose {
    Read,
    /// A write of this item's row.
    Write(ItemId),
}

/// The connections for items.
pub(super) struct Connections {
    pool: Pool,
    /// As many as there may be connections.
    places: Arc<Places>,
    /// Those of them that writes may take.
    for_writes: Arc<Places>,
    rows: Arc<Rows>,
    room: Arc<Room>,
    /// The most that was asked for.
    wanted: usize,
    waiting: AtomicUsize,
    refused_at_row: AtomicU64,
    refused_without_connection: AtomicU64,
}

/// A connection that is thrown away unless its work was seen to end: the reply to an abandoned query
/// would hold up whoever came next.
pub(super) struct Lent {
    object: Option<Object>,
    // After the connection: whoever gets the place finds it.
    place: Place,
    _write: Option<(Place, Turn)>,
}

impl Lent {
    /// The connection.
    pub(super) fn client(&self) -> Option<&Object> {
        self.object.as_ref()
    }

    pub(super) fn give_back(mut self) {
        // One that has to go does not go back.
        if !self.place.places.owe() {
            self.object.take();
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(object) = self.object.take() {
            drop(Object::take(object));
        }
    }
}

impl Connections {
    pub(super) fn new(pool: Pool, room: Arc<Room>) -> Arc<Self> {
        let wanted = pool.status().max_size;
        let connections = Arc::new(Self {
            pool,
            places: Arc::new(Places::new(wanted)),
            for_writes: Arc::new(Places::new(share_of_writes(wanted))),
            rows: Arc::default(),
            room,
            wanted,
            waiting: AtomicUsize::new(0),
            refused_at_row: AtomicU64::new(0),
            refused_without_connection: AtomicU64::new(0),
        });
        let giver = Arc::downgrade(&connections);
        connections.room.set_giver(move |reason| {
            if let Some(connections) = giver.upgrade() {
                connections.give_one_up(reason);
            }
        });
        connections
    }

    /// A connection, within a second.
    ///
    /// # Errors
    ///
    /// [`StoreFailure::Overloaded`] when none came free, at once when too many wait for the same row;
    /// [`StoreFailure::Unavailable`] when none could be made.
    ///
    /// # Cancellation
    ///
    /// Leaves nothing.
    pub(super) async fn get(self: &Arc<Self>, purpose: Purpose) -> Result<Lent, StoreError> {
        let until = Instant::now() + POOL_WAIT;
        let _waiting = Waiting::new(&self.waiting);
        let write = match purpose {
            Purpose::Read => None,
            Purpose::Write(id) => {
                let turn = self.turn(id, until).await?;
                let place = Places::take(&self.for_writes, until).await;
                Some((place.ok_or_else(|| self.none_free())?, turn))
            }
        };
        loop {
            self.ask_for_room();
            let place = Places::take(&self.places, until).await;
            let place = place.ok_or_else(|| match self.open() < self.places.limit() {
                // Whoever has the places has no connections either.
                true if self.room.reason().is_none() => none_made(),
                _ => self.none_free(),
            })?;
            let alone = match self.take_or_make(place, until).await {
                Some((Ok(object), place)) => {
                    self.keep_places_for(self.open());
                    return Ok(Lent {
                        object: Some(object),
                        place,
                        _write: write,
                    });
                }
                Some((Err(PoolError::Backend(error)), place)) if is_full(&error) => {
                    let open = self.open();
                    self.shrink_to(open, &chain(&error));
                    drop(place);
                    open == 0
                }
                Some((Err(error), _)) => {
                    return Err(StoreError::from_source(StoreFailure::Unavailable, &error));
                }
                None if self.room.reason().is_some() => return Err(self.none_free()),
                None => return Err(none_made()),
            };
            // Nobody else's comes free then.
            if alone {
                if Instant::now() + NONE_PAUSE >= until {
                    return Err(self.none_free());
                }
                sleep(NONE_PAUSE).await;
            }
        }
    }

    /// A connection for this place, if there is one in time. One that is being made when the time is up
    /// is there for the next one: a store that is slow to connect would have no connections otherwise.
    async fn take_or_make(
        &self,
        place: Place,
        until: Instant,
    ) -> Option<(Result<Object, PoolError>, Place)> {
        let pool = self.pool.clone();
        if pool.status().available > 0 {
            return Some((timeout_at(until, pool.get()).await.ok()?, place));
        }
        let making = tokio::spawn(async move { (pool.get().await, place) });
        timeout_at(until, making).await.ok()?.ok()
    }

    async fn turn(&self, id: ItemId, until: Instant) -> Result<Turn, StoreError> {
        let at_once = (self.for_writes.limit() / 3).clamp(1, MOST_AT_A_ROW);
        let refused = |reason: &str| {
            self.refused_at_row.fetch_add(1, Ordering::Relaxed);
            StoreError::new(
                StoreFailure::Overloaded,
                format!(
                    "writes of item {id} wait for each other ({reason}); if it stays, look for a \
                     session that keeps its row locked"
                ),
            )
        };
        let mut turn =
            Rows::join(&self.rows, id, at_once).ok_or_else(|| refused("too many of them"))?;
        match timeout_at(until, turn.come()).await {
            Ok(()) => Ok(turn),
            Err(_) => Err(refused("for more than 1 s")),
        }
    }

    fn none_free(&self) -> StoreError {
        self.refused_without_connection
            .fetch_add(1, Ordering::Relaxed);
        let text = match self.room.reason() {
            None => "no free connection to Postgres within 1 s".to_owned(),
            Some(reason) => format!("no free connection to Postgres within 1 s: {reason}"),
        };
        StoreError::new(StoreFailure::Overloaded, text)
    }

    fn open(&self) -> usize {
        self.pool.status().size
    }

    fn set_places(&self, limit: usize) {
        self.places.set_limit(limit);
        self.for_writes.set_limit(share_of_writes(limit));
    }

    /// The server has let in so many: connections that were being made when it refused another one.
    fn keep_places_for(&self, open: usize) {
        if open > self.places.limit() && open <= self.wanted && !self.places.owe() {
            self.set_places(open);
        }
    }

    /// The server has refused one more connection than these.
    fn shrink_to(&self, open: usize, reason: &str) {
        let places = open.clamp(1, self.places.limit());
        self.set_places(places);
        self.room.refused(reason, places, self.wanted);
    }

    /// Asks the server for more connections, where it has refused some.
    fn ask_for_room(&self) {
        let limit = self.places.limit();
        match self.room.ask(ROOM_PAUSE, self.open() >= limit) {
            Ask::No => {}
            Ask::One => self.set_places((limit + 1).min(self.wanted)),
            Ask::All => self.set_places(self.wanted),
        }
    }

    /// Gives one connection up for the fence or the probe, which the server has refused theirs.
    pub(super) fn give_one_up(&self, reason: &str) {
        let open = self.open();
        self.shrink_to(open.saturating_sub(1), reason);
        if open < 2 {
            return;
        }
        let mut given = false;
        self.pool.retain(|_, _| std::mem::replace(&mut given, true));
        // Otherwise all are at work, and one goes when its work is done.
    }

    /// The use of the connections now.
    pub(super) fn pool_use(&self) -> PoolUse {
        let status = self.pool.status();
        PoolUse {
            limit: self.places.limit(),
            open: status.size,
            used: status.size.saturating_sub(status.available),
            waiting: self.waiting.load(Ordering::Relaxed),
            refused_at_row: self.refused_at_row.load(Ordering::Relaxed),
            refused_without_connection: self.refused_without_connection.load(Ordering::Relaxed),
        }
    }

    /// Forgets what was prepared on every connection.
    pub(super) fn forget_statements(&self) {
        self.pool.manager().statement_caches.clear();
    }

    pub(super) fn close(&self) {
        self.pool.close();
    }
}

fn none_made() -> StoreError {
    StoreError::new(
        StoreFailure::Unavailable,
        "no connection to Postgres within 1 s",
    )
}

/// A quarter is for reads alone, so that they go on when writes wait for locks.
fn share_of_writes(places: usize) -> usize {
    (places - places / 4).min(places.saturating_sub(1)).max(1)
}

/// Counts who waits.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Places that are taken in the order of arrival, and whose number can change while they are taken.
struct Places {
    free: Arc<Semaphore>,
    number: Mutex<Number>,
}

struct Number {
    limit: usize,
    /// Places that are taken and not to come back.
    owed: usize,
}

impl Places {
    fn new(limit: usize) -> Self {
        Self {
            free: Arc::new(Semaphore::new(limit)),
            number: Mutex::new(Number { limit, owed: 0 }),
        }
    }

    fn number(&self) -> MutexGuard<'_, Number> {
        self.number.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limit(&self) -> usize {
        self.number().limit
    }

    /// Whether more are taken than there may be.
    fn owe(&self) -> bool {
        self.number().owed > 0
    }

    fn set_limit(&self, limit: usize) {
        let mut number = self.number();
        if limit < number.limit {
            let fewer = number.limit - limit;
            number.owed += fewer - self.free.forget_permits(fewer);
        } else {
            let more = limit - number.limit;
            let paid = number.owed.min(more);
            number.owed -= paid;
            self.free.add_permits(more - paid);
        }
        number.limit = limit;
    }

    async fn take(places: &Arc<Self>, until: Instant) -> Option<Place> {
        let taken = timeout_at(until, places.free.clone().acquire_owned()).await;
        Some(Place {
            places: places.clone(),
            // It is never closed.
            permit: Some(taken.ok()?.ok()?),
        })
    }
}

/// A place that is taken.
struct Place {
    places: Arc<Places>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut number = self.places.number();
        if number.owed > 0 {
            number.owed -= 1;
            if let Some(permit) = self.permit.take() {
                permit.forget();
            }
        }
    }
}

/// The rows that are being written, and the writes that wait for them. It holds nothing of others.
#[derive(Default)]
struct Rows(Mutex<HashMap<ItemId, Row>>);

struct Row {
    turns: Arc<Semaphore>,
    /// Writes that have their turn or wait for it.
    writes: usize,
}

/// A write's turn at its row, or its place in the queue.
struct Turn {
    rows: Arc<Rows>,
    id: ItemId,
    turns: Arc<Semaphore>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Rows {
    fn rows(&self) -> MutexGuard<'_, HashMap<ItemId, Row>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a write up, unless too many wait.
    fn join(rows: &Arc<Self>, id: ItemId, at_once: usize) -> Option<Turn> {
        let mut all = rows.rows();
        let row = all.entry(id).or_insert_with(|| Row {
            turns: Arc::new(Semaphore::new(at_once)),
            writes: 0,
        });
        if row.writes >= MOST_AT_A_ROW + MOST_WAITING {
            return None;
        }
        row.writes += 1;
        Some(Turn {
            rows: rows.clone(),
            id,
            turns: row.turns.clone(),
            permit: None,
        })
    }
}

impl Turn {
    /// Waits until it is this write's turn.
    async fn come(&mut self) {
        // It is never closed.
        self.permit = self.turns.clone().acquire_owned().await.ok();
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.permit.take();
        let mut rows = self.rows.rows();
        if let Some(row) = rows.get_mut(&self.id) {
            row.writes -= 1;
            if row.writes == 0 {
                rows.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    #[tokio::test]
    async fn places_become_fewer_and_more_while_they_are_taken() {
        let places = Arc::new(Places::new(3));
        let mut taken = Vec::new();
        for _ in 0..3 {
            taken.push(Places::take(&places, soon()).await.unwrap());
        }
        places.set_limit(1);
        assert!(places.owe());
        for _ in 0..2 {
            drop(taken.pop().unwrap());
            assert!(
                Places::take(&places, soon()).await.is_none(),
                "one is taken still"
            );
        }
        assert!(!places.owe());
        places.set_limit(2);
        let second = Places::take(&places, soon()).await.unwrap();
        assert!(Places::take(&places, soon()).await.is_none());
        drop(second);
        drop(taken.pop().unwrap());
        places.set_limit(3);
        for _ in 0..3 {
            taken.push(Places::take(&places, soon()).await.unwrap());
        }
        assert!(Places::take(&places, soon()).await.is_none());
    }

    #[test]
    fn writes_leave_something_to_reads() {
        let shares = [(1, 1), (2, 1), (3, 2), (4, 3), (8, 6), (16, 12), (100, 75)];
        for (places, share) in shares {
            assert_eq!(share_of_writes(places), share, "{places}");
        }
    }

    #[tokio::test]
    async fn the_queue_at_a_row_is_bounded_and_leaves_nothing_behind() {
        let rows = Arc::new(Rows::default());
        let (id, other) = (ItemId::from(Uuid::nil()), ItemId::from(Uuid::max()));
        let mut first = Rows::join(&rows, id, 1).unwrap();
        first.come().await;
        let mut queued: Vec<_> = std::iter::from_fn(|| Rows::join(&rows, id, 1)).collect();
        assert_eq!(queued.len(), MOST_AT_A_ROW + MOST_WAITING - 1);
        let mut second = queued.pop().unwrap();
        assert!(timeout_at(soon(), second.come()).await.is_err());
        Rows::join(&rows, other, 1).unwrap().come().await;
        drop(first);
        timeout_at(soon(), second.come()).await.unwrap();
        drop((queued, second));
        assert!(rows.rows().is_empty());
    }
}
