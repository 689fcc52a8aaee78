//! What all requests share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::time::Instant;
use writethrough::cache::SessionWatch;

use crate::config::{CacheBackend, Config, Database, Sampling};
use crate::engine::Consistency;
use crate::items::Items;
use crate::metrics::{Live, Metrics};
use crate::middleware::access::Access;
use crate::middleware::load_shed::Admission;
use crate::problem::{Kind, Problem};

/// How long the answer of a dependency counts before it is asked again.
const PROBE_LIFETIME: Duration = Duration::from_millis(500);
/// The longest that asking a dependency may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// The state of the process that requests see.
pub struct App {
    /// Set when the database is ready.
    items: OnceLock<Arc<Items>>,
    draining: AtomicBool,
    /// Set when the cache is made, which is before the database is ready.
    cache: OnceLock<SessionWatch>,
    probe: tokio::sync::Mutex<Option<(Instant, bool)>>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) admission: Admission,
    pub(crate) access: Access,
    /// `None` when no traces are exported.
    pub(crate) sampling: Option<Sampling>,
    /// Whether a caller's trace is continued.
    pub(crate) propagate: bool,
    pub(crate) service_name: String,
    pub(crate) cache_backend: &'static str,
    pub(crate) database_backend: &'static str,
    pub(crate) consistency: &'static str,
    pub(crate) started: Instant,
}

impl App {
    /// A process that is starting.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let metrics = Arc::new(Metrics::new());
        Self {
            items: OnceLock::new(),
            draining: AtomicBool::new(false),
            cache: OnceLock::new(),
            probe: tokio::sync::Mutex::new(None),
            admission: Admission::new(config.max_in_flight, metrics.in_flight().clone()),
            access: Access {
                admin: config.admin.clone(),
                apart: config.admin_listen.is_some(),
                hosts: config.allowed_hosts.clone(),
            },
            metrics,
            sampling: config.traces.enabled().then_some(config.sampling),
            propagate: config.traces.propagate,
            service_name: config.service_name.clone(),
            cache_backend: match (config.consistency, &config.cache) {
                (Consistency::Off, _) => "none",
                (_, CacheBackend::InProcess) => "in-process",
                (_, CacheBackend::Redis(_)) => "redis",
            },
            database_backend: match config.database {
                Database::Sqlite(_) | Database::Temporary => "embedded",
                Database::Postgres(_) => "postgres",
            },
            consistency: config.consistency.as_str(),
            started: Instant::now(),
        }
    }

    /// The database is ready: from here on items are served.
    pub fn set_ready(&self, items: Arc<Items>) {
        let live: Arc<dyn Live> = items.clone();
        self.metrics.observe(Arc::downgrade(&live));
        let _ = self.items.set(items);
    }

    /// The items, once the database is ready.
    ///
    /// # Errors
    ///
    /// A [`Problem`] that asks to try again.
    pub fn items(&self) -> Result<&Arc<Items>, Problem> {
        self.items.get().ok_or_else(|| {
            Problem::new(Kind::Unavailable).detail(
                "The service is starting and waits for its database. Try again after the time in \
                 `Retry-After`.",
            )
        })
    }

    /// The items, if the database is ready.
    #[must_use]
    pub fn ready_items(&self) -> Option<&Arc<Items>> {
        self.items.get()
    }

    /// The cache was made: from here on its connection can be told.
    pub fn set_cache(&self, sessions: SessionWatch) {
        let _ = self.cache.set(sessions);
    }

    /// Whether there is a verified connection to the cache, in use or not.
    #[must_use]
    pub fn cache_is_connected(&self) -> bool {
        self.cache
            .get()
            .is_some_and(|sessions| sessions.borrow().is_some())
    }

    /// The process is about to stop.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether the process is about to stop.
    #[must_use]
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Whether the database gives a sign of life. Asked at most twice a second, however often
    /// somebody wants to know.
    pub async fn database_is_up(&self) -> bool {
        let Some(items) = self.items.get() else {
            return false;
        };
        let mut probe = self.probe.lock().await;
        if let Some((at, up)) = *probe
            && at.elapsed() < PROBE_LIFETIME
        {
            return up;
        }
        let up = match tokio::time::timeout(PROBE_TIMEOUT, items.store().ping()).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::debug!("the database gives no sign of life: {error}");
                false
            }
            Err(_) => false,
        };
        *probe = Some((Instant::now(), up));
        up
    }
}
