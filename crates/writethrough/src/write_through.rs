//! The engine's public face.

use std::fmt;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use writethrough_protocol::Mode;

use crate::cache::Cache;
use crate::clock;
use crate::engine::{Counted, Engine};
use crate::entity::{Cleared, CollectionKey, Entity, Key};
use crate::error::{CacheError, FenceError, ReadError, StartError};
use crate::fence::Fence;
use crate::format::Format;
use crate::key::Frame;
use crate::read::{Place, Read};
use crate::runtime::within;
use crate::settings::Settings;
use crate::stats::{Phase, ProposedBypass, SlowLoads, Stats, Status};
use crate::supervisor;

/// A write-through cache in front of a store: reads through the cache, writes to both, every read
/// linearizable. Cheap to clone; all clones are one engine. One engine serves any number of
/// entities and collections.
///
/// Dropping the last clone stops the engine as [`WriteThrough::shutdown`] does, in the background.
#[derive(Clone)]
pub struct WriteThrough {
    pub(crate) engine: Arc<Engine>,
    /// Goes with the last clone. Tasks of the engine hold the engine, not this.
    _last: Arc<Last>,
}

/// Stops the engine when it is dropped.
struct Last(Arc<Engine>);

impl Drop for Last {
    fn drop(&mut self) {
        let engine = self.0.clone();
        if *engine.stopping.borrow() {
            return;
        }
        engine.stopping.send_replace(true);
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(async move { engine.stop().await })),
            // Without a runtime there are no writes under way.
            Err(_) => engine.let_go(),
        }
    }
}

impl fmt::Debug for WriteThrough {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Status { phase, epoch, .. } = self.status();
        f.debug_struct("WriteThrough")
            .field("phase", &phase)
            .field("epoch", &epoch)
            .finish_non_exhaustive()
    }
}

impl WriteThrough {
    /// Starts the engine of a [`crate::Builder`]; the keys begin with `prefix`.
    pub(crate) fn start(
        settings: Settings,
        prefix: String,
        cache: Arc<dyn Cache>,
        fence: Arc<dyn Fence>,
    ) -> Result<Self, StartError> {
        let engine = Arc::new(Engine::new(settings, prefix, cache, fence)?);
        supervisor::start(&engine);
        let _last = Arc::new(Last(engine.clone()));
        Ok(Self { engine, _last })
    }

    /// Reads one value: from the cache when it may be believed, else by `load`, which must read
    /// the store's primary and is called at most once. Of the reads of one key in this process that
    /// find nothing one loads and the others share what it got; for how long a load may take, see
    /// [`crate::Settings::load_timeout`].
    ///
    /// # Errors
    ///
    /// [`ReadError::Load`] is the error of `load`. The others say that the store is too slow or asked
    /// too much. A cache that is down, slow or wrong is never an error.
    ///
    /// # Cancellation
    ///
    /// Dropped at any point it leaves nothing stale: a fill lease it holds is broken (or lapses,
    /// when the process dies), and readers that share its load look again.
    ///
    /// # Runtime
    ///
    /// Any executor may poll it. A hit needs an engine whose runtime is driven all the time, see
    /// [`crate`].
    ///
    /// # Consistency
    ///
    /// Linearizable, as [`crate`] describes.
    pub async fn read<V, F, E, L, Fut>(
        &self,
        key: &Key<V, F>,
        load: L,
    ) -> Result<Read<V>, ReadError<E>>
    where
        F: Format<V>,
        L: FnOnce() -> Fut + Send,
        Fut: Future<Output = Result<Option<V>, E>> + Send,
    {
        let place = Place::Value(&key.name);
        let read = pin!(self.engine.read::<V, F, _, _, _>(place, key.traits, load));
        within(&self.engine.runtime, read).await
    }

    /// Reads one page of a collection; `query` names the page among the collection's pages. As
    /// [`WriteThrough::read`] in every other respect.
    ///
    /// # Errors
    ///
    /// As for [`WriteThrough::read`].
    ///
    /// # Cancellation
    ///
    /// As for [`WriteThrough::read`].
    pub async fn read_page<V, F, E, L, Fut>(
        &self,
        collection: &CollectionKey<V, F>,
        query: &str,
        load: L,
    ) -> Result<Read<V>, ReadError<E>>
    where
        F: Format<V>,
        L: FnOnce() -> Fut + Send,
        Fut: Future<Output = Result<V, E>> + Send,
    {
        let load = || async { load().await.map(Some) };
        let (place, traits) = (Place::Page(&collection.name, query), collection.traits);
        let read = pin!(self.engine.read::<V, F, _, _, _>(place, traits, load));
        within(&self.engine.runtime, read).await
    }

