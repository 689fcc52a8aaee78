//! `writethrough check`, with `--cluster` too: a cluster of its own is checked under faults, and audited at the end.

use std::{io::Write, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use anyhow::Context;
use clap::Args;
use writethrough_check::{
    CheckArgs,
    command::{announce, conclude, drive, printed, undecided},
    history::History,
    report::Circumstances,
    workload::{Progress, Settings, WorkloadError},
};

use crate::cluster::{Cluster, Consistency, Serve};
use crate::nemesis::{self, Faults, Nemesis, NemesisLog, Plan, Planned, Span};

/// The least request timeout with a cluster: a write is bounded by 10 s there, and its answer should be waited for.
const CLUSTER_REQUEST_TIMEOUT: Duration = Duration::from_secs(12);

/// Check that a service with an items API is linearizable.
///
/// Exit code: 0 linearizable, 1 an anomaly was found or a promise was broken, 2 could not judge.
#[derive(Args, Clone, Debug)]
#[command(mut_arg("targets", |targets| targets.required_unless_present("cluster")))]
pub struct ClusterCheckArgs {
    /// What to check, and how.
    #[command(flatten)]
    pub check: CheckArgs,

    /// Start a cluster of so many nodes, as in nodes=3, cause faults while it is checked, and audit it at the end
    #[arg(long, value_name = "nodes=COUNT", conflicts_with_all = ["targets", "history"])]
    pub cluster: Option<ClusterSize>,

    /// Kinds of fault, as in kill-redis,pause-node; or all, or none
    #[arg(
        long,
        value_name = "KINDS",
        default_value = "all",
        requires = "cluster",
        conflicts_with = "targets"
    )]
    pub faults: Faults,

    /// Where the random choices of the schedule of faults start [default: a random number, which is printed]
    #[arg(
        long,
        value_name = "SEED",
        requires = "cluster",
        conflicts_with = "targets"
    )]
    pub schedule_seed: Option<u64>,

    /// How long a fault lasts
    #[arg(long, value_name = "TIME..TIME", default_value_t = Span::from_millis(500, 3_000), requires = "cluster", conflicts_with = "targets")]
    pub fault_length: Span,

    /// Time without faults between one group of faults and the next
    #[arg(long, value_name = "TIME..TIME", default_value_t = Span::from_millis(500, 3_500), requires = "cluster", conflicts_with = "targets")]
    pub gap: Span,

    /// How the nodes keep the cache
    #[arg(
        long,
        value_name = "MODE",
        default_value = "strict",
        requires = "cluster",
        conflicts_with = "targets"
    )]
    pub consistency: Consistency,

    /// The nodes' program [default: this one]
    #[arg(
        long,
        value_name = "PATH",
        requires = "cluster",
        conflicts_with = "targets"
    )]
    pub binary: Option<PathBuf>,

    /// How long the nodes keep values cached, in seconds [default: the program's]
    #[arg(
        long,
        value_name = "SECONDS",
        requires = "cluster",
        conflicts_with = "targets"
    )]
    pub ttl: Option<u64>,
}

/// How many nodes a cluster has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterSize(pub usize);

impl FromStr for ClusterSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let count = text.strip_prefix("nodes=").unwrap_or(text);
        count
            .parse()
            .ok()
            .filter(|count| (1..=9).contains(count))
            .map(Self)
            .ok_or_else(|| "use nodes=COUNT with a count from 1 to 9, as in nodes=3".to_owned())
    }
}

/// Runs the check and prints its result to standard output; the value is the exit code.
///
/// # Errors
///
/// When a file cannot be read or written, or the cluster did not start. Like exit code 2 that is no verdict.
///
/// # Cancellation
///
/// Dropping the future ends the workload and the cluster without a verdict. An interrupt signal during the workload ends
/// it early, and what was recorded until then is judged.
pub async fn run(args: ClusterCheckArgs) -> anyhow::Result<u8> {
    let Some(size) = args.cluster else {
        return writethrough_check::run(args.check).await;
    };
    let (mut out, mut complaints) = (std::io::stdout(), std::io::stderr());
    printed(&mut out, &mut complaints, async |out| {
        check_cluster(&args, size, out).await
    })
    .await
}

