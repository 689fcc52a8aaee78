//! The fence in Postgres on real servers: another history of the database, a step back, and what the
//! guard rests on.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and shows its figures"
)]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::{Driver, Ground, Node, Pair, ROW, Store, pool_of, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use writethrough::fence::UnfitDatabase;
use writethrough::{Indeterminate, ReadOutcome, Settings, WriteError};
use writethrough_testbed::{Link, Postgres, Testbed};

/// Runs each case on the fence of each driver.
macro_rules! on_each_driver {
    ($($case:ident),+ $(,)?) => {
        on_each_driver! { @ tokio_postgres TokioPostgres $($case),+ }
        on_each_driver! { @ sqlx Sqlx $($case),+ }
    };
    (@ $module:ident $driver:ident $($case:ident),+) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    super::$case(super::Driver::$driver).await;
                }
            )+
        }
    };
}

on_each_driver!(
    what_a_failover_has_lost_is_not_served_from_the_cache,
    a_database_to_which_connecting_takes_longer_than_a_poll_may_is_polled_all_the_same,
    a_fence_whose_role_may_not_change_the_row_says_so,
    a_primary_that_turned_read_only_is_seen_in_the_status,
    a_server_whose_locks_work_passes_its_test,
    a_server_whose_locks_lock_nothing_is_refused_with_the_reason,
);

/// A primary that a standby follows, and one link to whoever is the primary: as behind a name or a
/// list of hosts.
struct Failover {
    ground: Ground,
    standby: Postgres,
    link: Link,
    _testbed: Testbed,
}

impl Failover {
    async fn new(driver: Driver) -> Self {
        let ground = Ground::with_own_postgres(driver.with_redis()).await;
        let primary = ground.own_postgres.as_ref().unwrap();
        let testbed = Testbed::new().await.unwrap();
        let standby = testbed.postgres_standby_of(primary).await.unwrap();
        let link = testbed.link(primary.addr()).await.unwrap();
        Self {
            ground,
            standby,
            link,
            _testbed: testbed,
        }
    }

    fn primary(&self) -> &Postgres {
        self.ground.own_postgres.as_ref().unwrap()
    }

    /// Waits until the standby has all that was written.
    async fn standby_follows(&self) {
        let follows = self.standby.wait_caught_up_with(self.primary());
        follows.await.unwrap();
    }

    /// The standby takes over with what it has; the link leads to it from now on.
    async fn promote(&self) {
        self.standby.promote().await.unwrap();
        self.link.retarget(self.standby.addr());
        self.link.reset();
    }

    /// A node that reaches its database, for items and for the epoch, through the link.
    async fn node(&self) -> Node {
        let url = self.link.url_for(&self.primary().url());
        let fence = self.ground.pair.driver().fence(&url);
        let settings = Settings::default();
        let mut node = self.ground.start(settings, self.ground.cache(), fence);
        node.store = Store {
            pool: Some(pool_of(&url, 8)),
            ..Store::in_memory()
        };
        until("the cache is in use", async || node.cached.uses_cache()).await;
        node
    }
}

/// A value as the store has it, over a connection that may have to be made anew.
async fn in_store(postgres: &Postgres, id: &str) -> Option<String> {
    let query = format!("SELECT value FROM rows WHERE key = '{id}'");
    let answer = postgres.run(&query).await.unwrap();
    (!answer.is_empty()).then_some(answer)
}

/// A standby that lacks the last write is promoted. The row that it has is that of an epoch whose
/// values are in Redis, the lost one among them; under its number alone every node, one that starts
/// afterwards too, would serve the lost value as a hit until the TTL.
async fn what_a_failover_has_lost_is_not_served_from_the_cache(driver: Driver) {
    let failover = Failover::new(driver).await;
    let nodes = [failover.node().await, failover.node().await];
    nodes[0].write("a", Some("kept")).await.unwrap();
    failover.standby_follows().await;
    failover.standby.replication_link().unwrap().stall();
    nodes[0].write("a", Some("lost")).await.unwrap();
    assert_eq!(nodes[1].read("a").await.outcome, ReadOutcome::Hit);
    let before = nodes[0].cached.status();

    failover.primary().kill().await.unwrap();
    failover.promote().await;
    assert_eq!(
        in_store(&failover.standby, "a").await.as_deref(),
        Some("kept")
    );
    let late = failover.node().await;
    let all = [&nodes[0], &nodes[1], &late];
    for node in all {
        until("the node uses the cache in the new history", async || {
            let status = node.cached.status();
            status.history != before.history && node.cached.uses_cache()
        })
        .await;
        // Twice: from the database, and what that read has filled.
        for _ in 0..2 {
            assert_eq!(node.value("a").await.as_deref(), Some("kept"));
        }
        assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
        assert!(node.cached.status().epoch > before.epoch);
    }
    late.write("a", Some("new")).await.unwrap();
    for node in all {
        assert_eq!(node.value("a").await.as_deref(), Some("new"));
    }
}

