//! `cargo xtask lab`: runs every command of every exercise as it stands, without containers, and
//! checks that what the page shows is what comes out.
//!
//! What a page says to this task, by the words after the three backticks:
//!
//! | block | meaning |
//! |---|---|
//! | `sh lab up` | starts the lab in the background, unless the one that runs was started alike |
//! | `sh`, `sh lab` | is run by `sh`; must succeed. Variables live until the page ends |
//! | `sh docker` | is for people with Docker, and for `cargo xtask stack`; names of services are checked |
//! | `sh k6` | is not run |
//! | `text` | must be in the output of the last block that was run: see [`Shown`] |
//! | anything else | is not looked at |

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use pico_args::Arguments;

use crate::command::{self, End};
use crate::strays::Scratch;
use crate::{interrupt, root};

/// How long one block may take.
const BLOCK: Duration = Duration::from_secs(60);
/// How long the lab may take to start and to end.
const LAB: Duration = Duration::from_secs(60);
/// How often a page is tried: on a busy machine a read may bypass the cache, rightly, where the page
/// shows a hit.
const ATTEMPTS: usize = 3;
const TICK: Duration = Duration::from_millis(50);

pub(crate) const USAGE: &str = "\
cargo xtask lab [--page NAME]... [--program FILE] [--verbose]

Runs the commands of the exercises in lab/exercises, without containers.

  --page NAME      only pages whose name begins so, such as 04; may be repeated
  --program FILE   the program `writethrough`; it is built without this option
  --verbose        show the commands and their output
";

/// Runs the task.
pub(crate) fn main(mut arguments: Arguments) -> anyhow::Result<ExitCode> {
    let wanted: Vec<String> = arguments.values_from_str("--page")?;
    let program: Option<PathBuf> = arguments.opt_value_from_str("--program")?;
    let verbose = arguments.contains(["-v", "--verbose"]);
    crate::finish(arguments)?;
    interrupt::listen();
    let deadline = Instant::now() + Duration::from_secs(30 * 60);
    let (note, failures) = run(deadline, &wanted, program.as_deref(), verbose)?;
    println!("{note}");
    for failure in &failures {
        println!("{failure}");
    }
    Ok(if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs the pages whose names begin with one of `wanted`, or all, with this program or one that is
/// built now; returns what was done, and what failed.
pub(crate) fn run(
    deadline: Instant,
    wanted: &[String],
    program: Option<&Path>,
    verbose: bool,
) -> anyhow::Result<(String, Vec<String>)> {
    let pages = pages(wanted)?;
    let program = match program {
        Some(program) => program.to_owned(),
        None => build(deadline)?,
    };
    let mut exercises = ExerciseRunner::new(&program, deadline, verbose)?;
    let mut failures = Vec::new();
    let mut commands = 0;
    for page in &pages {
        let started = Instant::now();
        let mut outcome = Ok(0);
        let mut attempt = 0;
        while attempt < ATTEMPTS && interrupt::count() == 0 {
            attempt += 1;
            outcome = exercises.run(page);
            match &outcome {
                Ok(_) => break,
                Err(error) => {
                    let error = format!("{error:#}");
                    let mut lines = error.lines().take(2).map(str::trim);
                    let start = lines.by_ref().collect::<Vec<_>>().join(" ");
                    println!("  {}, attempt {attempt}: {start}", page.name);
                    // The next attempt begins with a new lab.
                    exercises.end_lab()?;
                }
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        match outcome {
            Ok(count) => {
                commands += count;
                let again = if attempt > 1 {
                    format!(", attempt {attempt}")
                } else {
                    String::new()
                };
                println!("  {} ({count} commands, {seconds:.1} s{again})", page.name);
            }
            Err(error) => failures.push(format!("{}: {error:#}", page.name)),
        }
        if interrupt::count() > 0 {
            failures.push("interrupted".to_owned());
            break;
        }
    }
    exercises.end_lab()?;
    failures.extend(exercises.left());
    let note = format!("{} pages, {commands} commands", pages.len());
    Ok((note, failures))
}

fn files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("cannot list {}", folder.display()))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "md"))
        .collect();
    files.sort();
    Ok(files)
}

/// The names of the services in a compose file.
fn services(compose: &str) -> BTreeSet<String> {
    compose
        .lines()
        .skip_while(|line| *line != "services:")
        .skip(1)
        .take_while(|line| line.is_empty() || line.starts_with([' ', '#']))
        .filter_map(|line| line.strip_prefix("  ")?.strip_suffix(':'))
        .filter(|name| !name.starts_with([' ', '#']))
        .map(str::to_owned)
        .collect()
}

