//! The judge: is a history linearizable, and if not, why not?
//!
//! It works on histories alone and knows nothing of HTTP, of the service or of how it keeps its
//! promise.
//!
//! 1. `pages` turns lists into reads of the items they show and of the items they leave out.
//! 2. `registers` makes one register of each item.
//! 3. `zones` tests each register, in the time it takes to sort its writes.
//! 4. `explain` looks closely at the items that failed, and says what a person needs to know.
//! 5. [`search`] confirms each explanation by the general method and cuts it to the smallest
//!    offending set.
//!
//! Versions are judged too: they are unique per item, keep the order of real time, belong to one
//! value each, and no more of them are missing than there were writes of unknown outcome. All of
//! this holds whatever became of those writes, so none of it raises a false alarm.

mod explain;
mod pages;
mod registers;
pub mod search;
#[cfg(test)]
mod tests;
mod zones;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

use self::explain::Case;
use self::registers::{Fault, Observation, Registers};
use self::zones::Register;
use crate::history::{Action, History, Key, Outcome};

/// The kinds of anomaly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A read returned a value that an acknowledged write had replaced before the read began.
    StaleRead,
    /// The last write of an item was acknowledged, and no read ever returned it, the last one of
    /// all among them.
    LostWrite,
    /// A read returned an older value than a read that had ended before it began.
    NonMonotonicRead,
    /// An item that existed was not found, and nobody had deleted it.
    LostItem,
    /// An item was found, or could be updated, after its deletion was acknowledged or seen.
    ResurrectedItem,
    /// A list left out an item that existed, and that nobody had deleted.
    ListMissesItem,
    /// A list showed an item after its deletion was acknowledged or seen.
    ListShowsDeletedItem,
    /// A read returned a value that nobody wrote to this item.
    UnwrittenValue,
    /// A read returned a value before the write of it was invoked.
    ValueFromFuture,
    /// A read returned the value of a write that the service said it had not made.
    FailedWriteSeen,
    /// Two deletions of one item were both acknowledged.
    DoubleDelete,
    /// Two creates were given the same id.
    DuplicateKey,
    /// Two values of one item carry the same version: one update did not see the other (a lost
    /// update).
    ReusedVersion,
    /// One value was shown with two versions: a write was applied twice, or an answer mixes two
    /// states.
    ChangedVersion,
    /// The version of a later write is lower than that of an earlier one.
    BackwardVersion,
    /// A version is missing that no write of unknown outcome can have taken.
    SkippedVersion,
    /// Operations contradict each other in another way.
    Disorder,
}

impl Kind {
    /// The name, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::StaleRead => "stale-read",
            Self::LostWrite => "lost-write",
            Self::NonMonotonicRead => "non-monotonic-read",
            Self::LostItem => "lost-item",
            Self::ResurrectedItem => "resurrected-item",
            Self::ListMissesItem => "list-misses-item",
            Self::ListShowsDeletedItem => "list-shows-deleted-item",
            Self::UnwrittenValue => "unwritten-value",
            Self::ValueFromFuture => "value-from-future",
            Self::FailedWriteSeen => "failed-write-seen",
            Self::DoubleDelete => "double-delete",
            Self::DuplicateKey => "duplicate-key",
            Self::ReusedVersion => "reused-version",
            Self::ChangedVersion => "changed-version",
            Self::BackwardVersion => "backward-version",
            Self::SkippedVersion => "skipped-version",
            Self::Disorder => "disorder",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a history cannot be judged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JudgeError {
    /// Reads of the value could not be told apart.
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
        /// What was found.
        kind: Kind,
        /// The item.
        key: String,
    },
}

/// The part that an operation plays in an anomaly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// It wrote, or showed, the older state.
    Older,
    /// It wrote, or showed, the newer state.
    Newer,
    /// It showed what it could not have seen.
    Offender,
}

/// One operation of an anomaly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Index of the operation in the history.
    pub operation: usize,
    /// The part that it plays.
    pub role: Role,
    /// The anomaly is no longer one when this operation is left out.
    pub needed: bool,
    /// What it wrote or showed of the item: a value, or nothing for absence.
    pub value: Option<crate::history::Value>,
}

/// How old the data were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Staleness {
    /// Reads that returned the overwritten state.
    pub reads: u64,
    /// Time from the overwriting's acknowledgement to the start of the first such read.
    pub first_ns: i64,
    /// The same for the last such read: for so long the old state was served.
    pub worst_ns: i64,
}

/// How an anomaly was confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Confirmation {
    /// The search found no linearization of the operations shown.
    BySearch,
    /// It contradicts what a version or an id is.
    ByDefinition,
}

/// One thing that should not have been possible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anomaly {
    /// What kind of thing.
    pub kind: Kind,
    /// The item.
    pub key: Key,
    /// What happened, in a sentence or two.
    pub explanation: String,
    /// The operations that show it, by start.
    pub members: Vec<Member>,
    /// How stale, when an acknowledged write was overlooked.
    pub staleness: Option<Staleness>,
    /// How it was confirmed.
    pub confirmation: Confirmation,
}

/// Upper bounds of the staleness histogram's buckets, in milliseconds; the last bucket is open.
pub const STALENESS_BUCKETS_MS: [u64; 16] = [
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000, 300_000,
];

