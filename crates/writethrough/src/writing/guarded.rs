//! Writes to a store that the library has no driver for: the operation takes care of the guard.

use std::ops::Deref;

use super::set::{Changes, Slot, Values};
use super::{Commit, Write};
use crate::error::{OpError, WriteError};
use crate::fence::Guard;
use crate::format::Format;
use crate::key::WriteSet;
use crate::write::Written;

/// A guard together with the values that its write leaves in the cache.
#[derive(Debug)]
#[must_use = "a write is guarded only while this is held or is part of its transaction"]
pub struct Guarded {
    guard: Guard,
    values: Values,
}

impl Guarded {
    /// Returns a copy of the guard, for a store that must hold it elsewhere until the write has committed.
    pub fn guard(&self) -> Guard {
        self.guard.clone()
    }

    /// Caches the value that the write has left in the store.
    pub fn cache<V, F: Format<V>>(&mut self, slot: &Slot<V, F>, value: &V) {
        self.values.cache(slot, value);
    }

    /// Caches that there is no such value now, as after a delete.
    pub fn absent<V, F>(&mut self, slot: &Slot<V, F>) {
        self.values.absent(slot);
    }

    /// Makes the commit that the operation returns. The store must have committed before.
    pub fn commit<T>(self, output: T) -> Commit<T> {
        self.values.commit(output)
    }
}

impl Deref for Guarded {
    type Target = Guard;

    fn deref(&self) -> &Guard {
        &self.guard
    }
}

impl<C: Changes, X: Clone + Send + 'static> Write<'_, C, X> {
    /// Runs the write with an operation that writes to the store by itself, under the guard that it is
    /// given: [`Guard::parameter`] goes into its statement or its transaction where the database checks it.
    ///
    /// The operation must commit before it returns, and says by [`OpError`] what it knows when it did not.
    /// The value that is cached must be what it leaves behind.
    ///
    /// # Errors
    ///
    /// [`WriteError`].
    ///
    /// # Cancellation
    ///
    /// The write runs on a task of its own: dropping this future gives up its answer, not the write.
    ///
    /// # Consistency
    ///
    /// When this returns `Ok`, no read that starts afterwards, on any node, sees anything older. An
    /// operation that commits without having asked for [`Guard::parameter`] counts as unguarded
    /// ([`crate::Stats::unguarded_writes`]), and costs the whole cache each time.
    pub async fn guarded<T, E, Op, F>(self, mut op: Op) -> Result<Written<T>, WriteError<E>>
    where
        Op: FnMut(Guarded, C::Slots, X) -> F + Send + 'static,
        F: Future<Output = Result<Commit<T>, OpError<E>>> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        let mut set = WriteSet::default();
        let slots = self.changes.announce(&mut set);
        let context = self.context;
        let op = move |guard| {
            let values = Values::default();
            let run = op(Guarded { guard, values }, slots.clone(), context.clone());
            async move { run.await.map(|commit| commit.0) }
        };
        self.engine.engine.write(set, op).await
    }
}
