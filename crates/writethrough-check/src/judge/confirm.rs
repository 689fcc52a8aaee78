//! Confirms explanations by the general test, and finds which of their operations are needed.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use super::anomaly::{Anomaly, Confirmation, Kind, Member, Role, Staleness};
use super::findings::JudgeError;
use super::observation::{Op, Seen};
use super::registers::Registers;
use super::search::{self, Answer, Call, Event};
use crate::history::{Action, Key, Outcome, Value};

/// A window has a handful of operations; no search in one takes a noticeable time.
const SEARCH_LIMIT: Duration = Duration::from_secs(5);

/// An operation in an explanation that is not confirmed yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) op: Op,
    pub(crate) seen: Option<Seen>,
    pub(crate) role: Role,
}

/// An anomaly that is not confirmed yet.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    pub(crate) kind: Kind,
    pub(crate) key: Key,
    pub(crate) explanation: String,
    pub(crate) parts: Vec<Part>,
    pub(crate) staleness: Option<Staleness>,
    /// The value that the item had before the history began, and its version.
    pub(crate) initial: Option<(Value, Option<u64>)>,
    /// The operation that first showed the item to exist, and what it showed.
    pub(crate) evidence: Option<(Op, Seen)>,
}

/// Chooses the worst drafts, some of each kind.
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

impl Draft {
    /// Confirms the draft by the general test, and finds which of its operations are needed.
    pub(crate) fn confirm(self, registers: &Registers<'_>) -> Result<Anomaly, JudgeError> {
        let writes = &registers.writes;
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
                    let op = writes.writer(value)?;
                    let here = writes.key_of(op) == Some(self.key);
                    here.then_some(Part {
                        op,
                        seen: part.seen,
                        role: Role::Older,
                    })
                }
                Seen::Absent => {
                    let op = writes.create(self.key)?;
                    let seen = writes.operation(op).value.map(Seen::Value);
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
        parts.sort_by_key(|part| (writes.operation(part.op).start, part.op));

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
        let by_definition = matches!(
            self.kind,
            Kind::ChangedVersion | Kind::SkippedVersion | Kind::DuplicateKey
        );
        let mut needed = vec![by_definition; parts.len()];
        if !by_definition {
            if search::search(&events, SEARCH_LIMIT) != Answer::Impossible {
                return Err(JudgeError::Unconfirmed {
                    kind: self.kind,
                    key: writes.history.key_name(self.key).to_owned(),
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
                operation: part.op.index(),
                role: part.role,
                needed,
                value: part.seen.and_then(Seen::value),
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
            confirmation: if by_definition {
                Confirmation::ByDefinition
            } else {
                Confirmation::BySearch
            },
        })
    }
}

fn event(registers: &Registers<'_>, part: &Part) -> Option<Event> {
    let writes = &registers.writes;
    let operation = writes.operation(part.op);
    let outcome = writes.outcome(operation);
    let version = |value: Value| registers.zone(value).version();
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
