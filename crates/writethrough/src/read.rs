//! Reads: one value, or one page of a collection.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tracing::Instrument;
use writethrough_protocol::page;
use writethrough_protocol::read::{Bypass, Next, after_acquire, after_get};
use writethrough_protocol::{Epoch, KeyState, Payload, ReadPermit, Token};

use crate::cache::Session;
use crate::clock;
use crate::key::{Collection, Key};
use crate::loads::Leader;
use crate::settings::Consistency;
use crate::span::cache_span;
use crate::value::CacheValue;
use crate::write_through::{Engine, WriteThrough, new_token};

/// Where a read's answer came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadOutcome {
    /// The cache.
    Hit,
    /// The store, and the cache was filled.
    Filled,
    /// The store; the fill was refused or failed.
    Unfilled,
    /// The load of another read in this process.
    Coalesced,
    /// The store; the cache was not used, or not to the end.
    Bypassed(Bypass),
}

/// A read's answer.
#[derive(Debug, Clone)]
pub struct Read<V> {
    /// The value, or `None` when there is none.
    pub value: Option<V>,
    /// Where it came from.
    pub outcome: ReadOutcome,
    /// Time spent waiting for the cache.
    pub cache_time: Duration,
}

/// Adds up the time spent in the cache.
#[derive(Default)]
struct Stopwatch(Duration);

impl Stopwatch {
    async fn time<T>(&mut self, work: impl Future<Output = T>) -> T {
        let started = Instant::now();
        let answer = work.await;
        self.0 += started.elapsed();
        answer
    }
}

/// How the cache part of a read ended.
enum Looked {
    /// The answer.
    Found(Payload, ReadOutcome),
    /// Load, and fill under this.
    Load(Fill),
    /// Load; fill nothing.
    Bypass(Bypass),
}

/// The right to fill, and the duty to let go of it.
struct Fill {
    session: Arc<dyn Session>,
    epoch: Option<Epoch>,
    target: Target,
    leader: Option<Leader>,
    /// The fill lease to break if the load does not come to its end.
    lease: Option<Token>,
}

enum Target {
    Value {
        key: String,
        token: Token,
    },
    Page {
        collection: String,
        page: String,
        token: Token,
    },
    Unconditional {
        key: String,
    },
}

impl Drop for Fill {
    fn drop(&mut self) {
        let (
            Some(token),
            Target::Value { key, .. }
            | Target::Page {
                collection: key, ..
            },
        ) = (self.lease.take(), &self.target)
        else {
            return;
        };
        let (session, key) = (self.session.clone(), key.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { session.break_fill(&key, token).await });
        }
    }
}

impl Fill {
    /// Stores what was loaded. Returns whether the cache took it.
    async fn store(mut self, engine: &Engine, payload: Payload) -> bool {
        if let Some(leader) = &self.leader {
            leader.publish(payload.clone());
        }
        let ttl = engine.value_ttl(&payload);
        let (session, epoch) = (&self.session, self.epoch);
        let result = match &self.target {
            Target::Value { key, token } => {
                let span = cache_span!("redis_set", "EVALSHA", session, key, epoch);
                session
                    .fill(key, *token, payload, ttl)
                    .instrument(span)
                    .await
            }
            Target::Page {
                collection,
                page,
                token,
            } => {
                let span = cache_span!("redis_set", "EVALSHA", session, page, epoch);
                let bytes = payload.unwrap_or_default();
                session
                    .fill_page(collection, page, *token, bytes, ttl)
                    .instrument(span)
                    .await
            }
            Target::Unconditional { key } => {
                let span = cache_span!("redis_set", "SET", session, key, epoch);
                session
                    .set(key, payload, ttl)
                    .instrument(span)
                    .await
                    .map(|()| true)
            }
        };
        // Filled, replaced by somebody else, or left to lapse: there is no lease to break now.
        self.lease = None;
        match result {
            Ok(true) => true,
            Ok(false) => {
                engine.counters.refused_fills.add(1);
                false
            }
            Err(error) => {
                engine.cache_failed("a fill", &error);
                false
            }
        }
    }
}

