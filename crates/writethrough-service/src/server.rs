//! The server: puts everything together, accepts connections, drains at the end.
//!
//! It listens first and then waits for Postgres, answering 503 meanwhile, so that an orchestrator
//! sees a live process. It never waits for Redis.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::{Request, StatusCode, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use writethrough::{
    Cache, Fence, InvalidSettings, LocalFence, MemoryCache, PostgresFence, RedisCache,
    RedisSettings, Settings,
};

use crate::app::App;
use crate::config::{CacheBackend, Config, ConfigError, Database, setting};
use crate::connections::{Origin, Place, Places, SPARE};
use crate::descriptors::{self, TooFew};
use crate::engine::{Consistency, Engine};
use crate::items::{ITEM, ITEMS, Items};
use crate::listen;
use crate::metrics::Dropped;
use crate::middleware::access::{Caller, Entrance};
use crate::middleware::body_watch::{Lingering, Unread};
use crate::middleware::malformed::Explaining;
use crate::routes;
use crate::store::postgres::{Connector, Lasts, Obstacle, PostgresStore};
use crate::store::sqlite::{OpenError, SqliteStore};
use crate::store::{ItemStore, ObservedStore};
use crate::throttle::Throttle;

/// How long a connection may be idle, and how long the head of a request may take to arrive.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest head of a request.
const HEAD_BYTES: usize = 64 * 1024;
/// The pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// The pause between two attempts to reach Postgres at start.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How often the log repeats that the service waits for Postgres.
const REMINDER: Duration = Duration::from_secs(10);
/// How long a host's name may be unknown at start: those of containers are made with them.
const NEW_NAME: Duration = Duration::from_secs(10);
/// The longest that one attempt to connect and migrate may take.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(60);
/// Loads at once for each connection to the database; they wait for one a second at most.
const LOADS_PER_CONNECTION: usize = 64;
/// Announced writes for each connection to the database: enough to keep it busy.
const WRITERS_PER_CONNECTION: usize = 4;
/// The most announced writes.
const MAX_WRITERS: usize = 1024;
/// Connections of operators; they have places of their own, so that no crowd of clients keeps them out.
const ADMIN_CONNECTIONS: usize = 64;
/// Connections for the fence: one for the poll, one for everything else.
const FENCE_POOL: usize = 2;

