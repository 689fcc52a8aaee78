//! The fast test: is there an order of a register's writes that real time allows?
//!
//! Take each write with the reads of its value as one *cluster*. Values are unique, so a
//! linearization of the register is a linearization of its clusters, one after the other. Cluster A
//! has to come before cluster B when an operation of A ended before an operation of B started, that
//! is, when `A.first_end < B.last_start`. The history is linearizable exactly when this relation
//! has no cycle, and it has a cycle exactly when two clusters each have to come before the other:
//! in any cycle the cluster with the smallest `first_end` has its predecessor as such a partner.
//! That is the test of Gibbons and Korach (*Testing Shared Memories*, 1997), which speaks of the
//! same pairs as overlapping forward zones and of backward zones inside forward ones.
//!
//! Unknown outcomes: a write that was seen has no end of its own, so its cluster's `first_end` is
//! that of its reads; one that was not seen is left out. Creation and deletion: clusters have a
//! *rank* (before creation, create, update, deletion), a lower rank comes first, and two clusters
//! of different rank are in conflict when real time says otherwise. Reads of absence belong before
//! creation whenever that contradicts nothing, else to the deletion.
//!
//! The cost is that of sorting the clusters.

use super::registers::{Fault, NONE, Registers, Seen};
use super::{Kind, Weakening};
use crate::history::{Key, Value};

/// Place in an item's life; a lower one comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    Create,
    Update,
    Deletion,
}

/// A write and all that saw its effect.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cluster {
    pub(crate) rank: Rank,
    /// The value; none for the deletion.
    pub(crate) value: Option<Value>,
    pub(crate) writer: Option<u32>,
    pub(crate) first_end: i64,
    pub(crate) first_end_op: u32,
    pub(crate) last_start: i64,
    pub(crate) last_start_op: u32,
    pub(crate) reads: u32,
    pub(crate) version: Option<u64>,
}

/// Two clusters, by index, of which each would have to come before the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub(crate) one: usize,
    pub(crate) other: usize,
}

/// One item's register, ready to be judged.
#[derive(Debug)]
pub(crate) struct Register {
    pub(crate) key: Key,
    pub(crate) clusters: Vec<Cluster>,
    /// Reads of absence that neither time before creation nor a deletion can explain.
    pub(crate) faults: Vec<Fault>,
    /// The operation that first showed the item to exist.
    pub(crate) first_evidence: u32,
}

impl Register {
    pub(crate) fn new(registers: &Registers<'_>, key: Key) -> Self {
        let create = registers.create(key);
        let mut clusters: Vec<Cluster> = Vec::new();
        for &value in registers.values.of(key) {
            let writer = registers.writer(value);
            let zone = registers.zone(value);
            clusters.push(Cluster {
                rank: if writer.is_none() || writer == create {
                    Rank::Create
                } else {
                    Rank::Update
                },
                value: Some(value),
                writer,
                first_end: zone.first_end,
                first_end_op: zone.first_end_op,
                last_start: zone.last_start,
                last_start_op: zone.last_start_op,
                reads: zone.reads,
                version: zone.version,
            });
        }

        let deletion = registers.deletion(key);
        let acknowledged = (deletion.acknowledged != NONE).then_some(deletion.acknowledged);
        let unknown = (deletion.earliest_unknown != NONE).then_some(deletion.earliest_unknown);
        let deleted_by = acknowledged.map(|op| (registers.operation(op).end, op));
        let (existed_at, first_evidence) = clusters
            .iter()
            .map(|cluster| (cluster.first_end, cluster.first_end_op))
            .chain(deleted_by)
            .min()
            .unwrap_or((i64::MAX, NONE));

        let mut gone = deleted_by.unwrap_or((i64::MAX, NONE));
        let mut gone_reads = 0;
        let mut faults = Vec::new();
        let deleter = acknowledged.or(unknown);
        for &op in registers.absences.of(key) {
            let operation = registers.operation(op);
            if operation.start <= existed_at || registers.is_weakened(Weakening::AbsenceIsFine) {
                continue;
            }
            let explained =
                deleter.is_some_and(|delete| registers.operation(delete).start <= operation.end);
            if !explained {
                let kind = if operation.page.is_some() {
                    Kind::ListMissesItem
                } else {
                    Kind::LostItem
                };
                let other = deleter.unwrap_or(NONE);
                faults.push(Fault {
                    kind,
                    key,
                    op,
                    other,
                    seen: Seen::Absent,
                });
                continue;
            }
            gone_reads += 1;
            gone = gone.min((operation.end, op));
        }
        if let Some(delete) = deleter.filter(|_| gone.1 != NONE) {
            clusters.push(Cluster {
                rank: Rank::Deletion,
                value: None,
                writer: Some(delete),
                first_end: gone.0,
                first_end_op: gone.1,
                // Nothing comes after it.
                last_start: i64::MAX,
                last_start_op: delete,
                reads: gone_reads,
                version: None,
            });
        }
        Self {
            key,
            clusters,
            faults,
            first_evidence,
        }
    }

