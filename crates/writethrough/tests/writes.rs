//! The write path that users see, on real servers: what is committed, what is refused, and what is known
//! of a write that broke off, each with the state of the table, of the cache and of the pool after it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use deadpool_postgres::Pool;
use support::{Ground, Node, Pair, ROW, pool_of, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_postgres::SimpleQueryMessage;
use writethrough::postgres::{Statement, Transaction};
use writethrough::writing::set::Slot;
use writethrough::writing::{Commit, Guarded};
use writethrough::{
    Bypass, Indeterminate, OpError, ReadOutcome, Settings, Unavailable, WriteError, Written,
};

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

async fn read(node: &Node, id: &str) -> (Option<String>, ReadOutcome) {
    let read = node.read(id).await;
    (read.value, read.outcome)
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

/// A node on Postgres, with a pool of one connection for its writes. A row `refused` fails at COMMIT, and
/// a row `slow` keeps its COMMIT waiting.
async fn node_and_pool() -> (Ground, Node, Pool) {
    node_and_pool_with(Settings::default()).await
}

async fn node_and_pool_with(settings: Settings) -> (Ground, Node, Pool) {
    const AT_COMMIT: &str = "
        CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.key = 'refused' THEN RAISE EXCEPTION 'refused' USING ERRCODE = '23514'; END IF;
            IF NEW.key = 'slow' THEN PERFORM pg_sleep(60); END IF;
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT OR UPDATE ON rows
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION at_commit()";
    let ground = Ground::new(Pair::MemoryPostgres).await;
    sql(&ground, AT_COMMIT).await;
    let node = ground.node_with(settings).await;
    let pool = pool_for_writes(&ground, 1);
    (ground, node, pool)
}

fn pool_for_writes(ground: &Ground, size: usize) -> Pool {
    let url = ground.database.as_ref().unwrap();
    pool_of(&format!("{url}?application_name=writes"), size)
}

/// Runs a statement past the library, and returns the first column of its first row.
async fn sql(ground: &Ground, text: &str) -> Option<String> {
    let client = ground.store.pool.as_ref().unwrap().get().await.unwrap();
    let answer = client.simple_query(text).await.unwrap();
    answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    })
}

/// Waits until a connection of the pool for writes is in its COMMIT.
async fn commit_waits(ground: &Ground) {
    const SLEEPS: &str = "SELECT FROM pg_stat_activity \
                          WHERE datname = current_database() AND application_name = 'writes' AND wait_event = 'PgSleep'";
    let count = format!("SELECT count(*) FROM ({SLEEPS}) AS sleeps");
    until("the commit waits", async || {
        sql(ground, &count).await.as_deref() == Some("1")
    })
    .await;
}

/// Ends the connections of the pool for writes from the side of the server.
async fn kill(ground: &Ground) {
    const KILL: &str = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity \
                        WHERE datname = current_database() AND application_name = 'writes'";
    sql(ground, KILL).await.expect("there was a connection");
}

