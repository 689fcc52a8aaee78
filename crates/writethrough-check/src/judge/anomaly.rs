//! Anomalies: what a linearizable item cannot show.

use std::fmt;

use serde::Serialize;

use crate::history::{Key, Value};

/// The kinds of anomaly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A read returned a value that an acknowledged write had replaced before the read began.
    StaleRead,
    /// The last write of an item was acknowledged, and no read ever returned it, the last one of
    /// all among them.
    LostWrite,
    /// A read returned an older value than a read that had ended before it began.
    NonMonotonicRead,
    /// A read did not find an item that existed and had not been deleted.
    LostItem,
    /// A read found, or an update changed, an item after its deletion was acknowledged or seen.
    ResurrectedItem,
    /// A list left out an item that existed and had not been deleted.
    ListMissesItem,
    /// A list showed an item after its deletion was acknowledged or seen.
    ListShowsDeletedItem,
    /// A read returned a value that was never written to this item.
    UnwrittenValue,
    /// A read returned a value before the write of it was invoked.
    ValueFromFuture,
    /// A read returned the value of a write that the service said it had not made.
    FailedWriteSeen,
    /// Two deletions of one item were both acknowledged.
    DoubleDelete,
    /// Two creates were given the same id.
    DuplicateKey,
    /// Two values of one item carry the same version: one update did not see the other (a lost
    /// update).
    ReusedVersion,
    /// One value was shown with two versions: a write was applied twice, or an answer mixes two
    /// states.
    ChangedVersion,
    /// The version of a later write is lower than that of an earlier one.
    BackwardVersion,
    /// A version is missing that no write of unknown outcome can have taken.
    SkippedVersion,
    /// Operations contradict each other in another way.
    Disorder,
}

impl Kind {
    /// Returns the name, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::StaleRead => "stale-read",
            Self::LostWrite => "lost-write",
            Self::NonMonotonicRead => "non-monotonic-read",
            Self::LostItem => "lost-item",
            Self::ResurrectedItem => "resurrected-item",
            Self::ListMissesItem => "list-misses-item",
            Self::ListShowsDeletedItem => "list-shows-deleted-item",
            Self::UnwrittenValue => "unwritten-value",
            Self::ValueFromFuture => "value-from-future",
            Self::FailedWriteSeen => "failed-write-seen",
            Self::DoubleDelete => "double-delete",
            Self::DuplicateKey => "duplicate-key",
            Self::ReusedVersion => "reused-version",
            Self::ChangedVersion => "changed-version",
            Self::BackwardVersion => "backward-version",
            Self::SkippedVersion => "skipped-version",
            Self::Disorder => "disorder",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The role of an operation in an anomaly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// It wrote, or showed, the older state.
    Older,
    /// It wrote, or showed, the newer state.
    Newer,
    /// It showed what it could not have seen.
    Offender,
}

/// One operation of an anomaly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Index of the operation in the history.
    pub operation: usize,
    /// Its role.
    pub role: Role,
    /// The anomaly is no longer one when this operation is left out.
    pub needed: bool,
    /// What it wrote or showed of the item: a value, or nothing for absence.
    pub value: Option<Value>,
}

/// How stale the reads of an overwritten state were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Staleness {
    /// Reads that returned the overwritten state.
    pub reads: u64,
    /// Time from the overwriting's acknowledgement to the start of the first such read.
    pub first_ns: i64,
    /// The same for the last such read: for so long the old state was served.
    pub worst_ns: i64,
}

/// How an anomaly was confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Confirmation {
    /// The search found no linearization of the operations shown.
    BySearch,
    /// It contradicts what a version or an id is.
    ByDefinition,
}

/// One observation that a linearizable item does not allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anomaly {
    /// Its kind.
    pub kind: Kind,
    /// The item.
    pub key: Key,
    /// What happened, in a sentence or two.
    pub explanation: String,
    /// The operations that show it, by start.
    pub members: Vec<Member>,
    /// How stale the reads were, when an acknowledged write was overlooked.
    pub staleness: Option<Staleness>,
    /// How it was confirmed.
    pub confirmation: Confirmation,
}
