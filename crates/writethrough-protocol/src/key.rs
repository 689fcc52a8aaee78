//! What one cache key holds inside one epoch, its encoding, and every transition of it.
//!
//! A transition takes the state by value and returns the next one; the caller makes it atomic (a
//! Lua script, or a lock in the in-process cache). Times are milliseconds on the cache server's own
//! clock, compared only with each other. Expiry of a whole key by its TTL is the cache's business;
//! here only the deadlines of single intents are applied.
//!
//! # Encoding
//!
//! One tag byte, then the payload untouched, so that a hit hands the stored bytes on unparsed:
//!
//! | bytes | state |
//! |---|---|
//! | `V` payload | a value |
//! | `N` | a value: known not to exist |
//! | `L` token | a fill lease |
//! | `I`, `-` or `+` (contended), then token, deadline and lifetime of each writer | an intent |
//!
//! A token is 32 hexadecimal digits, a deadline 13 decimal digits, a lifetime 8, so that the whole
//! can be read in `redis-cli` and cut at fixed places in Lua.

use std::fmt;
use std::str::FromStr;

use bytes::{BufMut, Bytes, BytesMut};

/// A random id that names one intent or one fill lease; 128 bits, never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u128);

impl Token {
    /// Length of the encoded token in bytes.
    pub const ENCODED_LEN: usize = 32;

    /// The token as 32 lower-case hexadecimal digits.
    #[must_use]
    pub fn encode(self) -> [u8; Self::ENCODED_LEN] {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut out = [0; Self::ENCODED_LEN];
        for (place, byte) in self.0.to_be_bytes().into_iter().enumerate() {
            out[2 * place] = DIGITS[usize::from(byte >> 4)];
            out[2 * place + 1] = DIGITS[usize::from(byte & 15)];
        }
        out
    }

    /// Reads 32 hexadecimal digits.
    ///
    /// # Errors
    ///
    /// [`Malformed`] when the length or a digit is wrong.
    pub fn decode(encoded: &[u8]) -> Result<Self, Malformed> {
        if encoded.len() != Self::ENCODED_LEN {
            return Err(Malformed("token length"));
        }
        let mut value = 0;
        for digit in encoded {
            let digit = (*digit as char)
                .to_digit(16)
                .ok_or(Malformed("token digit"))?;
            value = value << 4 | u128::from(digit);
        }
        Ok(Self(value))
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl FromStr for Token {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        Self::decode(text.as_bytes())
    }
}

/// What a value key holds: the stored bytes, or `None` for "known not to exist".
pub type Payload = Option<Bytes>;

/// The stored bytes are not an encoded state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a writethrough cache entry: bad {}", self.0)
    }
}

impl std::error::Error for Malformed {}

/// One announced writer of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Writer {
    /// Names the write.
    pub token: Token,
    /// When the announcement lapses, in milliseconds of the cache server's clock.
    pub deadline_ms: u64,
    /// For how long it was made, in milliseconds.
    pub lifetime_ms: u64,
}

impl Writer {
    /// Whether the announcement still counts. A deadline further away than the lifetime is one that
    /// no writer meant: the server's clock was set back since.
    #[must_use]
    pub fn lasts(&self, now_ms: u64) -> bool {
        self.deadline_ms > now_ms && self.deadline_ms - now_ms <= self.lifetime_ms
    }
}

/// The writers that have announced a write of one key and not ended it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Intent {
    writers: Vec<Writer>,
    /// Two writers have overlapped, so the order of their commits is unknown to the cache.
    contended: bool,
}

impl Intent {
    /// The announced writers, oldest first.
    #[must_use]
    pub fn writers(&self) -> &[Writer] {
        &self.writers
    }

    /// Whether writers have overlapped since the key was last free of intents.
    #[must_use]
    pub fn contended(&self) -> bool {
        self.contended
    }

