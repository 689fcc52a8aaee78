//! Engines over every pair of cache and fence, and a store that tests can hold up.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test binary uses its own part, and a test fails by panicking"
)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use deadpool_postgres::{Manager, Pool};
use sqlx::{Connection, PgConnection, PgPool};
use tokio::sync::{Notify, OnceCell};
use tokio::task::JoinHandle;
use tokio_postgres::NoTls;
use writethrough::fence::UnfitDatabase;
use writethrough::writing::Guarded;
use writethrough::{
    Cache, Collection, Entity, Fence, Guard, LocalFence, MemoryCache, OpError, PostgresFence, Read,
    ReadOutcome, RedisCache, RedisSettings, Settings, SqlxFence, WriteError, WriteThrough, Written,
    postgres,
};
use writethrough_testbed::{Link, Postgres, Redis, Testbed};

/// One row of text a key.
pub const ROW: Entity<str, String> = Entity::new("row");
/// Lists of rows.
pub const ROWS: Collection<(), String> = Collection::new("rows");

/// Runs each case on each pair of cache and fence.
#[allow(unused_macros, reason = "each test binary uses its own part")]
macro_rules! on_every_pair {
    ($($case:ident),+ $(,)?) => {
        on_every_pair! { @ memory_local MemoryLocal $($case),+ }
        on_every_pair! { @ redis_local RedisLocal $($case),+ }
        on_every_pair! { @ memory_postgres MemoryPostgres $($case),+ }
        on_every_pair! { @ redis_postgres RedisPostgres $($case),+ }
        on_every_pair! { @ memory_sqlx MemorySqlx $($case),+ }
    };
    (@ $module:ident $pair:ident $($case:ident),+) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    super::$case(super::Pair::$pair).await;
                }
            )+
        }
    };
}

pub const PATIENCE: Duration = Duration::from_secs(10);

/// Polls a fact until it holds.
pub async fn until(fact: &str, mut holds: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !holds().await {
        assert!(
            started.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {fact}"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pair {
    MemoryLocal,
    RedisLocal,
    MemoryPostgres,
    RedisPostgres,
    MemorySqlx,
    RedisSqlx,
}

impl Pair {
    fn uses_redis(self) -> bool {
        matches!(
            self,
            Self::RedisLocal | Self::RedisPostgres | Self::RedisSqlx
        )
    }

    fn uses_postgres(self) -> bool {
        !matches!(self, Self::MemoryLocal | Self::RedisLocal)
    }

    pub fn driver(self) -> Driver {
        match self {
            Self::MemorySqlx | Self::RedisSqlx => Driver::Sqlx,
            _ => Driver::TokioPostgres,
        }
    }
}

/// The driver of a fence in Postgres.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    TokioPostgres,
    Sqlx,
}

impl Driver {
    pub fn with_memory(self) -> Pair {
        match self {
            Self::TokioPostgres => Pair::MemoryPostgres,
            Self::Sqlx => Pair::MemorySqlx,
        }
    }

    pub fn with_redis(self) -> Pair {
        match self {
            Self::TokioPostgres => Pair::RedisPostgres,
            Self::Sqlx => Pair::RedisSqlx,
        }
    }

    pub fn fence(self, url: &str) -> Arc<dyn Fence> {
        match self {
            Self::TokioPostgres => Arc::new(PostgresFence::new(pool_of(url, 2))),
            Self::Sqlx => Arc::new(SqlxFence::new(PgPool::connect_lazy(url).unwrap())),
        }
    }

    async fn migrate(self, url: &str) {
        match self {
            Self::TokioPostgres => {
                let mut client = pool_of(url, 1).get().await.unwrap();
                PostgresFence::migrate(&mut client).await.unwrap();
            }
            Self::Sqlx => {
                let mut connection = PgConnection::connect(url).await.unwrap();
                SqlxFence::migrate(&mut connection).await.unwrap();
            }
        }
    }

    /// The test of the server's locks, on two new connections.
    pub async fn self_test(self, url: &str) -> Result<(), UnfitDatabase> {
        match self {
            Self::TokioPostgres => {
                let pool = pool_of(url, 2);
                let [mut holder, mut waiter] =
                    [pool.get().await.unwrap(), pool.get().await.unwrap()];
                PostgresFence::self_test(&mut holder, &mut waiter).await
            }
            Self::Sqlx => {
                let mut holder = PgConnection::connect(url).await.unwrap();
                let mut waiter = PgConnection::connect(url).await.unwrap();
                SqlxFence::self_test(&mut holder, &mut waiter).await
            }
        }
    }
}

/// A pair's servers; engines of several nodes can be started on them.
pub struct Ground {
    pub pair: Pair,
    /// Where the servers run that are the test's own.
    own: Option<Testbed>,
    pub redis: Option<Arc<Redis>>,
    /// The Postgres server, where it is the test's own.
    pub own_postgres: Option<Postgres>,
    /// Where the test's database is.
    pub database: Option<String>,
    pub store: Store,
}

/// Servers that the process' tests share, because to start one takes up to a second. Each test has a
/// database of its own, to which an epoch row, a guard's lock and a history belong; and the history's
/// random id is part of each key in Redis. A test that changes a server has a server of its own.
struct Shared {
    testbed: Testbed,
    postgres: OnceCell<Postgres>,
    redis: OnceCell<Arc<Redis>>,
}

impl Shared {
    async fn get() -> &'static Self {
        static SHARED: OnceCell<Shared> = OnceCell::const_new();
        let start = async || Self {
            testbed: Testbed::new().await.unwrap(),
            postgres: OnceCell::new(),
            redis: OnceCell::new(),
        };
        SHARED.get_or_init(start).await
    }

    /// Makes an empty database and returns its URL.
    async fn database(&self) -> String {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let start = async || self.testbed.postgres().await.unwrap();
        let postgres = self.postgres.get_or_init(start).await;
        let name = format!("test_{}", NUMBER.fetch_add(1, Ordering::SeqCst));
        let url = postgres.url();
        let client = pool_of(&url, 1).get().await.unwrap();
        let create = format!("CREATE DATABASE {name}");
        client.batch_execute(&create).await.unwrap();
        let (server, _) = url.rsplit_once('/').unwrap();
        format!("{server}/{name}")
    }

    async fn redis(&self) -> Arc<Redis> {
        let start = async || Arc::new(self.testbed.redis().await.unwrap());
        self.redis.get_or_init(start).await.clone()
    }
}

