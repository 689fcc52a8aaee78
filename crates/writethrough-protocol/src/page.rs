//! A page of a collection (a list query's answer) and when it may be believed.
//!
//! A collection key goes through the states of [`KeyState`], but its value is a *stamp*: the token
//! of the fill lease under which the key was last filled. A page carries the stamp it was loaded
//! under, and is current exactly while the collection key still holds that stamp: every write of
//! the collection replaces the stamp by an intent before it touches the database, and no stamp
//! ever comes back.

use bytes::{BufMut, Bytes, BytesMut};

use crate::key::{KeyState, Malformed, Token};

/// A stored page: the stamp it was loaded under, and its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Page {
    /// The collection's stamp when the page was loaded.
    pub stamp: Token,
    /// The page itself.
    pub bytes: Bytes,
}

impl Page {
    /// The stored form: `P`, the stamp, the bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(1 + Token::ENCODED_LEN + self.bytes.len());
        out.put_u8(b'P');
        out.put_slice(&self.stamp.encode());
        out.put_slice(&self.bytes);
        out.freeze()
    }

    /// Reads a stored form; the page's bytes are shared, not copied.
    ///
    /// # Errors
    ///
    /// [`Malformed`] when the bytes are not a stored page.
    pub fn decode(stored: Bytes) -> Result<Self, Malformed> {
        let start = 1 + Token::ENCODED_LEN;
        if stored.first() != Some(&b'P') || stored.len() < start {
            return Err(Malformed("page"));
        }
        Ok(Self {
            stamp: Token::decode(&stored[1..start])?,
            bytes: stored.slice(start..),
        })
    }
}

/// The stamp that a collection key holds, if it holds one.
#[must_use]
pub fn stamp(collection: &KeyState) -> Option<Token> {
    match collection {
        KeyState::Value(Some(bytes)) => Token::decode(bytes).ok(),
        _ => None,
    }
}

/// Stores a page loaded under `token`: allowed while the collection key still holds the loader's
/// fill lease (which becomes the stamp) or the stamp that the loader saw. Returns the collection's
/// next state and whether the page may be stored, both in one atomic step.
#[must_use]
pub fn fill(collection: KeyState, token: Token) -> (KeyState, bool) {
    match collection {
        KeyState::FillLease(holder) if holder == token => (
            KeyState::Value(Some(Bytes::copy_from_slice(&token.encode()))),
            true,
        ),
        state => {
            let unchanged = stamp(&state) == Some(token);
            (state, unchanged)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Token = Token(1);
    const T: Token = Token(2);

    fn stamped(token: Token) -> KeyState {
        fill(KeyState::FillLease(token), token).0
    }

    #[test]
    fn a_fill_needs_its_lease_or_its_stamp() {
        assert_eq!(fill(KeyState::FillLease(S), S), (stamped(S), true));
        assert_eq!(fill(stamped(S), S), (stamped(S), true));
        for state in [
            KeyState::Absent,
            KeyState::FillLease(T),
            stamped(T),
            KeyState::Value(None),
        ] {
            assert_eq!(fill(state.clone(), S), (state, false));
        }
    }

    #[test]
    fn a_page_survives_its_encoding() {
        let page = Page {
            stamp: S,
            bytes: Bytes::from_static(b"[1]"),
        };
        assert_eq!(Page::decode(page.encode()), Ok(page));
        assert!(Page::decode(Bytes::from_static(b"P123")).is_err());
        assert!(Page::decode(KeyState::encode_value(&None)).is_err());
    }
}
