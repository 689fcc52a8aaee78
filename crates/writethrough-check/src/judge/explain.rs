//! Looks closely at an item that failed the fast test: which reads were stale, by how much, and
//! which few operations show it. Every explanation is confirmed by the general test before it is
//! handed out.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use super::registers::{Fault, NONE, Observation, Registers, Seen};
use super::search::{self, Answer, Call, Event};
use super::zones::{Cluster, Conflict, Rank, Register};
use super::{Anomaly, Confirmation, Findings, JudgeError, Kind, Member, Role, Staleness};
use crate::history::{Action, Key, Outcome, Value};
use crate::time::duration;

/// A window has a handful of operations; no search in one takes a noticeable time.
const SEARCH_LIMIT: Duration = Duration::from_secs(5);

/// An item that failed, with everything that was seen of it.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) register: Register,
    pub(crate) conflicts: Vec<Conflict>,
    pub(crate) reused: Vec<Conflict>,
    pub(crate) skipped: Option<Vec<u64>>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) observations: Vec<Observation>,
}

/// An operation in an explanation that is not confirmed yet.
#[derive(Clone, Copy, Debug)]
struct Part {
    op: u32,
    seen: Option<Seen>,
    role: Role,
}

/// An anomaly that is not confirmed yet.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    kind: Kind,
    key: Key,
    explanation: String,
    parts: Vec<Part>,
    staleness: Option<Staleness>,
    by_definition: bool,
    /// The value that the item had before the history began, and its version.
    initial: Option<(Value, Option<u64>)>,
    /// The operation that first showed the item to exist, and what it showed.
    evidence: Option<(u32, Seen)>,
}

/// For each threshold, the earliest of the times whose key is greater.
struct Earliest<T> {
    keys: Vec<T>,
    best: Vec<(i64, u32, usize)>,
}

impl<T: Ord + Copy> Earliest<T> {
    fn new(mut points: Vec<(T, (i64, u32, usize))>) -> Self {
        points.sort_unstable();
        let keys = points.iter().map(|point| point.0).collect();
        let mut best: Vec<_> = points.into_iter().map(|point| point.1).collect();
        for at in (1..best.len()).rev() {
            best[at - 1] = best[at - 1].min(best[at]);
        }
        Self { keys, best }
    }

    fn above(&self, threshold: T) -> Option<(i64, u32, usize)> {
        self.best
            .get(self.keys.partition_point(|&key| key <= threshold))
            .copied()
    }
}

/// When clusters that certainly come after a given one took effect.
struct Successors {
    by_start: Earliest<i64>,
    by_version: Earliest<u64>,
    by_rank: Earliest<Rank>,
}

impl Successors {
    /// `time` says when, and by which operation, a cluster is known to have taken effect.
    fn new(
        registers: &Registers<'_>,
        clusters: &[Cluster],
        time: impl Fn(&Cluster) -> Option<(i64, u32)>,
    ) -> Self {
        let (mut by_start, mut by_version, mut by_rank) = (Vec::new(), Vec::new(), Vec::new());
        for (at, cluster) in clusters.iter().enumerate() {
            let Some((end, op)) = time(cluster) else {
                continue;
            };
            let point = (end, op, at);
            if let Some(writer) = cluster.writer {
                by_start.push((registers.operation(writer).start, point));
            }
            if let Some(version) = cluster.version {
                by_version.push((version, point));
            }
            by_rank.push((cluster.rank, point));
        }
        Self {
            by_start: Earliest::new(by_start),
            by_version: Earliest::new(by_version),
            by_rank: Earliest::new(by_rank),
        }
    }

    fn of(&self, cluster: &Cluster) -> Option<(i64, u32, usize)> {
        [
            self.by_start.above(cluster.first_end),
            cluster
                .version
                .and_then(|version| self.by_version.above(version)),
            self.by_rank.above(cluster.rank),
        ]
        .into_iter()
        .flatten()
        .min()
    }
}

/// Reads of one cluster that came too late.
#[derive(Clone, Copy, Debug)]
struct Late {
    reads: u64,
    first: (i64, u32),
    last: (i64, u32),
}

impl Late {
    fn add(late: &mut Option<Self>, at: i64, op: u32) {
        let read = (at, op);
        match late {
            None => {
                *late = Some(Self {
                    reads: 1,
                    first: read,
                    last: read,
                })
            }
            Some(late) => {
                late.reads += 1;
                late.first = late.first.min(read);
                late.last = late.last.max(read);
            }
        }
    }
}

