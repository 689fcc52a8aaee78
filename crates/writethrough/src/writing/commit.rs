//! What an operation returns so that its write is committed.

use crate::write;

/// Stands for a commit of the write's own transaction, with the values to cache and the write's output.
///
/// Made by [`crate::postgres::Transaction::commit`], [`crate::writing::Done::commit`] and
/// [`crate::writing::Guarded::commit`] alone, so that an operation cannot return one without its guard.
#[derive(Debug)]
#[must_use = "only a commit that is returned is made"]
pub struct Commit<T>(pub(crate) write::Commit<T>);
