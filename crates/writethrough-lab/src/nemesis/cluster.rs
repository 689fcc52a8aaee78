//! A cluster of API nodes on servers of its own, and how each fault is caused there and undone.
//!
//! Each node reaches Postgres and Redis through links of its own. Nothing is decided here about when a fault happens, and
//! nothing is judged.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper::{Method, StatusCode};
use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use writethrough_testbed::{
    Child, ChildSpec, Error, Link, Postgres, Redis, Testbed, free_port, until,
};

use super::{
    fault::{Fault, Hold},
    schedule::Planned,
    wait,
};
use writethrough_check::client::{Client, Reply, Target};

/// How long a node may take to become ready, and a cluster to become well.
const READY_BOUND: Duration = Duration::from_secs(30);
/// How long one look at a node may take.
const LOOK_BOUND: Duration = Duration::from_secs(2);
/// Pause between two flushes.
const FLUSH_PAUSE: Duration = Duration::from_millis(300);
/// Pause between two rounds of ending all connections to Postgres.
const TERMINATE_PAUSE: Duration = Duration::from_millis(700);

/// Other people's keys in a Redis that evicts: this many of 1 kB are there when the limit is set.
///
/// Several seconds' worth of what is written, because Redis counts idle time in whole seconds: with less, the least
/// recently used key could be one that is a few milliseconds old.
const BALLAST: usize = 4_000;
/// And this many are written in each [`BALLAST_PAUSE`].
const BALLAST_STEP: usize = 25;
const BALLAST_PAUSE: Duration = Duration::from_millis(50);
const BALLAST_AGE: Duration = Duration::from_millis(2_100);
/// So much less than it uses is Redis given.
const SHORTAGE_BYTES: u64 = 64 * 1024;

/// Writes ballast, from key number `ARGV[1]` to `ARGV[2]`.
const WRITE_BALLAST: &str = "for i = tonumber(ARGV[1]), tonumber(ARGV[2]) do \
    redis.call('SET', 'ballast:' .. i, string.rep('x', 1000)) end return 1";
/// Removes it.
const REMOVE_BALLAST: &str = "for i = tonumber(ARGV[1]), tonumber(ARGV[2]) do \
    redis.call('UNLINK', 'ballast:' .. i) end return 1";

/// What to start.
#[derive(Clone, Debug)]
pub struct ClusterSettings {
    /// Number of API nodes.
    pub nodes: usize,
    /// The program; it is run with `serve --listen ... --database ... --cache ... --consistency ...`.
    pub binary: PathBuf,
    /// `strict`, `textbook` or `off`.
    pub consistency: String,
    /// How long values stay cached, in seconds, when it is not the program's default.
    pub ttl_seconds: Option<u64>,
}

#[derive(Debug)]
struct Node {
    url: String,
    target: Arc<Target>,
    process: Child,
    redis: Link,
    postgres: Link,
}

/// A cluster. Dropping it ends all of it.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    postgres: Postgres,
    redis: [Redis; 2],
    /// Index of the primary.
    primary: AtomicUsize,
    holds: BTreeMap<Hold, Arc<Mutex<()>>>,
    /// Dropped last: it ends whatever is left.
    _testbed: Testbed,
}

impl Cluster {
    /// Starts Postgres, Redis with a replica, and the nodes; they are ready when this returns.
    ///
    /// # Errors
    ///
    /// When a server is not installed or a node does not become ready within 30 s; with the last lines of its log.
    ///
    /// # Cancellation
    ///
    /// Everything that was started ends.
    pub async fn start(settings: &ClusterSettings) -> Result<Self, Error> {
        let testbed = Testbed::new().await?;
        let (postgres, redis) = tokio::try_join!(testbed.postgres(), testbed.redis())?;
        let replica = testbed.redis_replica_of(&redis).await?;
        let mut nodes = Vec::new();
        for number in 0..settings.nodes {
            let to_redis = testbed.link(redis.addr()).await?;
            let to_postgres = testbed.link(postgres.addr()).await?;
            let listen = format!("127.0.0.1:{}", free_port());
            let mut command = ChildSpec::new(format!("node-{number}"), &settings.binary)
                .args(["serve", "--listen", &listen])
                .args(["--consistency", &settings.consistency])
                .args(["--database", &to_postgres.url_for(&postgres.url())])
                .args(["--cache", &to_redis.url_for(&redis.url())]);
            if let Some(ttl) = settings.ttl_seconds {
                command = command.args(["--ttl", &ttl.to_string()]);
            }
            let url = format!("http://{listen}");
            let target = Target::parse(&url).map_err(Error::Misuse)?;
            nodes.push(Node {
                url,
                target: Arc::new(target),
                process: testbed.child(command).await?,
                redis: to_redis,
                postgres: to_postgres,
            });
        }
        let mut holds = vec![Hold::Redis, Hold::Intents, Hold::Postgres];
        for node in 0..settings.nodes {
            holds.extend([
                Hold::RedisLink(node),
                Hold::PostgresLink(node),
                Hold::Node(node),
            ]);
        }
        let cluster = Self {
            nodes,
            postgres,
            redis: [redis, replica],
            primary: AtomicUsize::new(0),
            holds: holds
                .into_iter()
                .map(|hold| (hold, Arc::default()))
                .collect(),
            _testbed: testbed,
        };
        cluster.well().await?;
        Ok(cluster)
    }

