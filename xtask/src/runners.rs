//! Runs what was built, test binaries and documentation tests, side by side.
//!
//! Most tests wait, for servers and for time to pass, and leave the processors idle. So there are
//! lanes, in each of which one runner at a time, or a few, make use of them: see [`Lane`]. The output
//! of a runner is held back until it has ended, so that outputs do not mix.

use std::collections::{BTreeMap, VecDeque};
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::command;
use crate::interrupt;
use crate::transcript::{Report, Transcript};

/// How long one runner may take.
const BOUND: Duration = Duration::from_secs(10 * 60);
/// How long nothing is said.
const QUIET: Duration = Duration::from_secs(30);
/// How many lines of one runner's output are held back.
const HELD: usize = 20_000;

/// What a runner needs of the machine, and beside what it may run therefore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// It judges times, of servers that it keeps busy: one at a time, before all others.
    Judges,
    /// It waits most of the time: a few at a time.
    Waits,
    /// It computes and judges no times: one at a time, with what the others leave of the processors.
    Computes,
}

impl Lane {
    const ALL: [Self; 3] = [Self::Judges, Self::Waits, Self::Computes];

    /// How many run at a time.
    fn width(self) -> usize {
        match self {
            Self::Judges | Self::Computes => 1,
            Self::Waits => 2,
        }
    }

    /// How far they stand back where there is not enough for all.
    fn niceness(self) -> libc::c_int {
        match self {
            Self::Judges | Self::Waits => 0,
            Self::Computes => 10,
        }
    }
}

/// The name of the runner that is the lab's exercises.
pub(crate) const LAB: &str = "the lab's exercises";
/// The name of the runner that is all documentation tests.
pub(crate) const DOCUMENTATION: &str = "documentation tests";

/// In this order. Whatever is not listed waits, and comes after those that are.
const LANES: &[(&str, Lane)] = &[
    ("writethrough-cli: tests/torture.rs", Lane::Judges),
    ("writethrough-cli: tests/faults.rs", Lane::Judges),
    ("writethrough-cli: tests/slow_store.rs", Lane::Judges),
    ("writethrough-cli: tests/cost.rs", Lane::Judges),
    ("writethrough: tests/redis.rs", Lane::Judges),
    ("writethrough: tests/engine.rs", Lane::Waits),
    (LAB, Lane::Waits),
    ("writethrough-cli: tests/outages.rs", Lane::Waits),
    ("writethrough-cli: tests/adopt.rs", Lane::Computes),
    ("writethrough: tests/compile_fail.rs", Lane::Computes),
    ("writethrough-protocol: tests/model/main.rs", Lane::Computes),
    ("writethrough: tests/memory.rs", Lane::Computes),
    ("writethrough: tests/transitions.rs", Lane::Computes),
    (DOCUMENTATION, Lane::Computes),
    ("writethrough-check: src/lib.rs", Lane::Computes),
];

/// The runner's place in [`LANES`], and its lane.
fn lane(name: &str) -> (usize, Lane) {
    let place = LANES.iter().position(|(listed, _)| *listed == name);
    place.map_or((LANES.len(), Lane::Waits), |place| (place, LANES[place].1))
}

/// Something to run.
#[derive(Debug)]
pub(crate) struct Runner {
    pub(crate) name: String,
    pub(crate) command: Command,
    pub(crate) kind: Kind,
}

/// How a runner's output is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It is libtest's: tests are counted.
    Tests,
    /// It is for people: only the exit status counts.
    Other,
}

/// A runner that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) name: String,
    pub(crate) report: Report,
    /// What there is to show.
    pub(crate) output: Vec<String>,
    pub(crate) took: Duration,
}

/// What the threads tell.
enum News {
    Begun(String),
    Ended(Ended),
}

