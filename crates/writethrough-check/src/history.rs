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
//! The header may list the faults that were in force (see [`Disturbance`]), and say for how long
//! the generator itself was held up (see [`HeldUp`]).
//!
//! This module knows nothing of HTTP and judges nothing.

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufRead, Write};
use std::ops::Index;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The value of the header's `history` field that this version writes and reads.
pub const FORMAT: &str = "writethrough-check/1";

/// What a process asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Create an item; the service chooses its key.
    Create,
    /// Read one item.
    Read,
    /// Replace the value of one item.
    Update,
    /// Delete one item.
    Delete,
    /// Read one page of the collection, newest items first.
    List,
}

impl Action {
    /// Every action, in the order in which reports show them.
    pub const ALL: [Self; 5] = [
        Self::Read,
        Self::List,
        Self::Create,
        Self::Update,
        Self::Delete,
    ];

    /// The lower case name, as in the history format.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Read => "read",
            Self::Update => "update",
            Self::Delete => "delete",
            Self::List => "list",
        }
    }

    /// Whether the action changes an item.
    #[must_use]
    pub fn is_write(self) -> bool {
        matches!(self, Self::Create | Self::Update | Self::Delete)
    }
}

/// What a process learnt about the effect of its operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Acknowledged: it took effect between its start and its end.
    Ok,
    /// The item did not exist at some moment between start and end.
    Absent,
    /// It may have taken effect at any time after its start, or never will.
    Unknown,
    /// It certainly had no effect. For a read: it returned nothing.
    Failed,
}

/// One item on a page, as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedItem<'a> {
    /// The item's id.
    #[serde(borrow)]
    pub key: Cow<'a, str>,
    /// The value shown.
    #[serde(borrow)]
    pub value: Cow<'a, str>,
    /// The version shown, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// Creation time as the service states it, in nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<i64>,
}

/// One operation, as it is recorded: a line of the history format.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record<'a> {
    /// Number of the process that invoked it.
    pub process: u32,
    /// What was asked for.
    #[serde(rename = "op")]
    pub action: Action,
    /// The item's id.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Cow<'a, str>>,
    /// The value written or read.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub value: Option<Cow<'a, str>>,
    /// The version that the answer carried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// Creation time as the service states it, in nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<i64>,
    /// Invocation, in nanoseconds of the history's clock.
    pub start: i64,
    /// Completion, or the moment the process gave up, in nanoseconds of the history's clock.
    pub end: i64,
    /// What is known about the effect.
    pub outcome: Outcome,
    /// HTTP status, 0 when there was none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub status: u16,
    /// Index into the header's targets.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub target: u16,
    /// List: the two creation times between which the page is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<(Option<i64>, Option<i64>)>,
    /// List: the page's items.
    #[serde(borrow, default, skip_serializing_if = "Vec::is_empty")]
    pub items: Vec<RecordedItem<'a>>,
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(number: &u16) -> bool {
    *number == 0
}

/// Where a history comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The name of the format, [`FORMAT`].
    pub history: String,
    /// The generator's seed, if a generator made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// The services that were addressed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<String>,
    /// Fixtures: the kind of anomaly that the judge must find; empty when it must find none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect: Option<String>,
    /// Anything a person wants to know about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// The faults that somebody caused meanwhile, by their beginning.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<Disturbance>,
    /// The longest time for which the recording program itself was held up, if it watched that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_up: Option<HeldUp>,
}

/// A stretch of time in which the program that made the history did not run: its clients, and what
/// it keeps between a service and its servers, seem as slow as that to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldUp {
    /// When it began, in nanoseconds of the history's clock.
    pub from: i64,
    /// How long it took, in nanoseconds.
    pub length: i64,
}

/// A stretch of time in which a fault was in force.
///
/// The judge does not look at it: a fault excuses no anomaly. It says what may be expected of the
/// answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disturbance {
    /// The kind of fault.
    pub fault: String,
    /// The target that it concerned, as an index into the header's targets; none when it concerned
    /// all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<u16>,
    /// When it began, in nanoseconds of the history's clock.
    pub from: i64,
    /// When all of it had been undone.
    pub to: i64,
    /// Targets that could not be expected to answer: down themselves, or out of reach of their
    /// database.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub down: Vec<u16>,
    /// Whether connections to the database were reset, so that a write under way could be left
    /// unanswered.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resets_writes: bool,
}

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