    /// All clusters that are in conflict with another one, each with one partner.
    pub(crate) fn conflicts(&self, weakening: Option<Weakening>) -> Vec<Conflict> {
        let mut conflicts = Vec::new();
        if weakening != Some(Weakening::LifeHasNoOrder) {
            self.rank_conflicts(&mut conflicts);
        }
        if weakening != Some(Weakening::VersionsAreFree) {
            self.version_conflicts(&mut conflicts);
        }
        self.zone_conflicts(weakening, &mut conflicts);
        conflicts
    }

    fn rank_conflicts(&self, conflicts: &mut Vec<Conflict>) {
        for rank in [Rank::Update, Rank::Deletion] {
            let first = (0..self.clusters.len())
                .filter(|&at| self.clusters[at].rank >= rank)
                .min_by_key(|&at| self.clusters[at].first_end);
            let Some(later) = first else { continue };
            for (at, cluster) in self.clusters.iter().enumerate() {
                if cluster.rank < rank && self.clusters[later].first_end < cluster.last_start {
                    conflicts.push(Conflict {
                        one: at,
                        other: later,
                    });
                }
            }
        }
    }

    fn version_conflicts(&self, conflicts: &mut Vec<Conflict>) {
        let mut order: Vec<usize> = (0..self.clusters.len())
            .filter(|&at| self.clusters[at].version.is_some())
            .collect();
        order.sort_unstable_by_key(|&at| std::cmp::Reverse(self.clusters[at].version));
        let mut first: Option<usize> = None;
        for run in order.chunk_by(|&a, &b| self.clusters[a].version == self.clusters[b].version) {
            for &at in run {
                if let Some(higher) = first
                    && self.clusters[higher].first_end < self.clusters[at].last_start
                {
                    conflicts.push(Conflict {
                        one: at,
                        other: higher,
                    });
                }
            }
            first = run
                .iter()
                .copied()
                .chain(first)
                .min_by_key(|&at| self.clusters[at].first_end);
        }
    }

    fn zone_conflicts(&self, weakening: Option<Weakening>, conflicts: &mut Vec<Conflict>) {
        let zones = &self.clusters;
        let values = (0..zones.len()).filter(|&at| zones[at].rank != Rank::Deletion);
        let (mut forward, backward): (Vec<usize>, Vec<usize>) =
            values.partition(|&at| zones[at].first_end < zones[at].last_start);
        forward.sort_unstable_by_key(|&at| zones[at].first_end);
        // longest[i]: of the first i forward zones, the one that reaches farthest.
        let mut longest: Vec<usize> = Vec::with_capacity(forward.len());
        for &at in &forward {
            let reaching = match longest.last() {
                None => at,
                Some(&farthest) => {
                    if zones[at].first_end < zones[farthest].last_start
                        && weakening != Some(Weakening::ForwardZonesMayOverlap)
                    {
                        conflicts.push(Conflict {
                            one: farthest,
                            other: at,
                        });
                    }
                    if zones[at].last_start > zones[farthest].last_start {
                        at
                    } else {
                        farthest
                    }
                }
            };
            longest.push(reaching);
        }
        if weakening == Some(Weakening::BackwardZonesMayHide) {
            return;
        }
        for at in backward {
            let before =
                forward.partition_point(|&other| zones[other].first_end < zones[at].last_start);
            if let Some(&farthest) = before.checked_sub(1).and_then(|last| longest.get(last))
                && zones[at].first_end < zones[farthest].last_start
            {
                conflicts.push(Conflict {
                    one: farthest,
                    other: at,
                });
            }
        }
    }

    /// Two clusters that carry the same version, if there are such.
    pub(crate) fn reused_versions(&self) -> Vec<Conflict> {
        let mut order: Vec<usize> = (0..self.clusters.len())
            .filter(|&at| self.clusters[at].version.is_some())
            .collect();
        order.sort_unstable_by_key(|&at| (self.clusters[at].version, self.clusters[at].first_end));
        order
            .windows(2)
            .filter(|pair| self.clusters[pair[0]].version == self.clusters[pair[1]].version)
            .map(|pair| Conflict {
                one: pair[0],
                other: pair[1],
            })
            .collect()
    }

    /// The versions that no write can have been given: more holes between the lowest and the
    /// highest version seen than there are writes of unknown outcome that nobody saw.
    pub(crate) fn skipped_versions(&self, unseen_writes: u64) -> Option<Vec<u64>> {
        if self
            .clusters
            .iter()
            .any(|cluster| cluster.value.is_some() && cluster.version.is_none())
        {
            return None;
        }
        let mut versions: Vec<u64> = self
            .clusters
            .iter()
            .filter_map(|cluster| cluster.version)
            .collect();
        versions.sort_unstable();
        versions.dedup();
        let holes: u64 = versions.windows(2).map(|pair| pair[1] - pair[0] - 1).sum();
        (holes > unseen_writes).then(|| {
            versions
                .windows(2)
                .flat_map(|pair| pair[0] + 1..pair[1])
                .take(16)
                .collect()
        })
    }
}
