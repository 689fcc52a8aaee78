//! How items are kept together with the cache: by the protocol, by the pattern of the textbook, or in the
//! store alone. The last two are there to be compared with; they have no epoch, so their writes have no
//! guard.

use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{RwLock, Semaphore};
use tokio::time::{Instant, timeout};
use tracing::Instrument;
use writethrough::cache::SessionWatch;
use writethrough::format::Format;
use writethrough::writing::Guarded;
use writethrough::writing::set::{Changes, Slot};
use writethrough::{
    Bypass, Cache, CacheError, Cleared, CollectionKey, Entity, Fence, Guard, Indeterminate, Key,
    OpError, Read, ReadError, ReadOutcome, Settings, SlowLoads, StartError, Stats, Status,
    Textbook, Unavailable, WriteError, WriteThrough,
};

/// How long after a slow load the store still counts as slow.
const SLOW_FOR: Duration = Duration::from_secs(10);

/// How the cache and the store are kept together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Consistency {
    /// The protocol: every read is linearizable.
    #[default]
    Strict,
    /// The pattern of the textbook ([`Textbook`]). **Not** linearizable.
    Textbook,
    /// The cache is never touched.
    Off,
}

impl Consistency {
    /// Gives the name used in flags, headers and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Textbook => "textbook",
            Self::Off => "off",
        }
    }
}

/// The text is not the name of a [`Consistency`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("use `strict`, `textbook` or `off`")]
pub struct UnknownConsistency;

impl FromStr for Consistency {
    type Err = UnknownConsistency;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Strict, Self::Textbook, Self::Off]
            .into_iter()
            .find(|consistency| consistency.as_str() == text)
            .ok_or(UnknownConsistency)
    }
}

/// How the engine is now.
#[derive(Debug, Clone)]
pub struct State {
    /// How the cache and the store are kept together.
    pub consistency: Consistency,
    /// The state of the protocol. In the other modes it tells of the connection and of slow loads only.
    pub status: Status,
}

impl State {
    /// Gives the name of what the node does with the cache.
    #[must_use]
    pub fn mode(&self) -> &'static str {
        match self.consistency {
            Consistency::Strict => self.status.phase.as_str(),
            other => other.as_str(),
        }
    }
}

/// Reads and writes in one of the three ways. Cheap to clone.
#[derive(Clone)]
pub enum Engine {
    /// By the protocol.
    Strict(WriteThrough),
    /// By the pattern of the textbook.
    Textbook(Arc<Textbook>, Arc<Direct>),
    /// In the store alone.
    Off(Arc<Direct>),
}

impl Engine {
    /// Starts the engine. Must be called inside of a tokio runtime.
    ///
    /// # Errors
    ///
    /// As for [`writethrough::Builder::start`].
    pub fn start(
        consistency: Consistency,
        settings: Settings,
        cache: Arc<dyn Cache>,
        fence: Arc<dyn Fence>,
    ) -> Result<Self, StartError> {
        let direct = |settings| Arc::new(Direct::new(settings, cache.sessions()));
        Ok(match consistency {
            Consistency::Strict => Self::Strict(
                WriteThrough::builder(cache, fence)
                    .settings(settings)
                    .start()?,
            ),
            Consistency::Textbook => {
                let direct = direct(settings.clone());
                Self::Textbook(Arc::new(Textbook::new(settings, cache)), direct)
            }
            Consistency::Off => Self::Off(direct(settings)),
        })
    }

