//! Reads what a test binary or `cargo test --doc` prints, line by line, and counts.
//!
//! Nothing counts as passed that was not said to have passed: a runner that announced itself and
//! never gave its result, for it crashed or its output was cut off, is a failure, and so is one
//! that never ran.

use std::collections::BTreeSet;

use crate::command::End;

/// Numbers of tests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

impl Tally {
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// The line that machines read.
    pub(crate) fn line(self) -> String {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        if skipped == 0 {
            format!("{passed} passed, {failed} failed")
        } else {
            format!("{passed} passed, {failed} failed, {skipped} skipped")
        }
    }
}

/// What became of runners.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) tally: Tally,
    /// Failed tests, each with its runner, and runners that failed as a whole.
    pub(crate) failures: Vec<String>,
    /// Ignored tests, each with its runner.
    pub(crate) ignored: Vec<String>,
    /// Runners without a single test.
    pub(crate) empty: Vec<String>,
}

impl Report {
    /// Counts what is no test and has failed.
    pub(crate) fn fail(&mut self, what: String) {
        self.tally.failed += 1;
        self.failures.push(what);
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.tally.add(other.tally);
        self.failures.extend(other.failures);
        self.ignored.extend(other.ignored);
        self.empty.extend(other.empty);
    }
}

/// Whether a line is worth showing when all is well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Worth {
    /// A test that passed, a blank line, and the like.
    Routine,
    /// Everything else.
    Show,
}

/// One test binary, or the documentation tests of one crate.
#[derive(Debug, Default)]
struct Runner {
    name: String,
    tally: Tally,
    results: usize,
    /// Tests announced by a `running N tests` that has no result yet.
    running: Option<usize>,
    failed: Vec<String>,
}

/// The state of reading.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    report: Report,
    runner: Option<Runner>,
    ran: BTreeSet<String>,
}

impl Transcript {
    /// Begins with the output of one runner.
    pub(crate) fn of(name: &str) -> Self {
        let mut transcript = Self::default();
        transcript.open(name.to_owned());
        transcript
    }

    fn open(&mut self, name: String) {
        self.close("another one began");
        self.ran.insert(name.clone());
        self.runner = Some(Runner {
            name,
            ..Runner::default()
        });
    }

    /// Takes in the next line.
    pub(crate) fn line(&mut self, line: &str) -> Worth {
        if let Some(package) = line.strip_prefix("   Doc-tests ") {
            self.open(documentation(package));
            return Worth::Routine;
        }
        let Some(runner) = &mut self.runner else {
            return Worth::Show;
        };
        if let Some(count) = announced(line) {
            if runner.running.is_some() {
                fail(&mut self.report, runner, "a run gave no result");
            }
            runner.running = Some(count);
            return Worth::Routine;
        }
        if let Some((tally, ok)) = result(line) {
            let announced = runner.running.take();
            runner.results += 1;
            runner.tally.add(tally);
            self.report.tally.add(tally);
            if !ok && tally.failed == 0 {
                fail(&mut self.report, runner, "failed without a failed test");
            }
            let counted = tally.passed + tally.failed + tally.skipped;
            if announced.is_some_and(|announced| announced != counted) {
                fail(&mut self.report, runner, "counted other tests than it ran");
            }
            return if ok { Worth::Routine } else { Worth::Show };
        }
        match verdict(line) {
            Some((_, Verdict::Ok)) => Worth::Routine,
            Some((test, Verdict::Ignored)) => {
                self.report.ignored.push(format!("{}: {test}", runner.name));
                Worth::Routine
            }
            Some((test, Verdict::Failed)) => {
                runner.failed.push(test.to_owned());
                Worth::Show
            }
            // Blank lines keep the accounts of failed tests apart.
            None if line.trim().is_empty() && runner.failed.is_empty() => Worth::Routine,
            None => Worth::Show,
        }
    }

    /// Ends the reading of what `command` has printed. `expected` are the runners that were to run;
    /// `end` is how the command ended.
    pub(crate) fn finish(mut self, command: &str, expected: &[String], end: End) -> Report {
        let told = self.close(&end.describe());
        for name in expected {
            if !self.ran.contains(name) {
                self.report
                    .fail(format!("{name}: was built and did not run"));
            }
        }
        let by_itself = matches!(end, End::Exited(_));
        if !end.ok() && !told && (self.report.tally.failed == 0 || !by_itself) {
            self.report.fail(format!("{command}: {}", end.describe()));
        }
        self.report
    }

