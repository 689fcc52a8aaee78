//! What users of the library see of it beside reads and writes: how an engine is put together, when it is
//! ready, whose keys are whose.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::{Duration, Instant};

use support::{Ground, Node, PATIENCE, Pair, ROW, ROWS, StoreError};
use writethrough::{
    LocalFence, MemoryCache, NotReady, ReadOutcome, RedisCache, RedisSettings, StartError,
    WriteThrough,
};

const EVERY_PAIR: [Pair; 4] = [
    Pair::MemoryLocal,
    Pair::RedisLocal,
    Pair::MemoryPostgres,
    Pair::RedisPostgres,
];

/// Reads a page of rows.
async fn page(node: &Node) -> ReadOutcome {
    let load = || async { Ok::<_, StoreError>("page".to_owned()) };
    let read = node.cached.read_page(&ROWS.all(), "all", load).await;
    read.unwrap().outcome
}

/// Three services with the same names share a cache and a database, two of them in a namespace.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_in_namespaces_do_not_see_each_others_keys() {
    for pair in EVERY_PAIR {
        let ground = Ground::new(pair).await;
        let (cache, fence) = (ground.cache(), ground.fence());
        let mut nodes = Vec::new();
        for namespace in [None, Some("shop"), Some("shop-2")] {
            let mut engine = WriteThrough::builder(cache.clone(), fence.clone());
            if let Some(namespace) = namespace {
                engine = engine.namespace(namespace);
            }
            let cached = engine.start().unwrap();
            cached.ready(PATIENCE).await.unwrap();
            // Each has a store of its own.
            let store = match pair {
                Pair::MemoryLocal | Pair::RedisLocal => support::Store::in_memory(),
                _ => ground.store.clone(),
            };
            nodes.push(Node {
                cached,
                fence: fence.clone(),
                store,
            });
        }
        for node in &nodes {
            assert_eq!(node.read("a").await.outcome, ReadOutcome::Filled);
            assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
            assert_eq!(page(node).await, ReadOutcome::Filled);
            assert_eq!(page(node).await, ReadOutcome::Hit);
        }
        let [none, shop, other] = &nodes[..] else {
            panic!("three")
        };
        // A write in one namespace is none in the others, and shows in its own.
        let (gate, write) = shop.held_write("a", Some("one")).await;
        assert_eq!(other.read("a").await.outcome, ReadOutcome::Hit);
        assert_eq!(none.read("a").await.outcome, ReadOutcome::Hit);
        gate.let_through();
        write.await.unwrap().unwrap();
        assert_eq!(shop.value("a").await.as_deref(), Some("one"));
        // So are counts, of which "there is none" is none, and clearings.
        none.write("b", Some("two")).await.unwrap();
        other.write("b", Some("three")).await.unwrap();
        let count = async |node: &Node| node.cached.cached_values(&ROW).await.unwrap();
        for node in &nodes {
            assert_eq!(count(node).await, 1);
        }
        assert_eq!(shop.cached.clear(&ROW).await.unwrap(), 1, "{pair:?}");
        assert_eq!(shop.cached.clear(&ROWS).await.unwrap(), 2);
        assert_eq!(page(other).await, ReadOutcome::Hit);
        assert_eq!(page(none).await, ReadOutcome::Hit);
        assert_eq!(none.cached.clear(&ROW).await.unwrap(), 2);
        assert_eq!(count(other).await, 1);
        assert_eq!(other.read("a").await.outcome, ReadOutcome::Hit);
        if let Some(redis) = &ground.redis {
            let history = other.cached.status().history.unwrap();
            let pattern = format!("shop-2/*@{history}.*");
            let keys: Vec<String> = redis.query(&["KEYS", &pattern]).await.unwrap();
            assert_eq!(keys.len(), 4, "two rows, a stamp and a page: {keys:?}");
        }
    }
}

#[tokio::test]
async fn a_namespace_that_is_not_allowed_is_an_error_that_says_what_is() {
    let engine = WriteThrough::builder(MemoryCache::new(1 << 20), LocalFence::new());
    let refused = engine.namespace("my shop").start().err().unwrap();
    assert!(matches!(refused, StartError::Namespace(_)), "{refused:?}");
    let error = refused.to_string();
    assert!(
        error.contains("\"my shop\"") && error.contains("letters"),
        "{error}"
    );
}

#[tokio::test]
async fn readiness_waits_for_the_cache_and_says_why_it_is_not_in_use() {
    let engine = WriteThrough::builder(MemoryCache::new(1 << 20), LocalFence::new());
    let cached = engine.start().unwrap();
    cached.ready(PATIENCE).await.unwrap();
    assert!(cached.uses_cache());
    cached.ready(Duration::ZERO).await.unwrap();
    cached.shutdown().await;
    let started = Instant::now();
    assert_eq!(cached.ready(PATIENCE).await, Err(NotReady::ShutDown));
    assert!(started.elapsed() < PATIENCE, "it does not wait for nothing");

    // Nobody listens there.
    let cache = RedisCache::connect(RedisSettings::new("redis://127.0.0.1:1")).unwrap();
    let cached = WriteThrough::builder(cache, LocalFence::new())
        .start()
        .unwrap();
    let within = Duration::from_secs(1);
    let why = cached.ready(within).await.unwrap_err();
    let NotReady::Cache(Some(reason)) = &why else {
        panic!("{why:?}")
    };
    assert!(reason.to_string().contains("refused"), "{reason}");
}
