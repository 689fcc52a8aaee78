//! Makes the folder for temporary files of one run, and finds what the run leaves behind: processes and
//! testbed folders.
//!
//! The tests run with a folder for temporary files of their own and a variable that names it, so
//! what belongs to them can be told from what belongs to other runs on the same machine.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::command::kill_process;

/// The variable that marks the processes of one run.
const MARK: &str = "WRITETHROUGH_TEST_RUN";
/// When it is set, testbeds keep their folders.
const KEEP: &str = "WRITETHROUGH_TESTBED_KEEP";
/// The beginning of the name of a testbed's folder.
const TESTBED: &str = "writethrough-testbed-";
/// How long the reapers of the last testbeds may take.
const BOUND: Duration = Duration::from_secs(30);
/// The pause between two looks.
const TICK: Duration = Duration::from_millis(50);

/// The folder for temporary files of one run.
#[derive(Debug)]
pub(crate) struct Scratch {
    folder: PathBuf,
    keep: bool,
    bound: Duration,
}

/// A process that should have ended.
#[derive(Debug)]
struct Stray {
    pid: u32,
    command: String,
}

impl Scratch {
    pub(crate) fn new() -> anyhow::Result<Self> {
        // Short, because Unix sockets are made below it; open to a user who only passes through,
        // because Postgres refuses to run as root.
        let name = format!("wt-test-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir(&folder)
            .and_then(|()| fs::set_permissions(&folder, fs::Permissions::from_mode(0o711)))
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        Ok(Self {
            folder: folder.canonicalize()?,
            keep: std::env::var_os(KEEP).is_some_and(|value| !value.is_empty()),
            bound: BOUND,
        })
    }

    /// The folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes a command, and all that it starts, part of the run.
    pub(crate) fn mark(&self, command: &mut Command) {
        command.env("TMPDIR", &self.folder).env(MARK, &self.folder);
    }

    /// Waits until nothing is left, within a bound, and says what is left then. What is left is
    /// killed, since it is ours. A note is something that is no failure.
    pub(crate) fn check(&self) -> (Vec<String>, Vec<String>) {
        let give_up = Instant::now() + self.bound;
        let (strays, folders) = loop {
            let strays = self.strays();
            let folders = self.folders(|name| name.starts_with(TESTBED));
            let clean = strays.is_empty() && (folders.is_empty() || self.keep);
            if clean || Instant::now() >= give_up {
                break (strays, folders);
            }
            std::thread::park_timeout(TICK);
        };
        let mut left = Vec::new();
        for stray in &strays {
            left.push(format!("process {}: {}", stray.pid, stray.command));
            kill_process(stray.pid);
        }
        let mut notes = Vec::new();
        for folder in folders {
            if self.keep {
                notes.push(format!("kept, as {KEEP} asks: {}", folder.display()));
            } else {
                left.push(format!("folder {}", folder.display()));
            }
        }
        // The template of Postgres' data folder is made to be kept, elsewhere than here.
        let expected = |name: &str| name.starts_with("writethrough-postgres-template-");
        for other in self.folders(|name| !name.starts_with(TESTBED) && !expected(name)) {
            notes.push(format!("a temporary file was left: {}", other.display()));
        }
        (left, notes)
    }

    /// What is in the folder, by name.
    fn folders(&self, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let named = entries.filter(|entry| entry.file_name().to_str().is_none_or(&wanted));
        named.map(|entry| entry.path()).collect()
    }

    /// Every process of the run. A server that overwrites its environment with its title is still
    /// known by its working folder or its arguments.
    fn strays(&self) -> Vec<Stray> {
        let own = std::process::id();
        let mut strays = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let process = entry.path();
            let read = |file: &str| fs::read(process.join(file)).unwrap_or_default();
            let arguments = read("cmdline");
            // A process that has ended and was not waited for yet has no arguments.
            if pid == own || arguments.is_empty() {
                continue;
            }
            let cwd = fs::read_link(process.join("cwd")).unwrap_or_default();
            let path = self.folder.as_os_str().as_bytes();
            if cwd.starts_with(&self.folder)
                || contains(&arguments, path)
                || contains(&read("environ"), path)
            {
                let command = String::from_utf8_lossy(&arguments).replace('\0', " ");
                strays.push(Stray {
                    pid,
                    command: command.trim().chars().take(200).collect(),
                });
            }
        }
        strays
    }

