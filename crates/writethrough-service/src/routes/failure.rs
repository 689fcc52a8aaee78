//! What clients are told when items cannot be read or written.

use axum::http::header;
use writethrough::Unavailable;

use crate::items::ItemsError;
use crate::json::header_value;
use crate::problem::{Kind, Problem};
use crate::store::StoreFailure;

impl From<ItemsError> for Problem {
    /// Keeps the cause for the log; the client does not get to see it.
    fn from(error: ItemsError) -> Self {
        let problem = match &error {
            ItemsError::NotFound => return Problem::new(Kind::ItemNotFound),
            ItemsError::Mismatch => return Problem::new(Kind::PreconditionFailed),
            ItemsError::Store(cause) => Problem::new(match cause.failure() {
                StoreFailure::Internal => Kind::Internal,
                StoreFailure::Overloaded => Kind::Overloaded,
                StoreFailure::Unavailable => Kind::Unavailable,
            }),
            ItemsError::Engine(Unavailable::Busy) => Problem::new(Kind::Overloaded),
            ItemsError::Engine(_) => Problem::new(Kind::Unavailable),
            ItemsError::Cache(_) => Problem::new(Kind::CacheUnavailable),
            ItemsError::Indeterminate { id, .. } => Problem::new(Kind::OutcomeUnknown)
                .detail(format!(
                    "The write may or may not have happened. Read /items/{id} before you send it \
                     again."
                ))
                .header(header::LOCATION, header_value(format!("/items/{id}"))),
        };
        problem.caused_by(error)
    }
}
