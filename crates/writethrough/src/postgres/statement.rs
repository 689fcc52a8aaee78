//! The single statement that the operation of a write is handed.

use deadpool_postgres::Pool;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Error, Row};

use super::connection::{Connection, ended};
use super::is_fenced;
use crate::error::OpError;
use crate::fence::postgres::is_without_effect;
use crate::writing::text::{END, begin};
use crate::writing::{Begin, Done, Lent, Performed, Pipeline};

/// A statement that has no text yet, in the hands of a write's operation. Each of its methods sends it.
#[derive(Debug)]
#[must_use = "nothing is written until it is sent"]
pub struct Statement {
    connection: Lent<Connection>,
    begin: Begin,
}

impl Statement {
    /// Runs the statement and returns its rows.
    ///
    /// # Errors
    ///
    /// The driver's. Nothing was written then, unless the connection was lost.
    pub async fn query(
        mut self,
        text: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<(Vec<Row>, Done), Error> {
        let prepared = self.prepare(text).await?;
        let answer = self.connection.query(&prepared, parameters);
        let (performed, answer) = perform(&self.connection, self.begin, answer).await;
        self.end(performed, answer)
    }

    /// Runs a statement that returns one row.
    ///
    /// # Errors
    ///
    /// The driver's. There were more rows or none: then the statement stands.
    pub async fn query_one(
        mut self,
        text: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<(Row, Done), Error> {
        let prepared = self.prepare(text).await?;
        let answer = self.connection.query_one(&prepared, parameters);
        let (performed, answer) = perform(&self.connection, self.begin, answer).await;
        self.end(performed, answer)
    }

    /// Runs a statement that returns one row or none.
    ///
    /// # Errors
    ///
    /// The driver's. There were more rows: then the statement stands.
    pub async fn query_opt(
        mut self,
        text: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<(Option<Row>, Done), Error> {
        let prepared = self.prepare(text).await?;
        let answer = self.connection.query_opt(&prepared, parameters);
        let (performed, answer) = perform(&self.connection, self.begin, answer).await;
        self.end(performed, answer)
    }

    /// Runs the statement and returns how many rows it changed.
    ///
    /// # Errors
    ///
    /// The driver's. Nothing was written then, unless the connection was lost.
    pub async fn execute(
        mut self,
        text: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<(u64, Done), Error> {
        let prepared = self.prepare(text).await?;
        let answer = self.connection.execute(&prepared, parameters);
        let (performed, answer) = perform(&self.connection, self.begin, answer).await;
        self.end(performed, answer)
    }

    /// Prepares the statement, unless this connection has done so before.
    async fn prepare(&mut self, text: &str) -> Result<tokio_postgres::Statement, Error> {
        let prepared = self.connection.prepare_cached(text).await;
        let prepared = self.connection.noted(prepared)?;
        self.connection.performed = Performed::Unknown;
        Ok(prepared)
    }

    fn end<T>(
        mut self,
        performed: Performed,
        answer: Result<T, Error>,
    ) -> Result<(T, Done), Error> {
        self.connection.performed = performed;
        Ok((self.connection.noted(answer)?, Done::new()))
    }
}

/// Sends the beginning, the statement and the end, in this order and without waiting, and learns from the
/// three answers what became of it.
async fn perform<T>(
    connection: &Connection,
    how: Begin,
    statement: impl Future<Output = Result<T, Error>>,
) -> (Performed, Result<T, Error>) {
    let beginning = begin(how);
    let (begun, answer, end) = tokio::join!(
        biased;
        connection.batch_execute(&beginning),
        statement,
        connection.simple_query(END),
    );
    let refused = |result: Option<&Error>| result.is_some_and(is_without_effect);
    let fenced = |result: Option<&Error>| result.is_some_and(is_fenced);
    let performed = match (begun.as_ref().err(), answer.as_ref().err(), &end) {
        (begun, answer, _) if refused(answer) => {
            if fenced(begun) || fenced(answer) {
                Performed::Fenced
            } else {
                Performed::NoEffect
            }
        }
        // Also when BEGIN itself had failed, so that the statement ran by itself: without a guard, which
        // the end tells. And when the rows were not those that were asked for.
        (_, _, Ok(answer)) => Performed::Committed(ended(answer)),
        (None, _, Err(error)) if is_without_effect(error) => Performed::NoEffect,
        // It was not sent, as a parameter could not be.
        (Some(begun), Some(_), Err(error)) if is_without_effect(error) => {
            if is_fenced(begun) {
                Performed::Fenced
            } else {
                Performed::NoEffect
            }
        }
        _ => Performed::Unknown,
    };
    let answer = match (begun, answer, end) {
        (_, Ok(answer), Ok(_)) => Ok(answer),
        (_, Ok(_), Err(error)) | (Ok(()), Err(error), _) | (Err(error), Err(_), _) => Err(error),
    };
    (performed, answer)
}

impl Pipeline for Pool {
    type Statement = Statement;

    async fn take(&self) -> Result<Connection, OpError<Error>> {
        Connection::of(self).await
    }

    fn lend_for_one(connection: Lent<Connection>, begin: Begin) -> Statement {
        Statement { connection, begin }
    }

    fn performed(connection: &Connection) -> Performed {
        connection.performed
    }
}
