//! What the cache costs and what it saves: each operation beside the bare commands that nobody can do
//! without, its *floor*.
//!
//! `cargo bench -p writethrough-service --bench cost` (`-- --rounds N` for more than 8 rounds). It starts a Postgres and a
//! Redis of its own. In every round each row has its turn, so that a machine that slows down slows
//! down all of them; the ratio is the median of the rounds' ratios. The times mean something only
//! there and then.
//!
//! Everything runs on one processor, servers included. What is compared is the work of all of them;
//! whether one processor must be woken by another would otherwise decide more than anything here.
#![allow(
    clippy::print_stdout,
    reason = "this is a program for the terminal, and its output is its purpose"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use deadpool_postgres::{Manager, Object, Pool};
use futures::future::BoxFuture;
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tokio::task::JoinSet;
use tokio_postgres::types::ToSql;
use tokio_postgres::{NoTls, Row as PgRow};
use writethrough::format::AsBytes;
use writethrough::{
    Cache, Entity, Fence, Guard, LocalFence, MemoryCache, OpError, Phase, PostgresFence,
    ReadOutcome, RedisCache, RedisSettings, Settings, postgres,
};
use writethrough_service::config::{CacheBackend, Config, Database};
use writethrough_service::engine::{Consistency, Engine};
use writethrough_service::server::{Running, Server};
use writethrough_testbed::{Postgres, Redis, Testbed, until};

/// The allocator of the program `writethrough`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long a row's turn lasts.
const TURN: Duration = Duration::from_millis(150);
/// The numbers of clients, each in a closed loop.
const CLIENTS: [usize; 2] = [1, 64];
/// Rows that are only read have the numbers below this, those that are written the ones from it on.
const READ_ONLY: i64 = 1000;
const VALUE_BYTES: usize = 200;
const PATIENCE: Duration = Duration::from_secs(20);

const SELECT: &str = "SELECT value FROM rows WHERE id = $1";
const UPDATE: &str = "UPDATE rows SET value = $2 WHERE id = $1";
const GUARDED_UPDATE: &str =
    "UPDATE rows SET value = $2 FROM writethrough.guard($3) WHERE rows.id = $1";

type Failure = Box<dyn std::error::Error + Send + Sync>;
/// One operation; whether it went the way that its row is named after.
type Operation = Arc<dyn Fn() -> BoxFuture<'static, Result<bool, Failure>> + Send + Sync>;

struct Row {
    name: &'static str,
    /// The row to compare it with; none for a floor itself.
    floor: Option<&'static str>,
    operation: Operation,
}

fn row<F>(
    name: &'static str,
    floor: Option<&'static str>,
    operation: impl Fn() -> F + Send + Sync + 'static,
) -> Row
where
    F: Future<Output = Result<bool, Failure>> + Send + 'static,
{
    Row {
        name,
        floor,
        operation: Arc::new(move || Box::pin(operation())),
    }
}

/// One row's turn.
struct Turn {
    microseconds: f64,
    as_named: f64,
}

