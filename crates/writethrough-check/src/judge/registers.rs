//! Reduces a history to one register per item.
//!
//! A register goes through *before creation*, a chain of values, and *after deletion*: the service
//! chooses the ids, so an item is created once and deleted at most once. Values are unique in the
//! history, so every read names the write that it saw. All that the fast test needs of a write and
//! its reads (its *cluster*) is the earliest end and the latest start in it, and these are gathered
//! here in one pass.

use std::collections::HashMap;

use super::{JudgeError, Kind, Weakening, pages};
use crate::history::{Action, History, Key, Operation, Outcome, Value};

/// No operation.
pub(crate) const NONE: u32 = u32::MAX;

/// What one operation showed of one item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Value(Value),
    Absent,
}

/// One operation that showed the state of one item.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Observation {
    pub(crate) op: u32,
    pub(crate) key: Key,
    pub(crate) seen: Seen,
}

/// The two extremes of a write and its reads: by `first_end` the value was certainly in place at
/// some time, and at `last_start` it was not yet gone for ever.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Zone {
    pub(crate) first_end: i64,
    pub(crate) first_end_op: u32,
    pub(crate) last_start: i64,
    pub(crate) last_start_op: u32,
    pub(crate) reads: u32,
    pub(crate) version: Option<u64>,
    version_op: u32,
}

impl Zone {
    const EMPTY: Self = Self {
        first_end: i64::MAX,
        first_end_op: NONE,
        last_start: i64::MIN,
        last_start_op: NONE,
        reads: 0,
        version: None,
        version_op: NONE,
    };

    fn starts(&mut self, at: i64, op: u32) {
        if self.last_start_op == NONE || at > self.last_start {
            (self.last_start, self.last_start_op) = (at, op);
        }
    }

    fn ends(&mut self, at: i64, op: u32) {
        if at < self.first_end {
            (self.first_end, self.first_end_op) = (at, op);
        }
    }
}

/// What is known about the deletion of one item.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deletion {
    pub(crate) acknowledged: u32,
    pub(crate) earliest_unknown: u32,
}

/// An anomaly that one operation, or two, show by themselves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) key: Key,
    pub(crate) op: u32,
    pub(crate) other: u32,
    pub(crate) seen: Seen,
}

/// Lists of something by key, one behind the other in a single allocation.
#[derive(Debug)]
pub(crate) struct ByKey<T> {
    bounds: Vec<u32>,
    items: Vec<T>,
}

impl<T: Copy> ByKey<T> {
    pub(crate) fn new(keys: usize, pairs: &[(Key, T)]) -> Self {
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
    pub(crate) history: &'h History,
    pub(crate) weakening: Option<Weakening>,
    /// The keys of creates whose answer never came, found out from their values.
    resolved: HashMap<u32, Key>,
    /// By value: the write that wrote it.
    writers: Vec<u32>,
    /// By value.
    zones: Vec<Zone>,
    /// By key: values that must have been in place at some time.
    pub(crate) values: ByKey<Value>,
    /// By key: operations that showed the item absent.
    pub(crate) absences: ByKey<u32>,
    /// Pages that left out an item which they would have shown.
    omissions: Vec<(Key, u32)>,
    creates: Vec<u32>,
    deletions: Vec<Deletion>,
    /// By key: something was written to it.
    judged: Vec<bool>,
    pub(crate) faults: Vec<Fault>,
}

impl<'h> Registers<'h> {
    pub(crate) fn new(
        history: &'h History,
        weakening: Option<Weakening>,
    ) -> Result<Self, JudgeError> {
        let none = Deletion {
            acknowledged: NONE,
            earliest_unknown: NONE,
        };
        let mut registers = Self {
            history,
            weakening,
            resolved: HashMap::new(),
            writers: vec![NONE; history.value_count()],
            zones: Vec::new(),
            values: ByKey::new(0, &[]),
            absences: ByKey::new(0, &[]),
            omissions: Vec::new(),
            creates: vec![NONE; history.key_count()],
            deletions: vec![none; history.key_count()],
            judged: vec![false; history.key_count()],
            faults: Vec::new(),
        };
        registers.find_writes()?;
        registers.find_lost_creates();
        registers.omissions = if registers.is_weakened(Weakening::PagesOmitFreely) {
            Vec::new()
        } else {
            pages::omissions(&registers)
        };
        registers.gather();
        Ok(registers)
    }

    pub(crate) fn is_weakened(&self, weakening: Weakening) -> bool {
        self.weakening == Some(weakening)
    }

    pub(crate) fn operation(&self, op: u32) -> &'h Operation {
        &self.history.operations()[op as usize]
    }

    /// The item that an operation addressed, also for a create whose answer never came if its value
    /// was seen later.
    pub(crate) fn key_of(&self, op: u32) -> Option<Key> {
        self.operation(op)
            .key
            .or_else(|| self.resolved.get(&op).copied())
    }

