//! Private Redis servers.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use redis::{
    AsyncConnectionConfig, Client, FromRedisValue, IntoConnectionInfo, RedisConnectionInfo,
    RedisResult,
};
use rustix::process::Signal;

use crate::error::{Error, Result};
use crate::ground::Ground;
use crate::link::Link;
use crate::process::Reach;
use crate::program::{find_program, own_environment};
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
    /// As [`Redis::command`].
    pub async fn save(&self) -> Result<()> {
        self.command(&["SAVE"]).await
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
    /// As [`Redis::command`].
    pub async fn flush(&self) -> Result<()> {
        self.command(&["FLUSHALL"]).await
    }

    /// Makes this server follow `primary`, through a link of its own. It has caught up when this returns.
    ///
    /// # Errors
    ///
    /// As [`Redis::command`], and [`Error::TimedOut`] when it does not catch up within 30 s.
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
        self.command(&["REPLICAOF", "127.0.0.1", &link.addr().port().to_string()])
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
    /// As [`Redis::command`].
    pub async fn promote(&self) -> Result<()> {
        self.command(&["REPLICAOF", "NO", "ONE"]).await?;
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
    /// As [`Redis::command`].
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
        self.command(&command).await
    }

    /// Sends one command over a new connection, for its effect.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] when the server answers with an error, [`Error::Io`] when it cannot be reached,
    /// [`Error::TimedOut`] after 5 s.
    ///
    /// # Cancellation
    ///
    /// The command may have been carried out or not.
    pub async fn command(&self, command: &[&str]) -> Result<()> {
        self.query(command).await
    }

    /// Sends one command over a new connection and returns the answer.
    ///
    /// # Errors
    ///
    /// As [`Redis::command`], and [`Error::Io`] when the answer is not a `T`.
    ///
    /// # Cancellation
    ///
    /// The command may have been carried out or not.
    pub async fn query<T: FromRedisValue>(&self, command: &[&str]) -> Result<T> {
        let name = command.first().copied().unwrap_or_default();
        let answer = tokio::time::timeout(COMMAND_BOUND, ask(self.addr(), command)).await;
        let answer = answer.map_err(|_| Error::TimedOut {
            fact: format!("{} to answer {name}", self.name()),
            bound: COMMAND_BOUND,
            log: String::new(),
        })?;
        answer.map_err(|error| match error.code() {
            Some(code) => Error::Refused {
                server: self.name().to_owned(),
                command: command.join(" "),
                answer: format!("{code} {}", error.detail().unwrap_or_default()),
            },
            None => Error::Io {
                action: format!("ask {} to {name}", self.name()),
                source: std::io::Error::other(error),
            },
        })
    }

    /// One section of `INFO` (`server`, `replication`, `commandstats`, ...), by name of the field.
    ///
    /// # Errors
    ///
    /// As [`Redis::command`].
    pub async fn info(&self, section: &str) -> Result<HashMap<String, String>> {
        Ok(fields(&self.query::<String>(&["INFO", section]).await?))
    }

    /// The id that the server gave itself at its start: it changes with every restart.
    ///
    /// # Errors
    ///
    /// As [`Redis::command`].
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
        let ping = tokio::time::timeout(PROBE_BOUND, ask::<()>(self.addr(), &["PING"])).await;
        matches!(ping, Ok(Ok(())))
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
        let info =
            tokio::time::timeout(PROBE_BOUND, ask::<String>(self.addr(), &["INFO", "server"]))
                .await;
        let Ok(Ok(info)) = info else {
            return false;
        };
        let pid = fields(&info)
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

/// Sends one command over a new connection, so that the very server answers that runs now. The caller
/// bounds it.
async fn ask<T: FromRedisValue>(addr: SocketAddr, command: &[&str]) -> RedisResult<T> {
    // Nothing is sent before the command: tests count what a server is sent.
    let silent = RedisConnectionInfo::default().set_skip_set_lib_name();
    let server = (addr.ip().to_string(), addr.port()).into_connection_info()?;
    let unbounded = AsyncConnectionConfig::new()
        .set_connection_timeout(None)
        .set_response_timeout(None);
    let mut connection = Client::open(server.set_redis_settings(silent))?
        .get_multiplexed_async_connection_with_config(&unbounded)
        .await?;
    let mut request = redis::Cmd::new();
    request.arg(command);
    request.query_async(&mut connection).await
}

/// The fields of an answer to `INFO`.
fn fields(info: &str) -> HashMap<String, String> {
    let pairs = info.lines().filter_map(|line| line.split_once(':'));
    pairs
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}
