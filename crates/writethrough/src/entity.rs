//! Typed names: an entity names values of one type, a collection names the lists of one type.
//!
//! A name is a constant, checked when the program is compiled:
//!
//! ```
//! use std::time::Duration;
//! use writethrough::{Collection, Entity};
//!
//! const PRICE: Entity<str, u64> = Entity::new("price").version(2).ttl(Duration::from_secs(60));
//! const PRICES_OF: Collection<u32, Vec<u64>> = Collection::new("prices_of");
//!
//! assert_eq!(PRICE.key("tea").to_string(), "price:tea");
//! assert_eq!(PRICES_OF.of(7).to_string(), "prices_of:7");
//! ```
//!
//! ```compile_fail
//! use writethrough::Entity;
//!
//! const NAMELESS: Entity<str, u64> = Entity::new("");
//! ```

use std::borrow::Borrow;
use std::fmt::{self, Write};
use std::marker::PhantomData;
use std::time::Duration;

use bytes::Bytes;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use writethrough_protocol::Payload;

use crate::format::{AsJson, EncodeError, Format};
use crate::key;
use crate::value::DecodeError;

/// What the values of an entity or the pages of a collection have in common.
///
/// Values carry the version in front. It is not part of the key: while an old and a new version of a
/// program run side by side, each must see the writes of the other, so they share the key, and take each
/// other's bytes for a miss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Traits {
    pub(crate) version: u8,
    /// None: as the settings of the engine say.
    pub(crate) ttl: Option<Duration>,
    pub(crate) negative_ttl: Option<Duration>,
}

impl Traits {
    const NEW: Self = Self {
        version: 1,
        ttl: None,
        negative_ttl: None,
    };

    /// How long such an entry is kept, if the entity says so.
    pub(crate) fn lifetime(self, payload: &Payload) -> Option<Duration> {
        match payload {
            Some(_) => self.ttl,
            None => self.negative_ttl,
        }
    }
}

/// Refuses, when the program is compiled, a name that could not be told from the rest of a key.
const fn checked(name: &'static str) -> &'static str {
    let bytes = name.as_bytes();
    assert!(
        !bytes.is_empty(),
        "the name of an entity or a collection is empty"
    );
    let mut at = 0;
    while at < bytes.len() {
        assert!(
            bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_' || bytes[at] == b'-',
            "the name of an entity or a collection has letters, digits, `_` and `-`"
        );
        at += 1;
    }
    name
}

/// Refuses, when the program is compiled, a time that no settings of the engine would take.
const fn lasting(ttl: Duration) -> Option<Duration> {
    assert!(
        ttl.as_millis() >= 100 && ttl.as_secs() <= 31_536_000,
        "the time that a value is kept is from 100 ms to a year"
    );
    Some(ttl)
}

/// What is written as `%` and two digits in ids and parameters: braces would move a key to another hash
/// slot, the signs of globs would let a clearing reach others, and blanks cannot be told in a log. So is
/// everything that is not ASCII.
const ESCAPED: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'%')
    .add(b'*')
    .add(b'?')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'{')
    .add(b'}');

/// Appends what is written to it, escaped.
struct Escaping<'a>(&'a mut String);

impl Write for Escaping<'_> {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        self.0.extend(utf8_percent_encode(part, ESCAPED));
        Ok(())
    }
}

/// The name, a colon, and the escaped form of an id or a parameter. No two ids have the same.
fn joined(name: &str, id: &(impl fmt::Display + ?Sized)) -> String {
    // Room for a UUID.
    let mut joined = String::with_capacity(name.len() + 1 + 36);
    joined.push_str(name);
    joined.push(':');
    // Fails only if `Display` does, and then the name is what it has written.
    let _ = write!(Escaping(&mut joined), "{id}");
    joined
}

/// The types that a name stands for, of which it holds nothing.
type Types<I, V, F> = PhantomData<(fn(&I), fn() -> (V, F))>;

