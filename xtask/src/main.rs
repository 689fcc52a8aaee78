//! The project's own tasks, run as `cargo xtask TASK`. A task is one entry of [`TASKS`] and one
//! module; this file only finds the task.
//!
//! Everything here builds in seconds: no async, no crate of this workspace.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "this is a program for the terminal, and its output is its purpose"
)]

use std::process::ExitCode;

use anyhow::{Context, bail};
use pico_args::Arguments;

mod arguments;
mod clients;
mod command;
mod dependencies;
mod install;
mod interrupt;
mod lab;
mod model;
mod runners;
mod stack;
mod strays;
mod test;
mod torture;
mod transcript;
mod workspace;

use arguments::finish;
use workspace::root;

/// One task.
struct Task {
    name: &'static str,
    about: &'static str,
    /// The text of `--help`.
    usage: &'static str,
    run: fn(Arguments) -> anyhow::Result<ExitCode>,
}

const TASKS: &[Task] = &[
    Task {
        name: "test",
        about: "install what is missing, then run every check and every test",
        usage: test::USAGE,
        run: test::main,
    },
    Task {
        name: "install",
        about: "install the servers and tools that the tests start (Debian, Ubuntu)",
        usage: install::USAGE,
        run: install::main,
    },
    Task {
        name: "model",
        about: "search the protocol's model for a stale read; `--deep` for long",
        usage: model::USAGE,
        run: model::main,
    },
    Task {
        name: "lab",
        about: "run the commands of the lab's exercises and check what they show",
        usage: lab::USAGE,
        run: lab::main,
    },
    Task {
        name: "stack",
        about: "bring up the lab's containers and run exercises 1 to 7 there (needs Docker)",
        usage: stack::USAGE,
        run: stack::main,
    },
    Task {
        name: "clients",
        about: "generate clients in other languages and let them use the service (needs Node, Python)",
        usage: clients::USAGE,
        run: clients::main,
    },
    Task {
        name: "torture",
        about: "compare textbook, off and strict under the same faults, and write the table",
        usage: torture::USAGE,
        run: torture::main,
    },
];

fn main() -> ExitCode {
    match run(Arguments::from_env()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(mut arguments: Arguments) -> anyhow::Result<ExitCode> {
    let wants_help = arguments.contains(["-h", "--help"]);
    let name = arguments.subcommand()?;
    let Some(name) = name.filter(|name| name != "help") else {
        finish(arguments)?;
        println!("cargo xtask TASK [OPTION]...\n\nTasks:");
        for task in TASKS {
            println!("  {:<8} {}", task.name, task.about);
        }
        println!("\n`cargo xtask TASK --help` tells more.");
        return Ok(ExitCode::SUCCESS);
    };
    let Some(task) = TASKS.iter().find(|task| task.name == name) else {
        bail!("there is no task `{name}`; `cargo xtask help` lists them");
    };
    if wants_help {
        println!("{}", task.usage);
        return Ok(ExitCode::SUCCESS);
    }
    (task.run)(arguments).with_context(|| format!("cargo xtask {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_has_a_usage_that_begins_with_its_command_and_refuses_what_it_does_not_know() {
        for task in TASKS {
            let name = task.name;
            let usage = task.usage;
            assert!(usage.starts_with(&format!("cargo xtask {name}")), "{usage}");
            let error = run(Arguments::from_vec(vec![name.into(), "--ony".into()])).unwrap_err();
            assert!(format!("{error:#}").contains("--ony"), "{error:#}");
        }
        assert!(run(Arguments::from_vec(vec!["tests".into()])).is_err());
    }
}
