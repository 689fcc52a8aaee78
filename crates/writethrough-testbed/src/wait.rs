//! Waiting for a fact, with a bound. Nothing else in this crate waits.

use std::future::Future;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// The longest pause between two looks at a fact.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// Polls `look` until it returns `Some`, at most for `bound`.
///
/// `fact` completes the sentence "waited 5s in vain for ...". One look that takes longer than what is
/// left of the bound is abandoned.
///
/// # Errors
///
/// [`Error::TimedOut`] when the bound is reached.
///
/// # Cancellation
///
/// Dropping the future drops the look that is under way and has no other effect.
pub async fn until<T, F, Fut>(fact: &str, bound: Duration, mut look: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let poll = async {
        let mut pause = Duration::from_millis(1);
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    };
    tokio::time::timeout(bound, poll)
        .await
        .map_err(|_| Error::TimedOut {
            fact: fact.to_owned(),
            bound,
            log: String::new(),
        })
}

/// The same for a destructor, which cannot await: blocks the thread, and tells whether the fact came true.
pub(crate) fn block_until(bound: Duration, mut look: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + bound;
    loop {
        if look() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "a pause between two looks, in a destructor"
        )]
        std::thread::sleep(Duration::from_millis(1));
    }
}
