//! A cluster: Postgres, Redis with or without a replica, and API nodes, on private servers. The lab, the nemesis and the tests
//! that need nodes build theirs here.
//!
//! Nothing is broken here, and nothing is judged.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use clap::ValueEnum;
use futures::future;
use hyper::{Method, StatusCode};
use writethrough_check::client::{Client, Reply, Target};
use writethrough_testbed::{
    Child, ChildSpec, Error, Link, Postgres, Redis, Result, Testbed, free_port, until,
};

/// How long a node may take to become ready, and a cluster to become healthy.
pub const READY_BOUND: Duration = Duration::from_secs(30);
/// How long one request to a server may take.
const REQUEST_BOUND: Duration = Duration::from_secs(2);

/// How nodes keep the cache: the values of `serve --consistency`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Consistency {
    /// Linearizable.
    #[default]
    Strict,
    /// Commit, then SET: not linearizable.
    Textbook,
    /// No cache.
    Off,
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Strict => "strict",
            Self::Textbook => "textbook",
            Self::Off => "off",
        })
    }
}

/// How one node is started: `writethrough serve` with its flags.
#[derive(Clone, Debug)]
pub struct Serve {
    name: String,
    listen: SocketAddr,
    command: ChildSpec,
}

impl Serve {
    /// Describes a node of this name that listens on a free port of 127.0.0.1, with the program's defaults.
    #[must_use]
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>) -> Self {
        let name = name.into();
        Self {
            command: ChildSpec::new(&name, program).arg("serve"),
            listen: ([127, 0, 0, 1], free_port()).into(),
            name,
        }
    }

    /// Describes a further node like this one, with a number in its name, on another free port.
    #[must_use]
    pub fn sibling(&self, number: usize) -> Self {
        let name = format!("{}-{number}", self.name);
        let mut command = self.command.clone();
        command.name.clone_from(&name);
        Self {
            name,
            listen: ([127, 0, 0, 1], free_port()).into(),
            command,
        }
    }

    /// Sets the address to listen on.
    #[must_use]
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = address;
        self
    }

    /// Sets the store.
    #[must_use]
    pub fn database(self, url: &str) -> Self {
        self.flag("--database", url)
    }

    /// Sets the cache.
    #[must_use]
    pub fn cache(self, url: &str) -> Self {
        self.flag("--cache", url)
    }

    /// Sets how the node keeps the cache.
    #[must_use]
    pub fn consistency(self, consistency: Consistency) -> Self {
        self.flag("--consistency", &consistency.to_string())
    }

    /// Adds a flag with its value.
    #[must_use]
    pub fn flag(mut self, name: &str, value: &str) -> Self {
        self.command = self.command.args([name, value]);
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command = self.command.env(name, value);
        self
    }

    /// Sets the folder to run in.
    #[must_use]
    pub fn folder(mut self, folder: &Path) -> Self {
        self.command = self.command.folder(folder);
        self
    }

    /// Starts the node. It need not listen yet when this returns.
    ///
    /// # Errors
    ///
    /// When the program cannot be started.
    pub async fn start(self, testbed: &Testbed) -> Result<Node> {
        let command = self.command.args(["--listen", &self.listen.to_string()]);
        Ok(Node {
            name: self.name,
            address: self.listen,
            process: testbed.child(command).await?,
            links: None,
        })
    }
}

/// The links through which a node reaches the stores.
#[derive(Debug)]
struct Links {
    redis: Link,
    postgres: Link,
}

/// One API node. Dropping it kills it.
#[derive(Debug)]
pub struct Node {
    name: String,
    address: SocketAddr,
    process: Child,
    links: Option<Links>,
}

impl Node {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its base URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Child {
        &self.process
    }

    /// Its link to Redis.
    ///
    /// # Errors
    ///
    /// The node was started without links.
    pub fn redis(&self) -> Result<&Link> {
        self.links().map(|links| &links.redis)
    }

    /// Its link to Postgres.
    ///
    /// # Errors
    ///
    /// The node was started without links.
    pub fn postgres(&self) -> Result<&Link> {
        self.links().map(|links| &links.postgres)
    }

    fn links(&self) -> Result<&Links> {
        let without = || Error::Misuse(format!("{} has no links to the stores", self.name));
        self.links.as_ref().ok_or_else(without)
    }

    /// Sends `GET path`, and returns the answer if a whole one comes.
    pub async fn get(&self, path: &str) -> Option<(StatusCode, Bytes)> {
        get(self.address, path).await
    }

    /// Waits until `GET path` is answered with 200.
    ///
    /// # Errors
    ///
    /// After 30 s, with the last lines of the node's log.
    pub async fn wait_for(&self, path: &str) -> Result<()> {
        let answered = || async { self.get(path).await?.0.is_success().then_some(()) };
        self.wait_until(&format!("answer {path} with 200"), answered)
            .await
    }

    /// Waits until the node serves, and from the cache if it is a strict one.
    ///
    /// # Errors
    ///
    /// After 30 s, or when the node has ended; with the last lines of its log.
    pub async fn wait_until_caching(&self, consistency: Consistency) -> Result<()> {
        let cached = || async {
            let (status, body) = self.get("/cache/stats").await?;
            let stats: serde_json::Value = serde_json::from_slice(&body).ok()?;
            let caches = consistency != Consistency::Strict || stats["mode"] == "cached";
            (status.is_success() && caches).then_some(())
        };
        self.wait_until("serve", cached).await
    }