/// One page of a list.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    /// The two creation times (newer, older) strictly between which the page is complete, if it
    /// promises that.
    pub window: Option<(Option<i64>, Option<i64>)>,
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

/// A list that never moves what it holds: to add to it takes the same short time however long it
/// is.
///
/// All processes, and the links of a cluster, share the threads on which a history is recorded. A
/// `Vec` of some million entries that moves to make room would hold them all up for seconds.
#[derive(Clone, Debug)]
pub struct Chunks<T>(Vec<Vec<T>>);

/// Items in a chunk.
const CHUNK: usize = 1 << 14;

impl<T> Default for Chunks<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Chunks<T> {
    fn push(&mut self, item: T) {
        match self.0.last_mut() {
            Some(last) if last.len() < CHUNK => last.push(item),
            _ => self.0.push(vec![item]),
        }
    }

    /// How many items there are.
    #[must_use]
    pub fn len(&self) -> usize {
        let last = self.0.last().map_or(0, Vec::len);
        self.0.len().saturating_sub(1) * CHUNK + last
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The items, in the order in which they were added.
    pub fn iter(&self) -> std::iter::Flatten<std::slice::Iter<'_, Vec<T>>> {
        self.0.iter().flatten()
    }
}

impl<T> Index<usize> for Chunks<T> {
    type Output = T;

    fn index(&self, index: usize) -> &T {
        &self.0[index / CHUNK][index % CHUNK]
    }
}

impl<'a, T> IntoIterator for &'a Chunks<T> {
    type Item = &'a T;
    type IntoIter = std::iter::Flatten<std::slice::Iter<'a, Vec<T>>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Maps that share the names, so that it takes little time when one of them grows.
const MAPS: usize = 32;

#[derive(Clone, Debug, Default)]
struct Names {
    hasher: RandomState,
    numbers: [HashMap<Arc<str>, u32>; MAPS],
    names: Chunks<Arc<str>>,
}

impl Names {
    fn intern(&mut self, name: &str) -> u32 {
        let numbers = &mut self.numbers[self.hasher.hash_one(name) as usize % MAPS];
        if let Some(&number) = numbers.get(name) {
            return number;
        }
        let number = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
        let name: Arc<str> = name.into();
        self.names.push(name.clone());
        numbers.insert(name, number);
        number
    }
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
    /// An empty history.
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

    /// The operations, in the order in which they were added.
    #[must_use]
    pub fn operations(&self) -> &Chunks<Operation> {
        &self.operations
    }

    /// The items of a page.
    pub fn entries(&self, page: Page) -> impl Iterator<Item = &Entry> {
        (page.first..page.first + page.count).map(|entry| &self.entries[entry as usize])
    }

    /// The page of a list operation that returned one.
    #[must_use]
    pub fn page(&self, operation: &Operation) -> Option<Page> {
        operation.page.map(|page| self.pages[page as usize])
    }

    /// Number of different keys.
    #[must_use]
    pub fn key_count(&self) -> usize {
        self.keys.names.len()
    }

    /// Number of different values.
    #[must_use]
    pub fn value_count(&self) -> usize {
        self.values.names.len()
    }

    /// The name of a key.
    #[must_use]
    pub fn key_name(&self, key: Key) -> &str {
        &self.keys.names[key.0 as usize]
    }

    /// The text of a value.
    #[must_use]
    pub fn value_name(&self, value: Value) -> &str {
        &self.values.names[value.0 as usize]
    }

    /// Adds one operation.
    ///
    /// # Errors
    ///
    /// Says what is missing when the record contradicts the format.
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

    /// The recorded form of an operation.
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
    /// Names the first line that the format does not allow.
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
    /// When the writer fails.
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
    fn chunks_keep_order_and_positions() {
        let mut chunks = Chunks::default();
        assert!(chunks.is_empty());
        let count = 2 * CHUNK + 3;
        for number in 0..count {
            assert_eq!(chunks.len(), number);
            chunks.push(number);
        }
        assert!(chunks.iter().copied().eq(0..count));
        assert!((0..count).all(|number| chunks[number] == number));
        let first = &raw const chunks[0];
        (0..CHUNK).for_each(|_| chunks.push(0));
        assert_eq!(first, &raw const chunks[0], "it has moved");
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
}
