//! One walk over the cache at a time, whoever asks for it. Knows no cache.

use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};

type Walk<T> = Shared<BoxFuture<'static, T>>;

/// Lets one walk run, and everybody who asks meanwhile share the next: the one under way may be past
/// what was stored since it began.
pub(crate) struct Clearing<T> {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// The walk that has not begun.
    next: Arc<Mutex<Option<Walk<T>>>>,
}

impl<T: Clone + Send + Sync + 'static> Clearing<T> {
    pub(crate) fn new() -> Self {
        Self {
            turn: Arc::default(),
            next: Arc::default(),
        }
    }

    /// Shares a walk that begins after this call, or starts one.
    ///
    /// # Cancellation
    ///
    /// A walk goes on while somebody waits for it, and ends where it is with the last one.
    pub(crate) async fn run<F>(&self, walk: impl FnOnce() -> F + Send + 'static) -> T
    where
        F: Future<Output = T> + Send,
    {
        let shared = self.join(walk);
        shared.await
    }

    fn join<F>(&self, walk: impl FnOnce() -> F + Send + 'static) -> Walk<T>
    where
        F: Future<Output = T> + Send,
    {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(forming) = &*next {
            return forming.clone();
        }
        let turn = self.turn.clone();
        // Weak: the walk is kept in what it empties.
        let place = Arc::downgrade(&self.next);
        let forming = async move {
            let _turn = turn.lock().await;
            if let Some(place) = place.upgrade() {
                place.lock().unwrap_or_else(PoisonError::into_inner).take();
            }
            walk().await
        };
        let forming = forming.boxed().shared();
        *next = Some(forming.clone());
        forming
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use tokio::sync::Semaphore;
    use tokio::time::timeout;

    use super::*;

    /// Walks that end one at a time, when they are let.
    struct Walks {
        clearing: Clearing<usize>,
        begun: Arc<AtomicUsize>,
        let_end: Arc<Semaphore>,
    }

    impl Walks {
        fn new() -> Self {
            Self {
                clearing: Clearing::new(),
                begun: Arc::default(),
                let_end: Arc::new(Semaphore::new(0)),
            }
        }

        /// Returns which walk it shared; within a time, so that a test ends.
        fn ask(&self) -> BoxFuture<'_, usize> {
            let (begun, let_end) = (self.begun.clone(), self.let_end.clone());
            let walk = move || async move {
                let number = begun.fetch_add(1, Ordering::Relaxed) + 1;
                if let Ok(permit) = let_end.acquire().await {
                    permit.forget();
                }
                number
            };
            let shared = timeout(Duration::from_secs(10), self.clearing.run(walk));
            shared.map(|number| number.expect("it ends")).boxed()
        }
    }

    #[tokio::test]
    async fn one_runs_and_those_who_come_meanwhile_share_the_next() {
        let walks = Walks::new();
        let mut first = walks.ask();
        assert!(futures::poll!(&mut first).is_pending());
        let mut others: Vec<_> = (0..100).map(|_| walks.ask()).collect();
        for other in &mut others {
            assert!(futures::poll!(other).is_pending());
        }
        assert_eq!(walks.begun.load(Ordering::Relaxed), 1);
        walks.let_end.add_permits(1);
        assert_eq!(first.await, 1);
        for other in &mut others {
            assert!(futures::poll!(other).is_pending());
        }
        walks.let_end.add_permits(1);
        for other in others {
            assert_eq!(other.await, 2);
        }
        walks.let_end.add_permits(1);
        assert_eq!(walks.ask().await, 3);
    }

    #[tokio::test]
    async fn whoever_goes_away_holds_nobody_up() {
        let walks = Walks::new();
        let mut running = walks.ask();
        assert!(futures::poll!(&mut running).is_pending());
        let mut forming = walks.ask();
        assert!(futures::poll!(&mut forming).is_pending());
        // The one that forms has its place in the queue, and nobody who waits for it.
        drop(forming);
        drop(running);
        walks.let_end.add_permits(1);
        assert_eq!(walks.ask().await, 2);
        let place = Arc::downgrade(&walks.clearing.next);
        let (mut running, mut forming) = (walks.ask(), walks.ask());
        assert!(futures::poll!(&mut running).is_pending());
        assert!(futures::poll!(&mut forming).is_pending());
        drop((running, forming));
        drop(walks);
        assert!(place.upgrade().is_none());
    }
}
