//! What one write changes, as a value whose type says which values may be cached.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;

use crate::entity::{CollectionKey, Key, Traits, Whole};
use crate::format::{AsJson, Format};
use crate::key::{self, WriteSet};
use crate::write::{self, NewValue};
use crate::writing::Commit;

/// What a write changes: a key, a collection key, all of an entity or a collection, a tuple or a `Vec` of
/// them.
///
/// A write hands the operation one [`Slot`] for each key of its set, in the same shape. Only the library
/// makes slots, and only a slot can be given a value to cache, so a value under a key that was not named
/// in the set does not compile.
pub trait Changes {
    /// What the operation gets: a slot for each key, in the same shape.
    type Slots: Clone + Send + 'static;

    /// Adds the names to the set of the write and returns the slots.
    #[doc(hidden)]
    fn announce(self, set: &mut WriteSet) -> Self::Slots;
}

/// A place in the cache that the write has announced and may leave a value in.
pub struct Slot<V, F = AsJson> {
    pub(crate) name: key::Key,
    pub(crate) traits: Traits,
    of: PhantomData<fn() -> (V, F)>,
}

impl<V, F> Clone for Slot<V, F> {
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            traits: self.traits,
            of: PhantomData,
        }
    }
}

impl<V, F> fmt::Debug for Slot<V, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Slot").field(&self.name.as_str()).finish()
    }
}

/// The values that one attempt of a write leaves in the cache.
#[derive(Debug, Default)]
pub(crate) struct Values(HashMap<key::Key, NewValue>);

impl Values {
    pub(crate) fn cache<V, F: Format<V>>(&mut self, slot: &Slot<V, F>, value: &V) {
        let new = NewValue::of::<V, F>(value, slot.traits);
        self.0.insert(slot.name.clone(), new);
    }

    pub(crate) fn absent<V, F>(&mut self, slot: &Slot<V, F>) {
        let new = NewValue {
            payload: Some(None),
            ttl: slot.traits.negative_ttl,
        };
        self.0.insert(slot.name.clone(), new);
    }

    pub(crate) fn commit<T>(self, output: T) -> Commit<T> {
        Commit(write::Commit {
            output,
            values: self.0,
        })
    }
}

impl<V: 'static, F: 'static> Changes for Key<V, F> {
    type Slots = Slot<V, F>;

    fn announce(self, set: &mut WriteSet) -> Self::Slots {
        set.keys.push(self.name.clone());
        Slot {
            name: self.name,
            traits: self.traits,
            of: PhantomData,
        }
    }
}

impl<V: 'static, F: 'static> Changes for &Key<V, F> {
    type Slots = Slot<V, F>;

    fn announce(self, set: &mut WriteSet) -> Self::Slots {
        self.clone().announce(set)
    }
}

impl<V, F> Changes for CollectionKey<V, F> {
    type Slots = ();

    fn announce(self, set: &mut WriteSet) -> Self::Slots {
        set.collections.push(self.name);
    }
}

impl<V, F> Changes for &CollectionKey<V, F> {
    type Slots = ();

    fn announce(self, set: &mut WriteSet) -> Self::Slots {
        set.collections.push(self.name.clone());
    }
}

impl Changes for Whole {
    type Slots = ();

    fn announce(self, set: &mut WriteSet) -> Self::Slots {
        set.whole = Some(self.name);
    }
}

impl<C: Changes> Changes for Vec<C> {
    type Slots = Vec<C::Slots>;

    fn announce(self, set: &mut WriteSet) -> Self::Slots {
        self.into_iter().map(|each| each.announce(set)).collect()
    }
}

impl Changes for () {
    type Slots = ();

    fn announce(self, _set: &mut WriteSet) -> Self::Slots {}
}

macro_rules! tuples {
    ($($name:ident)+) => {
        impl<$($name: Changes),+> Changes for ($($name,)+) {
            type Slots = ($($name::Slots,)+);

            fn announce(self, set: &mut WriteSet) -> Self::Slots {
                #[allow(non_snake_case, reason = "named by the types")]
                let ($($name,)+) = self;
                ($($name.announce(set),)+)
            }
        }
    };
}

tuples!(A B);
tuples!(A B C);
tuples!(A B C D);
tuples!(A B C D E);
tuples!(A B C D E G);
