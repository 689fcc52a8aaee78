//! Removes from the cache what a writer past the library has changed.

use std::convert::Infallible;

use tokio::time::{Instant, timeout_at};
use writethrough_protocol::{Epoch, Mode};

use super::set::Changes;
use crate::engine::Engine;
use crate::error::{Unavailable, WriteError};
use crate::fence::Guard;
use crate::key::WriteSet;
use crate::write::Commit;
use crate::write_through::WriteThrough;

impl WriteThrough {
    /// Removes a value, or all pages of a list, that a writer past the library has changed: a migration, a
    /// program in another language, a repair by hand. Call it after that writer has committed.
    ///
    /// Between that commit and the return of this call reads may be stale. Where that must not be, the
    /// writer has to go through [`WriteThrough::write`]. It costs a write's two round trips to the cache,
    /// and counts as a write.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; what was cached may still be there then: call it again.
    ///
    /// # Cancellation
    ///
    /// Dropping this future gives up its answer; the removal may go on.
    ///
    /// # Consistency
    ///
    /// When this returns `Ok`, no read that starts afterwards, on any node, sees anything older than what
    /// was committed before the call.
    pub async fn invalidate<C>(&self, changed: C) -> Result<(), WriteError<Infallible>>
    where
        C: Changes + Copy,
    {
        let engine = &self.engine;
        let deadline = Instant::now() + engine.settings.write_deadline;
        loop {
            let mut set = WriteSet::default();
            changed.announce(&mut set);
            let nothing = |guard: Guard| {
                // Nothing is written that a guard would have to protect.
                guard.was_checked();
                std::future::ready(Ok(Commit::new(())))
            };
            let epoch = engine
                .write::<_, Infallible, _, _>(set, nothing)
                .await?
                .epoch;
            if engine.is_newest(epoch, deadline).await {
                return Ok(());
            }
            engine.poll_now.notify_one();
            if Instant::now() >= deadline || !engine.wait_until(deadline, |next| next > epoch).await
            {
                return Err(WriteError::Unavailable(Unavailable::Fence));
            }
        }
    }
}

impl Engine {
    /// Whether no later epoch can hold anything that was loaded before this call.
    async fn is_newest(&self, epoch: Epoch, deadline: Instant) -> bool {
        let is_cached = {
            let view = self.view();
            let row = view.node.row();
            row.is_some_and(|row| matches!(row.mode, Mode::Cached(_)))
        };
        // With the cache in use here, no later epoch is active anywhere. A bypass gives no such promise.
        if is_cached && self.holds_lease(epoch) {
            return true;
        }
        match timeout_at(deadline, self.fence.poll()).await {
            Ok(Ok(sighting)) => sighting.in_its_history && sighting.row.number == epoch,
            _ => false,
        }
    }
}
