//! What stands in the way at start: what may go away by itself is waited for, what only somebody can
//! mend ends the start.

use std::error::Error as StdError;
use std::fmt;
use std::io;

use tokio_postgres::Error;
use tokio_postgres::error::SqlState;
use writethrough::migration::MigrateError;

use super::fitness::Unfit;
use super::room::{MAKE_ROOM, is_full};
use crate::causes::chain;

/// Why the database is not ready. Displays as one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    reason: String,
    lasts: Lasts,
}

/// Whether it goes away by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasts {
    /// It may.
    AWhile,
    /// It may at first: a name that is not known may be one that is not known yet.
    UnlessNew,
    /// It does not.
    ForGood,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl Obstacle {
    /// One that may go away by itself.
    pub fn passing(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            lasts: Lasts::AWhile,
        }
    }

    /// Whether it goes away by itself.
    #[must_use]
    pub fn lasts(&self) -> Lasts {
        self.lasts
    }

    fn with_remedy(error: &(dyn StdError + 'static), lasts: Lasts, remedy: &str) -> Self {
        Self {
            reason: format!("{}; {remedy}", chain(error)),
            lasts,
        }
    }
}

impl From<&Error> for Obstacle {
    /// A connection that could not be made.
    fn from(error: &Error) -> Self {
        let for_good = |remedy| Self::with_remedy(error, Lasts::ForGood, remedy);
        match error.code().map(SqlState::code) {
            Some("3D000") => for_good("use the name of a database that exists, or create it"),
            Some("28P01") => for_good("use the user and the password that the server knows"),
            Some("28000") => for_good(
                "use a user that exists and may connect from here, or allow it in pg_hba.conf",
            ),
            Some("42501") => for_good("GRANT CONNECT ON DATABASE to the user"),
            None if is_unknown_host(error) => Self::with_remedy(
                error,
                Lasts::UnlessNew,
                "use a host that this machine can find",
            ),
            _ if is_full(error) => Self::with_remedy(error, Lasts::AWhile, MAKE_ROOM),
            _ => Self::passing(chain(error)),
        }
    }
}

impl From<Unfit> for Obstacle {
    fn from(unfit: Unfit) -> Self {
        let lasts = match unfit {
            Unfit::StatementTimeout(_) | Unfit::Isolation(_) | Unfit::Encoding(_) => Lasts::ForGood,
            Unfit::Standby | Unfit::Unread(_) => Lasts::AWhile,
        };
        Self {
            reason: unfit.to_string(),
            lasts,
        }
    }
}

impl From<MigrateError<Error>> for Obstacle {
    fn from(error: MigrateError<Error>) -> Self {
        if !error.needs_mending() {
            return Self::passing(chain(&error));
        }
        let for_good = |remedy| Self::with_remedy(&error, Lasts::ForGood, remedy);
        match error.code() {
            Some("42501") => for_good(
                "use a role that may create a schema in the database and tables in its search_path, or \
                 that owns what is there (GRANT CREATE)",
            ),
            // A table, a schema, a function or another object of that name.
            Some("42P07" | "42P06" | "42723" | "42710") => for_good(
                "the name is taken by something that is not this service's: use a database of its own, or \
                 another schema of this one (`options=-csearch_path%3DSCHEMA` in the URL)",
            ),
            Some(_) => for_good(
                "what is there is not what this service has made: use a database of its own",
            ),
            None => Self {
                reason: chain(&error),
                lasts: Lasts::ForGood,
            },
        }
    }
}

/// Whether the name of a host was looked up and is not known, as against one that could not be looked up.
fn is_unknown_host(error: &Error) -> bool {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return says_unknown_host(&error.to_string());
        }
        cause = error.source();
    }
    false
}

/// There is no code: the system's text is all that is left of it.
fn says_unknown_host(text: &str) -> bool {
    let passing = ["emporary failure", "ry again", "ystem error", "emory"];
    text.starts_with("failed to lookup address") && !passing.iter().any(|word| text.contains(word))
}

/// Whether an error goes away by itself.
pub(super) fn lasts(error: &Error) -> Lasts {
    Obstacle::from(error).lasts
}

/// The error that says more about a set of hosts: one that may go away keeps hope for all.
pub(super) fn more_hopeful(one: Option<Error>, other: Error) -> Error {
    match one {
        Some(one) if lasts(&one) == Lasts::AWhile => one,
        _ => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_unknown_is_told_from_one_that_could_not_be_looked_up() {
        // The texts of glibc and of musl.
        for (text, unknown) in [
            ("Name or service not known", true),
            ("No address associated with hostname", true),
            ("Name does not resolve", true),
            ("Temporary failure in name resolution", false),
            ("Try again", false),
        ] {
            let text = format!("failed to lookup address information: {text}");
            assert_eq!(says_unknown_host(&text), unknown, "{text}");
        }
        assert!(!says_unknown_host("Connection refused (os error 111)"));
    }
}
