//! What the guarantee rests on, looked up on each new connection.
//!
//! The service asks for these settings when it connects, but a pooler in between may drop what is asked
//! for, and a role, a database or a parameter group may set something else.

use tokio::time::timeout;
use tokio_postgres::{Client, Row};

use super::bounds::{POOL_WAIT, STATEMENT_TIMEOUT};

const LOOK: &str = "SELECT \
     (SELECT setting::bigint FROM pg_settings WHERE name = 'statement_timeout'), \
     current_setting('default_transaction_isolation'), \
     current_setting('transaction_isolation'), \
     pg_is_in_recovery(), \
     current_setting('server_encoding')";

/// A connection on which the guarantee would not hold. Displays with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// A statement could outlive the announcement of its write.
    #[error(
        "statement_timeout is {} on a new connection and must be above 0 and at most {} ms; a pooler \
         may have dropped what the service asked for: run `ALTER ROLE the_role_of_the_url SET \
         statement_timeout = '{} ms'`",
        shown(*.0), STATEMENT_TIMEOUT.as_millis(), STATEMENT_TIMEOUT.as_millis()
    )]
    StatementTimeout(i64),
    /// A statement could not see an epoch that changed while it waited.
    #[error(
        "default_transaction_isolation is `{0}` on a new connection and must be `read committed`; a \
         pooler may have dropped what the service asked for: run `ALTER ROLE the_role_of_the_url SET \
         default_transaction_isolation = 'read committed'`"
    )]
    Isolation(String),
    /// Its answers are of the past.
    #[error("the server is a standby, whose answers may be old; give the primary in the URL")]
    Standby,
    /// It cannot keep every text.
    #[error(
        "the database's server_encoding is {0}, which cannot keep every text; use a database made \
         with `CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0`"
    )]
    Encoding(String),
    /// The settings could not be read.
    #[error("the settings of a new connection could not be read: {0}")]
    Unread(String),
}

fn shown(statement_timeout: i64) -> String {
    match statement_timeout {
        0 => "0 (no limit)".to_owned(),
        ms => format!("{ms} ms"),
    }
}

/// Refuses a connection on which the guarantee would not hold.
///
/// # Errors
///
/// [`Unfit`].
pub async fn verify(client: &Client) -> Result<(), Unfit> {
    let unread = |error: tokio_postgres::Error| Unfit::Unread(crate::causes::chain(&error));
    // Without parameters and unnamed, so that it passes every pooler.
    let rows = timeout(POOL_WAIT, client.query_typed(LOOK, &[]))
        .await
        .map_err(|_| Unfit::Unread(format!("no answer within {} s", POOL_WAIT.as_secs())))?
        .map_err(unread)?;
    let row = rows
        .first()
        .ok_or_else(|| Unfit::Unread("none were returned".to_owned()))?;
    judge(row).map_err(unread)?
}

fn judge(row: &Row) -> Result<Result<(), Unfit>, tokio_postgres::Error> {
    let longest = i64::try_from(STATEMENT_TIMEOUT.as_millis()).unwrap_or(i64::MAX);
    let statement_timeout: i64 = row.try_get(0)?;
    if !(1..=longest).contains(&statement_timeout) {
        return Ok(Err(Unfit::StatementTimeout(statement_timeout)));
    }
    for column in [1, 2] {
        let isolation: String = row.try_get(column)?;
        if isolation != "read committed" {
            return Ok(Err(Unfit::Isolation(isolation)));
        }
    }
    if row.try_get(3)? {
        return Ok(Err(Unfit::Standby));
    }
    let encoding: String = row.try_get(4)?;
    if encoding != "UTF8" {
        return Ok(Err(Unfit::Encoding(encoding)));
    }
    Ok(Ok(()))
}
