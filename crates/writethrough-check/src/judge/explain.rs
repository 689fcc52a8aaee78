//! Says in words what is wrong with an item that failed, and names the few operations that show it.
//!
//! Every explanation is a draft: it is confirmed by the general test before it is handed out.

use std::collections::{BTreeMap, HashSet};

use super::anomaly::{Kind, Role, Staleness};
use super::confirm::{Draft, Part};
use super::findings::Findings;
use super::late::{self, LateReads, Proof};
use super::observation::{Observation, Op, Seen, Violation};
use super::registers::Registers;
use super::writes::Writes;
use super::zones::{Conflict, Rank, Register, WriteGroup};
use crate::history::{Action, Value};
use crate::time::duration;

/// An item that failed, with everything that was seen of it.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) register: Register,
    pub(crate) conflicts: Vec<Conflict>,
    pub(crate) reused: Vec<Conflict>,
    pub(crate) skipped: Option<Vec<u64>>,
    pub(crate) violations: Vec<Violation>,
    pub(crate) observations: Vec<Observation>,
}

/// Drafts an explanation of each anomaly of one item, and counts the anomalies and stale reads.
pub(crate) fn explain(
    registers: &Registers<'_>,
    case: &Case,
    findings: &mut Findings,
    drafts: &mut Vec<Draft>,
) {
    let mut explainer = Explainer {
        registers,
        writes: &registers.writes,
        case,
        findings,
        drafts,
        reported: HashSet::new(),
    };
    explainer.late_reads();
    explainer.violations();
    explainer.reused_versions();
    explainer.skipped_versions();
    explainer.other_conflicts();
}

struct Explainer<'a, 'h> {
    registers: &'a Registers<'h>,
    writes: &'a Writes<'h>,
    case: &'a Case,
    findings: &'a mut Findings,
    drafts: &'a mut Vec<Draft>,
    /// Write groups that an explanation already accuses.
    reported: HashSet<usize>,
}

/// What one explanation says.
struct Explanation {
    kind: Kind,
    text: String,
    parts: Vec<Part>,
    staleness: Option<Staleness>,
}

