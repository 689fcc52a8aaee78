//! Everything that runs in a lab, and what can be done to it.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use futures::future;
use tokio::sync::Mutex;
use writethrough_service::listen;
use writethrough_testbed::{
    Child, ChildSpec, Link, Postgres, Redis, Snapshot, Testbed, find_program, free_port, until,
};

use crate::control::Request;
use crate::traces::Traces;
use crate::{look, monitoring};

/// How long a node may take until it serves from the cache.
const READY_BOUND: Duration = Duration::from_secs(30);
/// How long a node may take to end in an orderly way.
const DRAIN_BOUND: Duration = Duration::from_secs(12);
/// The same at the end of the lab, where nobody needs its last answers.
const END_BOUND: Duration = Duration::from_secs(3);
/// How long the start of one node waits for the cache, which may have to wait for a server that is down.
const CACHED_BOUND: Duration = Duration::from_secs(5);
/// The most a node sends of its traces at a time, and how often: a person waits for them.
const TRACE_DELAY_MS: &str = "200";

/// What to start.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) nodes: u16,
    pub(crate) listen: SocketAddr,
    pub(crate) consistency: String,
    pub(crate) replica: bool,
    pub(crate) prometheus: bool,
}

/// A running lab. Dropping it ends everything and removes the folder.
pub(crate) struct Stack {
    nodes: Vec<Node>,
    prometheus: Result<(Child, SocketAddr), String>,
    postgres: Postgres,
    /// The first primary and, with `--replica`, its replica.
    redis: Vec<Redis>,
    /// Which of them is the primary now.
    primary: AtomicUsize,
    /// The address that follows the primary.
    front: Option<Link>,
    traces: Traces,
    /// Held while something is changed: one change after the other.
    snapshot: Mutex<Option<Snapshot>>,
    consistency: String,
    testbed: Testbed,
}

struct Node {
    name: String,
    child: Child,
    address: SocketAddr,
}