/// Two primaries and one Redis: what is filled on the isolated side would be a hit on the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_primaries_share_no_key() {
    let failover = Failover::new(Driver::TokioPostgres).await;
    let isolated = failover.ground.node().await;
    let moved = failover.node().await;
    isolated.write("a", Some("common")).await.unwrap();
    failover.standby_follows().await;
    let before = moved.cached.status();
    failover.promote().await;
    until("the other side is in its own history", async || {
        moved.cached.status().history != before.history && moved.cached.uses_cache()
    })
    .await;
    assert_eq!(isolated.cached.status().history, before.history);
    isolated.write("a", Some("isolated")).await.unwrap();
    moved.write("a", Some("moved")).await.unwrap();
    isolated.cached.clear(&ROW).await.unwrap();
    for (node, value) in [(&isolated, "isolated"), (&moved, "moved")] {
        for _ in 0..3 {
            assert_eq!(node.value("a").await.as_deref(), Some(value));
        }
    }
}

/// Before anybody has begun the new history, the promoted server's row still names the old epoch: the
/// guard must not let a write of that epoch pass.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guard_refuses_a_row_of_another_history() {
    let ground = Ground::with_own_postgres(Pair::MemoryPostgres).await;
    let primary = ground.own_postgres.as_ref().unwrap();
    let testbed = Testbed::new().await.unwrap();
    let standby = testbed.postgres_standby_of(primary).await.unwrap();
    standby.wait_caught_up_with(primary).await.unwrap();
    let guard = "SELECT writethrough.guard(number) FROM writethrough.epoch";
    assert_eq!(primary.run(guard).await.unwrap(), "t");
    standby.promote().await.unwrap();
    let refused = standby.run(guard).await.unwrap_err().to_string();
    assert!(
        refused.contains("another history of the database"),
        "{refused}"
    );
    let propose = "SELECT number FROM writethrough.propose(
        (SELECT number FROM writethrough.epoch), NULL, false)";
    let number = standby.run(propose).await.unwrap();
    assert_eq!(
        number,
        primary
            .run("SELECT number FROM writethrough.epoch")
            .await
            .unwrap()
    );
    let begin = "SELECT in_its_history FROM writethrough.begin_history(
        (SELECT number FROM writethrough.epoch), 0, 1 << 20)";
    assert_eq!(standby.run(begin).await.unwrap(), "t");
    assert_eq!(standby.run(guard).await.unwrap(), "t");
}