    /// When the last of the writers lapses, in milliseconds: the whole key expires then.
    #[must_use]
    pub fn deadline(&self) -> u64 {
        let deadlines = self.writers.iter().map(|writer| writer.deadline_ms);
        deadlines.max().unwrap_or(0)
    }
}

/// The state of one cache key inside one epoch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum KeyState {
    /// Nothing is known.
    Absent,
    /// The current value, or the knowledge that there is none.
    Value(Payload),
    /// At least one write is under way: the cache knows nothing and must not be filled.
    Intent(Intent),
    /// A reader is loading the value and may fill it.
    FillLease(Token),
}

/// What [`KeyState::acquire_fill`] found.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Acquire {
    /// The fill lease is the caller's (also when an earlier try of the same caller had taken it).
    Acquired,
    /// Somebody else's state is there; it was left unchanged.
    Held(KeyState),
}

const DEADLINE_LEN: usize = 13;
const MAX_DEADLINE: u64 = 9_999_999_999_999;
const LIFETIME_LEN: usize = 8;
const MAX_LIFETIME: u64 = 99_999_999;
const WRITER_LEN: usize = Token::ENCODED_LEN + DEADLINE_LEN + LIFETIME_LEN;

impl KeyState {
    /// The stored form of a value: its tag and its bytes.
    #[must_use]
    pub fn encode_value(payload: &Payload) -> Bytes {
        match payload {
            None => Bytes::from_static(b"N"),
            Some(bytes) => {
                let mut out = BytesMut::with_capacity(1 + bytes.len());
                out.put_u8(b'V');
                out.put_slice(bytes);
                out.freeze()
            }
        }
    }

    /// The stored form; `None` for [`KeyState::Absent`], which is a missing key.
    #[must_use]
    pub fn encode(&self) -> Option<Bytes> {
        match self {
            Self::Absent => None,
            Self::Value(payload) => Some(Self::encode_value(payload)),
            Self::FillLease(token) => {
                let mut out = BytesMut::with_capacity(1 + Token::ENCODED_LEN);
                out.put_u8(b'L');
                out.put_slice(&token.encode());
                Some(out.freeze())
            }
            Self::Intent(intent) => {
                let mut out = BytesMut::with_capacity(2 + intent.writers.len() * WRITER_LEN);
                out.put_u8(b'I');
                out.put_u8(if intent.contended { b'+' } else { b'-' });
                for writer in &intent.writers {
                    out.put_slice(&writer.token.encode());
                    let deadline = writer.deadline_ms.min(MAX_DEADLINE);
                    let lifetime = writer.lifetime_ms.min(MAX_LIFETIME);
                    out.put_slice(format!("{deadline:013}{lifetime:08}").as_bytes());
                }
                Some(out.freeze())
            }
        }
    }

    /// Reads a stored form (`None` is a missing key). A value's bytes are shared, not copied.
    ///
    /// # Errors
    ///
    /// [`Malformed`] when the bytes were not written by this protocol.
    pub fn decode(stored: Option<Bytes>) -> Result<Self, Malformed> {
        let Some(stored) = stored else {
            return Ok(Self::Absent);
        };
        match stored.first() {
            Some(b'V') => Ok(Self::Value(Some(stored.slice(1..)))),
            Some(b'N') if stored.len() == 1 => Ok(Self::Value(None)),
            Some(b'L') => Ok(Self::FillLease(Token::decode(&stored[1..])?)),
            Some(b'I') => Self::decode_intent(&stored[1..]),
            _ => Err(Malformed("tag")),
        }
    }

