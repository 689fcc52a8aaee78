//! The items service: puts the cache and the store together. Knows no HTTP.
//!
//! What is cached is the JSON that clients get, ready to send, behind a header of eight bytes; so a
//! hit is one clone of a reference-counted buffer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Serialize;
use tracing::{Instrument, Span};
use writethrough::format::AsBytes;
use writethrough::{
    CacheError, CacheValue, Collection, DecodeError, Entity, Guard, Indeterminate, OpError,
    ReadError, ReadOutcome, Stats, Unavailable, WriteError,
};

use crate::clearing::Clearing;
use crate::engine::{Engine, State};
use crate::item::{Item, ItemFields, ItemId, NewItem, PageRequest};
use crate::metrics::{Live, Metrics, WriteKind, WriteTiming};
use crate::store::{Condition, ItemStore, PoolUse, Refusal, StoreError, StoreFailure};
use crate::wire::{ItemBody, PageBody};

/// Items in the cache: keys are `item:<id>@<history>.<epoch>`.
pub(crate) const ITEM: Entity<ItemId, Document, AsBytes> = Entity::new("item");
/// Lists of items in the cache.
pub(crate) const ITEMS: Collection<(), Document, AsBytes> = Collection::new("items");
const HEADER_BYTES: usize = 8;

/// A JSON document ready to send, with a tag that tells its versions apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The tag in eight bytes, then the JSON.
    bytes: Bytes,
    /// Not a page behind a cursor that was made up: there are too many of them.
    may_be_cached: bool,
}

impl Document {
    fn new(body: &impl Serialize, tag: impl FnOnce(&[u8]) -> u64) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        // Serializing to memory fails only for maps with strange keys, of which there are none.
        if serde_json::to_writer(&mut bytes, body).is_err() {
            tracing::error!("an item could not be written as JSON");
        }
        let tag = tag(&bytes[HEADER_BYTES..]);
        bytes[..HEADER_BYTES].copy_from_slice(&tag.to_be_bytes());
        Self {
            bytes: bytes.into(),
            may_be_cached: true,
        }
    }

    /// The document of an item; the tag is its version.
    #[must_use]
    pub fn of_item(item: &Item) -> Self {
        Self::new(&ItemBody::from(item), |_| item.version.unsigned_abs())
    }

    /// The document of a page; the tag is a hash of it.
    fn of_page(page: &crate::item::Page) -> Self {
        Self {
            may_be_cached: page.cursor_is_known,
            ..Self::new(&PageBody::from(page), fnv1a)
        }
    }

    /// The JSON.
    #[must_use]
    pub fn json(&self) -> Bytes {
        self.bytes.slice(HEADER_BYTES..)
    }

    /// The tag.
    #[must_use]
    pub fn tag(&self) -> u64 {
        self.bytes
            .first_chunk()
            .map_or(0, |tag| u64::from_be_bytes(*tag))
    }
}

impl CacheValue for Document {
    fn encode(&self) -> Bytes {
        self.bytes.clone()
    }

    fn may_be_cached(&self) -> bool {
        self.may_be_cached
    }

    fn decode(bytes: Bytes) -> Result<Self, DecodeError> {
        match bytes.get(HEADER_BYTES) {
            Some(b'{') => Ok(Self {
                bytes,
                may_be_cached: true,
            }),
            _ => Err(DecodeError("no JSON object behind the header".to_owned())),
        }
    }
}

/// Fowler, Noll and Vo's hash, 1a, 64 bits: the same in every process.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A read's answer.
#[derive(Debug)]
pub struct Fetched {
    /// The document, or `None` when there is no such item.
    pub document: Option<Document>,
    /// Where it came from.
    pub outcome: ReadOutcome,
    /// Time spent waiting for the cache.
    pub cache_time: Duration,
    /// Time spent in the store, if it was asked.
    pub store_time: Option<Duration>,
}

/// An acknowledged write.
#[derive(Debug)]
pub struct Written<T> {
    /// What it gave.
    pub output: T,
    /// Where it spent its time.
    pub timing: WriteTiming,
}