/// The worst drafts, some of each kind.
pub(crate) fn worst(mut drafts: Vec<Draft>, count: usize) -> Vec<Draft> {
    drafts.sort_by_key(|draft| Reverse(draft.staleness.map_or(0, |stale| stale.worst_ns)));
    let mut of_kind: BTreeMap<Kind, usize> = BTreeMap::new();
    let mut ranked: Vec<(usize, Draft)> = drafts
        .into_iter()
        .map(|draft| {
            let rank = of_kind.entry(draft.kind).or_default();
            *rank += 1;
            (*rank, draft)
        })
        .collect();
    ranked.sort_by_key(|(rank, draft)| (*rank, draft.kind));
    ranked.truncate(count);
    ranked.sort_by_key(|(rank, draft)| (draft.kind, *rank));
    ranked.into_iter().map(|(_, draft)| draft).collect()
}

/// Finds the anomalies of one item, counts them and its stale reads, and drafts their explanations.
pub(crate) fn explain(
    registers: &Registers<'_>,
    case: Case,
    findings: &mut Findings,
    found: &mut Vec<Draft>,
) {
    let mut writer = Writer {
        registers,
        case: &case,
        findings,
        found,
        reported: HashSet::new(),
    };
    writer.late_reads();
    writer.faults();
    writer.versions();
    writer.other_conflicts();
}

struct Writer<'a, 'h> {
    registers: &'a Registers<'h>,
    case: &'a Case,
    findings: &'a mut Findings,
    found: &'a mut Vec<Draft>,
    /// Clusters that an explanation already accuses.
    reported: HashSet<usize>,
}

impl Writer<'_, '_> {
    fn draft(
        &mut self,
        kind: Kind,
        explanation: String,
        parts: Vec<Part>,
        staleness: Option<Staleness>,
    ) {
        let by_definition = matches!(
            kind,
            Kind::ChangedVersion | Kind::SkippedVersion | Kind::DuplicateKey
        );
        *self.findings.counts.entry(kind).or_default() += 1;
        let initial = self
            .case
            .register
            .clusters
            .iter()
            .find(|cluster| cluster.writer.is_none())
            .and_then(|cluster| Some((cluster.value?, cluster.version)));
        let evidence = self.case.register.first_evidence;
        let evidence = self.seen_by(evidence).map(|seen| (evidence, seen));
        self.found.push(Draft {
            evidence,
            kind,
            key: self.case.register.key,
            explanation,
            parts,
            staleness,
            by_definition,
            initial,
        });
    }

    fn value(&self, value: Option<Value>) -> String {
        value.map_or_else(
            || "the deletion".to_owned(),
            |value| format!("{:?}", self.registers.history.value_name(value)),
        )
    }

    fn process(&self, op: u32) -> u32 {
        self.registers.operation(op).process
    }

    /// "process 3 read", with the right verb.
    fn reader(&self, op: u32) -> String {
        let operation = self.registers.operation(op);
        let verb = match operation.action {
            Action::List => "listed",
            Action::Read => "read",
            Action::Create => "created",
            Action::Update => "updated",
            Action::Delete => "deleted",
        };
        format!("process {} {verb}", operation.process)
    }

