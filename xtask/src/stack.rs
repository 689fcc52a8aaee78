//! `cargo xtask stack`: the lab's containers, brought up for real.
//!
//! Outside of `cargo xtask test`, because it needs Docker and images. Where the images cannot be
//! pulled, the variables of `compose.yaml` name others, such as `RUST_IMAGE` or `POSTGRES_IMAGE`.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use pico_args::Arguments;

use crate::strays::Scratch;
use crate::{command, interrupt, lab, root};

pub(crate) const USAGE: &str = "\
cargo xtask stack [--keep]

Builds and starts the containers of compose.yaml, runs the promised commands and the exercises 1 to 7
in their variant for Docker, and removes everything again.

  --keep   leave the containers running
";

/// How long building may take: everything is compiled anew.
const BUILD: Duration = Duration::from_secs(30 * 60);
/// How long one block of a page may take; the load test takes half a minute.
const BLOCK: Duration = Duration::from_secs(180);

/// The name of the containers' project.
const PROJECT: &str = "writethrough-stack";

/// What must work as it stands, and what must come out.
const PROMISED: &[(&str, &str)] = &[
    ("docker compose exec redis redis-cli ping", "PONG"),
    (
        "docker compose exec postgres pg_isready -U labuser -d items_db",
        "accepting connections",
    ),
    (
        "docker compose exec postgres psql -U labuser -d items_db -c \"SELECT id, name, price FROM items LIMIT 10;\"",
        "Sample item 1",
    ),
    ("docker compose logs api", "listening on"),
];

/// Runs the task.
pub(crate) fn main(mut arguments: Arguments) -> anyhow::Result<ExitCode> {
    let keep = arguments.contains("--keep");
    crate::finish(arguments)?;
    interrupt::listen();
    // Its folder is for what the pages write to /tmp.
    let scratch = Scratch::new()?;
    let outcome = run(scratch.folder());
    let files = std::fs::read_dir(scratch.folder())?;
    for file in files.flatten() {
        std::fs::remove_file(file.path())?;
    }
    scratch.check();
    if !keep {
        shell(
            "docker compose --profile k6 down -v",
            scratch.folder(),
            BLOCK,
        )?;
    }
    outcome?;
    Ok(ExitCode::SUCCESS)
}

fn run(folder: &Path) -> anyhow::Result<()> {
    shell("docker compose --profile k6 down -v", folder, BLOCK)?;
    println!("building");
    let started = Instant::now();
    shell("docker compose build", folder, BUILD)?;
    println!("  {:.0} s", started.elapsed().as_secs_f64());
    let started = Instant::now();
    shell("docker compose up -d --wait", folder, BLOCK)?;
    println!(
        "every service is healthy after {:.1} s",
        started.elapsed().as_secs_f64()
    );
    print!("{}", shell("docker compose ps", folder, BLOCK)?);
    for (script, expected) in PROMISED {
        let output = shell(script, folder, BLOCK)?;
        if !output.contains(expected) {
            bail!("`{script}` does not show `{expected}`:\n{output}");
        }
        println!("  {script}");
    }
    let wanted: Vec<String> = (1..=7).map(|number| format!("0{number}")).collect();
    let variables = folder.join("variables");
    for page in lab::pages(&wanted)? {
        std::fs::write(&variables, "")?;
        let count = page
            .with_containers(|block| {
                let (block, file) = (
                    block.replace("/tmp/", &format!("{}/", folder.display())),
                    variables.display(),
                );
                let script = format!("set -eu -a\n. '{file}'\n{block}\nexport -p > '{file}'\n");
                shell(&script, folder, BLOCK)
            })
            .with_context(|| page.name.clone())?;
        println!("  {} ({count} commands)", page.name);
    }
    Ok(())
}

/// Runs a script in the workspace's folder; returns what it printed.
fn shell(script: &str, folder: &Path, bound: Duration) -> anyhow::Result<String> {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]).current_dir(root());
    // A project of its own: nobody's running stack is touched, and the data are fresh.
    command
        .env("TMPDIR", folder)
        .env("COMPOSE_PROJECT_NAME", PROJECT);
    let (end, output) = command::output(command, Instant::now() + bound)?;
    if !end.ok() {
        bail!("{}:\n{script}\n{output}", end.describe());
    }
    Ok(output)
}