/// One server that can be stopped and started.
enum Server<'a> {
    Redis(&'a Redis),
    Postgres(&'a Postgres),
    Node(&'a Node, &'a str),
}

impl Stack {
    /// Starts everything; all of it serves when this returns.
    ///
    /// # Errors
    ///
    /// What is not installed, or the last lines of the log of what did not start.
    ///
    /// # Cancellation
    ///
    /// What was started is ended, and the folder removed.
    pub(crate) async fn start(folder: &Path, plan: Plan) -> anyhow::Result<Self> {
        for program in ["initdb", "postgres", "psql", "redis-server"] {
            find_program(program)?;
        }
        let addresses = addresses(&plan).await?;
        let testbed = Testbed::in_folder(folder).await?;
        let (postgres, primary) = tokio::try_join!(testbed.postgres(), testbed.redis())?;
        let mut redis = vec![primary];
        let mut front = None;
        if plan.replica {
            front = Some(testbed.link(redis[0].addr()).await?);
            redis.push(testbed.redis_replica_of(&redis[0]).await?);
        }
        let traces = Traces::collect().await?;
        let cache = match &front {
            Some(link) => link.url_for(&redis[0].url()),
            None => redis[0].url(),
        };
        let program = std::env::current_exe().context("cannot find the program itself")?;
        let mut nodes = Vec::new();
        for (index, address) in addresses.into_iter().enumerate() {
            let name = match index {
                0 => "api".to_owned(),
                _ => format!("api-{}", index + 1),
            };
            let spec = ChildSpec::new("api", &program)
                .arg("serve")
                .args(["--listen", &address.to_string()])
                .args(["--database", &postgres.url()])
                .args(["--cache", &cache])
                .args(["--consistency", &plan.consistency])
                .args(["--otlp-endpoint", &traces.endpoint()])
                .args(["--service-name", "api"])
                .env("OTEL_BSP_SCHEDULE_DELAY", TRACE_DELAY_MS)
                .folder(testbed.folder());
            let child = testbed.child(spec).await?;
            nodes.push(Node {
                name,
                child,
                address,
            });
        }
        for node in &nodes {
            node.wait_ready(&plan.consistency).await?;
        }
        let prometheus = if plan.prometheus {
            let targets: Vec<_> = nodes.iter().map(|node| node.address).collect();
            monitoring::start(&testbed, &targets).await?
        } else {
            Err("not asked for".to_owned())
        };
        Ok(Self {
            nodes,
            prometheus,
            postgres,
            redis,
            primary: AtomicUsize::new(0),
            front,
            traces,
            snapshot: Mutex::default(),
            consistency: plan.consistency,
            testbed,
        })
    }

    /// The folder everything runs in.
    pub(crate) fn folder(&self) -> &Path {
        self.testbed.folder()
    }

    /// Lets the nodes end in an orderly way; dropping the stack does the rest.
    pub(crate) async fn end(&self) {
        let ends = self.nodes.iter().map(|node| async {
            // Whatever does not end now is killed with the testbed.
            let _ = node.child.resume().await;
            let _ = node.child.terminate(END_BOUND).await;
        });
        future::join_all(ends).await;
    }

    /// Does what another terminal asks for, and says what was done.
    ///
    /// # Errors
    ///
    /// A server that does not exist or does not come up, a command that needs another one first.
    ///
    /// # Cancellation
    ///
    /// The server may be up or down; `status` tells.
    pub(crate) async fn obey(&self, request: &Request) -> anyhow::Result<String> {
        let word = request.word.as_deref();
        match request.verb.as_str() {
            "ping" => Ok(String::new()),
            "status" => Ok(self.describe().await),
            "url" => self.url(word.unwrap_or_default()),
            "address" => self.address(word.unwrap_or_default()),
            "log" => {
                let path = self.log(word.unwrap_or_default())?;
                Ok(path.display().to_string())
            }
            "trace" => self.traces.show(word).await,
            verb => {
                let mut snapshot = self.snapshot.lock().await;
                match verb {
                    "snapshot" => {
                        *snapshot = Some(self.primary().snapshot().await?);
                        Ok("redis: snapshot taken".to_owned())
                    }
                    "restore" => {
                        let Some(snapshot) = &*snapshot else {
                            bail!(
                                "there is no snapshot yet: take one with `writethrough lab snapshot redis`"
                            );
                        };
                        self.primary().restart_from(snapshot).await?;
                        Ok("redis: restarted with the contents of the snapshot".to_owned())
                    }
                    "lag" => {
                        self.replica()?.freeze_replication()?;
                        Ok("redis: the replica receives nothing from now on".to_owned())
                    }
                    "failover" => self.fail_over().await,
                    verb => self.change(verb, word.unwrap_or_default()).await,
                }
            }
        }
    }

    fn primary(&self) -> &Redis {
        &self.redis[self.primary.load(Ordering::Relaxed)]
    }

    /// The replica, while there is one.
    fn replica(&self) -> anyhow::Result<&Redis> {
        match (self.redis.get(1), self.primary.load(Ordering::Relaxed)) {
            (Some(replica), 0) => Ok(replica),
            (Some(_), _) => bail!("the replica is the primary already"),
            (None, _) => {
                bail!("there is no replica: start the lab with `writethrough lab --replica`")
            }
        }
    }

    async fn fail_over(&self) -> anyhow::Result<String> {
        let replica = self.replica()?;
        self.primary().kill().await?;
        replica.promote().await?;
        if let Some(front) = &self.front {
            front.retarget(replica.addr());
        }
        self.primary.store(1, Ordering::Relaxed);
        Ok("redis: the primary was killed, the replica is the primary now".to_owned())
    }

    async fn change(&self, verb: &str, name: &str) -> anyhow::Result<String> {
        let mut said = String::new();
        for server in self.servers(name)? {
            let name = server.name();
            let running = server.pid().is_some();
            let what = match verb {
                "stop" | "kill" if !running => "is not running",
                "stop" => {
                    server.stop().await?;
                    "stopped"
                }
                "kill" => {
                    server.kill().await?;
                    "killed"
                }
                "start" if running => "is running already",
                "start" => {
                    server.start().await?;
                    "started"
                }
                "pause" => {
                    server.pause().await?;
                    "paused"
                }
                "resume" => {
                    server.resume().await?;
                    "resumed"
                }
                other => bail!("this lab does not know `{other}`: is it another version?"),
            };
            let _ = writeln!(said, "{name}: {what}");
        }
        Ok(said)
    }

    fn servers(&self, name: &str) -> anyhow::Result<Vec<Server<'_>>> {
        Ok(match name {
            "redis" => vec![Server::Redis(self.primary())],
            "postgres" => vec![Server::Postgres(&self.postgres)],
            name => {
                let nodes: Vec<_> = self
                    .nodes
                    .iter()
                    .filter(|node| name == "api" || name == node.name)
                    .map(|node| Server::Node(node, &self.consistency))
                    .collect();
                if nodes.is_empty() {
                    bail!("there is no server `{name}`; there are {}", self.names());
                }
                nodes
            }
        })
    }

    fn names(&self) -> String {
        let nodes = self.nodes.iter().map(|node| node.name.as_str());
        let names: Vec<_> = ["redis", "postgres"].into_iter().chain(nodes).collect();
        names.join(", ")
    }

    fn address(&self, name: &str) -> anyhow::Result<String> {
        Ok(match name {
            "postgres" => self.postgres.addr().to_string(),
            "redis" => self.primary().addr().to_string(),
            other => bail!("there is no address of `{other}`"),
        })
    }

    fn url(&self, name: &str) -> anyhow::Result<String> {
        Ok(match (name, &self.prometheus) {
            ("postgres", _) => self.postgres.url(),
            ("redis", _) => self.primary().url(),
            ("prometheus", Ok((_, address))) => format!("http://{address}"),
            ("prometheus", Err(why)) => bail!("Prometheus does not run: {why}"),
            (name, _) => match self.nodes.iter().find(|node| node.name == name) {
                Some(node) => format!("http://{}", node.address),
                None => bail!("there is no server `{name}`; there are {}", self.names()),
            },
        })
    }

    fn log(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = match name {
            "postgres" => self.postgres.log_path(),
            "redis" => self.primary().log_path(),
            "api" => self.nodes[0].child.log_path(),
            "prometheus" => match &self.prometheus {
                Ok((child, _)) => child.log_path(),
                Err(why) => bail!("Prometheus does not run: {why}"),
            },
            name => match self.nodes.iter().find(|node| node.name == name) {
                Some(node) => node.child.log_path(),
                None => bail!(
                    "there is no server `{name}`; there are {}, prometheus",
                    self.names()
                ),
            },
        };
        Ok(path.to_owned())
    }

    /// What runs, where, and in which state: a table.
    pub(crate) async fn describe(&self) -> String {
        let mut text = String::new();
        let mut row = |name: &str, state: &str, place: &str, note: &str| {
            let line = format!("  {name:<11}{state:<9}{place:<47}{note}");
            let _ = writeln!(text, "{}", line.trim_end());
        };
        let looks = self.nodes.iter().map(Node::look);
        for (node, note) in self.nodes.iter().zip(future::join_all(looks).await) {
            let url = format!("http://{}", node.address);
            row(&node.name, state(node.child.pid()), &url, &note);
        }
        let postgres = &self.postgres;
        row(
            "postgres",
            state(postgres.pid()),
            &postgres.url(),
            "writethrough lab psql",
        );
        let redis = self.primary();
        row(
            "redis",
            state(redis.pid()),
            &redis.url(),
            "writethrough lab redis-cli",
        );
        if let Ok(replica) = self.replica() {
            row("replica", state(replica.pid()), &replica.url(), "");
        }
        match &self.prometheus {
            Ok((child, address)) => {
                let url = format!("http://{address}");
                row("prometheus", state(child.pid()), &url, "");
            }
            Err(why) => row("prometheus", "absent", why, ""),
        }
        row("traces", "running", "in the lab", "writethrough lab trace");
        text
    }
}

