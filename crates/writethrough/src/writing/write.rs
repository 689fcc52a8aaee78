//! A write that is described before it begins.

use super::set::Changes;
use crate::write_through::WriteThrough;

impl WriteThrough {
    /// Begins a write of what `changes` names: a key, a collection key, a tuple or a `Vec` of them, or all
    /// values of an entity ([`crate::Entity::whole`]).
    ///
    /// Nothing happens until one of the methods of [`Write`] is awaited. Then the write is announced in the
    /// cache, the operation runs, its values replace the announcement, and the write is acknowledged. An
    /// operation that finds the epoch over has written nothing, and is run again in the next one. One that
    /// refuses leaves its keys empty: the next read of each loads.
    ///
    /// # Runtime
    ///
    /// The write runs on a task of the tokio runtime that polls it first or, when another executor polls
    /// it, of the engine's. It runs to its end unless that runtime ends before or is no longer driven; such
    /// an end is logged and counted ([`crate::Stats::abandoned_writes`]). Then, or when the operation
    /// panics or the process dies, the write's intents keep every reader on the store until they lapse
    /// ([`crate::Settings::intent`]).
    pub fn write<C: Changes>(&self, changes: C) -> Write<'_, C> {
        Write {
            engine: self,
            changes,
            context: (),
        }
    }
}

/// A write that was described and not begun yet.
#[must_use = "a write does nothing until it is given its operation and awaited"]
pub struct Write<'a, C, X = ()> {
    pub(super) engine: &'a WriteThrough,
    pub(super) changes: C,
    pub(super) context: X,
}

impl<C, X> std::fmt::Debug for Write<'_, C, X> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Write").finish_non_exhaustive()
    }
}

impl<'a, C: Changes, X> Write<'a, C, X> {
    /// Gives the write what its operation needs. The operation may run more than once, so the library
    /// clones the context for each attempt.
    pub fn with<Y: Clone + Send + 'static>(self, context: Y) -> Write<'a, C, Y> {
        Write {
            engine: self.engine,
            changes: self.changes,
            context,
        }
    }
}
