//! `cargo xtask clients`: generated clients in other languages use the service, and linters read its
//! description. Needs Node and Python, and their package registries; so it is no part of `test`, which
//! checks the form of the description by itself (`tests/description.rs` of the service).

use std::process::{Command, ExitCode};

use anyhow::{Context, ensure};
use pico_args::Arguments;

use crate::root;

pub(crate) const USAGE: &str = "\
cargo xtask clients   lints the service's description with redocly and spectral, generates clients with
                      openapi-typescript and openapi-python-client, and has each create, read,
                      replace, list and delete an item. Needs curl, node with npm, python3 with venv";

/// Programs that must be there.
const NEEDED: [&str; 5] = ["curl", "node", "npm", "npx", "python3"];

/// Builds the program and runs the script in a folder that is removed at the end.
pub(crate) fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    crate::finish(arguments)?;
    for program in NEEDED {
        let found = Command::new(program).arg("--version").output();
        ensure!(
            found.is_ok_and(|found| found.status.success()),
            "`{program}` is not there\n{USAGE}"
        );
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .current_dir(root())
        .args(["build", "-p", "writethrough-cli"])
        .status()
        .context("cargo could not be run")?;
    ensure!(built.success(), "the program could not be built");
    let folder = tempfile::tempdir().context("no temporary folder could be made")?;
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), Into::into);
    let status = Command::new("/bin/sh")
        .arg("-c")
        .arg(include_str!("run.sh"))
        .arg("clients")
        .arg(target.join("debug/writethrough"))
        .arg(folder.path())
        .arg(root().join("xtask/src/clients"))
        .status()
        .context("/bin/sh could not be run")?;
    Ok(ExitCode::from(u8::from(!status.success())))
}
