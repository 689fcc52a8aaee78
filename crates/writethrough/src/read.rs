//! Reads: one value, or one page of a collection.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout};
use writethrough_protocol::read::{
    Bypass, Following, Next, PageNext, after_acquire, after_acquire_page, after_get,
    after_get_page, while_awaiting,
};
use writethrough_protocol::{Epoch, Payload, ReadPermit, Token};

use crate::cache::observed::Observed;
use crate::cache::{FillLease, Filled};
use crate::clock;
use crate::engine::{Engine, new_token};
use crate::entity::{self, Traits};
use crate::error::ReadError;
use crate::format::Format;
use crate::key::{Collection, Frame, Key};
use crate::single_flight::{Follower, Leader, Role, Shared, Turn};
use crate::value::DecodeError;

/// Longest pause between two looks at another process's lease.
const MAX_PAUSE: Duration = Duration::from_millis(32);
/// How many failed loads of others a read waits for.
const MAX_FAILED: u8 = 2;

/// Where a read's answer came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadOutcome {
    /// The cache.
    Hit,
    /// The store, and the cache was filled.
    Filled,
    /// The store; the fill was refused or failed, or what was loaded is not to be cached.
    Unfilled,
    /// The load of another read in this process, under a lease or a stamp that this read saw.
    Coalesced,
    /// The store; the cache was not used, or not to the end. The load may have been another read's
    /// that began after this read.
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
pub(crate) struct Stopwatch(Duration);

impl Stopwatch {
    pub(crate) async fn time<T>(&mut self, work: impl Future<Output = T>) -> T {
        let started = Instant::now();
        let answer = work.await;
        self.0 += started.elapsed();
        answer
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.0
    }
}

/// What a read asks for.
#[derive(Clone, Copy)]
pub(crate) enum Place<'a> {
    Value(&'a Key),
    Page(&'a Collection, &'a str),
}

impl Place<'_> {
    /// Tells loads past the cache apart.
    fn name(self) -> String {
        match self {
            Self::Value(key) => key.as_str().into(),
            Self::Page(collection, query) => collection.page(query),
        }
    }
}

/// How the cache part of a read ended.
enum Looked {
    /// The answer.
    Found(Payload, ReadOutcome),
    /// Load, and fill under this.
    Load(Fill),
    /// Load for all reads of this process that saw the same lease; fill nothing.
    LoadBeside(Leader),
    /// Load past the cache, or share such a load.
    Bypass(Bypass),
    /// Load, and share nothing.
    Alone(Bypass),
    /// Do not load: the waits of this read are over.
    GiveUp(GiveUp),
}

/// Why a read stops waiting for the loads of others.
enum GiveUp {
    TimedOut,
    Failed,
}

impl<E> From<GiveUp> for ReadError<E> {
    fn from(reason: GiveUp) -> Self {
        match reason {
            GiveUp::TimedOut => Self::TimedOut,
            GiveUp::Failed => Self::SharedLoadFailed,
        }
    }
}

/// What a read still spends on waiting for the loads of others.
struct Patience {
    until: Instant,
    failed: u8,
}

impl Patience {
    fn new(engine: &Engine) -> Self {
        Self {
            until: Instant::now() + engine.settings.load_timeout,
            failed: 0,
        }
    }

    /// Waits for a load of this process. `None`: it came to nothing, look again.
    async fn follow(&mut self, engine: &Engine, load: Follower) -> Option<Looked> {
        match engine.loads.outcome(load, self.until).await {
            Shared::Loaded(Some(payload)) => Some(Looked::Found(payload, ReadOutcome::Coalesced)),
            Shared::Loaded(None) => Some(Looked::Alone(Bypass::Undecodable)),
            Shared::Dropped => None,
            Shared::TimedOut => Some(Looked::GiveUp(GiveUp::TimedOut)),
            Shared::Failed => {
                self.failed += 1;
                (self.failed >= MAX_FAILED).then_some(Looked::GiveUp(GiveUp::Failed))
            }
        }
    }
}

/// The right to fill, and the duty to let go of it.
struct Fill {
    session: Observed,
    target: Target,
    leader: Leader,
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
}

impl Drop for Fill {
    fn drop(&mut self) {
        let (Some(token), Target::Value { key, .. }) = (self.lease.take(), &self.target) else {
            return;
        };
        let (session, key) = (self.session.clone(), key.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { session.break_fill(&key, token).await });
        }
    }
}