/// What went wrong, by what the caller should do.
#[derive(Debug, thiserror::Error)]
pub enum ItemsError {
    /// The store failed; nothing was written.
    #[error("the store failed: {0}")]
    Store(#[from] StoreError),
    /// The write could not be started.
    #[error("the write was not started: {0}")]
    Engine(Unavailable),
    /// The write may or may not have happened.
    #[error("the outcome of a write to {id} is unknown: {why}")]
    Indeterminate {
        /// The item.
        id: ItemId,
        /// Why it is unknown.
        why: Indeterminate<Refusal>,
    },
    /// There is no such item; nothing was written.
    #[error("there is no such item")]
    NotFound,
    /// The item has a version that the condition does not accept; nothing was written.
    #[error("the item has another version")]
    Mismatch,
    /// The cache could not be cleared.
    #[error("the cache could not be cleared: {0}")]
    Cache(CacheError),
}

impl From<ReadError<StoreError>> for ItemsError {
    fn from(error: ReadError<StoreError>) -> Self {
        let failure = match error {
            ReadError::Load(error) => return Self::Store(error),
            ReadError::Overloaded => StoreFailure::Overloaded,
            // Timed out, a shared load failed, or whatever else may be tried again.
            _ => StoreFailure::Unavailable,
        };
        Self::Store(StoreError::new(failure, error.to_string()))
    }
}

/// Adds up time on whichever task it passes.
#[derive(Clone, Default)]
struct Stopwatch(Arc<AtomicU64>);

impl Stopwatch {
    async fn time<T>(&self, work: impl Future<Output = T>) -> T {
        let started = Instant::now();
        let answer = work.await;
        let spent = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        // Never zero, which means "not asked".
        self.0.fetch_add(spent.max(1), Ordering::Relaxed);
        answer
    }

    fn read(&self) -> Option<Duration> {
        let spent = self.0.load(Ordering::Relaxed);
        (spent > 0).then(|| Duration::from_nanos(spent))
    }
}

/// Items: a store behind a cache.
pub struct Items {
    engine: Engine,
    store: Arc<dyn ItemStore>,
    metrics: Arc<Metrics>,
    clearing: Clearing<Result<u64, CacheError>>,
}

impl Items {
    /// Puts `engine` in front of `store`.
    #[must_use]
    pub fn new(engine: Engine, store: Arc<dyn ItemStore>, metrics: Arc<Metrics>) -> Self {
        Self {
            engine,
            store,
            metrics,
            clearing: Clearing::new(),
        }
    }

    /// The engine, for its state and its counters.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The store, for its state.
    #[must_use]
    pub fn store(&self) -> &dyn ItemStore {
        self.store.as_ref()
    }

    /// Reads an item.
    ///
    /// # Errors
    ///
    /// [`ItemsError::Store`].
    pub async fn get(&self, id: ItemId) -> Result<Fetched, ItemsError> {
        let watch = Stopwatch::default();
        let load = || async {
            let item = watch.time(self.store.select(id)).await?;
            Ok::<_, StoreError>(item.as_ref().map(Document::of_item))
        };
        let started = Instant::now();
        let read = self.engine.read(&ITEM.key(id), load).await?;
        self.metrics.read(read.outcome, started.elapsed());
        Ok(Fetched {
            document: read.value,
            outcome: read.outcome,
            cache_time: read.cache_time,
            store_time: watch.read(),
        })
    }

    /// Reads a part of the list.
    ///
    /// # Errors
    ///
    /// [`ItemsError::Store`].
    pub async fn list(&self, request: PageRequest) -> Result<Fetched, ItemsError> {
        let query = match request.after {
            None => format!("limit={}", request.limit),
            Some(cursor) => format!("limit={}&cursor={cursor}", request.limit),
        };
        let watch = Stopwatch::default();
        let load = || async {
            let page = watch.time(self.store.select_page(request)).await?;
            Ok::<_, StoreError>(Document::of_page(&page))
        };
        let started = Instant::now();
        let read = self.engine.read_page(&ITEMS.all(), &query, load).await?;
        self.metrics.read(read.outcome, started.elapsed());
        Ok(Fetched {
            document: read.value,
            outcome: read.outcome,
            cache_time: read.cache_time,
            store_time: watch.read(),
        })
    }

    /// Creates an item.
    ///
    /// # Errors
    ///
    /// [`ItemsError`].
    pub async fn create(
        &self,
        id: ItemId,
        fields: ItemFields,
    ) -> Result<Written<Document>, ItemsError> {
        self.write(WriteKind::Create, id, move |store, guard| {
            let fields = fields.clone();
            let new = NewItem { id, fields };
            async move {
                let item = store.insert(guard, new).await?;
                let document = Document::of_item(&item);
                Ok((document.clone(), Some(document)))
            }
        })
        .await
    }

