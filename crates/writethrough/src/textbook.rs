//! The pattern of the textbook, to be compared with and to be refuted: on a miss load, then `SET`; commit,
//! then `SET` or `DEL`. It has no epoch, no intent and no lease, and nothing orders its steps.
//!
//! So it serves stale values, each for as long as its `ttl`: a slow load sets what a write has
//! replaced meanwhile (the test below), two writers commit in one order and set in the other, a
//! writer stops between commit and `SET`, and whatever a Redis has lost or found again is believed.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use writethrough_protocol::read::Bypass;
use writethrough_protocol::{KeyState, Payload};

use crate::cache::observed::Observed;
use crate::cache::{Cache, SessionWatch};
use crate::entity::{self, Cleared, Entity, Key};
use crate::error::CacheError;
use crate::format::Format;
use crate::read::{Read, ReadOutcome};
use crate::settings::Settings;
use crate::stats::{Counters, Stats};

/// A cache in front of a store by the pattern of the textbook. **Not** linearizable: use
/// [`crate::WriteThrough`]. Single values are cached, pages are not.
pub struct Textbook {
    cache: Arc<dyn Cache>,
    sessions: SessionWatch,
    settings: Settings,
    counters: Counters,
}

/// What a `GET` has found.
enum Got<V> {
    Hit(Option<V>),
    Miss,
    Failed,
}

impl fmt::Debug for Textbook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Textbook").finish_non_exhaustive()
    }
}

impl Textbook {
    /// Puts the pattern on a cache. Of the settings it uses the lifetimes and the longest value.
    #[must_use]
    pub fn new(settings: Settings, cache: Arc<dyn Cache>) -> Self {
        Self {
            sessions: cache.sessions(),
            cache,
            settings,
            counters: Counters::default(),
        }
    }

    /// Reads one value: `GET`; on a miss `load`, then `SET`. The value may be stale.
    ///
    /// # Errors
    ///
    /// The error of `load`. A cache that fails is never an error.
    pub async fn read<V, F, E, Fut>(
        &self,
        key: &Key<V, F>,
        load: impl FnOnce() -> Fut,
    ) -> Result<Read<V>, E>
    where
        F: Format<V>,
        Fut: Future<Output = Result<Option<V>, E>>,
    {
        let Some(session) = self.session() else {
            return self
                .bypass(Bypass::NotConnected, Duration::ZERO, load)
                .await;
        };
        let started = Instant::now();
        let got = self.get(&session, key).await;
        let cache_time = started.elapsed();
        match got {
            Got::Failed => self.bypass(Bypass::CacheError, cache_time, load).await,
            Got::Hit(value) => {
                self.counters.hits.add(1);
                let outcome = ReadOutcome::Hit;
                Ok(Read {
                    value,
                    outcome,
                    cache_time,
                })
            }
            Got::Miss => {
                let value = load().await?;
                self.counters.misses.add(1);
                let started = Instant::now();
                // Whatever has been written since the load looked at the store is overwritten here.
                let outcome = match self.set(&session, key, value.as_ref()).await {
                    true => ReadOutcome::Filled,
                    false => ReadOutcome::Unfilled,
                };
                let cache_time = cache_time + started.elapsed();
                Ok(Read {
                    value,
                    outcome,
                    cache_time,
                })
            }
        }
    }

    /// Reads one page of a collection, always from the store: nothing tells which pages a write changes.
    ///
    /// # Errors
    ///
    /// The error of `load`.
    pub async fn read_page<V, E, F>(&self, load: impl FnOnce() -> F) -> Result<Read<V>, E>
    where
        F: Future<Output = Result<V, E>>,
    {
        let load = || async { load().await.map(Some) };
        self.bypass(Bypass::Epoch, Duration::ZERO, load).await
    }

    /// Writes one value: runs `op`, which commits, then does `SET` of the value that it gives, or `DEL` if
    /// it gives none. Returns the output and the time spent in the cache. What fails in the cache fails
    /// silently, and so does everything after this future is dropped.
    ///
    /// # Errors
    ///
    /// The error of `op`.
    pub async fn write<T, V, F: Format<V>, E>(
        &self,
        key: &Key<V, F>,
        op: impl Future<Output = Result<(T, Option<V>), E>>,
    ) -> Result<(T, Duration), E> {
        let (output, value) = op.await?;
        let started = Instant::now();
        if let Some(session) = self.session() {
            // Between the commit and here anybody may read the old value, or set another one.
            let stored = match &value {
                Some(value) => self.set(&session, key, Some(value)).await,
                None => false,
            };
            if !stored {
                self.done(session.delete(key.name.as_str()).await);
            }
        }
        self.counters.writes.add(1);
        Ok((output, started.elapsed()))
    }

    async fn get<V, F: Format<V>>(&self, session: &Observed, key: &Key<V, F>) -> Got<V> {
        let decode = |bytes| entity::decode::<V, F>(key.traits, bytes);
        match session.get(key.name.as_str()).await {
            Ok(KeyState::Value(payload)) => match payload.map(decode).transpose() {
                Ok(value) => Got::Hit(value),
                Err(_) => {
                    self.counters.decode_errors.add(1);
                    Got::Miss
                }
            },
            Ok(_) => Got::Miss,
            Err(error) => {
                self.done(Err(error));
                Got::Failed
            }
        }
    }

