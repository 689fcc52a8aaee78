//! The judge: is a history linearizable, and if not, why not?
//!
//! It works on histories alone and knows nothing of HTTP, of the service or of how it keeps its
//! promise.
//!
//! 1. `writes` finds the operation that wrote each value, created each item and deleted it.
//! 2. `pages` turns lists into reads of the items they show and of the items they leave out.
//! 3. `registers` makes one register of each item.
//! 4. `zones` tests each register, in the time it takes to sort its writes.
//! 5. `late` finds the reads to blame in the items that failed, and `explain` says in words what
//!    happened.
//! 6. `confirm` confirms each explanation by the general method, [`search`], and cuts it to the
//!    smallest offending set.
//!
//! `rules` has a switch for each rule, so that tests can show that the rule is needed.
//!
//! Versions are judged too: they are unique per item, keep the order of real time, belong to one
//! value each, and no more of them are missing than there were writes of unknown outcome. All of
//! this holds whatever became of those writes, so none of it raises a false alarm.

mod anomaly;
mod confirm;
mod explain;
mod findings;
mod late;
mod observation;
mod pages;
mod registers;
mod rules;
pub mod search;
#[cfg(test)]
mod tests;
mod writes;
mod zones;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use self::explain::Case;
use self::observation::Violation;
use self::registers::Registers;
use self::rules::Rules;
use self::writes::Writes;
use self::zones::Register;
use crate::history::{Action, History, Key, Outcome};

pub use self::anomaly::{Anomaly, Confirmation, Kind, Member, Role, Staleness};
pub use self::findings::{Findings, JudgeError, STALENESS_BUCKETS_MS};

/// A judge of histories.
#[derive(Clone, Debug)]
pub struct Judge {
    explain: usize,
    limit: Duration,
    rules: Rules,
}

impl Default for Judge {
    fn default() -> Self {
        Self::new(20, Duration::from_secs(60))
    }
}

impl Judge {
    /// Makes a judge that explains at most `explain` anomalies (it counts them all) and gives up
    /// after `limit`.
    #[must_use]
    pub fn new(explain: usize, limit: Duration) -> Self {
        Self {
            explain,
            limit,
            rules: Rules::ALL,
        }
    }

    #[cfg(test)]
    pub(crate) fn with_rules(rules: Rules) -> Self {
        Self {
            rules,
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
    /// Fails when the history cannot be judged, which says nothing about it.
    pub fn judge(&self, history: &History) -> Result<Findings, JudgeError> {
        let started = Instant::now();
        let in_time = || {
            if started.elapsed() > self.limit {
                return Err(JudgeError::OutOfTime(self.limit));
            }
            Ok(())
        };
        let rules = self.rules;
        let mut registers = Registers::new(Writes::find(history, rules)?);
        let mut findings = Findings {
            operations: history.operations().len(),
            ..Findings::default()
        };
        registers.observations(|_, _| findings.reads += 1);

        let mut violations: HashMap<Key, Vec<Violation>> = HashMap::new();
        for violation in std::mem::take(&mut registers.violations) {
            violations.entry(violation.key).or_default().push(violation);
        }
        let unseen = unseen_writes(&registers, &mut findings);

        let mut cases: HashMap<Key, Case> = HashMap::new();
        for key in registers.writes.judged_keys() {
            in_time()?;
            findings.items += 1;
            let register = Register::new(&registers, key);
            let conflicts = register.conflicts(&rules);
            let reused = if rules.versions_are_unique {
                register.reused_versions()
            } else {
                Vec::new()
            };
            let skipped = register
                .skipped_versions(unseen[key.0 as usize])
                .filter(|_| rules.versions_have_no_gaps);
            let mut violations = violations.remove(&key).unwrap_or_default();
            violations.extend_from_slice(&register.violations);
            if !(conflicts.is_empty()
                && reused.is_empty()
                && skipped.is_none()
                && violations.is_empty())
            {
                cases.insert(
                    key,
                    Case {
                        register,
                        conflicts,
                        reused,
                        skipped,
                        violations,
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
            registers.observations(|observation, _| {
                if let Some(case) = cases.get_mut(&observation.key) {
                    case.observations.push(observation);
                }
            });
        }
        let mut keys: Vec<Key> = cases.keys().copied().collect();
        keys.sort_unstable();
        let mut drafts = Vec::new();
        for key in keys {
            in_time()?;
            if let Some(case) = cases.remove(&key) {
                explain::explain(&registers, &case, &mut findings, &mut drafts);
            }
        }
        for draft in confirm::worst(drafts, self.explain) {
            in_time()?;
            findings.anomalies.push(draft.confirm(&registers)?);
        }
        findings.elapsed = started.elapsed();
        Ok(findings)
    }
}

/// Counts, by key, the writes of unknown outcome whose value was never read.
fn unseen_writes(registers: &Registers<'_>, findings: &mut Findings) -> Vec<u64> {
    let history = registers.writes.history;
    let mut unseen = vec![0; history.key_count()];
    for operation in history.operations() {
        let unknown = registers.writes.outcome(operation) == Outcome::Unknown;
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
