//! Items in Postgres: one prepared statement and one round trip for each operation, with the guard
//! inside the writing ones.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use deadpool_postgres::{Object, Pool, PoolError};
use time::OffsetDateTime;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};
use uuid::Uuid;
use writethrough::migration::Migration;
use writethrough::postgres::{is_missing, is_stale_statement, migrate_schema, op_error};
use writethrough::{Guard, OpError, PostgresFence};

use super::left_out::{self, LeftOut, unreadable};
use super::{Condition, ItemStore, PoolUse, Refusal, StoreError, StoreFailure, WriteResult};
use crate::causes::chain;
use crate::item::{Item, ItemFields, ItemId, NewItem, Page, PageRequest, Price, Timestamp};

mod bounds;
mod connect;
mod connections;
mod fitness;
mod hosts;
mod obstacle;
mod room;

use bounds::{POOL_WAIT, STATEMENT_TIMEOUT};
pub use connect::{Connector, check_url, shown_url};
use connections::{Connections, Purpose};
pub use fitness::{Unfit, verify};
pub use obstacle::{Lasts, Obstacle};
use room::{Room, is_full};

/// Keeps two nodes from migrating at once; any fixed number that nobody else uses.
const MIGRATION_LOCK: i64 = 0x7772_6974_6574_6802;
/// The longest that a sign of life may take.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

const MIGRATIONS: &[Migration] = &[
    Migration::new(
        1,
        "create_items",
        include_str!("migrations/V1__create_items.sql"),
    ),
    Migration::new(
        2,
        "times_can_be_shown",
        include_str!("migrations/V2__times_can_be_shown.sql"),
    ),
];

macro_rules! columns {
    () => {
        "items.id, items.name, items.description, items.price, items.created_at, \
         items.updated_at, items.version"
    };
}

const SELECT: &str = concat!("SELECT ", columns!(), " FROM items WHERE id = $1");

const SELECT_NEWEST: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM items ORDER BY created_at DESC, id DESC LIMIT $1"
);

const SELECT_AFTER: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM items WHERE (created_at, id) <= ($2, $3) ORDER BY created_at DESC, id DESC LIMIT $1"
);

/// A writing statement. Its first parameter is that of the guard, or null for a writer without an epoch.
struct Statement {
    text: &'static str,
    types: &'static [Type],
}

const INSERT: Statement = Statement {
    text: concat!(
        "INSERT INTO items (id, name, description, price) SELECT $2, $3, $4, $5 \
         FROM writethrough.guard($1) RETURNING ",
        columns!()
    ),
    types: &[
        Type::INT8,
        Type::UUID,
        Type::TEXT,
        Type::TEXT,
        Type::NUMERIC,
    ],
};

/// The second part tells "no such item" (no row) from "another version" (a row that is not `done`).
const UPDATE: Statement = Statement {
    text: concat!(
        "WITH changed AS (UPDATE items SET name = $3, description = $4, price = $5, \
         updated_at = greatest(now(), items.updated_at), version = items.version + 1 \
         FROM writethrough.guard($1) WHERE items.id = $2 \
         AND ($6::bigint[] IS NULL OR (items.version = ANY ($6)) = $7::boolean) RETURNING ",
        columns!(),
        ") SELECT items.*, true AS done FROM changed AS items UNION ALL SELECT ",
        columns!(),
        ", false AS done FROM items WHERE id = $2 AND NOT EXISTS (SELECT FROM changed)"
    ),
    types: &[
        Type::INT8,
        Type::UUID,
        Type::TEXT,
        Type::TEXT,
        Type::NUMERIC,
        Type::INT8_ARRAY,
        Type::BOOL,
    ],
};

const DELETE: Statement = Statement {
    text: "WITH changed AS (DELETE FROM items USING writethrough.guard($1) WHERE items.id = $2 \
           AND ($3::bigint[] IS NULL OR (items.version = ANY ($3)) = $4::boolean) \
           RETURNING items.id) SELECT true AS done FROM changed UNION ALL \
           SELECT false AS done FROM items WHERE id = $2 AND NOT EXISTS (SELECT FROM changed)",
    types: &[Type::INT8, Type::UUID, Type::INT8_ARRAY, Type::BOOL],
};

/// Items in Postgres.
pub struct PostgresStore {
    connections: Arc<Connections>,
    room: Arc<Room>,
    /// A connection of its own, so that a pool with no free one is not taken for a dead server.
    probe: Pool,
    left_out: LeftOut,
}

