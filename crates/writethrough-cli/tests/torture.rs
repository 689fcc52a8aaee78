//! A short torture: the checker's nemesis against clusters of this very binary. In strict mode nothing may be found, under
//! faults of every kind; the textbook pattern must be caught, with faults and without.
//!
//! Every schedule is fixed by its seed; `writethrough check --cluster nodes=3` with the same options repeats it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;
use tokio::sync::Mutex;
use writethrough_check::history::{Header, History};
use writethrough_lab::cluster::{Cluster, Serve};
use writethrough_lab::nemesis::{Fault, audit};

/// One cluster at a time: a machine that is busy with several would break the bounds of each.
static ALONE: Mutex<()> = Mutex::const_new(());
const PATIENCE: Duration = Duration::from_secs(180);

/// Runs `writethrough check` on a cluster; returns its exit code and its JSON.
async fn check(arguments: &[&str]) -> (i32, Value) {
    let _alone = ALONE.lock().await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_writethrough"));
    command
        .args(["check", "--cluster", "nodes=3", "--json"])
        .args(arguments)
        .kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output()).await;
    let output = output.unwrap().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let problem = String::from_utf8_lossy(&output.stderr);
    let summary = serde_json::from_str(&text).unwrap_or_else(|error| {
        panic!("{error}: {text}\n{problem}");
    });
    (output.status.code().unwrap(), summary)
}

#[tokio::test]
async fn strict_keeps_every_promise_under_faults_of_every_kind() {
    let (code, summary) = check(&[
        "--duration",
        "50s",
        "--processes",
        "9",
        "--rate",
        "600",
        "--seed",
        "1",
        "--schedule-seed",
        "3",
        "--fault-length",
        "300ms..1500ms",
        "--gap",
        "300ms..900ms",
    ])
    .await;
    assert_eq!(summary["verdict"], "linearizable", "{summary:#}");
    assert_eq!(
        summary["promises_broken"].as_array().unwrap().len(),
        0,
        "{summary:#}"
    );
    assert_eq!(summary["audit"]["difference_count"], 0, "{summary:#}");
    assert_eq!(code, 0);
    let kinds = summary["fault_kinds"].as_array().unwrap().len();
    assert_eq!(kinds, Fault::ALL.len(), "{:#}", summary["fault_kinds"]);
    // Otherwise it would show nothing: a cache that is never used is never stale.
    assert!(summary["operations"].as_u64().unwrap() > 3_000);
    assert!(summary["cache_hits"].as_u64().unwrap() > 500);
}

/// The stale data last much longer than what a race alone leaves behind.
async fn the_textbook_is_caught_by(fault: &str) {
    let (code, summary) = check(&[
        "--consistency",
        "textbook",
        "--faults",
        fault,
        "--duration",
        "10s",
        "--processes",
        "6",
        "--rate",
        "150",
        "--seed",
        "1",
        "--schedule-seed",
        "1",
        "--fault-length",
        "1500ms",
        "--gap",
        "800ms",
    ])
    .await;
    assert_eq!(
        (code, &summary["verdict"]),
        (1, &Value::from("anomaly")),
        "{summary:#}"
    );
    let worst = summary["worst_staleness_ms"].as_f64().unwrap();
    assert!(worst > 300.0, "{fault}: {worst} ms");
}

#[tokio::test]
async fn the_textbook_is_caught_by_an_old_snapshot() {
    the_textbook_is_caught_by("restart-redis-old-snapshot").await;
}

#[tokio::test]
async fn the_textbook_is_caught_by_a_lagging_replica() {
    the_textbook_is_caught_by("lagging-failover").await;
}

#[tokio::test]
async fn the_textbook_is_caught_by_a_server_that_takes_over_other_data() {
    the_textbook_is_caught_by("take-over-redis").await;
}

#[tokio::test]
async fn the_textbook_is_caught_by_a_node_cut_off() {
    the_textbook_is_caught_by("node-cut-from-redis").await;
}

/// No fault at all: two writers, or a writer and a slow fill, are enough.
#[tokio::test]
async fn the_textbook_is_caught_by_plain_concurrency() {
    let (code, summary) = check(&[
        "--consistency",
        "textbook",
        "--faults",
        "none",
        "--ttl",
        "1",
        "--duration",
        "20s",
        "--seed",
        "1",
    ])
    .await;
    assert_eq!(
        (code, &summary["verdict"]),
        (1, &Value::from("anomaly")),
        "{summary:#}"
    );
    assert_eq!(summary["faults"].as_array().unwrap().len(), 0);
    assert!(summary["stale_reads"].as_u64().unwrap() > 0);
}

/// The audit's own test: what a node has cached is changed behind its back, and a row is removed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_audit_finds_a_planted_difference() {
    let _alone = ALONE.lock().await;
    let serve = Serve::new("node", env!("CARGO_BIN_EXE_writethrough"));
    let cluster = Cluster::behind_links(2, false, &serve).await.unwrap();
    cluster.wait_until_healthy().await.unwrap();
    let urls = cluster.urls();
    let history = History::new(Header::default());
    // Each item is cached by the first audit, if not by the one before.
    for _ in 0..3 {
        let found = audit(&history, &urls, cluster.postgres()).await.unwrap();
        assert!(found.agrees(), "{found:#?}");
        assert_eq!((found.items, found.reads), (3, 6));
    }
    let changes = [
        "UPDATE items SET price = 1.23 WHERE id = '550e8400-e29b-41d4-a716-446655440001'",
        "DELETE FROM items WHERE id = '550e8400-e29b-41d4-a716-446655440002'",
    ];
    let cached = wait_until_cached(&cluster, &history).await;
    assert!(cached, "the nodes never used the cache");
    for change in changes {
        cluster.postgres().run(change).await.unwrap();
    }
    let found = audit(&history, &urls, cluster.postgres()).await.unwrap();
    // The removed row is unknown to a history without operations; the changed one is served old by both.
    assert!(!found.agrees(), "{found:#?}");
    let first = &found.differences[0];
    assert!(
        first.key.ends_with("0001") && first.node == Some(0),
        "{first:?}"
    );
    assert!(first.expected.contains("1.23") && first.found.contains("19.99"));
}

/// Waits until both nodes answer all samples from the cache.
async fn wait_until_cached(cluster: &Cluster, history: &History) -> bool {
    for _ in 0..100 {
        let urls = cluster.urls();
        audit(history, &urls, cluster.postgres()).await.unwrap();
        let mut hits = 0;
        for url in &urls {
            for sample in 1..=3 {
                let url = format!("{url}/items/550e8400-e29b-41d4-a716-44665544000{sample}");
                let answer = reqwest::get(url).await.unwrap();
                let cache = answer.headers()["cache-status"].to_str().unwrap();
                hits += usize::from(cache.contains("hit"));
            }
        }
        if hits == 6 {
            return true;
        }
    }
    false
}