/// Why the server did not start. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The address of a setting is not free, or not ours.
    #[error("{0} is {1}, which cannot be listened on: {2}; use a free address")]
    Listen(&'static str, SocketAddr, std::io::Error),
    /// Too few files may be open.
    #[error(transparent)]
    Descriptors(#[from] TooFew),
    /// The embedded database cannot be used.
    #[error("--database (POSTGRES_URL, DATABASE_URL): {0}")]
    Store(#[from] OpenError),
    /// The database refuses this service until somebody mends it. Told by [`Running::failed`].
    #[error(
        "--database (POSTGRES_URL, DATABASE_URL): Postgres at {address} cannot be used: {obstacle}"
    )]
    Postgres {
        /// Where it is.
        address: String,
        /// Why, and what to do.
        obstacle: Obstacle,
    },
    /// The settings contradict each other.
    #[error(transparent)]
    Settings(#[from] InvalidSettings),
    /// The cache's engine could not be started.
    #[error(transparent)]
    Engine(#[from] writethrough::StartError),
}

/// Starts servers.
pub struct Server;

/// A server that runs until [`Running::shutdown`].
pub struct Running {
    address: SocketAddr,
    admin_address: Option<SocketAddr>,
    app: Arc<App>,
    stop: watch::Sender<bool>,
    /// Gets why the start did not come to its end.
    failed: mpsc::Receiver<StartError>,
    accepting: Vec<JoinHandle<JoinSet<()>>>,
    drain: Duration,
    drain_delay: Duration,
}

impl Server {
    /// Listens and serves. With Postgres it returns before the database is reachable.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn start(config: Config) -> Result<Running, StartError> {
        let room = descriptors::room_for(
            config.max_connections,
            config.database_pool_size,
            config.admin_listen.map_or(0, |_| ADMIN_CONNECTIONS + SPARE),
        )?;
        let (listener, address) = listen_on(setting::LISTEN, config.listen).await?;
        let admin = match config.admin_listen {
            Some(address) => Some(listen_on(setting::ADMIN_LISTEN, address).await?),
            None => None,
        };
        let admin_address = admin.as_ref().map(|(_, address)| *address);
        let app = Arc::new(App::new(&config));
        let stop = watch::Sender::new(false);
        let (fail, failed) = mpsc::channel(1);

        let settings = Settings {
            ttl: config.ttl,
            max_value_bytes: config.cache_max_value_bytes,
            max_page_bytes: config.cache_max_page_bytes,
            max_loads: config.database_pool_size * LOADS_PER_CONNECTION,
            max_writers: (config.database_pool_size * WRITERS_PER_CONNECTION).min(MAX_WRITERS),
            ..Settings::default()
        };
        settings.validate()?;
        let cache = cache(&config)?;
        app.set_cache(cache.sessions());
        match &config.database {
            Database::Sqlite(path) => {
                let path = path.clone();
                let opened = tokio::task::spawn_blocking(move || SqliteStore::open(&path)).await;
                let store = opened.unwrap_or_else(|_| Err(OpenError::Stopped))?;
                make_ready(
                    &app,
                    config.consistency,
                    settings,
                    cache,
                    Arc::new(LocalFence::new()),
                    Arc::new(store),
                )?;
            }
            Database::Temporary => {
                let store = Arc::new(SqliteStore::temporary()?);
                let fence = Arc::new(LocalFence::new());
                make_ready(&app, config.consistency, settings, cache, fence, store)?;
            }
            Database::Postgres(url) => {
                let connector = Connector::new(url, &config.service_name)
                    .map_err(|reason| database_error(url, &reason))?;
                if !connector.unused_options().is_empty() {
                    tracing::info!(
                        "not used of the database's URL, because the service has its own bounds: {}",
                        connector.unused_options().join(", ")
                    );
                }
                let store = PostgresStore::new(&connector, config.database_pool_size)
                    .map_err(|reason| database_error(url, &reason))?;
                let fence_pool = connector
                    .pool(FENCE_POOL)
                    .map_err(|reason| database_error(url, &reason))?;
                let fence = Arc::new(PostgresFence::new(fence_pool));
                let (app, mut stop) = (app.clone(), stop.subscribe());
                let consistency = config.consistency;
                tokio::spawn(async move {
                    let ready = async {
                        migrate(&connector).await?;
                        make_ready(&app, consistency, settings, cache, fence, Arc::new(store))?;
                        Ok::<_, StartError>(())
                    };
                    tokio::select! {
                        Err(error) = ready => {
                            let _ = fail.send(error).await;
                        }
                        () = stopped(&mut stop) => {}
                    }
                });
            }
        }

        let router = routes::router(app.clone());
        let mut accepting = vec![tokio::spawn(accept(
            listener,
            Entrance::Public,
            router.clone(),
            app.clone(),
            Places::new(room, app.metrics.clone()),
            stop.subscribe(),
        ))];
        if room < config.max_connections {
            tracing::warn!(
                "the limit of open files leaves room for {room} client connections, and \
                 --max-connections (MAX_CONNECTIONS) is {}: raise the limit (`ulimit -n`)",
                config.max_connections
            );
        }
        tracing::info!(
            database = ?config.database,
            cache = ?config.cache,
            consistency = config.consistency.as_str(),
            admin = config.admin.as_str(),
            "listening on http://{address}"
        );
        if let Some((listener, address)) = admin {
            accepting.push(tokio::spawn(accept(
                listener,
                Entrance::Admin,
                router,
                app.clone(),
                Places::new(ADMIN_CONNECTIONS, app.metrics.clone()),
                stop.subscribe(),
            )));
            tracing::info!("listening on http://{address} for /cache/... and /metrics");
        }
        if matches!(
            (&config.database, &config.cache),
            (Database::Postgres(_), CacheBackend::InProcess)
        ) {
            tracing::info!(
                "the cache is in this process: a second node on the same database needs --cache \
                 (REDIS_URL), or the two will keep each other from caching"
            );
        }
        Ok(Running {
            address,
            admin_address,
            app,
            stop,
            failed,
            accepting,
            drain: config.drain,
            drain_delay: config.drain_delay,
        })
    }
}

impl Running {
    /// Where the server listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// Where the server listens for operators, if not there.
    #[must_use]
    pub fn admin_addr(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// Waits until it is known that the start cannot come to its end, and returns why; for ever when it
    /// does. Until then, and afterwards, requests get 503.
    pub async fn failed(&mut self) -> StartError {
        match self.failed.recv().await {
            Some(error) => error,
            None => std::future::pending().await,
        }
    }

    /// Stops: turns `/readyz` to 503, goes on accepting for the configured delay, lets requests under
    /// way finish for the configured time, then ends whatever is left. Bounded.
    pub async fn shutdown(self) {
        self.app.set_draining();
        sleep(self.drain_delay).await;
        self.stop.send_replace(true);
        let until = Instant::now() + self.drain;
        let mut cut_off = 0;
        for accepting in self.accepting {
            if let Ok(mut connections) = accepting.await {
                let drained = async { while connections.join_next().await.is_some() {} };
                if timeout_at(until, drained).await.is_err() {
                    cut_off += connections.len();
                    connections.shutdown().await;
                }
            }
        }
        if cut_off > 0 {
            tracing::warn!("{cut_off} connections were cut off at the end");
        }
        if let Some(items) = self.app.ready_items() {
            items.shutdown().await;
        }
    }
}

/// Listens on the address of a setting.
async fn listen_on(
    setting: &'static str,
    address: SocketAddr,
) -> Result<(TcpListener, SocketAddr), StartError> {
    let error = |error| StartError::Listen(setting, address, error);
    let listener = listen::bind(address).await.map_err(error)?;
    let address = listener.local_addr().map_err(error)?;
    Ok((listener, address))
}

/// Waits until the server is told to stop, or is gone.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

fn database_error(url: &str, reason: &str) -> ConfigError {
    ConfigError::new(setting::DATABASE, url, reason)
}

fn cache(config: &Config) -> Result<Arc<dyn Cache>, ConfigError> {
    let url = match &config.cache {
        // Switched off, it is not even connected to: verifying a connection writes to it.
        CacheBackend::Redis(url) if config.consistency != Consistency::Off => url,
        CacheBackend::Redis(_) | CacheBackend::InProcess => {
            return Ok(Arc::new(MemoryCache::new(config.cache_capacity_bytes)));
        }
    };
    // The client's own message may repeat the URL, so it is not passed on.
    let wrong = |_| ConfigError::new(setting::CACHE, url, "use `redis://HOST:PORT/DB`");
    let mut settings = RedisSettings::new(url.as_str());
    settings.key_prefixes = vec![format!("{}:", ITEM.name()), format!("{{{}}}", ITEMS.name())];
    Ok(Arc::new(RedisCache::connect(settings).map_err(wrong)?))
}

fn make_ready(
    app: &Arc<App>,
    consistency: Consistency,
    settings: Settings,
    cache: Arc<dyn Cache>,
    fence: Arc<dyn Fence>,
    store: Arc<dyn ItemStore>,
) -> Result<(), writethrough::StartError> {
    let engine = Engine::start(consistency, settings, cache, fence)?;
    let store = Arc::new(ObservedStore::new(store, app.metrics.clone()));
    app.set_ready(Arc::new(Items::new(engine, store, app.metrics.clone())));
    Ok(())
}

/// Connects to Postgres and migrates, however long it takes, unless it never will.
async fn migrate(connector: &Connector) -> Result<(), StartError> {
    let address = connector.address();
    let begun = Instant::now();
    let mut reminded: Option<Instant> = None;
    loop {
        let attempt = async {
            let mut client = connector.connect().await?;
            PostgresStore::migrate(&mut client).await
        };
        let obstacle = match timeout(MIGRATION_TIMEOUT, attempt).await {
            Ok(Ok(())) => break,
            Ok(Err(obstacle)) => obstacle,
            Err(_) => {
                Obstacle::passing(format!("not done within {} s", MIGRATION_TIMEOUT.as_secs()))
            }
        };
        let lasts = match obstacle.lasts() {
            Lasts::AWhile => false,
            Lasts::UnlessNew => begun.elapsed() >= NEW_NAME,
            Lasts::ForGood => true,
        };
        if lasts {
            return Err(StartError::Postgres { address, obstacle });
        }
        if reminded.is_none_or(|at| at.elapsed() >= REMINDER) {
            tracing::warn!("waiting for Postgres at {address}: {obstacle}");
            reminded = Some(Instant::now());
        }
        sleep(RETRY_PAUSE).await;
    }
    tracing::info!("Postgres at {address} is ready");
    Ok(())
}

/// Accepts connections until told to stop; returns those that are still open.
async fn accept(
    listener: TcpListener,
    entrance: Entrance,
    router: Router,
    app: Arc<App>,
    places: Arc<Places>,
    mut stop: watch::Receiver<bool>,
) -> JoinSet<()> {
    static REFUSED: Throttle = Throttle::new(Duration::from_secs(10));
    let loopback = listener
        .local_addr()
        .is_ok_and(|address| address.ip().to_canonical().is_loopback());
    let mut connections = JoinSet::new();
    let mut waiting: Option<(TcpStream, SocketAddr)> = None;
    loop {
        let until = stop.clone();
        let next = async {
            if waiting.is_none() {
                waiting = Some(listener.accept().await?);
            }
            Ok::<_, std::io::Error>(places.take().await)
        };
        tokio::select! {
            () = stopped(&mut stop) => return connections,
            Some(_) = connections.join_next() => {}
            next = next => match next {
                Ok(place) => {
                    if let Some((stream, peer)) = waiting.take() {
                        let caller = Caller { entrance, loopback, peer: peer.ip() };
                        connections.spawn(serve(stream, caller, place, router.clone(), app.clone(), until));
                    }
                }
                Err(error) => {
                    app.metrics.dropped(Dropped::NotAccepted);
                    if let Some(count) = REFUSED.pass() {
                        tracing::warn!("{count} connections could not be accepted: {error}");
                    }
                    // Out of file descriptors, most likely.
                    places.give_way();
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn serve(
    stream: TcpStream,
    caller: Caller,
    place: Place,
    router: Router,
    app: Arc<App>,
    mut stop: watch::Receiver<bool>,
) {
    // Small responses must not wait for the acknowledgement of the one before.
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIMEOUT)
        .max_header_size(HEAD_BYTES);
    let unread = Arc::new(AtomicBool::new(false));
    let connection = place.connection();
    let stream = Lingering::new(
        stream,
        connection.clone(),
        app.metrics.clone(),
        unread.clone(),
        stop.clone(),
    );
    let stream = Explaining::new(stream, app.metrics.clone());
    let router = TowerToHyperService::new(router);
    let service = service_fn(|mut request: Request<Incoming>| {
        request.extensions_mut().insert(Origin {
            caller,
            connection: connection.clone(),
        });
        let (answer, unread) = (router.call(request), &unread);
        async move {
            connection.begins();
            let mut response = answer.await?;
            connection.answers();
            if matches!(
                response.status(),
                StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
            ) {
                // The router gives every answer the length of its body. Here there is none, and a 304
                // that says 0 would tell a cache that what it has is empty (RFC 9110, 8.6).
                response.headers_mut().remove(header::CONTENT_LENGTH);
            }
            if response.extensions().get::<Unread>().is_some() {
                unread.store(true, Ordering::Relaxed);
            }
            Ok::<_, Infallible>(response)
        }
    });
    let http = http.serve_connection(TokioIo::new(stream), service);
    let mut http = std::pin::pin!(http);
    let result = tokio::select! {
        biased;
        // First: it may have a request that nobody has read yet.
        result = http.as_mut() => result,
        () = connection.gives_way() => return,
        () = stopped(&mut stop) => {
            http.as_mut().graceful_shutdown();
            http.await
        }
    };
    if let Err(error) = result {
        tracing::debug!("a connection ended: {error}");
    }
}