/// A copy of the data folder without recovery keeps its timeline; the number went back.
/// A writer without an epoch runs the same statements: with null the guard answers once, and checks nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_null_in_place_of_an_epoch_the_documented_statements_write_unguarded() {
    let ground = Ground::new(Pair::MemoryPostgres).await;
    let pool = ground.store.pool.as_ref().unwrap();
    let client = pool.get().await.unwrap();
    let insert = "INSERT INTO rows (key, value) SELECT 'a', 'one' FROM writethrough.guard($1)";
    let delete = "DELETE FROM rows USING writethrough.guard($1) WHERE key = 'a'";
    for statement in [insert, delete] {
        let over = client.execute(statement, &[&0_i64]).await.unwrap_err();
        assert_eq!(over.code().unwrap().code(), "WT001", "{statement}");
        let changed = client.execute(statement, &[&None::<i64>]).await.unwrap();
        assert_eq!(changed, 1, "{statement}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_that_goes_back_begins_a_new_history() {
    let ground = Ground::with_own_postgres(Pair::RedisPostgres).await;
    let postgres = ground.own_postgres.as_ref().unwrap();
    let node = ground.node().await;
    node.write("a", Some("lost")).await.unwrap();
    let before = node.cached.status();
    postgres
        .run(
            "UPDATE rows SET value = 'restored';
             UPDATE writethrough.epoch SET number = number - 1",
        )
        .await
        .unwrap();
    until("the cache is used again", async || {
        node.cached.status().history != before.history && node.cached.uses_cache()
    })
    .await;
    assert!(node.cached.status().epoch > before.epoch);
    assert_eq!(node.value("a").await.as_deref(), Some("restored"));
    node.write("a", Some("new")).await.unwrap();
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
}

/// A promotion while writers and readers are at it: the old primary dies, the standby lacks what was
/// written last. A read that begins when the new history is in use returns what the database has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_under_load_leaves_nothing_stale() {
    let failover = Failover::new(Driver::TokioPostgres).await;
    let nodes = [failover.node().await, failover.node().await];
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let keys: Vec<String> = (0..10).map(|key| format!("k{key}")).collect();
    for key in &keys {
        nodes[0].write(key, Some("first")).await.unwrap();
    }
    failover.standby_follows().await;
    let workers: Vec<_> = (0..8)
        .map(|worker| {
            let (node, stop) = (nodes[worker % 2].clone(), stop.clone());
            let keys = keys.clone();
            tokio::spawn(async move {
                let mut writes = 0_u32;
                while !stop.load(Ordering::SeqCst) {
                    let key = &keys[fastrand::usize(..keys.len())];
                    let value = format!("{worker}-{writes}");
                    // Postgres is away for a moment, and says so.
                    let _ = node.write(key, Some(&value)).await;
                    let load = || async { load_or_fail(&node.store, key).await };
                    let _ = node.cached.read(&ROW.key(key.as_str()), load).await;
                    writes += 1;
                }
                writes
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    failover.standby.replication_link().unwrap().stall();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = nodes[0].cached.status();
    failover.primary().kill().await.unwrap();
    failover.promote().await;
    until("both nodes use the cache in the new history", async || {
        nodes
            .iter()
            .all(|node| node.cached.status().history != before.history && node.cached.uses_cache())
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    stop.store(true, Ordering::SeqCst);
    let mut writes = 0;
    for worker in workers {
        writes += worker.await.unwrap();
    }
    println!("{writes} writes tried");
    for key in &keys {
        let stored = in_store(&failover.standby, key).await;
        for node in &nodes {
            for _ in 0..2 {
                assert_eq!(node.value(key).await, stored, "{key}");
            }
        }
    }
}

async fn load_or_fail(store: &Store, key: &str) -> Result<Option<String>, support::StoreError> {
    let failed = |error: String| support::StoreError(error);
    let pool = store.pool.as_ref().unwrap();
    let client = pool
        .get()
        .await
        .map_err(|error| failed(error.to_string()))?;
    let row = client
        .query_opt("SELECT value FROM rows WHERE key = $1", &[&key])
        .await
        .map_err(|error| failed(error.to_string()))?;
    Ok(row.map(|row| row.get(0)))
}

/// Passes everything on to a server, except that the answer to each execution of a prepared statement
/// is an error of the proxy's own: the server has carried the statement out.
async fn answers_with(error: &'static [&'static str], server: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = move |client: TcpStream| async move {
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) =
            TcpStream::connect(server).await.unwrap().into_split();
        let executed = Arc::new(AtomicBool::new(false));
        let seen = executed.clone();
        let forth = async move {
            let mut bytes = vec![0; 65536];
            while let Ok(length @ 1..) = from_client.read(&mut bytes).await {
                // Of the messages here only one that executes begins with Bind.
                seen.fetch_or(bytes[0] == b'B', Ordering::SeqCst);
                to_server.write_all(&bytes[..length]).await.unwrap();
            }
        };
        let back = async move {
            let mut bytes = vec![0; 65536];
            while let Ok(length @ 1..) = from_server.read(&mut bytes).await {
                let mut answer = bytes[..length].to_vec();
                if executed.load(Ordering::SeqCst) {
                    let fields = format!("{}\0\0", error.join("\0"));
                    answer = vec![b'E'];
                    answer.extend((fields.len() as u32 + 4).to_be_bytes());
                    answer.extend(fields.bytes());
                    // ReadyForQuery, for those errors that do not end a session.
                    answer.extend(b"Z\0\0\0\x05I");
                    to_client.write_all(&answer).await.unwrap();
                    return;
                }
                to_client.write_all(&answer).await.unwrap();
            }
        };
        tokio::join!(forth, back);
    };
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(serve(client));
        }
    });
    address
}

/// A server that shuts down, or a pooler that loses it, answers the statement with an error while the
/// row is committed. Called "refused", the announcement would be taken away at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_that_says_nothing_about_the_commit_leaves_the_outcome_unknown() {
    const ERRORS: [&[&str]; 5] = [
        &["SFATAL", "VFATAL", "C57P01", "Mterminating connection"],
        &["SFATAL", "C57P01", "Mfrom a server without the field V"],
        &["SPANIC", "VPANIC", "C57P02", "Mcrash"],
        &[
            "SERROR",
            "VERROR",
            "C08P01",
            "Mserver closed, said the pooler",
        ],
        &["SERROR", "VERROR", "C40003", "Mcompletion unknown"],
    ];
    let ground = Ground::with_own_postgres(Pair::MemoryPostgres).await;
    let postgres = ground.own_postgres.as_ref().unwrap();
    let mut node = ground.node().await;
    for (number, error) in ERRORS.into_iter().enumerate() {
        let proxy = answers_with(error, postgres.addr()).await;
        let (old, new) = (postgres.addr().to_string(), proxy.to_string());
        node.store.pool = Some(pool_of(&postgres.url().replace(&old, &new), 2));
        let id = format!("row {number}");
        let outcome = node.write(&id, Some("committed")).await;
        assert!(
            matches!(
                outcome,
                Err(WriteError::Indeterminate(Indeterminate::Store(_)))
            ),
            "{error:?}: {outcome:?}"
        );
        until("the row is there", async || {
            in_store(postgres, &id).await.is_some()
        })
        .await;
    }
    let error = &["SERROR", "VERROR", "C23505", "Mduplicate key"];
    let proxy = answers_with(error, postgres.addr()).await;
    let (old, new) = (postgres.addr().to_string(), proxy.to_string());
    node.store.pool = Some(pool_of(&postgres.url().replace(&old, &new), 2));
    let outcome = node.write("refused", Some("x")).await;
    assert!(
        matches!(outcome, Err(WriteError::Rejected(_))),
        "{outcome:?}"
    );
}

