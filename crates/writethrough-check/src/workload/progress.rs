//! The progress of a workload, for those who wait for it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The progress of a workload, and the way to stop it.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    hits: AtomicU64,
    stopped: AtomicBool,
}

impl Progress {
    /// Returns how many operations were completed.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Returns how many reads of one item the service said it had answered from its cache.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }

    /// Lets the processes finish their current operations and begin no others.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    pub(crate) fn count_operation(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_hit(&self) {
        self.hits.fetch_add(1, Ordering::Relaxed);
    }
}
