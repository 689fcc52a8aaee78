//! What a service's own tests need: a cache and a fence in memory whose failures a test commands.
//!
//! Build the engine on a [`TestCache`] and a [`TestFence`] in place of the real ones, and keep a clone of
//! each. The engine, the protocol and your code are those of production; only the servers are not. Use it in
//! `[dev-dependencies]`, with the feature `testing`.
//!
//! How your statements behave on a real database, its guard included, these tests do not show.
//!
//! An engine starts without a cache, and goes on without one for a while after a failure
//! ([`crate::Settings::timing`], about 2 s by default): await [`crate::WriteThrough::ready`] before a test
//! expects a hit. The engine reads a clock of the machine, so a test must not pause the time of tokio.
//!
//! ```
//! use std::collections::HashMap;
//! use std::convert::Infallible;
//! use std::sync::{Arc, Mutex};
//! use std::time::Duration;
//!
//! use writethrough::testing::{TestCache, TestFence};
//! use writethrough::{Entity, OpError, Read, ReadError, ReadOutcome, WriteError, WriteThrough, Written};
//!
//! // The service that is tested: prices, behind a cache.
//! const PRICE: Entity<str, u32> = Entity::new("price");
//!
//! #[derive(Clone)]
//! struct Prices {
//!     cached: WriteThrough,
//!     table: Arc<Mutex<HashMap<String, u32>>>,
//! }
//!
//! impl Prices {
//!     async fn get(&self, name: &str) -> Result<Read<u32>, ReadError<Infallible>> {
//!         let load = || async { Ok(self.table.lock().unwrap().get(name).copied()) };
//!         self.cached.read(&PRICE.key(name), load).await
//!     }
//!
//!     async fn set(&self, name: &str, cents: u32) -> Result<Written<()>, WriteError<Infallible>> {
//!         let key = PRICE.key(name);
//!         let write = self.cached.write(&key).with((self.table.clone(), name.to_owned()));
//!         write
//!             .guarded(move |mut guarded, price, (table, name)| async move {
//!                 table.lock().unwrap().insert(name, cents);
//!                 guarded.cache(&price, &cents);
//!                 Ok::<_, OpError<Infallible>>(guarded.commit(()))
//!             })
//!             .await
//!     }
//! }
//!
//! // Its test.
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let (cache, fence) = (TestCache::new(), TestFence::new());
//!     let cached = WriteThrough::builder(cache.clone(), fence.clone()).start()?;
//!     cached.ready(Duration::from_secs(10)).await?;
//!     let prices = Prices { cached, table: Arc::default() };
//!     prices.set("tea", 450).await?;
//!     assert_eq!(prices.get("tea").await?.outcome, ReadOutcome::Hit);
//!
//!     // The epoch ends between the announcement of a write and its guard: the write begins again in the
//!     // next epoch.
//!     cache.hold();
//!     let writing = prices.clone();
//!     let write = tokio::spawn(async move { writing.set("tea", 500).await });
//!     cache.until_held().await;
//!     let next = fence.end_epoch().await;
//!     cache.release();
//!     assert!(write.await??.epoch >= next);
//!     assert_eq!(prices.get("tea").await?.value, Some(500));
//!
//!     // While the cache is away a read goes to the store, and does not go back.
//!     prices.cached.ready(Duration::from_secs(10)).await?;
//!     cache.disconnect();
//!     prices.set("tea", 550).await?;
//!     let read = prices.get("tea").await?;
//!     assert!(matches!(read.outcome, ReadOutcome::Bypassed(_)));
//!     assert_eq!(read.value, Some(550));
//!
//!     // The cache still has the older price, and nobody believes it.
//!     cache.reconnect();
//!     prices.cached.ready(Duration::from_secs(10)).await?;
//!     assert_eq!(prices.get("tea").await?.value, Some(550));
//!     prices.cached.shutdown().await;
//!     Ok(())
//! }
//! ```

mod cache;
mod fence;

pub use cache::TestCache;
pub use fence::TestFence;
