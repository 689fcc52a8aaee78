//! Rows that cannot be read as items, which lists leave out and the log names once each.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use super::{StoreError, StoreFailure};

/// How many rows that cannot be read a part of the list may lead past, and how many are named.
pub(super) const MOST: usize = 1000;

/// The rows that lists have left out, as they were named in the log.
#[derive(Default)]
pub(super) struct LeftOut(Mutex<HashSet<String>>);

impl LeftOut {
    /// Names a row in the log when it is the first time.
    pub(super) fn name(&self, error: &StoreError) {
        let mut named = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if named.len() < MOST && named.insert(error.to_string()) {
            tracing::warn!("left out of the list: {error}");
        }
    }
}

/// The failure that a row which cannot be read is: nobody's request is at fault.
pub(super) fn unreadable(error: impl fmt::Display) -> StoreError {
    StoreError::new(
        StoreFailure::Internal,
        format!("a row could not be read: {error}"),
    )
}
