//! How a value becomes the bytes that the cache keeps, and back.

use bytes::Bytes;

/// The stored bytes are not a value of the expected type. The engine counts it, reads the store
/// and returns what the store has.
#[derive(Debug, thiserror::Error)]
#[error("the cached bytes are not a value of the expected type: {0}")]
pub struct DecodeError(pub String);

/// A value that can be cached. The bytes are stored untouched, so a type that keeps its wire form
/// (`Bytes`, or a response body behind a small header) costs nothing to read.
pub trait CacheValue: Sized + Send {
    /// The bytes to store.
    fn encode(&self) -> Bytes;

    /// Whether the cache may keep it, true by default. A value that says no is served and counted
    /// ([`crate::Stats::declined`]); the cache is left without one.
    fn may_be_cached(&self) -> bool {
        true
    }

    /// The value of stored bytes.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] when the bytes are not of this type, for example after an upgrade.
    fn decode(bytes: Bytes) -> Result<Self, DecodeError>;
}

impl CacheValue for Bytes {
    fn encode(&self) -> Bytes {
        self.clone()
    }

    fn decode(bytes: Bytes) -> Result<Self, DecodeError> {
        Ok(bytes)
    }
}