/// The pool's one connection is there again, and nothing of a transaction is left on it.
async fn is_clean(pool: &Pool) {
    let client = pool.get().await.unwrap();
    let look = "SELECT current_setting('writethrough.write', true)";
    let row = client.query_one(look, &[]).await.unwrap();
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
async fn without_a_connection_nothing_is_written() {
    let (_ground, node, _) = node_and_pool().await;
    // The port of a server that is not there.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = listener.local_addr().unwrap();
    drop(listener);
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(gone.port()).user("nobody");
    let manager = deadpool_postgres::Manager::new(config, tokio_postgres::NoTls);
    let pool = Pool::builder(manager).max_size(1).build().unwrap();
    let written = write(&node, &pool, "a", "one").await;
    let Err(WriteError::Unavailable(Unavailable::NoConnection(why))) = &written else {
        panic!("{written:?}");
    };
    let mut words = why.to_string();
    let mut cause = std::error::Error::source(why);
    while let Some(error) = cause {
        words.push_str(&error.to_string());
        cause = error.source();
    }
    assert!(words.contains("Connection refused"), "{words}");
    assert_eq!(read(&node, "a").await, (None, ReadOutcome::Filled));
}

#[tokio::test]
async fn a_backend_that_is_killed_before_the_commit_has_written_nothing() {
    let (ground, node, pool) = node_and_pool().await;
    let ground = Arc::new(ground);
    let op = |tx: Transaction, _, ground: Arc<Ground>| async move {
        put(&tx, "a", "one").await?;
        kill(&ground).await;
        put(&tx, "a", "two").await?;
        Ok::<_, Failure>(tx.commit(()))
    };
    let write_a = node.cached.write(ROW.key("a")).with(ground.clone());
    let refused = write_a.transaction(&pool, op).await;
    assert!(
        matches!(refused, Err(WriteError::Rejected(Failure::Database(_)))),
        "{refused:?}"
    );
    assert_eq!(read(&node, "a").await, (None, ReadOutcome::Filled));
    // The dead connection is not given back, and others are made.
    is_clean(&pool).await;
    // A pool whose connections died while nobody used them is no reason to fail.
    kill(&ground).await;
    write(&node, &pool, "a", "three").await.unwrap();
    assert_eq!(read(&node, "a").await, hit("three"));
}

#[tokio::test]
async fn a_backend_that_is_killed_in_the_commit_leaves_the_outcome_unknown() {
    let (ground, node, pool) = node_and_pool().await;
    let killed = async {
        commit_waits(&ground).await;
        kill(&ground).await;
    };
    let (unknown, ()) = tokio::join!(write(&node, &pool, "slow", "one"), killed);
    let Err(WriteError::Indeterminate(Indeterminate::Store(error))) = &unknown else {
        panic!("{unknown:?}");
    };
    assert_eq!(error.code(), "57P01");
    let (_, outcome) = read(&node, "slow").await;
    assert_eq!(outcome, ReadOutcome::Bypassed(Bypass::Intent));
    is_clean(&pool).await;
}

fn brief() -> Settings {
    Settings {
        write_timeout: Duration::from_millis(300),
        ..Settings::default()
    }
}

#[tokio::test]
async fn an_operation_that_takes_too_long_has_written_nothing() {
    let (ground, node, pool) = node_and_pool_with(brief()).await;
    let op = |tx: Transaction, _, ()| async move {
        put(&tx, "a", "one").await?;
        std::future::pending::<()>().await;
        Ok::<_, Failure>(tx.commit(()))
    };
    let late = node.cached.write(ROW.key("a")).transaction(&pool, op).await;
    assert!(
        matches!(late, Err(WriteError::Unavailable(Unavailable::TimedOut))),
        "{late:?}"
    );
    assert_eq!(read(&node, "a").await, (None, ReadOutcome::Filled));
    assert_eq!(pool.status().size, 0, "its connection is closed");
    until("its lock is let go", async || {
        let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
        sql(&ground, locks).await.as_deref() == Some("0")
    })
    .await;
}

#[tokio::test]
async fn a_commit_without_an_answer_leaves_the_outcome_unknown() {
    let (ground, node, _) = node_and_pool_with(brief()).await;
    let link = DeafLink::to(&ground).await;
    let op = |mut tx: Transaction, slot, link: Arc<DeafLink>| async move {
        let value = put(&tx, "a", "one").await?;
        tx.cache(&slot, &value);
        link.deaf.store(true, Ordering::SeqCst);
        Ok::<_, Failure>(tx.commit(()))
    };
    let write = node.cached.write(ROW.key("a")).with(link.clone());
    let unknown = write.transaction(&link.pool, op).await;
    assert!(
        matches!(
            unknown,
            Err(WriteError::Indeterminate(Indeterminate::TimedOut))
        ),
        "{unknown:?}"
    );
    assert_eq!(link.pool.status().size, 0, "its connection is closed");
    let (value, outcome) = read(&node, "a").await;
    assert_eq!(value.as_deref(), Some("one"), "it was made all the same");
    assert_eq!(outcome, ReadOutcome::Bypassed(Bypass::Intent));
}

/// A way to Postgres that counts how often the client waits for an answer, and can keep answers back.
struct DeafLink {
    pool: Pool,
    round_trips: AtomicU64,
    deaf: AtomicBool,
    /// The connection ends when something is sent, once.
    cut: AtomicBool,
}

impl DeafLink {
    /// With a pool of one connection that leads through it.
    async fn to(ground: &Ground) -> Arc<Self> {
        let url = ground.database.as_ref().unwrap();
        let config: tokio_postgres::Config = url.parse().unwrap();
        let server = SocketAddr::from(([127, 0, 0, 1], config.get_ports()[0]));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let link = Arc::new(Self {
            pool: pool_of(&url.replace(&server.to_string(), &address.to_string()), 1),
            round_trips: AtomicU64::new(0),
            deaf: AtomicBool::new(false),
            cut: AtomicBool::new(false),
        });
        let passing = link.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(server).await.unwrap();
                tokio::spawn(passing.clone().pass(client, server));
            }
        });
        link
    }

    async fn pass(self: Arc<Self>, client: TcpStream, server: TcpStream) {
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let waits = AtomicBool::new(false);
        let forth = async {
            let mut bytes = vec![0; 65536];
            while let Ok(length @ 1..) = from_client.read(&mut bytes).await {
                if self.cut.swap(false, Ordering::SeqCst) {
                    return;
                }
                if !waits.swap(true, Ordering::SeqCst) {
                    self.round_trips.fetch_add(1, Ordering::SeqCst);
                }
                to_server.write_all(&bytes[..length]).await.unwrap();
            }
        };
        let back = async {
            let mut bytes = vec![0; 65536];
            while let Ok(length @ 1..) = from_server.read(&mut bytes).await {
                if !self.deaf.load(Ordering::SeqCst) {
                    waits.store(false, Ordering::SeqCst);
                    let _ = to_client.write_all(&bytes[..length]).await;
                }
            }
        };
        tokio::select! { () = forth => {}, () = back => {} }
    }

    /// Counts the round trips of some work.
    async fn round_trips<T>(&self, work: impl Future<Output = T>) -> (u64, T) {
        let before = self.round_trips.load(Ordering::SeqCst);
        let answer = work.await;
        (self.round_trips.load(Ordering::SeqCst) - before, answer)
    }
}

