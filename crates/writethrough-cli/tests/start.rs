//! The start on a Postgres that is not as it should be: what may go away is waited for, and what does not
//! ends the start with one line.

#![allow(clippy::unwrap_used)]

#[path = "../../writethrough-service/tests/support/mod.rs"]
mod support;

use std::fs;
use std::time::Duration;

use support::{ApiClient, config, until};
use tokio::time::{Instant, timeout};
use tokio_postgres::Client;
use writethrough_lab::cluster::Serve;
use writethrough_service::config::{CacheBackend, Database};
use writethrough_service::server::Server;
use writethrough_service::store::postgres::{Connector, Lasts, PostgresStore};
use writethrough_testbed::Testbed;

/// The number of the lock under which the fence's migrations are made.
const LOCK: i64 = 0x7772_6974_6574_6801;

async fn connection(url: &str, name: &str) -> Client {
    Connector::new(url, name).unwrap().connect().await.unwrap()
}

/// Why a service that is started with this URL gives up, or nothing when it gets ready.
async fn refusal(url: &str) -> Option<String> {
    let config = config(Database::Postgres(url.to_owned()), CacheBackend::InProcess);
    let mut running = Server::start(config).await.unwrap();
    let client = ApiClient::new(format!("http://{}", running.addr()));
    let ready = until("the service is ready, or gives up", async || {
        (client.get("/readyz").await.status == 200).then_some(())
    });
    let refusal = tokio::select! {
        error = running.failed() => Some(error.to_string()),
        () = ready => None,
    };
    running.shutdown().await;
    refusal
}

/// Each of these was waited for without end.
#[tokio::test(flavor = "multi_thread")]
async fn what_only_somebody_can_mend_ends_the_start_with_the_setting_and_the_remedy() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let url = postgres.url();
    for statement in [
        "CREATE ROLE guest LOGIN PASSWORD 'right'",
        "CREATE DATABASE taken",
        "CREATE DATABASE newer",
        "CREATE DATABASE other",
        "CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0",
    ] {
        postgres.run(statement).await.unwrap();
    }
    let of = |database: &str| url.replace("/items_db", &format!("/{database}"));
    let taken = connection(&of("taken"), "test").await;
    let table = "CREATE TABLE items (sku text PRIMARY KEY); INSERT INTO items VALUES ('theirs')";
    taken.batch_execute(table).await.unwrap();
    for (database, change) in [
        (
            "newer",
            "INSERT INTO items_schema_history VALUES (9, 'add_colour', 'then', '1')",
        ),
        (
            "other",
            "UPDATE items_schema_history SET name = 'things', checksum = '1' WHERE version = 1",
        ),
    ] {
        let mut client = connection(&of(database), "test").await;
        PostgresStore::migrate(&mut client).await.unwrap();
        client.batch_execute(change).await.unwrap();
    }
    let access = "local all all trust\nhost all guest all scram-sha-256\nhost all all all trust\n";
    fs::write(postgres.run("SHOW hba_file").await.unwrap(), access).unwrap();
    postgres.run("SELECT pg_reload_conf()").await.unwrap();

    let guest = |password: &str| url.replace("labuser@", &format!("guest:{password}@"));
    let cases = [
        (
            guest("s3cret"),
            [
                "password authentication failed",
                "use the user and the password",
            ],
        ),
        (
            url.replace("labuser@", "nobody@"),
            ["role \"nobody\" does not exist", "use a user"],
        ),
        (
            of("nothing"),
            ["database \"nothing\" does not exist", "or create it"],
        ),
        (
            of("latin"),
            ["server_encoding is LATIN1", "CREATE DATABASE"],
        ),
        (guest("right"), ["permission denied", "GRANT CREATE"]),
        (
            of("taken"),
            [
                "relation \"items\" already exists",
                "use a database of its own",
            ],
        ),
        (
            of("newer"),
            ["V9__add_colour", "use a program that is as new"],
        ),
        (of("other"), ["V1__things", "another database"]),
    ];
    for (url, words) in cases {
        let begun = Instant::now();
        let line = refusal(&url).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5), "{line}");
        assert!(
            line.starts_with("--database (POSTGRES_URL, DATABASE_URL): "),
            "{line}"
        );
        assert!(!line.contains('\n') && !line.contains("s3cret"), "{line}");
        for word in words {
            assert_eq!(line.matches(word).count(), 1, "{word}: {line}");
        }
    }
    let theirs = taken.query_one("SELECT sku FROM items", &[]).await.unwrap();
    assert_eq!(theirs.get::<_, &str>(0), "theirs");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_process_ends_with_the_line() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let url = postgres.url().replace("/items_db", "/nothing");
    let serve = Serve::new("api", env!("CARGO_BIN_EXE_writethrough")).database(&url);
    let api = serve.start(&testbed).await.unwrap();
    let status = api.process().wait(Duration::from_secs(10)).await.unwrap();
    assert_eq!(status.code(), Some(2));
    let log = api.process().log().unwrap();
    let lines = log
        .lines()
        .filter(|line| line.starts_with("error: --database"));
    assert_eq!(lines.count(), 1, "{log}");
}

