//! Stores: where items are kept for good. Two implementations of one trait, [`postgres`] and
//! [`sqlite`], and [`ObservedStore`], which adds spans and metrics to either.
//!
//! Stores know SQL and items. They know nothing of HTTP and nothing of the cache, except for the
//! [`Guard`](writethrough::Guard) that a write must carry.

mod contract;
mod left_out;
mod observed;
pub mod postgres;
pub mod sqlite;

pub use contract::{
    Condition, ItemStore, Operation, PoolUse, Refusal, StoreError, StoreFailure, WriteResult,
};
pub use observed::ObservedStore;