    /// Ends the runner whose output was read; `end` is what came then. Returns whether it was said.
    fn close(&mut self, end: &str) -> bool {
        let Some(mut runner) = self.runner.take() else {
            return false;
        };
        let unfinished = runner.running.is_some() || runner.results == 0;
        if unfinished {
            let what = match runner.running {
                Some(_) => "ended without a result",
                None => "never said that it ran any test",
            };
            fail(&mut self.report, &mut runner, &format!("{what}: {end}"));
        } else if runner.tally == Tally::default() {
            self.report.empty.push(runner.name.clone());
        }
        // A failed test is named twice, when it fails and in the list at the end.
        let named: BTreeSet<String> = runner.failed.drain(..).collect();
        let names = named
            .into_iter()
            .map(|test| format!("{}: {test}", runner.name));
        self.report.failures.extend(names);
        unfinished
    }
}

/// Counts a runner as failed, beside its tests.
fn fail(report: &mut Report, runner: &mut Runner, why: &str) {
    runner.tally.failed += 1;
    report.fail(format!("{}: {why}", runner.name));
}

/// The name of the runner that is the documentation tests of a package.
pub(crate) fn documentation(package: &str) -> String {
    format!("doc tests of {package}")
}

/// `running 3 tests`.
fn announced(line: &str) -> Option<usize> {
    let rest = line.strip_prefix("running ")?;
    rest.strip_suffix(" tests")
        .or_else(|| rest.strip_suffix(" test"))?
        .parse()
        .ok()
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`,
/// whole: a line that was cut off is no result.
fn result(line: &str) -> Option<(Tally, bool)> {
    let rest = line.strip_prefix("test result: ")?;
    let (counts, time) = rest.split_once("; finished in ")?;
    time.strip_suffix('s')?.parse::<f64>().ok()?;
    let (word, counts) = counts.split_once(". ")?;
    let mut tally = Tally::default();
    for part in counts.split("; ") {
        let (number, what) = part.split_once(' ')?;
        let number: usize = number.parse().ok()?;
        match what {
            "passed" | "measured" => tally.passed += number,
            "failed" => tally.failed += number,
            "ignored" => tally.skipped += number,
            _ => {}
        }
    }
    Some((tally, word == "ok"))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Failed,
    Ignored,
}

/// `test judge::tests::a_stale_read ... FAILED`.
fn verdict(line: &str) -> Option<(&str, Verdict)> {
    let (test, word) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    let test = test.strip_suffix(" - should panic").unwrap_or(test);
    match word.split_once(", ").map_or(word, |(word, _reason)| word) {
        "ok" => Some((test, Verdict::Ok)),
        "FAILED" => Some((test, Verdict::Failed)),
        "ignored" => Some((test, Verdict::Ignored)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    const LIB: &str = "writethrough_protocol: src/lib.rs";
    const WALKS: &str = "transitions: tests/transitions.rs";
    const DOCS: &str = "doc tests of writethrough";

    /// An exit by itself, with this code.
    fn exit(code: i32) -> End {
        End::Exited(ExitStatus::from_raw(code << 8))
    }

    /// What becomes of one binary with this output.
    fn read(name: &str, output: &str, end: End) -> Report {
        let mut transcript = Transcript::of(name);
        for line in output.lines() {
            transcript.line(line);
        }
        transcript.finish(name, &[], end)
    }

    /// The same of `cargo test --doc`.
    fn read_documentation(output: &str, expected: &[&str], end: End) -> Report {
        let mut transcript = Transcript::default();
        for line in output.lines() {
            transcript.line(line);
        }
        let expected: Vec<String> = expected.iter().map(|name| (*name).to_owned()).collect();
        transcript.finish("the documentation tests", &expected, end)
    }

    const GOOD: &str = "
running 3 tests
test long_walk ... ignored, takes an hour
test walks_agree_in_memory ... ok
test walks_agree_on_redis ... ok

test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 4.20s
";

    const DOCUMENTATION: &str = "
    Finished `test` profile [unoptimized] target(s) in 0.94s
   Doc-tests writethrough

running 1 test
test crates/writethrough/src/lib.rs - (line 11) ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.35s


running 2 tests
test crates/writethrough/src/key.rs - key (line 4) ... ignored
test crates/writethrough/src/fence/mod.rs - fence (line 9) - compile ... ok

test result: ok. 1 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s

all doctests ran in 1.20s; merged doctests compilation took 0.70s
   Doc-tests writethrough_protocol

running 0 tests

test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

";

    #[test]
    fn results_are_counted_and_ignored_tests_are_listed() {
        let report = read(WALKS, GOOD, exit(0));
        assert_eq!(
            report,
            Report {
                tally: Tally {
                    passed: 2,
                    failed: 0,
                    skipped: 1
                },
                failures: vec![],
                ignored: vec![format!("{WALKS}: long_walk")],
                empty: vec![],
            }
        );
        assert_eq!(report.tally.line(), "2 passed, 0 failed, 1 skipped");
    }

    #[test]
    fn documentation_tests_may_give_two_results_and_empty_runners_are_listed() {
        let none = "doc tests of writethrough_protocol";
        let report = read_documentation(DOCUMENTATION, &[DOCS, none], exit(0));
        assert_eq!(
            report,
            Report {
                tally: Tally {
                    passed: 2,
                    failed: 0,
                    skipped: 1
                },
                failures: vec![],
                ignored: vec![format!(
                    "{DOCS}: crates/writethrough/src/key.rs - key (line 4)"
                )],
                empty: vec![none.into()],
            }
        );
        let missing = read_documentation(DOCUMENTATION, &[DOCS, "doc tests of other"], exit(0));
        assert_eq!(
            missing.failures,
            ["doc tests of other: was built and did not run"]
        );
    }

    #[test]
    fn reports_are_summed() {
        let mut sum = read(WALKS, GOOD, exit(0));
        sum.add(read_documentation(DOCUMENTATION, &[], exit(101)));
        assert_eq!(sum.tally.line(), "4 passed, 1 failed, 2 skipped");
        let lengths = [sum.failures.len(), sum.ignored.len(), sum.empty.len()];
        assert_eq!(lengths, [1, 2, 1]);
    }

    #[test]
    fn a_failed_test_is_named_once() {
        let output = "
running 2 tests
test key::tests::begin_over_a_value ... ok
test key::tests::end ... FAILED

failures:

---- key::tests::end stdout ----

thread 'key::tests::end' panicked at crates/writethrough-protocol/src/key.rs:300:9:
assertion `left == right` failed
  left: Absent
 right: Value(None)


failures:
    key::tests::end

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        let report = read(LIB, output, exit(101));
        assert_eq!(
            report.tally,
            Tally {
                passed: 1,
                failed: 1,
                skipped: 0
            }
        );
        assert_eq!(report.failures, [format!("{LIB}: key::tests::end")]);
        assert_eq!(report.tally.line(), "1 passed, 1 failed");
    }

    #[test]
    fn a_runner_that_crashed_or_was_killed_is_a_failure() {
        let output = "
running 9 tests
test key::tests::begin_over_a_value ... ok
";
        let crash = End::Exited(ExitStatus::from_raw(6));
        let report = read(LIB, output, crash);
        assert_eq!(report.tally.failed, 1);
        assert!(
            report.failures[0].contains("ended without a result: signal: 6"),
            "{report:?}"
        );
        // Before a result and after one, and after a test that failed.
        let failed = output.replace("... ok", "... FAILED");
        for (output, failures) in [(output, 1), (GOOD, 1), (&failed, 2)] {
            let report = read(LIB, output, End::TimedOut);
            assert_eq!(report.failures.len(), failures, "{report:?}");
            let told = report.failures[0].contains("the time was up");
            assert!(told, "{report:?}");
        }
    }

    #[test]
    fn every_place_to_cut_the_output_leaves_a_failure() {
        let whole = GOOD.trim_end().len();
        for cut in (0..whole).filter(|at| GOOD.is_char_boundary(*at)) {
            let report = read(WALKS, &GOOD[..cut], exit(0));
            assert!(report.tally.failed > 0, "cut at {cut}: {report:?}");
        }
    }

    #[test]
    fn a_runner_that_says_nothing_is_a_failure() {
        let report = read("torture", "\n", exit(0));
        assert_eq!(report.tally.failed, 1);
        assert!(report.failures[0].contains("never said"), "{report:?}");
    }

    #[test]
    fn a_command_that_failed_without_a_failed_test_is_a_failure() {
        let output = "error: could not compile `writethrough` (lib) due to 1 previous error\n";
        assert_eq!(read_documentation(output, &[], exit(101)).tally.failed, 1);
        let report = read(WALKS, GOOD, exit(101));
        assert_eq!(report.failures, [format!("{WALKS}: exit status: 101")]);
    }

    #[test]
    fn a_result_that_contradicts_its_announcement_is_a_failure() {
        let output = "
running 3 tests
test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        assert_eq!(read(WALKS, output, exit(0)).tally.failed, 1);
    }

    #[test]
    fn only_what_is_routine_is_left_out() {
        let mut transcript = Transcript::default();
        assert_eq!(transcript.line("warning: unused import"), Worth::Show);
        let mut transcript = Transcript::of(WALKS);
        for routine in [
            "",
            "running 2 tests",
            "test a ... ok",
            "test b ... ignored, slow",
        ] {
            assert_eq!(transcript.line(routine), Worth::Routine, "{routine}");
        }
        for shown in [
            "test c ... FAILED",
            "thread 'c' panicked at x.rs:1:1:",
            "test d ... 3 left",
        ] {
            assert_eq!(transcript.line(shown), Worth::Show, "{shown}");
        }
    }
}
