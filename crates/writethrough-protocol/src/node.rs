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
    /// no epoch has been seen that can be believed.
    Wait(Option<Monotonic>),
}

/// Why a node believes no epoch row that it reads now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Astray {
    /// The database has another history than the row was written in: a standby was promoted, or a
    /// backup restored.
    OtherHistory,
    /// The number went back: the database has lost epochs that this node has seen.
    WentBack {
        /// The newest number seen.
        seen: Epoch,
        /// The number that the row has now.
        found: Epoch,
    },
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
    astray: Option<Astray>,
    connection: Option<ServerId>,
}

impl Node {
    /// A node that has seen nothing and is connected to nothing.
    #[must_use]
    pub fn new(timing: Timing) -> Self {
        Self {
            timing,
            seen: None,
            astray: None,
            connection: None,
        }
    }

    /// The verified connection of this node changed: to a server, or to none.
    pub fn connection_changed(&mut self, server: Option<ServerId>) {
        self.connection = server;
    }

    /// Takes in a sighting of the epoch row. `poll_started` is when the poll that read it began;
    /// `None` when it came as the answer to a proposal, which gives no lease. Returns whether the
    /// epoch changed.
    ///
    /// A row older than the newest one seen is a late answer and changes nothing, unless its poll
    /// began after that one was seen: then the database has gone back. A row of another history, or
    /// one that went back, is not believed, and neither is what was believed before: there is no read
    /// lease, and no write begins, until a row comes that can be believed.
    pub fn saw(
        &mut self,
        sighting: &Sighting,
        poll_started: Option<Monotonic>,
        now: Monotonic,
    ) -> bool {
        let row = &sighting.row;
        if let Some(seen) = &mut self.seen {
            let (known, found) = (&seen.row, row.number);
            let older =
                found < known.number || (found == known.number && row.history != known.history);
            if older {
                if poll_started.is_some_and(|started| started > seen.first_seen) {
                    self.astray = Some(Astray::WentBack {
                        seen: known.number,
                        found,
                    });
                    seen.lease_until = None;
                }
                return false;
            }
        }
        if !sighting.in_its_history {
            self.astray = Some(Astray::OtherHistory);
            if let Some(seen) = &mut self.seen {
                seen.lease_until = None;
            }
            return false;
        }
        self.astray = None;
        let changed = match &mut self.seen {
            Some(seen) if row.number == seen.row.number => {
                seen.row.settled |= row.settled;
                false
            }
            _ => {
                self.seen = Some(Seen {
                    row: row.clone(),
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

    /// Why the row that was read last is not believed; `None` when it is.
    #[must_use]
    pub fn astray(&self) -> Option<Astray> {
        self.astray
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
        let seen = self.seen.as_ref();
        self.astray.is_none() && seen.is_some_and(|seen| now >= self.active_at(seen))
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
        let (Some(seen), None) = (&self.seen, self.astray) else {
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
        let (Some(seen), None) = (&self.seen, self.astray) else {
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
        Proposal::Next {
            from: epoch,
            mode: Mode::Bypass,
            settled: false,
        }
    }

    /// The change that this node should propose now, apart from a failed command: leave an epoch
    /// whose server it is not connected to, or use the cache again. From one server to another the
    /// way is through a bypass: it costs the writers one wait, where going straight there would cost
    /// those who are still on the old server a second one. A row of another history, or one that
    /// went back, is replaced whatever becomes of the cache.
    #[must_use]
    pub fn proposal(&self, sighting: &Sighting, now: Monotonic) -> Option<Proposal> {
        if self.astray.is_some() {
            let from = sighting.row.number;
            let seen = self.seen.as_ref().map_or(from, |seen| seen.row.number);
            return Some(Proposal::NewHistory { from, above: seen });
        }
        let seen = self.seen.as_ref()?;
        if sighting.row.number != seen.row.number {
            return None;
        }
        let from = seen.row.number;
        match (&seen.row.mode, &self.connection) {
            (Mode::Bypass, Some(here)) => {
                let quiet = self.timing.settle + self.timing.hold_off;
                let well = sighting.trouble_age.is_none_or(|age| age >= quiet);
                (well && self.is_active(now)).then(|| Proposal::Next {
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
    use crate::epoch::HistoryId;

    fn at(ms: u64) -> Monotonic {
        Monotonic(Duration::from_millis(ms))
    }

    fn server(id: &str) -> ServerId {
        ServerId::new(id)
    }

    fn history() -> HistoryId {
        HistoryId::new("h")
    }

    fn cached(number: u64, id: &str, settled: bool) -> EpochRow {
        EpochRow {
            history: history(),
            number: Epoch(number),
            mode: Mode::Cached(server(id)),
            settled,
        }
    }

    fn bypass(number: u64, settled: bool) -> EpochRow {
        EpochRow {
            history: history(),
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
            in_its_history: true,
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
        assert!(node.saw(
            &sighting(cached(7, "a", true), None),
            Some(at(100)),
            at(110)
        ));
        assert_eq!(node.read_permit(at(110)), ReadPermit::Cached(Epoch(7)));
        assert_eq!(node.write_permit(at(110)), WritePermit::Cached(Epoch(7)));
    }

    #[test]
    fn the_lease_counts_from_the_start_of_the_poll() {
        let mut node = connected("a");
        node.saw(
            &sighting(cached(7, "a", true), None),
            Some(at(100)),
            at(900),
        );
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
        node.saw(&sighting(cached(7, "a", true), None), None, at(100));
        assert_eq!(
            node.read_permit(at(100)),
            ReadPermit::Bypass(Bypass::NoLease)
        );
    }

    #[test]
    fn a_new_unsettled_epoch_is_observed_for_the_settle_time() {
        let mut node = connected("a");
        node.saw(&sighting(cached(7, "a", true), None), Some(at(0)), at(0));
        assert!(node.saw(&sighting(bypass(8, false), None), Some(at(200)), at(210)));
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
        node.saw(&sighting(bypass(8, true), None), Some(at(1500)), at(1500));
        assert_eq!(node.should_settle(at(1500)), None);
    }

    #[test]
    fn an_unsettled_cached_epoch_gives_no_lease_while_observing() {
        let mut node = connected("b");
        node.saw(&sighting(cached(9, "b", false), None), Some(at(0)), at(0));
        assert_eq!(
            node.read_permit(at(1000)),
            ReadPermit::Bypass(Bypass::Observing)
        );
        node.saw(
            &sighting(cached(9, "b", false), None),
            Some(at(1300)),
            at(1300),
        );
        assert_eq!(node.read_permit(at(1300)), ReadPermit::Cached(Epoch(9)));
    }

    #[test]
    fn a_settled_mark_ends_the_observation() {
        let mut node = connected("a");
        node.saw(&sighting(bypass(8, false), None), Some(at(0)), at(0));
        node.saw(&sighting(bypass(8, true), None), Some(at(200)), at(200));
        assert_eq!(node.write_permit(at(200)), WritePermit::Bypass(Epoch(8)));
    }

    #[test]
    fn late_answers_change_nothing() {
        let mut node = connected("a");
        node.saw(&sighting(bypass(8, false), None), Some(at(100)), at(100));
        assert!(!node.saw(&sighting(cached(7, "a", true), None), Some(at(50)), at(120)));
        assert_eq!(node.row(), Some(&bypass(8, false)));
    }

    #[test]
    fn another_server_is_no_cache() {
        let mut node = connected("b");
        node.saw(&sighting(cached(7, "a", true), None), Some(at(0)), at(0));
        assert_eq!(
            node.read_permit(at(0)),
            ReadPermit::Bypass(Bypass::NotConnected)
        );
        assert_eq!(node.write_permit(at(0)), WritePermit::Unreachable(Epoch(7)));
    }

    #[test]
    fn a_node_without_connection_proposes_bypass() {
        let mut node = Node::new(Timing::default());
        node.saw(&sighting(cached(7, "a", true), None), Some(at(0)), at(0));
        let proposal = node
            .proposal(&sighting(cached(7, "a", true), None), at(1))
            .unwrap();
        assert_eq!(proposal, Node::bypass_from(Epoch(7)));
    }

    fn back(from: u64, id: &str) -> Proposal {
        Proposal::Next {
            from: Epoch(from),
            mode: Mode::Cached(server(id)),
            settled: true,
        }
    }

    #[test]
    fn the_cache_returns_only_from_an_active_bypass_and_when_all_are_well() {
        let mut node = connected("a");
        node.saw(&sighting(bypass(8, false), None), Some(at(0)), at(0));
        let well = sighting(bypass(8, false), Some(2250));
        assert_eq!(node.proposal(&well, at(1249)), None, "leases may be out");
        // The bypass was proposed 2249 ms ago, so it was active for less than the hold-off.
        let troubled = sighting(bypass(8, false), Some(2249));
        assert_eq!(node.proposal(&troubled, at(1250)), None);
        let proposal = node.proposal(&well, at(1250)).unwrap();
        assert_eq!(proposal, back(8, "a"));
    }

    #[test]
    fn a_quiet_bypass_ends_at_first_sight() {
        let mut node = connected("a");
        node.saw(&sighting(bypass(8, true), None), Some(at(0)), at(0));
        let proposal = node.proposal(&sighting(bypass(8, true), None), at(0));
        assert_eq!(proposal.unwrap(), back(8, "a"));
    }

    #[test]
    fn a_node_on_another_server_ends_the_epoch() {
        let mut node = connected("b");
        node.saw(&sighting(cached(7, "a", true), None), Some(at(0)), at(0));
        let row = sighting(cached(7, "a", true), None);
        assert_eq!(
            node.proposal(&row, at(5000)),
            Some(Node::bypass_from(Epoch(7)))
        );
    }

    #[test]
    fn a_stale_sighting_proposes_nothing() {
        let mut node = connected("a");
        node.saw(&sighting(bypass(8, true), None), None, at(0));
        assert_eq!(node.proposal(&sighting(bypass(7, true), None), at(5)), None);
    }

    fn of_another_history(row: EpochRow) -> Sighting {
        Sighting {
            in_its_history: false,
            ..sighting(row, None)
        }
    }

    #[test]
    fn a_row_of_another_history_is_believed_by_nobody_and_replaced_by_anybody() {
        let promoted = of_another_history(cached(7, "a", true));
        for seen in [None, Some(7), Some(9)] {
            let mut node = connected("a");
            if let Some(number) = seen {
                node.saw(
                    &sighting(cached(number, "a", true), None),
                    Some(at(0)),
                    at(0),
                );
            }
            assert!(!node.saw(&promoted, Some(at(100)), at(100)));
            assert_eq!(
                node.read_permit(at(100)),
                ReadPermit::Bypass(Bypass::NoLease)
            );
            assert!(!node.holds_lease(Epoch(7), at(100)));
            assert_eq!(node.write_permit(at(100)), WritePermit::Wait(None));
            assert_eq!(
                node.proposal(&promoted, at(100)),
                Some(Proposal::NewHistory {
                    from: Epoch(7),
                    above: Epoch(seen.unwrap_or(7)),
                })
            );
            let mut next = bypass(9 + Proposal::LEAP, false);
            next.history = HistoryId::new("new");
            assert!(node.saw(&sighting(next, None), Some(at(200)), at(200)));
            assert_eq!(node.astray(), None);
            assert_eq!(
                node.write_permit(at(200)),
                WritePermit::Wait(Some(at(1450)))
            );
        }
    }

    #[test]
    fn a_number_that_goes_back_ends_the_lease_unless_it_is_a_late_answer() {
        let mut node = connected("a");
        node.saw(
            &sighting(cached(7, "a", true), None),
            Some(at(100)),
            at(110),
        );
        let older = sighting(cached(6, "a", true), None);
        for started in [None, Some(at(105)), Some(at(110))] {
            assert!(!node.saw(&older, started, at(120)));
            assert_eq!(node.astray(), None, "an answer on its way for long");
            assert!(node.holds_lease(Epoch(7), at(120)));
        }
        assert!(!node.saw(&older, Some(at(111)), at(120)));
        let (seen, found) = (Epoch(7), Epoch(6));
        assert_eq!(node.astray(), Some(Astray::WentBack { seen, found }));
        assert!(!node.holds_lease(Epoch(7), at(120)));
        assert_eq!(node.write_permit(at(120)), WritePermit::Wait(None));
        assert_eq!(
            node.proposal(&older, at(120)),
            Some(Proposal::NewHistory {
                from: found,
                above: seen
            })
        );
    }

    #[test]
    fn the_same_number_of_another_database_has_gone_back_too() {
        let mut node = connected("a");
        node.saw(
            &sighting(cached(7, "a", true), None),
            Some(at(100)),
            at(110),
        );
        let mut other = cached(7, "a", true);
        other.history = HistoryId::new("other");
        assert!(!node.saw(&sighting(other, None), Some(at(200)), at(210)));
        assert!(node.astray().is_some());
        assert!(!node.holds_lease(Epoch(7), at(210)));
    }
}
