//! `cargo xtask test`: every check and every test, one command.
//!
//! A part is one entry of [`PARTS`]. Parts run in their order; the quick ones come first, and
//! parts that share compiled crates stand together. A part that fails does not stop the others,
//! unless they need it. The last line is for machines: `N passed, M failed`, in which every test
//! counts as one, and every part that is not made of tests.

use std::collections::BTreeMap;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::command::{self, End};
use crate::leftovers::Ground;
use crate::transcript::{self, Report, Tally, Transcript, Worth};
use crate::{dependencies, install, interrupt, lab, root};

/// How long everything may take together, unless told otherwise.
const BOUND_MINUTES: u64 = 40;
/// How long a quiet command goes without a sign of life.
const QUIET: Duration = Duration::from_secs(20);

const USAGE: &str = "\
cargo xtask test [--only PART]... [--package NAME]... [--minutes N] [--verbose]

Runs everything that decides whether the tree is good.

  --only PART      run only this part; may be repeated
  --package NAME   check and test only this crate; may be repeated
  --minutes N      give up after N minutes (default 40)
  --verbose        show the output of tests that pass, and of compiling
";

/// One part of the run.
struct Part {
    name: &'static str,
    about: &'static str,
    /// Parts without which this one makes no sense.
    needs: &'static [&'static str],
    run: fn(&mut Run) -> anyhow::Result<Outcome>,
}

const PARTS: &[Part] = &[
    Part {
        name: "install",
        about: "the servers that the tests start",
        needs: &[],
        run: install_programs,
    },
    Part {
        name: "fmt",
        about: "formatting",
        needs: &[],
        run: format,
    },
    Part {
        name: "dependencies",
        about: "licenses, sources and duplicates of the dependencies",
        needs: &[],
        run: dependencies,
    },
    Part {
        name: "clippy",
        about: "lints, as errors",
        needs: &[],
        run: clippy,
    },
    Part {
        name: "docs",
        about: "documentation, warnings as errors",
        needs: &[],
        run: document,
    },
    Part {
        name: "build",
        about: "compiling the tests",
        needs: &[],
        run: build,
    },
    Part {
        name: "tests",
        about: "unit, integration and documentation tests",
        needs: &["install", "build"],
        run: tests,
    },
    Part {
        name: "lab",
        about: "the commands of the lab's exercises",
        needs: &["install", "build"],
        run: exercises,
    },
];

/// How a part ended.
enum Outcome {
    /// It succeeded; the note says what there is to say.
    Good(String),
    /// It failed.
    Bad(String),
    /// It counts tests of its own.
    Tests(Report),
}

/// What became of a part, for the summary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Good,
    Bad,
    NotRun,
}

/// What parts share.
struct Run {
    options: Options,
    deadline: Instant,
}

#[derive(Debug, PartialEq, Eq)]
struct Options {
    only: Vec<String>,
    packages: Vec<String>,
    minutes: u64,
    verbose: bool,
}

impl Options {
    fn parse(arguments: &[String]) -> anyhow::Result<Self> {
        let mut options = Self {
            only: Vec::new(),
            packages: Vec::new(),
            minutes: BOUND_MINUTES,
            verbose: false,
        };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .cloned()
                    .with_context(|| format!("`{argument}` needs a value"))
            };
            match argument.as_str() {
                "--only" => {
                    let name = value()?;
                    if !PARTS.iter().any(|part| part.name == name) {
                        let names: Vec<&str> = PARTS.iter().map(|part| part.name).collect();
                        bail!("there is no part `{name}`; there are {}", names.join(", "));
                    }
                    options.only.push(name);
                }
                "-p" | "--package" => options.packages.push(value()?),
                "--minutes" => {
                    options.minutes = value()?.parse().context("`--minutes` needs a number")?;
                }
                "-v" | "--verbose" => options.verbose = true,
                other => bail!("`{other}` is not an option of this task\n\n{USAGE}"),
            }
        }
        Ok(options)
    }

    fn chosen(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == part)
    }
}