    async fn wait_until<F: Future<Output = Option<()>>>(
        &self,
        what: &str,
        look: impl Fn() -> F,
    ) -> Result<()> {
        let name = self.process.name();
        let waited = until(&format!("{name} to {what}"), READY_BOUND, || {
            let seen = look();
            async {
                match seen.await {
                    None if !self.process.is_running() => Some(Err("it ended")),
                    seen => seen.map(Ok),
                }
            }
        })
        .await;
        let failed = match waited {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(ended)) => format!("{name} did not {what}: {ended}"),
            Err(error) => error.to_string(),
        };
        let log = self.process.log_tail(10);
        Err(Error::Misuse(format!("{failed}\n{log}")))
    }
}

/// Sends `GET path` to a server, and returns the answer if a whole one comes in time.
pub(crate) async fn get(address: SocketAddr, path: &str) -> Option<(StatusCode, Bytes)> {
    let target = Target::parse(&format!("http://{address}")).ok()?;
    let mut client = Client::new(Arc::new(target), REQUEST_BOUND);
    match client.send(Method::GET, path, None).await {
        Reply::Answer { status, body, .. } => Some((status, body)),
        Reply::NotSent(_) | Reply::Lost(_) => None,
    }
}

/// What to start. Each node gets a store and a cache.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The nodes.
    pub nodes: Vec<Serve>,
    /// Whether Redis has a replica.
    pub replica: bool,
    /// Whether each node reaches the stores through links of its own.
    pub links: bool,
}

/// A cluster. Dropping it ends all of it.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    postgres: Postgres,
    /// One server, or the first primary and its replica.
    redis: Vec<Redis>,
    /// Index of the primary.
    primary: AtomicUsize,
    /// Dropped last: it ends whatever is left.
    testbed: Testbed,
}

impl Cluster {
    /// Starts the servers and then the nodes, which need not be ready when this returns.
    ///
    /// # Errors
    ///
    /// When a program is not installed or a server does not start; with the last lines of its log.
    ///
    /// # Cancellation
    ///
    /// Everything that was started ends.
    pub async fn start(testbed: Testbed, plan: Plan) -> Result<Self> {
        let (postgres, primary) = tokio::try_join!(testbed.postgres(), testbed.redis())?;
        let mut redis = vec![primary];
        if plan.replica {
            redis.push(testbed.redis_replica_of(&redis[0]).await?);
        }
        let mut nodes = Vec::new();
        for serve in plan.nodes {
            let (mut database, mut cache) = (postgres.url(), redis[0].url());
            let mut links = None;
            if plan.links {
                let redis = testbed.link(redis[0].addr()).await?;
                let postgres = testbed.link(postgres.addr()).await?;
                (database, cache) = (postgres.url_for(&database), redis.url_for(&cache));
                links = Some(Links { redis, postgres });
            }
            let serve = serve.database(&database).cache(&cache);
            let node = serve.start(&testbed).await?;
            nodes.push(Node { links, ..node });
        }
        Ok(Self {
            nodes,
            postgres,
            redis,
            primary: AtomicUsize::new(0),
            testbed,
        })
    }

    /// Starts so many nodes like `serve`, behind links, in a testbed of its own.
    ///
    /// # Errors
    ///
    /// As [`Cluster::start`].
    pub async fn behind_links(nodes: usize, replica: bool, serve: &Serve) -> Result<Self> {
        let plan = Plan {
            nodes: (0..nodes).map(|number| serve.sibling(number)).collect(),
            replica,
            links: true,
        };
        Self::start(Testbed::new().await?, plan).await
    }

    /// The nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The nodes' base URLs.
    #[must_use]
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(Node::url).collect()
    }

    /// The store.
    #[must_use]
    pub fn postgres(&self) -> &Postgres {
        &self.postgres
    }

    /// The Redis server that the nodes are led to.
    #[must_use]
    pub fn redis(&self) -> &Redis {
        &self.redis[self.primary.load(Ordering::SeqCst)]
    }

    /// The other Redis server, if there are two: the replica, or the primary of before.
    #[must_use]
    pub fn other_redis(&self) -> Option<&Redis> {
        self.redis.get(1 - self.primary.load(Ordering::SeqCst))
    }

    /// Makes the other Redis server the primary: all links lead to it from now on.
    ///
    /// # Errors
    ///
    /// There is one server only, or the nodes have no links.
    pub fn lead_to_other_redis(&self) -> Result<()> {
        let Some(other) = self.other_redis() else {
            return Err(Error::Misuse("there is no other Redis".to_owned()));
        };
        for node in &self.nodes {
            let link = node.redis()?;
            // A link that leads there already keeps its connections.
            if link.target() != other.addr() {
                link.retarget(other.addr());
            }
        }
        self.primary.fetch_xor(1, Ordering::SeqCst);
        Ok(())
    }

    /// Whether the first Redis server is the primary no more.
    #[must_use]
    pub fn has_failed_over(&self) -> bool {
        self.primary.load(Ordering::SeqCst) != 0
    }

    /// The folder everything runs in.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.testbed.folder()
    }

    /// What else runs in the cluster's folder is started here.
    #[must_use]
    pub fn testbed(&self) -> &Testbed {
        &self.testbed
    }

    /// Waits until every node says that it is well: `GET /health` answers 200.
    ///
    /// # Errors
    ///
    /// After 30 s, with the last lines of the node's log.
    pub async fn wait_until_healthy(&self) -> Result<()> {
        let nodes = self.nodes.iter().map(|node| node.wait_for("/health"));
        future::try_join_all(nodes).await.map(drop)
    }
}
