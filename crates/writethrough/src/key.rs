//! Names: what a value, a collection and a page are called in the cache.

use std::collections::HashSet;
use std::fmt;

use writethrough_protocol::EpochRow;

/// What stands around each name in a key of the cache.
#[derive(Debug)]
pub(crate) struct Frame {
    /// The namespace and a slash, or nothing.
    pub(crate) prefix: String,
    /// What every key of an epoch ends in: `@<history>.<epoch>`. Another database, and another history
    /// of this one, never has the same.
    pub(crate) suffix: String,
}

impl Frame {
    /// The frame before an epoch is known.
    pub(crate) fn without_epoch(prefix: String) -> Self {
        Self {
            prefix,
            suffix: String::new(),
        }
    }

    /// The same namespace in this epoch.
    pub(crate) fn in_epoch(&self, row: &EpochRow) -> Self {
        Self {
            prefix: self.prefix.clone(),
            suffix: format!("@{}.{}", row.history, row.number),
        }
    }
}

/// Names one cached value: an entity and an id, as in `item:550e8400-...`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key(String);

impl Key {
    /// The key of this name, `<entity>:<id>`.
    pub(crate) fn new(name: String) -> Self {
        Self(name)
    }

    /// The name without an epoch.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The cache key inside an epoch: `shop/item:<id>@<history>.<epoch>`.
    pub(crate) fn in_epoch(&self, frame: &Frame) -> String {
        // One allocation: this is on the path of every hit.
        [frame.prefix.as_str(), &self.0, &frame.suffix].concat()
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names a collection: the set of rows that its pages (list queries) range over, as in `items`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Collection(String);

impl Collection {
    /// The collection of this name.
    pub(crate) fn new(name: String) -> Self {
        Self(name)
    }

    /// The collection's name.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The key of the stamp: `shop/{items}@<history>.<epoch>`. The braces put it and its pages into one
    /// hash slot.
    pub(crate) fn in_epoch(&self, Frame { prefix, suffix }: &Frame) -> String {
        format!("{prefix}{{{}}}{suffix}", self.0)
    }

    /// The key of one page: `shop/{items}@<history>.<epoch>:<query>`.
    pub(crate) fn page_in_epoch(&self, Frame { prefix, suffix }: &Frame, query: &str) -> String {
        format!("{prefix}{{{}}}{suffix}:{query}", self.0)
    }

    /// The name of one page in any epoch.
    pub(crate) fn page(&self, query: &str) -> String {
        format!("{{{}}}:{query}", self.0)
    }
}

impl fmt::Display for Collection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How many values and collections one write may change. Their announcements and their ends must be
/// through within [`crate::Settings::intent`].
pub const MAX_KEYS: usize = 100_000;

/// Everything that one write changes: single values, and collections whose pages may change. Only
/// named in public, by [`crate::writing::set::Changes`].
#[derive(Debug, Default)]
pub struct WriteSet {
    pub(crate) keys: Vec<Key>,
    pub(crate) collections: Vec<Collection>,
    /// An entity or a collection all of which may change.
    pub(crate) whole: Option<&'static str>,
}

impl WriteSet {
    /// Each name once.
    pub(crate) fn distinct(mut self) -> Self {
        let mut seen = HashSet::new();
        self.keys.retain(|key| seen.insert(key.clone()));
        let mut seen = HashSet::new();
        self.collections.retain(|name| seen.insert(name.clone()));
        self
    }

    pub(crate) fn len(&self) -> usize {
        self.keys.len() + self.collections.len()
    }
}
