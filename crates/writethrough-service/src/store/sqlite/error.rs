//! Why a file cannot be used as a database.

use std::path::PathBuf;

/// Why the file cannot be used. Each is one line.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error("{0} is in use by another process; stop it or choose another file")]
    InUse(PathBuf),
    /// It cannot be made or opened.
    #[error("{0} cannot be opened: {1}")]
    Io(PathBuf, String),
    /// The process ended meanwhile.
    #[error("the process stops")]
    Stopped,
    /// It is not a database of this program, or of a newer one.
    #[error("{0} cannot be used: {1}")]
    Unusable(PathBuf, String),
}