    /// Replaces an item's fields, if its version is accepted.
    ///
    /// # Errors
    ///
    /// [`ItemsError`].
    pub async fn replace(
        &self,
        id: ItemId,
        fields: ItemFields,
        condition: Condition,
    ) -> Result<Written<Document>, ItemsError> {
        self.write(WriteKind::Update, id, move |store, guard| {
            let (fields, condition) = (fields.clone(), condition.clone());
            async move {
                let item = store.update(guard, id, fields, condition).await?;
                let document = Document::of_item(&item);
                Ok((document.clone(), Some(document)))
            }
        })
        .await
    }

    /// Removes an item, if its version is accepted.
    ///
    /// # Errors
    ///
    /// [`ItemsError`].
    pub async fn remove(
        &self,
        id: ItemId,
        condition: Condition,
    ) -> Result<Written<()>, ItemsError> {
        self.write(WriteKind::Delete, id, move |store, guard| {
            let condition = condition.clone();
            async move {
                let deleted = store.delete(guard, id, condition).await;
                deleted.map(|()| ((), None))
            }
        })
        .await
    }

    /// Runs a write of one item through the engine: every write may change the list too.
    async fn write<T, Op, F>(
        &self,
        kind: WriteKind,
        id: ItemId,
        mut op: Op,
    ) -> Result<Written<T>, ItemsError>
    where
        T: Send + 'static,
        Op: FnMut(Arc<dyn ItemStore>, Option<Guard>) -> F + Send + 'static,
        F: Future<Output = Result<(T, Option<Document>), OpError<Refusal>>> + Send + 'static,
    {
        let started = Instant::now();
        let watch = Stopwatch::default();
        let (store, spent, span) = (self.store.clone(), watch.clone(), Span::current());
        let run = move |guard: Option<Guard>| {
            let (work, spent) = (op(store.clone(), guard), spent.clone());
            async move { spent.time(work).await }.instrument(span.clone())
        };
        let (output, cache_time) = self
            .engine
            .write(ITEM.key(id), ITEMS.all(), run)
            .await
            .map_err(|error| match error {
                WriteError::Rejected(Refusal::Missing) => ItemsError::NotFound,
                WriteError::Rejected(Refusal::Mismatch) => ItemsError::Mismatch,
                WriteError::Rejected(Refusal::Store(error)) => ItemsError::Store(error),
                WriteError::Unavailable(why) => ItemsError::Engine(why),
                WriteError::Indeterminate(why) => ItemsError::Indeterminate { id, why },
                // A kind of failure that this version does not know says nothing about the effect.
                _ => ItemsError::Indeterminate {
                    id,
                    why: Indeterminate::Abandoned,
                },
            })?;
        let timing = WriteTiming {
            cache: cache_time,
            store: watch.read().unwrap_or_default(),
            total: started.elapsed(),
        };
        self.metrics.write(kind, &timing);
        Ok(Written { output, timing })
    }

    /// Empties the cache of items and of lists. Returns how many keys were removed. One such walk runs
    /// at a time; calls that come meanwhile share the next one, and its number.
    ///
    /// # Errors
    ///
    /// [`ItemsError::Cache`].
    pub async fn clear_cache(&self) -> Result<u64, ItemsError> {
        let engine = self.engine.clone();
        let walk = || async move { Ok(engine.clear(&ITEM).await? + engine.clear(&ITEMS).await?) };
        self.clearing.run(walk).await.map_err(ItemsError::Cache)
    }

    /// How many items the cache holds that reads may use; up to a second old, and never older than a
    /// write that was acknowledged here.
    pub async fn cached_items(&self) -> u64 {
        // What cannot be asked cannot be used either.
        self.engine.cached_values(&ITEM).await.unwrap_or(0)
    }

    /// Lets writes under way finish, then lets go of the cache and the store. Bounded.
    pub async fn shutdown(&self) {
        self.engine.shutdown().await;
        self.store.close().await;
    }
}

impl Live for Items {
    fn stats(&self) -> Stats {
        self.engine.stats()
    }

    fn state(&self) -> State {
        self.engine.state()
    }

    fn pool_use(&self) -> PoolUse {
        self.store.pool_use()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_comes_back_from_the_cache_as_it_was() {
        let document = Document::new(&serde_json::json!({"a": 1}), |_| 7);
        let decoded = Document::decode(document.encode()).unwrap();
        assert_eq!(
            (decoded.tag(), decoded.json()),
            (7, Bytes::from_static(br#"{"a":1}"#))
        );
    }

    #[test]
    fn bytes_of_another_program_are_refused() {
        for bytes in [&b""[..], b"12345678", b"{\"a\": 1}", b"12345678[]"] {
            assert!(Document::decode(Bytes::copy_from_slice(bytes)).is_err());
        }
    }
}
