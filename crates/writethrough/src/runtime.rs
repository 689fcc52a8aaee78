//! The tokio runtime that the engine was started in, for callers that are polled elsewhere.
//!
//! The engine's tasks and timers need one. A caller that is polled by another executor borrows it.

use std::future::poll_fn;
use std::pin::Pin;

use tokio::runtime::Handle;

/// There is no tokio runtime here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no tokio runtime here: call this inside of one, as under `#[tokio::main]` or after \
     `Runtime::enter`"
)]
pub struct NoRuntime;

/// The runtime of the caller.
pub(crate) fn current() -> Result<Handle, NoRuntime> {
    Handle::try_current().map_err(|_| NoRuntime)
}

/// Polls `work` inside of the caller's runtime or, when it has none, of `runtime`. Takes it pinned: the
/// future of a read is large to move.
pub(crate) async fn within<F: Future>(runtime: &Handle, mut work: Pin<&mut F>) -> F::Output {
    // The first question is the cheaper one, and most callers are tasks of a runtime.
    let outside = tokio::task::try_id().is_none() && Handle::try_current().is_err();
    poll_fn(|context| {
        let _entered = outside.then(|| runtime.enter());
        work.as_mut().poll(context)
    })
    .await
}
