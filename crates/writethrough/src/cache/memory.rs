//! The in-process cache: the protocol's transitions over a concurrent cache bounded by bytes.
//!
//! For one process: another process does not see it. (It is still safe beside other nodes on one
//! Postgres, because each in-process cache is a server of its own to the epoch; but then no node has
//! a cache: they say so once, and go on without.)

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use quick_cache::sync::Cache as QuickCache;
use quick_cache::{Lifecycle, Weighter};
use tokio::sync::watch;
use uuid::Uuid;
use writethrough_protocol::page::{self, Page};
use writethrough_protocol::{Acquire, KeyState, Payload, ServerId, Token};

use super::{Cache, End, FillLease, Filled, IN_PROCESS, Session, SessionWatch};
use crate::error::CacheError;

/// Locks that make a transition atomic; a power of two, enough that two busy keys rarely share one.
const STRIPES: usize = 64;

/// A key state or a page in its stored form, as Redis would keep it: the cache owns these bytes, and a
/// value that is a small part of a large buffer does not keep the buffer.
#[derive(Debug, Clone)]
struct Entry {
    stored: Bytes,
    expires_ms: u64,
}

impl Entry {
    fn state(self) -> KeyState {
        // Only states are stored under the keys of states, so nothing is malformed.
        KeyState::decode(Some(self.stored)).unwrap_or(KeyState::Absent)
    }

    fn is_value(&self) -> bool {
        self.stored.first() == Some(&b'V')
    }

    fn is_intent(&self) -> bool {
        self.stored.first() == Some(&b'I')
    }
}

/// Weighs what an entry has outside of the cache's own tables, which are measured.
#[derive(Clone)]
struct ByHeap;

impl Weighter<Box<str>, Entry> for ByHeap {
    fn weight(&self, key: &Box<str>, entry: &Entry) -> u64 {
        /// The counter that bytes get when they are first handed out.
        const SHARED: u64 = 32;
        let value = match entry.stored.len() {
            // "Known not to exist" is a constant.
            0 | 1 => 0,
            length => allocated(length) + SHARED,
        };
        allocated(key.len()) + value
    }
}

/// What an allocation of so many bytes costs. Measured on resident memory, with glibc's allocator
/// and mimalloc: a cache full of entries of 1 to 4 000 bytes has 0.65 to 0.99 of what is counted.
fn allocated(bytes: usize) -> u64 {
    (bytes + bytes / 8 + 16).max(32) as u64
}

/// Keeps intents from being evicted for room (assumption A4 of the protocol), until they lapse.
#[derive(Clone)]
struct KeepIntents {
    started: Instant,
}

impl Lifecycle<Box<str>, Entry> for KeepIntents {
    type RequestState = ();

    fn is_pinned(&self, _key: &Box<str>, entry: &Entry) -> bool {
        entry.is_intent() && entry.expires_ms > ms_since(self.started)
    }
}

fn ms_since(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX)
}

struct Shared {
    server: ServerId,
    started: Instant,
    capacity: u64,
    entries: QuickCache<Box<str>, Entry, ByHeap, RandomState, KeepIntents>,
    /// Entries put since the tables were measured.
    unmeasured: AtomicU64,
    /// The tables' bytes, when they were last measured.
    tables: Mutex<u64>,
    stripes: Vec<Mutex<()>>,
    hasher: RandomState,
}

impl Shared {
    fn now_ms(&self) -> u64 {
        ms_since(self.started)
    }

    /// What the cache keeps beside the entries' own allocations, those evicted a while ago included.
    fn tables(&self) -> u64 {
        let used = self.entries.memory_used();
        // The table of entries grows by doubling: the old one has not gone when the new one is there,
        // and an allocator keeps it for a while.
        (2 * used.entries + used.map) as u64
    }

    /// Gives the entries the room that the tables leave. The tables grow with the number of entries
    /// (those remembered after their eviction included) and never shrink.
    fn fit(&self) {
        // Another thread is at it.
        let Ok(mut known) = self.tables.try_lock() else {
            return;
        };
        self.unmeasured.store(0, Ordering::Relaxed);
        let tables = self.tables();
        // Each change of the room costs the memory of what was evicted a little, so small ones wait.
        if tables > *known + self.capacity / 100 {
            *known = tables;
            self.entries.set_capacity(room(self.capacity, tables));
        }
    }

