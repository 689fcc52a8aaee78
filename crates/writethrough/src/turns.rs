//! Turns of writers: how many writes of one key, or of one collection, are announced at once.
//!
//! Every announced writer of a key is named in the key's intent, which each begin and end of a write
//! rewrites. A thousand of them at once would keep the cache busy for longer than a command's deadline, and
//! take it from all nodes; the store takes no more at once than it has connections.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::key::WriteSet;

/// The most names of a write that turns are taken at: one that changes more is rare, and would cost more.
const MAX_NAMES: usize = 64;

/// The turns of all names at which somebody has one, or waits.
#[derive(Default)]
pub(crate) struct Turns(Mutex<HashMap<String, Arc<Semaphore>>>);

/// A turn at one name, or the wait for it.
struct Turn {
    turns: Arc<Turns>,
    name: String,
    places: Arc<Semaphore>,
    permit: Option<OwnedSemaphorePermit>,
}

/// A write's turns at all of its names. The next ones come when it is dropped.
pub(crate) struct Held {
    /// Whether it had to wait.
    pub(crate) waited: bool,
    _turns: Vec<Turn>,
}

impl Turns {
    /// Takes a turn at each key of the set, of which a sixteenth of `most` writers have one at once, and
    /// then at each collection, of which `most` have. So writers that wait for each other at a key leave
    /// turns at the collection to others. Always in the same order, so that no two wait for each other.
    ///
    /// # Cancellation
    ///
    /// Gives up what was taken.
    pub(crate) async fn take(self: &Arc<Self>, set: &WriteSet, most: usize) -> Held {
        let mut names: Vec<(bool, &str)> =
            set.keys.iter().map(|key| (false, key.as_str())).collect();
        names.extend(set.collections.iter().map(|name| (true, name.as_str())));
        let mut held = Held {
            waited: false,
            _turns: Vec::new(),
        };
        if names.len() > MAX_NAMES {
            return held;
        }
        names.sort_unstable();
        for (is_collection, name) in names {
            let places = if is_collection {
                most
            } else {
                (most / 16).max(1)
            };
            let mut turn = self.at(name, places);
            let permit = match turn.places.clone().try_acquire_owned() {
                Ok(permit) => Some(permit),
                Err(_) => {
                    held.waited = true;
                    // Nobody closes it.
                    turn.places.clone().acquire_owned().await.ok()
                }
            };
            turn.permit = permit;
            held._turns.push(turn);
        }
        held
    }

    fn at(self: &Arc<Self>, name: &str, places: usize) -> Turn {
        let mut open = self.open();
        let semaphore = open
            .entry(name.to_owned())
            .or_insert_with(|| Arc::new(Semaphore::new(places)));
        Turn {
            turns: self.clone(),
            name: name.to_owned(),
            places: semaphore.clone(),
            permit: None,
        }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<String, Arc<Semaphore>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        drop(self.permit.take());
        let mut open = self.turns.open();
        // This one and the map's: nobody else has a turn there, or waits.
        if Arc::strong_count(&self.places) == 2 {
            open.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt;

    use super::*;
    use crate::key::{Collection, Key};

    fn set(id: &str) -> WriteSet {
        WriteSet {
            keys: vec![Key::new(format!("item:{id}"))],
            collections: vec![Collection::new("items".to_owned())],
            whole: None,
        }
    }

    #[tokio::test]
    async fn writers_of_one_key_leave_turns_at_the_collection_to_others() {
        let turns = Arc::new(Turns::default());
        let first = turns.take(&set("a"), 32).await;
        let second = turns.take(&set("a"), 32).await;
        assert!(!first.waited && !second.waited);
        let of_a = set("a");
        let mut waits: Vec<_> = (0..40).map(|_| Box::pin(turns.take(&of_a, 32))).collect();
        for wait in &mut waits {
            assert!(wait.now_or_never().is_none());
        }
        let mut others = Vec::new();
        for other in 0..30 {
            let taken = turns.take(&set(&other.to_string()), 32).now_or_never();
            others.push(taken.expect("the 32 turns at the collection are not those of one key"));
        }
        assert!(turns.take(&set("z"), 32).now_or_never().is_none());
        drop(first);
        let third = tokio::time::timeout(Duration::from_secs(5), waits.remove(0));
        assert!(third.await.unwrap().waited);
        drop(waits);
        drop(second);
        drop(others);
        assert!(
            turns.open().is_empty(),
            "nothing is kept of names without writers"
        );
    }
}
