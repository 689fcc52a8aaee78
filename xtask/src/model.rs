//! `cargo xtask model`: the model checker, within small bounds or large ones.

use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use pico_args::Arguments;

use crate::root;

pub(crate) const USAGE: &str = "\
cargo xtask model               explores the small bounds that are part of the tests
cargo xtask model --deep [N]    explores large bounds with N faults at once (1: about ten minutes),
                                and reports the number of states
cargo xtask model --schedules   prints, for each rule left out, the shortest schedule to a stale read";

/// Runs the model and passes its verdict on.
pub(crate) fn main(mut arguments: Arguments) -> anyhow::Result<ExitCode> {
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
    let deep = arguments.contains("--deep");
    let schedules = arguments.contains("--schedules");
    let faults: Option<u8> = arguments.opt_free_from_str()?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    match (deep, schedules, faults) {
        (false, false, None) => cargo.args(TEST).args(["--", "--nocapture"]),
        (true, false, faults) => cargo.args(DEEP).args(faults.map(|count| count.to_string())),
        (false, true, None) => cargo.args(DEEP).arg("schedules"),
        _ => bail!("these arguments do not go together\n{USAGE}"),
    };
    crate::finish(arguments)?;
    let status = cargo.status().context("cargo could not be run")?;
    Ok(ExitCode::from(u8::from(!status.success())))
}