/// One exercise.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) name: String,
    steps: Vec<Step>,
}

#[derive(Debug, PartialEq, Eq)]
struct Step {
    line: usize,
    kind: Kind,
    text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Starts the lab without containers.
    Up,
    /// Is run in both variants.
    Run,
    /// Is run without containers only.
    Lab,
    /// Is run with containers only.
    Docker,
    /// Is not run.
    Skip,
    /// What is seen.
    Expect,
}

impl Page {
    fn parse(name: String, text: &str, services: &BTreeSet<String>) -> anyhow::Result<Self> {
        let mut steps = Vec::new();
        let mut lines = text.lines().enumerate();
        while let Some((number, line)) = lines.next() {
            let Some(words) = line.trim_start().strip_prefix("```") else {
                continue;
            };
            let mut block = String::new();
            let mut closed = false;
            for (_, line) in lines.by_ref() {
                if line.trim_start().starts_with("```") {
                    closed = true;
                    break;
                }
                block.push_str(line);
                block.push('\n');
            }
            if !closed {
                bail!("{name}:{}: the block is not closed", number + 1);
            }
            let kind = match words.trim() {
                "sh lab up" => Kind::Up,
                "sh" => Kind::Run,
                "sh lab" => Kind::Lab,
                "text" => Kind::Expect,
                "sh docker" => {
                    check_services(&block, services)
                        .with_context(|| format!("{name}:{}", number + 1))?;
                    Kind::Docker
                }
                "sh k6" => Kind::Skip,
                other if other.starts_with("sh ") || other.starts_with("text ") => {
                    bail!("{name}:{}: `{other}` is not known here", number + 1)
                }
                _ => continue,
            };
            steps.push(Step {
                line: number + 1,
                kind,
                text: block,
            });
        }
        let has = |kind| steps.iter().any(|step: &Step| step.kind == kind);
        if !(has(Kind::Run) || has(Kind::Lab)) || !has(Kind::Expect) {
            bail!("{name}: a page has commands and shows what comes out");
        }
        if !text.contains("<details>") {
            bail!("{name}: a page has a question and, folded away, its answer");
        }
        Ok(Self { name, steps })
    }
}

impl Page {
    /// Works through the variant with containers: `run` runs a block and returns its output. What a
    /// page shows is checked where the block before it was run. Returns how many were.
    pub(crate) fn with_containers(
        &self,
        mut run: impl FnMut(&str) -> anyhow::Result<String>,
    ) -> anyhow::Result<usize> {
        let mut output = None;
        let mut before = Kind::Up;
        let mut count = 0;
        for step in &self.steps {
            let place = || format!("line {}", step.line);
            match step.kind {
                Kind::Run | Kind::Docker => {
                    count += 1;
                    output = Some(run(&step.text).with_context(place)?);
                }
                // The other form of the block that was just run, or one without a counterpart.
                Kind::Up | Kind::Lab if before == Kind::Docker => {}
                Kind::Up | Kind::Lab | Kind::Skip => output = None,
                Kind::Expect => {
                    if let Some(output) = &output {
                        Shown::check(&step.text, output).with_context(place)?;
                    }
                }
            }
            before = step.kind;
        }
        Ok(count)
    }
}

/// The pages whose names begin with one of `wanted`, or all.
pub(crate) fn pages(wanted: &[String]) -> anyhow::Result<Vec<Page>> {
    let services = services(&fs::read_to_string(root().join("compose.yaml"))?);
    let mut pages = Vec::new();
    for file in files(&root().join("lab/exercises"))? {
        let name = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if wanted.is_empty() || wanted.iter().any(|start| name.starts_with(start)) {
            pages.push(Page::parse(name, &fs::read_to_string(&file)?, &services)?);
        }
    }
    if pages.is_empty() {
        bail!("there is no such page in lab/exercises");
    }
    Ok(pages)
}

/// Checks that `docker compose VERB ... SERVICE` names a service that exists.
fn check_services(block: &str, services: &BTreeSet<String>) -> anyhow::Result<()> {
    const VERBS: [&str; 9] = [
        "stop", "start", "restart", "kill", "pause", "unpause", "exec", "logs", "run",
    ];
    for line in block.lines() {
        let Some((_, rest)) = line.split_once("docker compose ") else {
            continue;
        };
        let mut words = rest
            .split_whitespace()
            .skip_while(|word| !VERBS.contains(word));
        if words.next().is_none() {
            continue;
        }
        let Some(name) = words.find(|word| !word.starts_with('-')) else {
            continue;
        };
        if !services.contains(name) {
            bail!("there is no service `{name}` in compose.yaml: {line}");
        }
    }
    Ok(())
}

