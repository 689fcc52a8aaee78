//! Postgres by `tokio-postgres` and `deadpool-postgres`: the fence's own functions, and what the
//! operations of writes are handed.

pub use crate::fence::postgres::{
    is_fenced, is_missing, is_stale_statement, migrate_schema, op_error,
};

mod connection;
mod statement;
mod transaction;

#[doc(hidden)]
pub use connection::Connection;
pub use statement::Statement;
pub use transaction::Transaction;
