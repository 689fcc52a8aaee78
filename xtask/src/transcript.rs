//! Reads what `cargo test` prints, line by line, and counts.
//!
//! Nothing counts as passed that was not said to have passed: a runner that announced itself and
//! never gave its result, for it crashed or its output was cut off, is a failure, and so is one
//! that was built and never ran.

use std::collections::BTreeSet;

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

/// What became of a whole `cargo test`.
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
    /// Takes in the next line.
    pub(crate) fn line(&mut self, line: &str) -> Worth {
        if let Some(name) = runner_of(line) {
            self.close();
            self.ran.insert(name.clone());
            self.runner = Some(Runner {
                name,
                ..Runner::default()
            });
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

    /// The runner whose output is being read, and what it has counted.
    pub(crate) fn current(&self) -> Option<(&str, Tally)> {
        let runner = self.runner.as_ref()?;
        Some((&runner.name, runner.tally))
    }

    /// Ends the reading. `built` are the runners that were to run; `ok` tells whether the command
    /// as a whole succeeded.
    pub(crate) fn finish<'a>(
        mut self,
        built: impl IntoIterator<Item = &'a str>,
        ok: bool,
    ) -> Report {
        self.close();
        for name in built {
            if !self.ran.contains(name) {
                self.report.tally.failed += 1;
                self.report
                    .failures
                    .push(format!("{name}: was built and did not run"));
            }
        }
        if !ok && self.report.tally.failed == 0 {
            self.report.tally.failed += 1;
            self.report
                .failures
                .push("cargo test failed for a reason of its own, see above".into());
        }
        self.report
    }

    fn close(&mut self) {
        let Some(mut runner) = self.runner.take() else {
            return;
        };
        if runner.running.is_some() {
            fail(
                &mut self.report,
                &mut runner,
                "ended without a result: it crashed, or was killed",
            );
        } else if runner.results == 0 {
            fail(
                &mut self.report,
                &mut runner,
                "never said that it ran any test",
            );
        } else if runner.tally == Tally::default() {
            self.report.empty.push(runner.name.clone());
        }
        // A failed test is named twice, when it fails and in the list at the end.
        let named: BTreeSet<String> = runner.failed.drain(..).collect();
        let names = named
            .into_iter()
            .map(|test| format!("{}: {test}", runner.name));
        self.report.failures.extend(names);
    }
}

/// Counts a runner as failed, beside its tests.
fn fail(report: &mut Report, runner: &mut Runner, why: &str) {
    report.tally.failed += 1;
    runner.tally.failed += 1;
    report.failures.push(format!("{}: {why}", runner.name));
}

/// The runner that a line of cargo names, by its binary or, for documentation, by its crate:
/// `Running unittests src/lib.rs (target/debug/deps/writethrough-0a1b)`, `Doc-tests writethrough`.
fn runner_of(line: &str) -> Option<String> {
    if let Some(name) = line.strip_prefix("   Doc-tests ") {
        return Some(format!("doc tests of {name}"));
    }
    named(line, "     Running ")
}

/// The runners that `cargo test --no-run` says it built.
pub(crate) fn built(line: &str) -> Option<String> {
    named(line, "  Executable ")
}

