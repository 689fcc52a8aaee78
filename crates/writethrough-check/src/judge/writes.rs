//! Finds the writes of a history: which operation wrote each value, created each item and deleted
//! it.
//!
//! This is the first of two passes. It looks at no read, except to learn which item was made by a
//! create whose answer never came.

use std::collections::HashMap;

use super::anomaly::Kind;
use super::findings::JudgeError;
use super::observation::{Op, Seen, Violation};
use super::rules::Rules;
use crate::history::{Action, History, Key, Operation, Outcome, Value};

/// The operations that deleted one item, or may have.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Deletion {
    pub(crate) acknowledged: Option<Op>,
    pub(crate) earliest_unknown: Option<Op>,
}

/// The writes of a history.
#[derive(Debug)]
pub(crate) struct Writes<'h> {
    pub(crate) history: &'h History,
    pub(crate) rules: Rules,
    /// The keys of creates whose answer never came, found out from their values.
    resolved: HashMap<Op, Key>,
    /// By value: the operation that wrote it.
    writers: Vec<Option<Op>>,
    /// By key: the operation that created the item.
    creates: Vec<Option<Op>>,
    /// By key.
    deletions: Vec<Deletion>,
    /// By key: something was written to it.
    judged: Vec<bool>,
    /// Ids that were given to two creates, and deletions that were acknowledged twice.
    pub(crate) violations: Vec<Violation>,
}

impl<'h> Writes<'h> {
    /// Finds the writes of a history.
    ///
    /// # Errors
    ///
    /// Fails when two operations write the same value, because reads of it could not be told apart.
    pub(crate) fn find(history: &'h History, rules: Rules) -> Result<Self, JudgeError> {
        let mut writes = Self {
            history,
            rules,
            resolved: HashMap::new(),
            writers: vec![None; history.value_count()],
            creates: vec![None; history.key_count()],
            deletions: vec![Deletion::default(); history.key_count()],
            judged: vec![false; history.key_count()],
            violations: Vec::new(),
        };
        writes.find_writes()?;
        writes.resolve_creates();
        Ok(writes)
    }

    pub(crate) fn operation(&self, op: Op) -> &'h Operation {
        &self.history.operations()[op.index()]
    }

    /// Returns the outcome that an operation is judged by.
    pub(crate) fn outcome(&self, operation: &Operation) -> Outcome {
        self.rules.outcome(operation.outcome)
    }

    /// Returns the item that an operation addressed, also for a create whose answer never came if
    /// its value was seen later.
    pub(crate) fn key_of(&self, op: Op) -> Option<Key> {
        self.operation(op)
            .key
            .or_else(|| self.resolved.get(&op).copied())
    }

    pub(crate) fn writer(&self, value: Value) -> Option<Op> {
        self.writers[value.0 as usize]
    }

    /// Returns the item, other than `key`, to which the value was written.
    pub(crate) fn written_elsewhere(&self, value: Value, key: Key) -> Option<Key> {
        self.key_of(self.writer(value)?)
            .filter(|&other| other != key)
    }

    pub(crate) fn create(&self, key: Key) -> Option<Op> {
        self.creates[key.0 as usize]
    }

    pub(crate) fn deletion(&self, key: Key) -> Deletion {
        self.deletions[key.0 as usize]
    }

    /// Iterates over the keys to which something was written. Of others the history says too little
    /// to judge them.
    pub(crate) fn judged_keys(&self) -> impl Iterator<Item = Key> + '_ {
        self.history.keys().filter(|&key| self.is_judged(key))
    }

    pub(crate) fn is_judged(&self, key: Key) -> bool {
        self.judged[key.0 as usize]
    }

    fn find_writes(&mut self) -> Result<(), JudgeError> {
        for (op, operation) in Op::all(self.history) {
            match operation.action {
                Action::Create | Action::Update => self.add_write(op, operation)?,
                Action::Delete => self.add_delete(op, operation),
                Action::Read | Action::List => {}
            }
        }
        Ok(())
    }

    fn add_write(&mut self, op: Op, operation: &Operation) -> Result<(), JudgeError> {
        let Some(value) = operation.value else {
            return Ok(());
        };
        if self.writers[value.0 as usize].replace(op).is_some() {
            return Err(JudgeError::ValueWrittenTwice {
                value: self.history.value_name(value).to_owned(),
            });
        }
        let Some(key) = operation.key else {
            return Ok(());
        };
        self.judged[key.0 as usize] = true;
        if operation.action == Action::Create && operation.outcome != Outcome::Failed {
            let create = &mut self.creates[key.0 as usize];
            if create.is_none() {
                *create = Some(op);
            } else {
                let other = *create;
                self.violations.push(Violation {
                    kind: Kind::DuplicateKey,
                    key,
                    op,
                    other,
                    seen: Seen::Value(value),
                });
            }
        }
        Ok(())
    }

    fn add_delete(&mut self, op: Op, operation: &Operation) {
        let Some(key) = operation.key else { return };
        self.judged[key.0 as usize] = true;
        let outcome = self.outcome(operation);
        let Deletion {
            acknowledged,
            earliest_unknown,
        } = self.deletion(key);
        match outcome {
            Outcome::Ok if acknowledged.is_none() => {
                self.deletions[key.0 as usize].acknowledged = Some(op);
            }
            Outcome::Ok => self.violations.push(Violation {
                kind: Kind::DoubleDelete,
                key,
                op,
                other: acknowledged,
                seen: Seen::Absent,
            }),
            Outcome::Unknown => {
                if earliest_unknown
                    .is_none_or(|earlier| self.operation(earlier).start > operation.start)
                {
                    self.deletions[key.0 as usize].earliest_unknown = Some(op);
                }
            }
            Outcome::Absent | Outcome::Failed => {}
        }
    }

    /// Finds the keys of creates whose answer never came, from the first read of their value.
    fn resolve_creates(&mut self) {
        let history = self.history;
        for operation in history.operations() {
            if let Some(page) = history.page(operation) {
                for entry in history.entries(page) {
                    self.resolve_create(entry.key, entry.value);
                }
            } else if operation.action == Action::Read
                && let (Outcome::Ok, Some(key), Some(value)) =
                    (operation.outcome, operation.key, operation.value)
            {
                self.resolve_create(key, value);
            }
        }
    }

    fn resolve_create(&mut self, key: Key, value: Value) {
        let Some(op) = self.writer(value) else { return };
        let create = self.operation(op);
        if create.action != Action::Create
            || create.key.is_some()
            || self.resolved.contains_key(&op)
        {
            return;
        }
        self.resolved.insert(op, key);
        self.judged[key.0 as usize] = true;
        self.creates[key.0 as usize].get_or_insert(op);
    }
}
