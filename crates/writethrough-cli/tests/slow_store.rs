//! A store that is overloaded, and a cache that is emptied in that moment: the cache fills while the
//! overload lasts.
//!
//! A reader that breaks the lease of a load which takes longer than its own patience has that load's
//! fill refused, loads itself, and makes the store slower still; then the next reader does the same.
//! One second's stall of Postgres under load kept such a cache empty for as long as the load went on.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and shows its figures when it does"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use writethrough_lab::cluster::{Consistency, Serve};
use writethrough_testbed::{Testbed, until};

const PATIENCE: Duration = Duration::from_secs(20);
const ITEMS: usize = 20;
const CLIENTS: usize = 60;
const PAUSE: Duration = Duration::from_millis(100);
/// How long every answer of Postgres takes on its way.
const DELAY: Duration = Duration::from_millis(60);
/// How soon after the stall the cache must serve as much as before: what must not be is that it never
/// does. It takes three to eight seconds, as busy as the machine is.
const RECOVERY_SECONDS: usize = 20;

/// One load at a time: they would overload the machine, not only the store.
static ALONE: Mutex<()> = Mutex::const_new(());

/// What empties the cache while Postgres stalls.
#[derive(Debug, Clone, Copy)]
enum Emptied {
    Cleared,
    Restarted,
}

/// Hits in each second: three before the stall, and those after it.
async fn hits(consistency: Consistency, emptied: Emptied) -> (Vec<u64>, Vec<u64>) {
    let _alone = ALONE.lock().await;
    let testbed = Testbed::new().await.unwrap();
    let (postgres, redis) = tokio::join!(testbed.postgres(), testbed.redis());
    let (postgres, redis) = (postgres.unwrap(), redis.unwrap());
    let link = testbed.link(postgres.addr()).await.unwrap();
    let node = Serve::new("node", env!("CARGO_BIN_EXE_writethrough"))
        .consistency(consistency)
        .database(&link.url_for(&postgres.url()))
        .cache(&redis.url())
        .flag("--database-pool-size", "2");
    let node = node.start(&testbed).await.unwrap();
    let url = node.url();
    let client = Client::builder().timeout(PATIENCE).build().unwrap();
    until("the service is ready", PATIENCE, || async {
        let answer = client.get(format!("{url}/readyz")).send().await.ok()?;
        (answer.status() == StatusCode::OK).then_some(())
    })
    .await
    .unwrap_or_else(|error| panic!("{error}\n{}", node.process().log_tail(30)));
    let mut items = Vec::new();
    for number in 0..ITEMS {
        let body = json!({"name": number.to_string(), "price": 1});
        let created = client.post(format!("{url}/items")).json(&body).send().await;
        let item: Value = created.unwrap().json().await.unwrap();
        items.push(format!("{url}/items/{}", item["id"].as_str().unwrap()));
    }
    link.delay(DELAY);

    let (items, hits) = (Arc::new(items), Arc::new(AtomicU64::new(0)));
    let stop = Arc::new(AtomicBool::new(false));
    let mut readers = JoinSet::new();
    for reader in 0..CLIENTS {
        let (client, items, hits) = (client.clone(), items.clone(), hits.clone());
        let stop = stop.clone();
        readers.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let answer = client.get(&items[reader % ITEMS]).send().await.unwrap();
                let cache = answer.headers().get("cache-status");
                if cache.is_some_and(|cache| cache.as_bytes().ends_with(b"; hit")) {
                    hits.fetch_add(1, Ordering::Relaxed);
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
    }
    let second = async || {
        let before = hits.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(1)).await;
        hits.load(Ordering::Relaxed) - before
    };
    until("most reads hit", PATIENCE, || async {
        (second().await > 300).then_some(())
    })
    .await
    .unwrap_or_else(|error| panic!("{error}\n{}", node.process().log_tail(30)));
    let before = vec![second().await, second().await];
    link.stall();
    match emptied {
        Emptied::Cleared => {
            let clear = client.post(format!("{url}/cache/clear"));
            assert_eq!(clear.send().await.unwrap().status(), StatusCode::OK);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Emptied::Restarted => {
            redis.restart_empty().await.unwrap();
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
    link.heal();
    link.delay(DELAY);
    let mut after = Vec::new();
    while !recovered(&before, &after) && after.len() < RECOVERY_SECONDS {
        after.push(second().await);
    }
    stop.store(true, Ordering::Relaxed);
    while readers.join_next().await.is_some() {}
    println!("{consistency}, {emptied:?}: hits in a second before {before:?}, after {after:?}");
    (before, after)
}

/// Whether the last of these seconds had about as many hits as before.
fn recovered(before: &[u64], after: &[u64]) -> bool {
    let usual = before.iter().max().unwrap();
    after.last().is_some_and(|hits| hits * 10 >= usual * 8)
}

async fn the_cache_comes_back(consistency: Consistency, emptied: Emptied) {
    let (before, after) = hits(consistency, emptied).await;
    assert!(
        recovered(&before, &after),
        "before {before:?}, after {after:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stall_of_an_overloaded_store_and_a_cleared_cache_are_got_over() {
    the_cache_comes_back(Consistency::Strict, Emptied::Cleared).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stall_of_an_overloaded_store_and_a_restarted_redis_are_got_over() {
    the_cache_comes_back(Consistency::Strict, Emptied::Restarted).await;
}

/// To be compared with: the textbook fills without asking anybody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_textbook_gets_over_it_too() {
    the_cache_comes_back(Consistency::Textbook, Emptied::Cleared).await;
}
