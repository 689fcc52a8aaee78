//! What a writer past the library has changed, and how the cache is told of it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[macro_use]
mod support;

use support::{Ground, Node, Pair, ROW, ROWS, StoreError, until};
use writethrough::ReadOutcome;

on_every_pair!(
    what_was_changed_past_the_library_is_read_after_an_invalidation,
    a_load_under_way_is_not_cached_after_an_invalidation,
    pages_of_a_list_are_invalidated_together,
    without_the_cache_an_invalidation_has_nothing_to_remove,
);

async fn what_was_changed_past_the_library_is_read_after_an_invalidation(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    node.write("b", Some("other")).await.unwrap();
    node.store.put_unguarded("a", "two").await;
    let stale = node.read("a").await;
    assert_eq!(stale.outcome, ReadOutcome::Hit);
    assert_eq!(stale.value.as_deref(), Some("one"));
    node.cached.invalidate(&ROW.key("a")).await.unwrap();
    let read = node.read("a").await;
    assert_eq!(read.outcome, ReadOutcome::Filled);
    assert_eq!(read.value.as_deref(), Some("two"));
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
    assert_eq!(node.read("b").await.outcome, ReadOutcome::Hit);
    assert_eq!(node.cached.stats().unguarded_writes, 0);
}

async fn a_load_under_way_is_not_cached_after_an_invalidation(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    node.cached.clear(&ROW).await.unwrap();
    let (gate, slow) = node.held_read("a").await;
    node.store.put_unguarded("a", "two").await;
    node.cached.invalidate(&ROW.key("a")).await.unwrap();
    gate.let_through();
    assert_eq!(slow.await.unwrap().value.as_deref(), Some("one"));
    assert_eq!(node.value("a").await.as_deref(), Some("two"));
}

async fn page(node: &Node, text: &str) -> (Option<String>, ReadOutcome) {
    let load = || async { Ok::<_, StoreError>(text.to_owned()) };
    let read = node.cached.read_page(&ROWS.all(), "all", load).await;
    let read = read.unwrap();
    (read.value, read.outcome)
}

async fn pages_of_a_list_are_invalidated_together(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let found = |value: &str, outcome| (Some(value.to_owned()), outcome);
    assert_eq!(page(&node, "one").await, found("one", ReadOutcome::Filled));
    assert_eq!(page(&node, "two").await, found("one", ReadOutcome::Hit));
    node.cached.invalidate(&ROWS.all()).await.unwrap();
    assert_eq!(page(&node, "two").await, found("two", ReadOutcome::Filled));
}

async fn without_the_cache_an_invalidation_has_nothing_to_remove(pair: Pair) {
    let ground = Ground::with_own_redis(pair).await;
    let Some(redis) = &ground.redis else { return };
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    redis.kill().await.unwrap();
    until("the cache is given up", async || !node.cached.uses_cache()).await;
    node.store.put_unguarded("a", "two").await;
    node.cached.invalidate(&ROW.key("a")).await.unwrap();
    assert_eq!(node.value("a").await.as_deref(), Some("two"));
}
