//! What a read does next, given what it has just learned.

use crate::key::{Acquire, KeyState, Payload, Token};

/// Why a read went to the store without the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Bypass {
    /// The epoch says that nobody uses the cache, or the engine is configured not to.
    Epoch,
    /// A new epoch is being observed.
    Observing,
    /// The node has no valid read lease, before or after the lookup.
    NoLease,
    /// No verified connection to the epoch's server.
    NotConnected,
    /// A write of the key is under way.
    Intent,
    /// Another reader's load took too long.
    SlowFill,
    /// The cache did not answer in time or answered with an error.
    CacheError,
}

impl Bypass {
    /// Every reason, in the order of [`Bypass::index`].
    pub const ALL: [Self; 7] = [
        Self::Epoch,
        Self::Observing,
        Self::NoLease,
        Self::NotConnected,
        Self::Intent,
        Self::SlowFill,
        Self::CacheError,
    ];

    /// The place of this reason in [`Bypass::ALL`].
    #[must_use]
    pub fn index(self) -> usize {
        self as usize
    }

    /// A short name for headers and metric labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Epoch => "epoch",
            Self::Observing => "observing",
            Self::NoLease => "no-lease",
            Self::NotConnected => "not-connected",
            Self::Intent => "intent",
            Self::SlowFill => "slow-fill",
            Self::CacheError => "cache-error",
        }
    }
}

/// The next step of a read after it has looked at the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Return this: a hit.
    Hit(Payload),
    /// Take the fill lease, load, fill.
    AcquireFill,
    /// The lease was acquired: load under it, then fill.
    Load,
    /// Somebody is loading under this lease: share its result or look again.
    Await(Token),
    /// Read the store and return; fill nothing.
    Bypass(Bypass),
}

/// Decides after a `get`. `lease_valid` is [`crate::Node::holds_lease`] for the epoch of the key,
/// asked *after* the reply came: a paused node must not believe what it read under a dead epoch.
#[must_use]
pub fn after_get(state: KeyState, lease_valid: bool) -> Next {
    match state {
        _ if !lease_valid => Next::Bypass(Bypass::NoLease),
        KeyState::Value(payload) => Next::Hit(payload),
        KeyState::Absent => Next::AcquireFill,
        KeyState::FillLease(token) => Next::Await(token),
        KeyState::Intent(_) => Next::Bypass(Bypass::Intent),
    }
}

/// Decides after `acquire_fill`; `lease_valid` as for [`after_get`].
#[must_use]
pub fn after_acquire(answer: Acquire, lease_valid: bool) -> Next {
    match answer {
        Acquire::Acquired => Next::Load,
        // It was there and is gone again (expired between two looks): look once more.
        Acquire::Held(state) => after_get(state, lease_valid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn a_hit_needs_a_lease_that_is_valid_after_the_get() {
        let value = KeyState::Value(Some(Bytes::from_static(b"v")));
        assert_eq!(
            after_get(value.clone(), true),
            Next::Hit(Some(Bytes::from_static(b"v")))
        );
        assert_eq!(
            after_get(value.clone(), false),
            Next::Bypass(Bypass::NoLease)
        );
        assert_eq!(
            after_acquire(Acquire::Held(value), false),
            Next::Bypass(Bypass::NoLease)
        );
    }

    #[test]
    fn every_state_has_its_step() {
        assert_eq!(after_get(KeyState::Absent, true), Next::AcquireFill);
        assert_eq!(
            after_get(KeyState::FillLease(Token(3)), true),
            Next::Await(Token(3))
        );
        let intent = KeyState::Absent.begin(Token(1), 9, 0);
        assert_eq!(after_get(intent, true), Next::Bypass(Bypass::Intent));
        assert_eq!(after_get(KeyState::Value(None), true), Next::Hit(None));
        assert_eq!(after_acquire(Acquire::Acquired, false), Next::Load);
    }

    #[test]
    fn reasons_are_listed_in_the_order_of_their_index() {
        for (place, reason) in Bypass::ALL.into_iter().enumerate() {
            assert_eq!(reason.index(), place);
        }
    }
}
