//! Histories: what every process invoked, when, and what came back.
//!
//! A history is kept as JSON lines, so that it can be judged again, cut with ordinary tools, or
//! come from a client of your own. The first line is a header, every other line one operation;
//! order does not matter.
//!
//! ```text
//! {"history":"writethrough-check/1","seed":7,"targets":["http://127.0.0.1:8000"]}
//! {"process":0,"op":"create","key":"5f1c...","value":"7-0-1","version":1,"created":1700000000000000000,"start":100,"end":250,"outcome":"ok","status":201}
//! {"process":1,"op":"update","key":"5f1c...","value":"7-1-1","start":300,"end":900,"outcome":"unknown"}
//! {"process":2,"op":"read","key":"5f1c...","value":"7-0-1","version":1,"start":310,"end":350,"outcome":"ok","status":200}
//! {"process":2,"op":"list","window":[null,null],"items":[{"key":"5f1c...","value":"7-0-1","version":1}],"start":360,"end":390,"outcome":"ok"}
//! ```
//!
//! | field | meaning |
//! |---|---|
//! | `process` | number of the client process; a process invokes one operation at a time |
//! | `op` | `create`, `read`, `update`, `delete` or `list` |
//! | `key` | the item's id; absent for a list, and for a create whose answer never came |
//! | `value` | create, update: the value written, used by no other write of the history. read: the value returned |
//! | `version` | the version that the answer carried, if any |
//! | `created` | the item's creation time as the service states it, in nanoseconds; only compared with other such values |
//! | `start`, `end` | invocation and completion on one monotonic clock, in nanoseconds |
//! | `outcome` | `ok`; `absent` (404); `unknown` (it may have taken effect at any time after its start, or never); `failed` (it had no effect) |
//! | `status`, `target` | HTTP status, and index into the header's targets; for people only |
//! | `items` | list: the items of one page, each with `key`, `value`, `version`, `created` |
//! | `window` | list: `[newer, older]`: the page holds *all* items that exist and were created strictly between these two times; `null` is an open side. Left out when the page promises nothing about what is missing from it |
//!
//! The header may list the faults that were in force (see [`FaultWindow`]), and the longest time
//! for which the generator itself did not run (see [`Stall`]).
//!
//! This module knows nothing of HTTP and judges nothing.

mod arena;
mod format;

use std::io::{self, BufRead, Write};

use self::arena::Names;

pub use self::arena::Chunks;
pub use self::format::{
    Action, FORMAT, FaultWindow, Header, Outcome, Record, RecordedItem, Stall, Window,
};

/// An item's id, interned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub(crate) u32);

/// A value, interned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Value(pub(crate) u32);

/// One operation of a [`History`], with its names interned.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// Invocation, in nanoseconds of the history's clock.
    pub start: i64,
    /// Completion, or the moment the process gave up.
    pub end: i64,
    /// Creation time as the service states it, in nanoseconds.
    pub created: Option<i64>,
    /// Version that the answer carried.
    pub version: Option<u64>,
    /// The item, when it is known.
    pub key: Option<Key>,
    /// The value written or read.
    pub value: Option<Value>,
    /// Index of the page, for a list that returned one.
    pub page: Option<u32>,
    /// Number of the process that invoked it.
    pub process: u32,
    /// HTTP status, 0 when there was none.
    pub status: u16,
    /// Index into the header's targets.
    pub target: u16,
    /// What was asked for.
    pub action: Action,
    /// What is known about the effect.
    pub outcome: Outcome,
}

impl Operation {
    /// Returns how long the operation took, in nanoseconds.
    #[must_use]
    pub fn time_taken(&self) -> i64 {
        self.end.saturating_sub(self.start)
    }
}

/// One page of a list.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    /// The two creation times (newer, older) strictly between which the page is complete, if it
    /// promises that.
    pub window: Option<Window>,
    first: u32,
    count: u32,
}

/// One item on a page.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The item.
    pub key: Key,
    /// The value shown.
    pub value: Value,
    /// The version shown, if any.
    pub version: Option<u64>,
    /// Creation time as the service states it.
    pub created: Option<i64>,
}

/// Why a history could not be read.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The file could not be read.
    #[error("the history could not be read")]
    Io(#[from] io::Error),
    /// A line is not what the format says.
    #[error("line {line} of the history: {reason}")]
    Line {
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
}

/// A set of operations with their real-time order.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Where it comes from.
    pub header: Header,
    keys: Names,
    values: Names,
    operations: Chunks<Operation>,
    pages: Chunks<Page>,
    entries: Chunks<Entry>,
}

impl History {
    /// Makes an empty history.
    #[must_use]
    pub fn new(header: Header) -> Self {
        Self {
            header: Header {
                history: FORMAT.to_owned(),
                ..header
            },
            ..Self::default()
        }
    }