/// Names the values of one kind: `I` is the type of their ids, `V` that of the values, `F` their format.
pub struct Entity<I: ?Sized, V, F = AsJson> {
    name: &'static str,
    traits: Traits,
    of: Types<I, V, F>,
}

impl<I: ?Sized, V, F> Entity<I, V, F> {
    /// Names an entity. The name is not empty and has letters, digits, `_` and `-` only; in a constant
    /// another one does not compile.
    ///
    /// # Panics
    ///
    /// With another name, when it is called outside of a constant.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self {
            name: checked(name),
            traits: Traits::NEW,
            of: PhantomData,
        }
    }

    /// Sets the version of the format, 1 by default: count it up when the bytes of an old version must
    /// not be read as values of the new one. Programs of both versions can run at the same time.
    #[must_use]
    pub const fn version(mut self, version: u8) -> Self {
        self.traits.version = version;
        self
    }

    /// Sets how long a value is kept; without it the settings of the engine say.
    ///
    /// # Panics
    ///
    /// With less than 100 ms or more than a year, when it is called outside of a constant.
    #[must_use]
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.traits.ttl = lasting(ttl);
        self
    }

    /// Sets how long "there is none" is kept; without it the settings of the engine say.
    ///
    /// # Panics
    ///
    /// With less than 100 ms or more than a year, when it is called outside of a constant.
    #[must_use]
    pub const fn negative_ttl(mut self, ttl: Duration) -> Self {
        self.traits.negative_ttl = lasting(ttl);
        self
    }

    /// Names all values of the entity, for a write that changes more of them than it can name, as a bulk
    /// statement does.
    ///
    /// The price: the whole cache, of all entities, is given up before the statement runs, on all nodes,
    /// and begins empty some seconds later. Such a write waits until no node uses the cache any more,
    /// about 1.3 s, and then is as fast as the statement.
    #[must_use]
    pub const fn whole(&self) -> Whole {
        Whole { name: self.name }
    }

    /// Returns the name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }
}

impl<I: fmt::Display + ?Sized, V, F> Entity<I, V, F> {
    /// Returns the key of the value with this id.
    #[must_use]
    pub fn key(&self, id: impl Borrow<I>) -> Key<V, F> {
        Key {
            name: key::Key::new(joined(self.name, id.borrow())),
            traits: self.traits,
            of: PhantomData,
        }
    }
}

/// Names one value of an entity.
pub struct Key<V, F = AsJson> {
    pub(crate) name: key::Key,
    pub(crate) traits: Traits,
    of: PhantomData<fn() -> (V, F)>,
}

/// Names the lists of one kind: `P` is what tells the lists apart (`()` when there is one), `V` the type
/// of a page, `F` its format.
pub struct Collection<P: ?Sized, V, F = AsJson> {
    name: &'static str,
    traits: Traits,
    of: Types<P, V, F>,
}

impl<P: ?Sized, V, F> Collection<P, V, F> {
    /// Names a collection, as [`Entity::new`] names an entity.
    ///
    /// # Panics
    ///
    /// With a name that is not allowed, when it is called outside of a constant.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self {
            name: checked(name),
            traits: Traits::NEW,
            of: PhantomData,
        }
    }

    /// Sets the version of the format, as [`Entity::version`] does.
    #[must_use]
    pub const fn version(mut self, version: u8) -> Self {
        self.traits.version = version;
        self
    }

    /// Sets how long a page is kept; without it the settings of the engine say.
    ///
    /// # Panics
    ///
    /// With less than 100 ms or more than a year, when it is called outside of a constant.
    #[must_use]
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.traits.ttl = lasting(ttl);
        self
    }

    /// Names all lists of the collection, for a write that changes more of them than it can name, as a bulk
    /// statement does.
    ///
    /// The price: the whole cache, of all entities, is given up before the statement runs, on all nodes,
    /// and begins empty some seconds later. Such a write waits until no node uses the cache any more,
    /// about 1.3 s, and then is as fast as the statement.
    #[must_use]
    pub const fn whole(&self) -> Whole {
        Whole { name: self.name }
    }

    /// Returns the name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }
}