    /// Reads of a state after a newer one was acknowledged (stale) or had been seen (not
    /// monotonic).
    fn late_reads(&mut self) {
        let registers = self.registers;
        let case = self.case;
        let clusters = &case.register.clusters;
        let acknowledged = Successors::new(registers, clusters, |cluster| {
            let op = cluster.writer?;
            let write = registers.operation(op);
            (registers.outcome(write) == Outcome::Ok).then_some((write.end, op))
        });
        let seen = Successors::new(registers, clusters, |cluster| {
            (cluster.first_end_op != NONE).then_some((cluster.first_end, cluster.first_end_op))
        });
        let of_value: HashMap<Value, usize> = (0..clusters.len())
            .filter_map(|at| clusters[at].value.map(|value| (value, at)))
            .collect();
        // [stale, not monotonic] x [read, list]
        let mut late: BTreeMap<usize, [[Option<Late>; 2]; 2]> = BTreeMap::new();
        let mut last_read: Option<(i64, Seen)> = None;
        let limits: Vec<_> = clusters
            .iter()
            .map(|cluster| (acknowledged.of(cluster), seen.of(cluster)))
            .collect();
        for &Observation { op, seen, .. } in &case.observations {
            let read = registers.operation(op);
            if last_read.is_none_or(|(at, _)| at < read.start) {
                last_read = Some((read.start, seen));
            }
            let Seen::Value(value) = seen else { continue };
            let Some(&at) = of_value.get(&value) else {
                continue;
            };
            let (acknowledged, seen) = limits[at];
            let way = usize::from(read.action == Action::List);
            if let Some((end, ..)) = acknowledged.filter(|limit| limit.0 < read.start) {
                self.findings.stale(read.start - end);
                Late::add(&mut late.entry(at).or_default()[0][way], read.start, op);
            } else if seen.is_some_and(|limit| limit.0 < read.start) {
                Late::add(&mut late.entry(at).or_default()[1][way], read.start, op);
            }
        }
        for (at, [stale, older]) in late {
            let old = &clusters[at];
            self.reported.insert(at);
            let is_stale = stale.iter().any(Option::is_some);
            for (way, late) in stale.into_iter().enumerate() {
                let (Some(late), Some((end, by, newer))) = (late, limits[at].0) else {
                    continue;
                };
                let new = &clusters[newer];
                let staleness = Staleness {
                    reads: late.reads,
                    first_ns: late.first.0 - end,
                    worst_ns: late.last.0 - end,
                };
                let shown_last = old.value.map(Seen::Value);
                let kind = if new.rank == Rank::Deletion {
                    [Kind::ResurrectedItem, Kind::ListShowsDeletedItem][way]
                } else if new.reads == 0
                    && last_read.map(|(_, seen)| seen) == shown_last
                    && self.is_last(new)
                {
                    Kind::LostWrite
                } else {
                    Kind::StaleRead
                };
                let what = if new.rank == Rank::Deletion {
                    format!("its deletion by process {}", self.process(by))
                } else {
                    format!(
                        "the write of {} by process {}",
                        self.value(new.value),
                        self.process(by)
                    )
                };
                let mut explanation = format!(
                    "{} {} although {what} had been acknowledged {} before.",
                    self.reader(late.first.1),
                    self.value(old.value),
                    duration(staleness.first_ns),
                );
                if late.reads > 1 {
                    explanation.push_str(&format!(
                        " {} reads returned the old state, the last {} after the acknowledgement.",
                        late.reads,
                        duration(staleness.worst_ns)
                    ));
                }
                if kind == Kind::LostWrite {
                    explanation.push_str(" No read ever returned the new value.");
                }
                let parts = self.parts(old, new, by, late.first.1);
                self.draft(kind, explanation, parts, Some(staleness));
            }
            if is_stale {
                continue;
            }
            for (way, late) in older.into_iter().enumerate() {
                let (Some(late), Some((end, by, newer))) = (late, limits[at].1) else {
                    continue;
                };
                let new = &clusters[newer];
                let by_page = self.registers.operation(by).action == Action::List;
                let kind = if new.rank == Rank::Deletion && by_page && way == 0 {
                    // More likely the page was wrong than the item itself.
                    Kind::ListMissesItem
                } else if new.rank == Rank::Deletion {
                    [Kind::ResurrectedItem, Kind::ListShowsDeletedItem][way]
                } else {
                    Kind::NonMonotonicRead
                };
                let explanation = format!(
                    "{} {} although {}, {} before, had already seen {}.",
                    self.reader(late.first.1),
                    self.value(old.value),
                    self.reader(by),
                    duration(late.first.0 - end),
                    new.value
                        .map_or_else(|| "it absent".to_owned(), |_| self.value(new.value)),
                );
                let parts = self.parts(old, new, by, late.first.1);
                self.draft(kind, explanation, parts, None);
            }
        }
    }

    /// Whether nothing replaced the cluster's value later.
    fn is_last(&self, cluster: &Cluster) -> bool {
        let end = |op: u32| self.registers.operation(op).end;
        let start = |op: u32| self.registers.operation(op).start;
        self.case.register.clusters.iter().all(|other| {
            other.rank != Rank::Deletion
                && other
                    .writer
                    .zip(cluster.writer)
                    .is_none_or(|(op, of)| start(op) <= end(of))
        })
    }

