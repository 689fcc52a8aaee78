//! The texts with which a transaction is begun and ended, the same for each driver of Postgres. They have
//! no parameters, so that all of one is a single message.

use super::Begin;

/// The setting by which the end of a transaction is known to be that of the one which was begun.
pub(crate) const MARK: &str = "begun";

/// Ends the transaction. In one that has failed, the first statement fails too, so that the commit is
/// not taken for one.
pub(crate) const END: &str = "SELECT current_setting('writethrough.write', true); COMMIT";

/// Begins a transaction with its bounds and its guard.
pub(crate) fn begin(begin: Begin) -> String {
    let guard = match begin.epoch {
        Some(epoch) => format!("; SELECT writethrough.guard({epoch})"),
        None => String::new(),
    };
    let bound = begin.bound.as_millis();
    // At most the bound, and less where the session has less; 0 is none.
    let limit = |name| {
        format!(
            "set_config('{name}', least({bound}, nullif(extract(epoch FROM \
             current_setting('{name}')::interval) * 1000, 0))::bigint::text, true)"
        )
    };
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
         SELECT set_config('writethrough.write', '{MARK}', true), {}, {}{guard}",
        limit("statement_timeout"),
        limit("idle_in_transaction_session_timeout"),
    )
}
