//! The command `writethrough check`: from its arguments to an exit code.
//!
//! Whoever has a history from elsewhere, or runs the workload under circumstances of its own, uses the steps: [`printed`],
//! [`CheckArgs::settings`], [`announce`], [`drive`], and [`conclude`] or [`undecided`].

use std::{
    fs::File,
    io::{BufReader, BufWriter, ErrorKind, IsTerminal, Write},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    history::History,
    judge::Judge,
    report::{self, Circumstances, Summary, Verdict},
    time::parse_duration,
    workload::{self, Mix, Progress, Settings, WorkloadError},
};

/// Check that a service with an items API is linearizable.
///
/// Exit code: 0 linearizable, 1 an anomaly was found or a promise was broken, 2 could not judge.
#[derive(Args, Clone, Debug)]
pub struct CheckArgs {
    /// Base URL of a service; give it again for each further node of the same service
    #[arg(
        long = "target",
        value_name = "URL",
        required_unless_present = "history"
    )]
    pub targets: Vec<String>,

    /// Client processes that run at the same time
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub processes: u32,

    /// Items that exist at any time, about; few of them make races likely
    #[arg(long, default_value_t = 8)]
    pub keys: usize,

    /// How long to run, as in 90s, 5m or 500ms [default: 30s, unless --operations is given]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub duration: Option<Duration>,

    /// How many operations to run
    #[arg(long, value_name = "COUNT")]
    pub operations: Option<u64>,

    /// Weights of the kinds of operation
    #[arg(long, default_value_t = Mix::default(), value_name = "WEIGHTS")]
    pub mix: Mix,

    /// Operations per second of all processes together [default: as many as they can]
    #[arg(long, value_name = "COUNT")]
    pub rate: Option<f64>,

    /// Where the random choices start [default: a random number, which is printed]
    #[arg(long)]
    pub seed: Option<u64>,

    /// After this time an operation without an answer has an unknown outcome
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    pub request_timeout: Duration,

    /// Wait this long for the service to create the first items
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    pub wait: Duration,

    /// Problem types (RFC 9457, last part) with which a 503 says that a write was not made
    #[arg(
        long,
        value_name = "TYPES",
        value_delimiter = ',',
        default_value = "unavailable,overloaded"
    )]
    pub not_made: Vec<String>,

    /// Keep the history in this file, as JSON lines
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,

    /// Judge the history in this file and run nothing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["targets", "record"])]
    pub history: Option<PathBuf>,

    /// Write a report with timelines to this file, as one HTML page
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,

    /// Explain at most this many anomalies; all are counted
    #[arg(long, default_value_t = 20, value_name = "COUNT")]
    pub explain: usize,

    /// Give up judging after this time
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    pub judge_limit: Duration,
}

/// Runs the check and prints its result to standard output; the value is the exit code.
///
/// # Errors
///
/// When a file cannot be read or written. Like exit code 2 that is no verdict.
///
/// # Cancellation
///
/// Dropping the future ends the workload without a verdict. An interrupt signal during the workload ends it early, and
/// what was recorded until then is judged.
pub async fn run(args: CheckArgs) -> anyhow::Result<u8> {
    run_to(args, &mut std::io::stdout(), &mut std::io::stderr()).await
}

/// An output that may fail without a harm to the verdict, which is the exit code.
struct Printer<W> {
    out: W,
    failed: Option<std::io::Error>,
}

impl<W: Write> Printer<W> {
    fn keep<T>(&mut self, written: std::io::Result<T>, instead: T) -> std::io::Result<T> {
        match written {
            Err(error) if error.kind() != ErrorKind::Interrupted => {
                self.failed = Some(error);
                Ok(instead)
            }
            written => written,
        }
    }

    /// Says to `complaints` why the result was not printed, unless its reader has simply gone away.
    fn finish(mut self, complaints: &mut impl Write) {
        let _ = self.flush();
        if let Some(error) = self.failed
            && error.kind() != ErrorKind::BrokenPipe
        {
            let _ = writeln!(complaints, "the result could not be printed: {error}");
        }
    }
}

impl<W: Write> Write for Printer<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.failed.is_some() {
            return Ok(bytes.len());
        }
        let written = self.out.write(bytes);
        self.keep(written, bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if self.failed.is_some() {
            return Ok(());
        }
        let flushed = self.out.flush();
        self.keep(flushed, ())
    }
}

/// The same as [`run`], printing to `out`. When `out` fails, the value is the same, and `complaints` is
/// told why, unless the reader of `out` has gone away.
///
/// # Errors
///
/// As for [`run`].
pub async fn run_to(
    args: CheckArgs,
    out: &mut impl Write,
    complaints: &mut impl Write,
) -> anyhow::Result<u8> {
    printed(out, complaints, async |out| check_to(&args, out).await).await
}

/// Prints what `check` writes to `out`. `check` does not see that `out` fails; `complaints` is told why, unless the reader
/// of `out` has gone away.
///
/// # Errors
///
/// Those of `check`.
pub async fn printed(
    out: &mut impl Write,
    complaints: &mut impl Write,
    check: impl AsyncFnOnce(&mut dyn Write) -> anyhow::Result<u8>,
) -> anyhow::Result<u8> {
    let mut printer = Printer { out, failed: None };
    let code = check(&mut printer).await;
    printer.finish(complaints);
    code
}