    /// The operations around "`offender` showed `old` although `by` had proved `new`".
    fn parts(&self, old: &Cluster, new: &Cluster, by: u32, offender: u32) -> Vec<Part> {
        let older = old.value.map(Seen::Value);
        let newer = Some(new.value.map_or(Seen::Absent, Seen::Value));
        let mut parts = vec![Part {
            op: offender,
            seen: older,
            role: Role::Offender,
        }];
        let mut add = |op: Option<u32>, seen, role| {
            if let Some(op) = op.filter(|&op| op != NONE) {
                parts.push(Part { op, seen, role });
            }
        };
        add(Some(by), newer, Role::Newer);
        add(old.writer, older, Role::Older);
        add(new.writer, newer, Role::Newer);
        add(Some(old.first_end_op), older, Role::Older);
        parts
    }

    fn faults(&mut self) {
        let registers = self.registers;
        let mut groups: BTreeMap<(Kind, Option<Value>), Vec<Fault>> = BTreeMap::new();
        for &fault in &self.case.faults {
            let value = match fault.seen {
                Seen::Value(value) => Some(value),
                Seen::Absent => None,
            };
            groups.entry((fault.kind, value)).or_default().push(fault);
        }
        for ((kind, value), mut group) in groups {
            group.sort_by_key(|fault| registers.operation(fault.op).start);
            let Some(&Fault {
                op, other, seen, ..
            }) = group.first()
            else {
                continue;
            };
            let read = registers.operation(op);
            let mut parts = vec![Part {
                op,
                seen: Some(seen),
                role: Role::Offender,
            }];
            let mut add = |op: u32, role| {
                if op != NONE {
                    parts.push(Part {
                        op,
                        seen: Some(seen),
                        role,
                    });
                }
            };
            let mut staleness = None;
            let mut text = match kind {
                Kind::UnwrittenValue => {
                    let place = match registers.writer_of_other(value, self.case.register.key) {
                        Some(key) => format!(
                            "; that value was written to item {}",
                            registers.history.key_name(key)
                        ),
                        None => String::new(),
                    };
                    format!(
                        "{} {}, which nobody wrote to this item{place}.",
                        self.reader(op),
                        self.value(value)
                    )
                }
                Kind::FailedWriteSeen => {
                    add(other, Role::Newer);
                    format!(
                        "{} {}, the value of a write by process {} that the service had refused (status {}).",
                        self.reader(op),
                        self.value(value),
                        self.process(other),
                        registers.operation(other).status,
                    )
                }
                Kind::ValueFromFuture => {
                    add(other, Role::Newer);
                    format!(
                        "{} {}, {} before process {} invoked the write of it.",
                        self.reader(op),
                        self.value(value),
                        duration(registers.operation(other).start - read.end),
                        self.process(other),
                    )
                }
                Kind::DoubleDelete => {
                    add(other, Role::Older);
                    format!(
                        "Both process {} and process {} were told that they deleted the item.",
                        self.process(other),
                        self.process(op)
                    )
                }
                Kind::DuplicateKey => {
                    add(other, Role::Older);
                    format!(
                        "Two creates, by process {} and process {}, were given the same id.",
                        self.process(other),
                        self.process(op)
                    )
                }
                Kind::ChangedVersion => {
                    add(other, Role::Older);
                    format!(
                        "{} {} under another version than {} did: a value is written once and has one version.",
                        self.reader(op),
                        self.value(value),
                        self.reader(other),
                    )
                }
                _ => {
                    let evidence = self.case.register.first_evidence;
                    let since = if evidence == NONE {
                        read.start
                    } else {
                        registers.operation(evidence).end
                    };
                    for fault in &group {
                        self.findings
                            .stale(registers.operation(fault.op).start - since);
                    }
                    let last = group.last().map_or(op, |fault| fault.op);
                    staleness = Some(Staleness {
                        reads: group.len() as u64,
                        first_ns: read.start - since,
                        worst_ns: registers.operation(last).start - since,
                    });
                    let how = if kind == Kind::ListMissesItem {
                        format!(
                            "A page of the list, read by process {}, left out the item",
                            read.process
                        )
                    } else {
                        format!("Process {} did not find the item (404)", read.process)
                    };
                    let whose = if other == NONE {
                        "and nobody had tried to delete it"
                    } else {
                        "and its deletion had not been asked for yet"
                    };
                    format!(
                        "{how} although it was known to exist {} before, {whose}.",
                        duration(read.start - since)
                    )
                }
            };
            if group.len() > 1 {
                text.push_str(&format!(" {} operations show this.", group.len()));
            }
            self.draft(kind, text, parts, staleness);
        }
    }