impl Fill {
    /// Keeps the lease alive for as long as this is polled, so that a load of any length may fill.
    /// Ends when there is nothing to keep alive: the lease is lost, or has become a stamp.
    async fn keep_alive(&self, engine: &Engine) {
        let (Target::Value { key, token }
        | Target::Page {
            collection: key,
            token,
            ..
        }) = &self.target;
        loop {
            tokio::time::sleep(engine.settings.fill_lease / 3).await;
            let lease = engine.settings.fill_lease;
            match self.session.renew_fill(key, *token, lease).await {
                Ok(FillLease::Held) => engine.counters.renewed_leases.add(1),
                Ok(FillLease::Lost) => return,
                Err(error) => engine.cache_failed("renewing a fill lease", &error),
            }
        }
    }

    /// Whether what was loaded may be stored; counts what may not.
    fn may_store(&self, engine: &Engine, payload: &Payload) -> bool {
        let (name, most) = match &self.target {
            Target::Value { key, .. } => (key, engine.settings.max_value_bytes),
            Target::Page { page, .. } => (page, engine.settings.max_page_bytes),
        };
        let bytes = payload.as_ref().map_or(0, Bytes::len);
        engine.fits(name, bytes, most)
    }

    /// Lets go of the lease, if it is this load's alone, so that the next read need not wait for it.
    async fn give_up(mut self, engine: &Engine) {
        let (Some(token), Target::Value { key, .. }) = (self.lease, &self.target) else {
            return;
        };
        match self.session.break_fill(key, token).await {
            Ok(_) => self.lease = None,
            Err(error) => engine.cache_failed("breaking a fill lease", &error),
        }
    }

