//! The epoch row: which cache contents may be trusted, and by whom it is changed.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The number of an epoch; grows by one with every change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names one life of one cache server (Redis' `run_id`): a restart, a restore or a failover always
/// gives another one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServerId(Arc<str>);

impl ServerId {
    /// Wraps the id that the server reported.
    #[must_use]
    pub fn new(id: impl Into<Arc<str>>) -> Self {
        Self(id.into())
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What an epoch allows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Nobody uses the cache.
    Bypass,
    /// The cache is the server of this id, and no other.
    Cached(ServerId),
}

/// The one row that all nodes agree on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EpochRow {
    /// The epoch's number.
    pub number: Epoch,
    /// What it allows.
    pub mode: Mode,
    /// No read lease on an older epoch can be out any more.
    pub settled: bool,
}

impl EpochRow {
    /// The row that a new database starts with: bypass, and nothing to wait for.
    #[must_use]
    pub fn first(number: Epoch) -> Self {
        Self {
            number,
            mode: Mode::Bypass,
            settled: true,
        }
    }

    /// Marks the row settled if it still has the given number.
    #[must_use]
    pub fn settle(mut self, number: Epoch) -> Self {
        self.settled |= self.number == number;
        self
    }
}

/// The epoch row as one poll saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    /// The row.
    pub row: EpochRow,
    /// How long ago a node last proposed a bypass or reported trouble with its cache connection;
    /// `None` for never. A hint: safety does not rest on it.
    pub trouble_age: Option<Duration>,
}

/// A wish to replace the epoch row: compare-and-set on the number.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Proposal {
    /// The number that the row must still have.
    pub from: Epoch,
    /// The mode of the next epoch.
    pub mode: Mode,
    /// Whether the next epoch is settled from the start: only for a proposer to whom the bypass
    /// epoch `from` is active, since no read lease can be out then.
    pub settled: bool,
}

impl Proposal {
    /// The row after the proposal, or `None` when the number has moved on.
    #[must_use]
    pub fn apply(&self, row: &EpochRow) -> Option<EpochRow> {
        (row.number == self.from).then(|| EpochRow {
            number: Epoch(self.from.0 + 1),
            mode: self.mode.clone(),
            settled: self.settled,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proposal_wins_only_from_the_number_it_saw() {
        let row = EpochRow::first(Epoch(4));
        let proposal = |from| Proposal {
            from: Epoch(from),
            mode: Mode::Bypass,
            settled: false,
        };
        assert_eq!(proposal(3).apply(&row), None);
        assert_eq!(proposal(5).apply(&row), None);
        let next = proposal(4).apply(&row).unwrap();
        assert_eq!((next.number, next.settled), (Epoch(5), false));
    }

    #[test]
    fn only_the_current_number_can_be_settled() {
        let row = EpochRow {
            number: Epoch(2),
            mode: Mode::Bypass,
            settled: false,
        };
        assert!(!row.clone().settle(Epoch(1)).settled);
        assert!(row.settle(Epoch(2)).settled);
    }
}
