//! How a value of an entity becomes the bytes that the cache keeps, and back.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::value::{CacheValue, DecodeError};

/// Turns values of type `V` into bytes and back. An entity names its format in its type; JSON is the
/// default.
pub trait Format<V>: Send + Sync + 'static {
    /// Appends the bytes of `value`.
    ///
    /// # Errors
    ///
    /// [`EncodeError`] when the value has no form in this format. The write or the load goes on, and
    /// the value is not cached.
    fn encode(value: &V, buffer: &mut Vec<u8>) -> Result<(), EncodeError>;

    /// Returns the value of stored bytes.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] when the bytes are not of this type. They are removed, and the value is loaded.
    fn decode(bytes: Bytes) -> Result<V, DecodeError>;

    /// Returns whether the cache may keep this value, true by default.
    fn may_be_cached(value: &V) -> bool {
        let _ = value;
        true
    }
}

/// A value that its format cannot write. Carries the format's own words.
#[derive(Debug, thiserror::Error)]
#[error("the value cannot be encoded: {0}")]
pub struct EncodeError(pub String);

/// Stores serde types as JSON.
#[derive(Debug, Clone, Copy)]
pub struct AsJson;

impl<V: Serialize + DeserializeOwned> Format<V> for AsJson {
    fn encode(value: &V, buffer: &mut Vec<u8>) -> Result<(), EncodeError> {
        serde_json::to_writer(buffer, value).map_err(|error| EncodeError(error.to_string()))
    }

    fn decode(bytes: Bytes) -> Result<V, DecodeError> {
        serde_json::from_slice(&bytes).map_err(|error| DecodeError(error.to_string()))
    }
}

/// Stores types that know their own bytes ([`CacheValue`]).
#[derive(Debug, Clone, Copy)]
pub struct AsBytes;

impl<V: CacheValue> Format<V> for AsBytes {
    fn encode(value: &V, buffer: &mut Vec<u8>) -> Result<(), EncodeError> {
        buffer.extend_from_slice(&value.encode());
        Ok(())
    }

    fn decode(bytes: Bytes) -> Result<V, DecodeError> {
        V::decode(bytes)
    }

    fn may_be_cached(value: &V) -> bool {
        value.may_be_cached()
    }
}