    fn lock(&self, key: &str) -> MutexGuard<'_, ()> {
        let stripe = self.hasher.hash_one(key) as usize % STRIPES;
        // The lock guards no data of its own, so a panic of another holder breaks nothing.
        self.stripes[stripe]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, key: &str) -> Option<Entry> {
        self.entries
            .get(key)
            .filter(|entry| entry.expires_ms > self.now_ms())
    }

    fn state(&self, key: &str) -> KeyState {
        self.look(key).map_or(KeyState::Absent, Entry::state)
    }

    fn put(&self, key: &str, stored: Bytes, expires_ms: u64) {
        // An entry that can never fit takes an older one of its key away.
        self.entries
            .insert(key.into(), Entry { stored, expires_ms });
        let step = (self.capacity / 100 / ENTRY_IN_TABLES).max(1);
        if self.unmeasured.fetch_add(1, Ordering::Relaxed) >= step {
            self.fit();
        }
    }

    fn put_state(&self, key: &str, state: KeyState, ttl: Duration) {
        let Some(stored) = state.encode() else {
            self.entries.remove(key);
            return;
        };
        let expires_ms = match &state {
            KeyState::Intent(intent) => intent.deadline(),
            _ => self.now_ms() + ttl.as_millis() as u64,
        };
        self.put(key, stored, expires_ms);
    }

    /// Applies one transition atomically. The transition returns the next state, or `None` to
    /// leave the key (and its expiry) as it is.
    fn transit<R>(
        &self,
        key: &str,
        ttl: Duration,
        transition: impl FnOnce(KeyState, u64) -> (Option<KeyState>, R),
    ) -> R {
        let _atomic = self.lock(key);
        let (next, answer) = transition(self.state(key), self.now_ms());
        if let Some(next) = next {
            self.put_state(key, next, ttl);
        }
        answer
    }
}

/// The bytes that the tables have for each entry, at most: a slot of 72, and the place in the index.
const ENTRY_IN_TABLES: u64 = 84;

/// The bytes that entries may have outside of the tables. Some stay free, because the tables are
/// measured in steps and an allocator loses a little.
fn room(capacity: u64, tables: u64) -> u64 {
    (capacity - capacity / 32).saturating_sub(tables).max(1)
}

/// A cache inside this process, bounded by bytes.
pub struct MemoryCache {
    shared: Arc<Shared>,
    sessions: watch::Sender<Option<Arc<dyn Session>>>,
}

impl MemoryCache {
    /// An empty cache of at most `capacity_bytes` of memory: keys, values, and all that is kept beside
    /// them. Only the keys of writes under way may take more, for as long as their intents last. What
    /// the process's allocator keeps of memory that was given back to it is not in the cache's hands.
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Self {
        let started = Instant::now();
        let items = usize::try_from(capacity_bytes / 512).unwrap_or(1 << 20);
        let entries = QuickCache::with(
            items.max(64),
            room(capacity_bytes, 0),
            ByHeap,
            RandomState::new(),
            KeepIntents { started },
        );
        let shared = Arc::new(Shared {
            server: ServerId::new(format!("{IN_PROCESS}{}", Uuid::new_v4().simple())),
            started,
            capacity: capacity_bytes,
            entries,
            unmeasured: AtomicU64::new(0),
            tables: Mutex::new(0),
            stripes: (0..STRIPES).map(|_| Mutex::new(())).collect(),
            hasher: RandomState::new(),
        });
        let session: Arc<dyn Session> = Arc::new(MemorySession(shared.clone()));
        Self {
            shared,
            sessions: watch::Sender::new(Some(session)),
        }
    }

    /// Bytes in use, keys and overhead included.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.shared.entries.weight() + self.shared.tables()
    }
}

impl fmt::Debug for MemoryCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryCache").finish_non_exhaustive()
    }
}

impl Cache for MemoryCache {
    fn sessions(&self) -> SessionWatch {
        self.sessions.subscribe()
    }

    fn close(&self) {
        self.sessions.send_replace(None);
    }
}

struct MemorySession(Arc<Shared>);

