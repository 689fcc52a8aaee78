//! A session with a span for each command, for callers that are traced. The names of the spans and
//! of their attributes are a promise to dashboards; they stand here and nowhere else.
//!
//! A span is made only inside an enabled one, so a caller that is not traced pays a look at a
//! thread-local and nothing more.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tracing::Instrument;
use writethrough_protocol::page::{self, Page};
use writethrough_protocol::{Acquire, Epoch, KeyState, Payload, ServerId, Token};

use super::{End, Fill, FillLease, Filled, Lease, Session};
use crate::error::CacheError;

/// A client span named after what the command does for the caller.
macro_rules! span {
    ($session:expr, $name:literal, $operation:literal, $key:expr) => {
        if tracing::Span::current().is_none() {
            tracing::Span::none()
        } else {
            tracing::info_span!(
                target: "writethrough",
                $name,
                otel.kind = "client",
                db.system.name = $session.session.system(),
                db.operation.name = $operation,
                cache.key = $key,
                cache.epoch = $session.epoch.map(|epoch| epoch.0),
                cache.hit = tracing::field::Empty,
            )
        }
    };
}

fn first(leases: &[Lease]) -> &str {
    leases.first().map_or("", |lease| lease.key.as_str())
}

/// A session as it is used in one epoch. Not a [`Session`] itself: its futures are not boxed a
/// second time, and it has only what a read or a write needs.
#[derive(Clone)]
pub(crate) struct Observed {
    session: Arc<dyn Session>,
    /// The epoch that the spans tell of; none outside of the protocol.
    epoch: Option<Epoch>,
}

impl Observed {
    pub(crate) fn new(session: Arc<dyn Session>, epoch: Option<Epoch>) -> Self {
        Self { session, epoch }
    }

    /// Whether it is this session.
    pub(crate) fn is(&self, session: &Arc<dyn Session>) -> bool {
        Arc::ptr_eq(&self.session, session)
    }

