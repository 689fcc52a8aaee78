//! The write path that users see, on real servers: what is committed, what is refused, and what is known
//! of a write that broke off, each with the state of the table, of the cache and of the pool after it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use bytes::Bytes;
use deadpool_postgres::Pool;
use support::{Ground, Node, Pair, pool_of};
use writethrough::entity::Entity;
use writethrough::postgres::Transaction;
use writethrough::{CacheValue, Commit, DecodeError, Key, Read, ReadOutcome, WriteError, Written};

const ROW: Entity<str, String> = Entity::new("row");

const PUT: &str = "INSERT INTO rows (key, value) VALUES ($1, $2) \
                   ON CONFLICT (key) DO UPDATE SET value = $2 RETURNING value";

/// A caller's own error.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Database(#[from] tokio_postgres::Error),
    #[error("no such row")]
    NoSuchRow,
}

impl Failure {
    fn code(&self) -> &str {
        match self {
            Self::Database(error) => error.code().map_or("no code", |code| code.code()),
            Self::NoSuchRow => "no such row",
        }
    }
}

type Outcome<T> = Result<Written<T>, WriteError<Failure>>;

/// The bytes of a typed value: its version, and JSON.
struct Typed(String);

impl CacheValue for Typed {
    fn encode(&self) -> Bytes {
        [b"\x01", serde_json::to_vec(&self.0).unwrap().as_slice()]
            .concat()
            .into()
    }

    fn decode(bytes: Bytes) -> Result<Self, DecodeError> {
        assert_eq!(bytes[0], 1, "the version");
        Ok(Self(serde_json::from_slice(&bytes[1..]).unwrap()))
    }
}

async fn read(node: &Node, id: &str) -> (Option<String>, ReadOutcome) {
    let load = || async { Ok::<_, Failure>(node.store.get(id).await.map(Typed)) };
    let read: Read<Typed> = node.cached.read(&Key::new("row", id), load).await.unwrap();
    (read.value.map(|Typed(value)| value), read.outcome)
}

fn hit(value: &str) -> (Option<String>, ReadOutcome) {
    (Some(value.to_owned()), ReadOutcome::Hit)
}

async fn put(tx: &Transaction, id: &str, value: &str) -> Result<String, tokio_postgres::Error> {
    Ok(tx.query_one(PUT, &[&id, &value]).await?.get(0))
}

/// Writes a row and caches it.
async fn write(node: &Node, pool: &Pool, id: &str, value: &str) -> Outcome<()> {
    let context = (id.to_owned(), value.to_owned());
    let op = |mut tx: Transaction, slot, (id, value): (String, String)| async move {
        let value = put(&tx, &id, &value).await?;
        tx.cache(&slot, &value);
        Ok(tx.commit(()))
    };
    let write = node.cached.write(ROW.key(id)).with(context);
    write.transaction(pool, op).await
}

/// A node on Postgres, with a pool of one connection for its writes.
async fn node_and_pool() -> (Ground, Node, Pool) {
    let ground = Ground::new(Pair::MemoryPostgres).await;
    let node = ground.node().await;
    let pool = pool_of(ground.database.as_ref().unwrap(), 1);
    (ground, node, pool)
}

/// The pool's one connection is there again, and nothing of a transaction is left on it.
async fn is_clean(pool: &Pool) {
    let client = pool.get().await.unwrap();
    let row = client
        .query_one("SELECT current_setting('writethrough.write', true), txid_current_if_assigned() IS NULL", &[])
        .await
        .unwrap();
    let mark: Option<&str> = row.get(0);
    assert_eq!(mark.unwrap_or_default(), "", "the transaction is over");
}

#[tokio::test]
async fn a_transaction_commits_and_what_it_left_is_hit() {
    let ground = Ground::new(Pair::RedisPostgres).await;
    let node = ground.node().await;
    let pool = pool_of(ground.database.as_ref().unwrap(), 1);
    write(&node, &pool, "a", "one").await.unwrap();
    assert_eq!(read(&node, "a").await, hit("one"));
    let delete = |mut tx: Transaction, slot, ()| async move {
        let count = tx.execute("DELETE FROM rows WHERE key = 'a'", &[]).await?;
        tx.absent(&slot);
        Ok::<_, Failure>(tx.commit(count))
    };
    let written = node.cached.write(ROW.key("a")).transaction(&pool, delete);
    assert_eq!(written.await.unwrap().output, 1);
    assert_eq!(read(&node, "a").await, (None, ReadOutcome::Hit));
    is_clean(&pool).await;
}

#[tokio::test]
async fn an_error_before_the_commit_has_no_effect_and_the_connection_is_clean() {
    let (_ground, node, pool) = node_and_pool().await;
    write(&node, &pool, "a", "one").await.unwrap();
    let op = |tx: Transaction, _, ()| async move {
        put(&tx, "a", "two").await?;
        Err::<Commit<()>, _>(Failure::NoSuchRow)
    };
    let refused = node.cached.write(ROW.key("a")).transaction(&pool, op).await;
    assert!(
        matches!(refused, Err(WriteError::Rejected(Failure::NoSuchRow))),
        "{refused:?}"
    );
    assert_eq!(node.store.get("a").await.as_deref(), Some("one"));
    is_clean(&pool).await;
    assert_eq!(read(&node, "a").await.1, ReadOutcome::Filled);
}

/// Postgres answers the COMMIT of a transaction that has failed with ROLLBACK, and no error.
#[tokio::test]
async fn an_error_that_the_operation_swallowed_is_no_commit() {
    let (_ground, node, pool) = node_and_pool().await;
    let op = |mut tx: Transaction, slot, ()| async move {
        put(&tx, "a", "one").await?;
        let _ = tx.query("SELECT 1 / 0", &[]).await;
        tx.cache(&slot, &"one".to_owned());
        Ok::<_, Failure>(tx.commit(()))
    };
    let refused = node.cached.write(ROW.key("a")).transaction(&pool, op).await;
    let Err(WriteError::Rejected(error)) = &refused else {
        panic!("{refused:?}");
    };
    assert_eq!(error.code(), "25P02");
    assert_eq!(node.store.get("a").await, None);
    assert_eq!(read(&node, "a").await, (None, ReadOutcome::Filled));
    is_clean(&pool).await;
}
