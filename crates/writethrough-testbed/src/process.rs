//! Programs that run at most once at a time, and end with the process that started them.
//!
//! All children are started by one thread that lives as long as the process: the kernel sends the
//! parent-death signal when the *thread* that forked ends, not the process.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, LazyLock, mpsc};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::process::{
    Pid, Signal, getpid, getppid, kill_process, kill_process_group, set_parent_process_death_signal,
};
use tokio::io::AsyncReadExt;
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::reaper::Reaper;
use crate::wait::{block_until, until};

/// How long a signal that cannot be refused may take to do its work.
const SIGNAL_BOUND: Duration = Duration::from_secs(10);

/// How much of a log an error carries.
const TAIL_LINES: usize = 20;
const TAIL_BYTES: u64 = 8 * 1024;

type Started = std::io::Result<std::process::Child>;
type Order = (Command, oneshot::Sender<Started>);

/// Starts a child that is killed when this process dies.
#[allow(unsafe_code, reason = "pre_exec, for calls that are async-signal-safe")]
async fn spawn(mut command: Command) -> Started {
    static SPAWNER: LazyLock<Option<mpsc::Sender<Order>>> = LazyLock::new(|| {
        let (orders, queue) = mpsc::channel::<Order>();
        let work = move || {
            for (mut command, answer) in queue {
                if let Err(Ok(mut unwanted)) = answer.send(command.spawn()) {
                    // The future that ordered it was dropped.
                    let _ = unwanted.kill();
                    let _ = unwanted.wait();
                }
            }
        };
        std::thread::Builder::new()
            .name("testbed-spawner".to_owned())
            .spawn(work)
            .ok()?;
        Some(orders)
    });

    let parent = getpid();
    // SAFETY: only async-signal-safe calls. The standard library changes the user before this runs,
    // which matters because a change of user clears the parent-death signal.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before the signal was asked for.
            if getppid() != Some(parent) {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            Ok(())
        });
    }
    let gone = || std::io::Error::other("the thread that starts children could not be started");
    let (answer, started) = oneshot::channel();
    SPAWNER
        .as_ref()
        .ok_or_else(gone)?
        .send((command, answer))
        .map_err(|_| gone())?;
    started.await.map_err(|_| gone())?
}

/// Which processes belong to a program.
#[derive(Debug)]
pub(crate) enum Reach {
    /// Those of its process group.
    Group,
    /// Those named `postgres` that work in this folder: every Postgres backend leads a group of its own.
    Postgres(PathBuf),
}

/// A program that can be started, signalled and started again, and its log.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    log: PathBuf,
    reach: Reach,
    reaper: Arc<Reaper>,
    slot: Mutex<Slot>,
}

#[derive(Debug, Default)]
struct Slot {
    child: Option<std::process::Child>,
    /// How the last child ended.
    ended: Option<ExitStatus>,
    /// Where the log of this child begins.
    log_start: u64,
    /// Set at the end of the testbed: no more starts.
    closed: bool,
}

