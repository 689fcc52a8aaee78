//! What a read does next, given what it has just learned.
//!
//! A read that meets another's fill lease never breaks it: a load may take as long as it takes, its
//! holder renews the lease meanwhile, and its fill is accepted. Who may share a load: a read that saw
//! the lease intact under which the load runs, after the read began. The token that it saw proves
//! that no write was announced since the lease was taken; so a load begun under it is as new as any
//! write acknowledged before that read began.

use std::time::Duration;

use bytes::Bytes;

use crate::key::{Acquire, KeyState, Payload, Token};
use crate::page::{self, Page};

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
    /// Another process is loading for longer than this one waits.
    SlowFill,
    /// The cache did not answer in time or answered with an error.
    CacheError,
    /// The cached bytes are not a value of the expected type, or what another read has loaded cannot be
    /// shared, because its format cannot write it.
    Undecodable,
}

impl Bypass {
    /// Every reason, in the order of [`Bypass::index`].
    pub const ALL: [Self; 8] = [
        Self::Epoch,
        Self::Observing,
        Self::NoLease,
        Self::NotConnected,
        Self::Intent,
        Self::SlowFill,
        Self::CacheError,
        Self::Undecodable,
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
            Self::Undecodable => "undecodable",
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
    /// Somebody is loading under this lease: share a load of this process under it, or look again;
    /// see [`while_awaiting`].
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

/// What the reads of one process that follow another process's lease do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Following {
    /// Look at the key again in a moment.
    LookAgain,
    /// One of them loads, fills nothing, and shares what it got with all who saw the same lease.
    LoadBeside,
}

/// Decides for the reads of a process that have followed another process's lease for `waited`. The
/// lease itself is left alone: breaking it is for its holder, and a dead holder's lease lapses.
#[must_use]
pub fn while_awaiting(waited: Duration, fill_wait: Duration) -> Following {
    if waited < fill_wait {
        Following::LookAgain
    } else {
        Following::LoadBeside
    }
}

/// The next step of a read of a page after it has looked at the collection and the page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PageNext {
    /// Return this page: a hit.
    Hit(Bytes),
    /// Take the collection's fill lease, then load the page under it.
    AcquireFill,
    /// Load under this token, the collection's stamp or a fill lease that will become it; the page
    /// may be stored while the collection still carries the token.
    LoadUnder(Token),
    /// Read the store and return; fill nothing.
    Bypass(Bypass),
}

/// Decides after collection and page were read in one atomic step; `lease_valid` as for
/// [`after_get`].
#[must_use]
pub fn after_get_page(collection: KeyState, page: Option<Page>, lease_valid: bool) -> PageNext {
    match collection {
        _ if !lease_valid => PageNext::Bypass(Bypass::NoLease),
        KeyState::Absent => PageNext::AcquireFill,
        KeyState::FillLease(token) => PageNext::LoadUnder(token),
        KeyState::Intent(_) => PageNext::Bypass(Bypass::Intent),
        KeyState::Value(_) => match (page::stamp(&collection), page) {
            (Some(stamp), Some(page)) if page.stamp == stamp => PageNext::Hit(page.bytes),
            (Some(stamp), _) => PageNext::LoadUnder(stamp),
            (None, _) => PageNext::Bypass(Bypass::CacheError),
        },
    }
}

/// Decides after `acquire_fill` of a collection under `token`; `lease_valid` as for [`after_get`].
#[must_use]
pub fn after_acquire_page(token: Token, answer: Acquire, lease_valid: bool) -> PageNext {
    match answer {
        Acquire::Acquired => PageNext::LoadUnder(token),
        Acquire::Held(state) => after_get_page(state, None, lease_valid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_lease_is_followed_and_after_the_wait_one_read_loads_beside_it() {
        let ms = Duration::from_millis;
        assert_eq!(while_awaiting(ms(249), ms(250)), Following::LookAgain);
        assert_eq!(while_awaiting(ms(250), ms(250)), Following::LoadBeside);
    }

    #[test]
    fn a_page_is_hit_only_under_its_stamp_and_loaded_under_what_the_collection_carries() {
        const S: Token = Token(1);
        let page = |stamp| {
            Some(Page {
                stamp,
                bytes: Bytes::from_static(b"[]"),
            })
        };
        let stamped = page::fill(KeyState::FillLease(S), S).0;
        let hit = PageNext::Hit(Bytes::from_static(b"[]"));
        assert_eq!(after_get_page(stamped.clone(), page(S), true), hit);
        for (collection, page, next) in [
            (stamped.clone(), page(Token(2)), PageNext::LoadUnder(S)),
            (stamped.clone(), None, PageNext::LoadUnder(S)),
            (KeyState::FillLease(S), page(S), PageNext::LoadUnder(S)),
            (KeyState::Absent, page(S), PageNext::AcquireFill),
            (
                KeyState::Absent.begin(S, 9, 0),
                page(S),
                PageNext::Bypass(Bypass::Intent),
            ),
            (
                KeyState::Value(None),
                page(S),
                PageNext::Bypass(Bypass::CacheError),
            ),
        ] {
            assert_eq!(after_get_page(collection, page, true), next);
        }
        let no_lease = PageNext::Bypass(Bypass::NoLease);
        assert_eq!(after_get_page(stamped.clone(), page(S), false), no_lease);
        let held = Acquire::Held(stamped);
        assert_eq!(after_acquire_page(Token(2), held.clone(), false), no_lease);
        assert_eq!(
            after_acquire_page(Token(2), held, true),
            PageNext::LoadUnder(S)
        );
        assert_eq!(
            after_acquire_page(S, Acquire::Acquired, false),
            PageNext::LoadUnder(S)
        );
    }

    #[test]
    fn reasons_are_listed_in_the_order_of_their_index() {
        for (place, reason) in Bypass::ALL.into_iter().enumerate() {
            assert_eq!(reason.index(), place);
        }
    }
}
