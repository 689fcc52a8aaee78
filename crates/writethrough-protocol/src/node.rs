//! One node's view of the epoch: observing or active, its read lease, its verified connection.
//!
//! A function of events and of monotonic times that are passed in; no clock is read here.

use std::time::Duration;

use crate::epoch::{Epoch, EpochRow, Mode, Proposal, ServerId, Sighting};
use crate::read::Bypass;

/// A time on this node's monotonic clock, as the time since some fixed start. Times of different
/// nodes are never compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Monotonic(pub Duration);

impl std::ops::Add<Duration> for Monotonic {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0 + duration)
    }
}

impl Monotonic {
    /// How long after `earlier` this is; zero when it is not after.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// The durations that the safety and liveness of epochs rest on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Timing {
    /// How long a poll lets a node believe the cache, counted from the poll's start.
    pub lease: Duration,
    /// How long a node observes a new epoch before it uses it; more than `lease` plus the drift of
    /// the nodes' clocks.
    pub settle: Duration,
    /// How long, beyond `settle`, nobody must have had trouble before the cache is used again. To
    /// propose a bypass is trouble; so a bypass lasts at least this long once it is active, and the
    /// writes that waited for it are made in it and do not run into the next change.
    pub hold_off: Duration,
}

impl Default for Timing {
    /// Lease 1 s, settle 1.25 s, hold-off 1 s.
    fn default() -> Self {
        Self {
            lease: Duration::from_millis(1000),
            settle: Duration::from_millis(1250),
            hold_off: Duration::from_millis(1000),
        }
    }
}

/// What a read may do with the cache now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadPermit {
    /// Look into the cache under this epoch; check [`Node::holds_lease`] again before believing it.
    Cached(Epoch),
    /// Read the store.
    Bypass(Bypass),
}

/// What a write must do first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WritePermit {
    /// Announce the write in the cache, then write guarded by this epoch.
    Cached(Epoch),
    /// Write guarded by this epoch; the cache is not touched.
    Bypass(Epoch),
    /// The cache of this epoch cannot be reached from here: as if announcing had failed.
    Unreachable(Epoch),
    /// The epoch is not active here yet; it will be at this time unless it changes again. `None`:
    /// no epoch has been seen at all.
    Wait(Option<Monotonic>),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Seen {
    row: EpochRow,
    first_seen: Monotonic,
    lease_until: Option<Monotonic>,
}

/// The state of one node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Node {
    timing: Timing,
    seen: Option<Seen>,
    connection: Option<ServerId>,
}

impl Node {
    /// A node that has seen nothing and is connected to nothing.
    #[must_use]
    pub fn new(timing: Timing) -> Self {
        Self {
            timing,
            seen: None,
            connection: None,
        }
    }

    /// The verified connection of this node changed: to a server, or to none.
    pub fn connection_changed(&mut self, server: Option<ServerId>) {
        self.connection = server;
    }

    /// Takes in an epoch row. `poll_started` is when the poll that read it began; `None` when it
    /// came as the answer to a proposal, which gives no lease. Rows older than the newest one seen
    /// are late answers and change nothing. Returns whether the epoch changed.
    pub fn saw(&mut self, row: EpochRow, poll_started: Option<Monotonic>, now: Monotonic) -> bool {
        let changed = match &mut self.seen {
            Some(seen) if row.number < seen.row.number => return false,
            Some(seen) if row.number == seen.row.number => {
                seen.row.settled |= row.settled;
                false
            }
            _ => {
                self.seen = Some(Seen {
                    row,
                    first_seen: now,
                    lease_until: None,
                });
                true
            }
        };
        if let (Some(started), true) = (poll_started, self.is_active(now))
            && let Some(seen) = &mut self.seen
        {
            seen.lease_until = seen.lease_until.max(Some(started + self.timing.lease));
        }
        changed
    }

    /// The newest row seen.
    #[must_use]
    pub fn row(&self) -> Option<&EpochRow> {
        self.seen.as_ref().map(|seen| &seen.row)
    }

    /// The server that this node is connected to.
    #[must_use]
    pub fn connection(&self) -> Option<&ServerId> {
        self.connection.as_ref()
    }

    /// When the read lease runs out; `None` without one.
    #[must_use]
    pub fn lease_until(&self) -> Option<Monotonic> {
        self.seen.as_ref().and_then(|seen| seen.lease_until)
    }

    fn active_at(&self, seen: &Seen) -> Monotonic {
        if seen.row.settled {
            seen.first_seen
        } else {
            seen.first_seen + self.timing.settle
        }
    }

    /// Whether the newest epoch is active here: settled, or observed for long enough.
    #[must_use]
    pub fn is_active(&self, now: Monotonic) -> bool {
        self.seen
            .as_ref()
            .is_some_and(|seen| now >= self.active_at(seen))
    }

    /// The epoch that this node should mark settled in the row: active here, not marked there.
    #[must_use]
    pub fn should_settle(&self, now: Monotonic) -> Option<Epoch> {
        let seen = self.seen.as_ref()?;
        (!seen.row.settled && self.is_active(now)).then_some(seen.row.number)
    }