/// The source of truth: one row of text a key.
#[derive(Clone)]
pub struct Store {
    pub pool: Option<Pool>,
    pub rows: Arc<Mutex<HashMap<String, String>>>,
    pub loads: Arc<AtomicU64>,
    pub writes: Arc<AtomicU64>,
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(pub String);

fn failed(error: impl std::fmt::Display) -> StoreError {
    StoreError(error.to_string())
}

impl Store {
    pub fn in_memory() -> Self {
        Self {
            pool: None,
            rows: Arc::default(),
            loads: Arc::default(),
            writes: Arc::default(),
        }
    }

    /// What the store holds now.
    pub async fn get(&self, key: &str) -> Option<String> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        match &self.pool {
            None => self.rows.lock().unwrap().get(key).cloned(),
            Some(pool) => {
                let client = pool.get().await.unwrap();
                let row = client
                    .query_opt("SELECT value FROM rows WHERE key = $1", &[&key])
                    .await;
                row.unwrap().map(|row| row.get(0))
            }
        }
    }

    /// What the store holds under these keys, asked for at once.
    pub async fn get_many(&self, keys: &[String]) -> Vec<(String, String)> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        let Some(pool) = &self.pool else {
            let rows = self.rows.lock().unwrap();
            let found = keys.iter().filter_map(|key| rows.get_key_value(key));
            return found
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect();
        };
        let client = pool.get().await.unwrap();
        let select = "SELECT key, value FROM rows WHERE key = ANY($1)";
        let rows = client.query(select, &[&keys]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }

    /// Writes as a program does that ignores its guard.
    pub async fn put_unguarded(&self, key: &str, value: &str) {
        let Some(pool) = &self.pool else {
            let mut rows = self.rows.lock().unwrap();
            rows.insert(key.to_owned(), value.to_owned());
            return;
        };
        let client = pool.get().await.unwrap();
        let update = "UPDATE rows SET value = $2 WHERE key = $1";
        client.execute(update, &[&key, &value]).await.unwrap();
    }

    /// Writes guarded; `None` deletes.
    pub async fn put(
        &self,
        guard: &Guard,
        key: &str,
        value: Option<&str>,
    ) -> Result<(), OpError<StoreError>> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        let Some(pool) = &self.pool else {
            let mut rows = self.rows.lock().unwrap();
            match value {
                Some(value) => rows.insert(key.to_owned(), value.to_owned()),
                None => rows.remove(key),
            };
            return Ok(());
        };
        let client = pool.get().await.map_err(|e| OpError::Rejected(failed(e)))?;
        let epoch = guard.parameter();
        let result = match value {
            Some(value) => {
                let insert =
                    "INSERT INTO rows (key, value) SELECT $2, $3 FROM writethrough.guard($1)
                              ON CONFLICT (key) DO UPDATE SET value = $3";
                client.execute(insert, &[&epoch, &key, &value]).await
            }
            None => {
                let delete = "DELETE FROM rows USING writethrough.guard($1) WHERE key = $2";
                client.execute(delete, &[&epoch, &key]).await
            }
        };
        result
            .map(drop)
            .map_err(|error| postgres::op_error(error).map(failed))
    }
}

