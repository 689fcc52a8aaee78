//! What single operations show, in the words that all parts of the judge share.

use std::num::NonZeroU32;

use super::anomaly::Kind;
use crate::history::{History, Key, Operation, Value};

/// The number of an operation in its history.
///
/// Never zero inside, so that an `Option<Op>` takes no more room than an `Op`: there is one for
/// each value, and long histories have millions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Op(NonZeroU32);

impl Op {
    /// Iterates over the operations of a history with their numbers.
    pub(crate) fn all(history: &History) -> impl Iterator<Item = (Self, &Operation)> {
        (0_u32..)
            .map(|index| Self(NonZeroU32::MIN.saturating_add(index)))
            .zip(history.operations())
    }

    /// Returns the operation's place in its history, counted from 0.
    pub(crate) fn index(self) -> usize {
        self.0.get() as usize - 1
    }
}

/// A time of the history's clock, and the operation that began or ended then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment {
    pub(crate) at: i64,
    pub(crate) op: Op,
}

/// The state of an item, as one operation showed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Value(Value),
    Absent,
}

impl Seen {
    /// Returns the value; absence has none.
    pub(crate) fn value(self) -> Option<Value> {
        match self {
            Self::Value(value) => Some(value),
            Self::Absent => None,
        }
    }
}

impl From<Option<Value>> for Seen {
    fn from(value: Option<Value>) -> Self {
        value.map_or(Self::Absent, Self::Value)
    }
}

/// One operation that showed the state of one item.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Observation {
    pub(crate) op: Op,
    pub(crate) key: Key,
    pub(crate) seen: Seen,
}

/// An anomaly that one operation, or two, show by themselves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Violation {
    pub(crate) kind: Kind,
    pub(crate) key: Key,
    /// The operation that cannot have shown what it did.
    pub(crate) op: Op,
    /// The operation that it contradicts.
    pub(crate) other: Option<Op>,
    pub(crate) seen: Seen,
}