    /// Reads one value; `load` asks the store.
    ///
    /// # Errors
    ///
    /// As for [`WriteThrough::read`].
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
        match self {
            Self::Strict(engine) => engine.read(key, load).await,
            Self::Textbook(textbook, direct) => textbook.read(key, || direct.load(load)).await,
            Self::Off(direct) => direct.read(load).await,
        }
    }

    /// Reads one page of a collection; only the protocol caches pages.
    ///
    /// # Errors
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
        match self {
            Self::Strict(engine) => engine.read_page(collection, query, load).await,
            Self::Textbook(textbook, direct) => textbook.read_page(|| direct.load(load)).await,
            Self::Off(direct) => direct.read(|| async { load().await.map(Some) }).await,
        }
    }

    /// Writes one value, and whatever `lists` names, on a task of its own: dropping this future gives up
    /// the answer, not the write. The operation has no guard where there is no epoch. It gives its output
    /// and the value to cache. Returns the output and the time spent in the cache.
    ///
    /// # Errors
    ///
    /// As for [`WriteThrough::write`].
    pub async fn write<V, F, C, T, E, Op, Fut>(
        &self,
        key: Key<V, F>,
        lists: C,
        mut op: Op,
    ) -> Result<(T, Duration), WriteError<E>>
    where
        V: Send + Sync + 'static,
        F: Format<V>,
        C: Changes,
        Op: FnMut(Option<Guard>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<(T, Option<V>), OpError<E>>> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        match self {
            Self::Strict(engine) => {
                let op = move |mut guarded: Guarded, (slot, _): (Slot<V, F>, C::Slots), ()| {
                    let work = op(Some(guarded.guard()));
                    async move {
                        let (output, value) = work.await?;
                        if let Some(value) = &value {
                            guarded.cache(&slot, value);
                        }
                        Ok(guarded.commit(output))
                    }
                };
                let written = engine.write((key, lists)).guarded(op).await?;
                Ok((written.output, written.cache_time))
            }
            Self::Textbook(textbook, direct) => {
                let (textbook, work) = (textbook.clone(), direct.clone());
                let write = async move { textbook.write(&key, work.run(op(None))).await };
                direct.write(write).await
            }
            Self::Off(direct) => {
                let work = direct.clone();
                let write = async move {
                    let (output, _) = work.run(op(None)).await?;
                    Ok((output, Duration::ZERO))
                };
                direct.write(write).await
            }
        }
    }

    /// Empties the cache of an entity or of a collection. Returns how many keys were removed.
    ///
    /// # Errors
    ///
    /// [`CacheError`] when the cache cannot be reached.
    pub async fn clear(&self, cleared: &(impl Cleared + Sync)) -> Result<u64, CacheError> {
        match self {
            Self::Strict(engine) => engine.clear(cleared).await,
            Self::Textbook(textbook, _) => textbook.clear(cleared).await,
            Self::Off(_) => Ok(0),
        }
    }

    /// Counts the values of an entity that reads may use; `None` when the cache cannot be asked.
    pub async fn cached_values<I: ?Sized, V, F>(&self, entity: &Entity<I, V, F>) -> Option<u64> {
        match self {
            Self::Strict(engine) => engine.cached_values(entity).await,
            Self::Textbook(textbook, _) => textbook.cached_values(entity).await,
            Self::Off(_) => None,
        }
    }

    /// What was counted.
    #[must_use]
    pub fn stats(&self) -> Stats {
        match self {
            Self::Strict(engine) => engine.stats(),
            Self::Textbook(textbook, direct) => direct.counted_in(textbook.stats()),
            Self::Off(direct) => direct.counted_in(Stats::default()),
        }
    }

    /// How it is now.
    #[must_use]
    pub fn state(&self) -> State {
        let (consistency, status) = match self {
            Self::Strict(engine) => (Consistency::Strict, engine.status()),
            Self::Textbook(_, direct) => (Consistency::Textbook, direct.status()),
            Self::Off(direct) => (Consistency::Off, direct.status()),
        };
        State {
            consistency,
            status,
        }
    }

    /// Lets writes under way finish, then lets go of the cache. Bounded.
    pub async fn shutdown(&self) {
        match self {
            Self::Strict(engine) => engine.shutdown().await,
            Self::Textbook(textbook, direct) => {
                direct.finish().await;
                textbook.close();
            }
            Self::Off(direct) => direct.finish().await,
        }
    }
}

/// The way to the store without the protocol, within the same bounds.
pub struct Direct {
    settings: Settings,
    sessions: SessionWatch,
    loads: Semaphore,
    /// Shared by the writes under way.
    writes: Arc<RwLock<()>>,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    bypasses: u64,
    loads: u64,
    slow_loads: u64,
    refused_reads: u64,
    writes: u64,
    indeterminate_writes: u64,
    abandoned_writes: u64,
    /// How long the last slow load took, and when it ended.
    slow: Option<(Duration, Instant)>,
}

