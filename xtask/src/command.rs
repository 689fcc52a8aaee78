//! Runs a command in a process group of its own, line by line, within a bound.

use std::io::{BufRead, BufReader, PipeReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::interrupt;

/// How often the bound, the signals and the process are looked at while there is no output.
const TICK: Duration = Duration::from_millis(100);
/// How long a group may take to end after SIGTERM.
const TERM_GRACE: Duration = Duration::from_secs(5);
/// How long output may still come after the process has ended. Whoever holds the pipe open beyond
/// it is a process that was left behind.
const DRAIN_GRACE: Duration = Duration::from_secs(3);

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// By itself.
    Exited(ExitStatus),
    /// It was killed, because the time was up.
    TimedOut,
    /// It was killed, because the user asked for it.
    Interrupted,
}

impl End {
    pub(crate) fn ok(self) -> bool {
        matches!(self, Self::Exited(status) if status.success())
    }

    /// What to tell people.
    pub(crate) fn describe(self) -> String {
        match self {
            Self::Exited(status) => status.to_string(),
            Self::TimedOut => "killed: the time was up".to_owned(),
            Self::Interrupted => "interrupted".to_owned(),
        }
    }
}

/// Runs `command` and hands each line of its output, standard and error in the order they were
/// written, to `line`; `None` when there was none for a tick. At `deadline`, and on a signal, the
/// whole process group is ended.
pub(crate) fn run(
    mut command: Command,
    deadline: Instant,
    mut line: impl FnMut(Option<&str>),
) -> anyhow::Result<End> {
    let name = command.get_program().to_string_lossy().into_owned();
    let (reader, writer) = std::io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .process_group(0);
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start `{name}`"))?;
    // Closes our ends of the pipe, so that it ends with the command.
    drop(command);
    let group = -libc::pid_t::try_from(child.id())?;
    let lines = lines_of(reader);
    let mut forced: Option<(End, Instant)> = None;
    let mut exited: Option<(ExitStatus, Instant)> = None;
    let signals_before = interrupt::count();

    loop {
        match lines.recv_timeout(TICK) {
            Ok(text) => line(Some(&text)),
            Err(RecvTimeoutError::Timeout) => line(None),
            Err(RecvTimeoutError::Disconnected) if exited.is_some() => break,
            // It has closed its output and still runs.
            Err(RecvTimeoutError::Disconnected) => std::thread::park_timeout(TICK),
        }
        if let Some((_, at)) = exited {
            if at.elapsed() > DRAIN_GRACE {
                line(Some(
                    "xtask: a process that the command left behind holds its output open",
                ));
                break;
            }
            continue;
        }
        let signals = interrupt::count() - signals_before;
        if forced.is_none() {
            let why = if signals > 0 {
                Some(End::Interrupted)
            } else if Instant::now() >= deadline {
                Some(End::TimedOut)
            } else {
                None
            };
            if let Some(why) = why {
                forced = Some((why, Instant::now()));
                kill(group, libc::SIGTERM);
            }
        }
        // The group's number is ours until its leader is waited for, hence the order.
        if forced.is_some_and(|(_, at)| at.elapsed() > TERM_GRACE || signals > 1) {
            kill(group, libc::SIGKILL);
        }
        exited = child.try_wait()?.map(|status| (status, Instant::now()));
    }
    Ok(match (forced, exited) {
        (Some((why, _)), _) => why,
        (None, Some((status, _))) => End::Exited(status),
        (None, None) => End::Exited(child.wait()?),
    })
}

/// Runs `command` and returns its whole output.
pub(crate) fn output(command: Command, deadline: Instant) -> anyhow::Result<(End, String)> {
    let mut text = String::new();
    let end = run(command, deadline, |line| {
        if let Some(line) = line {
            text.push_str(line);
            text.push('\n');
        }
    })?;
    Ok((end, text))
}

#[allow(unsafe_code, reason = "only kill, which touches no memory")]
fn kill(process: libc::pid_t, signal: libc::c_int) {
    // SAFETY: no memory is involved. A process that is gone already is what was wanted.
    unsafe { libc::kill(process, signal) };
}

/// Ends one process at once.
pub(crate) fn kill_process(pid: u32) {
    if let Ok(pid) = libc::pid_t::try_from(pid) {
        kill(pid, libc::SIGKILL);
    }
}

/// The lines that come out of a pipe; a byte that is not UTF-8 becomes a replacement character.
fn lines_of(pipe: PipeReader) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut bytes = Vec::new();
        while matches!(pipe.read_until(b'\n', &mut bytes), Ok(1..)) {
            let text = String::from_utf8_lossy(&bytes);
            if sender
                .send(text.trim_end_matches(['\n', '\r']).to_owned())
                .is_err()
            {
                return;
            }
            bytes.clear();
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn both_outputs_come_in_the_order_they_were_written() {
        let (end, text) = output(
            shell("echo 1; echo 2 >&2; echo 3; printf 4; exit 7"),
            soon(),
        )
        .unwrap();
        assert_eq!(text, "1\n2\n3\n4\n");
        assert!(matches!(end, End::Exited(status) if status.code() == Some(7)));
    }

    #[test]
    fn at_the_deadline_the_whole_group_ends() {
        // The grandchild would hold the pipe open for long after the shell's end.
        let deadline = Instant::now() + Duration::from_millis(300);
        let started = Instant::now();
        let (end, text) = output(shell("sleep 60 & echo pid $!; wait"), deadline).unwrap();
        assert_eq!(end, End::TimedOut);
        assert!(started.elapsed() < Duration::from_secs(20));
        let pid = text.trim().strip_prefix("pid ").unwrap();
        let gone = Instant::now() + Duration::from_secs(10);
        // A zombie nobody has waited for yet has an empty command line.
        let alive = || std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|c| !c.is_empty());
        while alive() {
            assert!(
                Instant::now() < gone,
                "process {pid} has survived its group"
            );
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_process_left_behind_does_not_hold_up_the_end() {
        let started = Instant::now();
        let (end, text) = output(shell("setsid sleep 60 & echo $!"), soon()).unwrap();
        let (pid, rest) = text.split_once('\n').unwrap();
        kill_process(pid.parse().unwrap());
        assert!(end.ok());
        assert!(rest.contains("left behind"), "{text}");
        assert!(started.elapsed() < Duration::from_secs(15));
    }
}
