//! What the service owed under faults, and whether it gave it.
//!
//! A target owes nothing while it is down, or out of reach of its database, and for a moment
//! afterwards. Everything else it owes, whatever happens to the cache: reads answered, writes
//! answered, and no write longer than [`LONGEST_WRITE`].

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::availability::{Availability, by_start, measure_some};
use crate::audit::Audit;
use crate::history::{Action, FaultWindow, History, Operation, Outcome};
use crate::time::duration;

/// The longest that a write may wait, so many nanoseconds.
pub const LONGEST_WRITE: Duration = Duration::from_secs(3);
/// How long after a fault its effect is still looked for.
const SETTLE_NS: i64 = 3_000_000_000;
/// How long a target that is back, or whose database is back, may take to find out.
const RETURN_NS: i64 = 1_000_000_000;
/// Operations that are listed for each broken promise, at most.
const TOLD: usize = 10;

/// How well the service did while a fault was in force, and a little longer.
#[derive(Clone, Debug, Serialize)]
pub struct FaultSummary {
    /// The kind of fault.
    pub fault: String,
    /// The target that it concerned, if it was one.
    pub target: Option<u16>,
    /// When it began, in seconds of the history's clock.
    pub from_s: f64,
    /// When it had been undone.
    pub to_s: f64,
    /// All operations, from the beginning to 3 s after the end.
    pub availability: Availability,
    /// Of these, the operations that were owed an answer.
    pub owed: Availability,
}

/// All faults of one kind together.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FaultKindSummary {
    /// The kind of fault.
    pub fault: String,
    /// How often it happened.
    pub count: u64,
    /// Reads and lists invoked.
    pub reads: u64,
    /// Reads and lists answered.
    pub reads_answered: u64,
    /// Writes invoked.
    pub writes: u64,
    /// Writes answered.
    pub writes_answered: u64,
    /// Reads that failed although they were owed an answer.
    pub failed_reads: u64,
    /// Writes that failed, or ended without an answer, although they were owed one.
    pub failed_writes: u64,
    /// The longest that a read waited that was owed an answer.
    pub longest_read_ms: f64,
    /// The longest that a write waited that was owed an answer.
    pub longest_write_ms: f64,
}

/// The accounting of the whole run.
#[derive(Clone, Debug, Serialize)]
pub struct Promises {
    /// Acknowledged writes that were lost, according to the audit.
    pub lost_writes: u64,
    /// The operations that were owed an answer.
    pub owed: Availability,
    /// Reads that failed although their node was up and could reach Postgres.
    pub failed_reads: u64,
    /// Writes that failed, or ended without an answer, although their node was up and its
    /// connections to Postgres held.
    pub failed_writes: u64,
    /// The longest that such a write waited.
    pub longest_write_ms: f64,
}

/// The part of a summary that a run with faults adds.
#[derive(Clone, Debug, Serialize)]
pub struct UnderFaults {
    /// Where the schedule's random choices started.
    pub schedule_seed: u64,
    /// How the nodes kept the cache.
    pub consistency: String,
    /// Number of nodes.
    pub nodes: usize,
    /// Reads of one item that the service answered from its cache.
    pub cache_hits: u64,
    /// Every fault, by its beginning.
    pub faults: Vec<FaultSummary>,
    /// The same by kind.
    pub fault_kinds: Vec<FaultKindSummary>,
    /// The result of the audit; none when it could not be done.
    pub audit: Option<Audit>,
    /// The accounting.
    pub promises: Promises,
    /// The service makes these promises in this mode; in the other modes they are only measured.
    pub promised: bool,
    /// Each broken promise, in words.
    pub promises_broken: Vec<String>,
    /// Faults that could not be caused or undone.
    pub errors: Vec<String>,
}

/// The facts about a run that its history does not say.
#[derive(Clone, Debug, Default)]
pub struct Circumstances {
    /// Where the schedule's random choices started.
    pub schedule_seed: u64,
    /// `strict`, `textbook` or `off`.
    pub consistency: String,
    /// Reads that were answered from the cache.
    pub cache_hits: u64,
    /// The result of the audit.
    pub audit: Option<Audit>,
    /// Faults that could not be caused or undone, or why there is no audit.
    pub errors: Vec<String>,
}

/// The times at which targets owed no answer, because of a fault.
struct Debts<'a> {
    faults: &'a [FaultWindow],
}

