//! What every cache does: it hands out sessions, and a session runs commands.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use writethrough_protocol::page::Page;
use writethrough_protocol::{Acquire, KeyState, Payload, ServerId, Token};

use crate::error::CacheError;

/// The ids of in-process caches begin like this.
pub(crate) const IN_PROCESS: &str = "memory-";

/// The newest verified session, or `None` while there is none.
pub type SessionWatch = watch::Receiver<Option<Arc<dyn Session>>>;

/// A cache, connected or not.
pub trait Cache: Send + Sync + 'static {
    /// The session that is usable now, kept up to date.
    fn sessions(&self) -> SessionWatch;

    /// Why there is no session, when the cache knows.
    fn trouble(&self) -> Option<CacheError> {
        None
    }

    /// Drops the connection and stops making new ones.
    fn close(&self);
}

/// What has become of what a load wanted to store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// It is stored.
    Stored,
    /// A write, a clearing or the time came between: the cache is as it was.
    Refused,
}

/// Whether a token still held the fill lease of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FillLease {
    /// It did, and what was asked for is done.
    Held,
    /// The lease had lapsed, or something else has taken its place: nothing is done.
    Lost,
}

#[cfg(any(feature = "memory", feature = "redis"))]
impl Filled {
    pub(super) fn new(stored: bool) -> Self {
        if stored { Self::Stored } else { Self::Refused }
    }
}

#[cfg(any(feature = "memory", feature = "redis"))]
impl FillLease {
    pub(super) fn new(held: bool) -> Self {
        if held { Self::Held } else { Self::Lost }
    }
}

impl<C: Cache + ?Sized> Cache for Arc<C> {
    fn sessions(&self) -> SessionWatch {
        (**self).sessions()
    }

    fn trouble(&self) -> Option<CacheError> {
        (**self).trouble()
    }

    fn close(&self) {
        (**self).close();
    }
}

/// How one write ends in one key.
#[derive(Debug, Clone)]
pub struct End {
    /// The cache key.
    pub key: String,
    /// The value to keep, or `None` to leave nothing.
    pub value: Option<Payload>,
    /// How long to keep it.
    pub ttl: Duration,
}

/// A fill lease: of which key, under which token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The cache key.
    pub key: String,
    /// The token that names the lease.
    pub token: Token,
}

/// The fill of one key.
#[derive(Debug, Clone)]
pub struct Fill {
    /// The lease under which the value was loaded.
    pub lease: Lease,
    /// The value.
    pub payload: Payload,
    /// How long to keep it.
    pub ttl: Duration,
}

