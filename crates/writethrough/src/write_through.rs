//! The engine's public face and the state that its parts share.

use std::pin::pin;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use uuid::Uuid;
use writethrough_protocol::{Epoch, Mode, Node, Token};

use crate::cache::{Cache, Session};
use crate::clock;
use crate::error::{CacheError, FenceError, StartError};
use crate::fence::Fence;
use crate::key::Collection;
use crate::lateness::Lateness;
use crate::loads::Loads;
use crate::runtime;
use crate::settings::{Consistency, Settings};
use crate::stats::{Counters, ProposedBypass, SlowLoads, Stats, Status};
use crate::supervisor;
use crate::turns::Turns;

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

pub(crate) struct Engine {
    pub(crate) settings: Settings,
    /// Where the engine's own tasks run.
    pub(crate) runtime: Handle,
    pub(crate) cache: Arc<dyn Cache>,
    pub(crate) fence: Arc<dyn Fence>,
    view: Mutex<View>,
    /// Counts changes of the view, for those who wait for one.
    pub(crate) changed: watch::Sender<u64>,
    /// Asks the supervisor to poll now.
    pub(crate) poll_now: Notify,
    /// One proposal at a time from this node.
    pub(crate) proposing: tokio::sync::Mutex<()>,
    pub(crate) loads: Arc<Loads>,
    pub(crate) turns: Arc<Turns>,
    pub(crate) lateness: Arc<Lateness>,
    /// The last epoch that this node has proposed to end, and why.
    pub(crate) proposed: Mutex<Option<Proposed>>,
    pub(crate) counters: Counters,
    /// Why the epoch row cannot be used; `None` when it can.
    fence_error: Mutex<Option<FenceError>>,
    /// Why the fence refuses every change of the epoch; `None` when it does not.
    pub(crate) refused_change: Mutex<Option<FenceError>>,
    /// Epochs seen with an in-process cache of another node.
    pub(crate) met: AtomicUsize,
    /// The background task that has ended before the engine was stopped.
    pub(crate) ended: OnceLock<&'static str>,
    /// Writes under way; shutdown waits for them.
    pub(crate) writes: watch::Sender<usize>,
    pub(crate) stopping: watch::Sender<bool>,
    counted: tokio::sync::Mutex<Option<Counted>>,
}

/// The node's state and the session it was told of, changed together: a permit and the session it
/// is used with always belong to each other.
pub(crate) struct View {
    pub(crate) node: Node,
    /// What the keys of the node's epoch end in.
    pub(crate) suffix: Arc<str>,
    pub(crate) session: Option<Arc<dyn Session>>,
}

fn reason(error: &Mutex<Option<FenceError>>) -> Option<String> {
    let error = error.lock().unwrap_or_else(PoisonError::into_inner);
    error.as_ref().map(ToString::to_string)
}

/// How many values a pattern matched.
struct Counted {
    pattern: String,
    count: u64,
    /// When the counting began.
    at: Instant,
    /// Writes of this node that had ended by then.
    after_writes: u64,
}

/// A bypass that this node has proposed.
pub(crate) struct Proposed {
    pub(crate) epoch: Epoch,
    pub(crate) reason: String,
    pub(crate) at: Instant,
}

impl Engine {
    pub(crate) fn view(&self) -> MutexGuard<'_, View> {
        // Nothing panics between two changes of the view, so a poisoned one is still whole.
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the view and wakes those who wait for a change.
    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut View) -> R) -> R {
        let answer = change(&mut self.view());
        self.changed.send_modify(|count| *count += 1);
        answer
    }

    pub(crate) fn fence_error(&self) -> MutexGuard<'_, Option<FenceError>> {
        self.fence_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the fence cannot be used until somebody mends it.
    pub(crate) fn fence_broken(&self) -> Option<String> {
        match &*self.fence_error() {
            Some(FenceError::Broken(reason)) => Some(reason.clone()),
            _ => None,
        }
    }

    pub(crate) fn holds_lease(&self, epoch: Epoch) -> bool {
        self.view().node.holds_lease(epoch, clock::now())
    }

    /// The lifetime of an entry: the TTL less up to a tenth of it.
    pub(crate) fn jittered(&self, ttl: Duration) -> Duration {
        ttl.mul_f64(1.0 - 0.1 * fastrand::f64())
    }

    pub(crate) fn value_ttl(&self, payload: &Option<Bytes>) -> Duration {
        self.jittered(match payload {
            Some(_) => self.settings.ttl,
            None => self.settings.negative_ttl,
        })
    }

    /// Whether a value or a page of this length may be cached; counts those that may not.
    pub(crate) fn fits(&self, name: &str, bytes: usize, most: usize) -> bool {
        if bytes <= most {
            return true;
        }
        if self.counters.oversized.get() == 0 {
            tracing::warn!(
                name,
                "{bytes} bytes are more than the {most} that are cached: they are served from the store \
                 each time; further ones are counted as `oversized`"
            );
        }
        self.counters.oversized.add(1);
        false
    }

    pub(crate) fn cache_failed(&self, what: &str, error: &CacheError) {
        self.counters.cache_errors.add(1);
        tracing::debug!("{what} failed: {error}");
    }
}

impl Engine {
    /// Refuses new writes, waits for those under way, lets go of the cache.
    async fn stop(&self) {
        self.stopping.send_replace(true);
        let mut writes = self.writes.subscribe();
        let done = pin!(async {
            let done = writes.wait_for(|under_way| *under_way == 0);
            timeout(self.settings.write_deadline, done).await.is_ok()
        });
        if !runtime::within(&self.runtime, done).await {
            tracing::warn!("writes were still under way when the engine stopped");
        }
        self.let_go();
    }

