//! The write path that users see: what a write changes, and who may make its commit.
//!
//! [`crate::WriteThrough::write`] takes what the write changes and hands its operation, for each attempt, a slot
//! for each key, a copy of the context, and the one thing that can make a [`Commit`]:
//!
//! - [`Write::transaction`] (with the feature of a driver): a transaction of it, which is guarded already;
//! - [`Write::statement`] (with the feature `postgres`): a single statement, guarded and committed in its own
//!   round trip;
//! - [`Write::guarded`]: the bare guard, for stores that the library has no driver for.

mod commit;
mod guarded;
mod invalidate;
#[cfg(any(feature = "postgres", feature = "sqlx"))]
pub(crate) mod sealed;
pub mod set;
#[cfg(feature = "postgres")]
mod statement;
#[cfg(any(feature = "postgres", feature = "sqlx"))]
pub(crate) mod text;
#[cfg(any(feature = "postgres", feature = "sqlx"))]
mod transaction;
mod write;

pub use commit::Commit;
pub use guarded::Guarded;
#[cfg(feature = "postgres")]
pub use statement::{Done, Performed, Pipeline};
#[cfg(any(feature = "postgres", feature = "sqlx"))]
pub use transaction::{Begin, Driver, Ended, Lent};
pub use write::Write;
