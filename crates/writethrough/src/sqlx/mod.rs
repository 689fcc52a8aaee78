//! Postgres by `sqlx`: the fence's own functions.

pub use crate::fence::sqlx::{is_fenced, is_missing, is_stale_statement, op_error};