async fn check_to(args: &CheckArgs, out: &mut dyn Write) -> anyhow::Result<u8> {
    if let Some(path) = &args.history {
        let file =
            File::open(path).with_context(|| format!("{} cannot be read", path.display()))?;
        let history = History::read(BufReader::with_capacity(1 << 20, file))
            .with_context(|| format!("{} cannot be judged", path.display()))?;
        return conclude(args, &history, None, out);
    }
    let settings = args.settings(args.targets.clone());
    announce(args, &settings, out)?;
    match drive(&settings, &Arc::default(), async {}).await {
        Ok(history) => conclude(args, &history, None, out),
        Err(error) => undecided(args, &error, out),
    }
}

/// Says that there is nothing to judge, and why; the value is the exit code.
///
/// # Errors
///
/// When `out` fails.
pub fn undecided(
    args: &CheckArgs,
    error: &WorkloadError,
    out: &mut dyn Write,
) -> anyhow::Result<u8> {
    if args.json {
        let answer = serde_json::json!({
            "verdict": Verdict::Undecided, "reason": error.to_string(),
        });
        writeln!(out, "{answer:#}")?;
    } else {
        writeln!(out, "could not judge: {error}")?;
    }
    Ok(Verdict::Undecided.exit_code())
}

/// Keeps the history if that was asked for, judges it, and prints the result; the value is the exit code.
///
/// # Errors
///
/// When a file cannot be written, or `out` fails.
pub fn conclude(
    args: &CheckArgs,
    history: &History,
    circumstances: Option<Circumstances>,
    out: &mut dyn Write,
) -> anyhow::Result<u8> {
    if let Some(path) = &args.record {
        let file =
            File::create(path).with_context(|| format!("{} cannot be written", path.display()))?;
        history
            .write(BufWriter::with_capacity(1 << 20, file))
            .with_context(|| format!("{} cannot be written", path.display()))?;
    }
    let judge = Judge::new(args.explain, args.judge_limit);
    let judged = judge.judge(history);
    let mut summary = Summary::new(history, &judged);
    if let Some(circumstances) = circumstances {
        summary = summary.with_faults(report::under_faults(history, circumstances));
    }
    if let Some(path) = &args.report {
        let page = report::page(&summary, history, judged.as_ref().ok());
        std::fs::write(path, page)
            .with_context(|| format!("{} cannot be written", path.display()))?;
    }
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &summary)?;
        writeln!(out)?;
    } else {
        write!(out, "{}", report::text(&summary))?;
    }
    Ok(summary.exit_code())
}

impl CheckArgs {
    /// The workload's settings.
    #[must_use]
    pub fn settings(&self, targets: Vec<String>) -> Settings {
        let seed = self
            .seed
            .unwrap_or_else(|| fastrand::Rng::new().u64(..1 << 32));
        let duration = match (self.duration, self.operations) {
            (None, None) => Some(Duration::from_secs(30)),
            (duration, _) => duration,
        };
        Settings {
            targets,
            processes: self.processes,
            keys: self.keys,
            duration,
            operations: self.operations,
            mix: self.mix,
            rate: self.rate.filter(|rate| *rate > 0.0),
            seed,
            request_timeout: self.request_timeout,
            wait: self.wait,
            not_made: self.not_made.clone(),
            ..Settings::default()
        }
    }
}

/// Says how the run can be repeated.
///
/// # Errors
///
/// When `out` fails.
pub fn announce(args: &CheckArgs, settings: &Settings, out: &mut dyn Write) -> anyhow::Result<()> {
    if !args.json {
        writeln!(
            out,
            "seed {}, {} processes, {}",
            settings.seed, args.processes, args.mix
        )?;
    }
    Ok(())
}

/// Runs the workload with a progress bar. `calm` is awaited before the last look at each item.
///
/// # Errors
///
/// There is nothing to judge.
///
/// # Cancellation
///
/// Ends the workload. An interrupt signal ends it early, with the history until then.
pub async fn drive(
    settings: &Settings,
    progress: &Arc<Progress>,
    calm: impl Future<Output = ()>,
) -> Result<History, WorkloadError> {
    let bar = progress_bar(settings);
    let running = workload::run_then(settings, progress, calm);
    tokio::pin!(running);
    let mut tick = tokio::time::interval(Duration::from_millis(200));
    let mut interrupted = false;
    let result = loop {
        tokio::select! {
            result = &mut running => break result,
            _ = tick.tick() => {
                let done = progress.done();
                bar.set_message(format!("{done} operations"));
                match settings.operations {
                    Some(_) => bar.set_position(done),
                    None => bar.set_position(bar.elapsed().as_secs()),
                }
            }
            _ = tokio::signal::ctrl_c(), if !interrupted => {
                interrupted = true;
                progress.stop();
            }
        }
    };
    bar.finish_and_clear();
    result
}

fn progress_bar(settings: &Settings) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let length = match (settings.operations, settings.duration) {
        (Some(operations), _) => operations,
        (None, Some(duration)) => duration.as_secs(),
        (None, None) => 0,
    };
    let bar = ProgressBar::new(length);
    if let Ok(style) = ProgressStyle::with_template("{elapsed_precise} [{bar:40}] {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}
