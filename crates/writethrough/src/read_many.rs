//! Reads of many values of one entity: each step is done for all keys together.

use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::Hash;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use writethrough_protocol::Payload;
use writethrough_protocol::read::{Bypass, Next, after_acquire, after_get};

use crate::cache::observed::Observed;
use crate::cache::{self, Lease};
use crate::engine::{Engine, new_token};
use crate::entity::{self, Entity};
use crate::error::ReadError;
use crate::format::Format;
use crate::read::{Place, Stopwatch};
use crate::runtime::within;
use crate::single_flight::Leader;
use crate::write_through::WriteThrough;

/// The answer to a read of many values.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ReadMany<K, V> {
    /// The values that there are, by their ids.
    pub values: HashMap<K, V>,
    /// How many of the ids were answered by the cache, with a value or with "there is none".
    pub hits: usize,
    /// How many of the ids were loaded.
    pub loaded: usize,
    /// Time spent waiting for the cache.
    pub cache_time: Duration,
}

/// One id of a read, and what is known of it.
struct Asked<K, V, F> {
    id: K,
    key: entity::Key<V, F>,
    /// None: not looked at to the end yet.
    found: Option<Found<V>>,
}

enum Found<V> {
    Hit(Option<V>),
    /// Load, and fill under this.
    Leased(Leader),
    /// Load, and fill nothing.
    Past(Bypass),
}

/// The fill leases of a read, and the duty to let go of them.
struct Leases {
    session: Observed,
    held: Vec<Lease>,
}

impl Drop for Leases {
    fn drop(&mut self) {
        let held = std::mem::take(&mut self.held);
        if held.is_empty() {
            return;
        }
        let session = self.session.clone();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { session.break_fill_many(&held).await });
        }
    }
}

impl Leases {
    /// Keeps the leases alive for as long as this is polled, so that a load of any length may fill.
    async fn keep_alive(&self, engine: &Engine) {
        let lasting = engine.settings.fill_lease;
        while !self.held.is_empty() {
            tokio::time::sleep(lasting / 3).await;
            match self.session.renew_fill_many(&self.held, lasting).await {
                Ok(held) => {
                    let held = held.into_iter().filter(|held| *held).count() as u64;
                    engine.counters.renewed_leases.add(held);
                    if held == 0 {
                        return;
                    }
                }
                Err(error) => engine.cache_failed("renewing fill leases", &error),
            }
        }
    }

    /// Stores what was loaded, and lets go of the leases that are left.
    async fn end(mut self, engine: &Engine, fills: Vec<cache::Fill>, left: Vec<Lease>) {
        if !fills.is_empty() {
            match self.session.fill_many(fills).await {
                Ok(filled) => {
                    let refused = filled.into_iter().filter(|filled| !*filled).count();
                    engine.counters.refused_fills.add(refused as u64);
                }
                Err(error) => engine.cache_failed("a fill of many", &error),
            }
        }
        // Those that were filled, replaced by somebody else, or are left to lapse need no breaking.
        self.held = left;
        if !self.held.is_empty() {
            match self.session.break_fill_many(&self.held).await {
                Ok(()) => self.held.clear(),
                Err(error) => engine.cache_failed("breaking fill leases", &error),
            }
        }
    }
}

impl WriteThrough {
    /// Reads many values of one entity: all hits in one round trip to the cache, and one `load` for all
    /// ids that it does not know, in any order, each once. `load` must read the store's primary, and
    /// returns the values that there are; an id that it leaves out does not exist. Ids that were not
    /// asked for are ignored.
    ///
    /// The cache is asked once for all values, once more for the right to fill those that it does not
    /// have, and once to fill them: three round trips whatever the number of ids, up to 256 of them, or
    /// 1 MiB of values, in each.
    ///
    /// Each id counts as a read of its own in [`crate::Stats`], and the load as one. The load is bounded
    /// as that of [`WriteThrough::read`]. Reads of single values that come meanwhile share it; this one
    /// shares no load of others: an id that is being loaded or written by another is loaded in the same
    /// load, and not filled.
    ///
    /// # Errors
    ///
    /// As for [`WriteThrough::read`].
    ///
    /// # Cancellation
    ///
    /// As for [`WriteThrough::read`].
    ///
    /// # Consistency
    ///
    /// No snapshot: each value by itself is linearizable, as with a [`WriteThrough::read`] of its own,
    /// and two values may be of different moments within this call. A write of both may show in one of
    /// them only.
    pub async fn read_many<I, V, F, K, E, L, Fut, Loaded>(
        &self,
        entity: &Entity<I, V, F>,
        ids: &[K],
        load: L,
    ) -> Result<ReadMany<K, V>, ReadError<E>>
    where
        I: fmt::Display + ?Sized,
        F: Format<V>,
        K: Borrow<I> + Clone + Eq + Hash,
        L: FnOnce(Vec<K>) -> Fut + Send,
        Fut: Future<Output = Result<Loaded, E>> + Send,
        Loaded: IntoIterator<Item = (K, V)>,
    {
        let mut seen = HashSet::with_capacity(ids.len());
        let mut asked = Vec::with_capacity(ids.len());
        for id in ids {
            if seen.insert(id) {
                asked.push(Asked {
                    id: id.clone(),
                    key: entity.key(id.borrow()),
                    found: None,
                });
            }
        }
        let read = pin!(self.engine.read_many(asked, load));
        within(&self.engine.runtime, read).await
    }
}

