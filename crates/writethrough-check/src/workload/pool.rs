//! The items that the processes know of.

use std::collections::VecDeque;
use std::sync::Arc;

/// The items that the processes know of.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    pub(crate) living: Vec<Arc<str>>,
    /// Deleted a moment ago, or meant to be.
    pub(crate) deleted: VecDeque<Arc<str>>,
}

impl Pool {
    /// Chooses mostly one of the first items, and a deleted one with probability `deleted`.
    pub(crate) fn pick(&self, random: &mut fastrand::Rng, deleted: f64) -> Option<Arc<str>> {
        if !self.deleted.is_empty() && random.f64() < deleted {
            return Some(self.deleted[random.usize(..self.deleted.len())].clone());
        }
        let skewed = random.f64().powi(2);
        let at = (skewed * self.living.len() as f64) as usize;
        self.living.get(at).cloned()
    }

    /// Takes any item from the living ones, and remembers the last `keep` that were taken.
    pub(crate) fn delete(&mut self, random: &mut fastrand::Rng, keep: usize) -> Option<Arc<str>> {
        if self.living.is_empty() {
            return None;
        }
        let key = self.living.swap_remove(random.usize(..self.living.len()));
        self.deleted.push_back(key.clone());
        if self.deleted.len() > keep {
            self.deleted.pop_front();
        }
        Some(key)
    }
}