impl MemorySession {
    /// Walks every entry off the async threads: the walk takes each shard's lock in turn.
    async fn walk<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> R + Send + 'static,
    ) -> Result<R, CacheError> {
        let shared = self.0.clone();
        tokio::task::spawn_blocking(move || work(&shared))
            .await
            .map_err(|error| CacheError::Command(error.to_string()))
    }
}

#[async_trait]
impl Session for MemorySession {
    fn server(&self) -> &ServerId {
        &self.0.server
    }

    fn system(&self) -> &'static str {
        "memory"
    }

    async fn get(&self, key: &str) -> Result<KeyState, CacheError> {
        Ok(self.0.state(key))
    }

    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<KeyState>>, CacheError> {
        Ok(keys.iter().map(|key| Some(self.0.state(key))).collect())
    }

    async fn acquire_fill(
        &self,
        key: &str,
        token: Token,
        lease: Duration,
    ) -> Result<Acquire, CacheError> {
        Ok(self.0.transit(key, lease, |state, _| {
            let was_absent = state == KeyState::Absent;
            let (next, answer) = state.acquire_fill(token);
            (was_absent.then_some(next), answer)
        }))
    }

    async fn fill(
        &self,
        key: &str,
        token: Token,
        payload: Payload,
        ttl: Duration,
    ) -> Result<Filled, CacheError> {
        Ok(self.0.transit(key, ttl, |state, _| {
            let (next, filled) = state.fill(token, payload);
            (filled.then_some(next), Filled::new(filled))
        }))
    }

    async fn renew_fill(
        &self,
        key: &str,
        token: Token,
        lease: Duration,
    ) -> Result<FillLease, CacheError> {
        Ok(self.0.transit(key, lease, |state, _| {
            let (next, held) = state.renew_fill(token);
            (held.then_some(next), FillLease::new(held))
        }))
    }

    async fn break_fill(&self, key: &str, token: Token) -> Result<FillLease, CacheError> {
        Ok(self.0.transit(key, Duration::ZERO, |state, _| {
            let (next, held) = state.break_fill(token);
            (held.then_some(next), FillLease::new(held))
        }))
    }

    async fn begin(
        &self,
        keys: &[String],
        token: Token,
        lifetime: Duration,
    ) -> Result<(), CacheError> {
        for key in keys {
            self.0.transit(key, lifetime, |state, now_ms| {
                let lifetime_ms = lifetime.as_millis() as u64;
                (Some(state.begin(token, lifetime_ms, now_ms)), ())
            });
        }
        Ok(())
    }

    async fn end(&self, ends: &[End], token: Token) -> Result<(), CacheError> {
        for End { key, value, ttl } in ends {
            self.0.transit(key, *ttl, |state, now_ms| {
                (Some(state.end(token, value.clone(), now_ms)), ())
            });
        }
        Ok(())
    }

    async fn get_page(
        &self,
        collection: &str,
        page: &str,
    ) -> Result<(KeyState, Option<Page>), CacheError> {
        let _atomic = self.0.lock(collection);
        let page = self
            .0
            .look(page)
            .and_then(|entry| Page::decode(entry.stored).ok());
        Ok((self.0.state(collection), page))
    }

    async fn fill_page(
        &self,
        collection: &str,
        page: &str,
        token: Token,
        bytes: Bytes,
        ttl: Duration,
    ) -> Result<Filled, CacheError> {
        let _atomic = self.0.lock(collection);
        let state = self.0.state(collection);
        let leased = matches!(state, KeyState::FillLease(_));
        let (next, filled) = page::fill(state, token);
        if filled {
            if leased {
                self.0.put_state(collection, next, ttl);
            }
            let expires_ms = self.0.now_ms() + ttl.as_millis() as u64;
            let stamped = Page {
                stamp: token,
                bytes,
            };
            self.0.put(page, stamped.encode(), expires_ms);
        }
        Ok(Filled::new(filled))
    }

    async fn discard(&self, key: &str, bytes: &Bytes) -> Result<(), CacheError> {
        let _atomic = self.0.lock(key);
        let holds = self
            .0
            .look(key)
            .is_some_and(|Entry { stored, .. }| match stored.first() {
                Some(b'V') => stored[1..] == *bytes,
                Some(b'P') => Page::decode(stored).is_ok_and(|page| page.bytes == *bytes),
                _ => false,
            });
        if holds {
            self.0.entries.remove(key);
        }
        Ok(())
    }

    async fn set(&self, key: &str, payload: Payload, ttl: Duration) -> Result<(), CacheError> {
        self.0
            .transit(key, ttl, |_, _| (Some(KeyState::Value(payload)), ()));
        Ok(())
    }

    async fn delete(&self, key: &str) -> Result<(), CacheError> {
        self.0
            .transit(key, Duration::ZERO, |_, _| (Some(KeyState::Absent), ()));
        Ok(())
    }

    async fn count(&self, pattern: &str) -> Result<u64, CacheError> {
        let pattern = Pattern::new(pattern);
        self.walk(move |shared| {
            let now_ms = shared.now_ms();
            let values = shared.entries.iter().filter(|(key, entry)| {
                entry.is_value() && entry.expires_ms > now_ms && pattern.matches(key)
            });
            values.count() as u64
        })
        .await
    }

    async fn clear(&self, pattern: &str) -> Result<u64, CacheError> {
        let pattern = Pattern::new(pattern);
        self.walk(move |shared| {
            let keys: Vec<Box<str>> = shared
                .entries
                .iter()
                .filter(|(key, _)| pattern.matches(key))
                .map(|(key, _)| key)
                .collect();
            let mut removed = 0;
            for key in keys {
                let _atomic = shared.lock(&key);
                let intent = shared.look(&key).is_some_and(|entry| entry.is_intent());
                if !intent && shared.entries.remove(&key).is_some() {
                    removed += 1;
                }
            }
            removed
        })
        .await
    }
}