#[tokio::test]
async fn a_transaction_of_one_statement_is_three_round_trips_and_a_single_statement_one() {
    let (ground, node, _) = node_and_pool().await;
    let link = DeafLink::to(&ground).await;
    for count in ["warms the pool", "is counted"] {
        let work = write(&node, &link.pool, "a", count);
        let (round_trips, written) = link.round_trips(work).await;
        written.unwrap();
        if count == "is counted" {
            assert_eq!(round_trips, 3, "BEGIN and the guard, the statement, COMMIT");
        }
        let work = write_at_once(&node, &link.pool, "a", count);
        let (round_trips, written) = link.round_trips(work).await;
        written.unwrap();
        assert_eq!(round_trips, 1, "it was prepared by the transaction before");
        assert_eq!(read(&node, "a").await, hit(count));
    }
}

/// Such a write in the form of a single statement.
async fn write_at_once(node: &Node, pool: &Pool, id: &str, value: &str) -> Outcome<()> {
    let context = (id.to_owned(), value.to_owned());
    let op = |statement: Statement, slot, (id, value): (String, String)| async move {
        let (row, mut done) = statement.query_one(PUT, &[&id, &value]).await?;
        done.cache(&slot, &row.get(0));
        Ok(done.commit(()))
    };
    let write = node.cached.write(ROW.key(id)).with(context);
    write.statement(pool, op).await
}

/// The epoch ends between the announcement of a write and its BEGIN.
async fn end_epoch(ground: &Ground) {
    const END: &str = "SELECT next.number FROM writethrough.epoch AS now, \
                       LATERAL writethrough.propose(now.number, NULL, false) AS next";
    sql(ground, END).await.unwrap();
}