    /// What the engine has counted.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let loads = &self.engine.loads;
        let (waiting, under_way) = (loads.waiting(), loads.under_way());
        self.engine.counters.snapshot(waiting, under_way)
    }

    /// The engine's state now.
    #[must_use]
    pub fn status(&self) -> Status {
        let engine = &self.engine;
        let now = clock::now();
        let view = engine.view();
        let row = view.node.row();
        let phase = match row {
            None => Phase::Unknown,
            Some(_) if !view.node.is_active(now) => Phase::Observing,
            Some(row) if row.mode == Mode::Bypass => Phase::Bypass,
            Some(_) => Phase::Cached,
        };
        let lease_age = view
            .node
            .lease_until()
            .filter(|until| now < *until)
            .map(|until| {
                engine
                    .settings
                    .timing
                    .lease
                    .saturating_sub(until.since(now))
            });
        Status {
            phase,
            epoch: row.map(|row| row.number),
            history: row.map(|row| row.history.to_string()),
            server: view
                .session
                .as_ref()
                .map(|session| session.server().clone()),
            connected: view.session.is_some(),
            ended: engine.ended.get().copied(),
            fence_error: reason(&engine.fence_error),
            refused_change: reason(&engine.refused_change),
            lease_age,
            astray: view.node.astray(),
            proposed_bypass: engine
                .proposed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .as_ref()
                .map(|proposed| ProposedBypass {
                    epoch: proposed.epoch,
                    reason: proposed.reason.clone(),
                    ago: proposed.at.elapsed(),
                }),
            slow_loads: engine
                .loads
                .slow()
                .map(|(took, ago)| SlowLoads { took, ago }),
        }
    }

    /// Whether the cache is in use on this node now.
    #[must_use]
    pub fn uses_cache(&self) -> bool {
        supervisor::uses_cache(&self.engine)
    }

    /// Counts how many values of the entity the cache holds in the current epoch; the answer may be a
    /// second old, but is never older than a write that this engine has acknowledged. `None` when the
    /// cache cannot be asked.
    ///
    /// # Cancellation
    ///
    /// Harmless. The cache server is asked in small steps and never blocked.
    pub async fn cached_values<I: ?Sized, V, F>(&self, entity: &Entity<I, V, F>) -> Option<u64> {
        let entity = entity.name();
        let (session, frame) = {
            let view = self.engine.view();
            view.node.row()?;
            (view.session.clone(), view.frame.clone())
        };
        let Frame { prefix, suffix } = &*frame;
        let pattern = format!("{prefix}{entity}:*{suffix}");
        let session = session?;
        let counters = &self.engine.counters;
        let ended = || counters.writes.get() + counters.indeterminate_writes.get();
        let asked = Instant::now();
        // Held while counting, so that many askers cost two walks at most.
        let mut counted = self.engine.counted.lock().await;
        if let Some(last) = counted.as_ref()
            && last.pattern == pattern
            && (last.at >= asked
                || (last.at.elapsed() < Duration::from_secs(1) && last.after_writes == ended()))
        {
            return Some(last.count);
        }
        let (at, after_writes) = (Instant::now(), ended());
        let count = session.count(&pattern);
        let count = within(&self.engine.runtime, pin!(count)).await;
        match count {
            Ok(count) => {
                *counted = Some(Counted {
                    pattern,
                    count,
                    at,
                    after_writes,
                });
                Some(count)
            }
            Err(error) => {
                self.engine
                    .cache_failed("counting the cached values", &error);
                None
            }
        }
    }

    /// Empties the cache of an entity, of a collection, or of one list of it, without a new epoch:
    /// removes values, pages and fill leases of all epochs of this database in small steps, and leaves
    /// intents alone, and keys of others. Nobody waits for it. Returns how many keys were removed.
    ///
    /// # Errors
    ///
    /// [`CacheError`] when the cache cannot be reached; what was removed until then stays removed.
    ///
    /// # Consistency
    ///
    /// Removing a value is always safe. A fill under way is refused, so a value read after the
    /// clearing was loaded after it began.
    pub async fn clear(&self, cleared: &impl Cleared) -> Result<u64, CacheError> {
        let (session, history, frame) = {
            let view = self.engine.view();
            let history = view.node.row().map(|row| row.history.clone());
            (view.session.clone(), history, view.frame.clone())
        };
        let none = || CacheError::Connection("there is no cache now".into());
        let session = session.ok_or_else(none)?;
        let epochs = format!("@{}.*", history.ok_or_else(none)?);
        let mut removed = 0;
        for names in cleared.patterns() {
            let pattern = format!("{}{names}{epochs}", frame.prefix);
            let clear = session.clear(&pattern);
            removed += within(&self.engine.runtime, pin!(clear)).await?;
        }
        *self.engine.counted.lock().await = None;
        Ok(removed)
    }

    /// Stops the engine: refuses new writes, waits for those under way (for `write_deadline` at
    /// most), drops the read lease and the cache connection. Reads go on from the store. Await it
    /// before the runtime ends, which would end writes half-way.
    pub async fn shutdown(&self) {
        self.engine.stop().await;
    }
}

fn reason(error: &Mutex<Option<FenceError>>) -> Option<String> {
    let error = error.lock().unwrap_or_else(PoisonError::into_inner);
    error.as_ref().map(ToString::to_string)
}
