//! Private Redis servers.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::process::Signal;

use crate::error::{Error, Result};
use crate::ground::Ground;
use crate::link::Link;
use crate::process::Reach;
use crate::program::{find_program, own_environment};
use crate::resp::{Reply, ask};
use crate::server::Server;

const START_BOUND: Duration = Duration::from_secs(30);
const STOP_BOUND: Duration = Duration::from_secs(10);
const SYNC_BOUND: Duration = Duration::from_secs(30);
/// How long a command may take.
const COMMAND_BOUND: Duration = Duration::from_secs(5);
const PROBE_BOUND: Duration = Duration::from_millis(500);

/// The file that holds the data of a server that was told to save them.
const DUMP: &str = "dump.rdb";

/// A private Redis server, without persistence unless it is told to save.
///
/// It listens on a port of 127.0.0.1 that it keeps over restarts. Dropping it kills it.
///
/// A replica follows its primary through a [`Link`] of its own, so that it can be made to lag; it goes on
/// following over its own restarts, until it is promoted. What `CONFIG SET` changes ends with a restart.
///
/// Calls that start, end or pause the server wait for each other.
#[derive(Debug)]
pub struct Redis {
    server: Server,
    program: PathBuf,
    folder: PathBuf,
    /// What it is told beside the port, the folder and not to save.
    options: Vec<String>,
    snapshots: AtomicU32,
    replication: Mutex<Replication>,
}

#[derive(Debug, Default)]
struct Replication {
    /// The way to the primary, kept after a promotion for the next time.
    link: Option<Link>,
    follows: bool,
}

/// A copy of the data that a Redis server had at some moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    path: PathBuf,
}

impl Snapshot {
    /// The RDB file. It goes with the testbed.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Redis {
    pub(crate) async fn launch(ground: &Ground, options: &[&str]) -> Result<Self> {
        let program = find_program("redis-server")?;
        let (name, folder) = ground.folder_for("redis")?;
        let redis = Self {
            server: Server::new(ground, name, &folder, Reach::Group)?,
            program,
            folder,
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            snapshots: AtomicU32::new(0),
            replication: Mutex::default(),
        };
        redis.start_now().await?;
        Ok(redis)
    }

    /// A URL to connect with.
    pub fn url(&self) -> String {
        format!("redis://{}", self.addr())
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.addr().port()
    }

    /// Its name in the testbed.
    pub fn name(&self) -> &str {
        self.server.process().name()
    }