#[tokio::test]
async fn a_guard_that_refuses_starts_the_write_again_without_running_the_operation() {
    for at_once in [false, true] {
        let (ground, node, pool) = node_and_pool().await;
        let before = node.cached.status().epoch.unwrap();
        let announced = node.cached.stats().intents;
        // The write is announced, and waits for the pool's only connection.
        let busy = pool.get().await.unwrap();
        let late = async {
            until("it is announced", async || {
                node.cached.stats().intents > announced
            })
            .await;
            end_epoch(&ground).await;
            drop(busy);
        };
        let written = async {
            if at_once {
                write_at_once(&node, &pool, "a", "one").await
            } else {
                let runs = Arc::new(AtomicU64::new(0));
                let op = |tx: Transaction, _, runs: Arc<AtomicU64>| async move {
                    put(&tx, "a", "one").await?;
                    runs.fetch_add(1, Ordering::SeqCst);
                    Ok::<_, Failure>(tx.commit(()))
                };
                let write = node.cached.write(ROW.key("a")).with(runs.clone());
                let written = write.transaction(&pool, op).await;
                assert_eq!(runs.load(Ordering::SeqCst), 1);
                written
            }
        };
        let (written, ()) = tokio::join!(written, late);
        assert!(written.unwrap().epoch > before, "{at_once}");
        assert_eq!(read(&node, "a").await.0.as_deref(), Some("one"));
        is_clean(&pool).await;
    }
}

#[tokio::test]
async fn the_session_of_a_transaction_is_made_safe_and_left_as_it_was() {
    let (ground, node, _) = node_and_pool().await;
    let url = ground.database.as_ref().unwrap();
    // What the session says, and what holds in the transaction.
    for (session, inside) in [
        ("0", "5s/5s/read committed"),
        ("70000", "5s/5s/read committed"),
        ("150", "150ms/5s/read committed"),
    ] {
        let options = format!(
            "?options=-c%20statement_timeout%3D{session}\
             %20-c%20default_transaction_isolation%3Dserializable"
        );
        let pool = pool_of(&format!("{url}{options}"), 1);
        let op = |tx: Transaction, (), ()| async move {
            let look = "SELECT concat_ws('/', current_setting('statement_timeout'), \
                        current_setting('idle_in_transaction_session_timeout'), \
                        current_setting('transaction_isolation'))";
            let settings: String = tx.query_one(look, &[]).await?.get(0);
            Ok::<_, Failure>(tx.commit(settings))
        };
        let seen = node.cached.write(()).transaction(&pool, op).await;
        assert_eq!(seen.unwrap().output, inside);
        let op = |statement: Statement, (), ()| async move {
            let look = "SELECT current_setting('statement_timeout')";
            let (row, done) = statement.query_one(look, &[]).await?;
            Ok::<_, Failure>(done.commit(row.get::<_, String>(0)))
        };
        let seen = node.cached.write(()).statement(&pool, op).await;
        assert!(inside.starts_with(&seen.unwrap().output), "{session}");
        let client = pool.get().await.unwrap();
        let look = "SELECT current_setting('statement_timeout')";
        let after: String = client.query_one(look, &[]).await.unwrap().get(0);
        let expected = match session {
            "0" => "0",
            "70000" => "70s",
            _ => "150ms",
        };
        assert_eq!(after, expected);
    }
}

#[tokio::test]
async fn an_operation_that_ends_its_transaction_by_itself_costs_the_epoch() {
    let (_ground, node, pool) = node_and_pool().await;
    let before = node.cached.status().epoch.unwrap();
    let op = |mut tx: Transaction, slot, ()| async move {
        put(&tx, "a", "guarded").await?;
        tx.client().batch_execute("COMMIT").await?;
        put(&tx, "a", "unguarded").await?;
        tx.cache(&slot, &"something else".to_owned());
        Ok::<_, Failure>(tx.commit(()))
    };
    let written = node.cached.write(ROW.key("a")).transaction(&pool, op).await;
    written.unwrap();
    assert_eq!(node.cached.stats().unguarded_writes, 1);
    assert!(node.cached.status().epoch.unwrap() > before);
    assert_eq!(read(&node, "a").await.0.as_deref(), Some("unguarded"));
}