    /// Number of nodes.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// The nodes' base addresses.
    #[must_use]
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.url.clone()).collect()
    }

    /// The source of truth.
    #[must_use]
    pub fn postgres(&self) -> &Postgres {
        &self.postgres
    }

    /// Waits until every node says that it is well: `GET /health` answers 200.
    ///
    /// # Errors
    ///
    /// After 30 s, with the last lines of the node's log.
    pub async fn well(&self) -> Result<(), Error> {
        for node in &self.nodes {
            self.answers(node, "/health").await?;
        }
        Ok(())
    }

    async fn answers(&self, node: &Node, path: &str) -> Result<(), Error> {
        let mut client = Client::new(Arc::clone(&node.target), LOOK_BOUND);
        let client = tokio::sync::Mutex::new(&mut client);
        let fact = format!("{} to answer {path} with 200", node.process.name());
        let answered = until(&fact, READY_BOUND, || async {
            match client.lock().await.send(Method::GET, path, None).await {
                Reply::Answer {
                    status: StatusCode::OK,
                    ..
                } => Some(()),
                _ => None,
            }
        });
        answered.await.map_err(|error| {
            let log = node.process.log_tail(20);
            Error::Misuse(format!("{error}\n{log}"))
        })
    }

    /// Waits until nobody else holds what a fault takes hold of, and holds it.
    pub(crate) async fn hold(&self, planned: &Planned) -> Vec<OwnedMutexGuard<()>> {
        let mut held = Vec::new();
        // All in one order, so that no two wait for each other.
        for hold in planned.fault.holds(planned.node, self.nodes.len()) {
            if let Some(lock) = self.holds.get(&hold) {
                held.push(Arc::clone(lock).lock_owned().await);
            }
        }
        held
    }

    /// The primary and the replica.
    fn servers(&self) -> (&Redis, &Redis) {
        let primary = self.primary.load(Ordering::SeqCst);
        (&self.redis[primary], &self.redis[1 - primary])
    }

    /// Causes a fault, lets its time pass, or less when the end comes first, and undoes it.
    ///
    /// # Errors
    ///
    /// When a server did not do what it was told. The cluster is of no more use then.
    pub(crate) async fn inflict(
        &self,
        planned: &Planned,
        stopped: &mut watch::Receiver<bool>,
    ) -> Result<(), Error> {
        let node = &self.nodes[planned.node];
        let (redis, replica) = self.servers();
        let length = planned.length;
        match planned.fault {
            Fault::KillRedis => {
                redis.kill().await?;
                wait(length, stopped).await;
                redis.start().await
            }
            Fault::PauseRedis => {
                redis.pause().await?;
                wait(length, stopped).await;
                redis.resume().await
            }
            Fault::SlowRedis => {
                for node in &self.nodes {
                    node.redis.delay(planned.delay);
                }
                wait(length, stopped).await;
                for node in &self.nodes {
                    node.redis.heal();
                }
                Ok(())
            }
            Fault::FlushRedis => {
                let flush = || redis.flush();
                repeat(length, FLUSH_PAUSE, stopped, flush).await
            }
            Fault::EvictRedis => evict(redis, length, stopped).await,
            Fault::RestartRedisEmpty => {
                redis.restart_empty().await?;
                wait(length, stopped).await;
                Ok(())
            }
            Fault::RestartRedisOldSnapshot => {
                // It cannot save while it feeds a replica.
                let snapshot = until("a snapshot of Redis", READY_BOUND, || async {
                    redis.snapshot().await.ok()
                });
                let snapshot = snapshot.await?;
                wait(length, stopped).await;
                redis.restart_from(&snapshot).await
            }
            Fault::LaggingFailover => {
                replica.wait_caught_up_with(redis).await?;
                replica.freeze_replication()?;
                wait(length, stopped).await;
                redis.kill().await?;
                replica.promote().await?;
                for node in &self.nodes {
                    node.redis.retarget(replica.addr());
                }
                self.swap().await
            }
            Fault::TakeOverRedis => {
                replica.wait_caught_up_with(redis).await?;
                replica.promote().await?;
                wait(length, stopped).await;
                redis.replicate(replica).await?;
                redis.promote().await?;
                replica.restart_empty().await?;
                replica.replicate(redis).await
            }
            Fault::SplitRedis => {
                replica.promote().await?;
                // One node is left behind, or all but one.
                let most = planned.delay.as_millis().is_multiple_of(2);
                for (number, node) in self.nodes.iter().enumerate() {
                    if (number == planned.node) != most {
                        node.redis.retarget(replica.addr());
                    }
                }
                wait(length, stopped).await;
                for node in &self.nodes {
                    if node.redis.target() != replica.addr() {
                        node.redis.retarget(replica.addr());
                    }
                }
                self.swap().await
            }
            Fault::NodeCutFromRedis => {
                node.redis.cut();
                wait(length, stopped).await;
                node.redis.heal();
                Ok(())
            }
            Fault::NodeStalledFromRedis => {
                node.redis.stall();
                wait(length, stopped).await;
                node.redis.heal();
                Ok(())
            }
            Fault::NodeCutFromPostgres => {
                node.postgres.cut();
                wait(length, stopped).await;
                node.postgres.heal();
                Ok(())
            }
            Fault::KillNode => {
                node.process.kill().await?;
                wait(length, stopped).await;
                node.process.start().await?;
                self.answers(node, "/readyz").await
            }
            Fault::PauseNode => {
                node.process.pause().await?;
                wait(length, stopped).await;
                node.process.resume().await
            }
            Fault::RestartPostgres => {
                self.postgres.stop().await?;
                wait(length, stopped).await;
                self.postgres.start().await
            }
            Fault::KillPostgresConnections => {
                let terminate = || async { self.postgres.terminate_connections().await.map(drop) };
                repeat(length, TERMINATE_PAUSE, stopped, terminate).await
            }
        }
    }

    /// Makes the promoted replica the primary, and the old primary its replica, without the old data.
    async fn swap(&self) -> Result<(), Error> {
        let (old, new) = self.servers();
        old.restart_empty().await?;
        old.replicate(new).await?;
        self.primary.fetch_xor(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Does something over and over, at least once.
async fn repeat<F: Future<Output = Result<(), Error>>>(
    length: Duration,
    pause: Duration,
    stopped: &mut watch::Receiver<bool>,
    mut act: impl FnMut() -> F,
) -> Result<(), Error> {
    let end = tokio::time::Instant::now() + length;
    loop {
        act().await?;
        let left = end.saturating_duration_since(tokio::time::Instant::now());
        if wait(pause.min(left), stopped).await || left <= pause {
            return Ok(());
        }
    }
}

/// Fills Redis with ballast, limits its memory to what it uses then, and goes on writing.
async fn evict(
    redis: &Redis,
    length: Duration,
    stopped: &mut watch::Receiver<bool>,
) -> Result<(), Error> {
    let mut last = 0;
    ballast(redis, WRITE_BALLAST, 1, BALLAST).await?;
    // Two ticks of the clock by which Redis counts idle time: now the ballast is older than any intent.
    wait(BALLAST_AGE, stopped).await;
    let before = number(redis, "stats", "evicted_keys").await?;
    let used = number(redis, "memory", "used_memory").await?;
    let not_counted = number(redis, "memory", "mem_not_counted_for_evict").await?;
    let limit = used.saturating_sub(not_counted + SHORTAGE_BYTES);
    redis.set_maxmemory(limit, "allkeys-lru").await?;
    let end = tokio::time::Instant::now() + length;
    loop {
        let first = BALLAST + last + 1;
        last += BALLAST_STEP;
        ballast(redis, WRITE_BALLAST, first, BALLAST + last).await?;
        if wait(BALLAST_PAUSE, stopped).await || tokio::time::Instant::now() >= end {
            break;
        }
    }
    let evicted = number(redis, "stats", "evicted_keys").await? - before;
    redis.set_maxmemory(0, "noeviction").await?;
    ballast(redis, REMOVE_BALLAST, 1, BALLAST + last).await?;
    if evicted == 0 {
        return Err(Error::Misuse("Redis evicted nothing".to_owned()));
    }
    Ok(())
}

/// Runs a script on the ballast from number `from` to number `to`, in steps that do not hold up others.
async fn ballast(redis: &Redis, script: &str, from: usize, to: usize) -> Result<(), Error> {
    for first in (from..=to).step_by(200) {
        let last = to.min(first + 199);
        let (first, last) = (first.to_string(), last.to_string());
        redis.command(&["EVAL", script, "0", &first, &last]).await?;
    }
    Ok(())
}

/// A number that Redis tells about itself.
async fn number(redis: &Redis, section: &str, field: &str) -> Result<u64, Error> {
    let told = redis.info(section).await?.remove(field);
    told.and_then(|text| text.parse().ok())
        .ok_or_else(|| Error::Misuse(format!("{} tells no {field}", redis.name())))
}
