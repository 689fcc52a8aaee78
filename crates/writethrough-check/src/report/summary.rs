//! The summary of a run: what every form of report says.

use serde::Serialize;

use super::availability::{Availability, measure, quantile};
use super::faults::UnderFaults;
use crate::history::{Action, History, Outcome, Stall};
use crate::judge::{
    Confirmation, Findings, JudgeError, Kind, Role, STALENESS_BUCKETS_MS, Staleness,
};
use crate::time::{millis, seconds};

/// The three possible answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Every item behaved like a single copy.
    Linearizable,
    /// At least one thing happened that a single copy cannot do.
    Anomaly,
    /// The history says nothing: the service was not reached, or the history cannot be judged.
    Undecided,
}

impl Verdict {
    /// Returns the exit code: 0 linearizable, 1 anomaly, 2 could not judge.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Linearizable => 0,
            Self::Anomaly => 1,
            Self::Undecided => 2,
        }
    }
}

/// Counts and times of one kind of operation.
#[derive(Clone, Debug, Serialize)]
pub struct ActionSummary {
    /// The kind of operation.
    pub action: Action,
    /// How many were invoked.
    pub invoked: u64,
    /// Acknowledged.
    pub ok: u64,
    /// Answered with "no such item".
    pub absent: u64,
    /// Outcome unknown.
    pub unknown: u64,
    /// Certainly without effect.
    pub failed: u64,
    /// Median time of the answered ones.
    pub p50_ms: f64,
    /// 99th percentile of the answered ones.
    pub p99_ms: f64,
    /// Longest of the answered ones.
    pub max_ms: f64,
}

/// One bar of the staleness histogram.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Bucket {
    /// Reads less stale than this; none for the last bucket.
    pub below_ms: Option<u64>,
    /// How many reads.
    pub reads: u64,
}

impl Bucket {
    /// Returns the name of the bar.
    pub(crate) fn name(&self) -> String {
        match self.below_ms {
            Some(ms) if ms < 1_000 => format!("below {ms} ms"),
            Some(ms) => format!("below {} s", ms / 1_000),
            None => "more".to_owned(),
        }
    }
}

/// Number of anomalies of one kind.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct KindCount {
    /// The kind.
    pub kind: Kind,
    /// How many.
    pub count: u64,
}

/// An operation of an anomaly, for a program.
#[derive(Clone, Debug, Serialize)]
pub struct MemberSummary {
    /// The part it plays.
    pub role: Role,
    /// The anomaly is no longer one when this operation is left out.
    pub needed: bool,
    /// The kind of operation.
    pub op: Action,
    /// Number of the process.
    pub process: u32,
    /// The target it was sent to.
    pub target: u16,
    /// The value written or shown; none for absence.
    pub value: Option<String>,
    /// Version that the answer carried.
    pub version: Option<u64>,
    /// What the process learnt about the effect.
    pub outcome: Outcome,
    /// Invocation.
    pub start_ns: i64,
    /// Completion.
    pub end_ns: i64,
}

/// An anomaly, for a program.
#[derive(Clone, Debug, Serialize)]
pub struct AnomalySummary {
    /// The kind.
    pub kind: Kind,
    /// The item.
    pub key: String,
    /// What happened.
    pub explanation: String,
    /// How stale, if that is what it is.
    pub staleness: Option<Staleness>,
    /// How it was confirmed.
    pub confirmation: Confirmation,
    /// The operations that show it.
    pub operations: Vec<MemberSummary>,
}

/// The content of a report.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The answer.
    pub verdict: Verdict,
    /// Why it could not be judged.
    pub reason: Option<String>,
    /// The generator's seed.
    pub seed: Option<u64>,
    /// The services addressed.
    pub targets: Vec<String>,
    /// Operations judged.
    pub operations: u64,
    /// Items judged.
    pub items: u64,
    /// Values read, pages' items included.
    pub reads: u64,
    /// Operations whose outcome is unknown.
    pub unknown: u64,
    /// From the first invocation to the last completion.
    pub run_s: f64,
    /// How long judging took.
    pub judged_s: f64,
    /// The longest time for which the judge itself was held up while it recorded, if it watched
    /// that.
    pub held_up: Option<Stall>,
    /// Anomalies by kind.
    pub anomalies: Vec<KindCount>,
    /// Items with an anomaly.
    pub bad_items: u64,
    /// Acknowledged writes that were lost.
    pub lost_writes: u64,
    /// Reads of an overwritten state.
    pub stale_reads: u64,
    /// The longest time from an acknowledgement to a read that overlooked it.
    pub worst_staleness_ms: f64,
    /// Stale reads by staleness.
    pub staleness: Vec<Bucket>,
    /// Counts and times by kind of operation.
    pub actions: Vec<ActionSummary>,
    /// Availability over the whole run.
    pub availability: Availability,
    /// The worst anomalies of each kind.
    pub explained: Vec<AnomalySummary>,
    /// Schedule, faults, audit and promises, when there was a nemesis.
    #[serde(flatten)]
    pub under_faults: Option<UnderFaults>,
}

