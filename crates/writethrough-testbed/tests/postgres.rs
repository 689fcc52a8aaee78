//! Every fault of a Postgres server does what its documentation says.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use writethrough_testbed::{Error, Postgres, Testbed, until};

/// Opens a session and leaves it idle.
async fn session(postgres: &Postgres) -> TcpStream {
    let mut stream = TcpStream::connect(postgres.addr()).await.unwrap();
    let words = b"\0\x03\0\0user\0labuser\0database\0items_db\0\0";
    stream.write_i32(words.len() as i32 + 4).await.unwrap();
    stream.write_all(words).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'R');
    stream
}

/// Reads until the server closes the session.
async fn wait_closed(mut stream: TcpStream) {
    let read =
        async { while matches!(stream.read(&mut [0; 4096]).await, Ok(length) if length > 0) {} };
    tokio::time::timeout(Duration::from_secs(5), read)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_killed_server_is_gone_and_comes_back_on_its_port_with_all_commits() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let url = postgres.url();
    postgres
        .run("CREATE TABLE t (n int); INSERT INTO t VALUES (1), (2)")
        .await
        .unwrap();
    let idle = session(&postgres).await;

    postgres.kill().await.unwrap();
    assert!(!postgres.is_up().await);
    wait_closed(idle).await;
    assert!(matches!(
        postgres.run("SELECT 1").await,
        Err(Error::Ended { .. })
    ));

    postgres.start().await.unwrap();
    assert!(postgres.is_up().await);
    assert_eq!(postgres.url(), url);
    assert_eq!(
        postgres
            .run("SELECT n, 'x' FROM t ORDER BY n")
            .await
            .unwrap(),
        "1|x\n2|x"
    );

    let idle = session(&postgres).await;
    postgres.restart().await.unwrap();
    wait_closed(idle).await;
    assert_eq!(postgres.run("SELECT count(*) FROM t").await.unwrap(), "2");

    postgres.stop().await.unwrap();
    assert!(!postgres.is_up().await);
}

#[tokio::test]
async fn a_paused_server_is_silent_and_goes_on_where_it_was() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let mut idle = session(&postgres).await;

    postgres.pause().await.unwrap();
    assert!(!postgres.is_up().await);
    // The session's own process is stopped, too: a query stays without an answer.
    idle.write_all(b"Q\0\0\0\x0dSELECT 1\0").await.unwrap();
    let mut rest = Vec::new();
    let silence = Duration::from_millis(200);
    let _ = tokio::time::timeout(silence, idle.read_to_end(&mut rest)).await;
    assert!(!rest.windows(8).any(|bytes| bytes == b"SELECT 1"));

    postgres.resume().await.unwrap();
    assert!(postgres.is_up().await);
    until("an answer", Duration::from_secs(5), || {
        let mut bytes = [0; 4096];
        let length = idle.try_read(&mut bytes).unwrap_or_default();
        rest.extend_from_slice(&bytes[..length]);
        let answered = rest.windows(8).any(|bytes| bytes == b"SELECT 1");
        async move { answered.then_some(()) }
    })
    .await
    .unwrap();

    // A paused server can be stopped, killed and dropped, too.
    postgres.pause().await.unwrap();
    postgres.restart().await.unwrap();
    postgres.pause().await.unwrap();
    postgres.kill().await.unwrap();
    postgres.start().await.unwrap();
    postgres.pause().await.unwrap();
}

#[tokio::test]
async fn connections_are_terminated_and_new_ones_are_welcome() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let (one, two) = (session(&postgres).await, session(&postgres).await);
    assert_eq!(postgres.terminate_connections().await.unwrap(), 2);
    wait_closed(one).await;
    wait_closed(two).await;
    assert_eq!(
        postgres
            .run("SELECT current_user || '@' || current_database()")
            .await
            .unwrap(),
        "labuser@items_db"
    );
}

#[tokio::test]
async fn servers_are_apart_and_refuse_bad_sql_in_words() {
    let testbed = Testbed::new().await.unwrap();
    let (one, two) = tokio::try_join!(testbed.postgres(), testbed.postgres()).unwrap();
    assert_ne!(one.port(), two.port());
    one.run("CREATE TABLE only_here ()").await.unwrap();
    let error = two.run("SELECT * FROM only_here").await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("relation \"only_here\" does not exist"),
        "{error}"
    );

    // Round trips are counted with this extension, where the machine has it.
    let installed =
        "SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_stat_statements'";
    if one.run(installed).await.unwrap() == "1" {
        let calls = "SELECT sum(calls) > 0 FROM pg_stat_statements";
        assert_eq!(one.run(calls).await.unwrap(), "t");
    }
}

#[tokio::test]
async fn a_dropped_server_leaves_no_process_and_no_shared_memory() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let lock_file = postgres
        .log_path()
        .with_file_name("data")
        .join("postmaster.pid");
    let lock_file = std::fs::read_to_string(lock_file).unwrap();
    let segment = lock_file
        .lines()
        .nth(6)
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .to_owned();
    let segments = || {
        let list = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
        let ids = list
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().nth(1));
        ids.map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(segments().contains(&segment));
    let pid = postgres.pid().unwrap();
    drop(postgres);
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert!(!segments().contains(&segment));
}
