//! The write path that users see: what a write changes, and who may make its commit.
//!
//! [`WriteThrough::write`] takes what the write changes and hands its operation, for each attempt, a slot
//! for each key, a copy of the context, and the one thing that can make a [`Commit`]:
//!
//! - [`Write::transaction`] (with the feature of a driver): a transaction of it, which is guarded already;
//! - [`Write::statement`] (with the feature `postgres`): a single statement, guarded and committed in its own
//!   round trip;
//! - [`Write::guarded`]: the bare guard, for stores that the library has no driver for.

use crate::error::{OpError, WriteError};
use crate::write::{self, Written};
use crate::write_through::WriteThrough;

mod guarded;
mod invalidate;
pub mod set;
#[cfg(feature = "postgres")]
mod statement;
#[cfg(any(feature = "postgres", feature = "sqlx"))]
pub(crate) mod text;
#[cfg(any(feature = "postgres", feature = "sqlx"))]
mod transaction;

pub use guarded::Guarded;
#[cfg(feature = "postgres")]
pub use statement::{Done, Performed, Pipeline};
#[cfg(any(feature = "postgres", feature = "sqlx"))]
pub use transaction::{Begin, Driver, Ended, Lent};

use set::Changes;

#[cfg(any(feature = "postgres", feature = "sqlx"))]
pub(crate) mod sealed {
    /// Keeps the drivers to those of this library.
    pub trait Sealed {}
}

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

/// Stands for a commit of the write's own transaction, with the values to cache and the write's output.
///
/// Made by [`crate::postgres::Transaction::commit`], [`Done::commit`] and [`Guarded::commit`] alone, so that
/// an operation cannot return one without its guard.
#[derive(Debug)]
#[must_use = "only a commit that is returned is made"]
pub struct Commit<T>(pub(crate) write::Commit<T>);

/// A write that was described and not begun yet.
#[must_use = "a write does nothing until it is given its operation and awaited"]
pub struct Write<'a, C, X = ()> {
    engine: &'a WriteThrough,
    changes: C,
    context: X,
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