/// It can read the epoch row and not change it, so it would stay without the cache for ever, and its
/// polls succeed.
/// Each poll that found no connection began to make one and was given up before it had its answer, so
/// the next one found none either: the lease was never renewed, and no read could use or fill the cache.
async fn a_database_to_which_connecting_takes_longer_than_a_poll_may_is_polled_all_the_same(
    driver: Driver,
) {
    let ground = Ground::with_own_postgres(driver.with_redis()).await;
    let postgres = ground.own_postgres.as_ref().unwrap();
    let testbed = Testbed::new().await.unwrap();
    let link = testbed.link(postgres.addr()).await.unwrap();
    let settings = Settings {
        poll_timeout: Duration::from_millis(250),
        ..Settings::default()
    };
    let fence = driver.fence(&link.url_for(&postgres.url()));
    let node = ground.start(settings, ground.cache(), fence);
    until("the cache is in use", async || node.cached.uses_cache()).await;
    node.write("a", Some("value")).await.unwrap();
    until("a read hits", async || {
        node.read("a").await.outcome == ReadOutcome::Hit
    })
    .await;
    // A round of 100 ms for the connection, one for the statement, one for the answer.
    link.delay(Duration::from_millis(50));
    link.reset();
    until("its connections are gone", async || {
        node.cached.status().fence_error.is_some()
    })
    .await;
    until("it is polled again, and a read hits", async || {
        let hit = node.read("a").await.outcome == ReadOutcome::Hit;
        hit && node.cached.status().fence_error.is_none()
    })
    .await;
    node.cached.shutdown().await;
}

async fn a_fence_whose_role_may_not_change_the_row_says_so(driver: Driver) {
    let ground = Ground::with_own_postgres(driver.with_redis()).await;
    let postgres = ground.own_postgres.as_ref().unwrap();
    postgres
        .run(
            "CREATE ROLE reader LOGIN;
             GRANT USAGE ON SCHEMA writethrough TO reader;
             GRANT SELECT ON ALL TABLES IN SCHEMA writethrough TO reader;
             GRANT INSERT, UPDATE, DELETE ON writethrough.self_test TO reader",
        )
        .await
        .unwrap();
    let url = postgres.url().replace("labuser", "reader");
    let fence = driver.fence(&url);
    let node = ground.start(Settings::default(), ground.cache(), fence);
    until("it is said", async || {
        let status = node.cached.status();
        status
            .refused_change
            .is_some_and(|reason| reason.contains("permission denied"))
            && status.fence_error.is_none()
    })
    .await;
    assert!(!node.cached.uses_cache());
    postgres
        .run("GRANT UPDATE ON writethrough.epoch TO reader")
        .await
        .unwrap();
    until("the cache is in use", async || node.cached.uses_cache()).await;
    assert_eq!(node.cached.status().refused_change, None);
}