impl Engine {
    async fn read_many<K, V, F, E, L, Fut, Loaded>(
        &self,
        mut asked: Vec<Asked<K, V, F>>,
        load: L,
    ) -> Result<ReadMany<K, V>, ReadError<E>>
    where
        F: Format<V>,
        K: Clone + Eq + Hash,
        L: FnOnce(Vec<K>) -> Fut,
        Fut: Future<Output = Result<Loaded, E>>,
        Loaded: IntoIterator<Item = (K, V)>,
    {
        let mut watch = Stopwatch::default();
        let leases = watch.time(self.look_for_many(&mut asked)).await;
        let missing: Vec<K> = asked
            .iter()
            .filter(|one| !matches!(one.found, Some(Found::Hit(_))))
            .map(|one| one.id.clone())
            .collect();
        let (hits, loads) = (asked.len() - missing.len(), missing.len());
        let mut loaded = HashMap::new();
        if !missing.is_empty() {
            let result = {
                let load = pin!(self.load(|| load(missing)));
                let alive = async {
                    if let Some(leases) = &leases {
                        leases.keep_alive(self).await;
                    }
                    std::future::pending().await
                };
                tokio::select! {
                    biased;
                    loaded = load => loaded,
                    never = alive => never,
                }
            };
            match result {
                Ok(values) => loaded.extend(values),
                Err(error) => {
                    for one in &asked {
                        if let Some(Found::Leased(leader)) = &one.found {
                            leader.failed();
                        }
                    }
                    return Err(error);
                }
            }
        }
        if let Some(leases) = leases {
            let (fills, left) = self.fills(&asked, &loaded, &leases);
            watch.time(leases.end(self, fills, left)).await;
        }
        let mut values = HashMap::with_capacity(asked.len());
        for Asked { id, found, .. } in asked {
            let value = match found {
                Some(Found::Hit(value)) => {
                    self.counters.hits.add(1);
                    value
                }
                Some(Found::Leased(_)) => {
                    self.counters.misses.add(1);
                    loaded.remove(&id)
                }
                Some(Found::Past(reason)) => {
                    self.counters.bypasses[reason.index()].add(1);
                    loaded.remove(&id)
                }
                None => None,
            };
            if let Some(value) = value {
                values.insert(id, value);
            }
        }
        Ok(ReadMany {
            values,
            hits,
            loaded: loads,
            cache_time: watch.elapsed(),
        })
    }

    /// Hands what was loaded to those who share it. Returns what may be stored, and the other leases.
    fn fills<K, V, F>(
        &self,
        asked: &[Asked<K, V, F>],
        loaded: &HashMap<K, V>,
        leases: &Leases,
    ) -> (Vec<cache::Fill>, Vec<Lease>)
    where
        F: Format<V>,
        K: Eq + Hash,
    {
        let (mut fills, mut left) = (Vec::new(), Vec::new());
        let leased = asked.iter().filter_map(|one| match &one.found {
            Some(Found::Leased(leader)) => Some((one, leader)),
            _ => None,
        });
        // The leases are in the order of the ids.
        for ((one, leader), lease) in leased.zip(&leases.held) {
            let (value, traits) = (loaded.get(&one.id), one.key.traits);
            let payload = self.encoded::<V, F>(Place::Value(&one.key.name), traits, value);
            leader.loaded(payload.clone());
            let may_be_cached = value.is_none_or(F::may_be_cached);
            if !may_be_cached {
                self.counters.declined.add(1);
            }
            let payload = payload.filter(|payload| {
                let bytes = payload.as_ref().map_or(0, Bytes::len);
                may_be_cached && self.fits(&lease.key, bytes, self.settings.max_value_bytes)
            });
            match payload {
                Some(payload) => fills.push(cache::Fill {
                    lease: lease.clone(),
                    ttl: self.lifetime(&payload, traits.lifetime(&payload)),
                    payload,
                }),
                None => left.push(lease.clone()),
            }
        }
        (fills, left)
    }