impl<'a> Explainer<'a, '_> {
    fn draft(&mut self, explanation: Explanation) {
        let Explanation {
            kind,
            text,
            parts,
            staleness,
        } = explanation;
        *self.findings.counts.entry(kind).or_default() += 1;
        let register = &self.case.register;
        let initial = register
            .groups
            .iter()
            .find(|group| group.writer.is_none())
            .and_then(|group| Some((group.value?, group.version)));
        let evidence = register
            .first_evidence
            .and_then(|op| self.seen_by(op).map(|seen| (op, seen)));
        self.drafts.push(Draft {
            kind,
            key: register.key,
            explanation: text,
            parts,
            staleness,
            initial,
            evidence,
        });
    }

    fn groups(&self) -> &'a [WriteGroup] {
        &self.case.register.groups
    }

    fn value(&self, value: Option<Value>) -> String {
        value.map_or_else(
            || "the deletion".to_owned(),
            |value| format!("{:?}", self.writes.history.value_name(value)),
        )
    }

    fn process(&self, op: Op) -> u32 {
        self.writes.operation(op).process
    }

    /// Says who did what, as in "process 3 read".
    fn reader(&self, op: Op) -> String {
        let operation = self.writes.operation(op);
        let verb = match operation.action {
            Action::List => "listed",
            Action::Read => "read",
            Action::Create => "created",
            Action::Update => "updated",
            Action::Delete => "deleted",
        };
        format!("process {} {verb}", operation.process)
    }

    /// Explains reads of a state after a newer one was acknowledged (stale) or had been seen (not
    /// monotonic).
    fn late_reads(&mut self) {
        let case = self.case;
        let found = late::find(
            self.registers,
            &case.register,
            &case.observations,
            |age_ns| self.findings.stale(age_ns),
        );
        for late in &found.late {
            self.reported.insert(late.older);
            let explanation = match late.proof {
                Proof::Acknowledged => self.stale_reads(late, found.last_seen),
                Proof::Seen => self.non_monotonic_reads(late),
            };
            self.draft(explanation);
        }
    }

    fn stale_reads(&self, late: &LateReads, last_seen: Option<Seen>) -> Explanation {
        let (old, new) = (&self.groups()[late.older], &self.groups()[late.newer]);
        let acknowledged = late.known;
        let staleness = Staleness {
            reads: late.count,
            first_ns: late.first.at.saturating_sub(acknowledged.at),
            worst_ns: late.last.at.saturating_sub(acknowledged.at),
        };
        let kind = if new.rank == Rank::Deletion {
            shown_after_deletion(late.by_page)
        } else if new.reads == 0 && last_seen == old.value.map(Seen::Value) && self.is_last(new) {
            Kind::LostWrite
        } else {
            Kind::StaleRead
        };
        let process = self.process(acknowledged.op);
        let what = if new.rank == Rank::Deletion {
            format!("its deletion by process {process}")
        } else {
            format!(
                "the write of {} by process {process}",
                self.value(new.value)
            )
        };
        let mut text = format!(
            "{} {} although {what} had been acknowledged {} before.",
            self.reader(late.first.op),
            self.value(old.value),
            duration(staleness.first_ns),
        );
        if late.count > 1 {
            text.push_str(&format!(
                " {} reads returned the old state, the last {} after the acknowledgement.",
                late.count,
                duration(staleness.worst_ns)
            ));
        }
        if kind == Kind::LostWrite {
            text.push_str(" No read ever returned the new value.");
        }
        Explanation {
            kind,
            text,
            parts: parts(old, new, acknowledged.op, late.first.op),
            staleness: Some(staleness),
        }
    }

    fn non_monotonic_reads(&self, late: &LateReads) -> Explanation {
        let (old, new) = (&self.groups()[late.older], &self.groups()[late.newer]);
        let seen = late.known;
        let seen_by_page = self.writes.operation(seen.op).action == Action::List;
        let kind = if new.rank != Rank::Deletion {
            Kind::NonMonotonicRead
        } else if seen_by_page && !late.by_page {
            // More likely the page was wrong than the item itself.
            Kind::ListMissesItem
        } else {
            shown_after_deletion(late.by_page)
        };
        let text = format!(
            "{} {} although {}, {} before, had already seen {}.",
            self.reader(late.first.op),
            self.value(old.value),
            self.reader(seen.op),
            duration(late.first.at.saturating_sub(seen.at)),
            new.value
                .map_or_else(|| "it absent".to_owned(), |_| self.value(new.value)),
        );
        Explanation {
            kind,
            text,
            parts: parts(old, new, seen.op, late.first.op),
            staleness: None,
        }
    }

    /// Says whether no later write replaced the group's value.
    fn is_last(&self, group: &WriteGroup) -> bool {
        let end = |op: Op| self.writes.operation(op).end;
        let start = |op: Op| self.writes.operation(op).start;
        self.groups().iter().all(|other| {
            other.rank != Rank::Deletion
                && other
                    .writer
                    .zip(group.writer)
                    .is_none_or(|(op, of)| start(op) <= end(of))
        })
    }

    /// Explains what single operations show, those of one kind and value together.
    fn violations(&mut self) {
        let mut alike: BTreeMap<(Kind, Option<Value>), Vec<Violation>> = BTreeMap::new();
        for &violation in &self.case.violations {
            let value = violation.seen.value();
            alike
                .entry((violation.kind, value))
                .or_default()
                .push(violation);
        }
        for mut violations in alike.into_values() {
            violations.sort_by_key(|violation| self.writes.operation(violation.op).start);
            let Some(&first) = violations.first() else {
                continue;
            };
            let mut explanation = match first.kind {
                Kind::LostItem | Kind::ListMissesItem => self.missing(&first, &violations),
                _ => self.contradiction(&first),
            };
            if violations.len() > 1 {
                let count = violations.len();
                explanation
                    .text
                    .push_str(&format!(" {count} operations show this."));
            }
            self.draft(explanation);
        }
    }

    /// Explains an item that reads did not find although it existed.
    fn missing(&mut self, first: &Violation, all: &[Violation]) -> Explanation {
        let start = |op: Op| self.writes.operation(op).start;
        let read = self.writes.operation(first.op);
        let evidence = self.case.register.first_evidence;
        let since = evidence.map_or(read.start, |op| self.writes.operation(op).end);
        for violation in all {
            self.findings
                .stale(start(violation.op).saturating_sub(since));
        }
        let last = all.last().unwrap_or(first);
        let how = if first.kind == Kind::ListMissesItem {
            format!(
                "A page of the list, read by process {}, left out the item",
                read.process
            )
        } else {
            format!("Process {} did not find the item (404)", read.process)
        };
        let whose = if first.other.is_none() {
            "and nobody had tried to delete it"
        } else {
            "and its deletion had not been asked for yet"
        };
        let age = duration(read.start.saturating_sub(since));
        Explanation {
            kind: first.kind,
            text: format!("{how} although it was known to exist {age} before, {whose}."),
            parts: vec![offender(first)],
            staleness: Some(Staleness {
                reads: all.len() as u64,
                first_ns: read.start.saturating_sub(since),
                worst_ns: start(last.op).saturating_sub(since),
            }),
        }
    }

    /// Explains an operation that contradicts one other, or the whole history.
    fn contradiction(&self, violation: &Violation) -> Explanation {
        let &Violation {
            kind,
            key,
            op,
            other,
            seen,
        } = violation;
        let value = self.value(seen.value());
        let reader = self.reader(op);
        let mut parts = vec![offender(violation)];
        let mut text = format!("{reader} {value}, which nobody wrote to this item");
        match (kind, other) {
            (Kind::FailedWriteSeen, Some(other)) => {
                let write = self.writes.operation(other);
                text = format!(
                    "{reader} {value}, the value of a write by process {} that the service had \
                     refused (status {}).",
                    write.process, write.status,
                );
            }
            (Kind::ValueFromFuture, Some(other)) => {
                let write = self.writes.operation(other);
                let early = duration(write.start.saturating_sub(self.writes.operation(op).end));
                text = format!(
                    "{reader} {value}, {early} before process {} invoked the write of it.",
                    write.process,
                );
            }
            (Kind::DoubleDelete, Some(other)) => {
                text = format!(
                    "Both process {} and process {} were told that they deleted the item.",
                    self.process(other),
                    self.process(op)
                );
            }
            (Kind::DuplicateKey, Some(other)) => {
                text = format!(
                    "Two creates, by process {} and process {}, were given the same id.",
                    self.process(other),
                    self.process(op)
                );
            }
            (Kind::ChangedVersion, Some(other)) => {
                text = format!(
                    "{reader} {value} under another version than {} did: a value is written once \
                     and has one version.",
                    self.reader(other),
                );
            }
            _ => {
                let elsewhere = seen
                    .value()
                    .and_then(|value| self.writes.written_elsewhere(value, key));
                if let Some(elsewhere) = elsewhere {
                    let name = self.writes.history.key_name(elsewhere);
                    text.push_str(&format!("; that value was written to item {name}"));
                }
                text.push('.');
            }
        }
        if let (Some(op), true) = (other, kind != Kind::UnwrittenValue) {
            let role = match kind {
                Kind::FailedWriteSeen | Kind::ValueFromFuture => Role::Newer,
                _ => Role::Older,
            };
            parts.push(Part {
                op,
                seen: Some(seen),
                role,
            });
        }
        Explanation {
            kind,
            text,
            parts,
            staleness: None,
        }
    }

    /// Returns what an operation showed of the item of this case, or wrote to it.
    fn seen_by(&self, op: Op) -> Option<Seen> {
        let operation = self.writes.operation(op);
        if operation.action.is_write() {
            return Some(operation.value.into());
        }
        self.case
            .observations
            .iter()
            .find(|observation| observation.op == op)
            .map(|observation| observation.seen)
    }

    fn reused_versions(&mut self) {
        for &Conflict { one, other } in &self.case.reused {
            let (old, new) = (&self.groups()[one], &self.groups()[other]);
            let text = format!(
                "{} and {} both became version {}: one of the two updates did not see the other.",
                self.value(old.value),
                self.value(new.value),
                old.version.unwrap_or_default()
            );
            let mut parts = parts(old, new, new.first_end.op, old.first_end.op);
            parts.dedup_by_key(|part| part.op);
            self.reported.extend([one, other]);
            self.draft(Explanation {
                kind: Kind::ReusedVersion,
                text,
                parts,
                staleness: None,
            });
        }
    }

    fn skipped_versions(&mut self) {
        let Some(missing) = &self.case.skipped else {
            return;
        };
        let list: Vec<String> = missing.iter().map(u64::to_string).collect();
        let text = format!(
            "No operation can have been given version {}: writes of unknown outcome are too few \
             to explain it.",
            list.join(", ")
        );
        let first = missing.first().copied();
        let versioned = || self.groups().iter().filter(|group| group.version.is_some());
        let before = versioned()
            .filter(|group| group.version < first)
            .max_by_key(|group| group.version);
        let after = versioned()
            .filter(|group| group.version > first)
            .min_by_key(|group| group.version);
        let parts = [(before, Role::Older), (after, Role::Newer)]
            .into_iter()
            .filter_map(|(group, role)| {
                let group = group?;
                Some(Part {
                    op: group.writer.unwrap_or(group.first_end.op),
                    seen: group.value.map(Seen::Value),
                    role,
                })
            })
            .collect();
        self.draft(Explanation {
            kind: Kind::SkippedVersion,
            text,
            parts,
            staleness: None,
        });
    }

    /// Explains conflicts in which no single read is to blame: values that alternate, writes
    /// acknowledged in the wrong order.
    fn other_conflicts(&mut self) {
        for &Conflict { one, other } in &self.case.conflicts {
            if self.reported.contains(&one) || self.reported.contains(&other) {
                continue;
            }
            self.reported.extend([one, other]);
            let rank = |at: usize| {
                let group = &self.groups()[at];
                (group.rank, group.version, group.first_end.at)
            };
            let (old, new) = if rank(one) <= rank(other) {
                (one, other)
            } else {
                (other, one)
            };
            let explanation = self.conflict(&self.groups()[old], &self.groups()[new]);
            self.draft(explanation);
        }
    }

    fn conflict(&self, old: &WriteGroup, new: &WriteGroup) -> Explanation {
        let (old_value, new_value) = (self.value(old.value), self.value(new.value));
        let reader = self.reader(old.last_start.op);
        let operation = |op: Op| self.writes.operation(op);
        let is_read = !operation(old.last_start.op).action.is_write();
        let by_page = operation(new.first_end.op).action == Action::List;
        let (kind, text) = if new.rank == Rank::Deletion && by_page {
            (
                Kind::ListMissesItem,
                format!(
                    "{reader} {old_value} after a page of the list, read by process {}, had left \
                     the item out.",
                    self.process(new.first_end.op)
                ),
            )
        } else if new.rank == Rank::Deletion {
            (
                Kind::ResurrectedItem,
                format!(
                    "{reader} {old_value} after the item's deletion had been acknowledged or seen."
                ),
            )
        } else if let (false, Some(old), Some(new)) = (is_read, old.version, new.version) {
            (
                Kind::BackwardVersion,
                format!(
                    "{old_value} became version {old} after {new_value} had become version {new}."
                ),
            )
        } else if is_read {
            (
                Kind::NonMonotonicRead,
                format!(
                    "Reads saw {old_value} and {new_value} in turns: whichever was written first, \
                     one of them came back."
                ),
            )
        } else {
            (
                Kind::Disorder,
                format!("{old_value} and {new_value} cannot be put in any order."),
            )
        };
        let mut parts = parts(old, new, new.first_end.op, old.last_start.op);
        parts.push(Part {
            op: new.last_start.op,
            seen: Some(new.value.into()),
            role: Role::Newer,
        });
        Explanation {
            kind,
            text,
            parts,
            staleness: None,
        }
    }
}

fn shown_after_deletion(by_page: bool) -> Kind {
    if by_page {
        Kind::ListShowsDeletedItem
    } else {
        Kind::ResurrectedItem
    }
}

fn offender(violation: &Violation) -> Part {
    Part {
        op: violation.op,
        seen: Some(violation.seen),
        role: Role::Offender,
    }
}

/// Collects the operations around "`offender` showed `old` although `by` had proved `new`".
fn parts(old: &WriteGroup, new: &WriteGroup, by: Op, offender: Op) -> Vec<Part> {
    let older = old.value.map(Seen::Value);
    let newer = Some(new.value.into());
    [
        (Some(offender), older, Role::Offender),
        (Some(by), newer, Role::Newer),
        (old.writer, older, Role::Older),
        (new.writer, newer, Role::Newer),
        (Some(old.first_end.op), older, Role::Older),
    ]
    .into_iter()
    .filter_map(|(op, seen, role)| op.map(|op| Part { op, seen, role }))
    .collect()
}
