//! The fast test: is there an order of a register's writes that real time allows?
//!
//! Take each write with the reads of its value as one *write group*. Values are unique, so a
//! linearization of the register is a linearization of its groups, one after the other. Group
//! A has to come before group B when an operation of A ended before an operation of B started, that
//! is, when `A.first_end < B.last_start`. The history is linearizable exactly when this relation
//! has no cycle, and it has a cycle exactly when two groups each have to come before the other: in
//! any cycle the group with the smallest `first_end` has its predecessor as such a partner. That is
//! the test of Gibbons and Korach (*Testing Shared Memories*, 1997), which speaks of the same pairs
//! as overlapping forward zones and of backward zones inside forward ones.
//!
//! Unknown outcomes: a write that was seen has no end of its own, so its group's `first_end` is
//! that of its reads; one that was not seen is left out. Creation and deletion: groups have a
//! *rank* (before creation, create, update, deletion), a lower rank comes first, and two groups
//! of different rank are in conflict when real time says otherwise. Reads of absence belong before
//! creation whenever that contradicts nothing, else to the deletion.
//!
//! The cost is that of sorting the groups.

use super::anomaly::Kind;
use super::observation::{Moment, Op, Seen, Violation};
use super::registers::Registers;
use super::rules::Rules;
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
pub(crate) struct WriteGroup {
    pub(crate) rank: Rank,
    /// The value; none for the deletion.
    pub(crate) value: Option<Value>,
    pub(crate) writer: Option<Op>,
    pub(crate) first_end: Moment,
    pub(crate) last_start: Moment,
    pub(crate) reads: u32,
    pub(crate) version: Option<u64>,
}

impl WriteGroup {
    /// Says whether real time puts this group before another one.
    fn comes_before(&self, other: &Self) -> bool {
        self.first_end.at < other.last_start.at
    }

    /// Says whether the value was certainly in place for a stretch of time, and not only at some
    /// moment.
    fn is_forward(&self) -> bool {
        self.first_end.at < self.last_start.at
    }
}

/// Two write groups, by index, of which each would have to come before the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub(crate) one: usize,
    pub(crate) other: usize,
}

/// One item's register, ready to be judged.
#[derive(Debug)]
pub(crate) struct Register {
    pub(crate) key: Key,
    pub(crate) groups: Vec<WriteGroup>,
    /// Reads of absence that neither time before creation nor a deletion can explain.
    pub(crate) violations: Vec<Violation>,
    /// The operation that first showed the item to exist.
    pub(crate) first_evidence: Option<Op>,
}

impl Register {
    /// Makes the register of one item.
    pub(crate) fn new(registers: &Registers<'_>, key: Key) -> Self {
        let writes = &registers.writes;
        let create = writes.create(key);
        let mut groups: Vec<WriteGroup> = Vec::new();
        for (value, zone) in registers.values_of(key) {
            let (Some(first_end), Some(last_start)) = (zone.first_end, zone.last_start) else {
                continue;
            };
            let writer = writes.writer(value);
            groups.push(WriteGroup {
                rank: if writer.is_none() || writer == create {
                    Rank::Create
                } else {
                    Rank::Update
                },
                value: Some(value),
                writer,
                first_end,
                last_start,
                reads: zone.reads,
                version: zone.version(),
            });
        }

        let deletion = writes.deletion(key);
        let deleter = deletion.acknowledged.or(deletion.earliest_unknown);
        let deleted = deletion.acknowledged.map(|op| Moment {
            at: writes.operation(op).end,
            op,
        });
        let existed = groups
            .iter()
            .map(|group| group.first_end)
            .chain(deleted)
            .min();

        let mut gone = deleted;
        let mut gone_reads = 0;
        let mut violations = Vec::new();
        for &op in registers.absences.of(key) {
            let operation = writes.operation(op);
            let existed_before = existed.is_some_and(|existed| operation.start > existed.at);
            if !existed_before || !writes.rules.existing_items_are_found {
                continue;
            }
            let explained =
                deleter.is_some_and(|delete| writes.operation(delete).start <= operation.end);
            if !explained {
                violations.push(Violation {
                    kind: if operation.page.is_some() {
                        Kind::ListMissesItem
                    } else {
                        Kind::LostItem
                    },
                    key,
                    op,
                    other: deleter,
                    seen: Seen::Absent,
                });
                continue;
            }
            gone_reads += 1;
            let seen = Moment {
                at: operation.end,
                op,
            };
            gone = Some(gone.map_or(seen, |gone| gone.min(seen)));
        }
        if let Some((delete, first_end)) = deleter.zip(gone) {
            groups.push(WriteGroup {
                rank: Rank::Deletion,
                value: None,
                writer: Some(delete),
                first_end,
                // Nothing comes after it.
                last_start: Moment {
                    at: i64::MAX,
                    op: delete,
                },
                reads: gone_reads,
                version: None,
            });
        }
        Self {
            key,
            groups,
            violations,
            first_evidence: existed.map(|existed| existed.op),
        }
    }