/// Why a statement gave no answer.
enum Failure {
    /// It was never sent.
    NotSent(StoreError),
    /// The guard refused.
    Fenced,
    /// The server answered with an error, so it had no effect.
    Refused(StoreError),
    /// The server answered that it has no such prepared statement any more: it had no effect.
    Stale(StoreError),
    /// It was sent, and then the connection was lost.
    Lost(StoreError),
    /// It was sent, and there was no answer in time.
    Unanswered(StoreError),
}

impl PostgresStore {
    /// Items behind this connector, with at most `pool_size` connections.
    ///
    /// # Errors
    ///
    /// A bound that the pool refuses.
    pub fn new(connector: &Connector, pool_size: usize) -> Result<Self, String> {
        let room = connector.room();
        Ok(Self {
            connections: Connections::new(connector.pool_for_items(pool_size)?, room.clone()),
            room,
            probe: connector.pool(1)?,
            left_out: LeftOut::default(),
        })
    }

    /// Installs or upgrades the tables of items and of the fence. Safe to call from every node at
    /// once.
    ///
    /// # Errors
    ///
    /// Why it could not be done; doing it again is safe.
    pub async fn migrate(client: &mut Client) -> Result<(), Obstacle> {
        PostgresFence::migrate(client).await?;
        migrate_schema(client, "items_schema_history", MIGRATION_LOCK, MIGRATIONS).await?;
        Ok(())
    }

    async fn rows_of_page(
        &self,
        request: PageRequest,
        count: usize,
    ) -> Result<Vec<Row>, StoreError> {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        match request.after {
            None => self.read(SELECT_NEWEST, &[Type::INT8], &[&count]).await,
            Some(cursor) => {
                let types = &[Type::INT8, Type::TIMESTAMPTZ, Type::UUID];
                let (time, id) = (cursor.created_at.date_time(), cursor.id.uuid());
                self.read(SELECT_AFTER, types, &[&count, &time, &id]).await
            }
        }
    }