impl Debts<'_> {
    fn owed(&self, operation: &Operation) -> bool {
        !self.faults.iter().any(|fault| {
            let meets = operation.start <= fault.to.saturating_add(RETURN_NS)
                && operation.end >= fault.from;
            meets
                && (fault.down.contains(&operation.target)
                    || (fault.resets_writes && operation.action.is_write()))
        })
    }
}

/// Accounts for a history with faults.
#[must_use]
pub fn under_faults(history: &History, circumstances: Circumstances) -> UnderFaults {
    let faults = &history.header.faults;
    let debts = Debts { faults };
    let operations = by_start(history);
    let summaries: Vec<FaultSummary> = faults
        .iter()
        .map(|fault| {
            let during = fault.from..fault.to.saturating_add(SETTLE_NS);
            FaultSummary {
                fault: fault.fault.clone(),
                target: fault.target,
                from_s: fault.from as f64 / 1e9,
                to_s: fault.to as f64 / 1e9,
                availability: measure_some(&operations, during.clone(), |_| true),
                owed: measure_some(&operations, during, |one| debts.owed(one)),
            }
        })
        .collect();
    let owed = measure_some(&operations, i64::MIN..i64::MAX, |one| debts.owed(one));
    let promises = Promises {
        lost_writes: circumstances
            .audit
            .as_ref()
            .map_or(0, |audit| audit.lost_writes),
        failed_reads: owed.reads.invoked - owed.reads.answered,
        failed_writes: owed.writes.invoked - owed.writes.answered,
        longest_write_ms: owed.writes.longest_stall_ms,
        owed,
    };
    UnderFaults {
        schedule_seed: circumstances.schedule_seed,
        promised: circumstances.consistency == "strict",
        consistency: circumstances.consistency,
        nodes: history.header.targets.len(),
        cache_hits: circumstances.cache_hits,
        fault_kinds: by_kind(&summaries),
        faults: summaries,
        promises_broken: broken(&operations, &debts, &promises),
        promises,
        audit: circumstances.audit,
        errors: circumstances.errors,
    }
}

fn by_kind(faults: &[FaultSummary]) -> Vec<FaultKindSummary> {
    let mut kinds: BTreeMap<&str, FaultKindSummary> = BTreeMap::new();
    for one in faults {
        let kind = kinds.entry(&one.fault).or_default();
        kind.fault.clone_from(&one.fault);
        kind.count += 1;
        let (reads, writes) = (&one.availability.reads, &one.availability.writes);
        kind.reads += reads.invoked;
        kind.reads_answered += reads.answered;
        kind.writes += writes.invoked;
        kind.writes_answered += writes.answered;
        let (reads, writes) = (&one.owed.reads, &one.owed.writes);
        kind.failed_reads += reads.invoked - reads.answered;
        kind.failed_writes += writes.invoked - writes.answered;
        kind.longest_read_ms = kind.longest_read_ms.max(reads.longest_stall_ms);
        kind.longest_write_ms = kind.longest_write_ms.max(writes.longest_stall_ms);
    }
    kinds.into_values().collect()
}

/// Lists the promises that were not kept, the anomalies aside.
fn broken(operations: &[&Operation], debts: &Debts<'_>, promises: &Promises) -> Vec<String> {
    let mut told = Vec::new();
    let mut tell = |total: u64, title: String, wanted: &dyn Fn(&Operation) -> bool| {
        if total == 0 {
            return;
        }
        told.push(title);
        let examples = operations
            .iter()
            .filter(|one| wanted(one) && debts.owed(one));
        for one in examples.take(TOLD) {
            told.push(format!("  {}", describe(one, debts.faults)));
        }
    };
    let failed = |one: &Operation| !matches!(one.outcome, Outcome::Ok | Outcome::Absent);
    tell(
        promises.failed_reads,
        format!(
            "{} reads failed although their node was up and could reach Postgres",
            promises.failed_reads
        ),
        &|one| failed(one) && !one.action.is_write(),
    );
    tell(
        promises.failed_writes,
        format!(
            "{} writes failed although their node was up and could reach Postgres",
            promises.failed_writes
        ),
        &|one| failed(one) && one.action.is_write(),
    );
    let bound = LONGEST_WRITE.as_secs_f64() * 1e3;
    let too_long = promises.longest_write_ms >= bound;
    tell(
        u64::from(too_long),
        format!(
            "a write waited {:.0} ms; the bound is {bound:.0} ms",
            promises.longest_write_ms
        ),
        &|one| one.action.is_write() && one.time_taken() as f64 >= bound * 1e6,
    );
    if promises.lost_writes > 0 {
        let lost = promises.lost_writes;
        told.push(format!("{lost} acknowledged writes were lost"));
    }
    told
}

