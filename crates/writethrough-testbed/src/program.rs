//! Where programs are installed, and as whom they run.

use std::ffi::CString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Missing, Result};

/// Where Debian puts the programs of each version of Postgres.
const POSTGRES_VERSIONS: &str = "/usr/lib/postgresql";

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
    #[allow(unsafe_code, reason = "only geteuid, which cannot fail")]
    pub(crate) fn unprivileged() -> Result<Option<Self>> {
        // SAFETY: geteuid has no precondition and cannot fail.
        if unsafe { libc::geteuid() } != 0 {
            return Ok(None);
        }
        ["postgres", "nobody"].into_iter().find_map(Self::named).map(Some).ok_or_else(|| {
            Error::Misuse(
                "Postgres refuses to run as root, and there is neither a user `postgres` nor a user \
                 `nobody`: run the tests as another user"
                    .to_owned(),
            )
        })
    }

    #[allow(unsafe_code, reason = "the user database is in C")]
    fn named(name: &str) -> Option<Self> {
        let name = CString::new(name).ok()?;
        let mut buffer = vec![0; 16 * 1024];
        let mut entry = std::mem::MaybeUninit::<libc::passwd>::uninit();
        let mut found = std::ptr::null_mut();
        // SAFETY: every pointer is valid for the call, and the length is the buffer's.
        let status = unsafe {
            libc::getpwnam_r(
                name.as_ptr(),
                entry.as_mut_ptr(),
                buffer.as_mut_ptr(),
                buffer.len(),
                &mut found,
            )
        };
        if status != 0 || found.is_null() {
            return None;
        }
        // SAFETY: `found` points to `entry`, which the call has filled.
        let entry = unsafe { &*found };
        Some(Self {
            uid: entry.pw_uid,
            gid: entry.pw_gid,
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