/// Hits go on, so nothing else would tell that no write can succeed.
async fn a_primary_that_turned_read_only_is_seen_in_the_status(driver: Driver) {
    let ground = Ground::with_own_postgres(driver.with_memory()).await;
    let postgres = ground.own_postgres.as_ref().unwrap();
    let node = ground.node().await;
    node.write("a", Some("kept")).await.unwrap();
    let read_only = async |value: &str| {
        let set = format!("ALTER SYSTEM SET default_transaction_read_only = {value}");
        postgres.run(&set).await.unwrap();
        postgres.run("SELECT pg_reload_conf()").await.unwrap();
    };
    read_only("on").await;
    until("it is seen", async || {
        let reason = node.cached.status().refused_change;
        reason.is_some_and(|reason| reason.contains("the database is read-only"))
    })
    .await;
    let outcome = node.write("a", Some("refused")).await;
    assert!(
        matches!(outcome, Err(WriteError::Rejected(_))),
        "{outcome:?}"
    );
    assert_eq!(node.value("a").await.as_deref(), Some("kept"));
    read_only("off").await;
    until("it is over", async || {
        node.cached.status().refused_change.is_none()
    })
    .await;
    // Each connection of the pool learns it by itself.
    until("writes succeed", async || {
        node.write("a", Some("written")).await.is_ok()
    })
    .await;
}

async fn a_server_whose_locks_work_passes_its_test(driver: Driver) {
    let ground = Ground::with_own_postgres(driver.with_memory()).await;
    let postgres = ground.own_postgres.as_ref().unwrap();
    driver.self_test(&postgres.url()).await.unwrap();
    let left = postgres
        .run("SELECT count(*) FROM writethrough.self_test")
        .await;
    assert_eq!(left.unwrap(), "0");
}

/// An engine that answers the functions and locks nothing, and one whose functions go on with the
/// snapshot that they began with.
async fn a_server_whose_locks_lock_nothing_is_refused_with_the_reason(driver: Driver) {
    let ground = Ground::with_own_postgres(driver.with_memory()).await;
    let postgres = ground.own_postgres.as_ref().unwrap();
    // Found before pg_catalog, as such an engine's own functions would be.
    let silenced = "
        CREATE SCHEMA silent;
        CREATE FUNCTION silent.pg_advisory_xact_lock(bigint) RETURNS void LANGUAGE sql AS '';
        CREATE FUNCTION silent.pg_advisory_xact_lock_shared(bigint) RETURNS void LANGUAGE sql AS '';
        ALTER ROLE labuser SET search_path = silent, pg_catalog, public";
    postgres.run(silenced).await.unwrap();
    let refused = driver.self_test(&postgres.url()).await;
    assert!(
        matches!(refused, Err(UnfitDatabase::NoLocks)),
        "{refused:?}"
    );

    // The node that meets such a server neither caches nor writes, and says why.
    let fence = driver.fence(&postgres.url());
    let reason = fence.poll().await.unwrap_err().to_string();
    assert!(reason.contains("advisory locks lock nothing"), "{reason}");

    postgres
        .run(
            "ALTER ROLE labuser RESET search_path;
             CREATE OR REPLACE FUNCTION writethrough.self_test_guard(tested bigint) RETURNS bigint
             LANGUAGE sql VOLATILE AS $$
                 SELECT number FROM writethrough.self_test,
                     (SELECT pg_advisory_xact_lock_shared(tested)) AS waited WHERE lock = tested
             $$",
        )
        .await
        .unwrap();
    // On a busy machine the one may be too late to wait for the other, which proves nothing: again then.
    let mut refused = Ok(());
    for _ in 0..100 {
        refused = driver.self_test(&postgres.url()).await;
        if refused.is_err() {
            break;
        }
    }
    assert!(
        matches!(refused, Err(UnfitDatabase::OldSnapshot)),
        "{refused:?}"
    );
}