    /// Whether a read lease for this very epoch is valid now.
    #[must_use]
    pub fn holds_lease(&self, epoch: Epoch, now: Monotonic) -> bool {
        self.seen.as_ref().is_some_and(|seen| {
            seen.row.number == epoch && seen.lease_until.is_some_and(|until| now < until)
        })
    }

    /// What a read that begins now may do.
    #[must_use]
    pub fn read_permit(&self, now: Monotonic) -> ReadPermit {
        let Some(seen) = &self.seen else {
            return ReadPermit::Bypass(Bypass::NoLease);
        };
        let Mode::Cached(server) = &seen.row.mode else {
            return ReadPermit::Bypass(Bypass::Epoch);
        };
        if !self.is_active(now) {
            return ReadPermit::Bypass(Bypass::Observing);
        }
        if !self.holds_lease(seen.row.number, now) {
            return ReadPermit::Bypass(Bypass::NoLease);
        }
        if self.connection.as_ref() != Some(server) {
            return ReadPermit::Bypass(Bypass::NotConnected);
        }
        ReadPermit::Cached(seen.row.number)
    }

    /// What a write that begins now must do. No lease is needed: the guard in the database decides.
    #[must_use]
    pub fn write_permit(&self, now: Monotonic) -> WritePermit {
        let Some(seen) = &self.seen else {
            return WritePermit::Wait(None);
        };
        if !self.is_active(now) {
            return WritePermit::Wait(Some(self.active_at(seen)));
        }
        match &seen.row.mode {
            Mode::Bypass => WritePermit::Bypass(seen.row.number),
            Mode::Cached(server) if self.connection.as_ref() == Some(server) => {
                WritePermit::Cached(seen.row.number)
            }
            Mode::Cached(_) => WritePermit::Unreachable(seen.row.number),
        }
    }

    /// The proposal that ends `epoch` because the cache failed for this node in it.
    #[must_use]
    pub fn bypass_from(epoch: Epoch) -> Proposal {
        Proposal {
            from: epoch,
            mode: Mode::Bypass,
            settled: false,
        }
    }

