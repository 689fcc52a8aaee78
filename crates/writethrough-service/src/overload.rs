//! The limit of requests at once. Above it a request is refused at once: a queue would only make
//! everybody wait.

use std::sync::atomic::{AtomicUsize, Ordering};

use prometheus_client::metrics::gauge::Gauge;

/// Lets a limited number of requests in.
pub struct Admission {
    limit: usize,
    admitted: AtomicUsize,
    gauge: Gauge,
}

/// A request that was let in; leaves when it is dropped.
#[must_use = "the request counts as served only while this is held"]
pub struct Admitted<'a>(&'a Admission);

impl Admission {
    /// Lets `limit` requests in at once and shows their number in `gauge`.
    #[must_use]
    pub fn new(limit: usize, gauge: Gauge) -> Self {
        Self {
            limit,
            admitted: AtomicUsize::new(0),
            gauge,
        }
    }

    /// Lets a request in, unless the limit is reached.
    pub fn enter(&self) -> Option<Admitted<'_>> {
        let before = self.admitted.fetch_add(1, Ordering::Relaxed);
        if before >= self.limit {
            self.admitted.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        self.gauge.inc();
        Some(Admitted(self))
    }

    /// How many requests are in.
    #[must_use]
    pub fn admitted(&self) -> usize {
        self.admitted.load(Ordering::Relaxed)
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        self.0.admitted.fetch_sub(1, Ordering::Relaxed);
        self.0.gauge.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_and_places_come_free() {
        let admission = Admission::new(2, Gauge::default());
        let first = admission.enter();
        let second = admission.enter();
        assert!(first.is_some() && second.is_some() && admission.enter().is_none());
        drop(first);
        assert!(admission.enter().is_some());
        assert_eq!(admission.admitted(), 1);
    }
}
