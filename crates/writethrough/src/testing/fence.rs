//! A fence in memory that is away, or broken, or ends its epoch, when its test says so. What it keeps is
//! kept by [`LocalFence`].

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use writethrough_protocol::{Epoch, Node, Proposal, Sighting};

use crate::error::{FenceError, Fenced};
use crate::fence::{Fence, Guard, LocalFence};

/// A fence in memory whose failures and epochs a test commands.
///
/// A clone is another handle of the same fence: give one to [`crate::WriteThrough::builder`] and keep one.
#[derive(Debug, Clone, Default)]
pub struct TestFence {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    fence: LocalFence,
    /// Why it cannot be asked now.
    fault: Mutex<Option<FenceError>>,
}

impl TestFence {
    /// Makes a fence that is well, in its first epoch: bypass.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the fence unreachable, as a database that is down: [`FenceError::Away`]. A write whose epoch is
    /// known to its engine still gets its guard, as it does from a fence in a database.
    pub fn away(&self) {
        let reason = "the test has taken the fence away".to_owned();
        self.set(Some(FenceError::Away(reason)));
    }

    /// Makes the fence unusable until somebody mends it, as when its table is gone: [`FenceError::Broken`].
    pub fn broken(&self, reason: impl Into<String>) {
        self.set(Some(FenceError::Broken(reason.into())));
    }

    /// Ends what [`TestFence::away`] or [`TestFence::broken`] began.
    pub fn back(&self) {
        self.set(None);
    }

    /// Ends the epoch now, as another node does that has lost the cache, and returns the next one, a bypass.
    /// Guards of the old epoch are refused from here on. Works while the fence is away, too.
    ///
    /// Waits for writes that hold a guard, so an operation must not await it.
    ///
    /// # Cancellation
    ///
    /// The epoch has ended, or it has not.
    pub async fn end_epoch(&self) -> Epoch {
        let fence = &self.shared.fence;
        loop {
            // It fails after a while, when a write holds a guard.
            if let Ok(before) = fence.poll().await
                && let ending = Node::bypass_from(before.row.number)
                && let Ok(after) = fence.propose(&ending).await
            {
                return after.row.number;
            }
        }
    }

    fn set(&self, fault: Option<FenceError>) {
        let current = self.shared.fault.lock();
        *current.unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// The fence, if it can be asked now.
    fn reach(&self) -> Result<&LocalFence, FenceError> {
        let fault = self.shared.fault.lock();
        match &*fault.unwrap_or_else(PoisonError::into_inner) {
            None => Ok(&self.shared.fence),
            Some(error) => Err(error.clone()),
        }
    }
}

#[async_trait]
impl Fence for TestFence {
    async fn poll(&self) -> Result<Sighting, FenceError> {
        self.reach()?.poll().await
    }

    async fn propose(&self, proposal: &Proposal) -> Result<Sighting, FenceError> {
        self.reach()?.propose(proposal).await
    }

    async fn mark_settled(&self, epoch: Epoch) -> Result<(), FenceError> {
        self.reach()?.mark_settled(epoch).await
    }

    async fn report_trouble(&self) -> Result<(), FenceError> {
        self.reach()?.report_trouble().await
    }

    async fn enter(&self, epoch: Epoch) -> Result<Guard, Fenced> {
        self.shared.fence.enter(epoch).await
    }
}
