//! What the engine needs of a fence (the keeper of the epoch row), and the two fences there are.

mod contract;
#[cfg(any(feature = "postgres", feature = "sqlx"))]
mod database;
pub mod local;
#[cfg(feature = "postgres")]
pub(crate) mod postgres;
#[cfg(feature = "sqlx")]
pub(crate) mod sqlx;

pub use contract::{Fence, Guard};
#[cfg(any(feature = "postgres", feature = "sqlx"))]
pub use database::{EpochTable, UnfitDatabase};
pub use local::LocalFence;
#[cfg(feature = "postgres")]
pub use postgres::PostgresFence;
#[cfg(feature = "sqlx")]
pub use sqlx::SqlxFence;