/// Runs all, and tells of each that it has ended. Every runner is told of: one that cannot be started,
/// that does not end, or whose turn did not come has failed.
pub(crate) fn run(
    runners: Vec<Runner>,
    deadline: Instant,
    verbose: bool,
    mut tell: impl FnMut(Ended),
) {
    let queues = queues(runners);
    let (news, heard) = channel();
    thread::scope(|scope| {
        let queue_of = |lane: Lane| queues.iter().filter(move |(other, _)| *other == lane);
        for (lane, queue) in queue_of(Lane::Computes) {
            let news = news.clone();
            scope.spawn(move || work(*lane, queue, deadline, verbose, &news));
        }
        // Those that wait have bounds, too: they begin when the judges no longer keep the processors busy.
        let waits: Vec<_> = queue_of(Lane::Waits).collect();
        for (lane, queue) in queue_of(Lane::Judges) {
            let (news, waits) = (news.clone(), waits.clone());
            scope.spawn(move || {
                work(*lane, queue, deadline, verbose, &news);
                for (lane, queue) in waits {
                    for _ in 0..lane.width() {
                        let news = news.clone();
                        scope.spawn(move || work(*lane, queue, deadline, verbose, &news));
                    }
                }
            });
        }
        // So that the news end with the last thread.
        drop(news);
        let mut under_way = BTreeMap::new();
        loop {
            match heard.recv_timeout(QUIET) {
                Ok(News::Begun(name)) => {
                    under_way.insert(name, Instant::now());
                }
                Ok(News::Ended(ended)) => {
                    under_way.remove(&ended.name);
                    tell(ended);
                }
                Err(RecvTimeoutError::Timeout) => {
                    let names: Vec<String> = under_way
                        .iter()
                        .map(|(name, begun)| format!("{name} ({})", time(begun.elapsed())))
                        .collect();
                    println!("  ... {}", names.join(", "));
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    });
}

/// The lanes and what runs in them, in order.
fn queues(mut runners: Vec<Runner>) -> Vec<(Lane, Mutex<VecDeque<Runner>>)> {
    runners.sort_by_key(|runner| lane(&runner.name).0);
    let mut queues: Vec<_> = Lane::ALL.map(|lane| (lane, VecDeque::new())).into();
    for runner in runners {
        let (_, lane) = lane(&runner.name);
        let queue = queues.iter_mut().find(|(other, _)| *other == lane);
        if let Some((_, queue)) = queue {
            queue.push_back(runner);
        }
    }
    let locked = queues.into_iter();
    locked
        .map(|(lane, queue)| (lane, Mutex::new(queue)))
        .collect()
}

/// Makes the calling thread stand back so far, and what it starts from now on.
#[allow(unsafe_code, reason = "the standard library has no priorities")]
fn stand_back(niceness: libc::c_int) -> libc::c_int {
    // SAFETY: no memory is involved. For Linux, process 0 is the calling thread alone.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, niceness) }
}

/// One thread of a lane.
fn work(
    lane: Lane,
    queue: &Mutex<VecDeque<Runner>>,
    deadline: Instant,
    verbose: bool,
    news: &Sender<News>,
) {
    // Without it the run would be less even, and that is all.
    let _ = stand_back(lane.niceness());
    let next = || {
        queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    };
    while let Some(runner) = next() {
        // Whoever listens does so until the last thread has ended.
        let _ = news.send(News::Begun(runner.name.clone()));
        let _ = news.send(News::Ended(run_one(runner, deadline, verbose)));
    }
}

fn run_one(runner: Runner, deadline: Instant, verbose: bool) -> Ended {
    let Runner {
        name,
        command,
        kind,
    } = runner;
    let started = Instant::now();
    let mut ended = Ended {
        report: Report::default(),
        output: Vec::new(),
        took: Duration::ZERO,
        name,
    };
    if interrupt::count() > 0 || started >= deadline {
        let name = &ended.name;
        ended
            .report
            .fail(format!("{name}: was built and did not run"));
        return ended;
    }
    let mut transcript = Transcript::default();
    let mut unheld = 0;
    let end = command::run(command, deadline.min(started + BOUND), |line| {
        let Some(line) = line else {
            return;
        };
        let worth_showing = transcript.line(line) || kind == Kind::Other;
        if !worth_showing && !verbose {
            return;
        }
        if ended.output.len() < HELD {
            ended.output.push(line.to_owned());
        } else {
            unheld += 1;
        }
    });
    if unheld > 0 {
        ended.output.push(format!("xtask: and {unheld} more lines"));
    }
    ended.took = started.elapsed();
    let name = &ended.name;
    match (end, kind) {
        (Err(error), _) => ended.report.fail(format!("{name}: {error:#}")),
        (Ok(end), Kind::Tests) => ended.report = transcript.finish(name, end),
        (Ok(end), Kind::Other) if end.ok() => ended.report.tally.passed += 1,
        (Ok(end), Kind::Other) => ended.report.fail(format!("{name}: {}", end.describe())),
    }
    ended
}

/// A duration as people read it.
pub(crate) fn time(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 {
        format!("{:.1} s", duration.as_secs_f64())
    } else {
        format!("{} m {:02} s", seconds / 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root;

    const GOOD: &str = "echo 'running 1 test'
        echo 'test it_works ... ok'
        echo 'test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s'";

    fn shell(name: &str, script: &str) -> Runner {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        Runner {
            name: name.to_owned(),
            command,
            kind: Kind::Tests,
        }
    }

    /// Runs them within this time; returns what became of each.
    fn outcome(runners: Vec<Runner>, bound: Duration) -> BTreeMap<String, Ended> {
        let mut all = BTreeMap::new();
        run(runners, Instant::now() + bound, false, |ended| {
            let before = all.insert(ended.name.clone(), ended);
            assert!(before.is_none(), "told of twice");
        });
        all
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn whatever_becomes_of_a_runner_the_others_count() {
        let missing = Runner {
            command: Command::new("/nowhere/program"),
            ..shell("missing", "")
        };
        let killed = format!("{GOOD}; echo 'running 1 test'; kill -9 $$");
        let all = outcome(
            vec![
                shell("first", GOOD),
                shell("silent", ":"),
                shell("killed", &killed),
                missing,
                shell("last", &format!("{GOOD}; echo a remark")),
            ],
            LONG,
        );
        assert_eq!(all.len(), 5);
        let passed: Vec<_> = all
            .values()
            .filter(|ended| ended.report.tally.failed == 0)
            .map(|ended| ended.name.as_str())
            .collect();
        assert_eq!(passed, ["first", "last"]);
        for (name, ended) in &all {
            let failures = &ended.report.failures;
            assert_eq!(
                failures.len(),
                ended.report.tally.failed,
                "{name}: {failures:?}"
            );
            assert!(
                failures.iter().all(|line| line.starts_with(name)),
                "{failures:?}"
            );
        }
        assert!(all["killed"].report.failures[0].contains("signal: 9"));
        assert_eq!(all["last"].output, ["a remark"]);
    }

    #[test]
    fn at_the_deadline_what_runs_ends_and_what_waits_is_told_of() {
        let started = Instant::now();
        let hangs = |number: usize| shell(&format!("hangs {number}"), "sleep 50");
        let count = Lane::Waits.width() + 2;
        let all = outcome((0..count).map(hangs).collect(), Duration::from_millis(500));
        assert!(started.elapsed() < Duration::from_secs(30));
        assert_eq!(all.len(), count);
        let reasons = |reason: &str| {
            let failures = all.values().flat_map(|ended| &ended.report.failures);
            failures.filter(|failure| failure.contains(reason)).count()
        };
        assert_eq!(reasons("did not run"), 2);
        assert_eq!(reasons("the time was up"), Lane::Waits.width());
        let failed = all.values().map(|ended| ended.report.tally.failed);
        assert_eq!(failed.sum::<usize>(), count);
    }

    /// Each waits for the other, so they end only if they run side by side.
    #[test]
    fn two_that_wait_run_at_the_same_time() {
        let folder = tempfile::tempdir().unwrap();
        let meets = |own: &str, other: &str| {
            let path = folder.path().display();
            let script = format!(
                "touch {path}/{own}; until [ -e {path}/{other} ]; do sleep 0.01; done; {GOOD}"
            );
            shell(own, &script)
        };
        let all = outcome(
            vec![meets("a", "b"), meets("b", "a")],
            Duration::from_secs(20),
        );
        assert!(
            all.values().all(|ended| ended.report.tally.failed == 0),
            "{all:?}"
        );
    }

    #[test]
    fn what_is_not_made_of_tests_is_judged_by_its_exit_status() {
        let other = |name: &str, script: &str| Runner {
            kind: Kind::Other,
            ..shell(name, script)
        };
        let all = outcome(
            vec![
                other("good", "echo done"),
                other("bad", "echo done; exit 3"),
            ],
            LONG,
        );
        assert_eq!(all["good"].report.tally.line(), "1 passed, 0 failed");
        assert_eq!(all["bad"].report.failures, ["bad: exit status: 3"]);
        assert_eq!(all["good"].output, ["done"]);
    }

    #[test]
    fn an_output_without_end_is_not_held_whole() {
        let script = format!("seq {}; {GOOD}", HELD + 7);
        let all = outcome(vec![shell("loud", &script)], LONG);
        let output = &all["loud"].output;
        assert_eq!(output.len(), HELD + 1);
        assert_eq!(output[HELD], "xtask: and 7 more lines");
        assert_eq!(all["loud"].report.tally.line(), "1 passed, 0 failed");
    }

    #[test]
    fn every_runner_that_has_a_lane_exists() {
        for (name, _) in LANES {
            match name.split_once(": ") {
                Some((package, source)) => {
                    let file = root().join("crates").join(package).join(source);
                    assert!(file.is_file(), "{}", file.display());
                }
                None => assert!([LAB, DOCUMENTATION].contains(name), "{name}"),
            }
        }
        let before_the_lab = LANES.iter().take_while(|(name, _)| *name != LAB);
        let (waits, _) = *before_the_lab.last().unwrap();
        let order: Vec<_> = queues(vec![shell("other", ""), shell(LAB, ""), shell(waits, "")])
            .into_iter()
            .map(|(lane, queue)| (lane, queue.into_inner().unwrap()))
            .collect();
        let waiting: Vec<_> = order[1]
            .1
            .iter()
            .map(|runner| runner.name.as_str())
            .collect();
        assert_eq!(waiting, [waits, LAB, "other"]);
    }
}