async fn turn(operation: &Operation, clients: usize) -> Result<Turn, Failure> {
    let started = Instant::now();
    let mut running = JoinSet::new();
    for _ in 0..clients {
        let operation = operation.clone();
        running.spawn(async move {
            let (mut all, mut as_named) = (0_u32, 0_u32);
            while started.elapsed() < TURN {
                as_named += u32::from(operation().await?);
                all += 1;
            }
            Ok::<_, Failure>((all, as_named))
        });
    }
    let (mut all, mut as_named) = (0_u32, 0_u32);
    while let Some(client) = running.join_next().await {
        let (operations, good) = client??;
        all += operations;
        as_named += good;
    }
    let all = f64::from(all.max(1));
    Ok(Turn {
        microseconds: started.elapsed().as_secs_f64() * 1e6 / all,
        as_named: f64::from(as_named) / all,
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

const ROW: Entity<i64, Bytes, AsBytes> = Entity::new("row");

/// The table of bare clients and engines.
#[derive(Clone)]
struct Ground {
    pool: Pool,
    redis: MultiplexedConnection,
    value: Bytes,
    /// Numbers of rows that do not exist, for misses.
    next_absent: Arc<AtomicI64>,
}

impl Ground {
    async fn new(postgres: &Postgres, redis: &Redis) -> Result<Self, Failure> {
        let ground = Self {
            pool: pool(&postgres.url(), 16)?,
            redis: redis::Client::open(redis.url())?
                .get_multiplexed_async_connection()
                .await?,
            value: "x".repeat(VALUE_BYTES).into(),
            next_absent: Arc::new(AtomicI64::new(1_000_000)),
        };
        let mut client = ground.pool.get().await?;
        PostgresFence::migrate(&mut client).await?;
        client
            .batch_execute(&format!(
                "CREATE TABLE rows (id bigint PRIMARY KEY, value text NOT NULL);
                 INSERT INTO rows SELECT n, repeat('x', {VALUE_BYTES})
                 FROM generate_series(0, {}) AS n",
                2 * READ_ONLY - 1
            ))
            .await?;
        let mut redis = ground.redis.clone();
        for id in 0..READ_ONLY {
            redis
                .set::<_, _, ()>(format!("bare:{id}"), &ground.value[..])
                .await?;
        }
        Ok(ground)
    }

    fn read_only(&self) -> i64 {
        fastrand::i64(0..READ_ONLY)
    }

    fn written(&self) -> i64 {
        fastrand::i64(READ_ONLY..2 * READ_ONLY)
    }

    fn absent(&self) -> i64 {
        self.next_absent.fetch_add(1, Ordering::Relaxed)
    }

    async fn get(&self, id: i64) -> Result<Option<Vec<u8>>, Failure> {
        Ok(self.redis.clone().get(format!("bare:{id}")).await?)
    }

    async fn set(&self, id: i64, value: &[u8]) -> Result<(), Failure> {
        let mut redis = self.redis.clone();
        Ok(redis.set_ex(format!("bare:{id}"), value, 300).await?)
    }

    async fn select(&self, id: i64) -> Result<Option<Bytes>, Failure> {
        let row = self.query(SELECT, &[&id]).await?;
        Ok(row.map(|row| Bytes::from(row.get::<_, String>(0))))
    }

    async fn update(&self, id: i64) -> Result<(), Failure> {
        let value = std::str::from_utf8(&self.value)?;
        self.query(UPDATE, &[&id, &value]).await.map(drop)
    }

    async fn query(
        &self,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<PgRow>, Failure> {
        let client: Object = self.pool.get().await?;
        let prepared = client.prepare_cached(statement).await?;
        Ok(client.query_opt(&prepared, parameters).await?)
    }

    /// The guarded update of one of the engine's writes.
    async fn guarded_update(&self, id: i64, epoch: i64) -> Result<(), OpError<Failure>> {
        let failed = |error| postgres::op_error(error).map(Failure::from);
        let value = String::from_utf8_lossy(&self.value).into_owned();
        let client = self
            .pool
            .get()
            .await
            .map_err(|e| OpError::Rejected(e.into()))?;
        let prepared = client
            .prepare_cached(GUARDED_UPDATE)
            .await
            .map_err(failed)?;
        let parameters: [&(dyn ToSql + Sync); 3] = [&id, &value, &epoch];
        client
            .execute(&prepared, &parameters)
            .await
            .map_err(failed)?;
        Ok(())
    }

    async fn read(&self, engine: &Engine, id: i64) -> Result<ReadOutcome, Failure> {
        let read = engine.read(&ROW.key(id), || self.select(id)).await?;
        Ok(read.outcome)
    }

    async fn write(&self, engine: &Engine, id: i64) -> Result<(), Failure> {
        let ground = self.clone();
        let written = engine.write(ROW.key(id), (), move |guard: Option<Guard>| {
            let ground = ground.clone();
            async move {
                // Textbook and off have no epoch to be guarded by.
                match guard {
                    None => ground.update(id).await.map_err(OpError::Rejected)?,
                    Some(guard) => ground.guarded_update(id, guard.parameter()).await?,
                }
                Ok::<_, OpError<Failure>>(((), Some(ground.value)))
            }
        });
        written
            .await
            .map(drop)
            .map_err(|error| error.to_string().into())
    }
}

fn pool(url: &str, size: usize) -> Result<Pool, Failure> {
    let manager = Manager::new(url.parse()?, NoTls);
    Ok(Pool::builder(manager).max_size(size).build()?)
}

async fn engine(
    consistency: Consistency,
    postgres: &Postgres,
    redis: &Redis,
) -> Result<Engine, Failure> {
    let cache = RedisCache::connect(RedisSettings::new(redis.url()))?;
    let fence = PostgresFence::new(pool(&postgres.url(), 2)?);
    in_use(consistency, Arc::new(cache), Arc::new(fence)).await
}

async fn in_use(
    consistency: Consistency,
    cache: Arc<dyn Cache>,
    fence: Arc<dyn Fence>,
) -> Result<Engine, Failure> {
    let engine = Engine::start(consistency, Settings::default(), cache, fence)?;
    until("the cache is in use", PATIENCE, || async {
        uses_cache(&engine).then_some(())
    })
    .await?;
    Ok(engine)
}

fn uses_cache(engine: &Engine) -> bool {
    let state = engine.state();
    match state.consistency {
        Consistency::Strict => state.status.phase == Phase::Cached && state.status.connected,
        Consistency::Textbook | Consistency::Off => state.status.connected,
    }
}

async fn library(postgres: &Postgres, redis: &Redis) -> Result<Vec<Row>, Failure> {
    let ground = Ground::new(postgres, redis).await?;
    let strict = engine(Consistency::Strict, postgres, redis).await?;
    let textbook = engine(Consistency::Textbook, postgres, redis).await?;
    let off = engine(Consistency::Off, postgres, redis).await?;
    let memory = Arc::new(MemoryCache::new(64 << 20));
    let memory = in_use(Consistency::Strict, memory, Arc::new(LocalFence::new())).await?;
    for id in 0..READ_ONLY {
        for engine in [&strict, &textbook, &memory] {
            ground.read(engine, id).await?;
        }
    }

    // Each row's operation is made anew from clones, as it must own what it uses.
    macro_rules! rows {
        ($($name:literal $(/ $floor:literal)?: |$ground:ident $(, $engine:ident)?| $work:expr;)+) => {
            vec![$({
                let $ground = ground.clone();
                $(let $engine = $engine.clone();)?
                row($name, None $(.or(Some($floor)))?, move || {
                    let $ground = $ground.clone();
                    $(let $engine = $engine.clone();)?
                    async move { $work }
                })
            }),+]
        };
    }
    Ok(rows! {
        "bare GET": |g| Ok(g.get(g.read_only()).await?.is_some());
        "bare SELECT": |g| Ok(g.select(g.read_only()).await?.is_some());
        "bare GET, SELECT, SET": |g| {
            let id = g.absent();
            let found = g.get(id).await?.is_some() || g.select(id).await?.is_some();
            g.set(id, b"").await?;
            Ok(!found)
        };
        "bare UPDATE": |g| g.update(g.written()).await.map(|()| true);
        "bare UPDATE, SET": |g| {
            let id = g.written();
            g.update(id).await?;
            g.set(id, &g.value).await?;
            Ok(true)
        };
        "hit, in-process cache" / "bare GET": |g, memory| {
            Ok(g.read(&memory, g.read_only()).await? == ReadOutcome::Hit)
        };
        "hit" / "bare GET": |g, strict| {
            Ok(g.read(&strict, g.read_only()).await? == ReadOutcome::Hit)
        };
        "hit, textbook" / "bare GET": |g, textbook| {
            Ok(g.read(&textbook, g.read_only()).await? == ReadOutcome::Hit)
        };
        "miss" / "bare GET, SELECT, SET": |g, strict| {
            Ok(g.read(&strict, g.absent()).await? == ReadOutcome::Filled)
        };
        "miss, textbook" / "bare GET, SELECT, SET": |g, textbook| {
            Ok(g.read(&textbook, g.absent()).await? == ReadOutcome::Filled)
        };
        "read, off" / "bare SELECT": |g, off| {
            Ok(matches!(g.read(&off, g.read_only()).await?, ReadOutcome::Bypassed(_)))
        };
        "write" / "bare UPDATE, SET": |g, strict| {
            g.write(&strict, g.written()).await.map(|()| uses_cache(&strict))
        };
        "write, textbook" / "bare UPDATE, SET": |g, textbook| {
            g.write(&textbook, g.written()).await.map(|()| true)
        };
        "write, off" / "bare UPDATE": |g, off| {
            g.write(&off, g.written()).await.map(|()| true)
        };
    })
}

/// A service in this process, and items to read and to write.
struct Service {
    running: Running,
    client: reqwest::Client,
    base: String,
    read_only: Vec<String>,
    written: Vec<String>,
}

impl Service {
    async fn start(
        consistency: Consistency,
        postgres: &Postgres,
        redis: &Redis,
    ) -> Result<Arc<Self>, Failure> {
        let config = Config {
            listen: ([127, 0, 0, 1], 0).into(),
            database: Database::Postgres(postgres.url()),
            cache: CacheBackend::Redis(redis.url()),
            consistency,
            ..Config::default()
        };
        let running = Server::start(config).await?;
        let mut service = Self {
            base: format!("http://{}", running.addr()),
            running,
            client: reqwest::Client::new(),
            read_only: Vec::new(),
            written: Vec::new(),
        };
        let ready = format!("{}/readyz", service.base);
        until("the service is ready", PATIENCE, || async {
            let answer = service.client.get(&ready).send().await.ok()?;
            answer.status().is_success().then_some(())
        })
        .await?;
        for number in 0..200 {
            let body = serde_json::json!({"name": format!("item {number}"), "price": 1});
            let items = format!("{}/items", service.base);
            let answer = service.client.post(items).json(&body).send().await?;
            let path = answer.error_for_status()?.headers()["location"]
                .to_str()?
                .to_owned();
            let url = format!("{}{path}", service.base);
            service.get(&url).await?;
            match number % 2 {
                0 => service.read_only.push(url),
                _ => service.written.push(url),
            }
        }
        Ok(Arc::new(service))
    }

    /// Returns the `cache-status` of the answer.
    async fn get(&self, url: &str) -> Result<String, Failure> {
        let answer = self.client.get(url).send().await?.error_for_status()?;
        let status = answer.headers().get("cache-status");
        let status = status.map_or(Ok(""), |status| status.to_str())?.to_owned();
        answer.bytes().await?;
        Ok(status)
    }

    async fn put(&self) -> Result<(), Failure> {
        let url = &self.written[fastrand::usize(..self.written.len())];
        let body = serde_json::json!({"name": "written", "price": 2});
        let answer = self.client.put(url).json(&body).send().await?;
        answer.error_for_status()?.bytes().await?;
        Ok(())
    }

    fn reads(
        self: &Arc<Self>,
        name: &'static str,
        floor: Option<&'static str>,
        expected: &'static str,
    ) -> Row {
        let service = self.clone();
        row(name, floor, move || {
            let service = service.clone();
            async move {
                let url = &service.read_only[fastrand::usize(..service.read_only.len())];
                Ok(service.get(url).await?.contains(expected))
            }
        })
    }

    fn writes(self: &Arc<Self>, name: &'static str, floor: Option<&'static str>) -> Row {
        let service = self.clone();
        row(name, floor, move || {
            let service = service.clone();
            async move { service.put().await.map(|()| true) }
        })
    }
}

async fn over_http(
    postgres: &Postgres,
    redis: &Redis,
) -> Result<(Vec<Row>, Vec<Arc<Service>>), Failure> {
    let strict = Service::start(Consistency::Strict, postgres, redis).await?;
    let textbook = Service::start(Consistency::Textbook, postgres, redis).await?;
    let off = Service::start(Consistency::Off, postgres, redis).await?;
    let livez = strict.clone();
    let floor = row("GET /livez", None, move || {
        let service = livez.clone();
        async move {
            let url = format!("{}/livez", service.base);
            service.get(&url).await.map(|_| true)
        }
    });
    let rows = vec![
        floor,
        strict.reads("GET, hit", Some("GET /livez"), "hit"),
        textbook.reads("GET, hit, textbook", Some("GET /livez"), "hit"),
        off.reads("GET, off", Some("GET /livez"), "fwd=bypass"),
        off.writes("PUT, off", None),
        textbook.writes("PUT, textbook", Some("PUT, off")),
        strict.writes("PUT", Some("PUT, off")),
    ];
    Ok((rows, vec![strict, textbook, off]))
}

async fn compare(title: &str, rows: &[Row], rounds: usize) -> Result<(), Failure> {
    println!(
        "\n| {title} | compared with | 1 client: us | ratio | 64 clients: us | ratio | as named |"
    );
    println!("|---|---|---:|---:|---:|---:|---:|");
    // turns[clients][row][round]
    let mut turns: Vec<Vec<Vec<Turn>>> = Vec::new();
    for clients in CLIENTS {
        let mut of_rows: Vec<Vec<Turn>> = rows.iter().map(|_| Vec::new()).collect();
        for round in 0..=rounds {
            for (row, turns) in rows.iter().zip(&mut of_rows) {
                let turn = turn(&row.operation, clients)
                    .await
                    .map_err(|error| format!("{}: {error}", row.name))?;
                // The first round makes connections and prepares statements.
                if round > 0 {
                    turns.push(turn);
                }
            }
        }
        turns.push(of_rows);
    }
    for (index, row) in rows.iter().enumerate() {
        let floor = row
            .floor
            .and_then(|name| rows.iter().position(|row| row.name == name));
        print!("| {} | {} |", row.name, row.floor.unwrap_or(""));
        for of_rows in &turns {
            let own = &of_rows[index];
            print!(
                " {:.1} |",
                median(own.iter().map(|turn| turn.microseconds).collect())
            );
            match floor {
                None => print!(" |"),
                Some(floor) => {
                    let ratios = own.iter().zip(&of_rows[floor]);
                    let ratios = ratios.map(|(own, floor)| own.microseconds / floor.microseconds);
                    print!(" {:.2} |", median(ratios.collect()));
                }
            }
        }
        let shares = turns.iter().flat_map(|of_rows| &of_rows[index]);
        let shares: Vec<f64> = shares.map(|turn| turn.as_named).collect();
        let share = shares.iter().sum::<f64>() / shares.len() as f64;
        println!(" {:.1} % |", share * 100.0);
    }
    Ok(())
}

/// Binds this thread, and all that it starts, to the first processor that it may use.
fn stay_on_one_processor() -> std::io::Result<()> {
    let allowed = sched_getaffinity(None)?;
    let first = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu));
    let mut one = CpuSet::new();
    one.set(first.unwrap_or(0));
    Ok(sched_setaffinity(None, &one)?)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    stay_on_one_processor()?;
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let rounds = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => 8,
        ["--rounds", count] => count.parse::<usize>()?.max(1),
        _ => {
            return Err(
                "usage: cargo bench -p writethrough-service --bench cost [-- --rounds N]".into(),
            );
        }
    };
    let testbed = Testbed::new().await?;
    let (postgres, redis) = tokio::try_join!(testbed.postgres(), testbed.redis())?;
    println!("Microseconds for one operation, all clients together: median of {rounds} rounds.");
    compare("library", &library(&postgres, &redis).await?, rounds).await?;

    // A database of its own, as the fence's row has one owner.
    let (postgres, redis) = tokio::try_join!(testbed.postgres(), testbed.redis())?;
    let (rows, services) = over_http(&postgres, &redis).await?;
    compare("service, over HTTP", &rows, rounds).await?;
    drop(rows);
    for service in services {
        if let Some(service) = Arc::into_inner(service) {
            service.running.shutdown().await;
        }
    }
    Ok(())
}
