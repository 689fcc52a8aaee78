//! The arguments of `writethrough lab`, and what each of its commands does in this process.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use writethrough_testbed::until;

use crate::cluster::Consistency;
use crate::control;
use crate::request::{Change, RedisChange, Request, Store};
use crate::stack::{Plan, Stack};
use crate::tools;
use writethrough_service::shutdown::Signals;
use writethrough_service::{config, listen};

/// How long `down` waits for the folder to vanish.
const DOWN_BOUND: Duration = Duration::from_secs(30);

/// What an empty variable stands for too.
const LISTEN: &str = "127.0.0.1:8000";
const FOLDER: &str = "writethrough-lab";

/// The lab without containers: private Postgres and Redis, API nodes, and Prometheus if installed.
///
/// Without a command it starts the lab and waits for Ctrl-C. The commands act on it from another
/// terminal.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct LabArgs {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    up: UpArgs,
    /// The folder that holds all data while the lab runs.
    #[arg(
        long,
        global = true,
        env = "WRITETHROUGH_LAB",
        value_name = "FOLDER",
        default_value = FOLDER,
        value_parser = parse_folder
    )]
    folder: PathBuf,
}

#[derive(clap::Args, Clone)]
struct UpArgs {
    /// How many API nodes.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    nodes: u16,
    /// Where the first node listens; the others take the next ports. With port 0 each takes a free one.
    #[arg(
        long,
        env = "WRITETHROUGH_LAB_LISTEN",
        value_name = "ADDRESS:PORT",
        default_value = LISTEN,
        value_parser = parse_listen
    )]
    listen: SocketAddr,
    /// `strict` (linearizable), `textbook` (commit, then SET: not linearizable) or `off` (no cache).
    #[arg(
        long,
        value_name = "MODE",
        default_value = "strict",
        hide_possible_values = true
    )]
    consistency: Consistency,
    /// Run a Redis replica too, for `lag redis` and `failover redis`.
    #[arg(long)]
    replica: bool,
    /// Do not start Prometheus, even if it is installed.
    #[arg(long)]
    no_prometheus: bool,
}

#[derive(clap::Subcommand, Clone)]
enum Command {
    /// Says what runs, and where.
    Status,
    /// Ends the lab and removes its data.
    Down,
    /// Stops a server in an orderly way.
    Stop(Target),
    /// Starts a server that was stopped or killed.
    Start(Target),
    /// Kills a server (SIGKILL).
    Kill(Target),
    /// Freezes a server: its connections stay open and nobody answers.
    Pause(Target),
    /// Lets a frozen server go on.
    Resume(Target),
    /// Keeps a copy of what Redis holds now.
    Snapshot(RedisOnly),
    /// Restarts Redis with the contents of the last snapshot.
    Restore(RedisOnly),
    /// Holds back replication: the replica keeps what it has (needs `lab --replica`).
    Lag(RedisOnly),
    /// Kills the Redis primary and promotes the replica (needs `lab --replica`).
    Failover(RedisOnly),
    /// Shows a trace as a tree: the last one of a request for items, or the one of an `x-trace-id`.
    Trace {
        /// The trace's id, 32 hexadecimal digits.
        id: Option<String>,
    },
    /// Shows the end of a server's log.
    Logs {
        /// `api`, `api-2`, `postgres`, `redis` or `prometheus`.
        #[arg(default_value = "api")]
        server: String,
        /// Go on showing what is added.
        #[arg(short, long)]
        follow: bool,
    },
    /// Prints a server's URL, for other programs.
    Url {
        /// `api`, `postgres`, `redis` or `prometheus`.
        #[arg(default_value = "api")]
        server: String,
    },
    /// Runs psql on the lab's database.
    Psql(Rest),
    /// Runs redis-cli on the lab's Redis.
    RedisCli(Rest),
}

/// One server, or all API nodes.
#[derive(clap::Args, Clone)]
struct Target {
    /// `redis`, `postgres`, `api` (all nodes) or one node, such as `api-2`.
    server: String,
}

#[derive(clap::Args, Clone)]
struct RedisOnly {
    #[arg(value_parser = ["redis"])]
    server: String,
}

#[derive(clap::Args, Clone)]
struct Rest {
    /// Arguments for the program.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGUMENT"
    )]
    arguments: Vec<String>,
}

fn parse_listen(text: &str) -> Result<SocketAddr, &'static str> {
    listen::parse(config::cleaned(text)?.as_deref().unwrap_or(LISTEN))
}

