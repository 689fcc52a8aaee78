//! `cargo xtask test`: every check and every test, one command.
//!
//! A part is one entry of [`PARTS`]. Parts run in their order; the quick ones come first, and
//! parts that share compiled crates stand together. The lab's exercises are begun with the tests,
//! and run beside them. A part that fails does not stop the others, unless they need it. The last line
//! is for machines: `N passed, M failed`, in which every test
//! counts as one, and every part that is not made of tests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use pico_args::Arguments;
use serde_json::Value;

use crate::command::{self, End};
use crate::runners::{self, Kind, Runner, time};
use crate::strays::Scratch;
use crate::transcript::{Report, Tally};
use crate::{dependencies, install, interrupt, lab, root};

/// How long everything may take together, unless told otherwise.
const BOUND_MINUTES: u64 = 40;
/// How long a quiet command goes without a sign of life.
const QUIET: Duration = Duration::from_secs(20);

/// The package that services depend on.
const LIBRARY: &str = "writethrough";
/// The package that the lab belongs to, and no other.
const LAB_PACKAGE: &str = "writethrough-cli";
/// Variables that change what libtest prints.
const LIBTEST: [&str; 2] = ["RUST_TEST_SHUFFLE", "RUST_TEST_NOCAPTURE"];

pub(crate) const USAGE: &str = "\
cargo xtask test [--only PART]... [--package NAME]... [--minutes N] [--verbose]

Runs everything that decides whether the tree is good.

  --only PART      run only this part; may be repeated. The parts are install, fmt, dependencies,
                   clippy, features, docs, build, tests and lab
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
        name: "features",
        about: "the library with none of its features, with each one alone, and with all",
        needs: &[],
        run: features,
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
enum PartStatus {
    Good,
    Bad,
    NotRun,
}

/// What parts share.
struct Run {
    /// This program. Asked for before anything is built, because that replaces its file.
    program: PathBuf,
    options: Options,
    deadline: Instant,
    /// What is to be run, once it is built.
    built: Option<Built>,
    /// How the lab's exercises went, if they ran beside the tests.
    lab: Option<Outcome>,
}

#[derive(Debug, PartialEq, Eq)]
struct Options {
    only: Vec<String>,
    packages: Vec<String>,
    minutes: u64,
    verbose: bool,
}

impl Options {
    fn parse(mut arguments: Arguments) -> anyhow::Result<Self> {
        let options = Self {
            only: arguments.values_from_str("--only")?,
            packages: arguments.values_from_str(["-p", "--package"])?,
            minutes: arguments
                .opt_value_from_str("--minutes")?
                .unwrap_or(BOUND_MINUTES),
            verbose: arguments.contains(["-v", "--verbose"]),
        };
        crate::finish(arguments)?;
        for name in &options.only {
            if !PARTS.iter().any(|part| part.name == name) {
                bail!("there is no part `{name}`\n\n{USAGE}");
            }
        }
        Ok(options)
    }

    fn chosen(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == part)
    }
}