impl<V, F> Collection<(), V, F> {
    /// Returns the key of the one list of this collection.
    #[must_use]
    pub fn all(&self) -> CollectionKey<V, F> {
        CollectionKey {
            name: key::Collection::new(self.name.to_owned()),
            traits: self.traits,
            of: PhantomData,
        }
    }
}

impl<P: fmt::Display + ?Sized, V, F> Collection<P, V, F> {
    /// Returns the key of the list of this parameter.
    #[must_use]
    pub fn of(&self, parameter: impl Borrow<P>) -> CollectionKey<V, F> {
        CollectionKey {
            name: key::Collection::new(joined(self.name, parameter.borrow())),
            traits: self.traits,
            of: PhantomData,
        }
    }
}

/// Names everything that an entity or a collection has in the cache.
#[derive(Debug, Clone, Copy)]
pub struct Whole {
    pub(crate) name: &'static str,
}

/// Names one list of a collection, with all its pages.
pub struct CollectionKey<V, F = AsJson> {
    pub(crate) name: key::Collection,
    pub(crate) traits: Traits,
    of: PhantomData<fn() -> (V, F)>,
}

/// What [`crate::WriteThrough::clear`] empties: an entity, a collection with all its lists, or one list.
pub trait Cleared: sealed::Sealed {}

pub(crate) mod sealed {
    pub trait Sealed {
        /// Globs that match the names, without an epoch.
        fn patterns(&self) -> Vec<String>;
    }
}

impl<I: ?Sized, V, F> Cleared for Entity<I, V, F> {}
impl<P: ?Sized, V, F> Cleared for Collection<P, V, F> {}
impl<V, F> Cleared for CollectionKey<V, F> {}

impl<I: ?Sized, V, F> sealed::Sealed for Entity<I, V, F> {
    fn patterns(&self) -> Vec<String> {
        vec![format!("{}:*", self.name)]
    }
}

impl<P: ?Sized, V, F> sealed::Sealed for Collection<P, V, F> {
    fn patterns(&self) -> Vec<String> {
        let name = self.name;
        vec![format!("{{{name}}}"), format!("{{{name}:*}}")]
    }
}

impl<V, F> sealed::Sealed for CollectionKey<V, F> {
    fn patterns(&self) -> Vec<String> {
        vec![format!("{{{}}}", self.name)]
    }
}

/// Writes the version, then the value.
pub(crate) fn encode<V, F: Format<V>>(traits: Traits, value: &V) -> Result<Bytes, EncodeError> {
    let mut buffer = vec![traits.version];
    F::encode(value, &mut buffer)?;
    Ok(buffer.into())
}

/// Reads a value of this version.
pub(crate) fn decode<V, F: Format<V>>(traits: Traits, bytes: Bytes) -> Result<V, DecodeError> {
    match bytes.first() {
        Some(version) if *version == traits.version => F::decode(bytes.slice(1..)),
        Some(version) => Err(DecodeError(format!(
            "it has version {version}, this program has {}",
            traits.version
        ))),
        None => Err(DecodeError("it is empty".to_owned())),
    }
}

// By hand, since a derived impl would ask the same of the types that are only named.
impl<I: ?Sized, V, F> Clone for Entity<I, V, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<I: ?Sized, V, F> Copy for Entity<I, V, F> {}

impl<I: ?Sized, V, F> fmt::Debug for Entity<I, V, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Entity").field(&self.name).finish()
    }
}

impl<P: ?Sized, V, F> Clone for Collection<P, V, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P: ?Sized, V, F> Copy for Collection<P, V, F> {}

impl<P: ?Sized, V, F> fmt::Debug for Collection<P, V, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Collection").field(&self.name).finish()
    }
}

