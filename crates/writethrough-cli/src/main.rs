//! The command `writethrough`: `serve` and `health`, `check` with the feature of this name, `lab` and `check --cluster`
//! with the feature `lab`.

#![forbid(unsafe_code)]

mod health;

use std::any::TypeId;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::process::ExitCode;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use writethrough_service::causes::chain;
use writethrough_service::config::{self, Config, ServeArgs};
use writethrough_service::descriptors;
use writethrough_service::manager::Manager;
use writethrough_service::server::Server;
use writethrough_service::shutdown::Signals;
use writethrough_service::telemetry::Telemetry;

#[cfg(all(feature = "check", not(feature = "lab")))]
use writethrough_check::{CheckArgs, run as run_check};
#[cfg(feature = "lab")]
use writethrough_lab::{
    LabArgs,
    check::{ClusterCheckArgs as CheckArgs, run as run_check},
};

use crate::health::HealthArgs;

/// 15 to 20 % less CPU for a hit than with the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A linearizable write-through cache in front of a database, behind an HTTP API.
#[derive(Parser)]
#[command(name = "writethrough", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Serves the items API; the default.
    Serve(Box<ServeArgs>),
    /// Checks that a service with an items API is linearizable.
    ///
    /// Exit code: 0 linearizable, 1 an anomaly was found or a promise was broken, 2 could not judge.
    #[cfg(feature = "check")]
    Check(Box<CheckArgs>),
    /// Runs the lab without containers: private servers, nodes, faults.
    #[cfg(feature = "lab")]
    Lab(LabArgs),
    /// Asks a server whether it is ready; exit code 0 if it is. For the health checks of containers.
    Health(HealthArgs),
}

fn main() -> ExitCode {
    let cli = lenient(Cli::command())
        .try_get_matches()
        .and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match cli {
        Ok(cli) => cli,
        Err(error) => return refused(error),
    };
    let outcome = match cli.command {
        Some(Command::Serve(args)) => serve(&args).map(|()| ExitCode::SUCCESS),
        #[cfg(feature = "check")]
        Some(Command::Check(args)) => return check(*args),
        #[cfg(feature = "lab")]
        Some(Command::Lab(args)) => writethrough_lab::run(args),
        Some(Command::Health(args)) => health::run(&args, variable),
        None => serve(&cli.serve).map(|()| ExitCode::SUCCESS),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            // One line, whatever happened.
            let _ = writeln!(std::io::stderr(), "error: {}", chain(error.as_ref()));
            ExitCode::from(2)
        }
    }
}

/// A variable of the environment. What is not UTF-8 in it stays visible as such.
fn variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// Lets every text reach the one place that looks at it, and names the setting when it is wrong: one
/// that begins with `-` and a digit, and one that is not UTF-8, which stays visible as such.
fn lenient(command: clap::Command) -> clap::Command {
    let visible = || OsStringValueParser::new().map(|text| text.to_string_lossy().into_owned());
    command
        .mut_args(|arg| {
            if !arg.get_action().takes_values() {
                return arg;
            }
            let is_text = arg.get_value_parser().type_id() == TypeId::of::<String>()
                && arg.get_possible_values().is_empty();
            let arg = arg.allow_negative_numbers(true);
            if is_text {
                arg.value_parser(visible())
            } else {
                arg
            }
        })
        .mut_subcommands(lenient)
}

/// Says in one line what is wrong with the command line, or prints the help that was asked for.
fn refused(error: clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return ExitCode::from(2);
    }
    let said = without_secrets(error).to_string();
    let parts = said
        .lines()
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .map(str::trim)
        .filter(|part| !part.is_empty());
    let mut line = String::new();
    for part in parts {
        line += match line.chars().last() {
            None => "",
            Some(':') => " ",
            Some(_) => "; ",
        };
        line += part;
    }
    let _ = writeln!(
        std::io::stderr(),
        "{line}; `writethrough --help` lists what there is"
    );
    ExitCode::from(2)
}

/// The complaint about the command line without the texts that may be secrets: a URL that stands
/// where none belongs is repeated only by its form, and so is a word that is no word.
fn without_secrets(mut error: clap::Error) -> clap::Error {
    let is_word = |text: &str| {
        let text = text.trim_start_matches('-');
        text.chars()
            .all(|letter| letter.is_ascii_lowercase() || letter == '-')
    };
    for kind in [
        ContextKind::InvalidSubcommand,
        ContextKind::InvalidArg,
        ContextKind::InvalidValue,
    ] {
        let Some(ContextValue::String(text)) = error.get(kind) else {
            continue;
        };
        let hide = match kind {
            ContextKind::InvalidValue => text.contains("://"),
            // Otherwise it is one that is known, as the help writes it.
            ContextKind::InvalidArg => error.kind() == ErrorKind::UnknownArgument && !is_word(text),
            _ => !is_word(text),
        };
        if hide {
            let form = config::form(text);
            error.insert(kind, ContextValue::String(form));
            error.remove(ContextKind::Suggested);
        }
    }
    error
}

/// The exit code is the verdict.
#[cfg(feature = "check")]
fn check(args: CheckArgs) -> ExitCode {
    let checked = tokio::runtime::Runtime::new()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run_check(args)));
    match checked {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let _ = writeln!(
                std::io::stderr(),
                "could not judge: {}",
                chain(error.as_ref())
            );
            ExitCode::from(2)
        }
    }
}

fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    let config = Config::from_args(args, variable)?;
    descriptors::raise();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut telemetry = Telemetry::start(&config)?;
        // Before it listens: whoever sees it listen may also tell it to stop.
        let mut signals = Signals::listen()?;
        let mut running = Server::start(config).await?;
        greet(running.addr());
        let manager = Manager::started();
        let outcome = tokio::select! {
            signal = signals.next() => {
                tracing::info!("{signal}: draining; once more to stop at once");
                Ok(())
            }
            error = running.failed() => Err(error),
        };
        manager.stopping();
        tokio::select! {
            () = running.shutdown() => {}
            again = signals.next() => tracing::warn!("{again}: stopping at once"),
        }
        telemetry.shutdown().await;
        if outcome.is_ok() {
            tracing::info!("stopped");
        }
        Ok(outcome?)
    })
}

/// Tells a person at a terminal where to look and what to try. Nobody reads it elsewhere, where the
/// log says the same.
fn greet(address: SocketAddr) {
    let mut out = std::io::stdout();
    if !out.is_terminal() {
        return;
    }
    let url = format!("http://{address}");
    let _ = write!(
        out,
        "
  writethrough is at {url}   (try it in a browser: {url}/docs)

  curl -i {url}/items/550e8400-e29b-41d4-a716-446655440001      # twice: a miss, then a hit
  curl -i {url}/items -H 'content-type: application/json' -d '{{\"name\": \"Lamp\", \"price\": 24.50}}'
  curl '{url}/items?limit=10'
  curl {url}/cache/stats

"
    );
}
