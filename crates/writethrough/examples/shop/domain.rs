//! What the shop is about, its tables and how it reads them: the same in both forms of its endpoints.

use deadpool_postgres::{Pool, PoolError};
use serde::{Deserialize, Serialize};
use tokio_postgres::Row;
use uuid::Uuid;
use writethrough::{Indeterminate, ReadError, Unavailable, WriteError};

pub const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS account (id uuid PRIMARY KEY, name text NOT NULL, spent bigint NOT NULL);
    CREATE TABLE IF NOT EXISTS orders (id uuid PRIMARY KEY, account uuid NOT NULL, cents bigint NOT NULL)";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    pub id: Uuid,
    pub name: String,
    pub spent: i64,
}

impl From<Row> for Account {
    fn from(row: Row) -> Self {
        Self {
            id: row.get(0),
            name: row.get(1),
            spent: row.get(2),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub id: Uuid,
    pub account: Uuid,
    pub cents: i64,
}

impl From<Row> for Order {
    fn from(row: Row) -> Self {
        Self {
            id: row.get(0),
            account: row.get(1),
            cents: row.get(2),
        }
    }
}

pub async fn account(pool: &Pool, id: Uuid) -> Result<Option<Account>, Error> {
    const SQL: &str = "SELECT id, name, spent FROM account WHERE id = $1";
    let client = pool.get().await?;
    let statement = client.prepare_cached(SQL).await?;
    let row = client.query_opt(&statement, &[&id]).await?;
    Ok(row.map(Account::from))
}

pub async fn accounts(pool: &Pool, ids: Vec<Uuid>) -> Result<Vec<(Uuid, Account)>, Error> {
    const SQL: &str = "SELECT id, name, spent FROM account WHERE id = ANY ($1)";
    let client = pool.get().await?;
    let statement = client.prepare_cached(SQL).await?;
    let rows = client.query(&statement, &[&ids]).await?;
    let accounts = rows.into_iter().map(Account::from);
    Ok(accounts.map(|account| (account.id, account)).collect())
}

pub async fn orders(pool: &Pool, of: Uuid, after: Uuid, limit: i64) -> Result<Vec<Order>, Error> {
    const SQL: &str = "SELECT id, account, cents FROM orders WHERE account = $1 AND id > $2 \
                       ORDER BY id LIMIT $3";
    let client = pool.get().await?;
    let statement = client.prepare_cached(SQL).await?;
    let rows = client.query(&statement, &[&of, &after, &limit]).await?;
    Ok(rows.into_iter().map(Order::from).collect())
}

/// What a handler answers when it does not answer what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no such account")]
    NoSuchAccount,
    #[error("the database refused")]
    Database(#[from] tokio_postgres::Error),
    #[error("there is no connection")]
    Pool(#[from] PoolError),
    #[error("nothing was written")]
    Unavailable(#[source] Unavailable),
    #[error("it may have been written")]
    Unknown(#[source] Box<Indeterminate<Error>>),
    #[error("it could not be read")]
    Read(#[source] Box<ReadError<Error>>),
}

impl From<WriteError<Error>> for Error {
    fn from(error: WriteError<Error>) -> Self {
        match error {
            WriteError::Rejected(error) => error,
            WriteError::Unavailable(why) => Self::Unavailable(why),
            WriteError::Indeterminate(why) => Self::Unknown(Box::new(why)),
            _ => Self::Unknown(Box::new(Indeterminate::Abandoned)),
        }
    }
}

impl From<ReadError<Error>> for Error {
    fn from(error: ReadError<Error>) -> Self {
        match error {
            ReadError::Load(error) => error,
            error => Self::Read(Box::new(error)),
        }
    }
}