    /// The process id of the server, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.server.process().pid()
    }

    /// The server's log, over all its runs.
    pub fn log_path(&self) -> &Path {
        self.server.process().log()
    }

    /// Kills the server with SIGKILL. It is gone when this returns; its data are what it saved last.
    ///
    /// # Errors
    ///
    /// When the kernel does not end it within 10 s.
    pub async fn kill(&self) -> Result<()> {
        let _change = self.server.change().await;
        self.server.process().kill().await
    }

    /// Stops the server in an orderly way (SIGTERM), without saving.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] when it does not end within 10 s.
    pub async fn stop(&self) -> Result<()> {
        let _change = self.server.change().await;
        self.server.stop(Signal::TERM, STOP_BOUND).await
    }

    /// Starts the server again, on the same port, with what it saved last. It serves when this returns.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] when it runs; otherwise with the last lines of its log.
    ///
    /// # Cancellation
    ///
    /// The server may run or not; after a `kill` it can be started again. So it is with every restart.
    pub async fn start(&self) -> Result<()> {
        let _change = self.server.change().await;
        self.start_now().await
    }

    /// Kills the server and starts it without any data. A replica then takes its primary's data again.
    ///
    /// # Errors
    ///
    /// As [`Redis::kill`] and [`Redis::start`].
    pub async fn restart_empty(&self) -> Result<()> {
        let _change = self.server.change().await;
        self.server.process().kill().await?;
        match std::fs::remove_file(self.dump()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("remove {}", self.dump().display()))(
                    error,
                ));
            }
            _ => {}
        }
        self.start_now().await
    }

    /// Kills the server and starts it with the data of a snapshot, its own or another server's.
    ///
    /// # Errors
    ///
    /// As [`Redis::kill`] and [`Redis::start`].
    pub async fn restart_from(&self, snapshot: &Snapshot) -> Result<()> {
        let _change = self.server.change().await;
        self.server.process().kill().await?;
        std::fs::copy(&snapshot.path, self.dump())
            .map_err(Error::io(format!("copy {}", snapshot.path.display())))?;
        self.start_now().await
    }

    /// Saves the data, so that they survive a kill and a start.
    ///
    /// # Errors
    ///
    /// As [`Redis::order`].
    pub async fn save(&self) -> Result<()> {
        self.order(&["SAVE"]).await.map(|_| ())
    }

    /// Saves the data and keeps a copy aside.
    ///
    /// # Errors
    ///
    /// As [`Redis::save`], and when the copy cannot be made.
    pub async fn snapshot(&self) -> Result<Snapshot> {
        let _change = self.server.change().await;
        self.save().await?;
        let number = self.snapshots.fetch_add(1, Relaxed);
        let path = self.folder.join(format!("snapshot-{number}.rdb"));
        std::fs::copy(self.dump(), &path)
            .map_err(Error::io(format!("copy {}", self.dump().display())))?;
        Ok(Snapshot { path })
    }

    /// Stops the server where it is (SIGSTOP): connections stay open, and the kernel even accepts new ones,
    /// but nobody answers.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] when it is not running.
    pub async fn pause(&self) -> Result<()> {
        self.server.pause().await
    }

    /// Lets a paused server go on.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] when it is not running.
    pub async fn resume(&self) -> Result<()> {
        self.server.resume().await
    }

    /// Removes all data (`FLUSHALL`).
    ///
    /// # Errors
    ///
    /// As [`Redis::order`].
    pub async fn flush(&self) -> Result<()> {
        self.order(&["FLUSHALL"]).await.map(|_| ())
    }

    /// Makes this server follow `primary`, through a link of its own. It has caught up when this returns.
    ///
    /// # Errors
    ///
    /// As [`Redis::order`], and [`Error::TimedOut`] when it does not catch up within 30 s.
    pub async fn replicate(&self, primary: &Self) -> Result<()> {
        let existing = self.replication.lock().link.clone();
        let link = match existing {
            Some(link) => {
                link.retarget(primary.addr());
                link.heal();
                link
            }
            None => {
                let link = Link::open(primary.addr()).await?;
                self.replication.lock().link.get_or_insert(link).clone()
            }
        };
        self.order(&["REPLICAOF", "127.0.0.1", &link.addr().port().to_string()])
            .await?;
        self.replication.lock().follows = true;
        self.wait_caught_up_with(primary).await
    }

    /// Waits until this replica has everything that `primary` has.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] after 30 s.
    pub async fn wait_caught_up_with(&self, primary: &Self) -> Result<()> {
        self.server
            .process()
            .until(
                &format!("to catch up with {}", primary.name()),
                SYNC_BOUND,
                || async {
                    let theirs = primary.info("replication").await.ok()?;
                    let ours = self.info("replication").await.ok()?;
                    let caught_up = ours.get("role").is_some_and(|role| role == "slave")
                        && ours
                            .get("master_link_status")
                            .is_some_and(|status| status == "up")
                        && ours.get("master_replid") == theirs.get("master_replid")
                        && ours.get("slave_repl_offset") == theirs.get("master_repl_offset");
                    caught_up.then_some(())
                },
            )
            .await
    }

    /// Makes this server a primary (`REPLICAOF NO ONE`), with whatever it has.
    ///
    /// # Errors
    ///
    /// As [`Redis::order`].
    pub async fn promote(&self) -> Result<()> {
        self.order(&["REPLICAOF", "NO", "ONE"]).await?;
        self.replication.lock().follows = false;
        Ok(())
    }

    /// Holds back what the primary sends to this replica: nothing that is written after this returns
    /// arrives, and the replica does not notice (it would after 60 s).
    ///
    /// Call [`Redis::wait_caught_up_with`] first when what was written before must have arrived.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] when this server never was a replica.
    pub fn freeze_replication(&self) -> Result<()> {
        self.replication_link().map(|link| link.stall())
    }

    /// Lets pass what [`Redis::freeze_replication`] held back.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] when this server never was a replica.
    pub fn thaw_replication(&self) -> Result<()> {
        self.replication_link().map(|link| link.heal())
    }

    /// The link through which this server follows, or last followed, its primary.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] when this server never was a replica.
    pub fn replication_link(&self) -> Result<Link> {
        let link = self.replication.lock().link.clone();
        link.ok_or_else(|| Error::Misuse(format!("{} never was a replica", self.name())))
    }

    /// Limits the memory, and says what is evicted (`allkeys-lru`, `noeviction`, ...). 0 is no limit.
    ///
    /// # Errors
    ///
    /// As [`Redis::order`].
    pub async fn set_maxmemory(&self, bytes: u64, policy: &str) -> Result<()> {
        let bytes = bytes.to_string();
        let command = [
            "CONFIG",
            "SET",
            "maxmemory",
            &bytes,
            "maxmemory-policy",
            policy,
        ];
        self.order(&command).await.map(|_| ())
    }

    /// Sends one command over a new connection and returns the answer; an error of the server is
    /// [`Reply::Error`], so that a test can look at it.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the server cannot be reached, [`Error::TimedOut`] after 5 s.
    ///
    /// # Cancellation
    ///
    /// The command may have been carried out or not.
    pub async fn command(&self, command: &[&str]) -> Result<Reply> {
        let name = command.first().copied().unwrap_or_default();
        match tokio::time::timeout(COMMAND_BOUND, ask(self.addr(), command)).await {
            Ok(answer) => answer.map_err(Error::io(format!("ask {} to {name}", self.name()))),
            Err(_) => Err(Error::TimedOut {
                fact: format!("{} to answer {name}", self.name()),
                bound: COMMAND_BOUND,
                log: String::new(),
            }),
        }
    }

    /// The same, but an error of the server is an error.
    ///
    /// # Errors
    ///
    /// As [`Redis::command`], and [`Error::Refused`].
    pub async fn order(&self, command: &[&str]) -> Result<Reply> {
        match self.command(command).await? {
            Reply::Error(answer) => Err(Error::Refused {
                server: self.name().to_owned(),
                command: command.join(" "),
                answer,
            }),
            reply => Ok(reply),
        }
    }

    /// One section of `INFO` (`server`, `replication`, `commandstats`, ...), by name of the field.
    ///
    /// # Errors
    ///
    /// As [`Redis::order`].
    pub async fn info(&self, section: &str) -> Result<HashMap<String, String>> {
        Ok(fields(&self.order(&["INFO", section]).await?))
    }

    /// The id that the server gave itself at its start: it changes with every restart.
    ///
    /// # Errors
    ///
    /// As [`Redis::order`].
    pub async fn run_id(&self) -> Result<String> {
        self.info("server")
            .await?
            .remove("run_id")
            .ok_or_else(|| Error::Refused {
                server: self.name().to_owned(),
                command: "INFO server".to_owned(),
                answer: "no run_id".to_owned(),
            })
    }

    /// Whether it answers a PING within half a second.
    pub async fn is_up(&self) -> bool {
        let ping = tokio::time::timeout(PROBE_BOUND, ask(self.addr(), &["PING"])).await;
        matches!(ping, Ok(Ok(Reply::Status(pong))) if pong == "PONG")
    }

    fn dump(&self) -> PathBuf {
        self.folder.join(DUMP)
    }

    async fn start_now(&self) -> Result<()> {
        // The first fact is that this very server has its port, the second that it serves: it may
        // still be loading its data.
        let serves = || async { self.has_its_port().await && self.is_up().await };
        self.server
            .start(START_BOUND, || self.start_command(), serves)
            .await
    }

    fn start_command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["--bind", "127.0.0.1", "--port", &self.port().to_string()]);
        command.args([
            "--save",
            "",
            "--appendonly",
            "no",
            "--dbfilename",
            DUMP,
            "--dir",
        ]);
        // A replica that asks for the data gets them at once, not with others 5 s later.
        command
            .arg(&self.folder)
            .args(["--repl-diskless-sync-delay", "0"])
            .args(&self.options);
        {
            let replication = self.replication.lock();
            if let (Some(link), true) = (&replication.link, replication.follows) {
                let port = link.addr().port().to_string();
                command.args(["--replicaof", "127.0.0.1", &port]);
            }
        }
        own_environment(&mut command, &[])
            .current_dir(&self.folder)
            .env("LC_ALL", "C")
            .env("TZ", "UTC");
        command
    }

    async fn has_its_port(&self) -> bool {
        let info = tokio::time::timeout(PROBE_BOUND, ask(self.addr(), &["INFO", "server"])).await;
        let Ok(Ok(reply)) = info else {
            return false;
        };
        let pid = fields(&reply)
            .get("process_id")
            .and_then(|pid| pid.parse().ok());
        pid.is_some() && pid == self.pid()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.server.process().close();
        if let Some(link) = self.replication.lock().link.take() {
            link.close();
        }
    }
}

/// The fields of an answer to `INFO`.
fn fields(info: &Reply) -> HashMap<String, String> {
    let text = info.text().unwrap_or_default();
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}