    async fn query_once(
        &self,
        purpose: Purpose,
        statement: &str,
        types: &[Type],
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Failure> {
        let lent = self
            .connections
            .get(purpose)
            .await
            .map_err(Failure::NotSent)?;
        let Some(client) = lent.client() else {
            return Err(Failure::NotSent(StoreError::new(
                StoreFailure::Internal,
                "no connection was lent",
            )));
        };
        let prepared = match timeout(
            STATEMENT_TIMEOUT,
            client.prepare_typed_cached(statement, types),
        )
        .await
        {
            Ok(Ok(prepared)) => prepared,
            // Preparing has no effect, whatever became of it.
            Ok(Err(error)) if is_stale_statement(&error) => return Err(self.stale(&error)),
            Ok(Err(error)) => {
                let failure = failure_of(&error);
                return Err(Failure::NotSent(StoreError::from_source(failure, &error)));
            }
            Err(_) => return Err(Failure::NotSent(no_answer())),
        };
        match timeout(STATEMENT_TIMEOUT, client.query(&prepared, parameters)).await {
            Ok(Ok(rows)) => {
                lent.give_back();
                Ok(rows)
            }
            Ok(Err(error)) if is_stale_statement(&error) => Err(self.stale(&error)),
            Ok(Err(error)) => match op_error(error) {
                OpError::Fenced => {
                    lent.give_back();
                    Err(Failure::Fenced)
                }
                OpError::Rejected(error) => {
                    if !wants_another_connection(&error) {
                        lent.give_back();
                    }
                    let failure = failure_of(&error);
                    Err(Failure::Refused(StoreError::from_source(failure, &error)))
                }
                OpError::Unknown(error) => Err(Failure::Lost(StoreError::from_source(
                    StoreFailure::Unavailable,
                    &error,
                ))),
                _ => Err(Failure::Unanswered(no_answer())),
            },
            Err(_) => Err(Failure::Unanswered(no_answer())),
        }
    }

    /// Forgets what was prepared on every connection: when one is stale, the others will be, too.
    fn stale(&self, error: &tokio_postgres::Error) -> Failure {
        self.connections.forget_statements();
        Failure::Stale(StoreError::from_source(StoreFailure::Unavailable, error))
    }

    /// Runs a statement, once more on another connection if it had no effect for want of its
    /// preparation.
    async fn query(
        &self,
        purpose: Purpose,
        statement: &str,
        types: &[Type],
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Failure> {
        match self.query_once(purpose, statement, types, parameters).await {
            Err(Failure::Stale(error)) => {
                tracing::debug!("a statement is prepared anew: {error}");
                self.query_once(purpose, statement, types, parameters).await
            }
            result => result,
        }
    }

    /// Reads, once more on a fresh connection if the first one turned out to be dead: after a restart
    /// of the server a pool is full of dead ones.
    async fn read(
        &self,
        statement: &str,
        types: &[Type],
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        let mut result = self
            .query(Purpose::Read, statement, types, parameters)
            .await;
        if let Err(Failure::Lost(_)) = result {
            result = self
                .query(Purpose::Read, statement, types, parameters)
                .await;
        }
        result.map_err(|failure| match failure {
            Failure::NotSent(error)
            | Failure::Refused(error)
            | Failure::Stale(error)
            | Failure::Lost(error)
            | Failure::Unanswered(error) => error,
            Failure::Fenced => StoreError::new(StoreFailure::Internal, "a read was fenced"),
        })
    }

    async fn write(
        &self,
        id: ItemId,
        statement: &Statement,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> WriteResult<Vec<Row>> {
        let Statement { text, types } = statement;
        self.query(Purpose::Write(id), text, types, parameters)
            .await
            .map_err(|failure| match failure {
                Failure::Fenced => OpError::Fenced,
                Failure::NotSent(error) | Failure::Refused(error) | Failure::Stale(error) => {
                    OpError::Rejected(error.into())
                }
                Failure::Lost(error) | Failure::Unanswered(error) => OpError::Unknown(error.into()),
            })
    }
}

fn no_answer() -> StoreError {
    StoreError::new(
        StoreFailure::Unavailable,
        format!(
            "no answer from Postgres within {} s",
            STATEMENT_TIMEOUT.as_secs()
        ),
    )
}

/// Whether the server is now a replica: a connection to it is of no more use.
fn wants_another_connection(error: &tokio_postgres::Error) -> bool {
    error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION)
}

fn failure_of(error: &tokio_postgres::Error) -> StoreFailure {
    let Some(code) = error.code() else {
        return StoreFailure::Unavailable;
    };
    match &code.code()[..2] {
        // Connection, resources, operator intervention, transaction rollback, system error.
        "08" | "53" | "57" | "40" | "58" | "55" => StoreFailure::Unavailable,
        _ if wants_another_connection(error) => StoreFailure::Unavailable,
        // Tables, functions or the epoch row are gone: no request is at fault, and it may be mended.
        _ if is_missing(error) => StoreFailure::Unavailable,
        // Authentication, an unknown database: a matter of the server's configuration, not of the
        // request.
        "28" | "3D" => StoreFailure::Unavailable,
        _ => StoreFailure::Internal,
    }
}

fn item(row: &Row) -> Result<Item, StoreError> {
    let id: Uuid = row.try_get(0).map_err(unreadable)?;
    let wrong = |index: usize, error: &dyn std::fmt::Display| {
        let column = row.columns().get(index).map_or("?", |column| column.name());
        unreadable(format!("item {id}, column {column}: {error}"))
    };
    fn column<'a, T: tokio_postgres::types::FromSql<'a>>(
        row: &'a Row,
        index: usize,
        wrong: impl Fn(usize, &dyn std::fmt::Display) -> StoreError,
    ) -> Result<T, StoreError> {
        row.try_get(index)
            .map_err(|error| wrong(index, &chain(&error)))
    }
    let time = |index| {
        let time: OffsetDateTime = column(row, index, wrong)?;
        i64::try_from(time.unix_timestamp_nanos().div_euclid(1000))
            .ok()
            .and_then(Timestamp::from_micros)
            .ok_or_else(|| wrong(index, &"the time is not between the years 1 and 9999"))
    };
    Ok(Item {
        id: id.into(),
        fields: ItemFields {
            name: column(row, 1, wrong)?,
            description: column(row, 2, wrong)?,
            price: Price::from_decimal(column(row, 3, wrong)?).map_err(|error| wrong(3, &error))?,
        },
        created_at: time(4)?,
        updated_at: time(5)?,
        version: column(row, 6, wrong)?,
    })
}

/// A row that could not be read after a write: the write has happened.
fn written<T>(result: Result<T, StoreError>) -> WriteResult<T> {
    result.map_err(|error| OpError::Unknown(error.into()))
}

/// The parameter of the guard; null without an epoch.
fn parameter(guard: Option<&Guard>) -> Option<i64> {
    guard.map(Guard::parameter)
}

/// The versions that a condition names, and whether the item's must be among them.
fn versions(condition: Condition) -> (Option<Vec<i64>>, bool) {
    match condition {
        Condition::None => (None, true),
        Condition::VersionIn(versions) => (Some(versions), true),
        Condition::VersionNotIn(versions) => (Some(versions), false),
    }
}

/// The row was there when the statement began and was not changed: for lack of a matching version,
/// or, when any version would have done, because another write removed it meanwhile.
fn not_done<T>(unconditional: bool) -> WriteResult<T> {
    Err(OpError::Rejected(if unconditional {
        Refusal::Missing
    } else {
        Refusal::Mismatch
    }))
}

#[async_trait]
impl ItemStore for PostgresStore {
    fn system(&self) -> &'static str {
        "postgresql"
    }

    async fn select(&self, id: ItemId) -> Result<Option<Item>, StoreError> {
        let rows = self.read(SELECT, &[Type::UUID], &[&id.uuid()]).await?;
        rows.first().map(item).transpose()
    }

    async fn select_page(&self, request: PageRequest) -> Result<Page, StoreError> {
        let wanted = Page::wanted(&request);
        let mut passed_over = 0;
        loop {
            let asked = wanted + passed_over;
            let rows = self.rows_of_page(request, asked).await?;
            let mut items = Vec::with_capacity(rows.len());
            let mut unreadable = Vec::new();
            for row in &rows {
                match item(row) {
                    Ok(item) => items.push(item),
                    Err(error) => unreadable.push(error),
                }
            }
            let all = rows.len() < asked;
            if items.len() >= wanted || all || unreadable.len() > left_out::MOST {
                for error in &unreadable {
                    self.left_out.name(error);
                }
                return Ok(Page::from_rows(items, &request));
            }
            passed_over = unreadable.len().max(passed_over * 2);
        }
    }

    async fn insert(&self, guard: Option<Guard>, new: NewItem) -> WriteResult<Item> {
        let NewItem { id, fields } = new;
        let rows = self
            .write(
                id,
                &INSERT,
                &[
                    &parameter(guard.as_ref()),
                    &id.uuid(),
                    &fields.name,
                    &fields.description,
                    &fields.price.decimal(),
                ],
            )
            .await?;
        written(
            rows.first()
                .ok_or_else(|| unreadable("none was returned"))
                .and_then(item),
        )
    }

    async fn update(
        &self,
        guard: Option<Guard>,
        id: ItemId,
        fields: ItemFields,
        condition: Condition,
    ) -> WriteResult<Item> {
        let unconditional = condition == Condition::None;
        let (versions, among) = versions(condition);
        let rows = self
            .write(
                id,
                &UPDATE,
                &[
                    &parameter(guard.as_ref()),
                    &id.uuid(),
                    &fields.name,
                    &fields.description,
                    &fields.price.decimal(),
                    &versions,
                    &among,
                ],
            )
            .await?;
        let Some(row) = rows.first() else {
            return Err(OpError::Rejected(Refusal::Missing));
        };
        if written(row.try_get(7).map_err(unreadable))? {
            written(item(row))
        } else {
            not_done(unconditional)
        }
    }

    async fn delete(
        &self,
        guard: Option<Guard>,
        id: ItemId,
        condition: Condition,
    ) -> WriteResult<()> {
        let unconditional = condition == Condition::None;
        let (versions, among) = versions(condition);
        let parameters: &[&(dyn ToSql + Sync)] =
            &[&parameter(guard.as_ref()), &id.uuid(), &versions, &among];
        let rows = self.write(id, &DELETE, parameters).await?;
        let Some(row) = rows.first() else {
            return Err(OpError::Rejected(Refusal::Missing));
        };
        if written(row.try_get(0).map_err(unreadable))? {
            Ok(())
        } else {
            not_done(unconditional)
        }
    }

    async fn ping(&self) -> Result<(), StoreError> {
        let client = match timeout(POOL_WAIT, self.probe.get()).await {
            Ok(Ok(client)) => client,
            // It refuses because it serves so many.
            Ok(Err(PoolError::Backend(error))) if is_full(&error) => return Ok(()),
            Ok(Err(error)) => {
                return Err(StoreError::from_source(StoreFailure::Unavailable, &error));
            }
            Err(_) => return Err(no_answer()),
        };
        let answer = timeout(PING_TIMEOUT, client.simple_query("")).await;
        if !matches!(answer, Ok(Ok(_))) {
            drop(Object::take(client));
        }
        match answer {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(StoreError::from_source(StoreFailure::Unavailable, &error)),
            Err(_) => Err(no_answer()),
        }
    }

    fn pool_use(&self) -> PoolUse {
        self.connections.pool_use()
    }

    fn shortage(&self) -> Option<String> {
        self.room.reason()
    }

    async fn close(&self) {
        self.connections.close();
        self.probe.close();
    }
}