impl Ground {
    /// On servers that tests share.
    pub async fn new(pair: Pair) -> Self {
        let mut redis = None;
        if pair.uses_redis() {
            redis = Some(Shared::get().await.redis().await);
        }
        Self::on(pair, Self::database(pair).await, redis).await
    }

    /// With a Redis server of its own, where the pair has one: to be killed, emptied or looked into.
    pub async fn with_own_redis(pair: Pair) -> Self {
        let own = Testbed::new().await.unwrap();
        let mut redis = None;
        if pair.uses_redis() {
            redis = Some(Arc::new(own.redis().await.unwrap()));
        }
        let ground = Self::on(pair, Self::database(pair).await, redis).await;
        Self {
            own: Some(own),
            ..ground
        }
    }

    /// With servers of its own, of which Postgres is to be promoted, killed or reconfigured.
    pub async fn with_own_postgres(pair: Pair) -> Self {
        let own = Testbed::new().await.unwrap();
        let postgres = own.postgres().await.unwrap();
        let mut redis = None;
        if pair.uses_redis() {
            redis = Some(Arc::new(own.redis().await.unwrap()));
        }
        let ground = Self::on(pair, Some(postgres.url()), redis).await;
        Self {
            own: Some(own),
            own_postgres: Some(postgres),
            ..ground
        }
    }

    async fn database(pair: Pair) -> Option<String> {
        match pair.uses_postgres() {
            true => Some(Shared::get().await.database().await),
            false => None,
        }
    }

    async fn on(pair: Pair, database: Option<String>, redis: Option<Arc<Redis>>) -> Self {
        let pool = database.as_deref().map(|url| pool_of(url, 8));
        if let Some(pool) = &pool {
            pair.driver().migrate(database.as_deref().unwrap()).await;
            let client = pool.get().await.unwrap();
            let table = "CREATE TABLE rows (key text PRIMARY KEY, value text NOT NULL)";
            client.batch_execute(table).await.unwrap();
            // No node has ever held a lease here, so nobody has to observe the first epoch.
            let settle = "UPDATE writethrough.epoch SET settled = true";
            client.batch_execute(settle).await.unwrap();
        }
        let store = Store {
            pool,
            ..Store::in_memory()
        };
        Self {
            pair,
            own: None,
            redis,
            own_postgres: None,
            database,
            store,
        }
    }

    pub async fn link_to_redis(&self) -> Link {
        let redis = self.redis.as_ref().unwrap().addr();
        match &self.own {
            Some(testbed) => testbed.link(redis).await.unwrap(),
            None => Shared::get().await.testbed.link(redis).await.unwrap(),
        }
    }

    pub fn cache(&self) -> Arc<dyn Cache> {
        match &self.redis {
            None => Arc::new(MemoryCache::new(16 << 20)),
            Some(redis) => Arc::new(RedisCache::connect(RedisSettings::new(redis.url())).unwrap()),
        }
    }

    pub fn fence(&self) -> Arc<dyn Fence> {
        match &self.database {
            None => Arc::new(LocalFence::new()),
            Some(url) => self.pair.driver().fence(url),
        }
    }

    /// A node whose cache is in use.
    pub async fn node(&self) -> Node {
        self.node_with(Settings::default()).await
    }

    pub async fn node_with(&self, settings: Settings) -> Node {
        let node = self.start(settings, self.cache(), self.fence());
        node.cached.ready(PATIENCE).await.unwrap();
        node
    }

    pub fn start(&self, settings: Settings, cache: Arc<dyn Cache>, fence: Arc<dyn Fence>) -> Node {
        let engine = WriteThrough::builder(cache, fence.clone()).settings(settings);
        let cached = engine.start().unwrap();
        Node {
            cached,
            fence,
            store: self.store.clone(),
        }
    }
}

pub fn pool_of(url: &str, size: usize) -> Pool {
    let config: tokio_postgres::Config = url.parse().unwrap();
    Pool::builder(Manager::new(config, NoTls))
        .max_size(size)
        .build()
        .unwrap()
}

/// One node's engine with the store behind it.
#[derive(Clone)]
pub struct Node {
    pub cached: WriteThrough,
    pub fence: Arc<dyn Fence>,
    pub store: Store,
}

pub type Outcome<T> = Result<Written<T>, WriteError<StoreError>>;

