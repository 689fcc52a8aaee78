//! What can go wrong while a testbed is built or used.

use std::io;
use std::time::Duration;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A program that the testbed needs is not installed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the program `{program}` was not found: {remedy}")]
pub struct Missing {
    /// The name of the program.
    pub program: String,
    /// What to do about it, for example which Debian package to install.
    pub remedy: String,
}

/// A testbed could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A program is not installed: install it.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// The operating system refused something.
    #[error("could not {action}: {source}")]
    Io {
        /// What was attempted, as a verb and its object.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A fact did not come true within its bound.
    #[error("waited {bound:?} in vain for {fact}{log}")]
    TimedOut {
        /// The fact that was waited for.
        fact: String,
        /// How long it was waited for.
        bound: Duration,
        /// The last lines of the log of the process that was waited for, or nothing.
        log: String,
    },
    /// A program ended although it should have gone on, or ended with a failure.
    #[error("{program} ended ({status}){log}")]
    Ended {
        /// The program, and which one of its kind.
        program: String,
        /// Its exit status, in words.
        status: String,
        /// The last lines of its log.
        log: String,
    },
    /// A server answered a command with an error.
    #[error("{server} refused `{command}`: {answer}")]
    Refused {
        /// Which server.
        server: String,
        /// The command that it refused.
        command: String,
        /// Its words.
        answer: String,
    },
    /// The call does not fit the state of the testbed, for example a second start. A mistake of the caller.
    #[error("{0}")]
    Misuse(String),
}

impl Error {
    /// Makes a converter for `map_err` that says what was attempted.
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }
}