impl Direct {
    fn new(settings: Settings, sessions: SessionWatch) -> Self {
        Self {
            loads: Semaphore::new(settings.max_loads),
            settings,
            sessions,
            writes: Arc::default(),
            counts: Mutex::default(),
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `load`, if as many loads as are allowed are not yet under way, within its bound.
    async fn load<T, E, F>(&self, load: impl FnOnce() -> F) -> Result<T, ReadError<E>>
    where
        F: Future<Output = Result<T, E>>,
    {
        let Ok(_one) = self.loads.try_acquire() else {
            self.counts().refused_reads += 1;
            return Err(ReadError::Overloaded);
        };
        self.counts().loads += 1;
        let started = Instant::now();
        let loaded = timeout(self.settings.load_timeout, load()).await;
        let took = started.elapsed();
        if took >= self.settings.fill_wait {
            let mut counts = self.counts();
            counts.slow_loads += 1;
            counts.slow = Some((took, Instant::now()));
        }
        match loaded {
            Ok(loaded) => loaded.map_err(ReadError::Load),
            Err(_) => {
                self.counts().refused_reads += 1;
                Err(ReadError::TimedOut)
            }
        }
    }

    async fn read<V, E, F>(&self, load: impl FnOnce() -> F) -> Result<Read<V>, ReadError<E>>
    where
        F: Future<Output = Result<Option<V>, E>>,
    {
        let value = self.load(load).await?;
        self.counts().bypasses += 1;
        Ok(Read {
            value,
            outcome: ReadOutcome::Bypassed(Bypass::Epoch),
            cache_time: Duration::ZERO,
        })
    }

    /// Runs an operation within its bound and sorts its outcome.
    async fn run<T, E>(
        &self,
        op: impl Future<Output = Result<T, OpError<E>>>,
    ) -> Result<T, WriteError<E>> {
        let ran = timeout(self.settings.write_timeout, op).await;
        ran.unwrap_or(Err(OpError::TimedOut))
            .map_err(|error| match error {
                OpError::Rejected(error) => WriteError::Rejected(error),
                OpError::Unavailable(why) => WriteError::Unavailable(why),
                OpError::Unknown(error) => WriteError::Indeterminate(Indeterminate::Store(error)),
                // Without a guard nothing is fenced.
                _ => WriteError::Indeterminate(Indeterminate::TimedOut),
            })
    }

    /// Runs a write on a task of its own, and counts it.
    async fn write<T, E>(
        self: &Arc<Self>,
        write: impl Future<Output = Result<T, WriteError<E>>> + Send + 'static,
    ) -> Result<T, WriteError<E>>
    where
        T: Send + 'static,
        E: Send + 'static,
    {
        let Ok(under_way) = self.writes.clone().try_read_owned() else {
            return Err(WriteError::Unavailable(Unavailable::ShuttingDown));
        };
        let task = async move {
            let _under_way = under_way;
            write.await
        };
        let result = tokio::spawn(task.in_current_span()).await;
        let mut counts = self.counts();
        match result {
            Ok(result) => {
                match &result {
                    Ok(_) => counts.writes += 1,
                    Err(WriteError::Indeterminate(_)) => counts.indeterminate_writes += 1,
                    Err(_) => {}
                }
                result
            }
            // It has panicked, or the runtime is shutting down.
            Err(_) => {
                counts.abandoned_writes += 1;
                Err(WriteError::Indeterminate(Indeterminate::Abandoned))
            }
        }
    }

    /// Adds what was counted here.
    fn counted_in(&self, mut stats: Stats) -> Stats {
        let under_way = self.settings.max_loads - self.loads.available_permits();
        let counts = self.counts();
        stats.bypasses[Bypass::Epoch.index()].1 += counts.bypasses;
        stats.loads = counts.loads;
        stats.loads_under_way = under_way as u64;
        stats.slow_loads = counts.slow_loads;
        stats.refused_reads = counts.refused_reads;
        stats.writes = counts.writes;
        stats.indeterminate_writes = counts.indeterminate_writes;
        stats.abandoned_writes = counts.abandoned_writes;
        stats
    }

    fn status(&self) -> Status {
        let slow = self.counts().slow;
        let slow = slow.map(|(took, ended)| SlowLoads {
            took,
            ago: ended.elapsed(),
        });
        let mut status = Status::default();
        status.connected = self.sessions.borrow().is_some();
        status.slow_loads = slow.filter(|slow| slow.ago < SLOW_FOR);
        status
    }

    /// Refuses new writes and waits for those under way, for as long as a write may take.
    async fn finish(&self) {
        if timeout(self.settings.write_deadline, self.writes.write())
            .await
            .is_err()
        {
            tracing::warn!("writes were still under way when the engine stopped");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tokio::sync::oneshot;
    use writethrough::Collection;
    use writethrough::{LocalFence, MemoryCache};

    use super::*;

    const ROW: Entity<str, i64> = Entity::new("row");
    const ROWS: Collection<(), i64> = Collection::new("rows");

    fn engine(consistency: Consistency, settings: Settings) -> Engine {
        let cache = Arc::new(MemoryCache::new(1 << 20));
        Engine::start(consistency, settings, cache, Arc::new(LocalFence::new())).unwrap()
    }

    async fn write(engine: &Engine, outcome: Result<i64, OpError<&'static str>>) -> Option<i64> {
        let mut outcome = Some(outcome);
        let op = move |guard: Option<Guard>| {
            assert!(guard.is_none());
            let outcome = outcome.take().unwrap();
            async move { outcome.map(|value| (value, Some(value))) }
        };
        let written = engine.write(ROW.key("a"), (), op).await;
        written.ok().map(|(output, _)| output)
    }

    #[tokio::test]
    async fn without_the_protocol_reads_and_writes_are_bounded_and_counted() {
        for consistency in [Consistency::Textbook, Consistency::Off] {
            let settings = Settings {
                max_loads: 1,
                ..Settings::default()
            };
            let engine = engine(consistency, settings);
            assert_eq!(engine.state().mode(), consistency.as_str());
            assert_eq!(write(&engine, Ok(5)).await, Some(5));
            assert_eq!(write(&engine, Err(OpError::Rejected("no"))).await, None);
            assert_eq!(write(&engine, Err(OpError::Unknown("gone"))).await, None);
            let key = ROW.key("a");
            let load = || async { Ok::<_, Infallible>(Some(6)) };
            let read = engine.read(&key, load).await.unwrap();
            let (found, outcome) = match consistency {
                Consistency::Textbook => (5, ReadOutcome::Hit),
                _ => (6, ReadOutcome::Bypassed(Bypass::Epoch)),
            };
            assert_eq!((read.value, read.outcome), (Some(found), outcome));

            // A load within a load finds the only place taken.
            let rows = ROWS.all();
            let load = || async {
                let second = engine.read_page(&rows, "", async || Ok::<_, Infallible>(2));
                assert!(matches!(second.await, Err(ReadError::Overloaded)));
                Ok::<_, Infallible>(1)
            };
            let page = engine.read_page(&rows, "", load).await.unwrap();
            assert_eq!(page.value, Some(1));
            let stats = engine.stats();
            assert_eq!((stats.writes, stats.indeterminate_writes), (1, 1));
            assert_eq!((stats.refused_reads, stats.loads_under_way), (1, 0));
            let (hits, bypassed) = (stats.hits, stats.bypassed());
            assert_eq!(hits + bypassed, 2, "{consistency:?}: {stats:?}");

            engine.shutdown().await;
        }
    }

    #[tokio::test]
    async fn a_shutdown_waits_for_the_writes_under_way() {
        let engine = engine(Consistency::Off, Settings::default());
        let (go_on, may_go_on) = oneshot::channel::<()>();
        let (begun, has_begun) = oneshot::channel::<()>();
        let mut parts = Some((begun, may_go_on));
        let op = move |_| {
            let (begun, may_go_on) = parts.take().unwrap();
            async move {
                begun.send(()).unwrap();
                may_go_on.await.unwrap();
                Ok::<_, OpError<Infallible>>(((), None))
            }
        };
        let writing = tokio::spawn({
            let engine = engine.clone();
            async move { engine.write(ROW.key("b"), (), op).await }
        });
        has_begun.await.unwrap();
        let mut stopping = std::pin::pin!(engine.shutdown());
        assert!(futures::poll!(stopping.as_mut()).is_pending());
        assert_eq!(write(&engine, Ok(1)).await, None, "new ones are refused");
        go_on.send(()).unwrap();
        writing.await.unwrap().unwrap();
        stopping.await;
        assert_eq!(engine.stats().writes, 1);
    }
}
