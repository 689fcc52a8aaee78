//! The loads of this process that are under way, found by the token of their fill lease.
//!
//! A reader may share a load only when it has seen the load's lease (or, for a page, its stamp)
//! intact after it began itself; the token is the proof, so the token is the key.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use writethrough_protocol::{Payload, Token};

type Name = (Token, Option<String>);
type Outcome = watch::Receiver<Option<Payload>>;

/// The loads under way, and how many readers wait for one of them.
#[derive(Default)]
pub(crate) struct Loads {
    under_way: Mutex<HashMap<Name, Outcome>>,
    waiting: AtomicU64,
}

impl Loads {
    fn lock(&self) -> MutexGuard<'_, HashMap<Name, Outcome>> {
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces a load; `page` names the query when the token is a collection's.
    pub(crate) fn lead(self: &Arc<Self>, token: Token, page: Option<&str>) -> Leader {
        let name = (token, page.map(str::to_owned));
        let (sender, receiver) = watch::channel(None);
        self.lock().insert(name.clone(), receiver);
        Leader {
            loads: self.clone(),
            name,
            sender,
        }
    }

    /// The outcome of the load under this token, if this process is doing it.
    pub(crate) fn follow(&self, token: Token, page: Option<&str>) -> Option<Outcome> {
        self.lock().get(&(token, page.map(str::to_owned))).cloned()
    }

    /// Waits for a followed load until `give_up`; `None` when it was given up, here or there.
    pub(crate) async fn outcome(&self, mut load: Outcome, give_up: Instant) -> Option<Payload> {
        let _waiting = Waiting::new(&self.waiting);
        let loaded = timeout_at(give_up, load.wait_for(Option::is_some)).await;
        loaded.ok()?.ok().and_then(|payload| payload.clone())
    }

    /// How many readers wait for the load of another now.
    pub(crate) fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }
}

/// Counts one waiting reader, however its wait ends.
struct Waiting<'a>(&'a AtomicU64);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The duty to say how a load ended. Dropped without a word, its followers look again.
pub(crate) struct Leader {
    loads: Arc<Loads>,
    name: Name,
    sender: watch::Sender<Option<Payload>>,
}

impl Leader {
    /// Hands the loaded value to everyone who follows.
    pub(crate) fn publish(&self, payload: Payload) {
        self.sender.send_replace(Some(payload));
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.loads.lock().remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[tokio::test]
    async fn followers_get_the_outcome_or_learn_that_there_is_none() {
        let loads = Arc::new(Loads::default());
        let leader = loads.lead(Token(1), None);
        assert!(loads.follow(Token(2), None).is_none());
        assert!(loads.follow(Token(1), Some("page")).is_none());
        let follower = loads.follow(Token(1), None).unwrap();
        leader.publish(Some(Bytes::from_static(b"v")));
        drop(leader);
        let give_up = Instant::now() + std::time::Duration::from_secs(10);
        let outcome = loads.outcome(follower, give_up).await;
        assert_eq!(outcome, Some(Some(Bytes::from_static(b"v"))));
        assert!(loads.follow(Token(1), None).is_none());

        let leader = loads.lead(Token(3), None);
        let follower = loads.follow(Token(3), None).unwrap();
        drop(leader);
        assert_eq!(loads.outcome(follower, give_up).await, None);
        assert_eq!(loads.waiting(), 0);
    }
}