    /// Returns the operations in the order in which they were added.
    #[must_use]
    pub fn operations(&self) -> &Chunks<Operation> {
        &self.operations
    }

    /// Iterates over the items of a page.
    pub fn entries(&self, page: Page) -> impl Iterator<Item = &Entry> {
        (page.first..page.first + page.count).map(|entry| &self.entries[entry as usize])
    }

    /// Returns the page of a list operation that was answered.
    #[must_use]
    pub fn page(&self, operation: &Operation) -> Option<Page> {
        operation.page.map(|page| self.pages[page as usize])
    }

    /// Iterates over the keys, in the order in which they were first recorded.
    pub fn keys(&self) -> impl Iterator<Item = Key> + use<> {
        (0..self.keys.len() as u32).map(Key)
    }

    /// Returns the number of different keys.
    #[must_use]
    pub fn key_count(&self) -> usize {
        self.keys.len()
    }

    /// Returns the number of different values.
    #[must_use]
    pub fn value_count(&self) -> usize {
        self.values.len()
    }

    /// Returns the name of a key.
    #[must_use]
    pub fn key_name(&self, key: Key) -> &str {
        self.keys.get(key.0)
    }

    /// Returns the text of a value.
    #[must_use]
    pub fn value_name(&self, value: Value) -> &str {
        self.values.get(value.0)
    }

    /// Adds one operation.
    ///
    /// # Errors
    ///
    /// Fails when the record contradicts the format, and says how.
    pub fn push(&mut self, record: &Record<'_>) -> Result<(), String> {
        if record.end < record.start {
            return Err("it ends before it starts".to_owned());
        }
        let finished = record.outcome == Outcome::Ok;
        let needs_key = match record.action {
            Action::List => false,
            Action::Create => finished,
            Action::Read | Action::Update | Action::Delete => true,
        };
        if needs_key && record.key.is_none() {
            return Err(format!("a {} without a key", record.action.name()));
        }
        let needs_value = match record.action {
            Action::Create | Action::Update => true,
            Action::Read => finished,
            Action::Delete | Action::List => false,
        };
        if needs_value && record.value.is_none() {
            return Err(format!("a {} without a value", record.action.name()));
        }
        if record.outcome == Outcome::Absent
            && matches!(record.action, Action::Create | Action::List)
        {
            return Err(format!(
                "a {} cannot be answered with absent",
                record.action.name()
            ));
        }
        let page = if record.action == Action::List && finished {
            let first = self.entries.len() as u32;
            for item in &record.items {
                let entry = Entry {
                    key: Key(self.keys.intern(&item.key)),
                    value: Value(self.values.intern(&item.value)),
                    version: item.version,
                    created: item.created,
                };
                self.entries.push(entry);
            }
            self.pages.push(Page {
                window: record.window,
                first,
                count: self.entries.len() as u32 - first,
            });
            Some(self.pages.len() as u32 - 1)
        } else {
            None
        };
        self.operations.push(Operation {
            start: record.start,
            end: record.end,
            created: record.created,
            version: record.version,
            key: record.key.as_ref().map(|key| Key(self.keys.intern(key))),
            value: record
                .value
                .as_ref()
                .map(|value| Value(self.values.intern(value))),
            page,
            process: record.process,
            status: record.status,
            target: record.target,
            action: record.action,
            outcome: record.outcome,
        });
        Ok(())
    }

    /// Returns an operation in its recorded form.
    #[must_use]
    pub fn record(&self, operation: &Operation) -> Record<'_> {
        let page = self.page(operation);
        Record {
            process: operation.process,
            action: operation.action,
            key: operation.key.map(|key| self.key_name(key).into()),
            value: operation.value.map(|value| self.value_name(value).into()),
            version: operation.version,
            created: operation.created,
            start: operation.start,
            end: operation.end,
            outcome: operation.outcome,
            status: operation.status,
            target: operation.target,
            window: page.and_then(|page| page.window),
            items: page
                .into_iter()
                .flat_map(|page| self.entries(page))
                .map(|entry| RecordedItem {
                    key: self.key_name(entry.key).into(),
                    value: self.value_name(entry.value).into(),
                    version: entry.version,
                    created: entry.created,
                })
                .collect(),
        }
    }

    /// Reads a history in the format of this module.
    ///
    /// # Errors
    ///
    /// Fails at the first line that the format does not allow, and names it.
    pub fn read(mut from: impl BufRead) -> Result<Self, HistoryError> {
        let mut history = Self::new(Header::default());
        let mut text = String::new();
        let mut line = 0;
        loop {
            text.clear();
            if from.read_line(&mut text)? == 0 {
                return Ok(history);
            }
            line += 1;
            let text = text.trim();
            if text.is_empty() {
                continue;
            }
            let wrong = |reason: String| HistoryError::Line { line, reason };
            if text.starts_with(r#"{"history""#) {
                let header: Header =
                    serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
                if header.history != FORMAT {
                    return Err(wrong(format!(
                        "the format is {:?}, this program reads {FORMAT:?}",
                        header.history
                    )));
                }
                history.header = header;
                continue;
            }
            let record: Record<'_> =
                serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
            history.push(&record).map_err(wrong)?;
        }
    }

    /// Writes the history in the format of this module.
    ///
    /// # Errors
    ///
    /// Fails when the writer fails.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut to, &self.header)?;
        to.write_all(b"\n")?;
        for operation in &self.operations {
            serde_json::to_writer(&mut to, &self.record(operation))?;
            to.write_all(b"\n")?;
        }
        to.flush()
    }
}