    /// What an operation showed of the item of this case, or wrote to it.
    fn seen_by(&self, op: u32) -> Option<Seen> {
        if op == NONE {
            return None;
        }
        let operation = self.registers.operation(op);
        if operation.action.is_write() {
            return Some(operation.value.map_or(Seen::Absent, Seen::Value));
        }
        self.case
            .observations
            .iter()
            .find(|observation| observation.op == op)
            .map(|observation| observation.seen)
    }

    fn versions(&mut self) {
        let case = self.case;
        let clusters = &case.register.clusters;
        for &Conflict { one, other } in &case.reused {
            let (old, new) = (&clusters[one], &clusters[other]);
            let text = format!(
                "{} and {} both became version {}: one of the two updates did not see the other.",
                self.value(old.value),
                self.value(new.value),
                old.version.unwrap_or_default()
            );
            let mut parts = self.parts(old, new, new.first_end_op, old.first_end_op);
            parts.dedup_by_key(|part| part.op);
            self.reported.extend([one, other]);
            self.draft(Kind::ReusedVersion, text, parts, None);
        }
        if let Some(missing) = &case.skipped {
            let list: Vec<String> = missing.iter().map(u64::to_string).collect();
            let text = format!(
                "No operation can have been given version {}: writes of unknown outcome are too few to explain it.",
                list.join(", ")
            );
            let after = clusters
                .iter()
                .filter(|cluster| cluster.version > missing.first().copied())
                .min_by_key(|cluster| cluster.version);
            let before = clusters
                .iter()
                .filter(|cluster| {
                    cluster.version.is_some() && cluster.version < missing.first().copied()
                })
                .max_by_key(|cluster| cluster.version);
            let mut parts = Vec::new();
            for (cluster, role) in [(before, Role::Older), (after, Role::Newer)] {
                if let Some(cluster) = cluster
                    && let Some(op) = cluster.writer.or(Some(cluster.first_end_op))
                    && op != NONE
                {
                    parts.push(Part {
                        op,
                        seen: cluster.value.map(Seen::Value),
                        role,
                    });
                }
            }
            self.draft(Kind::SkippedVersion, text, parts, None);
        }
    }

    /// Conflicts in which no single read is to blame: values that alternate, writes acknowledged in
    /// the wrong order.
    fn other_conflicts(&mut self) {
        let case = self.case;
        let clusters = &case.register.clusters;
        for &Conflict { one, other } in &case.conflicts {
            if self.reported.contains(&one) || self.reported.contains(&other) {
                continue;
            }
            self.reported.extend([one, other]);
            let rank = |at: usize| {
                let cluster = &clusters[at];
                (cluster.rank, cluster.version, cluster.first_end)
            };
            let (old, new) = if rank(one) <= rank(other) {
                (one, other)
            } else {
                (other, one)
            };
            let (old, new) = (&clusters[old], &clusters[new]);
            let mut parts = self.parts(old, new, new.first_end_op, old.last_start_op);
            let last = Part {
                op: new.last_start_op,
                seen: Some(new.value.map_or(Seen::Absent, Seen::Value)),
                role: Role::Newer,
            };
            if last.op != NONE {
                parts.push(last);
            }
            let is_read = !self
                .registers
                .operation(old.last_start_op)
                .action
                .is_write();
            let by_page = new.first_end_op != NONE
                && self.registers.operation(new.first_end_op).action == Action::List;
            let (kind, text) = if new.rank == Rank::Deletion && by_page {
                (
                    Kind::ListMissesItem,
                    format!(
                        "{} {} after a page of the list, read by process {}, had left the item out.",
                        self.reader(old.last_start_op),
                        self.value(old.value),
                        self.process(new.first_end_op)
                    ),
                )
            } else if new.rank == Rank::Deletion {
                (
                    Kind::ResurrectedItem,
                    format!(
                        "{} {} after the item's deletion had been acknowledged or seen.",
                        self.reader(old.last_start_op),
                        self.value(old.value)
                    ),
                )
            } else if !is_read && old.version.is_some() && new.version.is_some() {
                (
                    Kind::BackwardVersion,
                    format!(
                        "{} became version {} after {} had become version {}.",
                        self.value(old.value),
                        old.version.unwrap_or_default(),
                        self.value(new.value),
                        new.version.unwrap_or_default()
                    ),
                )
            } else if is_read {
                (
                    Kind::NonMonotonicRead,
                    format!(
                        "Reads saw {} and {} in turns: whichever was written first, one of them came back.",
                        self.value(old.value),
                        self.value(new.value)
                    ),
                )
            } else {
                (
                    Kind::Disorder,
                    format!(
                        "{} and {} cannot be put in any order.",
                        self.value(old.value),
                        self.value(new.value)
                    ),
                )
            };
            self.draft(kind, text, parts, None);
        }
    }
}

