//! Reduces a history to one register per item.
//!
//! A register goes through *before creation*, a chain of values, and *after deletion*: the service
//! chooses the ids, so an item is created once and deleted at most once. Values are unique in the
//! history, so every read names the write that it saw. All that the fast test needs of a write and
//! its reads (a *write group*) is the earliest end and the latest start in it, and these are
//! gathered here in one pass.

use std::collections::HashMap;

use super::anomaly::Kind;
use super::observation::{Moment, Observation, Op, Seen, Violation};
use super::pages;
use super::writes::Writes;
use crate::history::{Action, Key, Outcome, Value};

/// The two extremes of a write and its reads: by `first_end` the value was certainly in place at
/// some time, and at `last_start` it was not yet gone for ever.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Zone {
    pub(crate) first_end: Option<Moment>,
    pub(crate) last_start: Option<Moment>,
    pub(crate) reads: u32,
    /// The version, and the operation that first carried it.
    version: Option<(u64, Op)>,
}

impl Zone {
    pub(crate) fn version(&self) -> Option<u64> {
        self.version.map(|(version, _)| version)
    }

    fn starts(&mut self, at: i64, op: Op) {
        if self.last_start.is_none_or(|last| at > last.at) {
            self.last_start = Some(Moment { at, op });
        }
    }

    fn ends(&mut self, at: i64, op: Op) {
        if self.first_end.is_none_or(|first| at < first.at) {
            self.first_end = Some(Moment { at, op });
        }
    }
}

/// Lists of something by key, one behind the other in a single allocation.
#[derive(Debug)]
pub(crate) struct ByKey<T> {
    bounds: Vec<u32>,
    items: Vec<T>,
}

impl<T: Copy> ByKey<T> {
    fn new(keys: usize, pairs: &[(Key, T)]) -> Self {
        let mut bounds = vec![0_u32; keys + 1];
        for (key, _) in pairs {
            bounds[key.0 as usize + 1] += 1;
        }
        for at in 1..bounds.len() {
            bounds[at] += bounds[at - 1];
        }
        let mut next = bounds.clone();
        let mut items: Vec<T> = pairs.iter().map(|&(_, item)| item).collect();
        for &(key, item) in pairs {
            let at = &mut next[key.0 as usize];
            items[*at as usize] = item;
            *at += 1;
        }
        Self { bounds, items }
    }

    pub(crate) fn of(&self, key: Key) -> &[T] {
        let key = key.0 as usize;
        &self.items[self.bounds[key] as usize..self.bounds[key + 1] as usize]
    }
}

/// The registers of a history.
#[derive(Debug)]
pub(crate) struct Registers<'h> {
    pub(crate) writes: Writes<'h>,
    /// Pages that left out an item which they would have shown.
    omissions: Vec<(Key, Op)>,
    /// By value; only written values have one.
    zones: Vec<Zone>,
    /// The value that an item had before the history began, and what was seen of it. Several items
    /// may have had the same one.
    initial: HashMap<Key, (Value, Zone)>,
    /// By key: values that must have been in place at some time.
    values: ByKey<Value>,
    /// By key: operations that showed the item absent.
    pub(crate) absences: ByKey<Op>,
    pub(crate) violations: Vec<Violation>,
}

impl<'h> Registers<'h> {
    /// Adds to the writes of a history what was seen of them.
    pub(crate) fn new(mut writes: Writes<'h>) -> Self {
        let violations = std::mem::take(&mut writes.violations);
        let omissions = if writes.rules.omissions_are_reads {
            pages::omissions(&writes)
        } else {
            Vec::new()
        };
        let mut registers = Self {
            writes,
            omissions,
            zones: Vec::new(),
            initial: HashMap::new(),
            values: ByKey::new(0, &[]),
            absences: ByKey::new(0, &[]),
            violations,
        };
        registers.gather();
        registers
    }

    /// Returns the zone of a written value.
    pub(crate) fn zone(&self, value: Value) -> &Zone {
        &self.zones[value.0 as usize]
    }

    /// Iterates over the values that an item certainly had at some time, with their zones.
    pub(crate) fn values_of(&self, key: Key) -> impl Iterator<Item = (Value, &Zone)> {
        let initial = self.initial.get(&key).map(|(value, zone)| (*value, zone));
        let written = self.values.of(key).iter();
        initial
            .into_iter()
            .chain(written.map(|&value| (value, self.zone(value))))
    }

