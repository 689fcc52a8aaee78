//! The transaction that the operation of a write is handed.

use std::sync::atomic::Ordering;

use deadpool_postgres::{ClientWrapper, Pool};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Error, Row};

use super::connection::{Connection, ended};
use super::{is_missing, op_error};
use crate::error::{NoConnection, OpError, Unavailable, chain};
use crate::format::Format;
use crate::writing::set::{Slot, Values};
use crate::writing::text::{END, begin};
use crate::writing::{Begin, Commit, Driver, Ended, Lent};

/// How many connections are tried for one transaction: after a restart of the server a pool is full of
/// dead ones.
const MAX_TRIES: usize = 3;

/// A transaction that has begun and is guarded, in the hands of a write's operation.
///
/// Its statements are prepared once for each connection. It can be ended in two ways: by
/// [`Transaction::commit`], or by being dropped, as with every error that is passed on.
#[derive(Debug)]
pub struct Transaction {
    connection: Lent<Connection>,
    values: Values,
}

impl Transaction {
    /// Runs a statement and returns its rows.
    ///
    /// # Errors
    ///
    /// The driver's. The transaction has failed then.
    pub async fn query(
        &self,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        let client = &self.connection;
        let rows = async {
            let prepared = client.prepare_cached(statement).await?;
            client.query(&prepared, parameters).await
        };
        client.noted(rows.await)
    }

    /// Runs a statement that returns one row.
    ///
    /// # Errors
    ///
    /// The driver's, also when there are none or more rows.
    pub async fn query_one(
        &self,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, Error> {
        let client = &self.connection;
        let row = async {
            let prepared = client.prepare_cached(statement).await?;
            client.query_one(&prepared, parameters).await
        };
        client.noted(row.await)
    }

    /// Runs a statement that returns one row or none.
    ///
    /// # Errors
    ///
    /// The driver's, also when there are more rows.
    pub async fn query_opt(
        &self,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, Error> {
        let client = &self.connection;
        let row = async {
            let prepared = client.prepare_cached(statement).await?;
            client.query_opt(&prepared, parameters).await
        };
        client.noted(row.await)
    }

    /// Runs a statement and returns how many rows it changed.
    ///
    /// # Errors
    ///
    /// The driver's. The transaction has failed then.
    pub async fn execute(
        &self,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, Error> {
        let client = &self.connection;
        let count = async {
            let prepared = client.prepare_cached(statement).await?;
            client.execute(&prepared, parameters).await
        };
        client.noted(count.await)
    }

    /// Returns the driver's client, for everything else that can be done in a transaction, such as COPY
    /// and savepoints. The transaction must not be ended with it.
    #[must_use]
    pub fn client(&self) -> &ClientWrapper {
        &self.connection
    }

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

impl Driver for Pool {
    type Transaction = Transaction;
    type Error = Error;
    type Connection = Connection;

    async fn begin(&self, how: Begin) -> Result<Connection, OpError<Error>> {
        let text = begin(how);
        let mut tries = 1;
        loop {
            let connection = Connection::of(self).await?;
            let Err(error) = connection.batch_execute(&text).await else {
                return Ok(connection);
            };
            let broken = is_missing(&error);
            return Err(match op_error(error) {
                OpError::Rejected(error) if broken => {
                    connection.roll_back().await;
                    OpError::Unavailable(Unavailable::FenceBroken(chain(&error)))
                }
                OpError::Unknown(error) if tries == MAX_TRIES => {
                    OpError::Unavailable(Unavailable::NoConnection(NoConnection::new(error)))
                }
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

    async fn commit(connection: Connection) -> Result<Ended, OpError<Error>> {
        match connection.simple_query(END).await {
            Ok(answer) => {
                connection.give_back();
                Ok(ended(&answer))
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

    fn is_stale(connection: &Connection) -> bool {
        connection.stale.load(Ordering::Relaxed)
    }
}
