//! Errors by what the caller should do.

use std::sync::Arc;
use std::time::Duration;

use writethrough_protocol::Epoch;

use crate::key::MAX_KEYS;
use crate::runtime::NoRuntime;
use crate::settings::InvalidSettings;

/// Why the engine could not be started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The settings contradict what the protocol's safety rests on.
    #[error(transparent)]
    Settings(#[from] InvalidSettings),
    /// The namespace is not allowed.
    #[error(transparent)]
    Namespace(#[from] InvalidNamespace),
    /// It was not called inside of a runtime.
    #[error(transparent)]
    NoRuntime(#[from] NoRuntime),
}

/// The namespace has signs that would make keys ambiguous, or none, or too many. Carries it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the namespace {0:?} is not allowed: use 1 to 64 letters, digits, `_`, `-` and `.`")]
pub struct InvalidNamespace(pub String);

/// Why a write was not made, past what the operation itself refuses. Nothing was written.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// The fence (the database's epoch row) has not been reachable, so no epoch is active.
    #[error("the epoch could not be read or changed in time")]
    Fence,
    /// The fence cannot be used until somebody mends it: its row or its schema is gone, a permission is
    /// missing, or the database cannot guard writes. Carries the reason.
    #[error("the epoch row cannot be used: {0}")]
    FenceBroken(String),
    /// Writes of the same value, or of the same collection, took all turns for as long as this one could
    /// wait ([`crate::Settings::max_writers`]). Nothing was written.
    #[error("too many writes of the same value or collection are under way")]
    Busy,
    /// The write names more than [`crate::MAX_KEYS`] values and collections.
    #[error("a write may change at most {} values and collections", MAX_KEYS)]
    TooManyKeys,
    /// The store gave no connection on which a transaction could begin.
    #[error("there is no connection to the store")]
    NoConnection(#[source] NoConnection),
    /// The operation had not committed within [`crate::Settings::write_timeout`]. Its transaction is
    /// given up.
    #[error("the operation took too long")]
    TimedOut,
    /// The operation answered with the commit of another transaction than its own.
    #[error("the operation did not commit its transaction")]
    NotCommitted,
    /// A background task of the engine has ended, with its runtime or by a panic; see
    /// [`crate::Status::ended`].
    #[error("the engine's background tasks have ended")]
    TaskEnded,
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    ShuttingDown,
}

/// Why the store gave no connection, in the words of its driver.
#[derive(Debug, Clone, thiserror::Error)]
#[error(transparent)]
pub struct NoConnection(Arc<dyn std::error::Error + Send + Sync>);

impl NoConnection {
    #[cfg(any(feature = "postgres", feature = "sqlx"))]
    pub(crate) fn new(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self(Arc::new(error))
    }
}

/// How a read failed. Trying again later is always safe.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError<E> {
    /// The load failed: the caller's own error.
    #[error("the load failed: {0}")]
    Load(E),
    /// As many loads as are allowed are under way in this process ([`crate::Settings::max_loads`]).
    #[error("too many loads are under way")]
    Overloaded,
    /// The load, or the loads of others that this read waited for, took longer than
    /// [`crate::Settings::load_timeout`].
    #[error("the load took too long")]
    TimedOut,
    /// The loads of others that this read waited for failed, twice; they have reported why.
    #[error("the shared loads failed")]
    SharedLoadFailed,
}

/// How a write failed, by what the caller should do.
///
/// `E` is the caller's own error and need not be a [`std::error::Error`], so its words are part of the
/// message, and it is no source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError<E> {
    /// The operation refused, and had no effect: the caller's own error. (Of
    /// [`crate::writing::Write::statement`] see there.)
    #[error("the write was refused: {0}")]
    Rejected(E),
    /// Nothing was written; trying again later is safe.
    #[error("nothing was written: {0}")]
    Unavailable(Unavailable),
    /// It may or may not have been written, now or a little later; read to find out.
    #[error("the outcome of the write is unknown: {0}")]
    Indeterminate(Indeterminate<E>),
}

/// Why it is not known whether a write was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Indeterminate<E> {
    /// The store had not answered within [`crate::Settings::write_timeout`].
    #[error("the store did not answer in time")]
    TimedOut,
    /// The store's answer says nothing about the effect, as when the connection was lost during the
    /// commit: the caller's own error.
    #[error("{0}")]
    Store(E),
    /// The operation panicked, or the runtime of the write ended.
    #[error("the write was ended half-way, by a panic or with its runtime")]
    Abandoned,
    /// The write was made. But its epoch had to end, and the next one was not active by
    /// [`crate::Settings::write_deadline`], so a read may still return what was before.
    #[error("it was made, and the cache could not be given up in time")]
    NotSettled,
}

/// What an operation reports when it did not commit.
#[derive(Debug)]
#[non_exhaustive]
pub enum OpError<E> {
    /// The guard refused: the epoch has changed and nothing was written. The engine starts again.
    Fenced,
    /// Nothing was written, for a reason of the caller's.
    Rejected(E),
    /// Nothing was written, for a reason of the store's.
    Unavailable(Unavailable),
    /// The connection was lost after the statement was sent.
    Unknown(E),
    /// There was no answer in time after the statement was sent.
    TimedOut,
}

impl<E> OpError<E> {
    /// The same outcome with another error.
    pub fn map<F>(self, change: impl FnOnce(E) -> F) -> OpError<F> {
        match self {
            Self::Fenced => OpError::Fenced,
            Self::Rejected(error) => OpError::Rejected(change(error)),
            Self::Unavailable(why) => OpError::Unavailable(why),
            Self::Unknown(error) => OpError::Unknown(change(error)),
            Self::TimedOut => OpError::TimedOut,
        }
    }
}

/// An error with its causes, in one line.
#[cfg(any(feature = "postgres", feature = "sqlx"))]
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// A failed cache command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CacheError {
    /// No reply within the command's deadline.
    #[error("no reply within {0:?}")]
    Timeout(Duration),
    /// The connection is gone, or the server is not one to talk to (a replica, still loading).
    #[error("connection failed: {0}")]
    Connection(String),
    /// The server refused the command or the stored bytes are not ours.
    #[error("command failed: {0}")]
    Command(String),
}

/// A failed operation on the fence, with the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FenceError {
    /// It is away or busy: trying again may help.
    #[error("fence: {0}")]
    Away(String),
    /// It answers, and cannot be used until somebody mends it: a write must not wait for it.
    #[error("fence: {0}")]
    Broken(String),
}

/// The epoch moved on before the write began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("epoch {0} is over")]
pub struct Fenced(pub Epoch);