impl Node {
    /// Waits until it serves, and from the cache if it is to.
    async fn wait_ready(&self, consistency: &str) -> anyhow::Result<()> {
        until(
            &format!("{} to serve, see its log", self.name),
            READY_BOUND,
            || async {
                if !self.child.is_running() {
                    return Some(());
                }
                let stats = self.json("/cache/stats").await?;
                (consistency != "strict" || stats["mode"] == "cached").then_some(())
            },
        )
        .await?;
        self.must_run()
    }

    /// Waits until it answers at all.
    async fn wait_alive(&self) -> anyhow::Result<()> {
        until(
            &format!("{} to answer, see its log", self.name),
            READY_BOUND,
            || async {
                let alive = look::get(self.address, "/livez").await.is_some();
                (alive || !self.child.is_running()).then_some(())
            },
        )
        .await?;
        self.must_run()
    }

    fn must_run(&self) -> anyhow::Result<()> {
        if !self.child.is_running() {
            bail!("{} ended:\n{}", self.name, self.child.log_tail(5));
        }
        Ok(())
    }

    async fn json(&self, path: &str) -> Option<serde_json::Value> {
        let (status, body) = look::get(self.address, path).await?;
        if !status.is_success() && path != "/health" {
            return None;
        }
        serde_json::from_slice(&body).ok()
    }

