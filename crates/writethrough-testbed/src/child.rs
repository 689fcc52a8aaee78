//! Programs under test, such as API nodes.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;

use crate::error::{Error, Result};
use crate::ground::Ground;
use crate::process::{Process, Reach};
use crate::program::own_environment;

/// What to start, and how.
#[derive(Debug, Clone)]
pub struct ChildSpec {
    /// A short name for folders and errors, such as `api`; a number is added.
    pub name: String,
    /// The program: a path, or a name to be looked up in `PATH`.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Its variables, beside those that every program needs: it has an environment of its own.
    pub env: Vec<(OsString, OsString)>,
    /// The folder to run in, instead of the caller's.
    pub folder: Option<PathBuf>,
}

impl ChildSpec {
    /// Describes a program without arguments.
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            folder: None,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Sets the folder to run in.
    #[must_use]
    pub fn folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }
}

/// A program that runs in a testbed. Dropping it kills it and every process of its group.
#[derive(Debug)]
pub struct Child {
    process: Arc<Process>,
    spec: ChildSpec,
    folder: PathBuf,
}

impl Child {
    pub(crate) async fn launch(ground: &Ground, spec: ChildSpec) -> Result<Self> {
        let (name, folder) = ground.folder_for(&spec.name)?;
        let process = ground.process(name, folder.join("log"), Reach::Group);
        let child = Self {
            process,
            spec,
            folder,
        };
        child.start().await?;
        Ok(child)
    }

    /// The name of this child: its kind and a number.
    pub fn name(&self) -> &str {
        self.process.name()
    }

    /// A folder of its own in the testbed, for its log and whatever else.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its process id, or `None` when it has ended.
    pub fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    /// Whether it has not ended. A paused child is running.
    pub fn is_running(&self) -> bool {
        self.pid().is_some()
    }

    /// Starts it again after it has ended.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] when it runs, [`Error::Io`] when it cannot be started.
    pub async fn start(&self) -> Result<()> {
        let mut command = Command::new(&self.spec.program);
        own_environment(&mut command, &[]).args(&self.spec.args);
        command.envs(self.spec.env.iter().map(|(name, value)| (name, value)));
        if let Some(folder) = &self.spec.folder {
            command.current_dir(folder);
        }
        self.process.start(command).await
    }

    /// Kills it with SIGKILL, together with its group, and starts it again.
    ///
    /// # Errors
    ///
    /// As [`Child::start`].
    pub async fn restart(&self) -> Result<()> {
        self.kill().await?;
        self.start().await
    }

    /// Kills it with SIGKILL, together with its group. It is gone when this returns.
    ///
    /// # Errors
    ///
    /// When the kernel does not end it within 10 s.
    pub async fn kill(&self) -> Result<()> {
        self.process.kill().await
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] when it runs on; it is left running.
    pub async fn terminate(&self, bound: Duration) -> Result<ExitStatus> {
        self.process.signal_main(Signal::TERM)?;
        self.process.wait(bound).await
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] when it runs on.
    pub async fn wait(&self, bound: Duration) -> Result<ExitStatus> {
        self.process.wait(bound).await
    }

    /// Stops it where it is (SIGSTOP); it does nothing more from the moment this returns.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] when it is not running.
    pub async fn pause(&self) -> Result<()> {
        self.process.pause().await
    }

    /// Lets a paused child go on (SIGCONT).
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] when it is not running.
    pub async fn resume(&self) -> Result<()> {
        self.process.resume().await
    }

    /// The file that collects its standard output and error, over all its runs.
    pub fn log_path(&self) -> &Path {
        self.process.log()
    }

    /// Everything it has written, over all its runs.
    ///
    /// # Errors
    ///
    /// When the log cannot be read.
    pub fn log(&self) -> Result<String> {
        let bytes = std::fs::read(self.log_path())
            .map_err(Error::io(format!("read {}", self.log_path().display())))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The last lines that its present or last run has written, if they fit into 8 KiB.
    pub fn log_tail(&self, lines: usize) -> String {
        self.process.log_tail(lines)
    }

    /// Waits until its present run has written a line that contains `text`, and returns that line.
    ///
    /// # Errors
    ///
    /// [`Error::Ended`] when it ends without having written it, [`Error::TimedOut`].
    pub async fn wait_for_log(&self, text: &str, bound: Duration) -> Result<String> {
        self.process
            .until(&format!("to log `{text}`"), bound, || {
                // In this order: what it wrote before it ended counts.
                let ended = self.process.ended();
                let log = self.process.run_log();
                let line = log
                    .lines()
                    .find(|line| line.contains(text))
                    .map(str::to_owned);
                async move {
                    match (line, ended) {
                        (Some(line), _) => Some(Ok(line)),
                        (None, Some(status)) => Some(Err(status)),
                        (None, None) => None,
                    }
                }
            })
            .await?
            .map_err(|status| self.process.ended_error(status))
    }

    /// The signal that ended it last, unless it runs or ended otherwise.
    pub fn ended_by_signal(&self) -> Option<i32> {
        self.process.ended().and_then(|status| status.signal())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.process.close();
    }
}