fn parse_folder(text: &str) -> Result<PathBuf, &'static str> {
    let folder = config::cleaned(text)?;
    Ok(folder.unwrap_or_else(|| FOLDER.to_owned()).into())
}

/// Runs the command.
///
/// # Errors
///
/// One line that says what to do: a program that is not installed, a port that is taken, no lab in
/// the folder.
pub fn run(args: LabArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let folder = args.folder.as_path();
    match args.command {
        None => runtime.block_on(up(&args.up, folder))?,
        Some(Command::Down) => runtime.block_on(down(folder))?,
        Some(command) => return runtime.block_on(act(command, folder)),
    }
    Ok(ExitCode::SUCCESS)
}

async fn up(args: &UpArgs, folder: &Path) -> anyhow::Result<()> {
    if control::ask(folder, &Request::Ping).await.is_ok() {
        bail!(
            "a lab runs in {} already: end it with `writethrough lab down`, or choose another \
             --folder and --listen",
            folder.display()
        );
    }
    control::remove_remains(folder)?;
    let mut signals = Signals::listen()?;
    let plan = Plan {
        nodes: args.nodes,
        listen: args.listen,
        consistency: args.consistency,
        replica: args.replica,
        prometheus: !args.no_prometheus,
    };
    let mut out = std::io::stdout();
    let stack = tokio::select! {
        stack = Stack::start(folder, plan) => Arc::new(stack?),
        // Dropping a half-built stack ends what it has started.
        signal = signals.next() => {
            let _ = writeln!(out, "{signal}: gone before the lab was up");
            return Ok(());
        }
    };
    let (asked, mut down_asked) = tokio::sync::mpsc::channel(1);
    let control = control::Server::open(stack.folder(), stack.clone(), asked)?;
    let _ = write!(
        out,
        "\n{}\nThe lab is ready. Ctrl-C ends it and removes {}.\n",
        stack.describe().await,
        folder.display()
    );
    let _ = out.flush();
    let why = tokio::select! {
        signal = signals.next() => signal,
        _ = down_asked.recv() => "down",
    };
    let _ = writeln!(out, "{why}: ending the lab");
    drop(control);
    tokio::select! {
        () = stack.end() => {}
        _ = signals.next() => {}
    }
    drop(stack);
    Ok(())
}

async fn down(folder: &Path) -> anyhow::Result<()> {
    match control::ask(folder, &Request::Down).await {
        Ok(_) => {}
        Err(error) => {
            if control::remove_remains(folder)? {
                return Ok(());
            }
            return Err(error);
        }
    }
    until("the lab to end", DOWN_BOUND, || {
        let gone = !folder.exists();
        async move { gone.then_some(()) }
    })
    .await
    .context("the lab did not end in time; end its process")?;
    Ok(())
}

async fn act(command: Command, folder: &Path) -> anyhow::Result<ExitCode> {
    let change = |change, target: Target| Request::Change(change, target.server);
    let request = match command {
        Command::Status => Request::Status,
        Command::Down => Request::Down,
        Command::Stop(target) => change(Change::Stop, target),
        Command::Start(target) => change(Change::Start, target),
        Command::Kill(target) => change(Change::Kill, target),
        Command::Pause(target) => change(Change::Pause, target),
        Command::Resume(target) => change(Change::Resume, target),
        Command::Snapshot(_) => Request::Redis(RedisChange::Snapshot),
        Command::Restore(_) => Request::Redis(RedisChange::Restore),
        Command::Lag(_) => Request::Redis(RedisChange::Lag),
        Command::Failover(_) => Request::Redis(RedisChange::FailOver),
        Command::Url { server } => Request::Url(server),
        Command::Trace { id } => Request::Trace(id),
        Command::Logs { server, follow } => {
            let file = control::ask(folder, &Request::Log(server)).await?;
            return tools::tail(Path::new(&file), follow);
        }
        Command::Psql(rest) => {
            let address = control::ask(folder, &Request::Address(Store::Postgres)).await?;
            return tools::psql(&address, &rest.arguments);
        }
        Command::RedisCli(rest) => {
            let address = control::ask(folder, &Request::Address(Store::Redis)).await?;
            return tools::redis_cli(&address, &rest.arguments);
        }
    };
    let answer = control::ask(folder, &request).await?;
    let _ = writeln!(std::io::stdout(), "{}", answer.trim_end());
    Ok(ExitCode::SUCCESS)
}