impl WriteThrough {
    /// Reads one value: from the cache when it may be believed, else by `load`, which must read
    /// the store's primary and is called at most once.
    ///
    /// # Errors
    ///
    /// Only those of `load`. A cache that is down, slow or wrong is never an error.
    ///
    /// # Cancellation
    ///
    /// Dropped at any point it leaves nothing stale: a fill lease it holds is broken (or lapses,
    /// when the process dies), and readers that share its load look again.
    ///
    /// # Consistency
    ///
    /// Linearizable in strict mode, as [`crate`] describes.
    pub async fn read<V, E, L, F>(&self, key: &Key, load: L) -> Result<Read<V>, E>
    where
        V: CacheValue,
        L: FnOnce() -> F + Send,
        F: Future<Output = Result<Option<V>, E>> + Send,
    {
        let mut watch = Stopwatch::default();
        let looked = self.engine.look_for_value(key, &mut watch).await;
        self.engine.finish(looked, watch, load).await
    }

    /// Reads one page of a collection; `query` names the page among the collection's pages. As
    /// [`WriteThrough::read`] in every other respect.
    ///
    /// # Errors
    ///
    /// Only those of `load`.
    ///
    /// # Cancellation
    ///
    /// As for [`WriteThrough::read`].
    pub async fn read_page<V, E, L, F>(
        &self,
        collection: &Collection,
        query: &str,
        load: L,
    ) -> Result<Read<V>, E>
    where
        V: CacheValue,
        L: FnOnce() -> F + Send,
        F: Future<Output = Result<V, E>> + Send,
    {
        let mut watch = Stopwatch::default();
        let looked = self
            .engine
            .look_for_page(collection, query, &mut watch)
            .await;
        self.engine
            .finish(looked, watch, || async { load().await.map(Some) })
            .await
    }
}

impl Engine {
    /// Loads if the cache had no answer, fills if it may, counts.
    async fn finish<V, E, L, F>(
        &self,
        looked: Looked,
        mut watch: Stopwatch,
        load: L,
    ) -> Result<Read<V>, E>
    where
        V: CacheValue,
        L: FnOnce() -> F,
        F: Future<Output = Result<Option<V>, E>>,
    {
        let (value, outcome) = match looked {
            Looked::Found(payload, outcome) => match payload.map(V::decode).transpose() {
                Ok(value) => (value, outcome),
                Err(error) => {
                    self.counters.decode_errors.add(1);
                    tracing::debug!("{error}");
                    (load().await?, ReadOutcome::Bypassed(Bypass::CacheError))
                }
            },
            Looked::Bypass(reason) => (load().await?, ReadOutcome::Bypassed(reason)),
            Looked::Load(fill) => {
                let value = load().await?;
                let payload = value.as_ref().map(V::encode);
                if watch.time(fill.store(self, payload)).await {
                    (value, ReadOutcome::Filled)
                } else {
                    (value, ReadOutcome::Unfilled)
                }
            }
        };
        match outcome {
            ReadOutcome::Hit => self.counters.hits.add(1),
            ReadOutcome::Filled | ReadOutcome::Unfilled => self.counters.misses.add(1),
            ReadOutcome::Coalesced => self.counters.coalesced.add(1),
            ReadOutcome::Bypassed(reason) => self.counters.bypasses[reason.index()].add(1),
        }
        Ok(Read {
            value,
            outcome,
            cache_time: watch.0,
        })
    }

    /// The epoch and the session that a read may use now.
    fn permit(&self) -> Result<(Epoch, Arc<dyn Session>), Bypass> {
        let view = self.view();
        match view.node.read_permit(clock::now()) {
            ReadPermit::Bypass(reason) => Err(reason),
            ReadPermit::Cached(epoch) => view
                .session
                .clone()
                .map(|session| (epoch, session))
                .ok_or(Bypass::NotConnected),
        }
    }