impl<V, F> Clone for Key<V, F> {
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            traits: self.traits,
            of: PhantomData,
        }
    }
}

impl<V, F> fmt::Debug for Key<V, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Key").field(&self.name.as_str()).finish()
    }
}

impl<V, F> fmt::Display for Key<V, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

impl<V, F> Clone for CollectionKey<V, F> {
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            traits: self.traits,
            of: PhantomData,
        }
    }
}

impl<V, F> fmt::Debug for CollectionKey<V, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CollectionKey")
            .field(&self.name.as_str())
            .finish()
    }
}

impl<V, F> fmt::Display for CollectionKey<V, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::format::AsBytes;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Account {
        owner: String,
        cents: i64,
        notes: Option<Vec<String>>,
    }

    fn account() -> impl Strategy<Value = Account> {
        let notes = proptest::option::of(proptest::collection::vec(any::<String>(), 0..4));
        (any::<String>(), any::<i64>(), notes).prop_map(|(owner, cents, notes)| Account {
            owner,
            cents,
            notes,
        })
    }

    fn of_version(version: u8) -> Traits {
        Traits {
            version,
            ..Traits::NEW
        }
    }

    /// Decodes, and checks that nothing but this version is taken.
    fn decode_garbage<V: fmt::Debug, F: Format<V>>(version: u8, bytes: &Bytes) {
        if decode::<V, F>(of_version(version), bytes.clone()).is_ok() {
            assert_eq!(bytes.first(), Some(&version));
        }
    }

    proptest! {
        #[test]
        fn a_value_comes_back_as_it_was_and_in_no_other_version(
            value in account(),
            version: u8,
            other: u8,
        ) {
            let bytes = encode::<_, AsJson>(of_version(version), &value).unwrap();
            let decoded = decode::<Account, AsJson>(of_version(other), bytes);
            if version == other {
                prop_assert_eq!(decoded.unwrap(), value);
            } else {
                let error = decoded.unwrap_err().to_string();
                prop_assert!(error.contains(&format!("version {version}")), "{}", error);
            }
        }

        #[test]
        fn garbage_is_refused_without_a_panic(version: u8, bytes: Vec<u8>) {
            let behind_the_version = [&[version], &bytes[..]].concat();
            for bytes in [bytes, behind_the_version].map(Bytes::from) {
                decode_garbage::<Account, AsJson>(version, &bytes);
                decode_garbage::<u64, AsJson>(version, &bytes);
                decode_garbage::<String, AsJson>(version, &bytes);
                decode_garbage::<Bytes, AsBytes>(version, &bytes);
            }
        }

        #[test]
        fn ids_keep_apart_and_move_no_key(one: String, other: String) {
            const NAME: Entity<str, u64> = Entity::new("name");
            const LIST: Collection<str, u64> = Collection::new("list");
            let key = NAME.key(one.as_str()).to_string();
            let special = ['{', '}', '*', '?', '[', ']', '\\', ' '];
            prop_assert!(!key.contains(special) && key.is_ascii(), "{}", key);
            prop_assert_eq!(one == other, key == NAME.key(other.as_str()).to_string());
            let list = LIST.of(one.as_str()).to_string();
            prop_assert_eq!(list.strip_prefix("list:"), key.strip_prefix("name:"));
        }
    }

    #[test]
    fn usual_ids_are_left_as_they_are() {
        const NAME: Entity<str, u64> = Entity::new("name");
        for id in [
            "550e8400-e29b-41d4-a716-446655440001",
            "7",
            "me@home.org",
            "a:b/c",
        ] {
            assert_eq!(NAME.key(id).to_string(), format!("name:{id}"));
        }
    }

    #[test]
    fn decoding_copies_no_bytes() {
        let stored = Bytes::from_static(b"\x01value");
        let value = decode::<Bytes, AsBytes>(of_version(1), stored.clone()).unwrap();
        assert_eq!(value.as_ptr(), stored[1..].as_ptr());
    }
}