    /// Stores what was loaded, if it may be stored. Returns whether the cache took it.
    async fn store(mut self, engine: &Engine, loaded: Loaded, traits: Traits) -> bool {
        self.leader.loaded(loaded.payload.clone());
        if !loaded.may_be_cached {
            engine.counters.declined.add(1);
        }
        let payload = loaded
            .payload
            .filter(|payload| loaded.may_be_cached && self.may_store(engine, payload));
        let Some(payload) = payload else {
            self.give_up(engine).await;
            return false;
        };
        let ttl = engine.lifetime(&payload, traits.lifetime(&payload));
        let session = &self.session;
        let result = match &self.target {
            Target::Value { key, token } => session.fill(key, *token, payload, ttl).await,
            Target::Page {
                collection,
                page,
                token,
            } => {
                let bytes = payload.unwrap_or_default();
                session
                    .fill_page(collection, page, *token, bytes, ttl)
                    .await
            }
        };
        // Filled, replaced by somebody else, or left to lapse: there is no lease to break now.
        self.lease = None;
        match result {
            Ok(Filled::Stored) => true,
            Ok(Filled::Refused) => {
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

/// What a load gave, in the form in which it is shared and stored.
struct Loaded {
    /// None: it has no such form.
    payload: Option<Payload>,
    may_be_cached: bool,
}

impl Engine {
    async fn look_for(&self, place: Place<'_>, watch: &mut Stopwatch) -> Looked {
        match place {
            Place::Value(key) => self.look_for_value(key, watch).await,
            Place::Page(collection, query) => self.look_for_page(collection, query, watch).await,
        }
    }

    /// Removes cached bytes that cannot be decoded, unless others are there by now.
    async fn discard(&self, place: Place<'_>, bytes: &Bytes) {
        let Ok(permit) = self.permit() else {
            return;
        };
        let name = match place {
            Place::Value(key) => key.in_epoch(&permit.frame),
            Place::Page(collection, query) => collection.page_in_epoch(&permit.frame, query),
        };
        if let Err(error) = permit.session.discard(&name, bytes).await {
            self.cache_failed("removing an undecodable value", &error);
        }
    }

    pub(crate) fn undecodable(&self, place: Place<'_>, error: &DecodeError) {
        if self.counters.decode_errors.get() == 0 {
            let name = place.name();
            tracing::warn!(
                name,
                "{error}; such entries are removed and loaded again, and counted from here on"
            );
        }
        self.counters.decode_errors.add(1);
    }

    /// The stored form of what was loaded; `None` when its format has none for it.
    pub(crate) fn encoded<V, F: Format<V>>(
        &self,
        place: Place<'_>,
        traits: Traits,
        value: Option<&V>,
    ) -> Option<Payload> {
        match value.map(|value| entity::encode::<V, F>(traits, value)) {
            None => Some(None),
            Some(Ok(bytes)) => Some(Some(bytes)),
            Some(Err(error)) => {
                if self.counters.encode_errors.get() == 0 {
                    let name = place.name();
                    tracing::warn!(
                        name,
                        "{error}; such values are read from the store each time, and counted from here on"
                    );
                }
                self.counters.encode_errors.add(1);
                None
            }
        }
    }

    /// Looks, loads if the cache had no answer, fills if it may, counts.
    pub(crate) async fn read<V, F, E, L, Fut>(
        &self,
        place: Place<'_>,
        traits: Traits,
        load: L,
    ) -> Result<Read<V>, ReadError<E>>
    where
        F: Format<V>,
        L: FnOnce() -> Fut,
        Fut: Future<Output = Result<Option<V>, E>>,
    {
        let mut watch = Stopwatch::default();
        let mut looked = self.look_for(place, &mut watch).await;
        let mut undecodable = false;
        let (value, outcome) = loop {
            let Looked::Found(payload, outcome) = &looked else {
                let filled =
                    self.load_and_fill::<V, F, _, _, _>(looked, place, traits, &mut watch, load);
                break filled.await?;
            };
            let decoded = payload
                .clone()
                .map(|bytes| entity::decode::<V, F>(traits, bytes));
            match decoded.transpose() {
                Ok(value) => break (value, *outcome),
                Err(error) => self.undecodable(place, &error),
            }
            looked = match (payload, outcome) {
                // Looked at once more, it is to be loaded, or another read has loaded it.
                (Some(bytes), ReadOutcome::Hit) if !undecodable => {
                    undecodable = true;
                    watch.time(self.discard(place, bytes)).await;
                    self.look_for(place, &mut watch).await
                }
                _ => Looked::Alone(Bypass::Undecodable),
            };
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
            cache_time: watch.elapsed(),
        })
    }

    /// Loads as the cache part of a read has ended.
    async fn load_and_fill<V, F, E, L, Fut>(
        &self,
        looked: Looked,
        place: Place<'_>,
        traits: Traits,
        watch: &mut Stopwatch,
        load: L,
    ) -> Result<(Option<V>, ReadOutcome), ReadError<E>>
    where
        F: Format<V>,
        L: FnOnce() -> Fut,
        Fut: Future<Output = Result<Option<V>, E>>,
    {
        Ok(match looked {
            // Not called with an answer.
            Looked::Found(_, outcome) => (self.load(load).await?, outcome),
            Looked::Alone(reason) => (self.load(load).await?, ReadOutcome::Bypassed(reason)),
            Looked::Bypass(reason) => (
                self.load_in_bypass::<V, F, _, _, _>(place, traits, load)
                    .await?,
                ReadOutcome::Bypassed(reason),
            ),
            Looked::LoadBeside(leader) => {
                let loaded = self.load(load).await;
                match &loaded {
                    Ok(value) => {
                        leader.loaded(self.encoded::<V, F>(place, traits, value.as_ref()));
                    }
                    Err(_) => leader.failed(),
                }
                (loaded?, ReadOutcome::Bypassed(Bypass::SlowFill))
            }
            Looked::Load(fill) => {
                let loaded = {
                    let load = pin!(self.load(load));
                    let alive = async {
                        fill.keep_alive(self).await;
                        std::future::pending().await
                    };
                    tokio::select! {
                        biased;
                        loaded = load => loaded,
                        never = alive => never,
                    }
                };
                if loaded.is_err() {
                    fill.leader.failed();
                }
                let value = loaded?;
                let loaded = Loaded {
                    payload: self.encoded::<V, F>(place, traits, value.as_ref()),
                    may_be_cached: value.as_ref().is_none_or(F::may_be_cached),
                };
                if watch.time(fill.store(self, loaded, traits)).await {
                    (value, ReadOutcome::Filled)
                } else {
                    (value, ReadOutcome::Unfilled)
                }
            }
            Looked::GiveUp(reason) => {
                self.counters.refused_reads.add(1);
                return Err(reason.into());
            }
        })
    }

    /// Calls `load`, if as many loads as are allowed are not yet under way, within its bound.
    pub(crate) async fn load<T, E, F>(&self, load: impl FnOnce() -> F) -> Result<T, ReadError<E>>
    where
        F: Future<Output = Result<T, E>>,
    {
        let Some(_permit) = self.loads.permit() else {
            self.counters.refused_reads.add(1);
            return Err(ReadError::Overloaded);
        };
        self.counters.loads.add(1);
        let started = Instant::now();
        let loaded = timeout(self.settings.load_timeout, load()).await;
        if self.loads.took(started.elapsed(), self.settings.fill_wait) {
            self.counters.slow_loads.add(1);
        }
        match loaded {
            Ok(loaded) => loaded.map_err(ReadError::Load),
            Err(_) => {
                self.counters.refused_reads.add(1);
                Err(ReadError::TimedOut)
            }
        }
    }

    /// Loads past the cache, or shares such a load that begins after this read did.
    async fn load_in_bypass<V, F, E, L, Fut>(
        &self,
        place: Place<'_>,
        traits: Traits,
        load: L,
    ) -> Result<Option<V>, ReadError<E>>
    where
        F: Format<V>,
        L: FnOnce() -> Fut,
        Fut: Future<Output = Result<Option<V>, E>>,
    {
        let name = place.name();
        let mut patience = Patience::new(self);
        let gave_up = loop {
            match self.loads.join(&name) {
                Turn::Lead(forming) => {
                    let Some(running) = forming.begin(patience.until).await else {
                        break GiveUp::TimedOut;
                    };
                    let loaded = self.load(load).await;
                    match &loaded {
                        Ok(value) => {
                            running.loaded(|| self.encoded::<V, F>(place, traits, value.as_ref()))
                        }
                        Err(_) => running.failed(),
                    }
                    return loaded;
                }
                Turn::Follow(load_of_another) => {
                    let payload = match patience.follow(self, load_of_another).await {
                        None => continue,
                        Some(Looked::GiveUp(reason)) => break reason,
                        Some(Looked::Found(payload, _)) => payload,
                        // It cannot be shared.
                        Some(_) => return self.load(load).await,
                    };
                    let decoded = payload.map(|bytes| entity::decode::<V, F>(traits, bytes));
                    match decoded.transpose() {
                        Ok(value) => {
                            self.counters.shared_bypasses.add(1);
                            return Ok(value);
                        }
                        Err(error) => {
                            self.undecodable(place, &error);
                            return self.load(load).await;
                        }
                    }
                }
            }
        };
        self.counters.refused_reads.add(1);
        Err(gave_up.into())
    }

    /// What a read may use of the cache now.
    pub(crate) fn permit(&self) -> Result<Permit, Bypass> {
        let view = self.view();
        match (view.node.read_permit(clock::now()), &view.session) {
            (ReadPermit::Bypass(reason), _) => Err(reason),
            (ReadPermit::Cached(_), None) => Err(Bypass::NotConnected),
            (ReadPermit::Cached(epoch), Some(session)) => Ok(Permit {
                epoch,
                frame: view.frame.clone(),
                session: Observed::new(session.clone(), Some(epoch)),
            }),
        }
    }

    async fn look_for_value(&self, key: &Key, watch: &mut Stopwatch) -> Looked {
        match self.permit() {
            Err(reason) => Looked::Bypass(reason),
            Ok(permit) => {
                let key = key.in_epoch(&permit.frame);
                watch
                    .time(self.look_in_epoch(key, permit.epoch, permit.session))
                    .await
            }
        }
    }

    /// Looks at the key once and says what the read does next.
    async fn look(&self, key: &str, epoch: Epoch, session: &Observed) -> Next {
        match session.get(key).await {
            Ok(state) => after_get(state, self.holds_lease(epoch)),
            Err(error) => {
                self.cache_failed("a get", &error);
                Next::Bypass(Bypass::CacheError)
            }
        }
    }

    async fn look_in_epoch(&self, key: String, epoch: Epoch, session: Observed) -> Looked {
        let mut next = self.look(&key, epoch, &session).await;
        let mut patience = None;
        loop {
            if next == Next::AcquireFill {
                let token = new_token();
                // Before the lease can be seen, so that whoever sees it finds the load.
                let leader = self.loads.lead(token, None);
                let mut fill = Fill {
                    session: session.clone(),
                    target: Target::Value {
                        key: key.clone(),
                        token,
                    },
                    leader,
                    lease: Some(token),
                };
                let lease = self.settings.fill_lease;
                match session.acquire_fill(&key, token, lease).await {
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
                    let patience = patience.get_or_insert_with(|| Patience::new(self));
                    if Instant::now() >= patience.until {
                        return Looked::GiveUp(GiveUp::TimedOut);
                    }
                    next = match self.loads.lead_or_follow(token, None) {
                        Role::Follow(load) => match patience.follow(self, load).await {
                            Some(looked) => return looked,
                            None => self.look(&key, epoch, &session).await,
                        },
                        Role::Lead(leader) => {
                            match self.await_lease(&key, token, epoch, &session).await {
                                None => return Looked::LoadBeside(leader),
                                Some(Next::Hit(payload)) => {
                                    leader.loaded(Some(payload.clone()));
                                    Next::Hit(payload)
                                }
                                Some(next) => next,
                            }
                        }
                    };
                }
                // It was there and is gone again: look once more.
                Next::AcquireFill | Next::Load => {
                    next = self.look(&key, epoch, &session).await;
                }
            }
        }
    }

    /// Watches another process's lease, for all reads of this process that saw it, until it is no
    /// longer there. `None`: it is still there, and one of them should load beside it.
    async fn await_lease(
        &self,
        key: &str,
        token: Token,
        epoch: Epoch,
        session: &Observed,
    ) -> Option<Next> {
        let started = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(MAX_PAUSE);
            let next = self.look(key, epoch, session).await;
            if next != Next::Await(token) {
                return Some(next);
            }
            match while_awaiting(started.elapsed(), self.settings.fill_wait) {
                Following::LookAgain => {}
                Following::LoadBeside => return None,
            }
        }
    }

    async fn look_for_page(
        &self,
        collection: &Collection,
        query: &str,
        watch: &mut Stopwatch,
    ) -> Looked {
        match self.permit() {
            Err(reason) => Looked::Bypass(reason),
            Ok(permit) => {
                let names = PageName {
                    collection: collection.in_epoch(&permit.frame),
                    page: collection.page_in_epoch(&permit.frame, query),
                };
                watch
                    .time(self.look_in_collection(names, query, permit.epoch, permit.session))
                    .await
            }
        }
    }

    async fn look_in_collection(
        &self,
        PageName { collection, page }: PageName,
        query: &str,
        epoch: Epoch,
        session: Observed,
    ) -> Looked {
        let mut patience = None;
        loop {
            let mut next = match session.get_page(&collection, &page).await {
                Ok((state, stored)) => after_get_page(state, stored, self.holds_lease(epoch)),
                Err(error) => {
                    self.cache_failed("a get of a page", &error);
                    return Looked::Bypass(Bypass::CacheError);
                }
            };
            if next == PageNext::AcquireFill {
                let token = new_token();
                let lease = self.settings.fill_lease;
                match session.acquire_fill(&collection, token, lease).await {
                    Ok(answer) => {
                        next = after_acquire_page(token, answer, self.holds_lease(epoch));
                    }
                    Err(error) => {
                        self.cache_failed("taking a fill lease", &error);
                        return Looked::Bypass(Bypass::CacheError);
                    }
                }
            }
            let token = match next {
                PageNext::Hit(bytes) => return Looked::Found(Some(bytes), ReadOutcome::Hit),
                PageNext::Bypass(reason) => return Looked::Bypass(reason),
                PageNext::LoadUnder(token) => token,
                // It was there and is gone again: look once more.
                PageNext::AcquireFill => continue,
            };
            let load = match self.loads.lead_or_follow(token, Some(query)) {
                Role::Follow(load) => load,
                // Pages of one collection are loaded under one lease, which is nobody's alone: it
                // is not broken, it becomes the stamp with the first fill, or lapses.
                Role::Lead(leader) => {
                    return Looked::Load(Fill {
                        leader,
                        session,
                        target: Target::Page {
                            collection,
                            page,
                            token,
                        },
                        lease: None,
                    });
                }
            };
            let patience = patience.get_or_insert_with(|| Patience::new(self));
            if let Some(looked) = patience.follow(self, load).await {
                return looked;
            }
        }
    }
}

/// What a read may use of the cache: the session belongs to the epoch, and its keys stand in `frame`.
pub(crate) struct Permit {
    pub(crate) epoch: Epoch,
    pub(crate) frame: Arc<Frame>,
    pub(crate) session: Observed,
}

/// The keys of one page in an epoch.
struct PageName {
    collection: String,
    page: String,
}