/// Runs the workload on a cluster of its own while the nemesis is at work, audits the cluster, and judges the history.
async fn check_cluster(
    args: &ClusterCheckArgs,
    size: ClusterSize,
    out: &mut dyn Write,
) -> anyhow::Result<u8> {
    let binary = match &args.binary {
        Some(path) => path.clone(),
        None => std::env::current_exe().context("this program cannot be found")?,
    };
    let mut serve = Serve::new("node", binary).consistency(args.consistency);
    if let Some(ttl) = args.ttl {
        serve = serve.flag("--ttl", &ttl.to_string());
    }
    let started = async {
        let cluster = Cluster::behind_links(size.0, true, &serve).await?;
        cluster.wait_until_healthy().await?;
        anyhow::Ok(cluster)
    };
    let cluster = Arc::new(started.await.context("the cluster did not start")?);
    let mut settings = args.check.settings(cluster.urls());
    settings.pinned = true;
    settings.request_timeout = settings.request_timeout.max(CLUSTER_REQUEST_TIMEOUT);
    let schedule_seed = args
        .schedule_seed
        .unwrap_or_else(|| fastrand::Rng::new().u64(..1 << 32));
    let planned = nemesis::schedule(&Plan {
        seed: schedule_seed,
        faults: args.faults.0.clone(),
        nodes: size.0,
        duration: settings.duration.unwrap_or(Duration::from_secs(3_600)),
        length: args.fault_length,
        gap: args.gap,
    });
    announce(&args.check, &settings, out)?;
    let note = format!(
        "{} nodes, consistency {}, faults {}, schedule seed {schedule_seed}, fault length {}, gap {}",
        size.0, args.consistency, args.faults, args.fault_length, args.gap
    );
    if !args.check.json {
        writeln!(out, "{note}")?;
        for one in &planned {
            writeln!(out, "  {one}")?;
        }
    }
    let progress = Arc::new(Progress::default());
    let (history, log) = run_under(&cluster, &settings, &progress, planned).await;
    let mut history = match history {
        Ok(history) => history,
        Err(error) => return undecided(&args.check, &error, out),
    };
    history.header.note = Some(note);
    history.header.faults = log.faults;
    let mut errors = log.errors;
    let audit = nemesis::audit(&history, &settings.targets, cluster.postgres()).await;
    let audit = audit
        .map_err(|error| errors.push(format!("the audit: {error}")))
        .ok();
    let circumstances = Circumstances {
        schedule_seed,
        consistency: args.consistency.to_string(),
        cache_hits: progress.hits(),
        audit,
        errors,
    };
    conclude(&args.check, &history, Some(circumstances), out)
}

/// The workload and the nemesis together. The last look at each item comes when the nemesis has gone.
async fn run_under(
    cluster: &Arc<Cluster>,
    settings: &Settings,
    progress: &Arc<Progress>,
    planned: Vec<Planned>,
) -> (Result<History, WorkloadError>, NemesisLog) {
    let mut log = None;
    let mut nemesis = Some(Nemesis::start(Arc::clone(cluster), planned, settings.clock));
    let calm = async {
        if let Some(nemesis) = nemesis.take() {
            let mut done = nemesis.finish().await;
            if let Err(error) = cluster.wait_until_healthy().await {
                done.errors.push(error.to_string());
            }
            log = Some(done);
        }
    };
    let history = drive(settings, progress, calm).await;
    if let Some(nemesis) = nemesis {
        nemesis.finish().await;
    }
    (history, log.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        _args: ClusterCheckArgs,
    }

    #[test]
    fn cluster_sizes_are_parsed() {
        assert_eq!("nodes=3".parse(), Ok(ClusterSize(3)));
        for wrong in ["", "nodes=", "nodes=0", "nodes=10", "replicas=3"] {
            assert!(wrong.parse::<ClusterSize>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_cluster_and_targets_exclude_each_other() {
        let parse = |arguments: &[&str]| Command::try_parse_from([&["check"], arguments].concat());
        for right in [
            &["--cluster", "nodes=3", "--faults", "kill-redis"][..],
            &["--target", "http://x"],
            &["--history", "h.jsonl"],
        ] {
            assert!(parse(right).is_ok(), "{right:?}");
        }
        for wrong in [
            &["--faults", "kill-redis", "--target", "http://x"][..],
            &["--cluster", "nodes=3", "--target", "http://x"],
            &["--cluster", "nodes=3", "--history", "h.jsonl"],
            &["--cluster", "nodes=3", "--consistency", "eventual"],
            &["--cluster", "nodes=3", "--faults", "kill-everything"],
            &[],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
