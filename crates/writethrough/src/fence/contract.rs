//! What every fence does: it keeps the epoch row, and guards the writes of an epoch.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use tokio::sync::OwnedRwLockReadGuard;
use writethrough_protocol::{Epoch, EpochRow, Proposal, Sighting};

use crate::error::{FenceError, Fenced};

/// The permission to write under one epoch, handed to the operation of a write.
///
/// With [`crate::PostgresFence`] it is only a number: put its [`Guard::parameter`] into the statement or the
/// transaction with `writethrough.guard($1)`. With [`crate::LocalFence`] it holds the epoch in place: keep it
/// until the write has committed, also when that happens on another thread.
#[derive(Debug, Clone)]
#[must_use = "a write is guarded only while this is held or is part of its transaction"]
pub struct Guard {
    epoch: Epoch,
    check: Check,
}

/// Who sees to it that the epoch does not change before the write has committed.
#[derive(Debug, Clone)]
enum Check {
    /// The database, if it is given the number; whether the number was asked for.
    Database(Arc<AtomicBool>),
    /// Whoever holds this.
    Held {
        _row: Arc<OwnedRwLockReadGuard<EpochRow>>,
    },
}

/// What the engine keeps of a guard that it has handed out: with it the epoch is held in place, too.
pub(crate) struct Witness(Check);

impl Witness {
    /// Whether the write can have been guarded.
    pub(crate) fn guarded(&self) -> bool {
        match &self.0 {
            Check::Database(taken) => taken.load(Ordering::Acquire),
            Check::Held { .. } => true,
        }
    }
}

impl Guard {
    /// A guard for an epoch that the database itself checks.
    pub fn in_database(epoch: Epoch) -> Self {
        let check = Check::Database(Arc::default());
        Self { epoch, check }
    }

    /// A guard that keeps the epoch from changing while it is held.
    pub fn holding(epoch: Epoch, held: OwnedRwLockReadGuard<EpochRow>) -> Self {
        let check = Check::Held {
            _row: Arc::new(held),
        };
        Self { epoch, check }
    }

    pub(crate) fn witness(&self) -> Witness {
        Witness(self.check.clone())
    }

    /// Tells that the database has checked the epoch within the write's own transaction.
    pub(crate) fn was_checked(&self) {
        if let Check::Database(taken) = &self.check {
            taken.store(true, Ordering::Release);
        }
    }

    /// What `writethrough.guard` is to check, for a transaction that is not known yet to be guarded by it.
    #[cfg(any(feature = "postgres", feature = "sqlx"))]
    pub(crate) fn to_check(&self) -> Option<i64> {
        match &self.check {
            Check::Database(_) => Some(i64::try_from(self.epoch.0).unwrap_or(i64::MAX)),
            Check::Held { .. } => None,
        }
    }

    /// The epoch that the write was announced in.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The epoch as the parameter of `writethrough.guard($1)`. A write that never asks for it counts as
    /// unguarded ([`crate::Stats::unguarded_writes`]).
    #[must_use]
    pub fn parameter(&self) -> i64 {
        self.was_checked();
        i64::try_from(self.epoch.0).unwrap_or(i64::MAX)
    }
}

/// The keeper of the epoch row: linearizable, shared by all nodes.
///
/// # Cancellation
///
/// A dropped future may or may not have had its effect; a proposal is a compare-and-set, so trying
/// again is safe.
#[async_trait]
pub trait Fence: Send + Sync + 'static {
    /// Reads the row.
    async fn poll(&self) -> Result<Sighting, FenceError>;

    /// Tries to replace the row and returns the row as it is afterwards, whoever won. Waits for
    /// guarded writes that are under way, for a short while only; then fails.
    async fn propose(&self, proposal: &Proposal) -> Result<Sighting, FenceError>;

    /// Marks the row settled if it still has this number.
    async fn mark_settled(&self, epoch: Epoch) -> Result<(), FenceError>;

    /// Tells the others that this node's cache connection is broken.
    async fn report_trouble(&self) -> Result<(), FenceError>;

    /// Why the last poll found that no change of the row would be allowed now; none when it found
    /// nothing of the kind.
    fn refuses_changes(&self) -> Option<FenceError> {
        None
    }

    /// Makes the guard of a write announced in `epoch`.
    ///
    /// # Errors
    ///
    /// [`Fenced`] when the fence already knows that the epoch is over.
    async fn enter(&self, epoch: Epoch) -> Result<Guard, Fenced>;
}

#[async_trait]
impl<F: Fence + ?Sized> Fence for Arc<F> {
    async fn poll(&self) -> Result<Sighting, FenceError> {
        (**self).poll().await
    }

    async fn propose(&self, proposal: &Proposal) -> Result<Sighting, FenceError> {
        (**self).propose(proposal).await
    }

    async fn mark_settled(&self, epoch: Epoch) -> Result<(), FenceError> {
        (**self).mark_settled(epoch).await
    }

    async fn report_trouble(&self) -> Result<(), FenceError> {
        (**self).report_trouble().await
    }

    fn refuses_changes(&self) -> Option<FenceError> {
        (**self).refuses_changes()
    }

    async fn enter(&self, epoch: Epoch) -> Result<Guard, Fenced> {
        (**self).enter(epoch).await
    }
}
