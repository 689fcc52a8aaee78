//! The in-process cache: the protocol's transitions over a concurrent cache bounded by bytes.
//!
//! For one process: another process does not see it. (It is still safe beside other nodes on one
//! Postgres, because each in-process cache is a server of its own to the epoch; but then only one
//! node at a time has a cache.)

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use quick_cache::sync::{Cache as QuickCache, DefaultLifecycle};
use quick_cache::{Lifecycle, Weighter};
use tokio::sync::watch;
use uuid::Uuid;
use writethrough_protocol::page::{self, Page};
use writethrough_protocol::{Acquire, KeyState, Payload, ServerId, Token};

use super::{Cache, End, Session, SessionWatch};
use crate::error::CacheError;

/// Bytes that an entry costs beside its key and its payload; an estimate.
const ENTRY_OVERHEAD: usize = 96;
/// Locks that make a transition atomic; a power of two, enough that two busy keys rarely share one.
const STRIPES: usize = 64;

#[derive(Debug, Clone)]
enum Stored {
    State(KeyState),
    Page(Page),
}

#[derive(Debug, Clone)]
struct Entry {
    stored: Stored,
    expires_ms: u64,
}

#[derive(Clone)]
struct ByBytes;

impl Weighter<String, Entry> for ByBytes {
    fn weight(&self, key: &String, entry: &Entry) -> u64 {
        let payload = match &entry.stored {
            Stored::State(KeyState::Value(Some(bytes))) => bytes.len(),
            Stored::State(KeyState::Intent(intent)) => intent.writers().len() * 32,
            Stored::State(_) => 0,
            Stored::Page(page) => page.bytes.len(),
        };
        (key.len() + payload + ENTRY_OVERHEAD) as u64
    }
}

/// Keeps intents from being evicted for room (assumption A4 of the protocol).
#[derive(Clone)]
struct KeepIntents(DefaultLifecycle<String, Entry>);

impl Lifecycle<String, Entry> for KeepIntents {
    type RequestState = <DefaultLifecycle<String, Entry> as Lifecycle<String, Entry>>::RequestState;

    fn is_pinned(&self, _key: &String, entry: &Entry) -> bool {
        matches!(entry.stored, Stored::State(KeyState::Intent(_)))
    }
}

struct Shared {
    server: ServerId,
    started: Instant,
    entries: QuickCache<String, Entry, ByBytes, RandomState, KeepIntents>,
    stripes: Vec<Mutex<()>>,
    hasher: RandomState,
    largest: u64,
}

impl Shared {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
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
        match self.look(key).map(|entry| entry.stored) {
            Some(Stored::State(state)) => state,
            _ => KeyState::Absent,
        }
    }

    fn put(&self, key: &str, stored: Stored, expires_ms: u64) {
        let key = key.to_owned();
        let entry = Entry { stored, expires_ms };
        // An entry that can never fit must not leave an older one in its place.
        if ByBytes.weight(&key, &entry) > self.largest {
            self.entries.remove(&key);
        } else {
            self.entries.insert(key, entry);
        }
    }

    fn put_state(&self, key: &str, state: KeyState, ttl: Duration) {
        let expires_ms = match &state {
            KeyState::Absent => {
                self.entries.remove(key);
                return;
            }
            KeyState::Intent(intent) => intent.deadline(),
            _ => self.now_ms() + ttl.as_millis() as u64,
        };
        self.put(key, Stored::State(state), expires_ms);
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

/// A cache inside this process, bounded by bytes.
pub struct MemoryCache {
    shared: Arc<Shared>,
    sessions: watch::Sender<Option<Arc<dyn Session>>>,
}

impl MemoryCache {
    /// An empty cache of at most `capacity_bytes`, keys and overhead included.
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Self {
        let entries = QuickCache::with(
            usize::try_from(capacity_bytes / 512)
                .unwrap_or(1 << 20)
                .max(64),
            capacity_bytes,
            ByBytes,
            RandomState::new(),
            KeepIntents(DefaultLifecycle::default()),
        );
        let shared = Arc::new(Shared {
            server: ServerId::new(format!("memory-{}", Uuid::new_v4().simple())),
            started: Instant::now(),
            largest: entries.shard_capacity(),
            entries,
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
        self.shared.entries.weight()
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
    ) -> Result<bool, CacheError> {
        Ok(self.0.transit(key, ttl, |state, _| {
            let (next, filled) = state.fill(token, payload);
            (filled.then_some(next), filled)
        }))
    }

    async fn renew_fill(
        &self,
        key: &str,
        token: Token,
        lease: Duration,
    ) -> Result<bool, CacheError> {
        Ok(self.0.transit(key, lease, |state, _| {
            let (next, held) = state.renew_fill(token);
            (held.then_some(next), held)
        }))
    }

    async fn break_fill(&self, key: &str, token: Token) -> Result<bool, CacheError> {
        Ok(self.0.transit(key, Duration::ZERO, |state, _| {
            let (next, broken) = state.break_fill(token);
            (broken.then_some(next), broken)
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
        let page = match self.0.look(page).map(|entry| entry.stored) {
            Some(Stored::Page(page)) => Some(page),
            _ => None,
        };
        Ok((self.0.state(collection), page))
    }

    async fn fill_page(
        &self,
        collection: &str,
        page: &str,
        token: Token,
        bytes: Bytes,
        ttl: Duration,
    ) -> Result<bool, CacheError> {
        let _atomic = self.0.lock(collection);
        let state = self.0.state(collection);
        let leased = matches!(state, KeyState::FillLease(_));
        let (next, filled) = page::fill(state, token);
        if filled {
            if leased {
                self.0.put_state(collection, next, ttl);
            }
            let expires_ms = self.0.now_ms() + ttl.as_millis() as u64;
            self.0.put(
                page,
                Stored::Page(Page {
                    stamp: token,
                    bytes,
                }),
                expires_ms,
            );
        }
        Ok(filled)
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
                matches!(entry.stored, Stored::State(KeyState::Value(Some(_))))
                    && entry.expires_ms > now_ms
                    && pattern.matches(key)
            });
            values.count() as u64
        })
        .await
    }

    async fn clear(&self, pattern: &str) -> Result<u64, CacheError> {
        let pattern = Pattern::new(pattern);
        self.walk(move |shared| {
            let keys: Vec<String> = shared
                .entries
                .iter()
                .filter(|(key, _)| pattern.matches(key))
                .map(|(key, _)| key)
                .collect();
            let mut removed = 0;
            for key in keys {
                let _atomic = shared.lock(&key);
                let intent = matches!(
                    shared.look(&key),
                    Some(Entry {
                        stored: Stored::State(KeyState::Intent(_)),
                        ..
                    })
                );
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
