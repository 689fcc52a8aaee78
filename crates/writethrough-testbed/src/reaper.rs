//! The shell process that cleans up after a testbed whose owner has died.
//!
//! It must outlive the owner, so it leads a session of its own (Ctrl-C does not reach it) and has no
//! parent-death signal. It is also how a testbed ends in the ordinary case, so that the way out that
//! matters is the one that is always used.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::process::setsid;

use crate::error::{Error, Result};
use crate::wait::block_until;

const SCRIPT: &str = include_str!("reaper.sh");

/// How long the end of a testbed may block its destructor.
const LAST_BOUND: Duration = Duration::from_secs(20);

/// A reaper that runs.
#[derive(Debug)]
pub(crate) struct Reaper {
    shell: Mutex<Child>,
    pipe: Mutex<Option<ChildStdin>>,
}

impl Reaper {
    /// Starts the reaper of `folder`.
    #[allow(unsafe_code, reason = "pre_exec, for calls that are async-signal-safe")]
    pub(crate) fn start(folder: &Path, keep: bool) -> Result<Self> {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", SCRIPT, "testbed-reaper"])
            .arg(folder)
            .arg(if keep { "keep" } else { "remove" })
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: setsid is async-signal-safe and touches no memory.
        unsafe {
            command.pre_exec(|| Ok(setsid().map(drop)?));
        }
        let mut shell = command
            .spawn()
            .map_err(Error::io("start the reaper (/bin/sh)"))?;
        let pipe = Mutex::new(shell.stdin.take());
        Ok(Self {
            shell: Mutex::new(shell),
            pipe,
        })
    }

    /// Puts the process group `pid` on the reaper's list.
    ///
    /// # Errors
    ///
    /// When the reaper is gone, because then nothing would guarantee the group's end.
    pub(crate) fn watch(&self, pid: u32) -> Result<()> {
        self.tell("watch", pid)
            .map_err(Error::io("reach the reaper"))
    }

    /// Takes a group off the list after its leader was waited for, since its number may be used again.
    pub(crate) fn forget(&self, pid: u32) {
        // A reaper that is gone has no list.
        let _ = self.tell("forget", pid);
    }

    fn tell(&self, verb: &str, pid: u32) -> std::io::Result<()> {
        match self.pipe.lock().as_mut() {
            Some(pipe) => pipe.write_all(format!("{verb} {pid}\n").as_bytes()),
            None => Ok(()),
        }
    }

    /// Lets the reaper do its work, and blocks until it has ended.
    pub(crate) fn finish(&self) {
        drop(self.pipe.lock().take());
        let mut shell = self.shell.lock();
        block_until(LAST_BOUND, || !matches!(shell.try_wait(), Ok(None)));
    }
}
