//! The lines of a history file, as they are written and read.
//!
//! These types carry the names of the format (see [`history`](super)). They check nothing: that is
//! done when a record is added to a history.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// The value of the header's `history` field that this version writes and reads.
pub const FORMAT: &str = "writethrough-check/1";

/// The kind of an operation: what a process asked for.
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

    /// Returns the name in lower case, as in the history format.
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

    /// Says whether the operation changes an item.
    #[must_use]
    pub fn is_write(self) -> bool {
        matches!(self, Self::Create | Self::Update | Self::Delete)
    }
}

/// What a process learnt about the effect of its operation.
///
/// In Jepsen's words `ok` and `absent` are *ok*, `unknown` is *info* and `failed` is *fail*.
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

/// The creation times (newer, older) strictly between which a page is complete; `None` is an open
/// side.
pub type Window = (Option<i64>, Option<i64>);

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
    pub window: Option<Window>,
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

/// The first line of a history: where it comes from.
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
    /// A remark for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// The faults that were caused meanwhile, by their beginning.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<FaultWindow>,
    /// The longest stall of the recording program itself, if it watched for stalls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_up: Option<Stall>,
}

/// A stretch of time in which the program that recorded the history did not run.
///
/// Its clients, and its links between a service and its servers, seem slow by as much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stall {
    /// When it began, in nanoseconds of the history's clock.
    pub from: i64,
    /// How long it took, in nanoseconds.
    pub length: i64,
}

/// A stretch of time in which a fault was in force.
///
/// The judge does not look at it: a fault excuses no anomaly. It says which answers may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultWindow {
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
