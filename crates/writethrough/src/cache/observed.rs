//! A session with a span for each command, for callers that are traced. The names of the spans and
//! of their attributes are a promise to dashboards; they stand here and nowhere else.
//!
//! A span is made only inside an enabled one. Outside of one each method hands on the session's own
//! future: a caller that is not traced pays a look at a thread-local and nothing more.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tracing::{Instrument, Span};
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

/// A command under way, as a [`Session`] gives it.
type Command<'a, T> = Pin<Box<dyn Future<Output = Result<T, CacheError>> + Send + 'a>>;

/// Runs a command in its span, if it has one.
fn within<T: 'static>(span: Span, command: Command<'_, T>) -> Command<'_, T> {
    if span.is_none() {
        command
    } else {
        Box::pin(command.instrument(span))
    }
}

/// The same, and tells whether what was looked for was there.
fn looking<T: 'static>(
    span: Span,
    command: Command<'_, T>,
    is_hit: fn(&T) -> bool,
) -> Command<'_, T> {
    if span.is_none() {
        return command;
    }
    Box::pin(async move {
        let found = command.instrument(span.clone()).await;
        if let Ok(found) = &found {
            span.record("cache.hit", is_hit(found));
        }
        found
    })
}

/// A session as it is used in one epoch. It has only what a read or a write needs.
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

    pub(crate) fn get<'a>(&'a self, key: &'a str) -> Command<'a, KeyState> {
        let span = span!(self, "redis_get", "GET", key);
        let is_hit = |state: &KeyState| matches!(state, KeyState::Value(_));
        looking(span, self.session.get(key), is_hit)
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

    pub(crate) fn get_page<'a>(
        &'a self,
        collection: &'a str,
        page: &'a str,
    ) -> Command<'a, (KeyState, Option<Page>)> {
        let span = span!(self, "redis_get", "MGET", page);
        let is_hit = |(state, page): &(KeyState, Option<Page>)| {
            let stamp = page.as_ref().map(|page| page.stamp);
            stamp.is_some() && page::stamp(state) == stamp
        };
        looking(span, self.session.get_page(collection, page), is_hit)
    }

    pub(crate) fn acquire_fill<'a>(
        &'a self,
        key: &'a str,
        token: Token,
        lease: Duration,
    ) -> Command<'a, Acquire> {
        let span = span!(self, "redis_lease", "SET", key);
        within(span, self.session.acquire_fill(key, token, lease))
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

    pub(crate) fn renew_fill<'a>(
        &'a self,
        key: &'a str,
        token: Token,
        lease: Duration,
    ) -> Command<'a, FillLease> {
        let span = span!(self, "redis_lease", "EVALSHA", key);
        within(span, self.session.renew_fill(key, token, lease))
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

    pub(crate) fn break_fill<'a>(&'a self, key: &'a str, token: Token) -> Command<'a, FillLease> {
        let span = span!(self, "redis_del", "EVALSHA", key);
        within(span, self.session.break_fill(key, token))
    }

    pub(crate) async fn break_fill_many(&self, leases: &[Lease]) -> Result<(), CacheError> {
        let span = span!(self, "redis_del", "EVALSHA", first(leases));
        self.session.break_fill_many(leases).instrument(span).await
    }

    pub(crate) fn fill<'a>(
        &'a self,
        key: &'a str,
        token: Token,
        payload: Payload,
        ttl: Duration,
    ) -> Command<'a, Filled> {
        let span = span!(self, "redis_set", "EVALSHA", key);
        within(span, self.session.fill(key, token, payload, ttl))
    }

    pub(crate) async fn fill_many(&self, fills: Vec<Fill>) -> Result<Vec<bool>, CacheError> {
        let first = fills.first().map_or("", |fill| fill.lease.key.as_str());
        let span = span!(self, "redis_set", "EVALSHA", first);
        self.session.fill_many(fills).instrument(span).await
    }

    pub(crate) fn fill_page<'a>(
        &'a self,
        collection: &'a str,
        page: &'a str,
        token: Token,
        bytes: Bytes,
        ttl: Duration,
    ) -> Command<'a, Filled> {
        let span = span!(self, "redis_set", "EVALSHA", page);
        let filled = self.session.fill_page(collection, page, token, bytes, ttl);
        within(span, filled)
    }

    pub(crate) fn discard<'a>(&'a self, key: &'a str, bytes: &'a Bytes) -> Command<'a, ()> {
        let span = span!(self, "redis_del", "EVALSHA", key);
        within(span, self.session.discard(key, bytes))
    }

    pub(crate) async fn discard_many(&self, entries: &[(String, Bytes)]) -> Result<(), CacheError> {
        let first = entries.first().map_or("", |(key, _)| key.as_str());
        let span = span!(self, "redis_del", "EVALSHA", first);
        self.session.discard_many(entries).instrument(span).await
    }

    /// The span has the name of the first key.
    pub(crate) fn begin<'a>(
        &'a self,
        keys: &'a [String],
        token: Token,
        lifetime: Duration,
    ) -> Command<'a, ()> {
        let first = keys.first().map_or("", String::as_str);
        let span = span!(self, "redis_intent", "EVALSHA", first);
        within(span, self.session.begin(keys, token, lifetime))
    }

    /// The span has the name of the first key, and tells whether a value is kept.
    pub(crate) fn end<'a>(&'a self, ends: &'a [End], token: Token) -> Command<'a, ()> {
        let first = ends.first().map_or("", |end| end.key.as_str());
        let span = if ends.iter().any(|end| end.value.is_some()) {
            span!(self, "redis_set", "EVALSHA", first)
        } else {
            span!(self, "redis_del", "EVALSHA", first)
        };
        within(span, self.session.end(ends, token))
    }

    #[cfg(feature = "textbook")]
    pub(crate) fn set<'a>(
        &'a self,
        key: &'a str,
        payload: Payload,
        ttl: Duration,
    ) -> Command<'a, ()> {
        let span = span!(self, "redis_set", "SET", key);
        within(span, self.session.set(key, payload, ttl))
    }

    #[cfg(feature = "textbook")]
    pub(crate) fn delete<'a>(&'a self, key: &'a str) -> Command<'a, ()> {
        let span = span!(self, "redis_del", "DEL", key);
        within(span, self.session.delete(key))
    }
}