/// Describes one operation and the faults around it.
fn describe(operation: &Operation, faults: &[FaultWindow]) -> String {
    let around: Vec<String> = faults
        .iter()
        .filter(|fault| {
            operation.start <= fault.to.saturating_add(SETTLE_NS) && operation.end >= fault.from
        })
        .map(|fault| {
            let after = operation.start.saturating_sub(fault.from);
            let target = fault.target.map_or(String::new(), |at| format!(" {at}"));
            let name = &fault.fault;
            if after >= 0 {
                format!("{name}{target} (begun {} before)", duration(after))
            } else {
                format!(
                    "{name}{target} (begun {} after it)",
                    duration(after.saturating_neg())
                )
            }
        })
        .collect();
    let around = match around.as_slice() {
        [] => "no fault".to_owned(),
        some => some.join(", "),
    };
    let action = match operation.action {
        Action::List => "list",
        action => action.name(),
    };
    format!(
        "at {:.3} s: {action} by process {} at target {}, status {}, {}; under {around}",
        operation.start as f64 / 1e9,
        operation.process,
        operation.target,
        operation.status,
        duration(operation.time_taken())
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Header, Record, record};

    const S: i64 = 1_000_000_000;

    fn fault(fault: &str, from: i64, to: i64, down: &[u16], resets_writes: bool) -> FaultWindow {
        FaultWindow {
            fault: fault.to_owned(),
            target: None,
            from,
            to,
            down: down.to_vec(),
            resets_writes,
        }
    }

    fn history(operations: &[(Action, u16, i64, i64, Outcome)]) -> History {
        let mut history = History::new(Header {
            targets: vec!["a".to_owned(), "b".to_owned()],
            faults: vec![
                fault("kill-node", 10 * S, 12 * S, &[1], false),
                fault("kill-redis", 20 * S, 22 * S, &[], false),
                fault("kill-postgres-connections", 30 * S, 31 * S, &[], true),
            ],
            ..Header::default()
        });
        for (process, &(action, target, start, end, outcome)) in (0..).zip(operations) {
            let record = Record {
                target,
                ..record(process, action, Some(process), start, end, outcome)
            };
            history.push(&record).unwrap();
        }
        history
    }

    fn account(operations: &[(Action, u16, i64, i64, Outcome)]) -> UnderFaults {
        under_faults(&history(operations), Circumstances::default())
    }

    #[test]
    fn a_node_that_is_down_owes_nothing_and_the_others_owe_everything() {
        use Action::{Read, Update};
        use Outcome::{Failed, Ok, Unknown};
        let excused = account(&[
            (Read, 1, 10 * S, 11 * S, Failed),
            (Update, 1, 9 * S, 19 * S, Unknown),
            (Read, 1, 12 * S + 1, 13 * S, Failed),
            (Update, 0, 30 * S, 31 * S, Unknown),
            (Read, 0, 1, 2, Ok),
        ]);
        assert!(excused.promises_broken.is_empty(), "{excused:#?}");
        assert_eq!(excused.promises.longest_write_ms, 0.0);
        let kind = |name: &str| {
            let kinds = &excused.fault_kinds;
            kinds.iter().find(|kind| kind.fault == name).cloned()
        };
        let killed = kind("kill-node").unwrap();
        assert_eq!((killed.reads, killed.reads_answered), (2, 0));
        assert_eq!(killed.failed_reads, 0);

        for wrong in [
            (Read, 0, 10 * S, 11 * S, Failed),
            (Read, 1, 13 * S + 1, 14 * S, Failed),
            (Read, 1, 20 * S, 21 * S, Failed),
            (Read, 1, 30 * S, 31 * S, Failed),
            (Update, 1, 20 * S, 21 * S, Unknown),
            (Update, 1, 20 * S, 23 * S, Ok),
        ] {
            let found = account(&[wrong]);
            assert!(found.promises_broken.len() >= 2, "{wrong:?}");
        }
    }
}
