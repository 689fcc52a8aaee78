//! The protocol of epoch-fenced write-through as plain values: what one cache key can hold and how
//! each operation changes it ([`key`]), what a list page needs to be current ([`page`]), who may
//! trust the cache and for how long ([`epoch`], [`node`]), and what a read and a write do next
//! ([`read`], [`mod@write`]).
//!
//! There is no I/O here, no clock, no randomness, no async and no lock: time and tokens come in as
//! arguments. The engine of the `writethrough` crate runs these functions, its in-process cache is
//! made of them, its Redis scripts are tested against them, and the model checker explores them.

#![forbid(unsafe_code)]

pub mod epoch;
pub mod key;
pub mod node;
pub mod page;
pub mod read;
pub mod write;

pub use epoch::{Epoch, EpochRow, HistoryId, Mode, Proposal, ServerId, Sighting};
pub use key::{Acquire, Intent, KeyState, Payload, Token, Writer};
pub use node::{Astray, Monotonic, Node, ReadPermit, Timing, WritePermit};
