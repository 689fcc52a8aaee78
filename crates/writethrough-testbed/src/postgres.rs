//! Private Postgres servers.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Signal, geteuid};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::error::{Error, Result};
use crate::ground::{Ground, temporary_folder};
use crate::link::Link;
use crate::process::{Reach, run};
use crate::program::{User, find_program};
use crate::reaper::Reaper;
use crate::server::Server;

const USER: &str = "labuser";
const DATABASE: &str = "items_db";

/// How long the first `initdb` on a busy machine may take.
const TOOL_BOUND: Duration = Duration::from_secs(120);
const START_BOUND: Duration = Duration::from_secs(60);
const STOP_BOUND: Duration = Duration::from_secs(20);
const SQL_BOUND: Duration = Duration::from_secs(30);
const PROBE_BOUND: Duration = Duration::from_secs(1);

/// The longest path of a Unix socket, less the name of the socket file.
const SOCKET_FOLDER_BYTES: usize = 107 - ".s.PGSQL.65535".len();

/// What every server's `postgresql.conf` ends with.
///
/// Nothing is flushed to the disk: commits survive the death of every process, but not of the machine.
/// Shared memory is in files of the data folder, so that a killed server leaves none behind.
const SETTINGS: &str = "
listen_addresses = '127.0.0.1'
max_connections = 100
shared_buffers = 16MB
huge_pages = off
dynamic_shared_memory_type = mmap
fsync = off
full_page_writes = off
min_wal_size = 8MB
timezone = 'UTC'
log_timezone = 'UTC'
log_line_prefix = '%m [%p] '
";

/// What is added when the extension is installed.
const STATEMENTS: &str = "shared_preload_libraries = 'pg_stat_statements'\n";

/// A private Postgres server with a superuser `labuser` and a database `items_db`, without a password.
///
/// It listens on a port of 127.0.0.1 that it keeps over restarts. The extension `pg_stat_statements` is
/// ready for use when the machine has it. Dropping the server kills it and removes its data.
///
/// Calls that start, end or pause the server wait for each other.
#[derive(Debug)]
pub struct Postgres {
    server: Server,
    reaper: Arc<Reaper>,
    programs: Programs,
    folder: PathBuf,
    /// The way to the primary, of a server that was made as a standby.
    replication: Option<Link>,
}

impl Postgres {
    pub(crate) async fn launch(ground: &Arc<Ground>) -> Result<Self> {
        Self::launch_from(ground, None).await
    }

    /// A standby of `primary`, or, without one, a server of its own.
    pub(crate) async fn launch_from(ground: &Arc<Ground>, primary: Option<&Self>) -> Result<Self> {
        let programs = Programs::find()?;
        if let Some(user) = programs.user {
            user.must_reach(&ground.folder)?;
        }
        let (name, folder) = ground.folder_for("postgres")?;
        programs.give(&folder)?;
        let data = folder.join("data");
        let replication = match primary {
            None => {
                programs.copy_template(ground, &data).await?;
                None
            }
            Some(primary) => {
                let link = Link::open(primary.addr()).await?;
                programs.copy_primary(ground, &link, &data).await?;
                Some(link)
            }
        };

        let postgres = Self {
            server: Server::new(ground, name, &folder, Reach::Postgres(data))?,
            reaper: ground.reaper.clone(),
            programs,
            folder,
            replication,
        };
        postgres.start_now().await?;
        Ok(postgres)
    }

    /// A URL with user and database, to connect with.
    pub fn url(&self) -> String {
        format!("postgresql://{USER}@{}/{DATABASE}", self.addr())
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

    /// The process id of the postmaster, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.server.process().pid()
    }

    /// The server's log, over all its runs.
    pub fn log_path(&self) -> &Path {
        self.server.process().log()
    }

    /// Kills every process of the server with SIGKILL, whatever they are doing. They are gone when this
    /// returns. What was committed is kept.
    ///
    /// # Errors
    ///
    /// When the kernel does not end them within 10 s.
    pub async fn kill(&self) -> Result<()> {
        let _change = self.server.change().await;
        self.server.process().kill().await?;
        self.clear_remains();
        Ok(())
    }