/// A schema of a newer version was refused whatever it had changed, so no version could be rolled back.
#[tokio::test(flavor = "multi_thread")]
async fn a_newer_schema_that_promises_to_be_compatible_is_used() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let mut client = connection(&postgres.url(), "test").await;
    PostgresStore::migrate(&mut client).await.unwrap();
    for history in ["items_schema_history", "writethrough_schema_history"] {
        let newer = format!("INSERT INTO {history} VALUES (9, 'x_compatible_from_2', 'then', '1')");
        client.batch_execute(&newer).await.unwrap();
    }
    assert_eq!(refusal(&postgres.url()).await, None);
}

/// With nothing to be done, a role needs no right to create anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_without_rights_to_create_starts_on_a_schema_that_is_there() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let mut client = connection(&postgres.url(), "test").await;
    PostgresStore::migrate(&mut client).await.unwrap();
    let grants = "CREATE ROLE guest LOGIN;
        GRANT SELECT ON items_schema_history, writethrough_schema_history TO guest;
        GRANT SELECT, INSERT, UPDATE, DELETE ON items TO guest;
        GRANT USAGE ON SCHEMA writethrough TO guest;
        GRANT SELECT, UPDATE ON writethrough.epoch TO guest;
        GRANT SELECT ON writethrough.row_seen TO guest;
        GRANT SELECT, INSERT, UPDATE, DELETE ON writethrough.self_test TO guest";
    client.batch_execute(grants).await.unwrap();
    let url = postgres.url().replace("labuser@", "guest@");
    assert_eq!(refusal(&url).await, None);
}

/// A lock of the session stayed behind in a pooler, and every node waited for it, silent and for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_held_migration_lock_is_told_with_its_holder_and_leaves_nobody_waiting() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let holder = connection(&postgres.url(), "forgotten").await;
    let pid: i32 = holder
        .query_one("SELECT pg_backend_pid()", &[])
        .await
        .unwrap()
        .get(0);
    let lock = format!("SELECT pg_advisory_lock({LOCK})");
    holder.batch_execute(&lock).await.unwrap();

    let mut client = connection(&postgres.url(), "test").await;
    let migration = PostgresStore::migrate(&mut client);
    let obstacle = timeout(Duration::from_secs(10), migration)
        .await
        .unwrap()
        .unwrap_err();
    let line = obstacle.to_string();
    for words in [&format!("process {pid} "), "`forgotten`", &LOCK.to_string()] {
        assert!(line.contains(words), "{line}");
    }
    assert_eq!(obstacle.lasts(), Lasts::AWhile);
    // Whoever gave up waits no more.
    let waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    assert_eq!(postgres.run(waiting).await.unwrap(), "0");
    drop(holder);
    until("the migrations are made", async || {
        let mut client = connection(&postgres.url(), "test").await;
        PostgresStore::migrate(&mut client).await.ok()
    })
    .await;

    // And with nothing to be done it is not needed.
    let holder = connection(&postgres.url(), "forgotten").await;
    holder.batch_execute(&lock).await.unwrap();
    PostgresStore::migrate(&mut client).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_start_at_once_migrate_once_and_leave_no_state_in_their_sessions() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(connection(&postgres.url(), "node").await);
    }
    let all = clients.iter_mut().map(PostgresStore::migrate);
    for outcome in futures::future::join_all(all).await {
        outcome.unwrap();
    }
    let made = "SELECT count(*) FROM items_schema_history";
    assert_eq!(postgres.run(made).await.unwrap(), "2");
    // In a pooler another client gets the session next.
    let held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
    assert_eq!(postgres.run(held).await.unwrap(), "0");
    for client in &clients {
        let row = client
            .query_one("SHOW statement_timeout", &[])
            .await
            .unwrap();
        assert_eq!(row.get::<_, &str>(0), "5s");
    }
}
