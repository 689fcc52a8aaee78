//! The judge's result: what it found in a history, or why it could not judge.

use std::collections::BTreeMap;
use std::time::Duration;

use super::anomaly::{Anomaly, Kind};

/// Why a history cannot be judged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JudgeError {
    /// Two operations wrote the same value, so reads of it do not say which one they saw.
    #[error("the value {value:?} is written by two operations; values must be unique")]
    ValueWrittenTwice {
        /// The value.
        value: String,
    },
    /// There is nothing to judge.
    #[error("the history has no completed operation on any item")]
    Empty,
    /// The time limit came first.
    #[error("judging took longer than {0:?}")]
    OutOfTime(Duration),
    /// The two methods disagree: a bug in the judge.
    #[error("the fast test found a {kind} of item {key}, and the general test does not confirm it")]
    Unconfirmed {
        /// The kind of anomaly that the fast test found.
        kind: Kind,
        /// The item.
        key: String,
    },
}

/// Upper bounds of the staleness histogram's buckets, in milliseconds; the last bucket is open.
pub const STALENESS_BUCKETS_MS: [u64; 16] = [
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000, 300_000,
];

/// The result of judging a history.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// Operations judged.
    pub operations: usize,
    /// Items judged.
    pub items: usize,
    /// Values read, pages' items included.
    pub reads: u64,
    /// Operations whose outcome is unknown.
    pub unknown: u64,
    /// All anomalies, by kind.
    pub counts: BTreeMap<Kind, u64>,
    /// The anomalies explained: the worst of each kind, as many as were asked for.
    pub anomalies: Vec<Anomaly>,
    /// Items with at least one anomaly.
    pub bad_items: usize,
    /// Reads of an overwritten state (a page's item counts as one read).
    pub stale_reads: u64,
    /// The longest time from an overwriting's acknowledgement to a read that overlooked it, in
    /// nanoseconds.
    pub worst_staleness_ns: i64,
    /// Stale reads by staleness, see [`STALENESS_BUCKETS_MS`].
    pub staleness: [u64; STALENESS_BUCKETS_MS.len() + 1],
    /// How long judging took.
    pub elapsed: Duration,
}

impl Findings {
    /// Says whether the history is free of anomalies.
    #[must_use]
    pub fn linearizable(&self) -> bool {
        self.counts.is_empty()
    }

    /// Counts a read of a state that was overwritten `age_ns` before.
    pub(crate) fn stale(&mut self, age_ns: i64) {
        self.stale_reads += 1;
        self.worst_staleness_ns = self.worst_staleness_ns.max(age_ns);
        let ms = u64::try_from(age_ns / 1_000_000).unwrap_or(0);
        self.staleness[STALENESS_BUCKETS_MS.partition_point(|&bound| bound <= ms)] += 1;
    }
}