    /// Stops the server the fast way: transactions are rolled back, connections closed.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] when it does not end within 20 s.
    pub async fn stop(&self) -> Result<()> {
        let _change = self.server.change().await;
        self.stop_now().await
    }

    async fn stop_now(&self) -> Result<()> {
        self.server.stop(Signal::INT, STOP_BOUND).await
    }

    /// Starts the server again, on the same port and data. It takes connections when this returns.
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

    /// Stops the server and starts it again.
    ///
    /// # Errors
    ///
    /// As [`Postgres::stop`] and [`Postgres::start`].
    pub async fn restart(&self) -> Result<()> {
        let _change = self.server.change().await;
        self.stop_now().await?;
        self.start_now().await
    }

    /// Stops every process of the server where it is (SIGSTOP): connections stay open, and the kernel
    /// even accepts new ones, but nobody answers.
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

    /// Ends all connections of clients, as an administrator would; returns how many. They are gone when
    /// this returns.
    ///
    /// # Errors
    ///
    /// As [`Postgres::run`].
    pub async fn terminate_connections(&self) -> Result<u64> {
        let ended = self
            .run(
                "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid, 5000)) FROM pg_stat_activity \
                 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()",
            )
            .await?;
        ended
            .parse()
            .map_err(|_| Error::Misuse(format!("{} counted `{ended}`", self.name())))
    }

    /// Runs SQL with `psql` and returns the rows: one line each, with `|` between the columns.
    ///
    /// Several statements run in one transaction.
    ///
    /// # Errors
    ///
    /// [`Error::Ended`] with the server's words when it refuses a statement, [`Error::TimedOut`] after 30 s.
    ///
    /// # Cancellation
    ///
    /// `psql` is killed; the statement may have been carried out or not.
    pub async fn run(&self, sql: &str) -> Result<String> {
        let mut command = self.programs.command("psql", None);
        command.args([
            "-X",
            "-q",
            "-A",
            "-t",
            "-v",
            "ON_ERROR_STOP=1",
            "-h",
            "127.0.0.1",
            "-p",
        ]);
        command
            .arg(self.port().to_string())
            .args(["-U", USER, "-d", DATABASE, "-c", sql]);
        command.env("PGCONNECT_TIMEOUT", "10").stdin(Stdio::null());
        let name = format!("psql on {}", self.name());
        let output = run(&name, command, &self.reaper, SQL_BOUND).await?;
        Ok(output.trim_end_matches('\n').to_owned())
    }

    /// The way of a standby to its primary: stalled, the standby lags.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] for a server that was not made as a standby.
    pub fn replication_link(&self) -> Result<Link> {
        let not_one = || Error::Misuse(format!("{} is not a standby", self.name()));
        self.replication.clone().ok_or_else(not_one)
    }

    /// Waits until this standby has replayed what `primary` has committed.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] after 60 s; as [`Postgres::run`].
    pub async fn wait_caught_up_with(&self, primary: &Self) -> Result<()> {
        let written = primary.run("SELECT pg_current_wal_lsn()").await?;
        let query = format!("SELECT pg_last_wal_replay_lsn() >= '{written}'");
        self.server
            .process()
            .until("to catch up", START_BOUND, || async {
                let caught_up = self.run(&query).await;
                caught_up.is_ok_and(|answer| answer == "t").then_some(())
            })
            .await
    }

    /// Makes this standby a primary, with what it has received. It takes writes when this returns.
    ///
    /// # Errors
    ///
    /// As [`Postgres::run`].
    pub async fn promote(&self) -> Result<()> {
        let promoted = self.run("SELECT pg_promote(true, 30)").await?;
        match promoted.as_str() {
            "t" => Ok(()),
            _ => Err(Error::Misuse(format!("{} was not promoted", self.name()))),
        }
    }