    /// What it says of itself.
    async fn look(&self) -> String {
        match self.json("/health").await {
            Some(health) => {
                let word = |name: &str| health[name].as_str().unwrap_or("?").to_owned();
                format!(
                    "{}, {}, mode {}",
                    word("status"),
                    word("consistency"),
                    word("mode")
                )
            }
            None => "does not answer".to_owned(),
        }
    }
}

impl Server<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Redis(_) => "redis",
            Self::Postgres(_) => "postgres",
            Self::Node(node, _) => &node.name,
        }
    }

    fn pid(&self) -> Option<u32> {
        match self {
            Self::Redis(redis) => redis.pid(),
            Self::Postgres(postgres) => postgres.pid(),
            Self::Node(node, _) => node.child.pid(),
        }
    }

    async fn stop(&self) -> anyhow::Result<()> {
        // A frozen process would not see the signal.
        if is_paused(self.pid()) {
            self.resume().await?;
        }
        match self {
            Self::Redis(redis) => redis.stop().await?,
            Self::Postgres(postgres) => postgres.stop().await?,
            Self::Node(node, _) => {
                node.child.terminate(DRAIN_BOUND).await?;
            }
        }
        Ok(())
    }

    async fn kill(&self) -> anyhow::Result<()> {
        match self {
            Self::Redis(redis) => redis.kill().await?,
            Self::Postgres(postgres) => postgres.kill().await?,
            Self::Node(node, _) => node.child.kill().await?,
        }
        Ok(())
    }

    async fn start(&self) -> anyhow::Result<()> {
        match self {
            Self::Redis(redis) => redis.start().await?,
            Self::Postgres(postgres) => postgres.start().await?,
            Self::Node(node, consistency) => {
                node.child.start().await?;
                // With Redis or Postgres down it may not get further than to listen.
                node.wait_alive().await?;
                let _ = tokio::time::timeout(CACHED_BOUND, node.wait_ready(consistency)).await;
            }
        }
        Ok(())
    }

    async fn pause(&self) -> anyhow::Result<()> {
        match self {
            Self::Redis(redis) => redis.pause().await?,
            Self::Postgres(postgres) => postgres.pause().await?,
            Self::Node(node, _) => node.child.pause().await?,
        }
        Ok(())
    }

    async fn resume(&self) -> anyhow::Result<()> {
        match self {
            Self::Redis(redis) => redis.resume().await?,
            Self::Postgres(postgres) => postgres.resume().await?,
            Self::Node(node, _) => node.child.resume().await?,
        }
        Ok(())
    }
}

/// Where the nodes will listen. Each place is free now, so that what answers there is the node.
async fn addresses(plan: &Plan) -> anyhow::Result<Vec<SocketAddr>> {
    let mut addresses = Vec::new();
    for index in 0..plan.nodes {
        let mut address = plan.listen;
        address.set_port(match plan.listen.port() {
            0 => free_port(),
            first => first
                .checked_add(index)
                .context("there are not enough ports above --listen for so many nodes")?,
        });
        let listener = listen::bind(address).await;
        let bound = listener.and_then(|listener| listener.local_addr());
        addresses.push(bound.with_context(|| {
            format!(
                "--listen (WRITETHROUGH_LAB_LISTEN): a node cannot listen on {address}; use a \
                 free address"
            )
        })?);
    }
    Ok(addresses)
}

fn state(pid: Option<u32>) -> &'static str {
    match pid {
        None => "stopped",
        Some(_) if is_paused(pid) => "paused",
        Some(_) => "running",
    }
}

/// Whether the kernel holds the process (SIGSTOP).
fn is_paused(pid: Option<u32>) -> bool {
    let Some(pid) = pid else {
        return false;
    };
    // The name, in parentheses, may contain anything; the state follows the last one.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('T'))
    })
}
