//! Counts the tests in the output of a test binary or of `cargo test --doc`.
//!
//! Whether a run succeeded is what its exit status says. The output says what the status cannot: how
//! many tests passed and failed and which, and that there was a result at all.

use std::collections::BTreeSet;

use crate::command::End;

/// The exit code of a test binary, and of `cargo test --doc`, when a test has failed.
const A_TEST_FAILED: i32 = 101;

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

/// The result of one runner, or of several.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) tally: Tally,
    /// Failed tests, each with its runner, and runners that failed as a whole.
    pub(crate) failures: Vec<String>,
    /// Runners without a single test.
    pub(crate) empty: Vec<String>,
}

impl Report {
    /// Counts a failure that is not a test.
    pub(crate) fn fail(&mut self, what: String) {
        self.tally.failed += 1;
        self.failures.push(what);
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.tally.add(other.tally);
        self.failures.extend(other.failures);
        self.empty.extend(other.empty);
    }
}

/// The counts of a runner whose output is being read.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    /// The tests that `running N tests` announced.
    announced: usize,
    results: usize,
    tally: Tally,
    /// Each failed test once, though it is named twice: when it fails and in the list at the end.
    failed: BTreeSet<String>,
}

impl Transcript {
    /// Reads the next line, and returns whether it is worth showing when all is well.
    pub(crate) fn line(&mut self, line: &str) -> bool {
        if let Some(count) = announced(line) {
            self.announced += count;
            return false;
        }
        if let Some(tally) = result(line) {
            self.results += 1;
            self.tally.add(tally);
            return tally.failed > 0;
        }
        match line
            .strip_prefix("test ")
            .and_then(|line| line.rsplit_once(" ... "))
        {
            Some((test, "FAILED")) => {
                let test = test.strip_suffix(" - should panic").unwrap_or(test);
                self.failed.insert(test.to_owned());
                true
            }
            Some((_, word)) => word != "ok" && !word.starts_with("ignored"),
            None => !line.trim().is_empty() && !line.starts_with("   Doc-tests "),
        }
    }

    /// Compares the counts with the way in which `runner` has ended.
    pub(crate) fn finish(self, runner: &str, end: End) -> Report {
        let Tally {
            passed,
            failed,
            skipped,
        } = self.tally;
        let counted = passed + failed + skipped;
        let says_failed =
            matches!(end, End::Exited(status) if status.code() == Some(A_TEST_FAILED));
        let agrees = if failed > 0 { says_failed } else { end.ok() };
        let names = self.failed.iter().map(|test| format!("{runner}: {test}"));
        let mut report = Report {
            tally: self.tally,
            failures: names.collect(),
            empty: Vec::new(),
        };
        let end = end.describe();
        if self.results == 0 {
            report.fail(format!("{runner}: no result of any test: {end}"));
        } else if self.announced != counted {
            let announced = self.announced;
            report.fail(format!(
                "{runner}: {counted} results of {announced} tests: {end}"
            ));
        } else if !agrees {
            report.fail(format!("{runner}: {end}"));
        } else if counted == 0 {
            report.empty.push(runner.to_owned());
        }
        report
    }
}

/// Parses `running 3 tests`.
fn announced(line: &str) -> Option<usize> {
    let count = line.strip_prefix("running ")?.trim_end_matches('s');
    count.strip_suffix(" test")?.parse().ok()
}