#[tokio::test]
async fn a_value_under_the_slot_of_another_write_costs_the_epoch() {
    let (_ground, node, pool) = node_and_pool().await;
    let kept: Arc<Mutex<Option<Slot<String>>>> = Arc::default();
    let op = |tx: Transaction, slot, kept: Arc<Mutex<Option<Slot<String>>>>| async move {
        *kept.lock().unwrap() = Some(slot);
        Ok::<_, Failure>(tx.commit(()))
    };
    let first = node.cached.write(ROW.key("a")).with(kept.clone());
    first.transaction(&pool, op).await.unwrap();
    let before = node.cached.status().epoch.unwrap();
    let op = |mut tx: Transaction, _, kept: Arc<Mutex<Option<Slot<String>>>>| async move {
        let smuggled = kept.lock().unwrap().take().unwrap();
        tx.cache(&smuggled, &"never written".to_owned());
        Ok::<_, Failure>(tx.commit(()))
    };
    let second = node.cached.write(ROW.key("b")).with(kept);
    second.transaction(&pool, op).await.unwrap();
    assert_eq!(node.cached.stats().unannounced_writes, 1);
    assert!(node.cached.status().epoch.unwrap() > before);
    assert_eq!(read(&node, "a").await.0, None);
}

/// "cached plan must not change result type", and nothing else, has another try.
#[tokio::test]
async fn a_statement_that_was_prepared_before_the_schema_changed_is_prepared_anew() {
    let (ground, node, pool) = node_and_pool().await;
    let all = "UPDATE rows SET value = 'new' WHERE key = 'a' RETURNING *";
    write(&node, &pool, "a", "one").await.unwrap();
    for (column, at_once) in [("b", false), ("c", true)] {
        for change in [false, true] {
            if change {
                let alter = format!("ALTER TABLE rows ADD COLUMN {column} text");
                sql(&ground, &alter).await;
            }
            let columns = if at_once {
                let op = move |statement: Statement, _, ()| async move {
                    let (row, done) = statement.query_one(all, &[]).await?;
                    Ok::<_, Failure>(done.commit(row.len()))
                };
                node.cached.write(ROW.key("a")).statement(&pool, op).await
            } else {
                let op = move |tx: Transaction, _, ()| async move {
                    let row = tx.query_one(all, &[]).await?;
                    Ok::<_, Failure>(tx.commit(row.len()))
                };
                node.cached.write(ROW.key("a")).transaction(&pool, op).await
            };
            let expected = 2 + usize::from(change) + usize::from(at_once);
            assert_eq!(columns.unwrap().output, expected);
        }
    }
}

/// The write stands, so its keys are ended as those of a commit, and nothing stale is left.
#[tokio::test]
async fn an_error_after_a_single_statement_has_committed_leaves_the_write_and_caches_nothing() {
    let (_ground, node, pool) = node_and_pool().await;
    write_at_once(&node, &pool, "a", "one").await.unwrap();
    assert_eq!(read(&node, "a").await, hit("one"));
    let op = |statement: Statement, slot, ()| async move {
        let (row, mut done) = statement.query_one(PUT, &[&"a", &"two"]).await?;
        done.cache(&slot, &row.get(0));
        Err::<Commit<()>, _>(Failure::NoSuchRow)
    };
    let refused = node.cached.write(ROW.key("a")).statement(&pool, op).await;
    assert!(
        matches!(refused, Err(WriteError::Rejected(Failure::NoSuchRow))),
        "{refused:?}"
    );
    let read = read(&node, "a").await;
    assert_eq!(read, (Some("two".to_owned()), ReadOutcome::Filled));
    is_clean(&pool).await;
}

