//! The state of one node: its view of the epoch, its components, its counters. The paths of a read and
//! of a write, the supervisor and the public face all work on it; it knows none of them.

use std::pin::pin;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use uuid::Uuid;
use writethrough_protocol::{Epoch, Node, Payload, Token};

use crate::cache::{Cache, Session};
use crate::clock;
use crate::entity::{self, Traits};
use crate::error::{CacheError, FenceError, StartError};
use crate::fence::Fence;
use crate::format::Format;
use crate::key::Frame;
use crate::lateness::Lateness;
use crate::runtime;
use crate::settings::Settings;
use crate::single_flight::SingleFlight;
use crate::stats::Counters;
use crate::turns::Turns;

/// How much longer a write waits for a connection on a node that is late itself.
const MAX_LATE: Duration = Duration::from_secs(4);

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
    pub(crate) loads: Arc<SingleFlight>,
    pub(crate) turns: Arc<Turns>,
    pub(crate) lateness: Arc<Lateness>,
    /// The last epoch that this node has proposed to end, and why.
    pub(crate) proposed: Mutex<Option<Proposed>>,
    pub(crate) counters: Counters,
    /// Why the epoch row cannot be used; `None` when it can.
    pub(crate) fence_error: Mutex<Option<FenceError>>,
    /// Why the fence refuses every change of the epoch; `None` when it does not.
    pub(crate) refused_change: Mutex<Option<FenceError>>,
    /// Epochs seen with an in-process cache of another node.
    pub(crate) met: AtomicUsize,
    /// The background task that has ended before the engine was stopped.
    pub(crate) ended: OnceLock<&'static str>,
    /// Writes under way; shutdown waits for them.
    pub(crate) writes: watch::Sender<usize>,
    pub(crate) stopping: watch::Sender<bool>,
    pub(crate) counted: tokio::sync::Mutex<Option<Counted>>,
}

/// The node's state and the session it was told of, changed together: a permit and the session it
/// is used with always belong to each other.
pub(crate) struct View {
    pub(crate) node: Node,
    /// What stands around the names in the keys of the node's epoch.
    pub(crate) frame: Arc<Frame>,
    pub(crate) session: Option<Arc<dyn Session>>,
}

/// How many values a pattern matched.
pub(crate) struct Counted {
    pub(crate) pattern: String,
    pub(crate) count: u64,
    /// When the counting began.
    pub(crate) at: Instant,
    /// Writes of this node that had ended by then.
    pub(crate) after_writes: u64,
}

/// A bypass that this node has proposed.
pub(crate) struct Proposed {
    pub(crate) epoch: Epoch,
    pub(crate) reason: String,
    pub(crate) at: Instant,
}

/// What a write leaves in the cache under one of its keys.
#[derive(Debug)]
pub(crate) struct NewValue {
    /// None: it is not to be cached.
    pub(crate) payload: Option<Payload>,
    /// None: as the settings of the engine say.
    pub(crate) ttl: Option<Duration>,
}

impl NewValue {
    /// A value that its format cannot write, or that may not be cached, leaves the key empty.
    pub(crate) fn of<V, F: Format<V>>(value: &V, traits: Traits) -> Self {
        let bytes = if F::may_be_cached(value) {
            entity::encode::<V, F>(traits, value)
                .inspect_err(|error| tracing::warn!("a written value is not cached: {error}"))
                .ok()
        } else {
            None
        };
        Self {
            payload: bytes.map(Some),
            ttl: traits.ttl,
        }
    }
}

impl Engine {
    /// The engine of a node that knows nothing yet; its keys begin with `prefix`.
    ///
    /// # Errors
    ///
    /// [`StartError`] when the settings are out of bounds, or there is no runtime.
    pub(crate) fn new(
        settings: Settings,
        prefix: String,
        cache: Arc<dyn Cache>,
        fence: Arc<dyn Fence>,
    ) -> Result<Self, StartError> {
        settings.validate()?;
        let runtime = runtime::current()?;
        Ok(Self {
            view: Mutex::new(View {
                node: Node::new(settings.timing),
                frame: Frame::without_epoch(prefix).into(),
                session: None,
            }),
            loads: Arc::new(SingleFlight::new(settings.max_loads)),
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
        })
    }

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

    /// How long what is stored is kept; `own` is what its entity says.
    pub(crate) fn lifetime(&self, payload: &Payload, own: Option<Duration>) -> Duration {
        let settings = &self.settings;
        self.jittered(own.unwrap_or(match payload {
            Some(_) => settings.ttl,
            None => settings.negative_ttl,
        }))
    }

    /// Whether a value or a page of this length may be cached; counts those that may not.
    pub(crate) fn fits(&self, name: &str, stored: usize, most: usize) -> bool {
        // Without the version in front.
        let bytes = stored.saturating_sub(1);
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

    /// What a write leaves in the cache under the key of this name, if it may be kept, and how long.
    pub(crate) fn kept(&self, name: &str, value: NewValue) -> Option<(Payload, Duration)> {
        let Some(payload) = value.payload else {
            self.counters.declined.add(1);
            return None;
        };
        let bytes = payload.as_ref().map_or(0, |bytes| bytes.len());
        let ttl = self.lifetime(&payload, value.ttl);
        self.fits(name, bytes, self.settings.max_value_bytes)
            .then_some((payload, ttl))
    }

    pub(crate) fn cache_failed(&self, what: &str, error: &CacheError) {
        self.counters.cache_errors.add(1);
        tracing::debug!("{what} failed: {error}");
    }

    /// Whether a connection did not come back within its grace, which ended at `until`, on a node that
    /// was on time itself lately: a late one may not have got round to its own connection, and waits
    /// longer, but not for ever.
    pub(crate) fn waited_in_vain(&self, until: Instant) -> bool {
        let now = Instant::now();
        let late = self.lateness.within(self.settings.reconnect_grace);
        now >= until + MAX_LATE || (now >= until && !late)
    }

    /// Refuses new writes, waits for those under way, lets go of the cache.
    pub(crate) async fn stop(&self) {
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

    pub(crate) fn let_go(&self) {
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