/// `unittests src/lib.rs (target/debug/deps/writethrough-0a1b)` becomes
/// `writethrough: src/lib.rs`: short, and still one name for one binary.
fn named(line: &str, prefix: &str) -> Option<String> {
    let rest = line.strip_prefix(prefix)?;
    let (source, binary) = rest.strip_suffix(')')?.rsplit_once(" (")?;
    let source = source.strip_prefix("unittests ").unwrap_or(source);
    let file = binary.rsplit('/').next()?;
    let (program, _hash) = file.rsplit_once('-')?;
    Some(format!("{program}: {source}"))
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
    use super::*;

    const LIB: &str = "writethrough_protocol: src/lib.rs";
    const WALKS: &str = "transitions: tests/transitions.rs";

    fn read(output: &str, built: &[&str], ok: bool) -> Report {
        let mut transcript = Transcript::default();
        for line in output.lines() {
            transcript.line(line);
        }
        transcript.finish(built.iter().copied(), ok)
    }

    const GOOD: &str = "
   Compiling writethrough-protocol v0.1.0 (/src/crates/writethrough-protocol)
    Finished `test` profile [unoptimized] target(s) in 0.94s
     Running unittests src/lib.rs (target/debug/deps/writethrough_protocol-4f1de2b5bd3e7c0a)

running 2 tests
test key::tests::begin_over_a_value ... ok
test node::tests::a_settled_row_is_active_at_first_sight ... ok

test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

     Running tests/transitions.rs (target/debug/deps/transitions-77b0f9d2c4d1e5a3)

running 3 tests
test long_walk ... ignored, takes an hour
test walks_agree_in_memory ... ok
test walks_agree_on_redis ... ok

test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 4.20s

   Doc-tests writethrough_protocol

running 0 tests

test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

";

    #[test]
    fn results_are_summed_and_ignored_and_empty_ones_are_listed() {
        let report = read(GOOD, &[LIB, WALKS], true);
        assert_eq!(
            report,
            Report {
                tally: Tally {
                    passed: 4,
                    failed: 0,
                    skipped: 1
                },
                failures: vec![],
                ignored: vec![format!("{WALKS}: long_walk")],
                empty: vec!["doc tests of writethrough_protocol".into()],
            }
        );
        assert_eq!(report.tally.line(), "4 passed, 0 failed, 1 skipped");
    }

    #[test]
    fn a_failed_test_is_named_once() {
        let output = "
     Running unittests src/lib.rs (target/debug/deps/writethrough_protocol-4f1de2b5bd3e7c0a)

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

error: test failed, to rerun pass `-p writethrough-protocol --lib`
error: 1 target failed:
    `-p writethrough-protocol --lib`
";
        let report = read(output, &[LIB], false);
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
    fn a_runner_that_crashed_is_a_failure_and_the_next_one_counts() {
        let output = "
     Running unittests src/lib.rs (target/debug/deps/writethrough_protocol-4f1de2b5bd3e7c0a)

running 9 tests
test key::tests::begin_over_a_value ... ok
error: test failed, to rerun pass `-p writethrough-protocol --lib`

Caused by:
  process didn't exit successfully: `target/debug/deps/writethrough_protocol-4f1de2b5bd3e7c0a` \
(signal: 6, SIGABRT: process abort signal)
     Running tests/transitions.rs (target/debug/deps/transitions-77b0f9d2c4d1e5a3)

running 1 test
test walks_agree_in_memory ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 4.20s
";
        let report = read(output, &[LIB, WALKS], false);
        assert_eq!(
            report.tally,
            Tally {
                passed: 1,
                failed: 1,
                skipped: 0
            }
        );
        assert!(
            report.failures[0].contains("ended without a result"),
            "{report:?}"
        );
    }

    #[test]
    fn output_that_is_cut_off_is_a_failure_for_each_runner_it_lacks() {
        let cut = GOOD.find("test walks_agree_on_redis").unwrap();
        let report = read(&GOOD[..cut], &[LIB, WALKS, "engine: tests/engine.rs"], true);
        assert_eq!(
            report.tally,
            Tally {
                passed: 2,
                failed: 2,
                skipped: 0
            }
        );
        assert!(report.failures[0].starts_with(WALKS), "{report:?}");
        assert_eq!(
            report.failures[1],
            "engine: tests/engine.rs: was built and did not run"
        );
    }

    #[test]
    fn every_place_to_cut_the_output_leaves_a_failure() {
        // The documentation tests are the last runner and are not in the list of built ones, so
        // the cuts are made before them.
        let tests = &GOOD[..GOOD.find("   Doc-tests").unwrap()];
        let whole = tests.trim_end().len();
        for cut in (0..whole).filter(|at| tests.is_char_boundary(*at)) {
            let report = read(&tests[..cut], &[LIB, WALKS], true);
            assert!(report.tally.failed > 0, "cut at {cut}: {report:?}");
        }
    }

    #[test]
    fn a_runner_that_says_nothing_is_a_failure() {
        let output = "     Running tests/torture.rs (target/debug/deps/torture-77b0f9d2c4d1e5a3)\n";
        let report = read(output, &["torture: tests/torture.rs"], true);
        assert_eq!(report.tally.failed, 1);
        assert!(report.failures[0].contains("never said"), "{report:?}");
    }

    #[test]
    fn a_command_that_failed_without_a_failed_test_is_a_failure() {
        let output = "error: could not compile `writethrough` (lib) due to 1 previous error\n";
        assert_eq!(read(output, &[], false).tally.failed, 1);
        assert_eq!(read(GOOD, &[LIB, WALKS], false).tally.failed, 1);
        assert_eq!(read("", &[LIB], true).tally.failed, 1);
    }

    #[test]
    fn documentation_tests_may_give_two_results() {
        let output = "
   Doc-tests writethrough

running 1 test
test crates/writethrough/src/lib.rs - (line 11) ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.35s


running 2 tests
test crates/writethrough/src/key.rs - key (line 4) ... ignored
test crates/writethrough/src/fence/mod.rs - fence (line 9) - compile ... ok

test result: ok. 1 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s

all doctests ran in 1.20s; merged doctests compilation took 0.70s
";
        let report = read(output, &[], true);
        assert_eq!(
            report.tally,
            Tally {
                passed: 2,
                failed: 0,
                skipped: 1
            }
        );
        let ignored = "doc tests of writethrough: crates/writethrough/src/key.rs - key (line 4)";
        assert_eq!(report.ignored, [ignored]);
    }

    #[test]
    fn a_result_that_contradicts_its_announcement_is_a_failure() {
        let output = "
     Running tests/transitions.rs (target/debug/deps/transitions-77b0f9d2c4d1e5a3)
running 3 tests
test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        assert_eq!(read(output, &[], true).tally.failed, 1);
    }

    #[test]
    fn built_binaries_have_the_names_of_the_ones_that_run() {
        let line = "  Executable unittests src/lib.rs (target/debug/deps/writethrough-0a1b2c)";
        assert_eq!(built(line).as_deref(), Some("writethrough: src/lib.rs"));
        let line = "  Executable tests/engine.rs (/elsewhere/target/debug/deps/engine-0a1b2c)";
        assert_eq!(built(line).as_deref(), Some("engine: tests/engine.rs"));
        assert_eq!(built("    Finished `test` profile"), None);
    }

    #[test]
    fn only_what_is_routine_is_left_out() {
        let mut transcript = Transcript::default();
        assert_eq!(transcript.line("warning: unused import"), Worth::Show);
        transcript.line("     Running tests/engine.rs (target/debug/deps/engine-0a1b2c)");
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
