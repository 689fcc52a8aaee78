//! What the engine needs of a cache, and the two caches there are.
//!
//! A [`Cache`] hands out [`Session`]s: a verified connection to one life of one server. A session
//! never changes its server; when the connection is lost a new session is made and verified.

mod contract;
#[cfg(feature = "memory")]
pub mod memory;
pub(crate) mod observed;
#[cfg(feature = "redis")]
pub mod redis;

pub(crate) use contract::IN_PROCESS;
pub use contract::{Cache, End, Fill, FillLease, Filled, Lease, Session, SessionWatch};
#[cfg(feature = "memory")]
pub use memory::MemoryCache;
#[cfg(feature = "redis")]
pub use redis::{RedisCache, RedisCertificates, RedisConnectError, RedisSettings};