/// Parses `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in
/// 0.00s`, whole: a line that was cut off is no result.
fn result(line: &str) -> Option<Tally> {
    let (counts, time) = line
        .strip_prefix("test result: ")?
        .split_once("; finished in ")?;
    time.strip_suffix('s')?.parse::<f64>().ok()?;
    let (_, counts) = counts.split_once(". ")?;
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
    Some(tally)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    /// An exit by itself, with this code.
    fn exit(code: i32) -> End {
        End::Exited(ExitStatus::from_raw(code << 8))
    }

    /// The report on a runner `walks` with this output.
    fn read(output: &str, end: End) -> Report {
        let mut transcript = Transcript::default();
        for line in output.lines() {
            transcript.line(line);
        }
        transcript.finish("walks", end)
    }

    const GOOD: &str = "
running 3 tests
test long_walk ... ignored, takes an hour
test walks_agree_in_memory ... ok
test walks_agree_on_redis ... ok

test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 4.20s
";

    const EMPTY: &str = "
running 0 tests

test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    const BAD: &str = "
running 2 tests
test walks_agree ... ok
test walks_end - should panic ... FAILED

failures:

---- walks_end stdout ----
note: test did not panic as expected

failures:
    walks_end

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn tests_are_counted_over_all_results_of_a_runner() {
        let report = read(GOOD, exit(0));
        assert_eq!(report.tally.line(), "2 passed, 0 failed, 1 skipped");
        assert_eq!(report.failures, [""; 0]);
        // Documentation tests give a result for each crate, and two for some.
        let mut report = read(
            &format!("   Doc-tests a{GOOD}   Doc-tests b{EMPTY}"),
            exit(0),
        );
        assert_eq!(report.tally.line(), "2 passed, 0 failed, 1 skipped");
        assert_eq!(report.empty, [""; 0]);
        report.add(read(EMPTY, exit(0)));
        assert_eq!(report.empty, ["walks"]);
        report.add(read(BAD, exit(101)));
        assert_eq!(report.tally.line(), "3 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn a_failed_test_is_named_once() {
        let report = read(BAD, exit(101));
        assert_eq!(report.tally.line(), "1 passed, 1 failed");
        assert_eq!(report.failures, ["walks: walks_end"]);
    }

    #[test]
    fn a_runner_that_died_is_a_failure_whatever_it_said_before() {
        let died = End::Exited(ExitStatus::from_raw(6));
        let report = read("\nrunning 9 tests\ntest walks_agree ... ok\n", died);
        let expected = format!("walks: no result of any test: {}", died.describe());
        assert_eq!(report.failures, [expected]);
        for (output, end, failures) in [
            (GOOD, died, 1),
            (GOOD, exit(101), 1),
            (GOOD, End::TimedOut, 1),
            (BAD, died, 2),
            (BAD, End::TimedOut, 2),
            (BAD, exit(0), 2),
        ] {
            let report = read(output, end);
            assert_eq!(report.failures.len(), failures, "{report:?}");
            assert_eq!(report.tally.failed, failures, "{report:?}");
            assert!(
                report.failures[failures - 1].ends_with(&end.describe()),
                "{report:?}"
            );
        }
    }

    #[test]
    fn a_runner_without_a_result_is_a_failure_even_if_it_ends_well() {
        for output in ["", "all is well\n"] {
            let report = read(output, exit(0));
            assert_eq!(report.tally.line(), "0 passed, 1 failed");
            assert!(report.failures[0].contains("no result"), "{report:?}");
        }
        // It ended in the middle of its second run.
        let report = read(&format!("{GOOD}\nrunning 2 tests\n"), exit(0));
        assert_eq!(
            report.failures,
            ["walks: 3 results of 5 tests: exit status: 0"]
        );
        let whole = GOOD.trim_end().len();
        for cut in 0..whole {
            let report = read(&GOOD[..cut], exit(0));
            assert!(report.tally.failed > 0, "cut at {cut}: {report:?}");
        }
    }

    #[test]
    fn only_what_is_routine_is_left_out() {
        let mut transcript = Transcript::default();
        for line in GOOD.lines().chain(EMPTY.lines()).chain(["   Doc-tests a"]) {
            assert!(!transcript.line(line), "{line}");
        }
        let shown = BAD.lines().filter(|line| transcript.line(line));
        assert_eq!(shown.count(), 7);
        assert!(transcript.line("test a ... 3 left"));
    }
}
