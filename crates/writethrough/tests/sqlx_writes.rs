//! The write path over `sqlx`, on real servers: what is committed, what is refused, and what is known of a
//! write that broke off, each with the state of the table, of the cache and of the pool after it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sqlx::postgres::PgPoolOptions;
use sqlx::{PgConnection, PgPool, Row};
use support::{Ground, Node, Pair, ROW, until};
use writethrough::sqlx::Transaction;
use writethrough::writing::Commit;
use writethrough::{
    Bypass, Indeterminate, ReadOutcome, Settings, Unavailable, WriteError, Written,
};

const PUT: &str = "INSERT INTO rows (key, value) VALUES ($1, $2) \
                   ON CONFLICT (key) DO UPDATE SET value = $2 RETURNING value";

/// A caller's own error.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    #[error("no such row")]
    NoSuchRow,
}

impl Failure {
    fn code(&self) -> String {
        match self {
            Self::Database(error) => match error.as_database_error() {
                Some(answer) => answer.code().unwrap_or_default().into_owned(),
                None => error.to_string(),
            },
            Self::NoSuchRow => "no such row".to_owned(),
        }
    }
}

type Outcome<T> = Result<Written<T>, WriteError<Failure>>;

async fn read(node: &Node, id: &str) -> (Option<String>, ReadOutcome) {
    let read = node.read(id).await;
    (read.value, read.outcome)
}

fn hit(value: &str) -> (Option<String>, ReadOutcome) {
    (Some(value.to_owned()), ReadOutcome::Hit)
}

async fn put(tx: &mut PgConnection, id: &str, value: &str) -> Result<String, sqlx::Error> {
    let row = sqlx::query(PUT).bind(id).bind(value).fetch_one(tx).await?;
    row.try_get(0)
}

/// Writes a row and caches it.
async fn write(node: &Node, pool: &PgPool, id: &str, value: &str) -> Outcome<()> {
    let context = (id.to_owned(), value.to_owned());
    let op = |mut tx: Transaction, slot, (id, value): (String, String)| async move {
        let value = put(&mut tx, &id, &value).await?;
        tx.cache(&slot, &value);
        Ok(tx.commit(()))
    };
    let write = node.cached.write(ROW.key(id)).with(context);
    write.transaction(pool, op).await
}

/// A node on Postgres, with a pool of one connection for its writes. A row `refused` fails at COMMIT, and
/// a row `slow` keeps its COMMIT waiting.
async fn node_and_pool() -> (Ground, Node, PgPool) {
    node_and_pool_with(Settings::default()).await
}

async fn node_and_pool_with(settings: Settings) -> (Ground, Node, PgPool) {
    const AT_COMMIT: &str = "
        CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.key = 'refused' THEN RAISE EXCEPTION 'refused' USING ERRCODE = '23514'; END IF;
            IF NEW.key = 'slow' THEN PERFORM pg_sleep(60); END IF;
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT OR UPDATE ON rows
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION at_commit()";
    let ground = Ground::new(Pair::MemorySqlx).await;
    sql(&ground, AT_COMMIT).await;
    let node = ground.node_with(settings).await;
    let url = ground.database.as_ref().unwrap();
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(Duration::from_millis(300))
        .connect_lazy(&format!("{url}?application_name=writes"))
        .unwrap();
    (ground, node, pool)
}

/// Runs a statement past the library.
async fn sql(ground: &Ground, text: &str) {
    let client = ground.store.pool.as_ref().unwrap().get().await.unwrap();
    client.batch_execute(text).await.unwrap();
}

/// Counts something of the connections of the pool for writes that are in some state.
async fn count(ground: &Ground, what: &str, condition: &str) -> i64 {
    let client = ground.store.pool.as_ref().unwrap().get().await.unwrap();
    let look = format!(
        "SELECT count({what}) FROM pg_stat_activity WHERE datname = current_database() \
         AND application_name = 'writes' AND {condition}"
    );
    client.query_one(&look, &[]).await.unwrap().get(0)
}