    fn remove(&self) {
        if !self.keep {
            // Best effort: what matters was reported by `check`.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.remove();
    }
}

fn contains(bytes: &[u8], path: &[u8]) -> bool {
    bytes.windows(path.len()).enumerate().any(|(at, window)| {
        let ends = bytes
            .get(at + path.len())
            .is_none_or(|next| b"\0/ =:".contains(next));
        window == path && ends
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Stdio;

    fn scratch(name: &str) -> Scratch {
        let folder = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let folder = folder.canonicalize().unwrap();
        Scratch {
            folder,
            keep: false,
            bound: Duration::from_secs(10),
        }
    }

    #[test]
    fn a_process_is_known_by_its_mark_its_folder_or_its_arguments() {
        let scratch = scratch("xtask-strays");
        let shell = || {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", "read line"]).stdin(Stdio::piped());
            command
        };
        let mut marked = shell();
        scratch.mark(&mut marked);
        let mut inside = shell();
        inside.current_dir(&scratch.folder);
        let mut named = shell();
        named.arg(scratch.folder.join("data"));
        let children: Vec<_> = [marked, inside, named]
            .iter_mut()
            .map(|command| command.spawn().unwrap())
            .collect();
        let mut stranger = shell()
            .arg(format!("{}0", scratch.folder.display()))
            .spawn()
            .unwrap();
        let bound = Instant::now() + Duration::from_secs(10);
        let found = loop {
            let mut found: Vec<u32> = scratch.strays().iter().map(|stray| stray.pid).collect();
            found.sort_unstable();
            // A child that has not reached its program yet still looks like this process.
            if found.len() == 3 || Instant::now() > bound {
                break found;
            }
            std::thread::yield_now();
        };
        let mut expected: Vec<u32> = children.iter().map(|child| child.id()).collect();
        expected.sort_unstable();
        for mut child in children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        assert_eq!(found, expected);
        assert!(scratch.strays().is_empty());
    }

    #[test]
    fn a_folder_that_goes_away_in_time_is_no_failure_and_other_files_are_noted() {
        let scratch = scratch("xtask-folders");
        let testbed = scratch.folder.join("writethrough-testbed-0a1b2c3d");
        fs::create_dir(&testbed).unwrap();
        fs::create_dir(scratch.folder.join("writethrough-postgres-template-0-1")).unwrap();
        fs::write(scratch.folder.join("other"), "").unwrap();
        let reaper = std::thread::spawn({
            let testbed = testbed.clone();
            move || {
                std::thread::park_timeout(Duration::from_millis(200));
                fs::remove_dir(testbed).unwrap();
            }
        });
        let (left, notes) = scratch.check();
        reaper.join().unwrap();
        assert_eq!(left, Vec::<String>::new());
        assert_eq!(notes.len(), 1, "{notes:?}");
        let folder = scratch.folder.clone();
        drop(scratch);
        assert!(!folder.exists());
    }

    #[test]
    fn what_is_left_at_the_bound_is_reported_and_killed() {
        let mut scratch = scratch("xtask-left");
        scratch.bound = Duration::from_millis(100);
        fs::create_dir(scratch.folder.join("writethrough-testbed-0a1b2c3d")).unwrap();
        let mut server = Command::new("sleep");
        let mut server = server
            .arg("60")
            .current_dir(&scratch.folder)
            .spawn()
            .unwrap();
        let (left, _) = scratch.check();
        assert_eq!(left.len(), 2, "{left:?}");
        assert!(left[0].ends_with("sleep 60"), "{left:?}");
        assert!(!server.wait().unwrap().success());
        scratch.keep = true;
        let (left, notes) = scratch.check();
        assert_eq!((left.len(), notes.len()), (0, 1));
        scratch.keep = false;
    }
}
