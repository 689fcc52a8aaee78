//! `cargo xtask install`: installs the programs that the tests run, where that can be done: on Debian, as root or with a
//! `sudo` that asks for no password. Elsewhere it says what to install.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::bail;
use pico_args::Arguments;

use crate::{command, interrupt};

/// Programs that tests need, and the Debian package that has them.
struct Package {
    name: &'static str,
    programs: &'static [&'static str],
    purpose: &'static str,
}

/// All of them. To need one more, add a line.
const PACKAGES: &[Package] = &[
    Package {
        name: "postgresql",
        programs: &["initdb", "postgres", "psql", "pg_ctl"],
        purpose: "the store that the tests run against",
    },
    Package {
        name: "redis-server",
        programs: &["redis-server"],
        purpose: "the cache that the tests run against",
    },
    Package {
        name: "redis-tools",
        programs: &["redis-cli"],
        purpose: "a look into the cache by hand",
    },
    Package {
        name: "prometheus",
        programs: &["prometheus", "promtool"],
        purpose: "the metrics, rules and dashboards of the lab",
    },
];

pub(crate) const USAGE: &str = "\
cargo xtask install

Installs what the tests start and this machine lacks: Postgres, Redis and Prometheus. It does so on Debian
and Ubuntu, as root or with a sudo that asks for no password; elsewhere it says what to install.
`cargo xtask test` does this first.
";

/// How long the task may take.
const BOUND: Duration = Duration::from_secs(20 * 60);

/// Runs the task.
pub(crate) fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    crate::finish(arguments)?;
    interrupt::listen();
    let note = run(Instant::now() + BOUND, |line| println!("{line}"))?;
    println!("{note}");
    Ok(ExitCode::SUCCESS)
}

/// Installs what is missing and returns a note of what was done.
pub(crate) fn run(deadline: Instant, mut show: impl FnMut(&str)) -> anyhow::Result<String> {
    let missing = missing(&places());
    if missing.is_empty() {
        return Ok("nothing was missing".to_owned());
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    let Some(mut root) = root_shell() else {
        bail!(instructions(&missing));
    };
    root.arg("-c")
        .arg(include_str!("install.sh"))
        .arg("xtask-install")
        .args(&names);
    let end = command::run(root, deadline, |line| line.into_iter().for_each(&mut show))?;
    if !end.ok() {
        bail!("installing {} failed ({})", names.join(" "), end.describe());
    }
    let still: Vec<&str> = self::missing(&places())
        .iter()
        .map(|package| package.name)
        .collect();
    if !still.is_empty() {
        bail!(
            "{} was installed, and its programs are still not found",
            still.join(" ")
        );
    }
    Ok(format!(
        "installed {}, their services were not started",
        names.join(" ")
    ))
}

/// The packages of which a program is in none of the folders.
fn missing(places: &[PathBuf]) -> Vec<&'static Package> {
    let is_program = |file: PathBuf| {
        let found = file.metadata();
        found.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    let has = |program: &&'static str| places.iter().any(|folder| is_program(folder.join(program)));
    PACKAGES
        .iter()
        .filter(|package| !package.programs.iter().all(has))
        .collect()
}

/// Where programs are looked for: `PATH`, and where Debian puts the programs of each Postgres.
fn places() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    places.extend(versions.map(|version| version.path().join("bin")));
    places
}

/// A shell that is root on a Debian system, if there is one to be had without asking anybody.
#[allow(unsafe_code, reason = "only geteuid, which cannot fail")]
fn root_shell() -> Option<Command> {
    if !Path::new("/etc/debian_version").exists() || !Path::new("/usr/bin/apt-get").exists() {
        return None;
    }
    // SAFETY: geteuid has no precondition and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        return Some(Command::new("/bin/sh"));
    }
    let mut sudo = Command::new("sudo");
    sudo.args(["-n", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    sudo.status().is_ok_and(|status| status.success()).then(|| {
        let mut shell = Command::new("sudo");
        shell.args(["-n", "/bin/sh"]);
        shell
    })
}

/// What a person is told who has to install by hand.
fn instructions(missing: &[&Package]) -> String {
    let mut text = String::from("Some programs that the tests run are not installed:\n");
    let mut names = Vec::new();
    for package in missing {
        let (programs, purpose) = (package.programs.join(", "), package.purpose);
        let _ = writeln!(
            text,
            "  {programs}: {purpose} (Debian package {})",
            package.name
        );
        names.push(package.name);
    }
    let _ = write!(
        text,
        "They can be installed from here only on Debian or Ubuntu, as root or with a sudo that \
         asks for no password.\nThere, run `sudo apt-get install {}`; elsewhere install the same \
         programs, Redis in version 7.0 or newer, into a folder of PATH.",
        names.join(" ")
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_no_folder_to_look_in_everything_is_missing_and_each_has_a_remedy() {
        let missing = missing(&[]);
        assert_eq!(missing.len(), PACKAGES.len());
        let text = instructions(&missing);
        for package in PACKAGES {
            assert!(text.contains(package.name), "{text}");
            assert!(!package.programs.is_empty());
        }
        assert!(text.contains("sudo apt-get install postgresql redis-server"));
    }

    #[test]
    fn a_package_is_there_only_with_all_its_programs() {
        let folder = std::env::temp_dir().join(format!("xtask-programs-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let put = |name: &str, mode: u32| {
            let file = folder.join(name);
            std::fs::write(&file, "").unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        let lacks = |name: &str| {
            missing(std::slice::from_ref(&folder))
                .iter()
                .any(|package| package.name == name)
        };
        put("redis-cli", 0o644);
        assert!(
            lacks("redis-tools"),
            "a file that cannot be run is no program"
        );
        put("redis-cli", 0o755);
        assert!(!lacks("redis-tools"));
        for program in ["initdb", "postgres", "psql"] {
            put(program, 0o755);
        }
        assert!(lacks("postgresql"));
        put("pg_ctl", 0o755);
        assert!(!lacks("postgresql"));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