impl Summary {
    /// Sums up a history and what the judge found in it.
    #[must_use]
    pub fn new(history: &History, judged: &Result<Findings, JudgeError>) -> Self {
        let empty = Findings::default();
        let (verdict, reason, findings) = match judged {
            Ok(findings) if findings.linearizable() => (Verdict::Linearizable, None, findings),
            Ok(findings) => (Verdict::Anomaly, None, findings),
            Err(error) => (Verdict::Undecided, Some(error.to_string()), &empty),
        };
        let operations = history.operations();
        let first = operations
            .iter()
            .map(|operation| operation.start)
            .min()
            .unwrap_or(0);
        let last = operations
            .iter()
            .map(|operation| operation.end)
            .max()
            .unwrap_or(0);
        Self {
            verdict,
            reason,
            seed: history.header.seed,
            targets: history.header.targets.clone(),
            operations: operations.len() as u64,
            items: findings.items as u64,
            reads: findings.reads,
            unknown: findings.unknown,
            run_s: seconds(last.saturating_sub(first)),
            judged_s: findings.elapsed.as_secs_f64(),
            held_up: history.header.held_up,
            anomalies: findings
                .counts
                .iter()
                .map(|(&kind, &count)| KindCount { kind, count })
                .collect(),
            bad_items: findings.bad_items as u64,
            lost_writes: findings.counts.get(&Kind::LostWrite).copied().unwrap_or(0),
            stale_reads: findings.stale_reads,
            worst_staleness_ms: millis(findings.worst_staleness_ns),
            staleness: STALENESS_BUCKETS_MS
                .iter()
                .map(|&bound| Some(bound))
                .chain([None])
                .zip(findings.staleness)
                .map(|(below_ms, reads)| Bucket { below_ms, reads })
                .collect(),
            actions: Action::ALL
                .into_iter()
                .filter_map(|action| action_summary(history, action))
                .collect(),
            availability: measure(history, i64::MIN..i64::MAX),
            explained: findings
                .anomalies
                .iter()
                .map(|anomaly| AnomalySummary {
                    kind: anomaly.kind,
                    key: history.key_name(anomaly.key).to_owned(),
                    explanation: anomaly.explanation.clone(),
                    staleness: anomaly.staleness,
                    confirmation: anomaly.confirmation,
                    operations: anomaly
                        .members
                        .iter()
                        .map(|member| {
                            let operation = &operations[member.operation];
                            MemberSummary {
                                role: member.role,
                                needed: member.needed,
                                op: operation.action,
                                process: operation.process,
                                target: operation.target,
                                value: member
                                    .value
                                    .map(|value| history.value_name(value).to_owned()),
                                version: operation.version,
                                outcome: operation.outcome,
                                start_ns: operation.start,
                                end_ns: operation.end,
                            }
                        })
                        .collect(),
                })
                .collect(),
            under_faults: None,
        }
    }

    /// Adds what happened under faults.
    ///
    /// A difference that the audit found is an anomaly; a run
    /// whose faults could not be caused, or that could not be audited, shows nothing by being free
    /// of them.
    #[must_use]
    pub fn with_faults(mut self, under_faults: UnderFaults) -> Self {
        let audit = under_faults.audit.as_ref();
        if audit.is_some_and(|audit| !audit.agrees()) {
            self.verdict = Verdict::Anomaly;
        } else if self.verdict == Verdict::Linearizable
            && let Some(error) = under_faults.errors.first()
        {
            self.verdict = Verdict::Undecided;
            self.reason = Some(error.clone());
        }
        self.under_faults = Some(under_faults);
        self
    }

    /// Returns the exit code of a run: that of its verdict, and 1 for a broken promise.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        let broken = self
            .under_faults
            .as_ref()
            .is_some_and(|faults| faults.promised && !faults.promises_broken.is_empty());
        match self.verdict {
            Verdict::Linearizable if broken => Verdict::Anomaly.exit_code(),
            verdict => verdict.exit_code(),
        }
    }
}

fn action_summary(history: &History, action: Action) -> Option<ActionSummary> {
    let mut summary = ActionSummary {
        action,
        invoked: 0,
        ok: 0,
        absent: 0,
        unknown: 0,
        failed: 0,
        p50_ms: 0.0,
        p99_ms: 0.0,
        max_ms: 0.0,
    };
    let mut times = Vec::new();
    for operation in history
        .operations()
        .iter()
        .filter(|operation| operation.action == action)
    {
        summary.invoked += 1;
        match operation.outcome {
            Outcome::Ok => summary.ok += 1,
            Outcome::Absent => summary.absent += 1,
            Outcome::Unknown => summary.unknown += 1,
            Outcome::Failed => summary.failed += 1,
        }
        if matches!(operation.outcome, Outcome::Ok | Outcome::Absent) {
            times.push(operation.time_taken());
        }
    }
    times.sort_unstable();
    (summary.p50_ms, summary.p99_ms, summary.max_ms) = (
        millis(quantile(&times, 50)),
        millis(quantile(&times, 99)),
        millis(quantile(&times, 100)),
    );
    (summary.invoked > 0).then_some(summary)
}
