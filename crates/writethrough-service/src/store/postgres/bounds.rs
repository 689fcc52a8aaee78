//! How long what is asked of Postgres may take.

use std::time::Duration;

use writethrough::Settings;

/// The longest that the server works on one statement. The bound on this side is the same.
pub(super) const STATEMENT_TIMEOUT: Duration = Settings::WRITE_TIMEOUT;
/// The longest wait for a connection, made or free.
pub(super) const POOL_WAIT: Duration = Duration::from_secs(1);
