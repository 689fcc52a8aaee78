//! Installed programs that take over this process: `psql`, `redis-cli` and `tail` for a person at a
//! terminal.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Context;
use writethrough_testbed::{find_program, own_environment};

/// What a program needs of the environment to show itself on a person's terminal.
const TERMINAL: &[&str] = &[
    "COLORTERM",
    "EDITOR",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LC_MESSAGES",
    "LESS",
    "LOGNAME",
    "PAGER",
    "PSQL_EDITOR",
    "PSQL_PAGER",
    "SHELL",
    "TERM",
    "TERMINFO",
    "TZ",
    "USER",
    "VISUAL",
];

/// Becomes `psql`, connected to the lab's database.
pub(crate) fn psql(address: &str, arguments: &[String]) -> anyhow::Result<ExitCode> {
    let (host, port) = split(address)?;
    let mut command = Command::new(find_program("psql")?);
    own_environment(&mut command, TERMINAL)
        .args(["-h", host, "-p", port, "-U", "labuser", "-d", "items_db"])
        .args(arguments)
        .env("PGCONNECT_TIMEOUT", "5");
    become_program(command)
}

/// Becomes `redis-cli`, connected to the lab's Redis.
pub(crate) fn redis_cli(address: &str, arguments: &[String]) -> anyhow::Result<ExitCode> {
    let (host, port) = split(address)?;
    let mut command = Command::new(find_program("redis-cli")?);
    own_environment(&mut command, TERMINAL)
        .args(["-h", host, "-p", port])
        .args(arguments);
    become_program(command)
}

/// Becomes `tail` on a log.
pub(crate) fn tail(file: &Path, follow: bool) -> anyhow::Result<ExitCode> {
    let mut command = Command::new("tail");
    command.args(["-n", "40"]);
    if follow {
        command.arg("-f");
    }
    command.arg(file);
    become_program(command)
}

fn split(address: &str) -> anyhow::Result<(&str, &str)> {
    address
        .rsplit_once(':')
        .context("the lab gave no address: is it another version?")
}

fn become_program(mut command: Command) -> anyhow::Result<ExitCode> {
    let name = command.get_program().to_string_lossy().into_owned();
    // Returns only if it fails.
    let error = command.exec();
    Err(error).with_context(|| format!("{name} cannot be run"))
}
