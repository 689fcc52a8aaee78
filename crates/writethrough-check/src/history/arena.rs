//! Memory for long histories: lists that grow without moving, and texts that are stored once.
//!
//! Nothing here knows what it stores.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::ops::Index;
use std::sync::Arc;

/// A list that never moves its items: adding one takes the same short time however long the list
/// is.
///
/// All processes, and the links of a cluster, share the threads on which a history is recorded. A
/// `Vec` of some million entries that moves to make room would hold them all up for seconds.
#[derive(Clone, Debug)]
pub struct Chunks<T>(Vec<Vec<T>>);

/// Items in a chunk.
const CHUNK: usize = 1 << 14;

impl<T> Default for Chunks<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Chunks<T> {
    pub(crate) fn push(&mut self, item: T) {
        match self.0.last_mut() {
            Some(last) if last.len() < CHUNK => last.push(item),
            _ => self.0.push(vec![item]),
        }
    }

    /// Returns the number of items.
    #[must_use]
    pub fn len(&self) -> usize {
        let last = self.0.last().map_or(0, Vec::len);
        self.0.len().saturating_sub(1) * CHUNK + last
    }

    /// Says whether there is no item.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Iterates over the items in the order in which they were added.
    pub fn iter(&self) -> std::iter::Flatten<std::slice::Iter<'_, Vec<T>>> {
        self.0.iter().flatten()
    }
}

impl<T> Index<usize> for Chunks<T> {
    type Output = T;

    fn index(&self, index: usize) -> &T {
        &self.0[index / CHUNK][index % CHUNK]
    }
}

impl<'a, T> IntoIterator for &'a Chunks<T> {
    type Item = &'a T;
    type IntoIter = std::iter::Flatten<std::slice::Iter<'a, Vec<T>>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Number of maps that share the names, so that it takes little time when one of them grows.
const MAPS: usize = 32;

/// Texts, each stored once and known by a number.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    hasher: RandomState,
    numbers: [HashMap<Arc<str>, u32>; MAPS],
    names: Chunks<Arc<str>>,
}

impl Names {
    /// Returns the number of a text, which is stored if it is new.
    pub(crate) fn intern(&mut self, name: &str) -> u32 {
        let numbers = &mut self.numbers[self.hasher.hash_one(name) as usize % MAPS];
        if let Some(&number) = numbers.get(name) {
            return number;
        }
        let number = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
        let name: Arc<str> = name.into();
        self.names.push(name.clone());
        numbers.insert(name, number);
        number
    }
    /// Returns the text with this number.
    pub(crate) fn get(&self, number: u32) -> &str {
        &self.names[number as usize]
    }

    /// Returns how many texts there are.
    pub(crate) fn len(&self) -> usize {
        self.names.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_keep_order_and_positions() {
        let mut chunks = Chunks::default();
        assert!(chunks.is_empty());
        let count = 2 * CHUNK + 3;
        for number in 0..count {
            assert_eq!(chunks.len(), number);
            chunks.push(number);
        }
        assert!(chunks.iter().copied().eq(0..count));
        assert!((0..count).all(|number| chunks[number] == number));
        let first = &raw const chunks[0];
        (0..CHUNK).for_each(|_| chunks.push(0));
        assert_eq!(first, &raw const chunks[0], "it has moved");
    }
}