    /// Whether it takes connections now, asked over a new connection.
    pub async fn is_up(&self) -> bool {
        probe(self.addr()).await
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    async fn start_now(&self) -> Result<()> {
        // The first fact is that this very server has its port, the second that it serves.
        let serves = || async { self.says_ready() && probe(self.addr()).await };
        self.server
            .start(START_BOUND, || self.start_command(), serves)
            .await
    }

    fn start_command(&self) -> Command {
        let mut command = self.programs.command("postgres", self.programs.user);
        command
            .arg("-D")
            .arg(self.data())
            .arg("-p")
            .arg(self.port().to_string());
        let sockets = self.folder.as_os_str();
        let sockets = if sockets.len() <= SOCKET_FOLDER_BYTES {
            sockets
        } else {
            "".as_ref()
        };
        command.arg("-k").arg(sockets).current_dir(self.data());
        command
    }

    /// Whether the postmaster has written that it is ready: its process id on line 1, its state on line 8.
    fn says_ready(&self) -> bool {
        let Ok(file) = std::fs::read_to_string(self.data().join("postmaster.pid")) else {
            return false;
        };
        let mut lines = file.lines();
        let pid = lines.next().and_then(|line| line.trim().parse().ok());
        let state = lines.nth(6).map(str::trim);
        pid.is_some() && pid == self.pid() && matches!(state, Some("ready" | "standby"))
    }

    /// Removes what a killed server leaves: its lock files, which could name a process id that is in use
    /// again, and the shared memory segment that line 7 of one of them names.
    fn clear_remains(&self) {
        let lock_file = self.data().join("postmaster.pid");
        if let Ok(file) = std::fs::read_to_string(&lock_file) {
            let segment = file
                .lines()
                .nth(6)
                .and_then(|line| line.split_whitespace().nth(1));
            if let Some(segment) = segment {
                // It is gone already if the server has ended in an orderly way.
                let mut remove = self.programs.command("ipcrm", None);
                let _ = remove.args(["-m", segment]).stderr(Stdio::null()).status();
            }
            let _ = std::fs::remove_file(lock_file);
        }
        let socket = self.folder.join(format!(".s.PGSQL.{}", self.port()));
        let _ = std::fs::remove_file(socket.with_extension(format!("PGSQL.{}.lock", self.port())));
        let _ = std::fs::remove_file(socket);
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.server.process().close();
        self.clear_remains();
        let _ = std::fs::remove_dir_all(self.data());
    }
}

/// Whether a server answers a startup packet and becomes ready for a query.
async fn probe(addr: SocketAddr) -> bool {
    let connect = async {
        let mut stream = TcpStream::connect(addr).await.ok()?;
        let mut packet = 196_608_i32.to_be_bytes().to_vec();
        for word in ["user", USER, "database", DATABASE, ""] {
            packet.extend_from_slice(word.as_bytes());
            packet.push(0);
        }
        stream.write_i32(packet.len() as i32 + 4).await.ok()?;
        stream.write_all(&packet).await.ok()?;
        loop {
            let kind = stream.read_u8().await.ok()?;
            let length = usize::try_from(stream.read_i32().await.ok()?)
                .ok()?
                .checked_sub(4)?;
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await.ok()?;
            match kind {
                b'Z' => break,
                b'E' => return None,
                _ => {}
            }
        }
        // Say goodbye, so that the log stays clean.
        stream.write_all(b"X\0\0\0\x04").await.ok()
    };
    tokio::time::timeout(PROBE_BOUND, connect)
        .await
        .ok()
        .flatten()
        .is_some()
}

/// The programs of one installed version, and whom they run as.
#[derive(Debug, Clone)]
struct Programs {
    folder: PathBuf,
    user: Option<User>,
}

impl Programs {
    /// Takes all programs from the folder of the server itself: Debian's `psql` in `PATH` is a slow script.
    fn find() -> Result<Self> {
        let postgres = find_program("postgres")?;
        let postgres = postgres
            .canonicalize()
            .map_err(Error::io("find the folder of postgres"))?;
        let folder = postgres.parent().map(Path::to_owned).unwrap_or_default();
        Ok(Self {
            folder,
            user: User::unprivileged()?,
        })
    }