/// Runs the task.
pub(crate) fn main(arguments: &[String]) -> anyhow::Result<ExitCode> {
    if arguments
        .iter()
        .any(|argument| argument == "-h" || argument == "--help")
    {
        println!("{USAGE}\nParts:");
        for part in PARTS {
            println!("  {:<12} {}", part.name, part.about);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let options = Options::parse(arguments)?;
    interrupt::listen();
    let started = Instant::now();
    let deadline = started + Duration::from_secs(options.minutes * 60);
    let mut run = Run { options, deadline };
    let mut summary = Summary::default();
    for part in PARTS {
        if run.options.chosen(part.name) {
            run.part(part, &mut summary);
        }
    }
    println!("\n== summary ==");
    print!("{}", summary.text(started.elapsed()));
    Ok(if summary.good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Run {
    fn part(&mut self, part: &Part, summary: &mut Summary) {
        let unmet = part.needs.iter().find(|need| summary.failed(need));
        let reason = match unmet {
            _ if interrupt::count() > 0 => Some("interrupted".to_owned()),
            _ if Instant::now() >= self.deadline => Some("the time was up".to_owned()),
            Some(need) => Some(format!("`{need}` failed")),
            None => None,
        };
        if let Some(reason) = reason {
            summary.not_run(part.name, &reason);
            return;
        }
        println!("\n== {}: {} ==", part.name, part.about);
        let started = Instant::now();
        let outcome = (part.run)(self).unwrap_or_else(|error| Outcome::Bad(format!("{error:#}")));
        summary.add(part.name, outcome, started.elapsed());
    }

    /// A cargo command whose output can be read by a program.
    fn cargo(&self, arguments: &[&str]) -> Command {
        let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(program);
        command
            .args(arguments)
            .current_dir(root())
            .env("CARGO_TERM_COLOR", "never")
            .env("CARGO_TERM_PROGRESS_WHEN", "never")
            .env_remove("CARGO_TERM_QUIET")
            .env_remove("CARGO_TERM_VERBOSE")
            .env_remove("RUST_TEST_SHUFFLE")
            .env_remove("RUST_TEST_NOCAPTURE");
        command
    }

    /// `--workspace`, or the packages that were asked for.
    fn select(&self, command: &mut Command) {
        if self.options.packages.is_empty() {
            command.arg("--workspace");
        }
        for package in &self.options.packages {
            command.args(["--package", package]);
        }
    }

    /// Runs a command and shows its output, but for the names of the crates being compiled.
    fn show(&self, command: Command) -> anyhow::Result<End> {
        let verbose = self.options.verbose;
        let mut compiling = Compiling::default();
        command::run(command, self.deadline, |line| match line {
            Some(line) if verbose || !compiling.take(line) => println!("{line}"),
            Some(_) => {}
            None => {
                if let Some(text) = compiling.sign_of_life() {
                    println!("{text}");
                }
            }
        })
    }

    fn check(&self, command: Command) -> anyhow::Result<Outcome> {
        let end = self.show(command)?;
        Ok(if end.ok() {
            Outcome::Good(String::new())
        } else {
            Outcome::Bad(end.describe())
        })
    }

    /// Says what to do when a component of the toolchain is missing.
    fn component(&self, subcommand: &str, component: &str) -> anyhow::Result<()> {
        let (end, _) = command::output(self.cargo(&[subcommand, "--version"]), self.deadline)?;
        match end {
            End::Exited(status) if !status.success() => bail!(
                "`cargo {subcommand}` is not installed: run `rustup component add {component}` \
                 (or install your system's package of it)"
            ),
            _ => Ok(()),
        }
    }
}

/// Replaces the names of crates being compiled by a line every now and then.
#[derive(Debug)]
struct Compiling {
    count: usize,
    told: Instant,
    last: String,
}

impl Default for Compiling {
    fn default() -> Self {
        Self {
            count: 0,
            told: Instant::now(),
            last: String::new(),
        }
    }
}

impl Compiling {
    /// Takes a line if it is about a crate being compiled.
    fn take(&mut self, line: &str) -> bool {
        let words = [
            "Compiling",
            "Checking",
            "Documenting",
            "Downloading",
            "Downloaded",
            "Executable",
        ];
        let mut parts = line.trim_start().splitn(2, ' ');
        let crate_line = line.starts_with("  ") && parts.next().is_some_and(|w| words.contains(&w));
        if crate_line {
            self.count += 1;
            self.last = parts.next().unwrap_or_default().to_owned();
        }
        crate_line
    }

    fn sign_of_life(&mut self) -> Option<String> {
        (self.count > 0 && self.told.elapsed() >= QUIET).then(|| {
            self.told = Instant::now();
            format!(
                "    ... {} crates so far, the last one {}",
                self.count, self.last
            )
        })
    }
}

fn install_programs(run: &mut Run) -> anyhow::Result<Outcome> {
    install::run(run.deadline, |line| println!("{line}")).map(Outcome::Good)
}

fn format(run: &mut Run) -> anyhow::Result<Outcome> {
    run.component("fmt", "rustfmt")?;
    let mut command = run.cargo(&["fmt", "--check"]);
    if run.options.packages.is_empty() {
        command.arg("--all");
    }
    for package in &run.options.packages {
        command.args(["--package", package]);
    }
    run.check(command)
}

fn dependencies(run: &mut Run) -> anyhow::Result<Outcome> {
    let (note, findings) =
        dependencies::check(run.cargo(&["metadata"]), run.cargo(&["tree"]), run.deadline)?;
    Ok(if findings.is_empty() {
        Outcome::Good(note)
    } else {
        Outcome::Bad(findings.join("\n"))
    })
}

fn clippy(run: &mut Run) -> anyhow::Result<Outcome> {
    run.component("clippy", "clippy")?;
    let mut command = run.cargo(&["clippy", "--all-targets"]);
    run.select(&mut command);
    command.args(["--", "-D", "warnings"]);
    run.check(command)
}

/// Twice: with private items, so that links inside the crates are checked, and then as users see
/// it, where no public item may link to a private one.
fn document(run: &mut Run) -> anyhow::Result<Outcome> {
    for private in [true, false] {
        let mut command = run.cargo(&["doc", "--no-deps"]);
        run.select(&mut command);
        if run.options.packages.is_empty() {
            // The program and the library are both called `writethrough`, and would be written to
            // one place; all that the program has to say is in its crate's library.
            command.arg("--lib");
        }
        if private {
            command.arg("--document-private-items");
        }
        // Set for this command alone: documentation tests must not be compiled anew for it.
        command.env("RUSTDOCFLAGS", "-D warnings");
        let end = run.show(command)?;
        if !end.ok() {
            return Ok(Outcome::Bad(end.describe()));
        }
    }
    Ok(Outcome::Good(String::new()))
}

fn build(run: &mut Run) -> anyhow::Result<Outcome> {
    let mut command = run.cargo(&["test", "--no-run"]);
    run.select(&mut command);
    run.check(command)
}

/// The lab belongs to the service and to no other crate.
fn exercises(run: &mut Run) -> anyhow::Result<Outcome> {
    let packages = &run.options.packages;
    if !packages.is_empty() && !packages.iter().any(|name| name == "writethrough-service") {
        return Ok(Outcome::Good("not of these packages".to_owned()));
    }
    let (note, failures) = lab::run(run.deadline, &[], run.options.verbose)?;
    Ok(if failures.is_empty() {
        Outcome::Good(note)
    } else {
        Outcome::Bad(failures.join("\n"))
    })
}

/// The test binaries, which are built if they are not.
fn built(run: &Run) -> anyhow::Result<Vec<String>> {
    let mut command = run.cargo(&["test", "--no-run"]);
    run.select(&mut command);
    let (end, text) = command::output(command, run.deadline)?;
    if !end.ok() {
        bail!("the tests could not be built: {}\n{text}", end.describe());
    }
    Ok(text.lines().filter_map(transcript::built).collect())
}

fn tests(run: &mut Run) -> anyhow::Result<Outcome> {
    let runners = built(run)?;
    let ground = Ground::new()?;
    let mut command = run.cargo(&["test", "--no-fail-fast"]);
    run.select(&mut command);
    ground.mark(&mut command);

    let mut transcript = Transcript::default();
    let mut now: Option<(String, Instant)> = None;
    let verbose = run.options.verbose;
    let end = command::run(command, run.deadline, |line| {
        let Some(line) = line else {
            return;
        };
        let done = transcript.current().map(|(_, tally)| tally);
        let worth = transcript.line(line);
        let name = transcript.current().map(|(name, _)| name);
        if name != now.as_ref().map(|(name, _)| name.as_str()) {
            let name = name.map(|name| (name.to_owned(), Instant::now()));
            tell(std::mem::replace(&mut now, name), done);
        }
        if verbose || worth == Worth::Show {
            println!("{line}");
        }
    })?;
    tell(now.take(), transcript.current().map(|(_, tally)| tally));

    let mut report = transcript.finish(runners.iter().map(String::as_str), end.ok());
    if !matches!(end, End::Exited(_)) {
        report.tally.failed += 1;
        report
            .failures
            .push(format!("the tests were {}", end.describe()));
    }
    println!("looking for what was left behind");
    let looking = Instant::now();
    let (left, notes) = ground.check();
    println!("  {} left behind ({})", left.len(), time(looking.elapsed()));
    for note in notes {
        println!("note: {note}");
    }
    if left.is_empty() {
        report.tally.passed += 1;
    } else {
        report.tally.failed += 1;
        report
            .failures
            .extend(left.iter().map(|what| format!("left behind: {what}")));
    }
    Ok(Outcome::Tests(report))
}

/// One line for a runner that is done.
fn tell(runner: Option<(String, Instant)>, tally: Option<Tally>) {
    if let (Some((name, started)), Some(tally)) = (runner, tally) {
        println!("  {name}: {} ({})", tally.line(), time(started.elapsed()));
    }
}

/// What is told at the end.
#[derive(Debug, Default)]
struct Summary {
    tally: Tally,
    fates: BTreeMap<&'static str, Fate>,
    lines: Vec<String>,
    failures: Vec<String>,
    ignored: Vec<String>,
    empty: Vec<String>,
}

impl Summary {
    fn add(&mut self, part: &'static str, outcome: Outcome, took: Duration) {
        let (fate, note) = match outcome {
            Outcome::Good(note) => {
                self.tally.passed += 1;
                (Fate::Good, note)
            }
            Outcome::Bad(why) => {
                self.tally.failed += 1;
                self.failures.push(format!("{part}: {why}"));
                (Fate::Bad, why.lines().next().unwrap_or_default().to_owned())
            }
            Outcome::Tests(report) => {
                self.tally.add(report.tally);
                let failed = report.tally.failed > 0;
                let mut note = report.tally.line();
                // A run that has tested nothing has shown nothing.
                let nothing = !failed && report.tally.passed + report.tally.skipped <= 1;
                if nothing {
                    self.tally.failed += 1;
                    note = "no test ran".to_owned();
                    self.failures.push(format!("{part}: {note}"));
                }
                self.failures.extend(report.failures);
                self.ignored.extend(report.ignored);
                self.empty.extend(report.empty);
                (
                    if failed || nothing {
                        Fate::Bad
                    } else {
                        Fate::Good
                    },
                    note,
                )
            }
        };
        self.line(part, fate, &time(took), &note);
    }

    fn not_run(&mut self, part: &'static str, reason: &str) {
        self.tally.skipped += 1;
        self.line(part, Fate::NotRun, "", reason);
    }

    fn line(&mut self, part: &'static str, fate: Fate, took: &str, note: &str) {
        let word = match fate {
            Fate::Good => "ok",
            Fate::Bad => "FAILED",
            Fate::NotRun => "NOT RUN",
        };
        self.fates.insert(part, fate);
        let line = format!("  {part:<8} {word:<8} {took:>9}  {note}");
        self.lines.push(line.trim_end().to_owned());
    }

    fn failed(&self, part: &str) -> bool {
        self.fates.get(part).is_some_and(|fate| *fate != Fate::Good)
    }

    /// Whether everything that was asked for ran and succeeded.
    fn good(&self) -> bool {
        self.tally.failed == 0 && self.fates.values().all(|fate| *fate == Fate::Good)
    }

    /// The summary; its last line is the one that machines read.
    fn text(&self, took: Duration) -> String {
        let mut lines = self.lines.clone();
        let unchosen: Vec<&str> = PARTS
            .iter()
            .map(|part| part.name)
            .filter(|name| !self.fates.contains_key(name))
            .collect();
        if !unchosen.is_empty() {
            lines.push(format!("  not asked for: {}", unchosen.join(", ")));
        }
        lines.push(format!("  {:<17} {:>9}", "total", time(took)));
        for (title, names) in [
            ("runners without a test", &self.empty),
            ("ignored tests", &self.ignored),
            ("failures", &self.failures),
        ] {
            if !names.is_empty() {
                lines.push(format!("\n{title}:"));
                lines.extend(names.iter().map(|name| format!("  {name}")));
            }
        }
        lines.push(format!("\n{}\n", self.tally.line()));
        lines.join("\n")
    }
}

/// A duration as people read it.
fn time(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 {
        format!("{:.1} s", duration.as_secs_f64())
    } else {
        format!("{} m {:02} s", seconds / 60, seconds % 60)
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    fn options(arguments: &[&str]) -> anyhow::Result<Options> {
        let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
        Options::parse(&arguments)
    }

    fn report(passed: usize, failed: usize, skipped: usize) -> Outcome {
        let tally = Tally {
            passed,
            failed,
            skipped,
        };
        Outcome::Tests(Report {
            tally,
            ..Report::default()
        })
    }

    fn last_line(summary: &Summary) -> String {
        let text = summary.text(Duration::from_secs(61));
        text.trim_end()
            .lines()
            .last()
            .unwrap_or_default()
            .to_owned()
    }

    #[test]
    fn options_are_understood_or_refused_with_a_remedy() {
        let given = options(&["--only", "fmt", "--only", "tests", "-p", "xtask"]).unwrap();
        assert_eq!(given.only, ["fmt", "tests"]);
        assert!(given.chosen("fmt") && !given.chosen("clippy"));
        assert!(options(&[]).unwrap().chosen("clippy"));
        assert!(
            options(&["--only", "lint"])
                .unwrap_err()
                .to_string()
                .contains("clippy")
        );
        assert!(
            options(&["--only"])
                .unwrap_err()
                .to_string()
                .contains("needs a value")
        );
        assert!(options(&["--ony"]).is_err());
    }

    #[test]
    fn every_need_of_a_part_is_a_part_before_it() {
        for (place, part) in PARTS.iter().enumerate() {
            for need in part.needs {
                assert!(
                    PARTS[..place].iter().any(|earlier| earlier.name == *need),
                    "{need}"
                );
            }
        }
    }

    #[test]
    fn parts_and_tests_are_summed_on_the_last_line() {
        let mut summary = Summary::default();
        summary.add("fmt", Outcome::Good(String::new()), Duration::ZERO);
        summary.add("tests", report(40, 0, 2), Duration::ZERO);
        assert_eq!(last_line(&summary), "41 passed, 0 failed, 2 skipped");
        assert!(summary.good());
        summary.add(
            "clippy",
            Outcome::Bad("exit status: 101".into()),
            Duration::ZERO,
        );
        assert_eq!(last_line(&summary), "41 passed, 1 failed, 2 skipped");
        assert!(!summary.good());
    }

    #[test]
    fn a_part_that_did_not_run_is_counted_and_is_no_success() {
        let mut summary = Summary::default();
        summary.add("install", Outcome::Good(String::new()), Duration::ZERO);
        summary.not_run("tests", "`build` failed");
        assert_eq!(last_line(&summary), "1 passed, 0 failed, 1 skipped");
        assert!(!summary.good());
        assert!(summary.text(Duration::ZERO).contains("NOT RUN"));
        assert!(summary.failed("tests") && !summary.failed("install"));
    }

    #[test]
    fn tests_that_fail_or_do_not_exist_are_no_success() {
        // One is the look for what was left behind.
        for outcome in [report(3, 1, 0), report(1, 0, 0)] {
            let mut summary = Summary::default();
            summary.add("tests", outcome, Duration::ZERO);
            assert!(!summary.good());
            assert!(last_line(&summary).contains("1 failed"));
        }
    }

    #[test]
    fn the_names_of_compiled_crates_are_left_out_and_diagnostics_are_not() {
        let mut compiling = Compiling::default();
        assert!(compiling.take("   Compiling tokio v1.54.0"));
        assert!(compiling.take("    Checking xtask v0.1.0 (/src/xtask)"));
        assert!(!compiling.take("warning: Compiling is not a verb here"));
        assert!(!compiling.take("    Finished `dev` profile"));
        assert_eq!(compiling.count, 2);
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(time(Duration::from_millis(1234)), "1.2 s");
        assert_eq!(time(Duration::from_secs(125)), "2 m 05 s");
    }
}
