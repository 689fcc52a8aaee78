//! Waits until the cache is in use, and says why it is not.

use std::pin::pin;
use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::timeout;
use writethrough_protocol::Astray;

use crate::engine::Engine;
use crate::error::{CacheError, FenceError};
use crate::runtime;
use crate::supervisor;
use crate::write_through::WriteThrough;

/// Why the cache is not in use on this node. Reads go to the store meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotReady {
    /// The engine was shut down.
    #[error("the engine was shut down")]
    ShutDown,
    /// A background task of the engine has ended, with its runtime or by a panic.
    #[error("a background task of the engine has ended: {0}")]
    TaskEnded(&'static str),
    /// The epoch row cannot be used.
    #[error("the epoch row cannot be used")]
    Fence(#[source] FenceError),
    /// The epoch row can be read and not changed, so that no epoch with this cache can begin.
    #[error("the epoch row cannot be changed")]
    FenceRefusesChanges(#[source] FenceError),
    /// There is no verified connection to the cache. Carries the reason when the cache knows it.
    #[error("there is no verified connection to the cache")]
    Cache(#[source] Option<CacheError>),
    /// The epoch row is one of another history of the database, or an older one.
    #[error("the epoch row is not believed: {0:?}")]
    Astray(Astray),
    /// The epoch does not use the cache yet, or is observed until all nodes have seen it. Carries why
    /// this node gave the cache up last, if it did.
    #[error("the epoch does not use the cache yet{}", because(.0.as_deref()))]
    Epoch(Option<String>),
}

fn because(reason: Option<&str>) -> String {
    reason.map_or_else(String::new, |reason| format!("; it was given up: {reason}"))
}

impl WriteThrough {
    /// Waits until the cache is in use on this node, for `within` at most. Nothing needs it: before,
    /// reads come from the store. It is for programs that want to begin with a cache, and for tests.
    ///
    /// # Errors
    ///
    /// [`NotReady`] says why the cache is not in use: after `within`, or at once when the engine has
    /// ended.
    ///
    /// # Cancellation
    ///
    /// Harmless.
    pub async fn ready(&self, within: Duration) -> Result<(), NotReady> {
        let engine = &self.engine;
        let in_use = pin!(async {
            let mut changed = engine.changed.subscribe();
            let in_use = async {
                // Whatever lets the cache be used comes with a poll or a connection.
                while !supervisor::uses_cache(engine) && !engine.has_ended() {
                    if changed.changed().await.is_err() {
                        return;
                    }
                }
            };
            let _ = timeout(within, in_use).await;
        });
        runtime::within(&engine.runtime, in_use).await;
        match engine.has_ended() {
            false if supervisor::uses_cache(engine) => Ok(()),
            _ => Err(engine.not_ready()),
        }
    }
}

impl Engine {
    fn has_ended(&self) -> bool {
        *self.stopping.borrow() || self.ended.get().is_some()
    }

    fn not_ready(&self) -> NotReady {
        if let Some(task) = self.ended.get() {
            return NotReady::TaskEnded(task);
        }
        if *self.stopping.borrow() {
            return NotReady::ShutDown;
        }
        if let Some(error) = self.fence_error().clone() {
            return NotReady::Fence(error);
        }
        let (connected, astray) = {
            let view = self.view();
            (view.session.is_some(), view.node.astray())
        };
        if !connected {
            return NotReady::Cache(self.cache.trouble());
        }
        if let Some(astray) = astray {
            return NotReady::Astray(astray);
        }
        let refused = self.refused_change.lock();
        if let Some(error) = refused.unwrap_or_else(PoisonError::into_inner).clone() {
            return NotReady::FenceRefusesChanges(error);
        }
        let proposed = self.proposed.lock();
        let proposed = proposed.unwrap_or_else(PoisonError::into_inner);
        NotReady::Epoch(proposed.as_ref().map(|last| last.reason.clone()))
    }
}