    async fn look_for_value(self: &Arc<Self>, key: &Key, watch: &mut Stopwatch) -> Looked {
        match self.settings.consistency {
            Consistency::Off => Looked::Bypass(Bypass::Epoch),
            Consistency::Textbook => self.look_by_the_textbook(key, watch).await,
            Consistency::Strict => match self.permit() {
                Err(reason) => Looked::Bypass(reason),
                Ok((epoch, session)) => {
                    watch
                        .time(self.look_in_epoch(key.in_epoch(epoch), epoch, session))
                        .await
                }
            },
        }
    }

    async fn look_in_epoch(
        self: &Arc<Self>,
        key: String,
        epoch: Epoch,
        session: Arc<dyn Session>,
    ) -> Looked {
        let give_up = Instant::now() + self.settings.fill_wait;
        let mut pause = Duration::from_millis(1);
        loop {
            let span = cache_span!("redis_get", "GET", session, key, Some(epoch));
            let state = match session.get(&key).instrument(span.clone()).await {
                Ok(state) => state,
                Err(error) => {
                    self.cache_failed("a get", &error);
                    return Looked::Bypass(Bypass::CacheError);
                }
            };
            span.record("cache.hit", matches!(state, KeyState::Value(_)));
            drop(span);
            let mut next = after_get(state, self.holds_lease(epoch));
            if next == Next::AcquireFill {
                let token = new_token();
                // Before the lease can be seen, so that whoever sees it finds the load.
                let leader = self.loads.lead(token, None);
                let mut fill = Fill {
                    session: session.clone(),
                    epoch: Some(epoch),
                    target: Target::Value {
                        key: key.clone(),
                        token,
                    },
                    leader: Some(leader),
                    lease: Some(token),
                };
                let span = cache_span!("redis_lease", "SET", session, key, Some(epoch));
                let lease = self.settings.fill_lease;
                match session
                    .acquire_fill(&key, token, lease)
                    .instrument(span)
                    .await
                {
                    Ok(answer) => next = after_acquire(answer, self.holds_lease(epoch)),
                    Err(error) => {
                        // Dropping `fill` breaks the lease if it was taken after all.
                        self.cache_failed("taking a fill lease", &error);
                        return Looked::Bypass(Bypass::CacheError);
                    }
                }
                if next == Next::Load {
                    return Looked::Load(fill);
                }
                fill.lease = None;
            }
            match next {
                Next::Hit(payload) => return Looked::Found(payload, ReadOutcome::Hit),
                Next::Bypass(reason) => return Looked::Bypass(reason),
                Next::Await(token) => {
                    if let Some(load) = self.loads.follow(token, None) {
                        if let Some(payload) = self.loads.outcome(load, give_up).await {
                            return Looked::Found(payload, ReadOutcome::Coalesced);
                        }
                    } else {
                        tokio::time::sleep(pause).await;
                        pause *= 2;
                    }
                    if Instant::now() >= give_up {
                        let span = cache_span!("redis_del", "EVALSHA", session, key, Some(epoch));
                        if let Err(error) = session.break_fill(&key, token).instrument(span).await {
                            self.cache_failed("breaking a slow fill", &error);
                        }
                        return Looked::Bypass(Bypass::SlowFill);
                    }
                }
                // Gone between two looks, or never: look again.
                Next::AcquireFill | Next::Load => {
                    if Instant::now() >= give_up {
                        return Looked::Bypass(Bypass::SlowFill);
                    }
                }
            }
        }
    }

    async fn look_by_the_textbook(&self, key: &Key, watch: &mut Stopwatch) -> Looked {
        let Some(session) = self.view().session.clone() else {
            return Looked::Bypass(Bypass::NotConnected);
        };
        let key = key.as_str().to_owned();
        let span = cache_span!("redis_get", "GET", session, key, None);
        match watch.time(session.get(&key).instrument(span.clone())).await {
            Ok(KeyState::Value(payload)) => {
                span.record("cache.hit", true);
                Looked::Found(payload, ReadOutcome::Hit)
            }
            Ok(_) => {
                span.record("cache.hit", false);
                Looked::Load(Fill {
                    session,
                    epoch: None,
                    target: Target::Unconditional { key },
                    leader: None,
                    lease: None,
                })
            }
            Err(error) => {
                self.cache_failed("a get", &error);
                Looked::Bypass(Bypass::CacheError)
            }
        }
    }

