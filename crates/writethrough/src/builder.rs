//! How an engine is put together: its cache, its fence, its settings, the namespace of its keys.

use std::sync::Arc;

use crate::cache::Cache;
use crate::error::{InvalidNamespace, StartError};
use crate::fence::Fence;
use crate::settings::Settings;
use crate::write_through::WriteThrough;

/// Puts an engine together; [`WriteThrough::builder`] makes it.
#[must_use = "nothing is started before `start` is called"]
pub struct Builder {
    cache: Arc<dyn Cache>,
    fence: Arc<dyn Fence>,
    settings: Settings,
    namespace: Option<String>,
}

impl WriteThrough {
    /// Returns a builder of an engine that keeps values in `cache` and its epoch in `fence`. Either may
    /// be shared, in an [`Arc`].
    pub fn builder(cache: impl Cache, fence: impl Fence) -> Builder {
        Builder {
            cache: Arc::new(cache),
            fence: Arc::new(fence),
            settings: Settings::default(),
            namespace: None,
        }
    }
}

impl Builder {
    /// Sets the settings, in place of the default ones.
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// Sets the namespace: every key begins with it, as in `shop/price:tea`. Services that share one
    /// cache and one database each need their own; without one the keys begin with the names of their
    /// entities. It has letters, digits, `_`, `-` and `.`, 64 of them at most.
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = Some(namespace.into());
        self
    }

    /// Starts the engine: from here on it keeps its view of the epoch current. Returns at once,
    /// whether or not the cache or the fence can be reached; until both are, reads go to the store
    /// and writes wait for the fence. [`WriteThrough::ready`] waits for them. Must be called inside of a
    /// tokio runtime, in which the engine then lives: what that runtime must be is said in [`crate`].
    ///
    /// # Errors
    ///
    /// [`StartError`] when the settings contradict what the protocol's safety rests on, the namespace is
    /// not allowed, or there is no runtime.
    pub fn start(self) -> Result<WriteThrough, StartError> {
        let prefix = match self.namespace {
            None => String::new(),
            Some(namespace) => checked(namespace)? + "/",
        };
        WriteThrough::start(self.settings, prefix, self.cache, self.fence)
    }
}

/// The most letters of a namespace.
const MAX_NAMESPACE: usize = 64;

fn checked(namespace: String) -> Result<String, InvalidNamespace> {
    let allowed = |letter: u8| letter.is_ascii_alphanumeric() || b"_-.".contains(&letter);
    if (1..=MAX_NAMESPACE).contains(&namespace.len()) && namespace.bytes().all(allowed) {
        Ok(namespace)
    } else {
        Err(InvalidNamespace(namespace))
    }
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("settings", &self.settings)
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_cannot_be_taken_for_another_part_of_a_key() {
        for allowed in ["shop", "shop-2.test_A", &"x".repeat(64)] {
            assert_eq!(checked(allowed.to_owned()).unwrap(), allowed);
        }
        for wrong in [
            "",
            "a/b",
            "a:b",
            "{a}",
            "a*",
            "a b",
            "\u{e4}",
            &"x".repeat(65),
        ] {
            let error = checked(wrong.to_owned()).unwrap_err().to_string();
            assert!(error.contains(&format!("{wrong:?}")), "{error}");
        }
    }
}
