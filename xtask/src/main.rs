//! The project's own tasks, run as `cargo xtask TASK`. A task is one entry of [`TASKS`] and one
//! module; this file only finds the task.
//!
//! Everything here builds in seconds: no async, no crate of this workspace.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "this is a program for the terminal, and its output is its purpose"
)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

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

/// One task.
struct Task {
    name: &'static str,
    about: &'static str,
    run: fn(&[String]) -> anyhow::Result<ExitCode>,
}

const TASKS: &[Task] = &[
    Task {
        name: "test",
        about: "install what is missing, then run every check and every test",
        run: test::main,
    },
    Task {
        name: "model",
        about: "search the protocol's model for a stale read; `--deep` for long",
        run: model::main,
    },
    Task {
        name: "lab",
        about: "run the commands of the lab's exercises and check what they show",
        run: lab::main,
    },
    Task {
        name: "stack",
        about: "bring up the lab's containers and run exercises 1 to 7 there (needs Docker)",
        run: stack::main,
    },
    Task {
        name: "clients",
        about: "generate clients in other languages and let them use the service (needs Node, Python)",
        run: clients::main,
    },
    Task {
        name: "torture",
        about: "compare textbook, off and strict under the same faults, and write the table",
        run: torture::main,
    },
    Task {
        name: "help",
        about: "list the tasks",
        run: help,
    },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (name, rest) = match arguments.split_first() {
        None => ("help", &[][..]),
        Some((name, rest)) => match name.as_str() {
            "-h" | "--help" => ("help", rest),
            name => (name, rest),
        },
    };
    let Some(task) = TASKS.iter().find(|task| task.name == name) else {
        eprintln!("there is no task `{name}`; `cargo xtask help` lists them");
        return ExitCode::from(2);
    };
    match (task.run)(rest) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::from(2)
        }
    }
}

fn help(_: &[String]) -> anyhow::Result<ExitCode> {
    println!("cargo xtask TASK [OPTION]...\n\nTasks:");
    for task in TASKS {
        println!("  {:<8} {}", task.name, task.about);
    }
    println!("\n`cargo xtask TASK --help` tells more.");
    Ok(ExitCode::SUCCESS)
}

/// The root of the workspace.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}