    /// Whether both are one session.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.is(&other.session)
    }

    pub(crate) fn server(&self) -> &ServerId {
        self.session.server()
    }

    pub(crate) async fn get(&self, key: &str) -> Result<KeyState, CacheError> {
        let span = span!(self, "redis_get", "GET", key);
        let found = self.session.get(key).instrument(span.clone()).await;
        if let Ok(state) = &found {
            span.record("cache.hit", matches!(state, KeyState::Value(_)));
        }
        found
    }

    /// The span has the name of the first key, as those of all commands on many keys.
    pub(crate) async fn get_many(
        &self,
        keys: &[String],
    ) -> Result<Vec<Option<KeyState>>, CacheError> {
        let first = keys.first().map_or("", String::as_str);
        let span = span!(self, "redis_get", "MGET", first);
        self.session.get_many(keys).instrument(span).await
    }

    pub(crate) async fn get_page(
        &self,
        collection: &str,
        page: &str,
    ) -> Result<(KeyState, Option<Page>), CacheError> {
        let span = span!(self, "redis_get", "MGET", page);
        let found = self.session.get_page(collection, page);
        let found = found.instrument(span.clone()).await;
        if let Ok((state, page)) = &found {
            let hit = page
                .as_ref()
                .is_some_and(|page| page::stamp(state) == Some(page.stamp));
            span.record("cache.hit", hit);
        }
        found
    }

    pub(crate) async fn acquire_fill(
        &self,
        key: &str,
        token: Token,
        lease: Duration,
    ) -> Result<Acquire, CacheError> {
        let span = span!(self, "redis_lease", "SET", key);
        let acquired = self.session.acquire_fill(key, token, lease);
        acquired.instrument(span).await
    }

    pub(crate) async fn acquire_fill_many(
        &self,
        leases: &[Lease],
        lasting: Duration,
    ) -> Result<Vec<Option<Acquire>>, CacheError> {
        let span = span!(self, "redis_lease", "SET", first(leases));
        let acquired = self.session.acquire_fill_many(leases, lasting);
        acquired.instrument(span).await
    }

    pub(crate) async fn renew_fill(
        &self,
        key: &str,
        token: Token,
        lease: Duration,
    ) -> Result<FillLease, CacheError> {
        let span = span!(self, "redis_lease", "EVALSHA", key);
        let renewed = self.session.renew_fill(key, token, lease);
        renewed.instrument(span).await
    }

    pub(crate) async fn renew_fill_many(
        &self,
        leases: &[Lease],
        lasting: Duration,
    ) -> Result<Vec<bool>, CacheError> {
        let span = span!(self, "redis_lease", "EVALSHA", first(leases));
        let renewed = self.session.renew_fill_many(leases, lasting);
        renewed.instrument(span).await
    }

    pub(crate) async fn break_fill(
        &self,
        key: &str,
        token: Token,
    ) -> Result<FillLease, CacheError> {
        let span = span!(self, "redis_del", "EVALSHA", key);
        self.session.break_fill(key, token).instrument(span).await
    }

    pub(crate) async fn break_fill_many(&self, leases: &[Lease]) -> Result<(), CacheError> {
        let span = span!(self, "redis_del", "EVALSHA", first(leases));
        self.session.break_fill_many(leases).instrument(span).await
    }

    pub(crate) async fn fill(
        &self,
        key: &str,
        token: Token,
        payload: Payload,
        ttl: Duration,
    ) -> Result<Filled, CacheError> {
        let span = span!(self, "redis_set", "EVALSHA", key);
        let filled = self.session.fill(key, token, payload, ttl);
        filled.instrument(span).await
    }

    pub(crate) async fn fill_many(&self, fills: Vec<Fill>) -> Result<Vec<bool>, CacheError> {
        let first = fills.first().map_or("", |fill| fill.lease.key.as_str());
        let span = span!(self, "redis_set", "EVALSHA", first);
        self.session.fill_many(fills).instrument(span).await
    }

    pub(crate) async fn fill_page(
        &self,
        collection: &str,
        page: &str,
        token: Token,
        bytes: Bytes,
        ttl: Duration,
    ) -> Result<Filled, CacheError> {
        let span = span!(self, "redis_set", "EVALSHA", page);
        let filled = self.session.fill_page(collection, page, token, bytes, ttl);
        filled.instrument(span).await
    }

    pub(crate) async fn discard(&self, key: &str, bytes: &Bytes) -> Result<(), CacheError> {
        let span = span!(self, "redis_del", "EVALSHA", key);
        self.session.discard(key, bytes).instrument(span).await
    }

    pub(crate) async fn discard_many(&self, entries: &[(String, Bytes)]) -> Result<(), CacheError> {
        let first = entries.first().map_or("", |(key, _)| key.as_str());
        let span = span!(self, "redis_del", "EVALSHA", first);
        self.session.discard_many(entries).instrument(span).await
    }

    /// The span has the name of the first key.
    pub(crate) async fn begin(
        &self,
        keys: &[String],
        token: Token,
        lifetime: Duration,
    ) -> Result<(), CacheError> {
        let first = keys.first().map_or("", String::as_str);
        let span = span!(self, "redis_intent", "EVALSHA", first);
        let begun = self.session.begin(keys, token, lifetime);
        begun.instrument(span).await
    }

    /// The span has the name of the first key, and tells whether a value is kept.
    pub(crate) async fn end(&self, ends: &[End], token: Token) -> Result<(), CacheError> {
        let first = ends.first().map_or("", |end| end.key.as_str());
        let span = if ends.iter().any(|end| end.value.is_some()) {
            span!(self, "redis_set", "EVALSHA", first)
        } else {
            span!(self, "redis_del", "EVALSHA", first)
        };
        self.session.end(ends, token).instrument(span).await
    }

    #[cfg(feature = "textbook")]
    pub(crate) async fn set(
        &self,
        key: &str,
        payload: Payload,
        ttl: Duration,
    ) -> Result<(), CacheError> {
        let span = span!(self, "redis_set", "SET", key);
        self.session.set(key, payload, ttl).instrument(span).await
    }

    #[cfg(feature = "textbook")]
    pub(crate) async fn delete(&self, key: &str) -> Result<(), CacheError> {
        let span = span!(self, "redis_del", "DEL", key);
        self.session.delete(key).instrument(span).await
    }
}