/// What one of many commands gave: a command that failed by itself says nothing of the others.
fn of_one_key<T>(answer: Result<T, CacheError>) -> Result<Option<T>, CacheError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(CacheError::Command(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A verified connection to one life of one cache server. Each method is one round trip (the walks
/// `count` and `clear`, and `begin` and `end` of many keys, are many short ones), each bounded by the
/// cache's command deadline.
///
/// Those whose names end in `_many` do the same for many keys, each key by itself: nothing is atomic
/// beyond one key. Without an implementation of their own they do it one key after another; a cache over
/// a network should send them together, a bounded number in each round trip. A key on which the command
/// itself fails does not fail the others.
///
/// `fill`, `renew_fill`, `break_fill`, `begin` and `end` may be tried again with the same token. `acquire_fill` must
/// not: its first copy may execute late and put the lease back after a write has ended.
///
/// # Cancellation
///
/// A dropped future may or may not have been executed by the server, now or later. The protocol
/// is safe in each case; an orphaned intent or fill lease lapses at its deadline.
#[async_trait]
pub trait Session: Send + Sync + 'static {
    /// The server that this session was verified to talk to.
    fn server(&self) -> &ServerId;

    /// The cache's name for traces: `redis` or `memory`.
    fn system(&self) -> &'static str;

    /// Reads one key. The hot path: one plain command.
    async fn get(&self, key: &str) -> Result<KeyState, CacheError>;

    /// Reads many keys; `None` for one that holds no state.
    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<KeyState>>, CacheError> {
        let mut states = Vec::with_capacity(keys.len());
        for key in keys {
            states.push(of_one_key(self.get(key).await)?);
        }
        Ok(states)
    }

    /// [`KeyState::acquire_fill`], for `lease` at most.
    async fn acquire_fill(
        &self,
        key: &str,
        token: Token,
        lease: Duration,
    ) -> Result<Acquire, CacheError>;

    /// [`Session::acquire_fill`] of many keys; `None` for one on which it failed.
    async fn acquire_fill_many(
        &self,
        leases: &[Lease],
        lasting: Duration,
    ) -> Result<Vec<Option<Acquire>>, CacheError> {
        let mut answers = Vec::with_capacity(leases.len());
        for Lease { key, token } in leases {
            let answer = self.acquire_fill(key, *token, lasting).await;
            answers.push(of_one_key(answer)?);
        }
        Ok(answers)
    }

    /// [`KeyState::fill`]; the value expires after `ttl`.
    async fn fill(
        &self,
        key: &str,
        token: Token,
        payload: Payload,
        ttl: Duration,
    ) -> Result<Filled, CacheError>;

    /// [`Session::fill`] of many keys. Tells of each whether it filled.
    async fn fill_many(&self, fills: Vec<Fill>) -> Result<Vec<bool>, CacheError> {
        let mut filled = Vec::with_capacity(fills.len());
        for Fill {
            lease,
            payload,
            ttl,
        } in fills
        {
            let fill = self.fill(&lease.key, lease.token, payload, ttl).await;
            filled.push(of_one_key(fill)? == Some(Filled::Stored));
        }
        Ok(filled)
    }

    /// [`KeyState::renew_fill`]; while the lease is there it lasts for `lease` from now on.
    async fn renew_fill(
        &self,
        key: &str,
        token: Token,
        lease: Duration,
    ) -> Result<FillLease, CacheError>;

    /// [`Session::renew_fill`] of many keys. Tells of each whether the lease is there.
    async fn renew_fill_many(
        &self,
        leases: &[Lease],
        lasting: Duration,
    ) -> Result<Vec<bool>, CacheError> {
        let mut held = Vec::with_capacity(leases.len());
        for Lease { key, token } in leases {
            let renewal = self.renew_fill(key, *token, lasting).await;
            held.push(of_one_key(renewal)? == Some(FillLease::Held));
        }
        Ok(held)
    }

    /// [`KeyState::break_fill`].
    async fn break_fill(&self, key: &str, token: Token) -> Result<FillLease, CacheError>;

    /// [`Session::break_fill`] of many keys.
    async fn break_fill_many(&self, leases: &[Lease]) -> Result<(), CacheError> {
        for Lease { key, token } in leases {
            of_one_key(self.break_fill(key, *token).await)?;
        }
        Ok(())
    }

    /// [`KeyState::begin`] on every key, each intent lasting `lifetime`.
    async fn begin(
        &self,
        keys: &[String],
        token: Token,
        lifetime: Duration,
    ) -> Result<(), CacheError>;

    /// [`KeyState::end`] on every key.
    async fn end(&self, ends: &[End], token: Token) -> Result<(), CacheError>;

    /// Reads a collection key and one of its pages in one atomic step.
    async fn get_page(
        &self,
        collection: &str,
        page: &str,
    ) -> Result<(KeyState, Option<Page>), CacheError>;

    /// [`writethrough_protocol::page::fill`]: stamps the collection if `token` holds its lease, and
    /// stores the page if the collection then carries `token` as its stamp.
    async fn fill_page(
        &self,
        collection: &str,
        page: &str,
        token: Token,
        bytes: Bytes,
        ttl: Duration,
    ) -> Result<Filled, CacheError>;

    /// Removes a value or a page if it still holds these bytes.
    async fn discard(&self, key: &str, bytes: &Bytes) -> Result<(), CacheError>;

    /// [`Session::discard`] of many keys.
    async fn discard_many(&self, entries: &[(String, Bytes)]) -> Result<(), CacheError> {
        for (key, bytes) in entries {
            of_one_key(self.discard(key, bytes).await)?;
        }
        Ok(())
    }

    /// Stores a value unconditionally, as the textbook does: outside of the protocol.
    async fn set(&self, key: &str, payload: Payload, ttl: Duration) -> Result<(), CacheError>;

    /// Removes a key unconditionally, as the textbook does: outside of the protocol.
    async fn delete(&self, key: &str) -> Result<(), CacheError>;

    /// Counts the values whose key matches the glob `pattern`, in bounded steps.
    async fn count(&self, pattern: &str) -> Result<u64, CacheError>;

    /// Removes values, pages and fill leases whose key matches, in bounded steps; intents stay.
    /// Returns how many keys were removed.
    async fn clear(&self, pattern: &str) -> Result<u64, CacheError>;
}