/// Ends the connections of the pool for writes from the side of the server.
async fn kill(ground: &Ground) {
    assert!(count(ground, "pg_terminate_backend(pid, 5000)", "true").await > 0);
}

/// The pool's one connection is there again, and nothing of a transaction is left on it.
async fn is_clean(pool: &PgPool) {
    let look = "SELECT coalesce(current_setting('writethrough.write', true), '')";
    let mark: String = sqlx::query(look).fetch_one(pool).await.unwrap().get(0);
    assert_eq!(mark, "", "the transaction is over");
}

#[tokio::test]
async fn a_transaction_commits_and_what_it_left_is_hit() {
    let (_ground, node, pool) = node_and_pool().await;
    write(&node, &pool, "a", "one").await.unwrap();
    assert_eq!(read(&node, "a").await, hit("one"));
    let delete = |mut tx: Transaction, slot, ()| async move {
        let delete = sqlx::query("DELETE FROM rows WHERE key = 'a'");
        let count = delete.execute(&mut *tx).await?.rows_affected();
        tx.absent(&slot);
        Ok::<_, Failure>(tx.commit(count))
    };
    let written = node.cached.write(ROW.key("a")).transaction(&pool, delete);
    assert_eq!(written.await.unwrap().output, 1);
    assert_eq!(read(&node, "a").await, (None, ReadOutcome::Hit));
    is_clean(&pool).await;
    assert_eq!(node.cached.stats().unguarded_writes, 0);
}

#[tokio::test]
async fn an_error_before_the_commit_has_no_effect_and_the_connection_is_clean() {
    let (_ground, node, pool) = node_and_pool().await;
    write(&node, &pool, "a", "one").await.unwrap();
    let op = |mut tx: Transaction, _, ()| async move {
        put(&mut tx, "a", "two").await?;
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
        put(&mut tx, "a", "one").await?;
        let _ = sqlx::query("SELECT 1 / 0").execute(&mut *tx).await;
        tx.cache(&slot, &"one".to_owned());
        Ok::<_, Failure>(tx.commit(()))
    };
    let refused = node.cached.write(ROW.key("a")).transaction(&pool, op).await;
    let Err(WriteError::Rejected(error)) = &refused else {
        panic!("{refused:?}");
    };
    assert_eq!(error.code(), "25P02");
    assert_eq!(read(&node, "a").await, (None, ReadOutcome::Filled));
    is_clean(&pool).await;
}

#[tokio::test]
async fn a_constraint_that_fails_at_the_commit_is_a_refusal() {
    let (_ground, node, pool) = node_and_pool().await;
    let refused = write(&node, &pool, "refused", "one").await;
    let Err(WriteError::Rejected(error)) = &refused else {
        panic!("{refused:?}");
    };
    assert_eq!(error.code(), "23514");
    assert_eq!(read(&node, "refused").await, (None, ReadOutcome::Filled));
    is_clean(&pool).await;
}

#[tokio::test]
async fn a_backend_that_is_killed_in_the_commit_leaves_the_outcome_unknown() {
    let (ground, node, pool) = node_and_pool().await;
    let killed = async {
        until("the commit waits", async || {
            count(&ground, "*", "wait_event = 'PgSleep'").await == 1
        })
        .await;
        kill(&ground).await;
    };
    let (unknown, ()) = tokio::join!(write(&node, &pool, "slow", "one"), killed);
    assert!(
        matches!(
            unknown,
            Err(WriteError::Indeterminate(Indeterminate::Store(_)))
        ),
        "{unknown:?}"
    );
    let (_, outcome) = read(&node, "slow").await;
    assert_eq!(outcome, ReadOutcome::Bypassed(Bypass::Intent));
    is_clean(&pool).await;
}