    pub(crate) fn writer(&self, value: Value) -> Option<u32> {
        Some(self.writers[value.0 as usize]).filter(|&op| op != NONE)
    }

    /// The item, other than `key`, to which the value was written.
    pub(crate) fn writer_of_other(&self, value: Option<Value>, key: Key) -> Option<Key> {
        self.key_of(self.writer(value?)?)
            .filter(|&other| other != key)
    }

    pub(crate) fn zone(&self, value: Value) -> &Zone {
        &self.zones[value.0 as usize]
    }

    pub(crate) fn create(&self, key: Key) -> Option<u32> {
        Some(self.creates[key.0 as usize]).filter(|&op| op != NONE)
    }

    pub(crate) fn deletion(&self, key: Key) -> Deletion {
        self.deletions[key.0 as usize]
    }

    /// The keys to which something was written. Of others the history says too little to judge
    /// them.
    pub(crate) fn judged_keys(&self) -> impl Iterator<Item = Key> + '_ {
        (0..self.judged.len())
            .filter(|&key| self.judged[key])
            .map(|key| Key(key as u32))
    }

    pub(crate) fn is_judged(&self, key: Key) -> bool {
        self.judged[key.0 as usize]
    }

    /// The outcome that the test works with.
    pub(crate) fn outcome(&self, operation: &Operation) -> Outcome {
        match (self.weakening, operation.outcome) {
            (Some(Weakening::UnknownIsDone), Outcome::Unknown) => Outcome::Ok,
            (Some(Weakening::UnknownIsNever), Outcome::Unknown) => Outcome::Failed,
            (Some(Weakening::FailedIsUnknown), Outcome::Failed) => Outcome::Unknown,
            (_, outcome) => outcome,
        }
    }

    fn fault(&mut self, kind: Kind, key: Key, op: u32, other: u32, seen: Seen) {
        self.faults.push(Fault {
            kind,
            key,
            op,
            other,
            seen,
        });
    }

    fn find_writes(&mut self) -> Result<(), JudgeError> {
        let history = self.history;
        for (op, operation) in (0_u32..).zip(history.operations()) {
            match operation.action {
                Action::Create | Action::Update => {
                    let Some(value) = operation.value else {
                        continue;
                    };
                    let writer = &mut self.writers[value.0 as usize];
                    if *writer != NONE {
                        return Err(JudgeError::ValueWrittenTwice {
                            value: history.value_name(value).to_owned(),
                        });
                    }
                    *writer = op;
                    let Some(key) = operation.key else { continue };
                    self.judged[key.0 as usize] = true;
                    if operation.action == Action::Create && operation.outcome != Outcome::Failed {
                        let create = self.creates[key.0 as usize];
                        if create == NONE {
                            self.creates[key.0 as usize] = op;
                        } else {
                            self.fault(Kind::DuplicateKey, key, op, create, Seen::Value(value));
                        }
                    }
                }
                Action::Delete => {
                    let Some(key) = operation.key else { continue };
                    self.judged[key.0 as usize] = true;
                    let outcome = self.outcome(operation);
                    let deletion = &mut self.deletions[key.0 as usize];
                    match outcome {
                        Outcome::Ok if deletion.acknowledged == NONE => {
                            deletion.acknowledged = op;
                        }
                        Outcome::Ok => {
                            let other = deletion.acknowledged;
                            self.fault(Kind::DoubleDelete, key, op, other, Seen::Absent);
                        }
                        Outcome::Unknown => {
                            let earliest = deletion.earliest_unknown;
                            if earliest == NONE
                                || history.operations()[earliest as usize].start > operation.start
                            {
                                deletion.earliest_unknown = op;
                            }
                        }
                        Outcome::Absent | Outcome::Failed => {}
                    }
                }
                Action::Read | Action::List => {}
            }
        }
        Ok(())
    }

    /// A create whose answer never came has no key; the first sight of its value tells which item
    /// it made.
    fn find_lost_creates(&mut self) {
        let history = self.history;
        let sight = |registers: &mut Self, key: Key, value: Value| {
            let op = registers.writers[value.0 as usize];
            if op == NONE || registers.resolved.contains_key(&op) {
                return;
            }
            let create = &history.operations()[op as usize];
            if create.action == Action::Create && create.key.is_none() {
                registers.resolved.insert(op, key);
                registers.judged[key.0 as usize] = true;
                if registers.creates[key.0 as usize] == NONE {
                    registers.creates[key.0 as usize] = op;
                }
            }
        };
        for operation in history.operations() {
            if let Some(page) = history.page(operation) {
                for entry in history.entries(page) {
                    sight(self, entry.key, entry.value);
                }
            } else if operation.action == Action::Read
                && let (Outcome::Ok, Some(key), Some(value)) =
                    (operation.outcome, operation.key, operation.value)
            {
                sight(self, key, value);
            }
        }
    }

    /// Calls `each` for everything that the history shows of judged items, and the version shown
    /// with it.
    pub(crate) fn observations(&self, mut each: impl FnMut(Observation, Option<u64>)) {
        let history = self.history;
        for (op, operation) in (0_u32..).zip(history.operations()) {
            if let Some(page) = history.page(operation) {
                if self.is_weakened(Weakening::PagesShowNothing) {
                    continue;
                }
                for entry in history
                    .entries(page)
                    .filter(|entry| self.is_judged(entry.key))
                {
                    each(
                        Observation {
                            op,
                            key: entry.key,
                            seen: Seen::Value(entry.value),
                        },
                        entry.version,
                    );
                }
                continue;
            }
            let Some(key) = operation.key.filter(|&key| self.is_judged(key)) else {
                continue;
            };
            if operation.outcome == Outcome::Absent {
                each(
                    Observation {
                        op,
                        key,
                        seen: Seen::Absent,
                    },
                    None,
                );
            } else if operation.action == Action::Read
                && operation.outcome == Outcome::Ok
                && let Some(value) = operation.value
            {
                each(
                    Observation {
                        op,
                        key,
                        seen: Seen::Value(value),
                    },
                    operation.version,
                );
            }
        }
        for &(key, op) in &self.omissions {
            each(
                Observation {
                    op,
                    key,
                    seen: Seen::Absent,
                },
                None,
            );
        }
    }

    fn gather(&mut self) {
        let mut zones = vec![Zone::EMPTY; self.history.value_count()];
        let mut of_key: Vec<(Key, Value)> = Vec::new();
        let mut absences: Vec<(Key, u32)> = Vec::new();
        let mut initial: HashMap<Key, Value> = HashMap::new();
        let mut faults = Vec::new();
        let mut fault = |kind, key, op, other, seen| {
            faults.push(Fault {
                kind,
                key,
                op,
                other,
                seen,
            })
        };

        for (value, &op) in self.writers.iter().enumerate() {
            if op == NONE {
                continue;
            }
            let operation = self.operation(op);
            let outcome = self.outcome(operation);
            let zone = &mut zones[value];
            if matches!(outcome, Outcome::Ok | Outcome::Unknown) {
                zone.starts(operation.start, op);
            }
            if outcome == Outcome::Ok {
                if !self.is_weakened(Weakening::AcknowledgementIsNothing) {
                    zone.ends(operation.end, op);
                }
                zone.version = operation.version;
                zone.version_op = op;
            }
        }

        self.observations(|Observation { op, key, seen }, version| {
            let Seen::Value(value) = seen else {
                absences.push((key, op));
                return;
            };
            let operation = self.operation(op);
            let writer = self.writers[value.0 as usize];
            if writer == NONE {
                // An item that was there before the history began has one value that nobody in it
                // wrote.
                let first = *initial.entry(key).or_insert(value);
                if self.create(key).is_some() || first != value {
                    if !self.is_weakened(Weakening::AnyValue) {
                        fault(Kind::UnwrittenValue, key, op, NONE, seen);
                    }
                    return;
                }
            } else {
                let write = self.operation(writer);
                if self.key_of(writer) != Some(key) {
                    if !self.is_weakened(Weakening::AnyValue) {
                        fault(Kind::UnwrittenValue, key, op, writer, seen);
                    }
                    return;
                }
                if matches!(self.outcome(write), Outcome::Failed | Outcome::Absent) {
                    fault(Kind::FailedWriteSeen, key, op, writer, seen);
                    return;
                }
                if operation.end < write.start {
                    if !self.is_weakened(Weakening::FutureIsFine) {
                        fault(Kind::ValueFromFuture, key, op, writer, seen);
                    }
                    return;
                }
            }
            let zone = &mut zones[value.0 as usize];
            if version.is_some() {
                if zone.version.is_none() {
                    (zone.version, zone.version_op) = (version, op);
                } else if zone.version != version {
                    fault(Kind::ChangedVersion, key, op, zone.version_op, seen);
                }
            }
            zone.reads += 1;
            if self.is_weakened(Weakening::ReadsProveNothing) {
                return;
            }
            zone.starts(operation.start, op);
            zone.ends(operation.end, op);
        });

        for (number, zone) in zones.iter().enumerate() {
            let value = Value(number as u32);
            // What nobody is sure about and nobody saw may as well never have happened.
            let happened = zone.first_end != i64::MAX && zone.last_start_op != NONE;
            let key = match self.writers[number] {
                NONE => initial
                    .iter()
                    .find(|&(_, &first)| first == value)
                    .map(|(&key, _)| key),
                op => self.key_of(op),
            };
            if let (true, Some(key)) = (happened, key) {
                of_key.push((key, value));
            }
        }
        let keys = self.history.key_count();
        self.values = ByKey::new(keys, &of_key);
        self.absences = ByKey::new(keys, &absences);
        self.zones = zones;
        self.faults.append(&mut faults);
    }
}