impl Node {
    /// Runs something with this node on a task of its own.
    pub fn spawn<F>(&self, work: impl FnOnce(Self) -> F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        tokio::spawn(work(self.clone()))
    }

    pub async fn read(&self, id: &str) -> Read<String> {
        let load = || async { Ok::<_, StoreError>(self.store.get(id).await) };
        self.cached.read(&ROW.key(id), load).await.unwrap()
    }

    /// The key in the cache of a row's value in the present epoch.
    pub fn cache_key(&self, id: &str) -> String {
        let status = self.cached.status();
        let (history, epoch) = (status.history.unwrap(), status.epoch.unwrap());
        format!("row:{id}@{history}.{epoch}")
    }

    /// The value that a read returns.
    pub async fn value(&self, id: &str) -> Option<String> {
        self.read(id).await.value
    }

    /// A read whose load waits at the gate after it has read the store.
    pub async fn read_slowly(&self, id: &str, gate: Arc<Gate>) -> Read<String> {
        let load = || async {
            let value = self.store.get(id).await;
            gate.pass().await;
            Ok::<_, StoreError>(value)
        };
        self.cached.read(&ROW.key(id), load).await.unwrap()
    }

    pub async fn write(&self, id: &str, value: Option<&str>) -> Outcome<()> {
        self.write_slowly(id, value, Gate::open()).await
    }

    /// Such a read on a task of its own: it waits now, until the gate is opened.
    pub async fn held_read(&self, id: &str) -> (Arc<Gate>, JoinHandle<Read<String>>) {
        let (node, id) = (self.clone(), id.to_owned());
        held(|gate| async move { node.read_slowly(&id, gate).await }).await
    }

    /// Many reads at once, each on a task of its own.
    pub fn readers(&self, id: &str, count: usize) -> Vec<JoinHandle<ReadOutcome>> {
        let read = || {
            let id = id.to_owned();
            self.spawn(|node| async move { node.read(&id).await.outcome })
        };
        (0..count).map(|_| read()).collect()
    }

    /// A write that waits at the gate before it touches the store.
    pub async fn write_slowly(
        &self,
        id: &str,
        value: Option<&str>,
        gate: Arc<Gate>,
    ) -> Outcome<()> {
        type Context = (Store, String, Option<String>, Arc<Gate>);
        let value = value.map(str::to_owned);
        let context = (self.store.clone(), id.to_owned(), value, gate);
        let write = self.cached.write(ROW.key(id)).with(context);
        write
            .guarded(|mut guarded: Guarded, slot, context: Context| async move {
                let (store, id, value, gate) = context;
                gate.pass().await;
                store.put(&guarded, &id, value.as_deref()).await?;
                if let Some(value) = &value {
                    guarded.cache(&slot, value);
                }
                Ok(guarded.commit(()))
            })
            .await
    }

    /// Such a write on a task of its own: announced, so that reads of the key go past the cache, and
    /// not in the store yet.
    pub async fn held_write(
        &self,
        id: &str,
        value: Option<&'static str>,
    ) -> (Arc<Gate>, JoinHandle<Outcome<()>>) {
        let (node, id) = (self.clone(), id.to_owned());
        held(|gate| async move { node.write_slowly(&id, value, gate).await }).await
    }
}

/// Starts something that passes a gate, on a task of its own, and returns when it waits there.
pub async fn held<F>(start: impl FnOnce(Arc<Gate>) -> F) -> (Arc<Gate>, JoinHandle<F::Output>)
where
    F: Future<Output: Send> + Send + 'static,
{
    let gate = Gate::shut();
    let task = tokio::spawn(start(gate.clone()));
    gate.arrival().await;
    (gate, task)
}

/// Holds up whoever passes until it is opened, and tells when somebody is there.
#[derive(Default)]
pub struct Gate {
    arrived: Notify,
    opened: Notify,
    open: std::sync::atomic::AtomicBool,
}

impl Gate {
    pub fn shut() -> Arc<Self> {
        Arc::default()
    }

    pub fn open() -> Arc<Self> {
        let gate = Self::default();
        gate.open.store(true, Ordering::SeqCst);
        Arc::new(gate)
    }

    pub async fn pass(&self) {
        self.arrived.notify_one();
        while !self.open.load(Ordering::SeqCst) {
            self.opened.notified().await;
        }
        self.opened.notify_one();
    }

    pub async fn arrival(&self) {
        tokio::time::timeout(PATIENCE, self.arrived.notified())
            .await
            .expect("nobody came");
    }

    pub fn let_through(&self) {
        self.open.store(true, Ordering::SeqCst);
        self.opened.notify_one();
    }
}
