//! Everything that runs in a lab, and what can be done to it.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use futures::future;
use tokio::sync::Mutex;
use writethrough_service::listen;
use writethrough_testbed::{Child, Postgres, Redis, Snapshot, Testbed, find_program, free_port};

use crate::cluster::{self, Cluster, Consistency, Node, Serve};
use crate::monitoring;
use crate::request::{Change, RedisChange, Request, Store};
use crate::traces::Traces;

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
    pub(crate) consistency: Consistency,
    pub(crate) replica: bool,
    pub(crate) prometheus: bool,
}

/// A running lab. Dropping it ends everything and removes the folder.
pub(crate) struct Stack {
    prometheus: Result<(Child, SocketAddr), String>,
    traces: Traces,
    /// Held while something is changed: one change after the other.
    snapshot: Mutex<Option<Snapshot>>,
    consistency: Consistency,
    /// Dropped last: everything else runs in its folder.
    cluster: Cluster,
}

/// One server that can be stopped and started.
enum Server<'a> {
    Redis(&'a Redis),
    Postgres(&'a Postgres),
    Node(&'a Node, Consistency),
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
        let traces = Traces::collect().await?;
        let program = std::env::current_exe().context("cannot find the program itself")?;
        let nodes = addresses.iter().enumerate().map(|(index, address)| {
            let name = match index {
                0 => "api".to_owned(),
                _ => format!("api-{}", index + 1),
            };
            Serve::new(name, &program)
                .listen(*address)
                .consistency(plan.consistency)
                .flag("--otlp-endpoint", &traces.endpoint())
                .flag("--service-name", "api")
                .env("OTEL_BSP_SCHEDULE_DELAY", TRACE_DELAY_MS)
                .folder(testbed.folder())
        });
        let nodes = cluster::Plan {
            nodes: nodes.collect(),
            replica: plan.replica,
            // Whoever is to follow a new primary is led there.
            links: plan.replica,
        };
        let cluster = Cluster::start(testbed, nodes).await?;
        for node in cluster.nodes() {
            node.wait_until_caching(plan.consistency).await?;
        }
        let prometheus = if plan.prometheus {
            monitoring::start(cluster.testbed(), &addresses).await?
        } else {
            Err("not asked for".to_owned())
        };
        Ok(Self {
            prometheus,
            traces,
            snapshot: Mutex::default(),
            consistency: plan.consistency,
            cluster,
        })
    }

    /// The folder everything runs in.
    pub(crate) fn folder(&self) -> &Path {
        self.cluster.folder()
    }

    /// Lets the nodes end in an orderly way; dropping the stack does the rest.
    pub(crate) async fn end(&self) {
        let ends = self.cluster.nodes().iter().map(|node| async {
            // Whatever does not end now is killed with the testbed.
            let _ = node.process().resume().await;
            let _ = node.process().terminate(END_BOUND).await;
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
    pub(crate) async fn handle(&self, request: &Request) -> anyhow::Result<String> {
        match request {
            // Whoever listens at the socket brings the end.
            Request::Ping | Request::Down => Ok(String::new()),
            Request::Status => Ok(self.describe().await),
            Request::Url(name) => self.url(name),
            Request::Address(store) => Ok(self.address(*store).to_string()),
            Request::Log(name) => Ok(self.log(name)?.display().to_string()),
            Request::Trace(id) => self.traces.show(id.as_deref()).await,
            Request::Change(change, name) => {
                let _one = self.snapshot.lock().await;
                self.change(*change, name).await
            }
            Request::Redis(change) => self.change_redis(*change).await,
        }
    }

    async fn change_redis(&self, change: RedisChange) -> anyhow::Result<String> {
        let mut snapshot = self.snapshot.lock().await;
        let done = match change {
            RedisChange::Snapshot => {
                *snapshot = Some(self.cluster.redis().snapshot().await?);
                "snapshot taken"
            }
            RedisChange::Restore => {
                let Some(snapshot) = &*snapshot else {
                    bail!(
                        "there is no snapshot yet: take one with `writethrough lab snapshot redis`"
                    );
                };
                self.cluster.redis().restart_from(snapshot).await?;
                "restarted with the contents of the snapshot"
            }
            RedisChange::Lag => {
                self.replica()?.freeze_replication()?;
                "the replica receives nothing from now on"
            }
            RedisChange::FailOver => {
                let replica = self.replica()?;
                self.cluster.redis().kill().await?;
                replica.promote().await?;
                self.cluster.lead_to_other_redis()?;
                "the primary was killed, the replica is the primary now"
            }
        };
        Ok(format!("redis: {done}"))
    }

    /// The replica, while there is one.
    fn replica(&self) -> anyhow::Result<&Redis> {
        match self.cluster.other_redis() {
            Some(_) if self.cluster.has_failed_over() => {
                bail!("the replica is the primary already")
            }
            Some(replica) => Ok(replica),
            None => bail!("there is no replica: start the lab with `writethrough lab --replica`"),
        }
    }

    async fn change(&self, change: Change, name: &str) -> anyhow::Result<String> {
        let mut said = String::new();
        for server in self.servers(name)? {
            let name = server.name();
            let running = server.pid().is_some();
            let what = match change {
                Change::Stop | Change::Kill if !running => "is not running",
                Change::Stop => {
                    server.stop().await?;
                    "stopped"
                }
                Change::Kill => {
                    server.kill().await?;
                    "killed"
                }
                Change::Start if running => "is running already",
                Change::Start => {
                    server.start().await?;
                    "started"
                }
                Change::Pause => {
                    server.pause().await?;
                    "paused"
                }
                Change::Resume => {
                    server.resume().await?;
                    "resumed"
                }
            };
            let _ = writeln!(said, "{name}: {what}");
        }
        Ok(said)
    }

    fn servers(&self, name: &str) -> anyhow::Result<Vec<Server<'_>>> {
        Ok(match name {
            "redis" => vec![Server::Redis(self.cluster.redis())],
            "postgres" => vec![Server::Postgres(self.cluster.postgres())],
            name => {
                let nodes: Vec<_> = self
                    .cluster
                    .nodes()
                    .iter()
                    .filter(|node| name == "api" || name == node.name())
                    .map(|node| Server::Node(node, self.consistency))
                    .collect();
                if nodes.is_empty() {
                    bail!("there is no server `{name}`; there are {}", self.names());
                }
                nodes
            }
        })
    }

    fn names(&self) -> String {
        let nodes = self.cluster.nodes().iter().map(Node::name);
        let names: Vec<_> = ["redis", "postgres"].into_iter().chain(nodes).collect();
        names.join(", ")
    }

    fn address(&self, store: Store) -> SocketAddr {
        match store {
            Store::Postgres => self.cluster.postgres().addr(),
            Store::Redis => self.cluster.redis().addr(),
        }
    }

    fn url(&self, name: &str) -> anyhow::Result<String> {
        Ok(match (name, &self.prometheus) {
            ("postgres", _) => self.cluster.postgres().url(),
            ("redis", _) => self.cluster.redis().url(),
            ("prometheus", Ok((_, address))) => format!("http://{address}"),
            ("prometheus", Err(why)) => bail!("Prometheus does not run: {why}"),
            (name, _) => match self.cluster.nodes().iter().find(|node| node.name() == name) {
                Some(node) => node.url(),
                None => bail!("there is no server `{name}`; there are {}", self.names()),
            },
        })
    }

    fn log(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = match name {
            "postgres" => self.cluster.postgres().log_path(),
            "redis" => self.cluster.redis().log_path(),
            "api" => self.cluster.nodes()[0].process().log_path(),
            "prometheus" => match &self.prometheus {
                Ok((child, _)) => child.log_path(),
                Err(why) => bail!("Prometheus does not run: {why}"),
            },
            name => match self.cluster.nodes().iter().find(|node| node.name() == name) {
                Some(node) => node.process().log_path(),
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
        let looks = self.cluster.nodes().iter().map(look);
        for (node, note) in self
            .cluster
            .nodes()
            .iter()
            .zip(future::join_all(looks).await)
        {
            row(node.name(), state(node.process().pid()), &node.url(), &note);
        }
        let postgres = self.cluster.postgres();
        row(
            "postgres",
            state(postgres.pid()),
            &postgres.url(),
            "writethrough lab psql",
        );
        let redis = self.cluster.redis();
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

/// What a node says of itself.
async fn look(node: &Node) -> String {
    let health = node.get("/health").await;
    let health = health.and_then(|(_, body)| serde_json::from_slice(&body).ok());
    let Some(health): Option<serde_json::Value> = health else {
        return "does not answer".to_owned();
    };
    let word = |name: &str| health[name].as_str().unwrap_or("?");
    let (status, consistency, mode) = (word("status"), word("consistency"), word("mode"));
    format!("{status}, {consistency}, mode {mode}")
}

impl Server<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Redis(_) => "redis",
            Self::Postgres(_) => "postgres",
            Self::Node(node, _) => node.name(),
        }
    }

    fn pid(&self) -> Option<u32> {
        match self {
            Self::Redis(redis) => redis.pid(),
            Self::Postgres(postgres) => postgres.pid(),
            Self::Node(node, _) => node.process().pid(),
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
                node.process().terminate(DRAIN_BOUND).await?;
            }
        }
        Ok(())
    }

    async fn kill(&self) -> anyhow::Result<()> {
        match self {
            Self::Redis(redis) => redis.kill().await?,
            Self::Postgres(postgres) => postgres.kill().await?,
            Self::Node(node, _) => node.process().kill().await?,
        }
        Ok(())
    }

    async fn start(&self) -> anyhow::Result<()> {
        match self {
            Self::Redis(redis) => redis.start().await?,
            Self::Postgres(postgres) => postgres.start().await?,
            Self::Node(node, consistency) => {
                node.process().start().await?;
                // With Redis or Postgres down it may not get further than to listen.
                node.wait_for("/livez").await?;
                let cached = node.wait_until_caching(*consistency);
                let _ = tokio::time::timeout(CACHED_BOUND, cached).await;
            }
        }
        Ok(())
    }

    async fn pause(&self) -> anyhow::Result<()> {
        match self {
            Self::Redis(redis) => redis.pause().await?,
            Self::Postgres(postgres) => postgres.pause().await?,
            Self::Node(node, _) => node.process().pause().await?,
        }
        Ok(())
    }

    async fn resume(&self) -> anyhow::Result<()> {
        match self {
            Self::Redis(redis) => redis.resume().await?,
            Self::Postgres(postgres) => postgres.resume().await?,
            Self::Node(node, _) => node.process().resume().await?,
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
