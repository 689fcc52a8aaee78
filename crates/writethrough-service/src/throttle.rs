//! Log lines that thousands of requests a second may have cause to write.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets one of many equal lines through in each period and counts the others.
pub(crate) struct Throttle {
    period: Duration,
    /// When the last line went through, and how many have not since.
    last: Mutex<(Option<Instant>, u64)>,
}

impl Throttle {
    /// Lets one line through in each `period`.
    #[must_use]
    pub(crate) const fn new(period: Duration) -> Self {
        Self {
            period,
            last: Mutex::new((None, 0)),
        }
    }

    /// Whether the line may be written now; then the number of those that were not since the last one,
    /// this one included.
    pub(crate) fn pass(&self) -> Option<u64> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.1 += 1;
        if last.0.is_some_and(|at| at.elapsed() < self.period) {
            return None;
        }
        last.0 = Some(Instant::now());
        Some(std::mem::take(&mut last.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_goes_through_and_says_how_many_did_not() {
        let seldom = Throttle::new(Duration::from_secs(3600));
        let passed: Vec<_> = (0..3).map(|_| seldom.pass()).collect();
        assert_eq!(passed, [Some(1), None, None]);
        let always = Throttle::new(Duration::ZERO);
        assert_eq!([always.pass(), always.pass()], [Some(1), Some(1)]);
    }
}