/// Where pages are worked through: a folder, the program, and the lab while it runs.
struct ExerciseRunner {
    scratch: Scratch,
    folder: PathBuf,
    port: u16,
    lab: Option<(String, Child)>,
    deadline: Instant,
    verbose: bool,
}

impl ExerciseRunner {
    fn new(program: &Path, deadline: Instant, verbose: bool) -> anyhow::Result<Self> {
        let scratch = Scratch::new()?;
        let folder = scratch.folder().join("lab");
        let programs = folder.join("bin");
        fs::create_dir_all(&programs)?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o711))?;
        // A copy, because the program may be built anew meanwhile.
        fs::copy(program, programs.join("writethrough"))
            .with_context(|| format!("cannot copy {}", program.display()))?;
        Ok(Self {
            scratch,
            folder,
            port: free_ports()?,
            lab: None,
            deadline,
            verbose,
        })
    }

    /// A shell with the program in its path.
    fn shell(&self, script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        self.scratch.mark(&mut command);
        let mut path = std::ffi::OsString::from(self.folder.join("bin"));
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        command
            .arg("-c")
            .arg(script)
            .current_dir(root())
            .env("PATH", path)
            .env("WRITETHROUGH_LAB", self.folder.join("data"))
            .env(
                "WRITETHROUGH_LAB_LISTEN",
                format!("127.0.0.1:{}", self.port),
            );
        command
    }

    /// The page's ports, replaced by ones that are free here; and its temporary files, by ones of
    /// this run.
    fn localized(&self, script: &str) -> String {
        let mut script = script.replace("/tmp/", &format!("{}/", self.folder.display()));
        for offset in 0..3 {
            let from = format!("localhost:{}", 8000 + offset);
            script = script.replace(&from, &format!("127.0.0.1:{}", self.port + offset));
        }
        script
    }

    /// Works through a page; returns how many blocks were run.
    fn run(&mut self, page: &Page) -> anyhow::Result<usize> {
        let variables = self.folder.join("variables");
        fs::write(&variables, "")?;
        let mut output = String::new();
        let mut count = 0;
        for step in &page.steps {
            let place = || format!("line {}", step.line);
            match step.kind {
                Kind::Up => self.start_lab(&step.text).with_context(place)?,
                Kind::Run | Kind::Lab => {
                    count += 1;
                    output = self.block(&step.text, &variables).with_context(place)?;
                }
                Kind::Docker | Kind::Skip => {}
                Kind::Expect => Shown::check(&step.text, &output).with_context(place)?,
            }
        }
        Ok(count)
    }

    fn block(&self, block: &str, variables: &Path) -> anyhow::Result<String> {
        let file = variables.display();
        let script = format!(
            "set -eu -a\n. '{file}'\n{}\nset +x\nexport -p > '{file}'\n",
            self.localized(block)
        );
        if self.verbose {
            println!("{}", block.trim_end());
        }
        let deadline = self.deadline.min(Instant::now() + BLOCK);
        let (end, output) = command::output(self.shell(&script), deadline)?;
        if self.verbose {
            println!("{output}");
        }
        if !end.ok() {
            bail!("{}:\n{block}\n{output}", end.describe());
        }
        Ok(output)
    }

    /// Starts the lab as a person would in another terminal, unless such a lab runs.
    fn start_lab(&mut self, script: &str) -> anyhow::Result<()> {
        if self
            .lab
            .as_ref()
            .is_some_and(|(running, _)| running == script)
        {
            return Ok(());
        }
        self.end_lab()?;
        let log = self.folder.join("lab.log");
        let out = fs::File::create(&log)?;
        let mut command = self.shell(&format!("exec {}", self.localized(script)));
        command
            .stdin(Stdio::null())
            .stderr(out.try_clone()?)
            .stdout(out)
            .process_group(0);
        let child = command.spawn()?;
        self.lab = Some((script.to_owned(), child));
        let deadline = Instant::now() + LAB;
        loop {
            let said = fs::read_to_string(&log)?;
            if said.contains("The lab is ready") {
                return Ok(());
            }
            let ended = match &mut self.lab {
                Some((_, child)) => child.try_wait()?.is_some(),
                None => true,
            };
            if ended || Instant::now() > deadline || interrupt::count() > 0 {
                self.end_lab()?;
                bail!("the lab did not start:\n{said}");
            }
            std::thread::park_timeout(TICK);
        }
    }

    fn end_lab(&mut self) -> anyhow::Result<()> {
        let Some((_, mut child)) = self.lab.take() else {
            return Ok(());
        };
        let deadline = Instant::now() + LAB;
        let (end, said) = command::output(self.shell("writethrough lab down"), deadline)?;
        while child.try_wait()?.is_none() {
            if !matches!(end, End::Exited(_)) || Instant::now() > deadline {
                child.kill()?;
                child.wait()?;
                bail!("the lab did not end: {said}");
            }
            std::thread::park_timeout(TICK);
        }
        Ok(())
    }

    /// What the pages left behind.
    fn left(self) -> Vec<String> {
        let data = self.folder.join("data");
        let mut left = Vec::new();
        if data.exists() {
            left.push(format!("{} was left behind", data.display()));
        }
        let _ = fs::remove_dir_all(&self.folder);
        let (strays, _) = self.scratch.check();
        left.extend(
            strays
                .into_iter()
                .map(|stray| format!("left behind: {stray}")),
        );
        left
    }
}

