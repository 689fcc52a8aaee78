//! The fence of a single process: the epoch row in memory, the guard a held read lock.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::RwLock;
use tokio::time::timeout;
use writethrough_protocol::{Epoch, EpochRow, HistoryId, Mode, Proposal, Sighting};

use super::{Fence, Guard};
use crate::error::{FenceError, Fenced};

/// How long a proposal waits for writes that are under way; new writes wait behind it meanwhile.
const PROPOSE_WAIT: Duration = Duration::from_millis(100);

/// Keeps the epoch of one process. All writers of the tables must be in this process.
///
/// Its history is a random id, so that a restarted process never trusts what an earlier one left in a
/// shared Redis.
#[derive(Debug)]
pub struct LocalFence {
    row: Arc<RwLock<EpochRow>>,
    trouble: Mutex<Option<Instant>>,
}

impl LocalFence {
    /// A fence in its first epoch: bypass.
    #[must_use]
    pub fn new() -> Self {
        let first = EpochRow::first(new_history(), Epoch(1));
        Self {
            row: Arc::new(RwLock::new(first)),
            trouble: Mutex::new(None),
        }
    }

    fn trouble_now(&self) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn sighting(&self, row: EpochRow) -> Sighting {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        Sighting {
            row,
            in_its_history: true,
            trouble_age: trouble.map(|at| at.elapsed()),
        }
    }
}

fn new_history() -> HistoryId {
    HistoryId::new(format!("{:016x}", fastrand::u64(..)))
}

impl Default for LocalFence {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Fence for LocalFence {
    async fn poll(&self) -> Result<Sighting, FenceError> {
        let row = self.row.read().await.clone();
        Ok(self.sighting(row))
    }

    async fn propose(&self, proposal: &Proposal) -> Result<Sighting, FenceError> {
        let mut row = timeout(PROPOSE_WAIT, self.row.write())
            .await
            .map_err(|_| FenceError::Away("a write under way holds the epoch".into()))?;
        if let Some(next) = proposal.apply(&row, new_history) {
            if next.mode == Mode::Bypass {
                self.trouble_now();
            }
            *row = next;
        }
        Ok(self.sighting(row.clone()))
    }

    async fn mark_settled(&self, epoch: Epoch) -> Result<(), FenceError> {
        let mut row = timeout(PROPOSE_WAIT, self.row.write())
            .await
            .map_err(|_| FenceError::Away("a write under way holds the epoch".into()))?;
        *row = row.clone().settle(epoch);
        Ok(())
    }

    async fn report_trouble(&self) -> Result<(), FenceError> {
        self.trouble_now();
        Ok(())
    }

    async fn enter(&self, epoch: Epoch) -> Result<Guard, Fenced> {
        let held = self.row.clone().read_owned().await;
        if held.number == epoch {
            Ok(Guard::holding(epoch, held))
        } else {
            Err(Fenced(epoch))
        }
    }
}
