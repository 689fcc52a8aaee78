//! Postgres by `sqlx`: the fence's own functions, and what the operations of writes are handed.
//!
//! There is [`Transaction`] and no single statement: `sqlx` waits for each answer, so one could not be guarded
//! and committed in its own round trip.

pub use crate::fence::sqlx::{is_fenced, is_missing, is_stale_statement, op_error};

mod transaction;

pub use transaction::Transaction;