    fn decode_intent(body: &[u8]) -> Result<Self, Malformed> {
        let contended = match body.first() {
            Some(b'-') => false,
            Some(b'+') => true,
            _ => return Err(Malformed("intent flag")),
        };
        let (writers, rest) = body[1..].as_chunks::<WRITER_LEN>();
        if writers.is_empty() || !rest.is_empty() {
            return Err(Malformed("intent length"));
        }
        let number = |digits: &[u8]| {
            std::str::from_utf8(digits)
                .ok()
                .filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|digits| digits.parse().ok())
                .ok_or(Malformed("intent deadline"))
        };
        let writers = writers
            .iter()
            .map(|writer| {
                let (token, times) = writer.split_at(Token::ENCODED_LEN);
                let (deadline, lifetime) = times.split_at(DEADLINE_LEN);
                Ok(Writer {
                    token: Token::decode(token)?,
                    deadline_ms: number(deadline)?,
                    lifetime_ms: number(lifetime)?,
                })
            })
            .collect::<Result<_, Malformed>>()?;
        Ok(Self::Intent(Intent { writers, contended }))
    }

    /// Drops the writers whose announcement has lapsed; an intent without writers is gone.
    #[must_use]
    pub fn expire(self, now_ms: u64) -> Self {
        match self {
            Self::Intent(mut intent) => {
                intent.writers.retain(|writer| writer.lasts(now_ms));
                if intent.writers.is_empty() {
                    Self::Absent
                } else {
                    Self::Intent(intent)
                }
            }
            other => other,
        }
    }

    /// `Absent -> FillLease(token)`; anything else is left as it is and reported.
    #[must_use]
    pub fn acquire_fill(self, token: Token) -> (Self, Acquire) {
        match self {
            Self::Absent => (Self::FillLease(token), Acquire::Acquired),
            Self::FillLease(holder) if holder == token => (self, Acquire::Acquired),
            other => (other.clone(), Acquire::Held(other)),
        }
    }

    /// `FillLease(token) -> Value`; anything else is left as it is. Tells whether it filled.
    #[must_use]
    pub fn fill(self, token: Token, payload: Payload) -> (Self, bool) {
        match self {
            Self::FillLease(holder) if holder == token => (Self::Value(payload), true),
            other => (other, false),
        }
    }

    /// `FillLease(token) -> Absent`; anything else is left as it is. Tells whether it broke.
    #[must_use]
    pub fn break_fill(self, token: Token) -> (Self, bool) {
        match self {
            Self::FillLease(holder) if holder == token => (Self::Absent, true),
            other => (other, false),
        }
    }

    /// Keeps `FillLease(token)` alive while its load runs: the key is left as it is, and the caller
    /// moves its expiry only when this tells that the lease is still there.
    #[must_use]
    pub fn renew_fill(self, token: Token) -> (Self, bool) {
        let held = matches!(self, Self::FillLease(holder) if holder == token);
        (self, held)
    }

    /// Announces a write: whatever the key held is forgotten, and no fill can succeed until the
    /// write ends or lapses after `lifetime_ms`.
    #[must_use]
    pub fn begin(self, token: Token, lifetime_ms: u64, now_ms: u64) -> Self {
        let writer = Writer {
            token,
            deadline_ms: now_ms.saturating_add(lifetime_ms),
            lifetime_ms,
        };
        match self.expire(now_ms) {
            Self::Intent(mut intent) => {
                if !intent.writers.iter().any(|other| other.token == token) {
                    intent.writers.push(writer);
                    intent.contended = true;
                }
                Self::Intent(intent)
            }
            _ => Self::Intent(Intent {
                writers: vec![writer],
                contended: false,
            }),
        }
    }

    /// Ends a write announced under `token`. The value is kept only when this writer was alone
    /// from beginning to end; otherwise the key is left, or becomes, empty.
    #[must_use]
    pub fn end(self, token: Token, value: Option<Payload>, now_ms: u64) -> Self {
        match self.expire(now_ms) {
            Self::Intent(mut intent) => {
                let own = intent.writers.iter().any(|writer| writer.token == token);
                intent.writers.retain(|writer| writer.token != token);
                if intent.writers.is_empty() {
                    match value {
                        Some(payload) if own && !intent.contended => Self::Value(payload),
                        _ => Self::Absent,
                    }
                } else {
                    intent.contended = true;
                    Self::Intent(intent)
                }
            }
            _ => Self::Absent,
        }
    }

    /// Removes what may always be removed: values and fill leases. Intents stay.
    #[must_use]
    pub fn clear(self) -> Self {
        match self {
            Self::Value(_) | Self::FillLease(_) => Self::Absent,
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Token = Token(0xa);
    const B: Token = Token(0xb);

    fn value(text: &'static str) -> KeyState {
        KeyState::Value(Some(Bytes::from_static(text.as_bytes())))
    }

    fn payload(text: &'static str) -> Payload {
        Some(Bytes::from_static(text.as_bytes()))
    }

    /// An intent of writers announced at 0: of each its token and its deadline.
    fn intent(writers: &[(Token, u64)], contended: bool) -> KeyState {
        let writers = writers.iter().map(|(token, deadline_ms)| Writer {
            token: *token,
            deadline_ms: *deadline_ms,
            lifetime_ms: *deadline_ms,
        });
        KeyState::Intent(Intent {
            writers: writers.collect(),
            contended,
        })
    }

    fn every_state() -> Vec<KeyState> {
        vec![
            KeyState::Absent,
            value("v"),
            KeyState::Value(None),
            KeyState::FillLease(A),
            KeyState::FillLease(B),
            intent(&[(A, 100)], false),
            intent(&[(B, 100)], false),
            intent(&[(A, 100)], true),
            intent(&[(A, 100), (B, 100)], true),
        ]
    }

    #[test]
    fn acquire_takes_only_an_absent_key_and_is_idempotent() {
        for state in every_state() {
            let (next, answer) = state.clone().acquire_fill(A);
            match state {
                KeyState::Absent => {
                    assert_eq!((next, answer), (KeyState::FillLease(A), Acquire::Acquired));
                }
                KeyState::FillLease(A) => {
                    assert_eq!((next, answer), (KeyState::FillLease(A), Acquire::Acquired));
                }
                other => assert_eq!((next, answer), (other.clone(), Acquire::Held(other))),
            }
        }
    }

    #[test]
    fn fill_break_and_renewal_touch_only_their_own_lease() {
        for state in every_state() {
            let own = state == KeyState::FillLease(A);
            let filled = state.clone().fill(A, payload("new"));
            assert_eq!(
                filled,
                if own {
                    (value("new"), true)
                } else {
                    (state.clone(), false)
                }
            );
            let broken = state.clone().break_fill(A);
            assert_eq!(
                broken,
                if own {
                    (KeyState::Absent, true)
                } else {
                    (state.clone(), false)
                }
            );
            assert_eq!(state.clone().renew_fill(A), (state, own));
        }
    }

    #[test]
    fn begin_forgets_values_and_leases() {
        for state in [
            KeyState::Absent,
            value("v"),
            KeyState::Value(None),
            KeyState::FillLease(B),
        ] {
            assert_eq!(state.begin(A, 50, 0), intent(&[(A, 50)], false));
        }
    }

    #[test]
    fn begin_beside_another_writer_is_contended() {
        let state = intent(&[(B, 40)], false).begin(A, 50, 0);
        assert_eq!(state, intent(&[(B, 40), (A, 50)], true));
    }

    #[test]
    fn begin_tried_again_changes_nothing() {
        let state = intent(&[(A, 50)], false);
        assert_eq!(state.clone().begin(A, 60, 0), state);
    }

    #[test]
    fn begin_drops_lapsed_writers() {
        let tokens = |state: KeyState| match state {
            KeyState::Intent(intent) => intent.writers.iter().map(|w| w.token).collect(),
            _ => Vec::new(),
        };
        assert_eq!(tokens(intent(&[(B, 40)], false).begin(A, 50, 40)), [A]);
        let contended = intent(&[(B, 40), (Token(1), 90)], true).begin(A, 95, 40);
        assert_eq!(tokens(contended), [Token(1), A]);
    }

    #[test]
    fn an_announcement_from_a_clock_that_was_set_back_has_lapsed() {
        const HOUR: u64 = 3_600_000;
        let ahead = KeyState::Absent.begin(A, 15_000, HOUR);
        assert_eq!(ahead.clone().expire(0), KeyState::Absent);
        assert_eq!(ahead.clone().expire(HOUR), ahead);
        assert_eq!(ahead.clone().expire(HOUR - 1), KeyState::Absent);
        assert_eq!(ahead.expire(HOUR + 15_000), KeyState::Absent);
    }

    #[test]
    fn end_of_a_lone_writer_keeps_its_value() {
        let alone = intent(&[(A, 50)], false);
        assert_eq!(alone.clone().end(A, Some(payload("new")), 0), value("new"));
        assert_eq!(alone.clone().end(A, Some(None), 0), KeyState::Value(None));
        assert_eq!(alone.end(A, None, 0), KeyState::Absent);
    }

    #[test]
    fn end_of_overlapping_writers_leaves_nothing() {
        let both = intent(&[(A, 50), (B, 50)], true);
        let one = both.end(A, Some(payload("a")), 0);
        assert_eq!(one, intent(&[(B, 50)], true));
        assert_eq!(one.end(B, Some(payload("b")), 0), KeyState::Absent);
    }

    #[test]
    fn end_without_its_intent_removes_what_it_finds() {
        for state in [
            value("old"),
            KeyState::Value(None),
            KeyState::FillLease(B),
            KeyState::Absent,
        ] {
            assert_eq!(state.end(A, Some(payload("new")), 0), KeyState::Absent);
        }
        assert_eq!(
            intent(&[(B, 50)], false).end(A, Some(payload("new")), 0),
            intent(&[(B, 50)], true),
            "a writer whose intent was lost marks the others contended"
        );
        assert_eq!(
            intent(&[(A, 50)], false).end(A, Some(payload("new")), 50),
            KeyState::Absent,
            "a lapsed intent no longer protects the value"
        );
    }

    #[test]
    fn end_tried_again_is_harmless() {
        let once = intent(&[(A, 50)], false).end(A, Some(payload("new")), 0);
        assert_eq!(once.end(A, Some(payload("new")), 0), KeyState::Absent);
    }

    #[test]
    fn clear_spares_intents() {
        for state in every_state() {
            let spared = matches!(state, KeyState::Intent(_));
            assert_eq!(
                state.clone().clear(),
                if spared { state } else { KeyState::Absent }
            );
        }
    }

    #[test]
    fn every_state_survives_its_encoding() {
        for state in every_state() {
            assert_eq!(KeyState::decode(state.encode()), Ok(state));
        }
        assert_eq!(value("").encode().as_deref(), Some(&b"V"[..]));
        assert_eq!(
            KeyState::decode(Some(Bytes::from_static(b"V"))),
            Ok(value(""))
        );
    }

    #[test]
    fn a_value_is_shared_not_copied() {
        let stored = KeyState::encode_value(&payload("some bytes"));
        let address = stored[1..].as_ptr();
        let KeyState::Value(Some(bytes)) = KeyState::decode(Some(stored)).unwrap() else {
            panic!("a value was stored")
        };
        assert_eq!(bytes.as_ptr(), address);
    }

    #[test]
    fn foreign_bytes_are_refused() {
        for bytes in [
            "",
            "x",
            "{\"id\":1}",
            "Lshort",
            "I",
            "I-",
            "I?",
            "NN",
            "I-zz",
        ] {
            let bytes = Bytes::from_static(bytes.as_bytes());
            assert!(KeyState::decode(Some(bytes.clone())).is_err(), "{bytes:?}");
        }
        let signed = format!("I-{}{}", A, "+00000000005000000050");
        assert!(KeyState::decode(Some(signed.into())).is_err());
    }
}