    /// A command whose environment says nothing about other servers.
    fn command(&self, program: &str, user: Option<User>) -> Command {
        let sibling = self.folder.join(program);
        let mut command = Command::new(if sibling.exists() {
            sibling
        } else {
            program.into()
        });
        command
            .env_clear()
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .current_dir("/");
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        if let Some(user) = user {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    /// Gives a folder to the user that the server runs as.
    fn give(&self, folder: &Path) -> Result<()> {
        match self.user {
            Some(user) => std::os::unix::fs::chown(folder, Some(user.uid), Some(user.gid))
                .map_err(Error::io(format!("give away {}", folder.display()))),
            None => Ok(()),
        }
    }

    /// Makes a data folder as a copy of the template, which is made first if there is none.
    async fn copy_template(&self, ground: &Arc<Ground>, data: &Path) -> Result<()> {
        // Within one process the first one makes the template and the others wait.
        static MAKING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

        let template = self.template(ground).await?;
        for _ in 0..3 {
            if template.is_whole() {
                self.copy(ground, &template.data(), data).await?;
                if count_files(data) == template.files() {
                    return Ok(());
                }
                std::fs::remove_dir_all(data).map_err(Error::io("remove an incomplete copy"))?;
            }
            let _making = MAKING.lock().await;
            if !template.is_whole() {
                self.make_template(ground, &template).await?;
            }
        }
        Err(Error::Misuse(format!(
            "the template {} does not last",
            template.folder.display()
        )))
    }

    /// Makes a data folder as a standby's of the server that the link leads to.
    async fn copy_primary(&self, ground: &Arc<Ground>, link: &Link, data: &Path) -> Result<()> {
        let mut command = self.command("pg_basebackup", self.user);
        command
            .arg("-D")
            .arg(data)
            .args(["-h", "127.0.0.1", "-U", USER, "-X", "stream", "-c", "fast"])
            .args(["--no-sync", "-p", &link.addr().port().to_string()]);
        run("pg_basebackup", command, &ground.reaper, TOOL_BOUND).await?;
        let action = || format!("write the settings of {}", data.display());
        let settings = data.join("postgresql.conf");
        let standard = std::fs::read_to_string(&settings).map_err(Error::io(action()))?;
        let conninfo = format!("host=127.0.0.1 port={} user={USER}", link.addr().port());
        std::fs::write(
            &settings,
            format!("{standard}\nprimary_conninfo = '{conninfo}'\n"),
        )
        .map_err(Error::io(action()))?;
        let signal = data.join("standby.signal");
        std::fs::write(&signal, "").map_err(Error::io(action()))?;
        self.give(&signal)
    }

    /// Where the template of this version and these settings is.
    async fn template(&self, ground: &Ground) -> Result<Template> {
        let mut command = self.command("postgres", self.user);
        command.arg("--version");
        let version = run("postgres --version", command, &ground.reaper, TOOL_BOUND).await?;
        let mut hasher = DefaultHasher::new();
        (version, SETTINGS, STATEMENTS, &self.folder).hash(&mut hasher);
        let owner = self
            .user
            .map_or_else(|| geteuid().as_raw(), |user| user.uid);
        let name = format!(
            "writethrough-postgres-template-{owner}-{:016x}",
            hasher.finish()
        );
        Ok(Template {
            folder: temporary_folder()?.join(name),
            owner,
        })
    }

    /// Makes the template in a folder of the testbed and moves it to its place in one step. When another
    /// process was faster, its template stays.
    async fn make_template(&self, ground: &Arc<Ground>, template: &Template) -> Result<()> {
        let (name, folder) = ground.folder_for("postgres-template")?;
        self.give(&folder)?;
        let data = folder.join("data");

        let mut initdb = self.command("initdb", self.user);
        initdb
            .arg("-D")
            .arg(&data)
            .args(["-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C"]);
        initdb.args(["--no-sync", "--no-instructions", "--wal-segsize=1"]);
        run("initdb", initdb, &ground.reaper, TOOL_BOUND).await?;

        self.single(
            ground,
            &folder,
            &[],
            "postgres",
            &format!("CREATE DATABASE {DATABASE}"),
        )
        .await?;
        let preload = ["-c", "shared_preload_libraries=pg_stat_statements"];
        let create = "CREATE EXTENSION pg_stat_statements";
        let statements = match self
            .single(ground, &folder, &preload, DATABASE, create)
            .await
        {
            Ok(()) => STATEMENTS,
            // It is not installed.
            Err(Error::Ended { .. }) => "",
            Err(error) => return Err(error),
        };
        let action = || format!("write the settings of {name}");
        let settings = data.join("postgresql.conf");
        let standard = std::fs::read_to_string(&settings).map_err(Error::io(action()))?;
        std::fs::write(&settings, format!("{standard}{SETTINGS}{statements}"))
            .map_err(Error::io(action()))?;
        let files = count_files(&data).unwrap_or_default();
        std::fs::write(folder.join("files"), files.to_string()).map_err(Error::io(action()))?;

        if !template.is_whole() {
            // If one is there, it lost files, for example to a cleaner of temporary files.
            let _ = std::fs::remove_dir_all(&template.folder);
        }
        let mut moved = std::fs::rename(&folder, &template.folder);
        if moved
            .as_ref()
            .is_err_and(|error| error.kind() == std::io::ErrorKind::CrossesDevices)
        {
            let beside = template
                .folder
                .with_extension(format!("{:08x}", fastrand::u32(..)));
            self.copy(ground, &folder, &beside).await?;
            moved = std::fs::rename(&beside, &template.folder);
            let _ = std::fs::remove_dir_all(&beside);
        }
        match moved {
            // Another process was faster.
            Err(_) if template.is_whole() => Ok(()),
            moved => moved.map_err(Error::io("keep the template")),
        }
    }

    /// Runs one statement on a data folder without starting a server.
    async fn single(
        &self,
        ground: &Ground,
        folder: &Path,
        settings: &[&str],
        database: &str,
        sql: &str,
    ) -> Result<()> {
        let file = folder.join("statement");
        let action = || format!("write {}", file.display());
        std::fs::write(&file, sql).map_err(Error::io(action()))?;
        let input = std::fs::File::open(&file).map_err(Error::io(action()))?;
        let mut command = self.command("postgres", self.user);
        command
            .args(["--single", "-j", "-D"])
            .arg(folder.join("data"));
        command
            .args(["-c", "exit_on_error=on", "-c", "fsync=off"])
            .args(settings)
            .arg(database);
        command.stdin(input);
        run("postgres --single", command, &ground.reaper, TOOL_BOUND).await?;
        std::fs::remove_file(&file).map_err(Error::io(action()))
    }

    /// Copies a folder with its owners and modes.
    async fn copy(&self, ground: &Ground, from: &Path, to: &Path) -> Result<()> {
        let mut command = self.command("cp", None);
        command.arg("-a").arg(from).arg(to);
        run("cp", command, &ground.reaper, TOOL_BOUND)
            .await
            .map(|_| ())
    }
}

/// How many files are in a folder and its subfolders, if it can be read.
fn count_files(folder: &Path) -> Option<usize> {
    let mut files = 0;
    for entry in std::fs::read_dir(folder).ok()? {
        let entry = entry.ok()?;
        if entry.file_type().ok()?.is_dir() {
            files += count_files(&entry.path())?;
        } else {
            files += 1;
        }
    }
    Some(files)
}

/// A data folder to copy, made once for a user and a version.
struct Template {
    folder: PathBuf,
    owner: u32,
}

impl Template {
    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// How many files there were when it was made.
    fn files(&self) -> Option<usize> {
        std::fs::read_to_string(self.folder.join("files"))
            .ok()?
            .parse()
            .ok()
    }

    /// Whether it is there, made by us (others may write in that place), and no file was lost.
    fn is_whole(&self) -> bool {
        let ours = self
            .folder
            .symlink_metadata()
            .is_ok_and(|found| found.is_dir() && found.uid() == self.owner);
        ours && self.files().is_some() && count_files(&self.data()) == self.files()
    }
}
