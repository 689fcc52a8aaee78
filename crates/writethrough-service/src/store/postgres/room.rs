//! What room the server leaves: a role, a database, a server or a pooler lets in a limited number of
//! connections, which may be fewer than were asked for.
//!
//! The connections of the fence and of the probe come first: without them a node has no cache.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Error;
use tokio_postgres::error::SqlState;

/// How long the room that was made has time to be there.
const MAKING: Duration = Duration::from_millis(500);
/// What to do about it.
pub(super) const MAKE_ROOM: &str = "lower --database-pool-size (DATABASE_POOL_SIZE) of the nodes, or raise \
                                    the limit of the role, the database or the server";

/// Whether a connection was refused only because there are too many.
pub(super) fn is_full(error: &Error) -> bool {
    let Some(answer) = error.as_db_error() else {
        return false;
    };
    // PgBouncer and Supavisor have no code of their own for it.
    let of_a_pooler = [
        "no more connections allowed",
        "max client connections reached",
    ];
    let text = answer.message().to_ascii_lowercase();
    *answer.code() == SqlState::TOO_MANY_CONNECTIONS
        || of_a_pooler.iter().any(|words| text.contains(words))
}

/// What is known of the server's room; one for all connections to it.
#[derive(Default)]
pub(super) struct Room {
    full: Mutex<Option<Full>>,
    /// When room was last made.
    made: Mutex<Option<Instant>>,
    giver: OnceLock<Giver>,
}

/// Gives one connection up, for this reason.
type Giver = Box<dyn Fn(&str) + Send + Sync>;

struct Full {
    reason: String,
    /// When the server was last asked, or refused.
    asked: Instant,
    /// Whether it has refused since it was asked.
    refused: bool,
}

/// Whether to ask the server for more connections.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ask {
    No,
    /// For one more.
    One,
    /// It has refused none for a while: there is room for all.
    All,
}

impl Room {
    fn full(&self) -> MutexGuard<'_, Option<Full>> {
        self.full.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets what gives one connection up, so that there is room for another.
    pub(super) fn set_giver(&self, giver: impl Fn(&str) + Send + Sync + 'static) {
        let _ = self.giver.set(Box::new(giver));
    }

    /// Makes room for a connection that the server has refused. It takes a moment until there is some, in
    /// which the next attempts are refused, too.
    pub(super) fn make(&self, reason: &str) {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.is_some_and(|at| at.elapsed() < MAKING) {
            return;
        }
        *made = Some(Instant::now());
        if let Some(give_one_up) = self.giver.get() {
            give_one_up(reason);
        }
    }

    /// The server has refused a connection; `places` of the `wanted` ones are left.
    pub(super) fn refused(&self, error: &str, places: usize, wanted: usize) {
        let reason = format!(
            "Postgres refuses more connections ({error}): this node goes on with {places} of {wanted}, \
             for which requests wait; {MAKE_ROOM}"
        );
        let mut full = self.full();
        if full.is_none() {
            tracing::warn!("{reason}");
        }
        *full = Some(Full {
            reason,
            asked: Instant::now(),
            refused: true,
        });
    }

    /// Whether to ask for more, `pause` after the last time that this was in vain, and at once after the
    /// last time that it was not: `all_open` says that every connection that may be there is there.
    pub(super) fn ask(&self, pause: Duration, all_open: bool) -> Ask {
        let mut full = self.full();
        let Some(state) = full.as_mut() else {
            return Ask::No;
        };
        if state.asked.elapsed() < pause {
            return if all_open && !state.refused {
                Ask::One
            } else {
                Ask::No
            };
        }
        if state.refused {
            (state.asked, state.refused) = (Instant::now(), false);
            return Ask::One;
        }
        *full = None;
        tracing::info!("Postgres refuses no connections any more");
        Ask::All
    }

    /// Why there are fewer connections than were asked for, while it is so.
    pub(super) fn reason(&self) -> Option<String> {
        self.full().as_ref().map(|full| full.reason.clone())
    }
}