    /// The change that this node should propose now, apart from a failed command: leave an epoch
    /// whose server it is not connected to, or use the cache again. From one server to another the
    /// way is through a bypass: it costs the writers one wait, where going straight there would cost
    /// those who are still on the old server a second one.
    #[must_use]
    pub fn proposal(&self, sighting: &Sighting, now: Monotonic) -> Option<Proposal> {
        let seen = self.seen.as_ref()?;
        if sighting.row.number != seen.row.number {
            return None;
        }
        let from = seen.row.number;
        match (&seen.row.mode, &self.connection) {
            (Mode::Bypass, Some(here)) => {
                let quiet = self.timing.settle + self.timing.hold_off;
                let well = sighting.trouble_age.is_none_or(|age| age >= quiet);
                (well && self.is_active(now)).then(|| Proposal {
                    from,
                    mode: Mode::Cached(here.clone()),
                    settled: true,
                })
            }
            (Mode::Cached(there), here) if here.as_ref() != Some(there) => {
                Some(Self::bypass_from(from))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Monotonic {
        Monotonic(Duration::from_millis(ms))
    }

    fn server(id: &str) -> ServerId {
        ServerId::new(id)
    }

    fn cached(number: u64, id: &str, settled: bool) -> EpochRow {
        EpochRow {
            number: Epoch(number),
            mode: Mode::Cached(server(id)),
            settled,
        }
    }

    fn bypass(number: u64, settled: bool) -> EpochRow {
        EpochRow {
            number: Epoch(number),
            mode: Mode::Bypass,
            settled,
        }
    }

    fn connected(id: &str) -> Node {
        let mut node = Node::new(Timing::default());
        node.connection_changed(Some(server(id)));
        node
    }

    fn sighting(row: EpochRow, trouble_ms: Option<u64>) -> Sighting {
        Sighting {
            row,
            trouble_age: trouble_ms.map(Duration::from_millis),
        }
    }

    #[test]
    fn a_node_that_has_seen_nothing_neither_trusts_nor_writes() {
        let node = connected("a");
        assert_eq!(node.read_permit(at(0)), ReadPermit::Bypass(Bypass::NoLease));
        assert_eq!(node.write_permit(at(0)), WritePermit::Wait(None));
    }

    #[test]
    fn a_settled_row_is_active_at_first_sight() {
        let mut node = connected("a");
        assert!(node.saw(cached(7, "a", true), Some(at(100)), at(110)));
        assert_eq!(node.read_permit(at(110)), ReadPermit::Cached(Epoch(7)));
        assert_eq!(node.write_permit(at(110)), WritePermit::Cached(Epoch(7)));
    }

    #[test]
    fn the_lease_counts_from_the_start_of_the_poll() {
        let mut node = connected("a");
        node.saw(cached(7, "a", true), Some(at(100)), at(900));
        assert!(node.holds_lease(Epoch(7), at(1099)));
        assert!(!node.holds_lease(Epoch(7), at(1100)));
        assert_eq!(
            node.read_permit(at(1100)),
            ReadPermit::Bypass(Bypass::NoLease)
        );
    }

    #[test]
    fn an_answer_to_a_proposal_gives_no_lease() {
        let mut node = connected("a");
        node.saw(cached(7, "a", true), None, at(100));
        assert_eq!(
            node.read_permit(at(100)),
            ReadPermit::Bypass(Bypass::NoLease)
        );
    }

    #[test]
    fn a_new_unsettled_epoch_is_observed_for_the_settle_time() {
        let mut node = connected("a");
        node.saw(cached(7, "a", true), Some(at(0)), at(0));
        assert!(node.saw(bypass(8, false), Some(at(200)), at(210)));
        assert!(
            !node.holds_lease(Epoch(7), at(210)),
            "the old lease is dropped at once"
        );
        assert_eq!(
            node.write_permit(at(210)),
            WritePermit::Wait(Some(at(1460)))
        );
        assert_eq!(node.should_settle(at(1459)), None);
        assert_eq!(node.write_permit(at(1460)), WritePermit::Bypass(Epoch(8)));
        assert_eq!(node.should_settle(at(1460)), Some(Epoch(8)));
        node.saw(bypass(8, true), Some(at(1500)), at(1500));
        assert_eq!(node.should_settle(at(1500)), None);
    }

    #[test]
    fn an_unsettled_cached_epoch_gives_no_lease_while_observing() {
        let mut node = connected("b");
        node.saw(cached(9, "b", false), Some(at(0)), at(0));
        assert_eq!(
            node.read_permit(at(1000)),
            ReadPermit::Bypass(Bypass::Observing)
        );
        node.saw(cached(9, "b", false), Some(at(1300)), at(1300));
        assert_eq!(node.read_permit(at(1300)), ReadPermit::Cached(Epoch(9)));
    }

    #[test]
    fn a_settled_mark_ends_the_observation() {
        let mut node = connected("a");
        node.saw(bypass(8, false), Some(at(0)), at(0));
        node.saw(bypass(8, true), Some(at(200)), at(200));
        assert_eq!(node.write_permit(at(200)), WritePermit::Bypass(Epoch(8)));
    }

    #[test]
    fn late_answers_change_nothing() {
        let mut node = connected("a");
        node.saw(bypass(8, false), Some(at(100)), at(100));
        assert!(!node.saw(cached(7, "a", true), Some(at(50)), at(120)));
        assert_eq!(node.row(), Some(&bypass(8, false)));
    }

    #[test]
    fn another_server_is_no_cache() {
        let mut node = connected("b");
        node.saw(cached(7, "a", true), Some(at(0)), at(0));
        assert_eq!(
            node.read_permit(at(0)),
            ReadPermit::Bypass(Bypass::NotConnected)
        );
        assert_eq!(node.write_permit(at(0)), WritePermit::Unreachable(Epoch(7)));
    }

    #[test]
    fn a_node_without_connection_proposes_bypass() {
        let mut node = Node::new(Timing::default());
        node.saw(cached(7, "a", true), Some(at(0)), at(0));
        let proposal = node
            .proposal(&sighting(cached(7, "a", true), None), at(1))
            .unwrap();
        assert_eq!(proposal, Node::bypass_from(Epoch(7)));
    }

    #[test]
    fn the_cache_returns_only_from_an_active_bypass_and_when_all_are_well() {
        let mut node = connected("a");
        node.saw(bypass(8, false), Some(at(0)), at(0));
        let well = sighting(bypass(8, false), Some(2250));
        assert_eq!(node.proposal(&well, at(1249)), None, "leases may be out");
        // The bypass was proposed 2249 ms ago, so it was active for less than the hold-off.
        let troubled = sighting(bypass(8, false), Some(2249));
        assert_eq!(node.proposal(&troubled, at(1250)), None);
        let proposal = node.proposal(&well, at(1250)).unwrap();
        assert_eq!(proposal.mode, Mode::Cached(server("a")));
        assert!(proposal.settled);
    }

    #[test]
    fn a_quiet_bypass_ends_at_first_sight() {
        let mut node = connected("a");
        node.saw(bypass(8, true), Some(at(0)), at(0));
        let proposal = node.proposal(&sighting(bypass(8, true), None), at(0));
        assert_eq!(proposal.unwrap().mode, Mode::Cached(server("a")));
    }

    #[test]
    fn a_node_on_another_server_ends_the_epoch() {
        let mut node = connected("b");
        node.saw(cached(7, "a", true), Some(at(0)), at(0));
        let row = sighting(cached(7, "a", true), None);
        assert_eq!(
            node.proposal(&row, at(5000)),
            Some(Node::bypass_from(Epoch(7)))
        );
    }

    #[test]
    fn a_stale_sighting_proposes_nothing() {
        let mut node = connected("a");
        node.saw(bypass(8, true), None, at(0));
        assert_eq!(node.proposal(&sighting(bypass(7, true), None), at(5)), None);
    }
}