    async fn look_for_page(
        self: &Arc<Self>,
        collection: &Collection,
        query: &str,
        watch: &mut Stopwatch,
    ) -> Looked {
        if self.settings.consistency != Consistency::Strict {
            return Looked::Bypass(Bypass::Epoch);
        }
        match self.permit() {
            Err(reason) => Looked::Bypass(reason),
            Ok((epoch, session)) => {
                let names = (
                    collection.in_epoch(epoch),
                    collection.page_in_epoch(epoch, query),
                );
                watch
                    .time(self.look_in_collection(names, query, epoch, session))
                    .await
            }
        }
    }

    async fn look_in_collection(
        self: &Arc<Self>,
        (collection, page): (String, String),
        query: &str,
        epoch: Epoch,
        session: Arc<dyn Session>,
    ) -> Looked {
        let span = cache_span!("redis_get", "MGET", session, page, Some(epoch));
        let (state, stored) = match session
            .get_page(&collection, &page)
            .instrument(span.clone())
            .await
        {
            Ok(found) => found,
            Err(error) => {
                self.cache_failed("a get of a page", &error);
                return Looked::Bypass(Bypass::CacheError);
            }
        };
        let current = stored.filter(|stored| page::is_current(stored, &state));
        span.record("cache.hit", current.is_some());
        drop(span);
        // A stamp, or the lease that becomes one, allows a fill for as long as it stays.
        let mut next = match (after_get(state, self.holds_lease(epoch)), current) {
            (Next::Hit(_), Some(page)) => {
                return Looked::Found(Some(page.bytes), ReadOutcome::Hit);
            }
            (Next::Hit(Some(stamp)), None) => stamp_of(&stamp),
            (next, _) => next,
        };
        let mut acquired = None;
        if next == Next::AcquireFill {
            let token = new_token();
            let span = cache_span!("redis_lease", "SET", session, collection, Some(epoch));
            let lease = self.settings.fill_lease;
            match session
                .acquire_fill(&collection, token, lease)
                .instrument(span)
                .await
            {
                Ok(answer) => {
                    next = match after_acquire(answer, self.holds_lease(epoch)) {
                        Next::Load => {
                            acquired = Some(token);
                            Next::Await(token)
                        }
                        Next::Hit(Some(stamp)) => stamp_of(&stamp),
                        next => next,
                    };
                }
                Err(error) => {
                    self.cache_failed("taking a fill lease", &error);
                    return Looked::Bypass(Bypass::CacheError);
                }
            }
        }
        let token = match next {
            Next::Await(token) => token,
            Next::Bypass(reason) => return Looked::Bypass(reason),
            Next::Hit(_) | Next::AcquireFill | Next::Load => {
                return Looked::Bypass(Bypass::SlowFill);
            }
        };
        if acquired.is_none()
            && let Some(load) = self.loads.follow(token, Some(query))
        {
            let give_up = Instant::now() + self.settings.fill_wait;
            if let Some(payload) = self.loads.outcome(load, give_up).await {
                return Looked::Found(payload, ReadOutcome::Coalesced);
            }
            return Looked::Bypass(Bypass::SlowFill);
        }
        Looked::Load(Fill {
            leader: Some(self.loads.lead(token, Some(query))),
            session,
            epoch: Some(epoch),
            target: Target::Page {
                collection,
                page,
                token,
            },
            lease: acquired,
        })
    }
}

/// A collection's stamp as the token to load and fill a page under.
fn stamp_of(stamp: &Bytes) -> Next {
    match Token::decode(stamp) {
        Ok(token) => Next::Await(token),
        Err(_) => Next::Bypass(Bypass::CacheError),
    }
}
