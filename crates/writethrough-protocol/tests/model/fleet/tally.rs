//! What happened on the way: how often each event was a step of some explored state.

use std::sync::atomic::{AtomicU64, Ordering};

use stateright::Property;

use super::Search;

/// Something that a search must have come across, or it has shown nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    Hit,
    /// A hit in an epoch after the first: the cache came back.
    HitAfterBypass,
    PageHit,
    Shared,
    Filled,
    FillRefused,
    Bypassed,
    /// A commit that the guard refused.
    Fenced,
    /// A commit after its writer had given up.
    LateWrite,
    /// A write acknowledged after a failed end, when the next epoch was active.
    AcknowledgedLate,
    /// A load beside another process's lease that was shared.
    SharedBeside,
    /// A hit in a history after the first.
    HitAfterPromotion,
    /// A hit on the contents that a server has taken over.
    HitAfterReplacement,
}

impl Event {
    /// That this happens, as a property of the whole search.
    pub(crate) fn property(self) -> Property<Search> {
        macro_rules! met {
            ($($event:ident: $words:literal,)*) => {
                match self {
                    $(Self::$event => Property::sometimes($words, |search: &Search, _| {
                        search.tally.of(Self::$event) > 0
                    }),)*
                }
            };
        }
        met! {
            Hit: "a hit",
            HitAfterBypass: "a hit in a later epoch",
            PageHit: "a page hit",
            Shared: "a shared load",
            Filled: "a fill",
            FillRefused: "a refused fill",
            Bypassed: "a read past the cache",
            Fenced: "a refused commit",
            LateWrite: "a late commit",
            AcknowledgedLate: "a write acknowledged after its epoch was ended",
            SharedBeside: "a shared load beside a lease",
            HitAfterPromotion: "a hit after a promotion",
            HitAfterReplacement: "a hit in a server with other contents",
        }
    }
}

/// Counts of events over all explored steps. It is no part of a state: a state is the same however
/// it was reached.
#[derive(Debug, Default)]
pub(crate) struct Tally([AtomicU64; 13]);

impl Tally {
    pub(crate) fn count(&self, event: Event) {
        self.0[event as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn of(&self, event: Event) -> u64 {
        self.0[event as usize].load(Ordering::Relaxed)
    }
}
