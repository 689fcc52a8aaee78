//! `cargo xtask model`: the model checker, within small bounds or large ones.

use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

use crate::root;

const HELP: &str = "\
cargo xtask model               explores the small bounds that are part of the tests
cargo xtask model --deep [N]    explores large bounds with N faults at once (1: about ten minutes),
                                and reports the number of states
cargo xtask model --schedules   prints, for each rule left out, the shortest schedule to a stale read";

/// Runs the model and passes its verdict on.
pub(crate) fn main(arguments: &[String]) -> anyhow::Result<ExitCode> {
    const TEST: &[&str] = &["test", "-p", "writethrough-protocol", "--test", "model"];
    const DEEP: &[&str] = &[
        "run",
        "--release",
        "-p",
        "writethrough-protocol",
        "--example",
        "deep_model",
        "--",
    ];
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    match words.as_slice() {
        [] => cargo.args(TEST).args(["--", "--nocapture"]),
        ["--deep"] => cargo.args(DEEP),
        ["--deep", faults] => cargo.args(DEEP).arg(faults),
        ["--schedules"] => cargo.args(DEEP).arg("schedules"),
        ["-h" | "--help"] => {
            println!("{HELP}");
            return Ok(ExitCode::SUCCESS);
        }
        _ => bail!("`{}` is not understood\n{HELP}", words.join(" ")),
    };
    let status = cargo.status().context("cargo could not be run")?;
    Ok(ExitCode::from(u8::from(!status.success())))
}