    /// Looks for all keys, and takes the right to fill those that are not there.
    async fn look_for_many<K, V, F>(&self, asked: &mut [Asked<K, V, F>]) -> Option<Leases>
    where
        F: Format<V>,
    {
        let past_all = |asked: &mut [Asked<K, V, F>], reason| {
            for one in asked.iter_mut().filter(|one| one.found.is_none()) {
                one.found = Some(Found::Past(reason));
            }
        };
        if asked.is_empty() {
            return None;
        }
        let permit = match self.permit() {
            Ok(permit) => permit,
            Err(reason) => {
                past_all(asked, reason);
                return None;
            }
        };
        let (session, epoch) = (permit.session, permit.epoch);
        let keys: Vec<String> = asked
            .iter()
            .map(|one| one.key.name.in_epoch(&permit.frame))
            .collect();
        let states = match session.get_many(&keys).await {
            Ok(states) => states,
            Err(error) => {
                self.cache_failed("a get of many", &error);
                past_all(asked, Bypass::CacheError);
                return None;
            }
        };
        let lease_valid = self.holds_lease(epoch);
        let mut undecodable = Vec::new();
        let mut leases = Leases {
            session: session.clone(),
            held: Vec::new(),
        };
        // Those that are to be loaded, each with the place of its lease.
        let mut leased = Vec::new();
        for (place, (key, state)) in keys.into_iter().zip(states).enumerate() {
            let next = state.map(|state| after_get(state, lease_valid));
            let one = &mut asked[place];
            if let Some(Next::Hit(payload)) = &next {
                match self.decoded(&one.key, payload) {
                    Ok(value) => {
                        one.found = Some(Found::Hit(value));
                        continue;
                    }
                    Err(bytes) => undecodable.push((key.clone(), bytes)),
                }
            }
            one.found = match next {
                Some(Next::Hit(_) | Next::AcquireFill) => {
                    let token = new_token();
                    leases.held.push(Lease { key, token });
                    // Before the lease can be seen, so that whoever sees it finds the load.
                    leased.push((place, self.loads.lead(token, None)));
                    None
                }
                next => Some(Found::Past(past(next.as_ref()))),
            };
        }
        if leases.held.is_empty() {
            return None;
        }
        if !undecodable.is_empty()
            && let Err(error) = session.discard_many(&undecodable).await
        {
            self.cache_failed("removing undecodable values", &error);
        }
        let lasting = self.settings.fill_lease;
        let answers = match session.acquire_fill_many(&leases.held, lasting).await {
            Ok(answers) => answers,
            Err(error) => {
                // Dropping the leases breaks those that were taken after all.
                self.cache_failed("taking fill leases", &error);
                past_all(asked, Bypass::CacheError);
                return None;
            }
        };
        let lease_valid = self.holds_lease(epoch);
        let mut answers = answers.into_iter();
        let mut leaders = leased.into_iter();
        leases.held.retain(|_| {
            let (Some(answer), Some((place, leader))) = (answers.next(), leaders.next()) else {
                return false;
            };
            let one = &mut asked[place];
            let next = answer.map(|answer| after_acquire(answer, lease_valid));
            one.found = Some(match next {
                Some(Next::Load) => Found::Leased(leader),
                // Another has filled it meanwhile.
                Some(Next::Hit(payload)) => match self.decoded(&one.key, &payload) {
                    Ok(value) => Found::Hit(value),
                    Err(_) => Found::Past(Bypass::Undecodable),
                },
                next => Found::Past(past(next.as_ref())),
            });
            matches!(one.found, Some(Found::Leased(_)))
        });
        Some(leases)
    }

    /// The value of what is cached, or the bytes that are none.
    fn decoded<V, F: Format<V>>(
        &self,
        key: &entity::Key<V, F>,
        payload: &Payload,
    ) -> Result<Option<V>, Bytes> {
        let Some(bytes) = payload else {
            return Ok(None);
        };
        match entity::decode::<V, F>(key.traits, bytes.clone()) {
            Ok(value) => Ok(Some(value)),
            Err(error) => {
                self.undecodable(Place::Value(&key.name), &error);
                Err(bytes.clone())
            }
        }
    }
}

/// Why a key is loaded past the cache.
fn past(next: Option<&Next>) -> Bypass {
    match next {
        Some(Next::Bypass(reason)) => *reason,
        // Another loads it, or did a moment ago.
        Some(_) => Bypass::SlowFill,
        None => Bypass::CacheError,
    }
}