#[tokio::test]
async fn a_single_statement_that_fails_has_no_effect_whenever_it_fails() {
    let (ground, node, pool) = node_and_pool().await;
    // At the commit.
    let refused = write_at_once(&node, &pool, "refused", "one").await;
    let Err(WriteError::Rejected(error)) = &refused else {
        panic!("{refused:?}");
    };
    assert_eq!(error.code(), "23514");
    is_clean(&pool).await;
    // In the statement, when it is prepared, and before it is sent.
    for (text, value, code) in [
        ("UPDATE rows SET value = value || $1 || 1 / 0", "", "22012"),
        ("UPDATE no_rows SET value = $1", "", "42P01"),
        ("UPDATE rows SET value = $1::int8", "no number", "no code"),
    ] {
        let op = move |statement: Statement, _, ()| async move {
            let (_, done) = statement.execute(text, &[&value]).await?;
            Ok::<_, Failure>(done.commit(()))
        };
        let refused = node.cached.write(ROW.key("a")).statement(&pool, op).await;
        let Err(WriteError::Rejected(error)) = &refused else {
            panic!("{text}: {refused:?}");
        };
        assert_eq!(error.code(), code, "{text}");
        is_clean(&pool).await;
    }
    let rows = sql(&ground, "SELECT count(*) FROM rows").await;
    assert_eq!(rows.as_deref(), Some("0"));
}

