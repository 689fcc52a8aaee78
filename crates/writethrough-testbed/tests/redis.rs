//! Every fault of a Redis server does what its documentation says.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::time::Duration;

use writethrough_testbed::{Error, Redis, Testbed};

async fn get(redis: &Redis, key: &str) -> Option<String> {
    redis.query(&["GET", key]).await.unwrap()
}

async fn set(redis: &Redis, key: &str, value: &str) {
    redis.command(&["SET", key, value]).await.unwrap();
}

#[tokio::test]
async fn a_killed_server_is_gone_and_comes_back_on_its_port_with_what_it_saved() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let (port, run_id) = (redis.port(), redis.run_id().await.unwrap());
    set(&redis, "k", "saved").await;
    redis.save().await.unwrap();
    set(&redis, "k", "not saved").await;

    redis.kill().await.unwrap();
    assert!(!redis.is_up().await);
    assert_eq!(redis.pid(), None);
    assert!(redis.command(&["PING"]).await.is_err());

    redis.start().await.unwrap();
    assert!(redis.is_up().await);
    assert_eq!(redis.port(), port);
    assert_ne!(redis.run_id().await.unwrap(), run_id);
    assert_eq!(get(&redis, "k").await.as_deref(), Some("saved"));

    redis.restart_empty().await.unwrap();
    assert_eq!(redis.query::<u64>(&["DBSIZE"]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_server_restarted_from_an_old_snapshot_shows_old_data_under_a_new_run_id() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    set(&redis, "k", "old").await;
    let snapshot = redis.snapshot().await.unwrap();
    set(&redis, "k", "new").await;
    redis.save().await.unwrap();
    let run_id = redis.run_id().await.unwrap();

    redis.restart_from(&snapshot).await.unwrap();
    assert_eq!(get(&redis, "k").await.as_deref(), Some("old"));
    assert_ne!(redis.run_id().await.unwrap(), run_id);

    redis.stop().await.unwrap();
    assert!(!redis.is_up().await);
}

#[tokio::test]
async fn a_paused_server_is_silent_and_forgets_nothing() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    set(&redis, "k", "v").await;
    let run_id = redis.run_id().await.unwrap();

    redis.pause().await.unwrap();
    assert!(!redis.is_up().await);
    redis.resume().await.unwrap();
    assert_eq!(redis.run_id().await.unwrap(), run_id);
    assert_eq!(get(&redis, "k").await.as_deref(), Some("v"));

    redis.flush().await.unwrap();
    assert_eq!(get(&redis, "k").await, None);

    // A paused server can be killed and dropped, too.
    redis.pause().await.unwrap();
    redis.restart_empty().await.unwrap();
    redis.pause().await.unwrap();
}

#[tokio::test]
async fn a_lagging_replica_that_is_promoted_lacks_the_last_writes() {
    let testbed = Testbed::new().await.unwrap();
    let primary = testbed.redis().await.unwrap();
    set(&primary, "k", "first").await;
    let replica = testbed.redis_replica_of(&primary).await.unwrap();
    assert_eq!(get(&replica, "k").await.as_deref(), Some("first"));
    let refused = replica.command(&["SET", "k", "v"]).await;
    assert!(
        matches!(&refused, Err(Error::Refused { answer, .. }) if answer.starts_with("READONLY You")),
        "{refused:?}"
    );

    replica.freeze_replication().unwrap();
    set(&primary, "k", "second").await;
    assert_eq!(get(&replica, "k").await.as_deref(), Some("first"));
    replica.thaw_replication().unwrap();
    replica.wait_caught_up_with(&primary).await.unwrap();
    assert_eq!(get(&replica, "k").await.as_deref(), Some("second"));

    replica.freeze_replication().unwrap();
    set(&primary, "k", "lost").await;
    primary.kill().await.unwrap();
    replica.promote().await.unwrap();
    assert_eq!(get(&replica, "k").await.as_deref(), Some("second"));
    set(&replica, "k", "third").await;

    // The old primary comes back as a replica of the new one.
    primary.start().await.unwrap();
    primary.replicate(&replica).await.unwrap();
    assert_eq!(get(&primary, "k").await.as_deref(), Some("third"));

    // A replica is one still after a restart, and takes its primary's data.
    primary.restart_empty().await.unwrap();
    primary.wait_caught_up_with(&replica).await.unwrap();
    assert_eq!(get(&primary, "k").await.as_deref(), Some("third"));
}

#[tokio::test]
async fn a_server_with_little_memory_evicts() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let used: u64 = redis.info("memory").await.unwrap()["used_memory"]
        .parse()
        .unwrap();
    redis
        .set_maxmemory(used + 256 * 1024, "allkeys-lru")
        .await
        .unwrap();
    let value = "v".repeat(4096);
    for number in 0..200 {
        set(&redis, &format!("k{number}"), &value).await;
    }
    assert_ne!(redis.info("stats").await.unwrap()["evicted_keys"], "0");
}

#[tokio::test]
async fn many_servers_start_at_once_on_ports_of_their_own() {
    let testbed = Testbed::new().await.unwrap();
    let (a, b, c) = tokio::try_join!(testbed.redis(), testbed.redis(), testbed.redis()).unwrap();
    let mut ports = vec![a.port(), b.port(), c.port()];
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 3);
    assert!(a.addr().ip().is_loopback());

    // The handles may outlive the testbed; their servers do not.
    drop(testbed);
    assert!(!a.is_up().await);
    assert!(a.start().await.is_err());
    let error = tokio::time::timeout(Duration::from_secs(1), b.command(&["PING"]))
        .await
        .unwrap();
    assert!(error.is_err());
}