/// Builds the program and returns where it is.
fn build(deadline: Instant) -> anyhow::Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args([
            "build",
            "--package",
            "writethrough-cli",
            "--bin",
            "writethrough",
        ])
        .args(["--message-format", "json-render-diagnostics"])
        .current_dir(root());
    let (end, output) = command::output(command, deadline)?;
    if !end.ok() {
        bail!(
            "the program could not be built: {}\n{output}",
            end.describe()
        );
    }
    let executable = output.lines().rev().find_map(|line| {
        let (_, rest) = line.split_once("\"executable\":\"")?;
        let (path, _) = rest.split_once('"')?;
        path.ends_with("/writethrough").then(|| PathBuf::from(path))
    });
    executable.context("cargo does not say where the program is")
}

/// The first of three neighbouring ports that are free now.
fn free_ports() -> anyhow::Result<u16> {
    let listen = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port));
    for _ in 0..100 {
        let first = listen(0)?.local_addr()?.port();
        // Below the range for outgoing connections, so that none of them takes it meanwhile.
        let first = 10_000 + first % 10_000;
        if (first..first + 3).all(|port| listen(port).is_ok()) {
            return Ok(first);
        }
    }
    bail!("there are no three neighbouring ports free")
}

/// What a page shows of an output.
///
/// Each line must appear in the output, in this order; other lines may stand between. In a line `...`
/// stands for anything. What differs from run to run is compared by its kind: numbers with a decimal
/// point, numbers of four digits and more, dates, hexadecimal ids, and spaces. Everything else is
/// compared as it is.
struct Shown;

impl Shown {
    fn check(shown: &str, output: &str) -> anyhow::Result<()> {
        let mut lines = output.lines();
        for wanted in shown.lines().filter(|line| !line.trim().is_empty()) {
            if wanted.trim() == "..." {
                continue;
            }
            let pattern = general(wanted);
            if !lines.any(|line| matches(&pattern, &general(line))) {
                bail!("the page shows\n  {wanted}\nbut the output is\n{output}");
            }
        }
        Ok(())
    }
}