    fn let_go(&self) {
        self.cache.close();
        self.change(|view| {
            view.session = None;
            view.node = Node::new(self.settings.timing);
        });
    }
}

/// A new random token.
pub(crate) fn new_token() -> Token {
    Token(Uuid::new_v4().as_u128())
}

impl WriteThrough {
    /// Starts the engine: from here on it keeps its view of the epoch current. Returns at once,
    /// whether or not the cache or the fence can be reached; until both are, reads go to the store
    /// and writes wait for the fence. Must be called inside of a tokio runtime, in which the engine
    /// then lives: what that runtime must be is said in [`crate`].
    ///
    /// # Errors
    ///
    /// [`StartError`] when the settings contradict what the protocol's safety rests on, or there is
    /// no runtime.
    pub fn start(
        settings: Settings,
        cache: Arc<dyn Cache>,
        fence: Arc<dyn Fence>,
    ) -> Result<Self, StartError> {
        settings.validate()?;
        let runtime = runtime::current()?;
        let engine = Arc::new(Engine {
            view: Mutex::new(View {
                node: Node::new(settings.timing),
                suffix: "".into(),
                session: None,
            }),
            loads: Arc::new(Loads::new(settings.max_loads)),
            turns: Arc::default(),
            lateness: Lateness::watch(),
            proposed: Mutex::default(),
            settings,
            runtime,
            cache,
            fence,
            changed: watch::Sender::new(0),
            poll_now: Notify::new(),
            proposing: tokio::sync::Mutex::new(()),
            counters: Counters::default(),
            fence_error: Mutex::new(Some(FenceError::Away("it has not been read yet".into()))),
            refused_change: Mutex::new(None),
            met: AtomicUsize::new(0),
            ended: OnceLock::new(),
            writes: watch::Sender::new(0),
            stopping: watch::Sender::new(false),
            counted: tokio::sync::Mutex::new(None),
        });
        supervisor::start(&engine);
        let _last = Arc::new(Last(engine.clone()));
        Ok(Self { engine, _last })
    }

    /// What the engine has counted.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.engine.counters.snapshot(&self.engine.loads)
    }

    /// The engine's state now.
    #[must_use]
    pub fn status(&self) -> Status {
        let engine = &self.engine;
        let now = clock::now();
        let view = engine.view();
        let strict = engine.settings.consistency == Consistency::Strict;
        let row = view.node.row();
        let mode = match (engine.settings.consistency, row) {
            (Consistency::Textbook, _) => "textbook",
            (Consistency::Off, _) => "off",
            (Consistency::Strict, None) => "unknown",
            (Consistency::Strict, Some(_)) if !view.node.is_active(now) => "observing",
            (Consistency::Strict, Some(row)) if row.mode == Mode::Bypass => "bypass",
            (Consistency::Strict, Some(_)) => "cached",
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
            consistency: engine.settings.consistency,
            mode,
            epoch: row.map(|row| row.number.0),
            history: row.map(|row| row.history.to_string()),
            server: view
                .session
                .as_ref()
                .map(|session| session.server().to_string()),
            connected: view.session.is_some(),
            ended: engine.ended.get().copied(),
            fence_error: reason(&engine.fence_error).filter(|_| strict),
            refused_change: reason(&engine.refused_change),
            lease_age,
            astray: view.node.astray(),
            proposed_bypass: engine
                .proposed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .as_ref()
                .map(|proposed| ProposedBypass {
                    epoch: proposed.epoch.0,
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

    /// How many values of the entity the cache holds in the current epoch; the answer may be a
    /// second old, but is never older than a write that this engine has acknowledged. `None` when the
    /// cache cannot be asked.
    ///
    /// # Cancellation
    ///
    /// Harmless. The cache server is asked in small steps and never blocked.
    pub async fn cached_values(&self, entity: &str) -> Option<u64> {
        let (session, suffix) = {
            let view = self.engine.view();
            let suffix = view.node.row().map(|_| view.suffix.clone());
            (view.session.clone(), suffix)
        };
        let pattern = match (self.engine.settings.consistency, suffix) {
            (Consistency::Strict, Some(suffix)) => format!("{entity}:*{suffix}"),
            (Consistency::Textbook, _) => format!("{entity}:*"),
            _ => return None,
        };
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
        let count = runtime::within(&self.engine.runtime, pin!(count)).await;
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

    /// Empties the cache of an entity and of a collection without a new epoch: removes values,
    /// pages and fill leases of all epochs of this database in small steps, and leaves intents alone,
    /// and keys of others. Nobody waits for it. Returns how many keys were removed.
    ///
    /// # Errors
    ///
    /// [`CacheError`] when the cache cannot be reached; what was removed until then stays removed.
    ///
    /// # Consistency
    ///
    /// Removing a value is always safe. A fill under way is refused, so a value read after the
    /// clearing was loaded after it began.
    pub async fn clear(
        &self,
        entity: &str,
        collection: Option<&Collection>,
    ) -> Result<u64, CacheError> {
        let (session, history) = {
            let view = self.engine.view();
            let history = view.node.row().map(|row| row.history.clone());
            (view.session.clone(), history)
        };
        let none = || CacheError::Connection("there is no cache now".into());
        let session = session.ok_or_else(none)?;
        let epochs = match self.engine.settings.consistency {
            Consistency::Strict => format!("@{}.*", history.ok_or_else(none)?),
            Consistency::Textbook => String::new(),
            Consistency::Off => return Ok(0),
        };
        let clear = async |pattern: String| {
            runtime::within(&self.engine.runtime, pin!(session.clear(&pattern))).await
        };
        let mut removed = clear(format!("{entity}:*{epochs}")).await?;
        if let Some(collection) = collection {
            removed += clear(format!("{{{collection}}}{epochs}")).await?;
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