#[tokio::test]
async fn an_operation_that_takes_too_long_has_written_nothing_and_its_connection_is_closed() {
    let brief = Settings {
        write_timeout: Duration::from_millis(300),
        ..Settings::default()
    };
    let (_ground, node, pool) = node_and_pool_with(brief).await;
    let op = |mut tx: Transaction, _, ()| async move {
        put(&mut tx, "a", "one").await?;
        std::future::pending::<()>().await;
        Ok::<_, Failure>(tx.commit(()))
    };
    let late = node.cached.write(ROW.key("a")).transaction(&pool, op).await;
    assert!(
        matches!(late, Err(WriteError::Unavailable(Unavailable::TimedOut))),
        "{late:?}"
    );
    assert_eq!(read(&node, "a").await, (None, ReadOutcome::Filled));
    assert_eq!(pool.size(), 0, "its connection is closed");
    is_clean(&pool).await;
}

#[tokio::test]
async fn a_guard_that_refuses_starts_the_write_again_without_running_the_operation() {
    let (ground, node, pool) = node_and_pool().await;
    let before = node.cached.status().epoch.unwrap();
    let announced = node.cached.stats().intents;
    // The write is announced, and waits for the pool's only connection.
    let busy = pool.acquire().await.unwrap();
    let late = async {
        until("it is announced", async || {
            node.cached.stats().intents > announced
        })
        .await;
        let end = "SELECT next.number FROM writethrough.epoch AS now, \
                   LATERAL writethrough.propose(now.number, NULL, false) AS next";
        sql(&ground, end).await;
        drop(busy);
    };
    let runs = Arc::new(AtomicU64::new(0));
    let op = |mut tx: Transaction, _, runs: Arc<AtomicU64>| async move {
        put(&mut tx, "a", "one").await?;
        runs.fetch_add(1, Ordering::SeqCst);
        Ok::<_, Failure>(tx.commit(()))
    };
    let write = node.cached.write(ROW.key("a")).with(runs.clone());
    let (written, ()) = tokio::join!(write.transaction(&pool, op), late);
    assert!(written.unwrap().epoch > before);
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    assert_eq!(read(&node, "a").await.0.as_deref(), Some("one"));
    is_clean(&pool).await;
}

#[tokio::test]
async fn while_no_connection_of_the_pool_is_free_nothing_is_written() {
    let (_ground, node, pool) = node_and_pool().await;
    let busy = pool.acquire().await.unwrap();
    let written = write(&node, &pool, "a", "one").await;
    assert!(
        matches!(
            written,
            Err(WriteError::Unavailable(Unavailable::NoConnection(_)))
        ),
        "{written:?}"
    );
    assert_eq!(read(&node, "a").await, (None, ReadOutcome::Filled));
    drop(busy);
    write(&node, &pool, "a", "two").await.unwrap();
    assert_eq!(read(&node, "a").await, hit("two"));
}

/// `sqlx` knows of no transaction, so what looks like a savepoint to it is the end of the whole.
#[tokio::test]
async fn an_operation_that_ends_its_transaction_by_itself_costs_the_epoch() {
    let (_ground, node, pool) = node_and_pool().await;
    let before = node.cached.status().epoch.unwrap();
    let op = |mut tx: Transaction, slot, ()| async move {
        let mut inner = sqlx::Connection::begin(&mut *tx).await?;
        put(&mut inner, "a", "guarded").await?;
        inner.commit().await?;
        put(&mut tx, "a", "unguarded").await?;
        tx.cache(&slot, &"something else".to_owned());
        Ok::<_, Failure>(tx.commit(()))
    };
    let written = node.cached.write(ROW.key("a")).transaction(&pool, op).await;
    written.unwrap();
    assert_eq!(node.cached.stats().unguarded_writes, 1);
    assert!(node.cached.status().epoch.unwrap() > before);
    assert_eq!(read(&node, "a").await.0.as_deref(), Some("unguarded"));
}