/// Replaces what differs from run to run by its kind.
fn general(line: &str) -> String {
    let mut text = String::new();
    let mut rest = line.trim();
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_ascii_alphanumeric();
        let after_word = text.chars().last().is_some_and(is_word);
        let number = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let word = rest.len() - rest.trim_start_matches(is_word).len();
        let hexadecimal = rest[..word].bytes().all(|byte| byte.is_ascii_hexdigit());
        if first.is_whitespace() {
            text.push(' ');
            rest = rest.trim_start();
        } else if !after_word && word >= 8 && hexadecimal && number < word {
            text.push('#');
            // The parts of a UUID belong together.
            rest = rest.trim_start_matches(|c: char| c.is_ascii_hexdigit() || c == '-');
        } else if !after_word && number > 0 {
            let tail = &rest[number..];
            let decimals = tail.strip_prefix('.').map_or(0, |tail| {
                tail.len() - tail.trim_start_matches(|c: char| c.is_ascii_digit()).len()
            });
            if decimals > 0 {
                text.push('#');
                rest = &tail[1 + decimals..];
            } else if number >= 4 {
                text.push('#');
                // A date, a time of day, a UUID that begins with digits only.
                rest =
                    tail.trim_start_matches(|c: char| c.is_ascii_hexdigit() || "-:TZ.".contains(c));
            } else {
                text.push_str(&rest[..number]);
                rest = tail;
            }
        } else if word > 0 {
            text.push_str(&rest[..word]);
            rest = &rest[word..];
        } else {
            text.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    text
}

/// Whether a line is as the pattern says, in which `...` stands for anything.
fn matches(pattern: &str, line: &str) -> bool {
    let mut parts = pattern.split("...").map(str::trim);
    let Some(start) = parts.next() else {
        return false;
    };
    let Some(mut rest) = line.strip_prefix(start) else {
        return false;
    };
    let mut open = false;
    for part in parts {
        open = part.is_empty();
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    open || rest.trim().is_empty() || {
        // The last part may occur earlier, too; what counts is the end.
        let last = pattern.rsplit("...").next().map_or("", str::trim);
        pattern.contains("...") && line.ends_with(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
# A page

```sh lab up
writethrough lab
```

```sh docker
docker compose exec -T redis redis-cli ping
```

```sh
echo one
```

```text
one
```

<details><summary>Answer</summary>Yes.</details>
";

    fn known() -> BTreeSet<String> {
        services(
            "name: x\nservices:\n  api:\n    image: a\n  redis:\n    image: b\n\nvolumes:\n  data:\n",
        )
    }

    #[test]
    fn services_are_the_keys_below_services() {
        let known: Vec<_> = known().into_iter().collect();
        assert_eq!(known, ["api", "redis"]);
    }

    #[test]
    fn a_page_is_its_blocks_in_order() {
        let page = Page::parse("01.md".into(), GOOD, &known()).unwrap();
        let kinds: Vec<_> = page.steps.iter().map(|step| step.kind).collect();
        assert_eq!(kinds, [Kind::Up, Kind::Docker, Kind::Run, Kind::Expect]);
        assert_eq!(page.steps[2].text, "echo one\n");
        assert_eq!(page.steps[2].line, 12);
    }

    #[test]
    fn a_page_that_could_rot_is_refused() {
        let bad = [
            GOOD.replace("```text\none\n```", ""),
            GOOD.replace("```sh\n", "```bash\n"),
            GOOD.replace("```sh\n", "```sh lap\n"),
            GOOD.replace("<details>", ""),
            GOOD.replace("-T redis ", "-T mysql "),
            GOOD.trim_end_matches("```\n\n<details><summary>Answer</summary>Yes.</details>\n")
                .into(),
        ];
        for text in bad {
            assert!(
                Page::parse("01.md".into(), &text, &known()).is_err(),
                "{text}"
            );
        }
    }

    #[test]
    fn what_differs_from_run_to_run_is_compared_by_its_kind() {
        let same = [
            ("redis;dur=0.508", "redis;dur=12.1"),
            (
                "x-trace-id: 62157f9e2d3cb42b4b35e1727f1d1fc9",
                "x-trace-id: 0000000000000000000000000000000a",
            ),
            (
                "\"created_at\":\"2026-11-22T12:44:54.705000Z\"",
                "\"created_at\":\"2027-01-02T03:04:05.1Z\"",
            ),
            (
                "item:550e8400-e29b-41d4-a716-446655440001@4d1f0c7be2a96035.1795352593",
                "item:019c3f2e-e29b-41d4-a716-446655440001@4d1f0c7be2a96035.1795352999",
            ),
            ("a   b", "a b"),
            ("12345 operations", "9999 operations"),
            (
                "{\"id\":...,\"version\":2}",
                "{\"id\":\"x\",\"name\":\"y\",\"version\":2}",
            ),
            ("... ok", "anything ok"),
            ("mode ...", "mode cached"),
        ];
        for (shown, output) in same {
            assert!(
                Shown::check(shown, output).is_ok(),
                "{shown} / {output}: {} / {}",
                general(shown),
                general(output)
            );
        }
        let different = [
            ("\"version\":2", "\"version\":3"),
            (
                "cache-status: writethrough; hit",
                "cache-status: writethrough; fwd=miss; stored",
            ),
            ("HTTP/1.1 200 OK", "HTTP/1.1 503 Service Unavailable"),
            ("version: 2", "version: 2 3"),
            (
                "{\"id\":...,\"version\":2}",
                "{\"id\":\"x\",\"version\":12}",
            ),
            ("one\ntwo", "two\none"),
            ("3 rows", "30 rows"),
        ];
        for (shown, output) in different {
            assert!(Shown::check(shown, output).is_err(), "{shown} / {output}");
        }
    }
}
