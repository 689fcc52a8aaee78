//! Finds the reads that came too late: after a newer state had been acknowledged, or seen.
//!
//! The fast test says that an item failed; this says which of its reads are to blame.

use std::collections::{BTreeMap, HashMap};

use super::observation::{Moment, Observation, Seen};
use super::registers::Registers;
use super::zones::{Rank, Register, WriteGroup};
use crate::history::{Action, Outcome, Value};

/// How a newer state was known to be in place before a read began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Its write was acknowledged: the read is stale.
    Acknowledged,
    /// Another operation had seen it: the reads are not monotonic.
    Seen,
}

/// Reads of one write group that came too late, all of them reads of the item, or all of them
/// pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LateReads {
    /// Index of the group that they showed.
    pub(crate) older: usize,
    /// Index of the group that certainly came after it.
    pub(crate) newer: usize,
    /// How the newer state was known.
    pub(crate) proof: Proof,
    /// When it was known, and by which operation.
    pub(crate) known: Moment,
    /// The reads are entries of pages.
    pub(crate) by_page: bool,
    /// Number of reads.
    pub(crate) count: u64,
    /// The start of the first one.
    pub(crate) first: Moment,
    /// The start of the last one.
    pub(crate) last: Moment,
}

/// The result of the search for late reads.
#[derive(Debug)]
pub(crate) struct Found {
    /// The late reads, by the group that they showed. Of a group with stale reads no others are
    /// listed.
    pub(crate) late: Vec<LateReads>,
    /// The item's state in the read that began last.
    pub(crate) last_seen: Option<Seen>,
}

/// Finds the late reads of an item, and calls `stale` with the age of each stale one, in
/// nanoseconds.
pub(crate) fn find(
    registers: &Registers<'_>,
    register: &Register,
    observations: &[Observation],
    mut stale: impl FnMut(i64),
) -> Found {
    let writes = &registers.writes;
    let groups = &register.groups;
    let acknowledged = Successors::new(registers, groups, |group| {
        let op = group.writer?;
        let write = writes.operation(op);
        (writes.outcome(write) == Outcome::Ok).then_some(Moment { at: write.end, op })
    });
    let seen = Successors::new(registers, groups, |group| Some(group.first_end));
    let limits: Vec<_> = groups
        .iter()
        .map(|group| (acknowledged.of(group), seen.of(group)))
        .collect();
    let of_value: HashMap<Value, usize> = (0..groups.len())
        .filter_map(|at| groups[at].value.map(|value| (value, at)))
        .collect();

    let mut last_read: Option<(i64, Seen)> = None;
    // By group, proof (stale reads first) and way of reading.
    let mut late: BTreeMap<(usize, bool, bool), LateReads> = BTreeMap::new();
    for &Observation { op, seen, .. } in observations {
        let read = writes.operation(op);
        if last_read.is_none_or(|(at, _)| at < read.start) {
            last_read = Some((read.start, seen));
        }
        let Some(&older) = seen.value().and_then(|value| of_value.get(&value)) else {
            continue;
        };
        let before = |limit: &(Moment, usize)| limit.0.at < read.start;
        let (acknowledged, seen) = limits[older];
        let (proof, (known, newer)) = match (acknowledged.filter(before), seen.filter(before)) {
            (Some(limit), _) => (Proof::Acknowledged, limit),
            (None, Some(limit)) => (Proof::Seen, limit),
            (None, None) => continue,
        };
        if proof == Proof::Acknowledged {
            stale(read.start.saturating_sub(known.at));
        }
        let by_page = read.action == Action::List;
        let start = Moment { at: read.start, op };
        late.entry((older, proof == Proof::Seen, by_page))
            .and_modify(|late| {
                late.count += 1;
                late.first = late.first.min(start);
                late.last = late.last.max(start);
            })
            .or_insert(LateReads {
                older,
                newer,
                proof,
                known,
                by_page,
                count: 1,
                first: start,
                last: start,
            });
    }

    let mut late: Vec<LateReads> = late.into_values().collect();
    let mut stale_group = None;
    late.retain(|reads| match reads.proof {
        Proof::Acknowledged => {
            stale_group = Some(reads.older);
            true
        }
        Proof::Seen => stale_group != Some(reads.older),
    });
    Found {
        late,
        last_seen: last_read.map(|(_, seen)| seen),
    }
}

/// For each threshold, the earliest of the times whose key is greater.
struct Earliest<T> {
    keys: Vec<T>,
    best: Vec<(Moment, usize)>,
}

impl<T: Ord + Copy> Earliest<T> {
    fn new(mut points: Vec<(T, (Moment, usize))>) -> Self {
        points.sort_unstable();
        let keys = points.iter().map(|point| point.0).collect();
        let mut best: Vec<_> = points.into_iter().map(|point| point.1).collect();
        for at in (1..best.len()).rev() {
            best[at - 1] = best[at - 1].min(best[at]);
        }
        Self { keys, best }
    }

    fn above(&self, threshold: T) -> Option<(Moment, usize)> {
        self.best
            .get(self.keys.partition_point(|&key| key <= threshold))
            .copied()
    }
}

/// When groups that certainly come after a given one took effect.
struct Successors {
    by_start: Earliest<i64>,
    by_version: Earliest<u64>,
    by_rank: Earliest<Rank>,
}

impl Successors {
    /// `effect` says when, and by which operation, a group is known to have taken effect.
    fn new(
        registers: &Registers<'_>,
        groups: &[WriteGroup],
        effect: impl Fn(&WriteGroup) -> Option<Moment>,
    ) -> Self {
        let (mut by_start, mut by_version, mut by_rank) = (Vec::new(), Vec::new(), Vec::new());
        for (at, group) in groups.iter().enumerate() {
            let Some(moment) = effect(group) else {
                continue;
            };
            let point = (moment, at);
            if let Some(writer) = group.writer {
                by_start.push((registers.writes.operation(writer).start, point));
            }
            if let Some(version) = group.version {
                by_version.push((version, point));
            }
            by_rank.push((group.rank, point));
        }
        Self {
            by_start: Earliest::new(by_start),
            by_version: Earliest::new(by_version),
            by_rank: Earliest::new(by_rank),
        }
    }

    fn of(&self, group: &WriteGroup) -> Option<(Moment, usize)> {
        [
            self.by_start.above(group.first_end.at),
            group
                .version
                .and_then(|version| self.by_version.above(version)),
            self.by_rank.above(group.rank),
        ]
        .into_iter()
        .flatten()
        .min()
    }
}
