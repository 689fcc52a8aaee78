//! The limit of requests at once. Above it a request waits for a place, and for a second at most.
//!
//! Meanwhile nothing more is read from its connection, so clients that ask again as soon as they are
//! refused cannot take the processor from those that are served: a refusal costs nearly as much as a
//! hit.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// The longest that a request waits for a place. As many requests can wait as there are connections.
const ADMISSION_TIMEOUT: Duration = Duration::from_secs(1);

/// Lets a limited number of requests in.
pub struct Admission {
    places: Arc<Semaphore>,
    gauge: Gauge,
}

/// A request that was let in; leaves when it is dropped.
#[must_use = "the request counts as served only while this is held"]
pub struct Admitted {
    _place: OwnedSemaphorePermit,
    gauge: Gauge,
}

impl Admission {
    /// Lets `limit` requests in at once and shows their number in `gauge`.
    #[must_use]
    pub fn new(limit: usize, gauge: Gauge) -> Self {
        Self {
            places: Arc::new(Semaphore::new(limit)),
            gauge,
        }
    }

    /// Lets a request in: those that wait in the order in which they came. `None` when no place came
    /// free in time.
    pub async fn enter(&self) -> Option<Admitted> {
        let place = match self.places.clone().try_acquire_owned() {
            Ok(place) => place,
            Err(_) => timeout(ADMISSION_TIMEOUT, self.places.clone().acquire_owned())
                .await
                .ok()?
                .ok()?,
        };
        self.gauge.inc();
        Some(Admitted {
            _place: place,
            gauge: self.gauge.clone(),
        })
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_limit_holds_and_a_place_that_comes_free_is_given_to_who_waits() {
        let admission = Arc::new(Admission::new(2, Gauge::default()));
        let first = admission.enter().await;
        let second = admission.enter().await;
        assert!(first.is_some() && second.is_some());
        let begun = Instant::now();
        assert!(admission.enter().await.is_none());
        assert_eq!(begun.elapsed().as_secs(), 1, "it has waited, within bounds");

        let waiting = admission.clone();
        let waiting = tokio::spawn(async move { waiting.enter().await });
        tokio::time::sleep(Duration::from_millis(500)).await;
        drop(first);
        let third = waiting.await.unwrap();
        assert!(third.is_some());
        assert_eq!(admission.gauge.get(), 2);
        drop((second, third));
        assert_eq!(admission.gauge.get(), 0);
    }
}