#[tokio::test]
async fn a_single_statement_whose_backend_is_killed_in_the_commit_leaves_the_outcome_unknown() {
    let (ground, node, pool) = node_and_pool().await;
    let killed = async {
        commit_waits(&ground).await;
        kill(&ground).await;
    };
    let written = write_at_once(&node, &pool, "slow", "one");
    let (unknown, ()) = tokio::join!(written, killed);
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

/// A pool cannot know that a connection is dead before something is sent on it.
#[tokio::test]
async fn a_connection_that_is_dead_at_begin_is_replaced() {
    let (ground, node, _) = node_and_pool().await;
    let link = DeafLink::to(&ground).await;
    write(&node, &link.pool, "a", "one").await.unwrap();
    link.cut.store(true, Ordering::SeqCst);
    write(&node, &link.pool, "a", "two").await.unwrap();
    assert!(!link.cut.load(Ordering::SeqCst), "it was cut");
    assert_eq!(read(&node, "a").await, hit("two"));
}

/// Readers on two nodes, while one of them changes all rows at once, again and again: what a reader has
/// seen of a row is never followed by something older, and the cache is used again afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_bulk_statement_changes_is_never_read_old_again() {
    const ROWS: usize = 20;
    let ground = Ground::new(Pair::RedisPostgres).await;
    let (writer, other) = (ground.node().await, ground.node().await);
    let pool = pool_for_writes(&ground, 2);
    for id in 0..ROWS {
        let id = id.to_string();
        write(&writer, &pool, &id, "0").await.unwrap();
    }
    let acknowledged = Arc::new(AtomicU64::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = [&writer, &other, &other]
        .into_iter()
        .map(|node| {
            let (node, over) = (node.clone(), over.clone());
            let acknowledged = acknowledged.clone();
            tokio::spawn(async move {
                let (mut hits, mut newest) = (0_u64, [0_u64; ROWS]);
                while !over.load(Ordering::SeqCst) {
                    for (id, newest) in newest.iter_mut().enumerate() {
                        let least = acknowledged.load(Ordering::SeqCst).max(*newest);
                        let (value, outcome) = read(&node, &id.to_string()).await;
                        *newest = value.unwrap().parse().unwrap();
                        assert!(*newest >= least, "{newest} after {least}, {outcome:?}");
                        hits += u64::from(outcome == ReadOutcome::Hit);
                    }
                }
                hits
            })
        })
        .collect();
    let before = writer.cached.status().epoch.unwrap();
    for number in 1..=3_u64 {
        let op = |tx: Transaction, (), number: u64| async move {
            let all = "UPDATE rows SET value = $1";
            let count = tx.execute(all, &[&number.to_string()]).await?;
            Ok::<_, Failure>(tx.commit(count))
        };
        let bulk = writer.cached.write(ROW.whole()).with(number);
        let written = bulk.transaction(&pool, op).await.unwrap();
        acknowledged.store(number, Ordering::SeqCst);
        assert_eq!(written.output, ROWS as u64);
        assert!(written.epoch > before, "not in an epoch with a cache");
        until("the cache is used again", async || {
            writer.cached.uses_cache() && other.cached.uses_cache()
        })
        .await;
        until("and hit", async || {
            read(&other, "0").await == hit(&number.to_string())
        })
        .await;
    }
    over.store(true, Ordering::SeqCst);
    for reader in readers {
        assert!(reader.await.unwrap() > 0, "no hits were judged");
    }
}

#[tokio::test]
async fn a_store_of_ones_own_is_written_under_the_bare_guard() {
    for pair in [Pair::MemoryLocal, Pair::MemoryPostgres] {
        let ground = Ground::new(pair).await;
        let node = ground.node().await;
        for value in [Some("one"), None] {
            let op = move |mut guard: Guarded, slots, store: support::Store| async move {
                let (a, b) = slots;
                // A copy, for a store that keeps it elsewhere.
                store.put(&guard.guard(), "a", value).await?;
                store.put(&guard, "b", value).await?;
                for slot in [&a, &b] {
                    match value {
                        Some(value) => guard.cache(slot, &value.to_owned()),
                        None => guard.absent(slot),
                    }
                }
                Ok(guard.commit(()))
            };
            let both = (ROW.key("a"), ROW.key("b"));
            let write = node.cached.write(both).with(node.store.clone());
            write.guarded(op).await.unwrap();
            for id in ["a", "b"] {
                let expected = (value.map(str::to_owned), ReadOutcome::Hit);
                assert_eq!(read(&node, id).await, expected, "{pair:?}");
            }
        }
        let op = |_, _, ()| async { Err::<Commit<()>, _>(OpError::Rejected(Failure::NoSuchRow)) };
        let refused = node.cached.write(ROW.key("a")).guarded(op).await;
        assert!(matches!(refused, Err(WriteError::Rejected(_))));
        assert_eq!(node.cached.stats().unguarded_writes, 0);
        assert_eq!(read(&node, "a").await, (None, ReadOutcome::Filled));
    }
}

/// A whole server that dies in the middle of a COMMIT, and comes back.
#[tokio::test]
async fn a_server_that_is_killed_in_the_commit_leaves_the_outcome_unknown() {
    let ground = Ground::with_own_postgres(Pair::MemoryPostgres).await;
    let node = ground.node().await;
    let pool = pool_for_writes(&ground, 1);
    write(&node, &pool, "a", "one").await.unwrap();
    const SLOW: &str = "
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN PERFORM pg_sleep(60); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER slow AFTER UPDATE ON rows
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()";
    sql(&ground, SLOW).await;
    let postgres = ground.own_postgres.as_ref().unwrap();
    let killed = async {
        commit_waits(&ground).await;
        postgres.kill().await.unwrap();
    };
    let (unknown, ()) = tokio::join!(write(&node, &pool, "a", "two"), killed);
    assert!(
        matches!(
            unknown,
            Err(WriteError::Indeterminate(Indeterminate::Store(_)))
        ),
        "{unknown:?}"
    );
    postgres.start().await.unwrap();
    until("the server answers again", async || {
        let client = match ground.store.pool.as_ref().unwrap().get().await {
            Ok(client) => client,
            Err(_) => return false,
        };
        client.simple_query("SELECT").await.is_ok()
    })
    .await;
    let (value, outcome) = read(&node, "a").await;
    assert_eq!(value.as_deref(), Some("one"), "the crash took it back");
    assert!(matches!(outcome, ReadOutcome::Bypassed(_)), "{outcome:?}");
}
