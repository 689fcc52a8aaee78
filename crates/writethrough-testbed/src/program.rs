//! Where programs are installed, and as whom they run.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::geteuid;

use crate::error::{Error, Missing, Result};

/// Where Debian puts the programs of each version of Postgres.
const POSTGRES_VERSIONS: &str = "/usr/lib/postgresql";

/// The user database of this machine.
const USERS: &str = "/etc/passwd";

/// Finds an installed program: first in `PATH`, then among the installed versions of Postgres, the
/// newest first.
///
/// # Errors
///
/// [`Missing`], which says what to install.
pub fn find_program(name: &str) -> Result<PathBuf, Missing> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(postgres_folders(Path::new(POSTGRES_VERSIONS)))
        .map(|folder| folder.join(name))
        .find(|file| is_program(file))
        .ok_or_else(|| Missing {
            program: name.to_owned(),
            remedy: remedy(name),
        })
}

/// What a program needs of the environment to run at all, and what marks a run of the tests.
const KEPT: &[&str] = &[
    "PATH",
    "HOME",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "LLVM_PROFILE_FILE",
    "RUST_BACKTRACE",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "WRITETHROUGH_TESTBED_KEEP",
    "WRITETHROUGH_TEST_RUN",
];

/// Gives a command an environment of its own, without settings that the caller's shell holds for
/// other programs. Of the caller's variables only those are left that a program needs to run at
/// all, and those named here.
pub fn own_environment<'a>(command: &'a mut Command, also: &[&str]) -> &'a mut Command {
    command.env_clear();
    for name in KEPT.iter().chain(also) {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// The `bin` folders of all installed versions of Postgres, the newest first.
fn postgres_folders(versions: &Path) -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = std::fs::read_dir(versions)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .collect();
    found.sort_unstable_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, folder)| folder).collect()
}

fn is_program(file: &Path) -> bool {
    file.metadata()
        .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

fn remedy(name: &str) -> String {
    match name {
        "postgres" | "initdb" | "psql" | "pg_ctl" | "pgbench" | "pg_isready" => {
            "install Debian package postgresql".to_owned()
        }
        "redis-server" | "redis-cli" => "install Debian package redis-server".to_owned(),
        other => format!("install the package that contains {other}, or add its folder to PATH"),
    }
}

/// A user of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl User {
    /// Whom a server that refuses root must run as, or `None` when we are not root.
    pub(crate) fn unprivileged() -> Result<Option<Self>> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        let users = std::fs::read_to_string(USERS).map_err(Error::io(format!("read {USERS}")))?;
        let found = ["postgres", "nobody"]
            .iter()
            .find_map(|name| Self::named(name, &users));
        found.map(Some).ok_or_else(|| {
            Error::Misuse(
                "Postgres refuses to run as root, and there is neither a user `postgres` nor a user \
                 `nobody`: run the tests as another user"
                    .to_owned(),
            )
        })
    }

    /// Finds a user by name in the lines of the user database (passwd(5)).
    fn named(name: &str, users: &str) -> Option<Self> {
        users.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next()? == name).then_some(())?;
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            Some(Self { uid, gid })
        })
    }

    /// Refuses a folder that this user could not reach.
    pub(crate) fn must_reach(&self, folder: &Path) -> Result<()> {
        let closed = folder.ancestors().find(|ancestor| {
            ancestor
                .metadata()
                .is_ok_and(|found| found.permissions().mode() & 0o001 == 0)
        });
        match closed {
            None => Ok(()),
            Some(closed) => Err(Error::Misuse(format!(
                "Postgres refuses to run as root, and the user it runs as instead may not enter {}: \
                 choose another folder, or run as another user",
                closed.display()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_in_the_path_is_found_and_a_missing_one_says_what_to_install() {
        assert!(find_program("sh").is_ok());
        let missing = find_program("no-such-program").unwrap_err();
        assert_eq!(missing.program, "no-such-program");
        assert_eq!(remedy("initdb"), "install Debian package postgresql");
    }

    #[test]
    fn a_user_is_found_by_its_whole_name() {
        let users = "postgres2:x:1:2::/:\nbroken:x\npostgres:x:104:106:a: b:/var/lib:/bin/bash\n";
        let expected = User { uid: 104, gid: 106 };
        assert_eq!(User::named("postgres", users), Some(expected));
        assert_eq!(User::named("broken", users), None);
        assert_eq!(User::named("post", users), None);
    }

    #[test]
    fn the_newest_postgres_comes_first_by_number_not_by_letter() {
        let folder = std::env::temp_dir().join(format!("postgres-versions-{}", fastrand::u64(..)));
        for version in ["9", "17", "15", "common"] {
            std::fs::create_dir_all(folder.join(version)).unwrap();
        }
        let found = postgres_folders(&folder);
        std::fs::remove_dir_all(&folder).unwrap();
        let expected: Vec<_> = ["17", "15", "9"].map(|v| folder.join(v).join("bin")).into();
        assert_eq!(found, expected);
    }
}
