//! A setting that is wrong, as one line.

use super::setting;
use super::value::{form, shown};

/// A setting with a value that is not allowed. Displays as one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{setting} is {value}, which is not allowed: {allowed}")]
pub struct ConfigError {
    /// The flag and its variable.
    pub setting: &'static str,
    /// The value in quotes, or its form when it may hold a secret.
    pub value: String,
    /// What is allowed.
    pub allowed: String,
}

impl ConfigError {
    pub(crate) fn new(setting: &'static str, value: &str, allowed: impl Into<String>) -> Self {
        Self {
            setting,
            value: if setting::SECRET.contains(&setting) {
                form(value)
            } else {
                shown(value)
            },
            allowed: allowed.into(),
        }
    }
}
