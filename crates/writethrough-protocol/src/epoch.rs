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

/// An id that is compared and shown, and has no other meaning.
macro_rules! id {
    ($(#[$about:meta])* $name:ident) => {
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Wraps the id as the row holds it, or as the server reported it.
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

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id! {
    /// Names one history of the database: a random id made with the epoch row, and made anew when
    /// the database turns out to have another history than the row was written in (a promoted
    /// standby, a restored backup). It is part of every cache key.
    HistoryId
}

id! {
    /// Names one life of one cache server with one data set: a restart, a restore, a failover, and
    /// a data set taken over from another server always give another one.
    ServerId
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
    /// The history of the database that the epoch belongs to.
    pub history: HistoryId,
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
    pub fn first(history: HistoryId, number: Epoch) -> Self {
        Self {
            history,
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
    /// Whether the database that answered has the history in which the row was written: the same
    /// system identifier and timeline.
    pub in_its_history: bool,
    /// How long ago a node last proposed a bypass or reported trouble with its cache connection;
    /// `None` for never. A hint: safety does not rest on it.
    pub trouble_age: Option<Duration>,
}

/// A wish to replace the epoch row: compare-and-set on the number.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Proposal {
    /// The next epoch of the same history.
    Next {
        /// The number that the row must still have.
        from: Epoch,
        /// The mode of the next epoch.
        mode: Mode,
        /// Whether the next epoch is settled from the start: only for a proposer to whom the bypass
        /// epoch `from` is active, since no read lease can be out then.
        settled: bool,
    },
    /// The first epoch of another history, in which the database turned out to be: bypass, not
    /// settled, with a new [`HistoryId`].
    NewHistory {
        /// The number that the row must still have.
        from: Epoch,
        /// The highest number that the proposer knows of.
        above: Epoch,
    },
}

impl Proposal {
    /// How far above all known numbers the first one of a new history is. Epochs that the database
    /// has lost, and that somebody may have seen, are fewer by far.
    pub const LEAP: u64 = 1 << 20;

    /// The number that the row must still have.
    #[must_use]
    pub fn from(&self) -> Epoch {
        match self {
            Self::Next { from, .. } | Self::NewHistory { from, .. } => *from,
        }
    }

    /// The row after the proposal, or `None` when the number has moved on. `history` makes a new id.
    #[must_use]
    pub fn apply(&self, row: &EpochRow, history: impl FnOnce() -> HistoryId) -> Option<EpochRow> {
        if row.number != self.from() {
            return None;
        }
        Some(match self {
            Self::Next {
                from,
                mode,
                settled,
            } => EpochRow {
                history: row.history.clone(),
                number: Epoch(from.0 + 1),
                mode: mode.clone(),
                settled: *settled,
            },
            Self::NewHistory { from, above } => EpochRow {
                history: history(),
                number: Epoch((*from).max(*above).0 + Self::LEAP),
                mode: Mode::Bypass,
                settled: false,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(id: &str) -> HistoryId {
        HistoryId::new(id)
    }

    #[test]
    fn a_proposal_wins_only_from_the_number_it_saw() {
        let row = EpochRow::first(history("h"), Epoch(4));
        let proposal = |from| Proposal::Next {
            from: Epoch(from),
            mode: Mode::Bypass,
            settled: false,
        };
        let fresh = || history("unused");
        assert_eq!(proposal(3).apply(&row, fresh), None);
        assert_eq!(proposal(5).apply(&row, fresh), None);
        let next = proposal(4).apply(&row, fresh).unwrap();
        assert_eq!((next.number, next.settled), (Epoch(5), false));
        assert_eq!(next.history, row.history);
    }

    #[test]
    fn a_new_history_begins_above_all_known_numbers_and_is_not_settled() {
        let mut row = EpochRow::first(history("old"), Epoch(4));
        row.mode = Mode::Cached(ServerId::new("a"));
        let proposal = |from, above| Proposal::NewHistory {
            from: Epoch(from),
            above: Epoch(above),
        };
        let fresh = || history("new");
        assert_eq!(proposal(5, 9).apply(&row, fresh), None);
        let next = proposal(4, 9).apply(&row, fresh).unwrap();
        assert_eq!(next.number, Epoch(9 + Proposal::LEAP));
        assert_eq!((next.history, next.mode), (history("new"), Mode::Bypass));
        assert!(!next.settled);
        let next = proposal(4, 2).apply(&row, fresh).unwrap();
        assert_eq!(next.number, Epoch(4 + Proposal::LEAP));
    }

    #[test]
    fn only_the_current_number_can_be_settled() {
        let mut row = EpochRow::first(history("h"), Epoch(2));
        row.settled = false;
        assert!(!row.clone().settle(Epoch(1)).settled);
        assert!(row.settle(Epoch(2)).settled);
    }
}