    async fn set<V, F: Format<V>>(
        &self,
        session: &Observed,
        key: &Key<V, F>,
        value: Option<&V>,
    ) -> bool {
        if !value.is_none_or(F::may_be_cached) {
            self.counters.declined.add(1);
            return false;
        }
        let encoded = value.map(|value| entity::encode::<V, F>(key.traits, value));
        let Ok(payload) = encoded.transpose() else {
            self.counters.encode_errors.add(1);
            return false;
        };
        let ttl = key.traits.lifetime(&payload);
        self.store(session, key.name.as_str(), payload, ttl).await
    }

    /// Stores what is not too long. Returns whether the cache took it.
    async fn store(
        &self,
        session: &Observed,
        key: &str,
        payload: Payload,
        ttl: Option<Duration>,
    ) -> bool {
        let ttl = match &payload {
            Some(bytes) if bytes.len() > self.settings.max_value_bytes => {
                self.counters.oversized.add(1);
                return false;
            }
            Some(_) => ttl.unwrap_or(self.settings.ttl),
            None => ttl.unwrap_or(self.settings.negative_ttl),
        };
        self.done(session.set(key, payload, ttl).await)
    }

    /// Whether a command has succeeded; counts it when not.
    fn done(&self, result: Result<(), CacheError>) -> bool {
        if let Err(error) = &result {
            self.counters.cache_errors.add(1);
            tracing::debug!("a command of the textbook failed: {error}");
        }
        result.is_ok()
    }

    async fn bypass<V, E, F>(
        &self,
        reason: Bypass,
        cache_time: Duration,
        load: impl FnOnce() -> F,
    ) -> Result<Read<V>, E>
    where
        F: Future<Output = Result<Option<V>, E>>,
    {
        let value = load().await?;
        self.counters.bypasses[reason.index()].add(1);
        let outcome = ReadOutcome::Bypassed(reason);
        Ok(Read {
            value,
            outcome,
            cache_time,
        })
    }

    fn session(&self) -> Option<Observed> {
        let session = self.sessions.borrow().clone()?;
        Some(Observed::new(session, None))
    }

    /// What was counted. The members that only the protocol has stay zero.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.counters.snapshot(0, 0)
    }

    /// Counts the values of an entity in the cache; `None` when it cannot be asked.
    pub async fn cached_values<I: ?Sized, V, F>(&self, entity: &Entity<I, V, F>) -> Option<u64> {
        let session = self.sessions.borrow().clone()?;
        session.count(&format!("{}:*", entity.name())).await.ok()
    }

    /// Removes the values of an entity from the cache. Returns how many there were.
    ///
    /// # Errors
    ///
    /// [`CacheError`] when the cache cannot be reached.
    pub async fn clear(&self, cleared: &impl Cleared) -> Result<u64, CacheError> {
        let none = || CacheError::Connection("there is no cache now".into());
        let session = self.sessions.borrow().clone().ok_or_else(none)?;
        let mut removed = 0;
        for pattern in cleared.patterns() {
            removed += session.clear(&pattern).await?;
        }
        Ok(removed)
    }

    /// Lets go of the cache.
    pub fn close(&self) {
        self.cache.close();
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Mutex;

    use tokio::sync::oneshot;

    use super::*;
    use crate::cache::MemoryCache;

    const ROW: Entity<str, String> = Entity::new("row");

    /// A load reads the old value and is held up; a write commits and sets the new one; then the load
    /// ends, and its `SET` puts the old value over the new one.
    #[tokio::test]
    async fn a_slow_load_leaves_a_stale_value_behind() {
        let cache = Arc::new(MemoryCache::new(1 << 20));
        let textbook = Arc::new(Textbook::new(Settings::default(), cache));
        let table = Arc::new(Mutex::new("old"));
        let key = ROW.key("a");

        let (looked, has_looked) = oneshot::channel();
        let (go_on, may_go_on) = oneshot::channel();
        let slow = {
            let (textbook, table, key) = (textbook.clone(), table.clone(), key.clone());
            tokio::spawn(async move {
                let load = || async {
                    let value = table.lock().unwrap().to_owned();
                    looked.send(()).unwrap();
                    may_go_on.await.unwrap();
                    Ok::<_, Infallible>(Some(value))
                };
                textbook.read(&key, load).await.unwrap().outcome
            })
        };
        has_looked.await.unwrap();
        let write = async {
            *table.lock().unwrap() = "new";
            Ok::<_, Infallible>(((), Some("new".to_owned())))
        };
        textbook.write(&key, write).await.unwrap();
        go_on.send(()).unwrap();
        assert_eq!(slow.await.unwrap(), ReadOutcome::Filled);

        let load = async || -> Result<Option<String>, Infallible> { panic!("it is a hit") };
        let read = textbook.read(&key, load).await.unwrap();
        assert_eq!(read.outcome, ReadOutcome::Hit);
        assert_eq!(read.value, Some("old".to_owned()), "stale");
        assert_eq!(*table.lock().unwrap(), "new");
        let stats = textbook.stats();
        assert_eq!((stats.hits, stats.misses, stats.writes), (1, 1, 1));
    }
}
