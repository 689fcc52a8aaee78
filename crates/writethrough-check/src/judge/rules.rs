//! The rules of the judge, each with a switch.

use crate::history::Outcome;

/// The rules that histories are judged by.
///
/// All are on. Tests switch off one at a time, to show that the rule is needed: without it a
/// known-bad history passes, or a known-good one does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    /// Two forward zones do not overlap.
    pub(crate) forward_zones_are_apart: bool,
    /// No backward zone lies inside a forward zone.
    pub(crate) backward_zones_are_outside: bool,
    /// An item is created, then updated, then deleted.
    pub(crate) life_has_an_order: bool,
    /// The version of a later write is higher.
    pub(crate) versions_grow: bool,
    /// Two values of one item have different versions.
    pub(crate) versions_are_unique: bool,
    /// A version is missing only where a write of unknown outcome can have taken it.
    pub(crate) versions_have_no_gaps: bool,
    /// A read proves that its value was in place at some moment while it ran.
    pub(crate) reads_are_evidence: bool,
    /// An acknowledged write took effect before it completed.
    pub(crate) acknowledged_writes_took_effect: bool,
    /// A value that was read was written to that item.
    pub(crate) values_were_written: bool,
    /// A value that was read was written before the read completed.
    pub(crate) values_were_written_before: bool,
    /// An item that exists is found until its deletion was invoked.
    pub(crate) existing_items_are_found: bool,
    /// A page reads each item of its window that it leaves out as absent.
    pub(crate) omissions_are_reads: bool,
    /// A page reads the value of each item that it shows.
    pub(crate) entries_are_reads: bool,
    /// What an operation of unknown outcome is taken for.
    pub(crate) unknown_is: Outcome,
    /// What a failed operation is taken for.
    pub(crate) failed_is: Outcome,
}

impl Rules {
    /// All rules, as they are meant.
    pub(crate) const ALL: Self = Self {
        forward_zones_are_apart: true,
        backward_zones_are_outside: true,
        life_has_an_order: true,
        versions_grow: true,
        versions_are_unique: true,
        versions_have_no_gaps: true,
        reads_are_evidence: true,
        acknowledged_writes_took_effect: true,
        values_were_written: true,
        values_were_written_before: true,
        existing_items_are_found: true,
        omissions_are_reads: true,
        entries_are_reads: true,
        unknown_is: Outcome::Unknown,
        failed_is: Outcome::Failed,
    };

    /// Returns the outcome that an operation is judged by.
    pub(crate) fn outcome(&self, recorded: Outcome) -> Outcome {
        match recorded {
            Outcome::Unknown => self.unknown_is,
            Outcome::Failed => self.failed_is,
            Outcome::Ok | Outcome::Absent => recorded,
        }
    }
}