    /// Finds all groups that are in conflict with another one, each with one partner.
    pub(crate) fn conflicts(&self, rules: &Rules) -> Vec<Conflict> {
        let mut conflicts = Vec::new();
        if rules.life_has_an_order {
            self.rank_conflicts(&mut conflicts);
        }
        if rules.versions_grow {
            self.version_conflicts(&mut conflicts);
        }
        self.zone_conflicts(rules, &mut conflicts);
        conflicts
    }

    fn rank_conflicts(&self, conflicts: &mut Vec<Conflict>) {
        for rank in [Rank::Update, Rank::Deletion] {
            let first = (0..self.groups.len())
                .filter(|&at| self.groups[at].rank >= rank)
                .min_by_key(|&at| self.groups[at].first_end.at);
            let Some(later) = first else { continue };
            for (at, group) in self.groups.iter().enumerate() {
                if group.rank < rank && self.groups[later].comes_before(group) {
                    conflicts.push(Conflict {
                        one: at,
                        other: later,
                    });
                }
            }
        }
    }

    fn version_conflicts(&self, conflicts: &mut Vec<Conflict>) {
        let mut order: Vec<usize> = (0..self.groups.len())
            .filter(|&at| self.groups[at].version.is_some())
            .collect();
        order.sort_unstable_by_key(|&at| std::cmp::Reverse(self.groups[at].version));
        let mut first: Option<usize> = None;
        for run in order.chunk_by(|&a, &b| self.groups[a].version == self.groups[b].version) {
            for &at in run {
                if let Some(higher) = first
                    && self.groups[higher].comes_before(&self.groups[at])
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
                .min_by_key(|&at| self.groups[at].first_end.at);
        }
    }

    fn zone_conflicts(&self, rules: &Rules, conflicts: &mut Vec<Conflict>) {
        let zones = &self.groups;
        let values = (0..zones.len()).filter(|&at| zones[at].rank != Rank::Deletion);
        let (mut forward, backward): (Vec<usize>, Vec<usize>) =
            values.partition(|&at| zones[at].is_forward());
        forward.sort_unstable_by_key(|&at| zones[at].first_end.at);
        // longest[i]: of the first i forward zones, the one that reaches farthest.
        let mut longest: Vec<usize> = Vec::with_capacity(forward.len());
        for &at in &forward {
            let reaching = match longest.last() {
                None => at,
                Some(&farthest) => {
                    if zones[at].comes_before(&zones[farthest]) && rules.forward_zones_are_apart {
                        conflicts.push(Conflict {
                            one: farthest,
                            other: at,
                        });
                    }
                    if zones[at].last_start.at > zones[farthest].last_start.at {
                        at
                    } else {
                        farthest
                    }
                }
            };
            longest.push(reaching);
        }
        if !rules.backward_zones_are_outside {
            return;
        }
        for at in backward {
            let before = forward.partition_point(|&other| zones[other].comes_before(&zones[at]));
            if let Some(&farthest) = before.checked_sub(1).and_then(|last| longest.get(last))
                && zones[at].comes_before(&zones[farthest])
            {
                conflicts.push(Conflict {
                    one: farthest,
                    other: at,
                });
            }
        }
    }

    /// Finds pairs of groups that carry the same version.
    pub(crate) fn reused_versions(&self) -> Vec<Conflict> {
        let mut order: Vec<usize> = (0..self.groups.len())
            .filter(|&at| self.groups[at].version.is_some())
            .collect();
        order.sort_unstable_by_key(|&at| (self.groups[at].version, self.groups[at].first_end.at));
        order
            .windows(2)
            .filter(|pair| self.groups[pair[0]].version == self.groups[pair[1]].version)
            .map(|pair| Conflict {
                one: pair[0],
                other: pair[1],
            })
            .collect()
    }

    /// Finds the versions that no write can have been given: more holes between the lowest and the
    /// highest version seen than there are writes of unknown outcome that nobody saw.
    pub(crate) fn skipped_versions(&self, unseen_writes: u64) -> Option<Vec<u64>> {
        if self
            .groups
            .iter()
            .any(|group| group.value.is_some() && group.version.is_none())
        {
            return None;
        }
        let mut versions: Vec<u64> = self
            .groups
            .iter()
            .filter_map(|group| group.version)
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