/// What the judge found.
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
    /// Whether the history is free of anomalies.
    #[must_use]
    pub fn linearizable(&self) -> bool {
        self.counts.is_empty()
    }

    fn stale(&mut self, age_ns: i64) {
        self.stale_reads += 1;
        self.worst_staleness_ns = self.worst_staleness_ns.max(age_ns);
        let ms = u64::try_from(age_ns / 1_000_000).unwrap_or(0);
        self.staleness[STALENESS_BUCKETS_MS.partition_point(|&bound| bound <= ms)] += 1;
    }
}

/// One rule of the judge taken away, to show that the rule is needed: without it a known-bad
/// history passes, or a known-good one does not. Only tests do this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), expect(dead_code, reason = "only tests weaken the judge"))]
pub(crate) enum Weakening {
    ForwardZonesMayOverlap,
    BackwardZonesMayHide,
    LifeHasNoOrder,
    VersionsAreFree,
    VersionsMayRepeat,
    VersionsMayBeSkipped,
    ReadsProveNothing,
    AcknowledgementIsNothing,
    UnknownIsDone,
    UnknownIsNever,
    FailedIsUnknown,
    AnyValue,
    FutureIsFine,
    AbsenceIsFine,
    PagesOmitFreely,
    PagesShowNothing,
}

/// Judges histories.
#[derive(Clone, Debug)]
pub struct Judge {
    explain: usize,
    limit: Duration,
    weakening: Option<Weakening>,
}

impl Default for Judge {
    fn default() -> Self {
        Self::new(20, Duration::from_secs(60))
    }
}

impl Judge {
    /// A judge that explains at most `explain` anomalies (it counts them all) and gives up after
    /// `limit`.
    #[must_use]
    pub fn new(explain: usize, limit: Duration) -> Self {
        Self {
            explain,
            limit,
            weakening: None,
        }
    }

    #[cfg(test)]
    pub(crate) fn weakened(weakening: Weakening) -> Self {
        Self {
            weakening: Some(weakening),
            ..Self::default()
        }
    }

    /// Judges a history.
    ///
    /// # Consistency
    ///
    /// Each item is judged as a linearizable register that is created once and deleted once;
    /// linearizability is local, so this judges them all together. Pages are judged item by item.
    ///
    /// # Errors
    ///
    /// When the history cannot be judged, which says nothing about it.
    pub fn judge(&self, history: &History) -> Result<Findings, JudgeError> {
        let started = Instant::now();
        let in_time = || {
            if started.elapsed() > self.limit {
                return Err(JudgeError::OutOfTime(self.limit));
            }
            Ok(())
        };
        let mut registers = Registers::new(history, self.weakening)?;
        let mut findings = Findings {
            operations: history.operations().len(),
            ..Findings::default()
        };
        registers.observations(|_, _| findings.reads += 1);

        let mut faults: HashMap<Key, Vec<Fault>> = HashMap::new();
        for fault in std::mem::take(&mut registers.faults) {
            faults.entry(fault.key).or_default().push(fault);
        }
        let unseen = self.unseen_writes(&registers, &mut findings);

        let mut cases: HashMap<Key, Case> = HashMap::new();
        for key in registers.judged_keys() {
            in_time()?;
            findings.items += 1;
            let register = Register::new(&registers, key);
            let conflicts = register.conflicts(self.weakening);
            let reused = if self.weakening == Some(Weakening::VersionsMayRepeat) {
                Vec::new()
            } else {
                register.reused_versions()
            };
            let skipped = register
                .skipped_versions(unseen[key.0 as usize])
                .filter(|_| self.weakening != Some(Weakening::VersionsMayBeSkipped));
            let mut faults = faults.remove(&key).unwrap_or_default();
            faults.extend_from_slice(&register.faults);
            if !(conflicts.is_empty()
                && reused.is_empty()
                && skipped.is_none()
                && faults.is_empty())
            {
                cases.insert(
                    key,
                    Case {
                        register,
                        conflicts,
                        reused,
                        skipped,
                        faults,
                        observations: Vec::new(),
                    },
                );
            }
        }
        if findings.items == 0 || findings.operations == 0 {
            return Err(JudgeError::Empty);
        }

        findings.bad_items = cases.len();
        if !cases.is_empty() {
            registers.observations(|observation: Observation, _| {
                if let Some(case) = cases.get_mut(&observation.key) {
                    case.observations.push(observation);
                }
            });
        }
        let mut keys: Vec<Key> = cases.keys().copied().collect();
        keys.sort_unstable();
        let mut found = Vec::new();
        for key in keys {
            in_time()?;
            if let Some(case) = cases.remove(&key) {
                explain::explain(&registers, case, &mut findings, &mut found);
            }
        }
        for draft in explain::worst(found, self.explain) {
            in_time()?;
            findings.anomalies.push(draft.confirm(&registers)?);
        }
        findings.elapsed = started.elapsed();
        Ok(findings)
    }

    /// By key: writes of unknown outcome that nobody saw.
    fn unseen_writes(&self, registers: &Registers<'_>, findings: &mut Findings) -> Vec<u64> {
        let mut unseen = vec![0; registers.history.key_count()];
        for operation in registers.history.operations() {
            let unknown = registers.outcome(operation) == Outcome::Unknown;
            findings.unknown += u64::from(unknown);
            if unknown
                && operation.action == Action::Update
                && let (Some(key), Some(value)) = (operation.key, operation.value)
                && registers.zone(value).reads == 0
            {
                unseen[key.0 as usize] += 1;
            }
        }
        unseen
    }
}
