//! The checker by itself, as `writethrough check` runs it:
//! `cargo run -p writethrough-check --example check -- --help`.

use std::process::ExitCode;

use clap::Parser;
use writethrough_check::{CheckArgs, run};

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    args: CheckArgs,
}

#[tokio::main]
#[allow(clippy::print_stderr, reason = "a program's last word")]
async fn main() -> ExitCode {
    match run(Command::parse().args).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("could not judge: {error:#}");
            ExitCode::from(2)
        }
    }
}
