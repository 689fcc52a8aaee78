//! The end of a run, as the faults see it.

use std::time::Duration;

use tokio::sync::watch;

/// Tells that the run has come to its end: faults in force are undone then, and no other begins.
#[derive(Clone, Debug)]
pub(super) struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Makes one, and the sender that brings the end with `true`.
    pub(super) fn channel() -> (watch::Sender<bool>, Self) {
        let (sender, receiver) = watch::channel(false);
        (sender, Self(receiver))
    }

    /// Whether the end has come.
    pub(super) fn has_come(&self) -> bool {
        *self.0.borrow()
    }

    /// Lets time pass; true when the end came first.
    pub(super) async fn comes_within(&mut self, time: Duration) -> bool {
        let stop = self.0.wait_for(|stopped| *stopped);
        tokio::time::timeout(time, stop).await.is_ok()
    }
}
