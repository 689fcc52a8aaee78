//! Typed names: an entity names values of one type, a collection names the lists of one type.
//!
//! A name is a constant, checked when the program is compiled:
//!
//! ```
//! use std::time::Duration;
//! use writethrough::entity::{Collection, Entity};
//!
//! const PRICE: Entity<str, u64> = Entity::new("price").version(2).ttl(Duration::from_secs(60));
//! const PRICES_OF: Collection<u32, Vec<u64>> = Collection::new("prices_of");
//!
//! assert_eq!(PRICE.key("tea").to_string(), "price:tea");
//! assert_eq!(PRICES_OF.of(7).to_string(), "prices_of:7");
//! ```
//!
//! ```compile_fail
//! use writethrough::entity::Entity;
//!
//! const NAMELESS: Entity<str, u64> = Entity::new("");
//! ```

use std::borrow::Borrow;
use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use bytes::Bytes;

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

/// Names the values of one kind: `I` is the type of their ids, `V` that of the values, `F` their format.
pub struct Entity<I: ?Sized, V, F = AsJson> {
    name: &'static str,
    traits: Traits,
    of: PhantomData<(fn(&I), fn() -> (V, F))>,
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
    #[must_use]
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.traits.ttl = Some(ttl);
        self
    }

    /// Sets how long "there is none" is kept; without it the settings of the engine say.
    #[must_use]
    pub const fn negative_ttl(mut self, ttl: Duration) -> Self {
        self.traits.negative_ttl = Some(ttl);
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
            name: key::Key::new(self.name, id.borrow()),
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
    of: PhantomData<(fn(&P), fn() -> (V, F))>,
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
    #[must_use]
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.traits.ttl = Some(ttl);
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
            name: key::Collection::new(self.name),
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
            name: key::Collection::new(&format!("{}:{}", self.name, parameter.borrow())),
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