impl Draft {
    /// Confirms the draft by the general test, and finds which of its operations are needed.
    pub(crate) fn confirm(self, registers: &Registers<'_>) -> Result<Anomaly, JudgeError> {
        let mut parts: Vec<Part> = Vec::new();
        for part in self.parts {
            if parts.iter().all(|other| other.op != part.op) {
                parts.push(part);
            }
        }
        // Absence says something only of an item that is known to exist.
        if let Some((op, seen)) = self.evidence
            && parts.iter().any(|part| part.seen == Some(Seen::Absent))
            && parts.iter().all(|part| part.op != op)
        {
            parts.push(Part {
                op,
                seen: Some(seen),
                role: Role::Newer,
            });
        }
        // What was read must have been written.
        let missing: Vec<Part> = parts
            .iter()
            .filter_map(|part| match part.seen? {
                Seen::Value(value) => {
                    let op = registers.writer(value)?;
                    let here = registers.key_of(op) == Some(self.key);
                    here.then_some(Part {
                        op,
                        seen: part.seen,
                        role: Role::Older,
                    })
                }
                Seen::Absent => {
                    let op = registers.create(self.key)?;
                    let seen = registers.operation(op).value.map(Seen::Value);
                    Some(Part {
                        op,
                        seen,
                        role: Role::Older,
                    })
                }
            })
            .collect();
        for part in missing {
            if parts.iter().all(|other| other.op != part.op) {
                parts.push(part);
            }
        }
        parts.sort_by_key(|part| (registers.operation(part.op).start, part.op));

        let mut events: Vec<Event> = Vec::new();
        let mut part_of: Vec<Option<usize>> = Vec::new();
        for (at, part) in parts.iter().enumerate() {
            if let Some(event) = event(registers, part) {
                events.push(event);
                part_of.push(Some(at));
            }
        }
        if let Some((value, version)) = self.initial {
            let call = Call::Create(value, version);
            events.push(Event {
                start: i64::MIN,
                end: i64::MIN,
                call,
                optional: false,
            });
            part_of.push(None);
        }
        let mut needed = vec![self.by_definition; parts.len()];
        if !self.by_definition {
            if search::search(&events, SEARCH_LIMIT) != Answer::Impossible {
                return Err(JudgeError::Unconfirmed {
                    kind: self.kind,
                    key: registers.history.key_name(self.key).to_owned(),
                });
            }
            for at in search::shrink(&events, SEARCH_LIMIT) {
                if let Some(part) = part_of[at] {
                    needed[part] = true;
                }
            }
        }
        let members = parts
            .iter()
            .zip(needed)
            .map(|(part, needed)| Member {
                operation: part.op as usize,
                role: part.role,
                needed,
                value: match part.seen {
                    Some(Seen::Value(value)) => Some(value),
                    _ => None,
                },
            })
            .collect();
        let mut explanation = self.explanation;
        if let Some(first) = explanation.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        Ok(Anomaly {
            kind: self.kind,
            key: self.key,
            explanation,
            members,
            staleness: self.staleness,
            confirmation: if self.by_definition {
                Confirmation::ByDefinition
            } else {
                Confirmation::BySearch
            },
        })
    }
}

fn event(registers: &Registers<'_>, part: &Part) -> Option<Event> {
    let operation = registers.operation(part.op);
    let outcome = registers.outcome(operation);
    let version = |value: Value| registers.zone(value).version;
    let call = match (operation.action, outcome) {
        (_, Outcome::Failed) => return None,
        (Action::Create, _) => operation
            .value
            .map(|value| Call::Create(value, version(value)))?,
        (Action::Update, Outcome::Ok | Outcome::Unknown) => operation
            .value
            .map(|value| Call::Update(value, version(value)))?,
        (Action::Delete, Outcome::Ok | Outcome::Unknown) => Call::Delete,
        (_, Outcome::Absent) => Call::ReadAbsent,
        (Action::Read | Action::List, _) => match part.seen? {
            Seen::Value(value) => Call::Read(value),
            Seen::Absent => Call::ReadAbsent,
        },
    };
    let optional = operation.action.is_write() && outcome == Outcome::Unknown;
    let end = if optional { i64::MAX } else { operation.end };
    Some(Event {
        start: operation.start,
        end,
        call,
        optional,
    })
}
