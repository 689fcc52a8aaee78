//! How a value of an entity becomes the bytes that the cache keeps, and back.

use bytes::Bytes;
#[cfg(any(feature = "json", feature = "postcard"))]
use serde::{Serialize, de::DeserializeOwned};

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

/// Stores serde types as JSON. It is the format of entities that name none; as a [`Format`] it needs the
/// feature `json`.
#[derive(Debug, Clone, Copy)]
pub struct AsJson;

#[cfg(feature = "json")]
impl<V: Serialize + DeserializeOwned> Format<V> for AsJson {
    fn encode(value: &V, buffer: &mut Vec<u8>) -> Result<(), EncodeError> {
        serde_json::to_writer(buffer, value).map_err(|error| EncodeError(error.to_string()))
    }

    fn decode(bytes: Bytes) -> Result<V, DecodeError> {
        serde_json::from_slice(&bytes).map_err(|error| DecodeError(error.to_string()))
    }
}

/// Stores serde types in the compact format of the crate `postcard`; as a [`Format`] it needs the feature
/// `postcard`.
///
/// The bytes say nothing of their shape: count up the entity's version whenever the fields of the type
/// change, or the old bytes may be read as a wrong value. Types that ask the format what comes next (an
/// untagged or a flattened serde type) cannot be read back.
#[derive(Debug, Clone, Copy)]
pub struct AsPostcard;

#[cfg(feature = "postcard")]
impl<V: Serialize + DeserializeOwned> Format<V> for AsPostcard {
    fn encode(value: &V, buffer: &mut Vec<u8>) -> Result<(), EncodeError> {
        postcard::to_io(value, buffer)
            .map(drop)
            .map_err(|error| EncodeError(error.to_string()))
    }

    fn decode(bytes: Bytes) -> Result<V, DecodeError> {
        let failed = |error: String| Err(DecodeError(error));
        match postcard::take_from_bytes(&bytes) {
            Ok((value, [])) => Ok(value),
            Ok((_, rest)) => failed(format!("{} bytes are left", rest.len())),
            Err(error) => failed(error.to_string()),
        }
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

#[cfg(all(feature = "json", feature = "postcard"))]
#[cfg(test)]
mod tests {
    use super::*;

    type Row = (u64, Option<String>, Vec<i32>);

    fn bytes(row: &Row) -> Bytes {
        let mut buffer = Vec::new();
        AsPostcard::encode(row, &mut buffer).unwrap();
        buffer.into()
    }

    #[test]
    fn the_compact_format_gives_back_what_was_stored_in_fewer_bytes_than_json() {
        let row: Row = (7, Some("tea".to_owned()), vec![-1, 300]);
        let compact = bytes(&row);
        let mut json = Vec::new();
        AsJson::encode(&row, &mut json).unwrap();
        assert!(compact.len() < json.len(), "{compact:?}");
        let back: Row = AsPostcard::decode(compact).unwrap();
        assert_eq!(back, row);
    }

    /// A type that has lost its last field would be read from the old bytes otherwise.
    #[test]
    fn bytes_of_another_shape_do_not_decode() {
        let row = bytes(&(7, None, vec![1]));
        let shorter: Result<(u64, Option<String>), _> = AsPostcard::decode(row.clone());
        let longer: Result<(Row, u64), _> = AsPostcard::decode(row);
        assert!(shorter.is_err() && longer.is_err());
    }
}
