//! The transaction that the operation of a write is handed.

use std::fmt;
use std::ops::{Deref, DerefMut};

use ::sqlx::pool::PoolConnection;
use ::sqlx::{Error, PgConnection, PgPool, Postgres};

use super::{is_missing, op_error};
use crate::error::{NoConnection, OpError, Unavailable, chain};
use crate::fence::sqlx::run;
use crate::format::Format;
use crate::writing::set::{Slot, Values};
use crate::writing::text::{END, MARK, begin};
use crate::writing::{Begin, Commit, Driver, Ended, Lent, sealed};

/// How many connections are tried for one transaction: after a restart of the server a pool is full of
/// dead ones.
const MAX_TRIES: usize = 3;

/// A connection of a pool with a transaction that is open. It is closed when it is dropped, unless the
/// transaction was seen to end: the pool would hand it to whoever comes next as it is.
#[doc(hidden)]
pub struct Connection {
    /// Some until it is given back.
    pooled: Option<PoolConnection<Postgres>>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(pooled) = self.pooled.take() {
            drop(pooled.detach());
        }
    }
}

impl Connection {
    fn inner(&self) -> &PgConnection {
        match &self.pooled {
            Some(pooled) => pooled,
            None => unreachable!("a connection is given back last of all"),
        }
    }

    fn inner_mut(&mut self) -> &mut PgConnection {
        match &mut self.pooled {
            Some(pooled) => pooled,
            None => unreachable!("a connection is given back last of all"),
        }
    }

    fn give_back(mut self) {
        self.pooled = None;
    }

    async fn roll_back(mut self) {
        if run(self.inner_mut(), "ROLLBACK").await.is_ok() {
            self.give_back();
        }
    }
}

/// A transaction that has begun and is guarded, in the hands of a write's operation.
///
/// It is the connection itself: hand `&mut *tx` to the queries of `sqlx`. It can be ended in two ways: by
/// [`Transaction::commit`], or by being dropped, as with every error that is passed on.
///
/// `sqlx` does not know that there is a transaction. So a savepoint is made with the statement `SAVEPOINT`,
/// not with `begin` of `sqlx`, whose commit would be that of the whole transaction: it counts as one of the
/// operation's own ([`crate::Stats::unguarded_writes`]).
///
/// A statement that was prepared before the schema changed fails, as it does with `sqlx` alone, until the
/// connection's statements are cleared.
#[derive(Debug)]
pub struct Transaction {
    connection: Lent<Connection>,
    values: Values,
}

impl Deref for Transaction {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.connection.inner()
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.connection.inner_mut()
    }
}

impl Transaction {
    /// Caches the value that the transaction leaves behind.
    pub fn cache<V, F: Format<V>>(&mut self, slot: &Slot<V, F>, value: &V) {
        self.values.cache(slot, value);
    }

    /// Caches that there is no such value when the transaction has committed, as after a delete.
    pub fn absent<V, F>(&mut self, slot: &Slot<V, F>) {
        self.values.absent(slot);
    }

    /// Makes the commit that the operation returns. The library sends COMMIT when it has returned.
    pub fn commit<T>(self, output: T) -> Commit<T> {
        self.values.commit(output)
    }
}

impl sealed::Sealed for PgPool {}

impl Driver for PgPool {
    type Transaction = Transaction;
    type Error = Error;
    type Connection = Connection;

    async fn begin(&self, how: Begin) -> Result<Connection, OpError<Error>> {
        let text = begin(how);
        let none =
            |error| OpError::Unavailable(Unavailable::NoConnection(NoConnection::new(error)));
        let mut tries = 1;
        loop {
            let mut connection = Connection {
                pooled: Some(self.acquire().await.map_err(none)?),
            };
            let Err(error) = run(connection.inner_mut(), &text).await else {
                return Ok(connection);
            };
            let broken = is_missing(&error);
            return Err(match op_error(error) {
                OpError::Rejected(error) if broken => {
                    connection.roll_back().await;
                    OpError::Unavailable(Unavailable::FenceBroken(chain(&error)))
                }
                OpError::Unknown(error) if tries == MAX_TRIES => none(error),
                // Whatever became of it, nothing was written.
                OpError::Unknown(_) => {
                    tries += 1;
                    continue;
                }
                refused => {
                    connection.roll_back().await;
                    refused
                }
            });
        }
    }

    fn lend(connection: Lent<Connection>) -> Transaction {
        Transaction {
            connection,
            values: Values::default(),
        }
    }

    async fn commit(mut connection: Connection) -> Result<Ended, OpError<Error>> {
        match run(connection.inner_mut(), END).await {
            Ok(rows) => {
                connection.give_back();
                let marked = rows.iter().flatten().any(|text| text == MARK);
                Ok(if marked {
                    Ended::Guarded
                } else {
                    Ended::Unguarded
                })
            }
            Err(error) => Err(match op_error(error) {
                OpError::Rejected(error) => {
                    connection.roll_back().await;
                    OpError::Rejected(error)
                }
                unknown => unknown,
            }),
        }
    }

    async fn roll_back(connection: Connection) {
        connection.roll_back().await;
    }

    /// Its statements are sent by `sqlx` itself, so why one failed is not seen.
    fn is_stale(_: &Connection) -> bool {
        false
    }
}