impl Process {
    pub(crate) fn new(name: String, log: PathBuf, reach: Reach, reaper: Arc<Reaper>) -> Self {
        Self {
            name,
            log,
            reach,
            reaper,
            slot: Mutex::default(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// Starts the program. Its output is appended to the log.
    pub(crate) async fn start(&self, mut command: Command) -> Result<()> {
        if self.pid().is_some() {
            return Err(Error::Misuse(format!("{} is running already", self.name)));
        }
        let action = || format!("start {}", self.name);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .map_err(Error::io(action()))?;
        let log_start = log.metadata().map_err(Error::io(action()))?.len();
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stderr(log.try_clone().map_err(Error::io(action()))?)
            .stdout(log);
        let child = spawn(command).await.map_err(Error::io(action()))?;
        let pid = child.id();
        let closed = {
            let mut slot = self.slot.lock();
            slot.child = Some(child);
            slot.log_start = log_start;
            slot.closed
        };
        if closed {
            self.kill_blocking();
            return Err(Error::Misuse(format!(
                "{} has no testbed any more",
                self.name
            )));
        }
        self.reaper.watch(pid)
    }

    /// The process id, while it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        let mut slot = self.slot.lock();
        self.look(&mut slot);
        slot.child.as_ref().map(std::process::Child::id)
    }

    /// How the program ended last, unless it runs.
    pub(crate) fn ended(&self) -> Option<ExitStatus> {
        let mut slot = self.slot.lock();
        self.look(&mut slot);
        if slot.child.is_some() {
            None
        } else {
            slot.ended
        }
    }

    /// Waits for the child if it has ended.
    fn look(&self, slot: &mut Slot) {
        if let Some(child) = slot.child.as_mut()
            && let Ok(Some(status)) = child.try_wait()
        {
            self.reaper.forget(child.id());
            slot.child = None;
            slot.ended = Some(status);
        }
    }

    /// Sends a signal to the main process only.
    pub(crate) fn signal_main(&self, signal: Signal) -> Result<()> {
        let mut slot = self.slot.lock();
        self.look(&mut slot);
        match &slot.child {
            Some(child) => {
                send(signal, child.id());
                Ok(())
            }
            None => Err(Error::Misuse(format!("{} is not running", self.name))),
        }
    }

    /// Every process of the program that has not ended, the main one first.
    fn members(&self, slot: &Slot) -> Vec<u32> {
        let main = slot.child.as_ref().map(std::process::Child::id);
        let others: Vec<u32> = match (&self.reach, main) {
            (Reach::Group, None) => Vec::new(),
            (Reach::Group, Some(main)) => all_processes()
                .filter(|pid| stat(*pid).is_some_and(|found| found.group == main))
                .collect(),
            (Reach::Postgres(folder), _) => all_processes()
                .filter(|pid| works_in(*pid, folder) && is_named(*pid, "postgres"))
                .collect(),
        };
        main.into_iter()
            .chain(others.into_iter().filter(|pid| Some(*pid) != main))
            .filter(|pid| stat(*pid).is_some_and(|found| found.state != 'Z'))
            .collect()
    }

    /// Sends a signal to every process that `wants` it; `true` when none did.
    fn signal_all(&self, signal: Signal, wants: impl Fn(char) -> bool) -> bool {
        let mut slot = self.slot.lock();
        self.look(&mut slot);
        let wanting: Vec<u32> = self
            .members(&slot)
            .into_iter()
            .filter(|pid| stat(*pid).is_some_and(|found| wants(found.state)))
            .collect();
        let none = wanting.is_empty();
        match (&self.reach, &slot.child) {
            // A whole group at once, so that nobody in it can fork in between.
            (Reach::Group, Some(main)) if !none => send_to_group(signal, main.id()),
            _ => wanting.iter().for_each(|pid| send(signal, *pid)),
        }
        self.look(&mut slot);
        none && (signal != Signal::KILL || slot.child.is_none())
    }

    fn kill_step(&self) -> bool {
        self.signal_all(Signal::KILL, |_| true)
    }

    /// Kills every process of the program; they are gone when this returns. Fine when none runs.
    pub(crate) async fn kill(&self) -> Result<()> {
        self.poll("to die", || self.kill_step()).await
    }

    /// The same in a destructor.
    pub(crate) fn kill_blocking(&self) {
        block_until(SIGNAL_BOUND, || self.kill_step());
    }

    /// Kills the program and refuses every later start.
    pub(crate) fn close(&self) {
        self.slot.lock().closed = true;
        self.kill_blocking();
    }

    /// Stops every process of the program where it is; none runs when this returns.
    pub(crate) async fn pause(&self) -> Result<()> {
        self.must_run()?;
        self.poll("to pause", || {
            self.signal_all(Signal::STOP, |state| !stopped(state))
        })
        .await
    }

    /// Lets a paused program go on.
    pub(crate) async fn resume(&self) -> Result<()> {
        self.must_run()?;
        self.poll("to resume", || self.signal_all(Signal::CONT, stopped))
            .await
    }

    fn must_run(&self) -> Result<()> {
        match self.pid() {
            Some(_) => Ok(()),
            None => Err(Error::Misuse(format!("{} is not running", self.name))),
        }
    }

    async fn poll(&self, what: &str, mut look: impl FnMut() -> bool) -> Result<()> {
        self.until(what, SIGNAL_BOUND, || {
            let done = look().then_some(());
            async move { done }
        })
        .await
    }

    /// Waits for the program to end by itself.
    pub(crate) async fn wait(&self, bound: Duration) -> Result<ExitStatus> {
        self.until("to end", bound, || {
            let ended = self.ended();
            async move { ended }
        })
        .await
    }

    /// Polls a fact about this program; an error carries the last lines of its log.
    pub(crate) async fn until<T, F, Fut>(&self, what: &str, bound: Duration, look: F) -> Result<T>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Option<T>>,
    {
        until(&format!("{} {what}", self.name), bound, look)
            .await
            .map_err(|error| match error {
                Error::TimedOut { fact, bound, .. } => Error::TimedOut {
                    fact,
                    bound,
                    log: self.log_for_error(),
                },
                other => other,
            })
    }

    /// The error that says that the program has ended.
    pub(crate) fn ended_error(&self, status: ExitStatus) -> Error {
        Error::Ended {
            program: self.name.clone(),
            status: words(status),
            log: self.log_for_error(),
        }
    }

    /// What the present or last run of the program has written.
    pub(crate) fn run_log(&self) -> String {
        self.read_log(u64::MAX)
    }

    /// The same, but only so many bytes at its end.
    fn read_log(&self, limit: u64) -> String {
        let start = self.slot.lock().log_start;
        let read = || -> std::io::Result<String> {
            let mut log = std::fs::File::open(&self.log)?;
            let length = log.metadata()?.len();
            log.seek(SeekFrom::Start(start.max(length.saturating_sub(limit))))?;
            let mut bytes = Vec::new();
            log.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        read().unwrap_or_default()
    }

    /// The last `lines` lines of it, if they fit into 8 KiB.
    pub(crate) fn log_tail(&self, lines: usize) -> String {
        let log = self.read_log(TAIL_BYTES);
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    fn log_for_error(&self) -> String {
        let tail = self.log_tail(TAIL_LINES);
        if tail.is_empty() {
            format!("; its log {} is empty", self.log.display())
        } else {
            format!("; the end of its log {}:\n{tail}", self.log.display())
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.close();
    }
}

/// A short program, run to its end. Dropped half-way, it is killed.
#[derive(Debug)]
struct Tool {
    child: std::process::Child,
    reaper: Arc<Reaper>,
    ended: bool,
}

impl Drop for Tool {
    fn drop(&mut self) {
        if !self.ended {
            send_to_group(Signal::KILL, self.child.id());
            block_until(SIGNAL_BOUND, || !matches!(self.child.try_wait(), Ok(None)));
        }
        self.reaper.forget(self.child.id());
    }
}

/// Runs a program to its end and returns what it wrote to its standard output.
///
/// # Errors
///
/// When it cannot be started, fails, or takes longer than `bound`; then it is killed.
pub(crate) async fn run(
    name: &str,
    mut command: Command,
    reaper: &Arc<Reaper>,
    bound: Duration,
) -> Result<String> {
    command
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = spawn(command)
        .await
        .map_err(Error::io(format!("start {name}")))?;
    let mut tool = Tool {
        child,
        reaper: Arc::clone(reaper),
        ended: false,
    };
    reaper.watch(tool.child.id())?;

    let pipes = tool.child.stdout.take().zip(tool.child.stderr.take());
    let (output, complaints) =
        pipes.ok_or_else(|| Error::Misuse(format!("{name} has no output")))?;
    let action = || format!("read the output of {name}");
    let mut output = tokio::process::ChildStdout::from_std(output).map_err(Error::io(action()))?;
    let mut complaints =
        tokio::process::ChildStderr::from_std(complaints).map_err(Error::io(action()))?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let work = async {
        let reads = tokio::join!(
            output.read_to_end(&mut out),
            complaints.read_to_end(&mut err)
        );
        reads.0.and(reads.1).map_err(Error::io(action()))?;
        until("", bound, || {
            let ended = tool.child.try_wait().transpose();
            async move { ended }
        })
        .await?
        .map_err(Error::io(format!("wait for {name}")))
    };
    let status = tokio::time::timeout(bound, work)
        .await
        .map_err(|_| Error::TimedOut {
            fact: format!("{name} to end"),
            bound,
            log: String::new(),
        })??;
    tool.ended = true;
    if status.success() {
        return Ok(String::from_utf8_lossy(&out).into_owned());
    }
    let said = String::from_utf8_lossy(&err);
    let last: Vec<&str> = said.trim_end().lines().rev().take(TAIL_LINES).collect();
    let last: Vec<&str> = last.into_iter().rev().collect();
    Err(Error::Ended {
        program: name.to_owned(),
        status: words(status),
        log: format!(": {}", last.join("\n")),
    })
}

/// An exit status in words.
fn words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown".to_owned(),
    }
}

/// Sends a signal. A process that has just ended is no error; nobody has waited for it yet.
fn send(signal: Signal, pid: u32) {
    if let Some(pid) = Pid::from_raw(pid as i32) {
        let _ = kill_process(pid, signal);
    }
}

/// Sends a signal to the process group that `leader` leads.
fn send_to_group(signal: Signal, leader: u32) {
    if let Some(leader) = Pid::from_raw(leader as i32) {
        let _ = kill_process_group(leader, signal);
    }
}

fn stopped(state: char) -> bool {
    matches!(state, 'T' | 't')
}

/// What the kernel says about a process.
struct Stat {
    state: char,
    group: u32,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may itself contain any character.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let group = fields.nth(1)?.parse().ok()?;
    Some(Stat { state, group })
}

fn all_processes() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn works_in(pid: u32, folder: &Path) -> bool {
    std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|found| found == folder)
}

fn is_named(pid: u32, name: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|found| found.trim_end() == name)
}