/// An operation on the item `x`, for tests; the value is a number.
#[cfg(test)]
pub(crate) fn record(
    process: u32,
    action: Action,
    value: Option<u32>,
    start: i64,
    end: i64,
    outcome: Outcome,
) -> Record<'static> {
    let known = action != Action::Create || outcome == Outcome::Ok;
    Record {
        process,
        action,
        key: known.then(|| "x".into()),
        value: value.map(|value| value.to_string().into()),
        version: None,
        created: None,
        start,
        end,
        outcome,
        status: 0,
        target: 0,
        window: None,
        items: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Strategy, any, prop, prop_assert_eq, proptest};
    use proptest::test_runner::Config as ProptestConfig;

    use super::*;

    const LINES: &str = concat!(
        r#"{"history":"writethrough-check/1","seed":7,"targets":["http://a"],"#,
        r#""faults":[{"fault":"kill-node","target":0,"from":1,"to":2,"down":[0]}]}"#,
        "\n",
        r#"{"process":0,"op":"create","key":"k","value":"a","version":1,"created":5,"start":0,"end":2,"outcome":"ok","status":201}"#,
        "\n",
        r#"{"process":1,"op":"create","value":"b","start":1,"end":9,"outcome":"unknown"}"#,
        "\n",
        r#"{"process":2,"op":"list","start":3,"end":4,"outcome":"ok","window":[null,4],"items":[{"key":"k","value":"a","version":1,"created":5}]}"#,
        "\n",
    );

    #[test]
    fn what_is_read_is_written_again() {
        let history = History::read(LINES.as_bytes()).unwrap();
        assert_eq!(history.operations().len(), 3);
        let mut written = Vec::new();
        history.write(&mut written).unwrap();
        assert_eq!(String::from_utf8(written).unwrap(), LINES);
    }

    #[test]
    fn a_wrong_line_is_named() {
        for (line, word) in [
            (
                r#"{"process":0,"op":"read","start":0,"end":1,"outcome":"ok"}"#,
                "without a key",
            ),
            (
                r#"{"process":0,"op":"read","key":"k","start":0,"end":1,"outcome":"ok"}"#,
                "value",
            ),
            (
                r#"{"process":0,"op":"read","key":"k","start":2,"end":1,"outcome":"failed"}"#,
                "ends",
            ),
            (r#"{"history":"something/9"}"#, "something/9"),
            ("nonsense", "expected"),
        ] {
            let error = History::read(line.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("line 1"), "{error}");
        }
    }

    /// Bytes that are near to a history: its lines, with some bytes replaced, removed or doubled.
    fn damaged_lines() -> impl Strategy<Value = Vec<u8>> {
        let damage = (any::<prop::sample::Index>(), any::<u8>(), 0..3_u8);
        proptest::collection::vec(damage, 0..8).prop_map(|damages| {
            let mut bytes = LINES.as_bytes().to_vec();
            for (place, byte, how) in damages {
                let at = place.index(bytes.len());
                match how {
                    0 => bytes[at] = byte,
                    1 => drop(bytes.remove(at)),
                    _ => bytes.insert(at, byte),
                }
            }
            bytes
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4_000, ..ProptestConfig::default() })]

        #[test]
        fn garbage_is_refused_without_a_panic(bytes: Vec<u8>) {
            let _ = History::read(&bytes[..]);
        }

        /// What is accepted is written and read again unchanged.
        #[test]
        fn damaged_lines_are_refused_or_understood(bytes in damaged_lines()) {
            if let Ok(history) = History::read(&bytes[..]) {
                let mut written = Vec::new();
                history.write(&mut written).unwrap();
                let again = History::read(&written[..]).unwrap();
                let mut twice = Vec::new();
                again.write(&mut twice).unwrap();
                prop_assert_eq!(written, twice);
            }
        }
    }
}
