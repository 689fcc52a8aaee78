//! What every store does, and how it says that it could not.

use std::error::Error as StdError;

use async_trait::async_trait;
use writethrough::{Guard, OpError};

use crate::causes::chain;
use crate::item::{Item, ItemFields, ItemId, NewItem, Page, PageRequest};

/// The operations that are counted and traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reading one item.
    Select,
    /// Reading a part of the list.
    SelectAll,
    /// Adding an item.
    Insert,
    /// Replacing an item.
    Update,
    /// Removing an item.
    Delete,
}

impl Operation {
    /// All operations.
    pub const ALL: [Self; 5] = [
        Self::Select,
        Self::SelectAll,
        Self::Insert,
        Self::Update,
        Self::Delete,
    ];

    /// The name in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Select => "select",
            Self::SelectAll => "select_all",
            Self::Insert => "insert",
            Self::Update => "update",
            Self::Delete => "delete",
        }
    }
}

/// What a caller can do about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreFailure {
    /// The store cannot be reached, or refuses everybody: try again later.
    Unavailable,
    /// The store has no room for one more request now: try again later.
    Overloaded,
    /// A fault of this program or of the schema.
    Internal,
}

/// A failed operation. The message is for the log, never for a client.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    failure: StoreFailure,
    message: String,
}

impl StoreError {
    /// An error with a message of its own.
    pub fn new(failure: StoreFailure, message: impl Into<String>) -> Self {
        Self {
            failure,
            message: message.into(),
        }
    }

    /// An error with the messages of another one and all its causes.
    pub fn from_source(failure: StoreFailure, error: &(dyn StdError + 'static)) -> Self {
        Self {
            failure,
            message: chain(error),
        }
    }

    /// What a caller can do about it.
    #[must_use]
    pub fn failure(&self) -> StoreFailure {
        self.failure
    }
}

/// Which versions of an item a write accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Any.
    None,
    /// One of these.
    VersionIn(Vec<i64>),
    /// Any but these.
    VersionNotIn(Vec<i64>),
}

impl Condition {
    /// Whether the version is accepted.
    #[must_use]
    pub fn accepts(&self, version: i64) -> bool {
        match self {
            Self::None => true,
            Self::VersionIn(versions) => versions.contains(&version),
            Self::VersionNotIn(versions) => !versions.contains(&version),
        }
    }

    /// Accepts what both accept.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::None, one) | (one, Self::None) => one,
            (Self::VersionIn(mut versions), other) | (other, Self::VersionIn(mut versions)) => {
                versions.retain(|version| other.accepts(*version));
                Self::VersionIn(versions)
            }
            (Self::VersionNotIn(mut versions), Self::VersionNotIn(others)) => {
                versions.extend(others);
                Self::VersionNotIn(versions)
            }
        }
    }
}

/// Why a write was refused; nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// There is no such item.
    #[error("there is no such item")]
    Missing,
    /// The item has a version that the condition does not accept.
    #[error("the item has another version")]
    Mismatch,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The outcome of a write: an [`OpError`] says whether it may have had an effect.
pub type WriteResult<T> = Result<T, OpError<Refusal>>;

/// The use of a store's connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolUse {
    /// The most there can be.
    pub limit: usize,
    /// Open ones.
    pub open: usize,
    /// Open ones at work.
    pub used: usize,
    /// Requests waiting for one.
    pub waiting: usize,
    /// Writes that were refused because too many wait for the same item, or one waited too long.
    pub refused_at_row: u64,
    /// Operations that were refused because no connection came free in time.
    pub refused_without_connection: u64,
}

/// Keeps items. Every call is bounded in time.
///
/// # Consistency
///
/// Reads see every write that was acknowledged before they began. A write either happens under its
/// guard's epoch or not at all; without a guard, as in textbook and off mode, it happens in any case.
///
/// # Cancellation
///
/// A dropped read has no effect. A dropped write may or may not happen.
#[async_trait]
pub trait ItemStore: Send + Sync + 'static {
    /// The name of the database as OpenTelemetry writes it: `postgresql` or `sqlite`.
    fn system(&self) -> &'static str;

    /// Reads one item.
    async fn select(&self, id: ItemId) -> Result<Option<Item>, StoreError>;

    /// Reads a part of the list.
    async fn select_page(&self, request: PageRequest) -> Result<Page, StoreError>;

    /// Adds an item.
    async fn insert(&self, guard: Option<Guard>, item: NewItem) -> WriteResult<Item>;

    /// Replaces an item's fields, if its version is accepted.
    async fn update(
        &self,
        guard: Option<Guard>,
        id: ItemId,
        fields: ItemFields,
        condition: Condition,
    ) -> WriteResult<Item>;

    /// Removes an item, if its version is accepted.
    async fn delete(
        &self,
        guard: Option<Guard>,
        id: ItemId,
        condition: Condition,
    ) -> WriteResult<()>;

    /// Asks for a sign of life, within a second or so.
    async fn ping(&self) -> Result<(), StoreError>;

    /// The use of connections now.
    fn pool_use(&self) -> PoolUse;

    /// Why there are fewer connections than the settings ask for, while it is so.
    fn shortage(&self) -> Option<String> {
        None
    }

    /// Lets go of everything. Requests that come later fail.
    async fn close(&self);
}
