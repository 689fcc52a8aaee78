//! How well the service answered, in a stretch of a history.

use std::collections::HashMap;
use std::ops::Range;

use serde::Serialize;

use crate::history::{History, Operation, Outcome};
use crate::time::millis;

/// How well one class of operations was answered.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Service {
    /// Operations invoked.
    pub invoked: u64,
    /// Those that were acknowledged, or answered with "no such item".
    pub answered: u64,
    /// `answered` of `invoked`, in percent; 100 when nothing was invoked.
    pub percent: f64,
    /// The longest time that a process waited for an answer, its further attempts included.
    pub longest_stall_ms: f64,
    /// Median time of the answered ones.
    pub p50_ms: f64,
    /// 99th percentile of the answered ones.
    pub p99_ms: f64,
    /// Longest of the answered ones.
    pub max_ms: f64,
}

/// How well reads (lists included) and writes were answered.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Availability {
    /// Reads and lists.
    pub reads: Service,
    /// Creates, updates and deletes.
    pub writes: Service,
}

/// Measures the operations that were invoked in a stretch of time.
#[must_use]
pub fn measure(history: &History, during: Range<i64>) -> Availability {
    measure_some(&by_start(history), during, |_| true)
}

/// The operations of a history in the order of their invocation.
pub(crate) fn by_start(history: &History) -> Vec<&Operation> {
    let mut operations: Vec<_> = history.operations().iter().collect();
    operations.sort_by_key(|operation| operation.start);
    operations
}

/// Measures those of the operations, which are sorted by start, that were invoked in a stretch of
/// time and are `wanted`.
pub(crate) fn measure_some(
    operations: &[&Operation],
    during: Range<i64>,
    wanted: impl Fn(&Operation) -> bool,
) -> Availability {
    let first = operations.partition_point(|one| one.start < during.start);
    let count = operations[first..].partition_point(|one| one.start < during.end);
    let operations = &operations[first..first + count];
    let class = |writes: bool| {
        let mut service = Service::default();
        let mut times = Vec::new();
        let mut longest = 0;
        // By process: when it began to wait for the answer that it still has not got, and when it
        // last gave up.
        let mut waiting: HashMap<u32, (i64, i64)> = HashMap::new();
        for operation in operations
            .iter()
            .filter(|one| one.action.is_write() == writes)
        {
            if !wanted(operation) {
                // What the process waited for until now ends here, or was counted when it was given
                // up.
                if let Some((since, until)) = waiting.remove(&operation.process) {
                    longest = longest.max(until.saturating_sub(since));
                }
                continue;
            }
            service.invoked += 1;
            if matches!(operation.outcome, Outcome::Ok | Outcome::Absent) {
                service.answered += 1;
                times.push(operation.time_taken());
                let since = waiting
                    .remove(&operation.process)
                    .map_or(operation.start, |at| at.0);
                longest = longest.max(operation.end.saturating_sub(since));
            } else {
                waiting
                    .entry(operation.process)
                    .or_insert((operation.start, 0))
                    .1 = operation.end;
            }
        }
        for (since, until) in waiting.into_values() {
            longest = longest.max(until.saturating_sub(since));
        }
        times.sort_unstable();
        service.percent = percent(service.answered, service.invoked, 4);
        service.longest_stall_ms = millis(longest);
        (service.p50_ms, service.p99_ms, service.max_ms) = (
            millis(quantile(&times, 50)),
            millis(quantile(&times, 99)),
            millis(quantile(&times, 100)),
        );
        service
    };
    Availability {
        reads: class(false),
        writes: class(true),
    }
}

/// Computes `answered` of `invoked` in percent, rounded down, so that 100 means all; 100 when
/// nothing was invoked.
pub(crate) fn percent(answered: u64, invoked: u64, decimals: i32) -> f64 {
    if invoked == 0 {
        return 100.0;
    }
    let unit = 10_f64.powi(decimals);
    (answered as f64 * 100.0 * unit / invoked as f64).floor() / unit
}

/// Returns the smallest of the sorted numbers that `percent` of them do not exceed.
pub(crate) fn quantile(sorted: &[i64], percent: usize) -> i64 {
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Action, Header, record};

    #[test]
    fn a_stall_lasts_from_the_first_attempt_to_the_answer() {
        let mut history = History::new(Header::default());
        for (start, end, outcome) in [
            (0, 1_000_000, Outcome::Ok),
            (2_000_000, 4_000_000, Outcome::Unknown),
            (4_000_000, 5_000_000, Outcome::Failed),
            (5_000_000, 9_000_000, Outcome::Ok),
        ] {
            let record = record(1, Action::Update, Some(start as u32), start, end, outcome);
            history.push(&record).unwrap();
        }
        let availability = measure(&history, 0..i64::MAX);
        assert_eq!(availability.writes.longest_stall_ms, 7.0);
        assert_eq!(availability.writes.percent, 50.0);
        assert_eq!(availability.reads.percent, 100.0);
        assert_eq!(measure(&history, 5_000_000..i64::MAX).writes.percent, 100.0);
    }

    #[test]
    fn quantiles_of_few() {
        assert_eq!(quantile(&[], 99), 0);
        assert_eq!(quantile(&[7], 50), 7);
        assert_eq!(quantile(&[1, 2, 3, 4], 50), 2);
        assert_eq!(quantile(&[1, 2, 3, 4], 100), 4);
    }
}