    /// Calls `each` for everything that the history shows of judged items, and the version shown
    /// with it.
    pub(crate) fn observations(&self, mut each: impl FnMut(Observation, Option<u64>)) {
        let writes = &self.writes;
        let history = writes.history;
        let mut show = |op, key, seen, version| each(Observation { op, key, seen }, version);
        for (op, operation) in Op::all(history) {
            if let Some(page) = history.page(operation) {
                if !writes.rules.entries_are_reads {
                    continue;
                }
                for entry in history.entries(page) {
                    if writes.is_judged(entry.key) {
                        show(op, entry.key, Seen::Value(entry.value), entry.version);
                    }
                }
                continue;
            }
            let Some(key) = operation.key.filter(|&key| writes.is_judged(key)) else {
                continue;
            };
            if operation.outcome == Outcome::Absent {
                show(op, key, Seen::Absent, None);
            } else if operation.action == Action::Read
                && operation.outcome == Outcome::Ok
                && let Some(value) = operation.value
            {
                show(op, key, Seen::Value(value), operation.version);
            }
        }
        for &(key, op) in &self.omissions {
            show(op, key, Seen::Absent, None);
        }
    }

    fn gather(&mut self) {
        let writes = &self.writes;
        let rules = &writes.rules;
        let mut zones = self.zones_of_writes();
        let mut absences: Vec<(Key, Op)> = Vec::new();
        // An item that was there before the history began has one value that nobody in it wrote.
        let mut initial: HashMap<Key, (Value, Zone)> = HashMap::new();
        let mut violations = Vec::new();
        let mut violation = |kind, Observation { op, key, seen }, other| {
            violations.push(Violation {
                kind,
                key,
                op,
                other,
                seen,
            });
        };

        self.observations(|observation, version| {
            let Observation { op, key, seen } = observation;
            let Seen::Value(value) = seen else {
                absences.push((key, op));
                return;
            };
            let operation = writes.operation(op);
            let zone = if let Some(writer) = writes.writer(value) {
                let write = writes.operation(writer);
                if writes.key_of(writer) != Some(key) {
                    if rules.values_were_written {
                        violation(Kind::UnwrittenValue, observation, Some(writer));
                    }
                    return;
                }
                if matches!(writes.outcome(write), Outcome::Failed | Outcome::Absent) {
                    violation(Kind::FailedWriteSeen, observation, Some(writer));
                    return;
                }
                if operation.end < write.start {
                    if rules.values_were_written_before {
                        violation(Kind::ValueFromFuture, observation, Some(writer));
                    }
                    return;
                }
                &mut zones[value.0 as usize]
            } else {
                let first = match writes.create(key) {
                    Some(_) => None,
                    None => Some(initial.entry(key).or_insert((value, Zone::default()))),
                };
                let Some((_, zone)) = first.filter(|(first, _)| *first == value) else {
                    if rules.values_were_written {
                        violation(Kind::UnwrittenValue, observation, None);
                    }
                    return;
                };
                zone
            };
            if let Some(version) = version {
                let (known, by) = *zone.version.get_or_insert((version, op));
                if known != version {
                    violation(Kind::ChangedVersion, observation, Some(by));
                }
            }
            zone.reads += 1;
            if rules.reads_are_evidence {
                zone.starts(operation.start, op);
                zone.ends(operation.end, op);
            }
        });

        let mut of_key: Vec<(Key, Value)> = Vec::new();
        for (value, zone) in (0..).map(Value).zip(&zones) {
            // What nobody is sure about and nobody saw may as well never have happened.
            if zone.first_end.is_none() || zone.last_start.is_none() {
                continue;
            }
            let key = writes.writer(value).and_then(|op| writes.key_of(op));
            of_key.extend(key.map(|key| (key, value)));
        }
        let keys = writes.history.key_count();
        self.values = ByKey::new(keys, &of_key);
        self.absences = ByKey::new(keys, &absences);
        self.zones = zones;
        self.initial = initial;
        self.violations.append(&mut violations);
    }

    /// Returns the zones of all values, as far as the writes alone tell them.
    fn zones_of_writes(&self) -> Vec<Zone> {
        let writes = &self.writes;
        let mut zones = vec![Zone::default(); writes.history.value_count()];
        for (value, zone) in (0..).map(Value).zip(&mut zones) {
            let Some(op) = writes.writer(value) else {
                continue;
            };
            let operation = writes.operation(op);
            let outcome = writes.outcome(operation);
            if matches!(outcome, Outcome::Ok | Outcome::Unknown) {
                zone.starts(operation.start, op);
            }
            if outcome == Outcome::Ok {
                if writes.rules.acknowledged_writes_took_effect {
                    zone.ends(operation.end, op);
                }
                zone.version = operation.version.map(|version| (version, op));
            }
        }
        zones
    }
}