/// Runs the task.
pub(crate) fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let options = Options::parse(arguments)?;
    interrupt::listen();
    let started = Instant::now();
    let deadline = started + Duration::from_secs(options.minutes * 60);
    let mut run = Run {
        program: std::env::current_exe()?,
        options,
        deadline,
        built: None,
        lab: None,
    };
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
            .env_remove("CARGO_TERM_VERBOSE");
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
        self.show_but(command, |_| false)
    }

    /// The same, without the lines that `take` takes.
    fn show_but(
        &self,
        command: Command,
        mut take: impl FnMut(&str) -> bool,
    ) -> anyhow::Result<End> {
        let verbose = self.options.verbose;
        let mut compiling = Compiling::default();
        command::run(command, self.deadline, |line| match line {
            Some(line) if take(line) => {}
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

/// The library alone, as a service has it that asks for one feature: the other parts build everything at
/// once, where a missing dependency of one feature is there for the sake of another.
fn features(run: &mut Run) -> anyhow::Result<Outcome> {
    let package = &run.options.packages;
    if !package.is_empty() && !package.iter().any(|name| name == LIBRARY) {
        return Ok(Outcome::Good(format!(
            "{LIBRARY} is not among the packages"
        )));
    }
    let features = declared_features(&root().join("crates").join(LIBRARY).join("Cargo.toml"))?;
    let chosen = |features: &str| {
        let mut arguments = vec!["clippy", "--lib", "--package", LIBRARY];
        match features {
            "all" => arguments.push("--all-features"),
            features => arguments.extend(["--no-default-features", "--features", features]),
        }
        let mut command = run.cargo(&arguments);
        command.args(["--quiet", "--", "-D", "warnings"]);
        command
    };
    let mut bad = Vec::new();
    for features in features.iter().map(String::as_str).chain(["", "all"]) {
        let end = run.show(chosen(features))?;
        if !end.ok() {
            let named = if features.is_empty() {
                "none"
            } else {
                features
            };
            bad.push(format!("{named}: {}", end.describe()));
        }
    }
    Ok(if bad.is_empty() {
        Outcome::Good(format!("{} sets of features", features.len() + 2))
    } else {
        Outcome::Bad(bad.join("\n"))
    })
}

/// The names of the features that a manifest declares.
fn declared_features(manifest: &Path) -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(manifest)
        .with_context(|| format!("{} cannot be read", manifest.display()))?;
    let manifest: toml::Table = toml::from_str(&text).context("a manifest is not as it must be")?;
    let features = manifest.get("features").and_then(toml::Value::as_table);
    let features = features.context("the library declares no features")?;
    Ok(features.keys().cloned().collect())
}

/// Twice: with private items, so that links inside the crates are checked, and then as users see
/// it, where no public item may link to a private one.
fn document(run: &mut Run) -> anyhow::Result<Outcome> {
    for private in [true, false] {
        let mut command = run.cargo(&["doc", "--no-deps", "--all-features"]);
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

/// Compiles the tests; what is to be run then is noted.
fn build(run: &mut Run) -> anyhow::Result<Outcome> {
    let mut command = run.cargo(&["test", "--no-run"]);
    run.select(&mut command);
    command.args(["--message-format", "json-render-diagnostics"]);
    let mut built = Built::default();
    let end = run.show_but(command, |line| built.take(line))?;
    if !end.ok() {
        return Ok(Outcome::Bad(end.describe()));
    }
    let count = built.runners.len();
    run.built = Some(built);
    if with_lab(run) {
        // An exercise runs it, which must not compile then: alone, its dependencies have other features.
        let end = run.show(run.cargo(&["build", "-p", "writethrough", "--example", "prices"]))?;
        if !end.ok() {
            return Ok(Outcome::Bad(end.describe()));
        }
    }
    Ok(Outcome::Good(format!("{count} test binaries")))
}

/// What cargo says, a message of JSON a line, that it has built.
#[derive(Debug, Default)]
struct Built {
    runners: Vec<Runner>,
    /// Whether there may be documentation tests.
    documentation: bool,
    /// The program itself, as the tests have it: built for the lab alone it would be compiled anew,
    /// with other features of its dependencies.
    program: Option<PathBuf>,
}

impl Built {
    /// Takes a line if it is such a message.
    fn take(&mut self, line: &str) -> bool {
        if !line.starts_with('{') {
            return false;
        }
        let Ok(message) = serde_json::from_str::<Value>(line) else {
            return false;
        };
        let target = &message["target"];
        let texts = (
            message["executable"].as_str(),
            message["manifest_path"].as_str(),
            target["src_path"].as_str(),
        );
        let (Some(program), Some(manifest), Some(source)) = texts else {
            return true;
        };
        if message["profile"]["test"] != true {
            if target["name"] == "writethrough" && target["kind"][0] == "bin" {
                self.program = Some(program.into());
            }
        } else if let Some(folder) = Path::new(manifest).parent() {
            let package = folder.file_name().unwrap_or_default().to_string_lossy();
            let source = Path::new(source);
            let source = source.strip_prefix(folder).unwrap_or(source).display();
            // As `cargo test` would start it; the variable is that of this program otherwise.
            let mut command = Command::new(program);
            command
                .current_dir(folder)
                .env("CARGO_MANIFEST_DIR", folder);
            self.runners.push(Runner {
                name: format!("{package}: {source}"),
                command,
                kind: Kind::Tests,
            });
            self.documentation |= target["doctest"] == true;
        }
        true
    }
}

fn exercises(run: &mut Run) -> anyhow::Result<Outcome> {
    if let Some(outcome) = run.lab.take() {
        return Ok(outcome);
    }
    if !with_lab(run) {
        return Ok(Outcome::Good("not of these packages".to_owned()));
    }
    let (note, failures) = lab::run(run.deadline, &[], None, run.options.verbose)?;
    Ok(if failures.is_empty() {
        Outcome::Good(note)
    } else {
        Outcome::Bad(failures.join("\n"))
    })
}

/// Whether the lab's exercises are to run beside the tests.
fn with_lab(run: &Run) -> bool {
    let packages = &run.options.packages;
    run.options.chosen("lab")
        && (packages.is_empty() || packages.iter().any(|name| name == LAB_PACKAGE))
}

fn tests(run: &mut Run) -> anyhow::Result<Outcome> {
    let built = match run.built.take() {
        Some(built) => built,
        None => match build(run)? {
            Outcome::Bad(why) => bail!("the tests could not be built: {why}"),
            _ => run.built.take().unwrap_or_default(),
        },
    };
    let Built {
        mut runners,
        documentation,
        program,
    } = built;
    let scratch = Scratch::new()?;
    if documentation {
        let mut command = run.cargo(&["test", "--doc", "--no-fail-fast"]);
        run.select(&mut command);
        runners.push(Runner {
            name: runners::DOCUMENTATION.to_owned(),
            command,
            kind: Kind::Tests,
        });
    }
    for runner in &mut runners {
        scratch.mark(&mut runner.command);
        for variable in LIBTEST {
            runner.command.env_remove(variable);
        }
    }
    if let Some(program) = program
        && with_lab(run)
    {
        // A process of its own, with a folder of its own.
        let mut command = Command::new(&run.program);
        command.args(["lab", "--program"]).arg(program);
        runners.push(Runner {
            name: runners::LAB.to_owned(),
            command,
            kind: Kind::Other,
        });
    }

    let mut report = Report::default();
    let mut exercises = None;
    runners::run(runners, run.deadline, run.options.verbose, |ended| {
        let took = time(ended.took);
        println!("  {}: {} ({took})", ended.name, ended.report.tally.line());
        for line in &ended.output {
            println!("    {line}");
        }
        if ended.name == runners::LAB {
            let note = format!("beside the tests, {took}");
            exercises = Some(match ended.report.failures.into_iter().next() {
                None => Outcome::Good(note),
                Some(failure) => Outcome::Bad(failure),
            });
        } else {
            report.add(ended.report);
        }
    });
    run.lab = exercises;
    println!("looking for what was left behind");
    let looking = Instant::now();
    let (left, notes) = scratch.check();
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

/// What is told at the end.
#[derive(Debug, Default)]
struct Summary {
    tally: Tally,
    statuses: BTreeMap<&'static str, PartStatus>,
    lines: Vec<String>,
    failures: Vec<String>,
    empty: Vec<String>,
}

impl Summary {
    fn add(&mut self, part: &'static str, outcome: Outcome, took: Duration) {
        let (status, note) = match outcome {
            Outcome::Good(note) => {
                self.tally.passed += 1;
                (PartStatus::Good, note)
            }
            Outcome::Bad(why) => {
                self.tally.failed += 1;
                self.failures.push(format!("{part}: {why}"));
                (
                    PartStatus::Bad,
                    why.lines().next().unwrap_or_default().to_owned(),
                )
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
                self.empty.extend(report.empty);
                (
                    if failed || nothing {
                        PartStatus::Bad
                    } else {
                        PartStatus::Good
                    },
                    note,
                )
            }
        };
        self.line(part, status, &time(took), &note);
    }

    fn not_run(&mut self, part: &'static str, reason: &str) {
        self.tally.skipped += 1;
        self.line(part, PartStatus::NotRun, "", reason);
    }

    fn line(&mut self, part: &'static str, status: PartStatus, took: &str, note: &str) {
        let word = match status {
            PartStatus::Good => "ok",
            PartStatus::Bad => "FAILED",
            PartStatus::NotRun => "NOT RUN",
        };
        self.statuses.insert(part, status);
        let line = format!("  {part:<8} {word:<8} {took:>9}  {note}");
        self.lines.push(line.trim_end().to_owned());
    }

    fn failed(&self, part: &str) -> bool {
        self.statuses
            .get(part)
            .is_some_and(|status| *status != PartStatus::Good)
    }

    /// Whether everything that was asked for ran and succeeded.
    fn good(&self) -> bool {
        self.tally.failed == 0
            && self
                .statuses
                .values()
                .all(|status| *status == PartStatus::Good)
    }

    /// The summary; its last line is the one that machines read.
    fn text(&self, took: Duration) -> String {
        let mut lines = self.lines.clone();
        let unchosen: Vec<&str> = PARTS
            .iter()
            .map(|part| part.name)
            .filter(|name| !self.statuses.contains_key(name))
            .collect();
        if !unchosen.is_empty() {
            lines.push(format!("  not asked for: {}", unchosen.join(", ")));
        }
        lines.push(format!("  {:<17} {:>9}", "total", time(took)));
        for (title, names) in [
            ("runners without a test", &self.empty),
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

#[cfg(test)]
mod unit {
    use super::*;

    fn options(words: &[&str]) -> anyhow::Result<Options> {
        let words = words.iter().map(Into::into).collect();
        Options::parse(Arguments::from_vec(words))
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
        for wrong in [
            &["--only"][..],
            &["--ony"],
            &["--minutes", "soon"],
            &["fmt"],
        ] {
            assert!(options(wrong).is_err(), "{wrong:?}");
        }
        for part in PARTS {
            assert!(USAGE.contains(part.name), "{}", part.name);
        }
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
    fn what_cargo_has_built_is_run_and_everything_else_is_shown() {
        let artifact = |folder: &str, source: &str, target: &str, test: bool, program: &str| {
            let message = format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/w/{folder}/Cargo.toml",
                "target":{{"src_path":"/w/{folder}/{source}",{target}}},
                "profile":{{"test":{test}}},"executable":{program}}}"#
            );
            message.replace('\n', " ")
        };
        let lib = r#""kind":["lib"],"name":"writethrough_check","doctest":true"#;
        let bin = r#""kind":["bin"],"name":"writethrough","doctest":false"#;
        let test = r#""kind":["test"],"name":"postgres","doctest":false"#;
        let mut built = Built::default();
        for message in [
            artifact("crates/check", "src/lib.rs", lib, false, "null"),
            artifact("crates/check", "src/lib.rs", lib, true, "\"/t/check-1\""),
            artifact(
                "crates/a",
                "tests/postgres.rs",
                test,
                true,
                "\"/t/postgres-1\"",
            ),
            artifact(
                "crates/b",
                "tests/postgres.rs",
                test,
                true,
                "\"/t/postgres-2\"",
            ),
            artifact(
                "crates/b",
                "src/main.rs",
                bin,
                true,
                "\"/t/writethrough-1\"",
            ),
            artifact("crates/b", "src/main.rs", bin, false, "\"/t/writethrough\""),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ] {
            assert!(built.take(&message), "{message}");
        }
        for line in ["warning: unused", "{ braces", ""] {
            assert!(!built.take(line), "{line}");
        }
        let names: Vec<&str> = built.runners.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "check: src/lib.rs",
                "a: tests/postgres.rs",
                "b: tests/postgres.rs",
                "b: src/main.rs"
            ]
        );
        assert!(built.documentation);
        assert_eq!(built.program.as_deref(), Some(Path::new("/t/writethrough")));
        let folder = built.runners[1].command.get_current_dir();
        assert_eq!(folder, Some(Path::new("/w/crates/a")));
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(time(Duration::from_millis(1234)), "1.2 s");
        assert_eq!(time(Duration::from_secs(125)), "2 m 05 s");
    }
}
