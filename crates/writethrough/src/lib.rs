//! A write-through cache that keeps its promise: Redis in front of Postgres, and every read
//! linearizable.
//!
//! Put a [`WriteThrough`] between your service and your tables. Reads come from the cache, writes
//! go to both, and a read that starts after a write was acknowledged, or after another read
//! returned a value, never returns anything older, through whichever node; with the cache up,
//! down, slow, cut off, restored from an old snapshot, or failed over to a lagging replica. While
//! the cache cannot be used, everything goes on from the store.
//!
//! ```
//! use std::sync::Arc;
//! use std::collections::HashMap;
//! use std::time::Duration;
//! use tokio::sync::Mutex;
//! use writethrough::{Entity, LocalFence, MemoryCache, OpError, ReadOutcome, WriteThrough};
//!
//! const PRICE: Entity<str, u32> = Entity::new("price");
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     // The store: a table of yours. Any database will do that can be guarded by a fence.
//!     let prices = Arc::new(Mutex::new(HashMap::from([("tea", 450)])));
//!
//!     // With RedisCache and PostgresFence this is Redis in front of Postgres, on many nodes.
//!     let cached = WriteThrough::builder(MemoryCache::new(64 << 20), LocalFence::new()).start()?;
//!     // Optional: without it the first reads come from the store.
//!     cached.ready(Duration::from_secs(5)).await?;
//!
//!     let key = PRICE.key("tea");
//!     let write = cached.write(&key).with(prices.clone());
//!     let written = write
//!         .guarded(|mut guarded, price, prices| async move {
//!             prices.lock().await.insert("tea", 500);
//!             guarded.cache(&price, &500);
//!             Ok::<_, OpError<std::io::Error>>(guarded.commit(500))
//!         })
//!         .await?;
//!     assert_eq!(written.output, 500);
//!
//!     let read = cached
//!         .read(&key, || async {
//!             Ok::<_, std::io::Error>(prices.lock().await.get("tea").copied())
//!         })
//!         .await?;
//!     assert_eq!(read.value, Some(500));
//!     assert_eq!(read.outcome, ReadOutcome::Hit);
//!     cached.shutdown().await;
//!     Ok(())
//! }
//! ```
//!
//! # Assumptions
//!
//! - The store's primary is linearizable: one primary, synchronous commit, and `load` reads it.
//! - The nodes' monotonic clocks run at nearly the same rate; 10 % is tolerated. No wall clock is
//!   compared.
//! - A database write that was sent finishes, or is lost, within [`Settings::write_timeout`] on
//!   both sides of the connection: set `statement_timeout` to it.
//! - The cache does not evict a key in the milliseconds between the announcement and the commit of
//!   a write. Use an LRU policy; `volatile-ttl` would evict announcements first.
//! - All writers of the tables go through this library.
//! - The database's advisory locks lock, and READ COMMITTED takes a new snapshot for each statement:
//!   tested on two connections before a server is believed ([`PostgresFence::self_test`]).
//!
//! # Features
//!
//! On by default is what nearly every service uses: `json` and `redis`. No driver of a database is: a
//! service has one already, and choosing it here must not bring a second one.
//!
//! | feature | what it adds |
//! |---|---|
//! | `postgres` | [`PostgresFence`], over tokio-postgres and deadpool |
//! | `sqlx` | [`SqlxFence`] and writes in transactions over sqlx; TLS is what the service's own sqlx has |
//! | `redis` | [`RedisCache`]; `redis-tls` adds `rediss://`, with rustls |
//! | `memory` | [`MemoryCache`], for a single node |
//! | `json` | values as JSON: [`format::AsJson`] |
//! | `postcard` | values in a compact format: [`format::AsPostcard`] |
//! | `testing` | what a service's own tests need: a cache and a fence whose failures they command |
//! | `textbook` | the usual pattern without a guarantee, to be compared with |
//!
//! Rust 1.89 or newer, and 1.94 for `sqlx`.
//!
//! Always there: the engine, [`LocalFence`], the traits [`Cache`] and [`Fence`] for others of your own, and
//! [`CacheValue`] with [`format::AsBytes`] for types that know their own bytes. The names of the formats are
//! always there too, so that the type of an entity does not depend on features.
//!
//! # The runtime
//!
//! [`Builder::start`] and [`RedisCache::connect`] need a tokio runtime with timers and I/O that
//! is driven for as long as the engine is used: a multi-thread one, or a current-thread one whose
//! `block_on` does not return before. In a runtime that is driven only while a call waits in
//! `block_on` the epoch is not polled between the calls: what is read is right, but hardly ever a
//! hit. Calls may be polled in other runtimes, and by executors that are not tokio's; these borrow the
//! engine's.
//!
//! A write is a task of the runtime that it was called in. If that runtime ends first, the write ends
//! half-way: the outcome is unknown, it is logged and counted ([`Stats::abandoned_writes`]), and its
//! intents keep readers on the store until they lapse. So await [`WriteThrough::shutdown`] before
//! the runtime ends.
//!
//! # What is absent
//!
//! No retry of your operations (except after [`OpError::Fenced`], when nothing was written), no
//! background refresh, no cache of its own in front of Redis, no wall clock.

#![forbid(unsafe_code)]
#![warn(missing_debug_implementations)]

mod announce;
mod builder;
mod clock;
#[cfg(any(feature = "postgres", feature = "sqlx"))]
mod driver;
mod engine;
mod entity;
mod error;
mod key;
mod lateness;
mod read;
mod read_many;
mod readiness;
mod runtime;
mod settings;
mod single_flight;
mod stats;
mod supervisor;
#[cfg(feature = "textbook")]
mod textbook;
mod turns;
mod value;
mod write;
mod write_through;

pub mod cache;
pub mod fence;
pub mod format;
#[cfg(any(feature = "postgres", feature = "sqlx"))]
pub mod migration;
#[cfg(feature = "postgres")]
pub mod postgres;
#[cfg(feature = "sqlx")]
pub mod sqlx;
#[cfg(feature = "testing")]
pub mod testing;
pub mod writing;

pub use builder::Builder;
pub use cache::Cache;
#[cfg(feature = "memory")]
pub use cache::MemoryCache;
#[cfg(feature = "redis")]
pub use cache::{RedisCache, RedisCertificates, RedisConnectError, RedisSettings};
pub use entity::{Cleared, Collection, CollectionKey, Entity, Key, Whole};
pub use error::{
    CacheError, FenceError, Fenced, Indeterminate, InvalidNamespace, NoConnection, OpError,
    ReadError, StartError, Unavailable, WriteError,
};
#[cfg(feature = "postgres")]
pub use fence::PostgresFence;
#[cfg(feature = "sqlx")]
pub use fence::SqlxFence;
pub use fence::{Fence, Guard, LocalFence};
pub use key::MAX_KEYS;
pub use read::{Read, ReadOutcome};
pub use read_many::ReadMany;
pub use readiness::NotReady;
pub use runtime::NoRuntime;
pub use settings::{InvalidSettings, Settings};
pub use stats::{Phase, ProposedBypass, SlowLoads, Stats, Status};
#[cfg(feature = "textbook")]
pub use textbook::Textbook;
pub use value::{CacheValue, DecodeError};
pub use write::Written;
pub use write_through::WriteThrough;
pub use writethrough_protocol::read::Bypass;
pub use writethrough_protocol::{Astray, Epoch, Mode, ServerId, Timing};

/// The example of the README is compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