/// A glob with `*` only, as the engine uses it.
struct Pattern(Vec<String>);

impl Pattern {
    fn new(glob: &str) -> Self {
        Self(glob.split('*').map(str::to_owned).collect())
    }

    fn matches(&self, key: &str) -> bool {
        let [first, middle @ .., last] = self.0.as_slice() else {
            return self.0.first().is_some_and(|only| only == key);
        };
        let Some(mut rest) = key.strip_prefix(first.as_str()) else {
            return false;
        };
        for part in middle {
            match rest.find(part.as_str()) {
                Some(place) => rest = &rest[place + part.len()..],
                None => return false,
            }
        }
        rest.ends_with(last.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_matches_like_a_glob() {
        assert!(Pattern::new("item:*@*").matches("item:1@7"));
        assert!(!Pattern::new("item:*@*").matches("item:1"));
        assert!(!Pattern::new("item:*@*").matches("xitem:1@7"));
        assert!(Pattern::new("{items}@*").matches("{items}@7:limit=3"));
        assert!(Pattern::new("plain").matches("plain"));
        assert!(!Pattern::new("plain").matches("plainer"));
    }

    #[tokio::test]
    async fn room_is_bounded_and_intents_are_never_evicted_for_it() {
        let cache = MemoryCache::new(1 << 20);
        let session = cache.sessions().borrow().clone().unwrap();
        let hour = Duration::from_secs(3600);
        session
            .begin(&["item:kept@1".into()], Token(1), hour)
            .await
            .unwrap();
        for number in 0..20_000 {
            let payload = Some(Bytes::from(vec![0; 200]));
            session
                .set(&format!("item:{number}@1"), payload, hour)
                .await
                .unwrap();
        }
        assert!(cache.weight_bytes() <= 1 << 20);
        assert!(matches!(
            session.get("item:kept@1").await.unwrap(),
            KeyState::Intent(_)
        ));
    }

    #[tokio::test]
    async fn a_value_too_large_for_the_cache_leaves_nothing_behind() {
        let cache = MemoryCache::new(64 << 10);
        let session = cache.sessions().borrow().clone().unwrap();
        let hour = Duration::from_secs(3600);
        session
            .begin(&["item:1@1".into()], Token(1), hour)
            .await
            .unwrap();
        let value = Some(Some(Bytes::from(vec![0; 1 << 20])));
        session
            .end(
                &[End {
                    key: "item:1@1".into(),
                    value,
                    ttl: hour,
                }],
                Token(1),
            )
            .await
            .unwrap();
        assert_eq!(session.get("item:1@1").await.unwrap(), KeyState::Absent);
    }
}
