//! Reads of many values at once, over every pair of cache and fence.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and shows its figures"
)]

#[macro_use]
mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use support::{Gate, Ground, Node, Pair, ROW, StoreError, held, until};
use writethrough::Entity;
use writethrough::format::AsBytes;
use writethrough::{
    Bypass, CacheValue, DecodeError, ReadError, ReadMany, ReadOutcome, RedisCache, RedisSettings,
    Settings,
};

on_every_pair!(
    what_is_not_cached_is_loaded_at_once_and_hit_afterwards,
    a_mixture_is_answered_from_both,
    an_id_twice_is_one_and_none_are_none,
    ten_thousand_ids_are_read,
    a_key_under_a_write_is_loaded_with_the_others_and_not_filled,
    a_key_that_another_loads_is_loaded_with_the_others_and_not_filled,
    what_cannot_be_decoded_is_replaced,
    without_the_cache_all_are_loaded_at_once,
    a_write_during_the_load_refuses_its_fill_and_no_other,
    single_reads_share_the_load,
    a_failed_load_frees_the_leases,
    a_reader_of_many_that_is_dropped_lets_the_next_one_fill,
    a_load_that_outlasts_its_leases_still_fills,
    what_may_not_be_kept_is_served_and_its_lease_is_free,
    what_was_not_asked_for_is_ignored,
);

type Rows = ReadMany<String, String>;

fn ids(ids: &[&str]) -> Vec<String> {
    ids.iter().map(|id| (*id).to_owned()).collect()
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|number| number.to_string()).collect()
}

async fn read(node: &Node, ids: &[String]) -> Rows {
    read_slowly(node, ids, Gate::open()).await
}

/// A read whose load waits at the gate after it has read the store.
async fn read_slowly(node: &Node, ids: &[String], gate: Arc<Gate>) -> Rows {
    let load = |missing: Vec<String>| async move {
        let rows = node.store.get_many(&missing).await;
        gate.pass().await;
        Ok::<_, StoreError>(rows)
    };
    node.cached.read_many(&ROW, ids, load).await.unwrap()
}

fn loads(node: &Node) -> u64 {
    node.store.loads.load(Ordering::SeqCst)
}

fn rows(of: &[(&str, &str)]) -> HashMap<String, String> {
    let owned = |(id, value): &(&str, &str)| ((*id).to_owned(), (*value).to_owned());
    of.iter().map(owned).collect()
}

async fn what_is_not_cached_is_loaded_at_once_and_hit_afterwards(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    node.write("b", Some("two")).await.unwrap();
    node.cached.clear(&ROW).await.unwrap();
    let asked = ids(&["a", "b", "none"]);
    let values = rows(&[("a", "one"), ("b", "two")]);
    let first = read(&node, &asked).await;
    assert_eq!((first.hits, first.loaded, loads(&node)), (0, 3, 1));
    assert_eq!(first.values, values);
    let second = read(&node, &asked).await;
    assert_eq!((second.hits, second.loaded, loads(&node)), (3, 0, 1));
    assert_eq!(second.values, values);
    for id in ["a", "b", "none"] {
        assert_eq!(node.read(id).await.outcome, ReadOutcome::Hit);
    }
    let stats = node.cached.stats();
    assert_eq!((stats.hits, stats.misses, stats.loads), (6, 3, 1));
    assert_eq!((stats.bypassed(), stats.cache_errors), (0, 0));
}

async fn a_mixture_is_answered_from_both(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    node.read("none").await;
    node.store.put_unguarded("fresh", "three").await;
    let before = loads(&node);
    let read = read(&node, &ids(&["a", "fresh", "none", "unknown"])).await;
    assert_eq!((read.hits, read.loaded), (2, 2));
    assert_eq!(loads(&node), before + 1);
    let expected = match pair {
        // An update of a row that is not there.
        Pair::MemoryPostgres | Pair::RedisPostgres | Pair::MemorySqlx => rows(&[("a", "one")]),
        _ => rows(&[("a", "one"), ("fresh", "three")]),
    };
    assert_eq!(read.values, expected);
}

async fn an_id_twice_is_one_and_none_are_none(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    let twice = ids(&["a", "b", "a", "b", "b"]);
    let both = read(&node, &twice).await;
    assert_eq!((both.hits, both.loaded), (1, 1));
    assert_eq!(both.values, rows(&[("a", "one")]));
    let before = node.cached.stats();
    let none = read(&node, &[]).await;
    assert_eq!((none.values.len(), none.hits, none.loaded), (0, 0, 0));
    assert_eq!(node.cached.stats().loads, before.loads, "nothing is loaded");
}

async fn ten_thousand_ids_are_read(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let asked = numbers(10_000);
    for (hits, loaded) in [(0, 10_000), (10_000, 0)] {
        let started = tokio::time::Instant::now();
        let read = read(&node, &asked).await;
        assert_eq!((read.hits, read.loaded), (hits, loaded));
        println!(
            "{pair:?}: {hits} hits, {loaded} loaded in {:?}",
            started.elapsed()
        );
    }
    let stats = node.cached.stats();
    assert_eq!((stats.refused_fills, stats.cache_errors), (0, 0));
    assert_eq!(loads(&node), 1);
}

async fn a_key_under_a_write_is_loaded_with_the_others_and_not_filled(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("old")).await.unwrap();
    let (gate, write) = node.held_write("a", Some("new")).await;
    let during = read(&node, &ids(&["a", "b"])).await;
    assert_eq!((during.hits, during.loaded, loads(&node)), (0, 2, 1));
    assert_eq!(during.values, rows(&[("a", "old")]));
    let stats = node.cached.stats();
    assert_eq!((stats.misses, stats.bypassed()), (1, 1));
    assert_eq!(stats.bypasses[Bypass::Intent.index()].1, 1);
    gate.let_through();
    write.await.unwrap().unwrap();
    let after = read(&node, &ids(&["a", "b"])).await;
    assert_eq!((after.hits, after.loaded), (2, 0));
    assert_eq!(after.values, rows(&[("a", "new")]));
}

async fn a_key_that_another_loads_is_loaded_with_the_others_and_not_filled(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let (gate, single) = node.held_read("a").await;
    let during = read(&node, &ids(&["a", "b"])).await;
    assert_eq!((during.hits, during.loaded, loads(&node)), (0, 2, 2));
    assert_eq!(node.cached.stats().bypasses[Bypass::SlowFill.index()].1, 1);
    gate.let_through();
    assert_eq!(
        single.await.unwrap().outcome,
        ReadOutcome::Filled,
        "its lease was left alone"
    );
    let after = read(&node, &ids(&["a", "b"])).await;
    assert_eq!((after.hits, after.loaded), (2, 0));
}

async fn what_cannot_be_decoded_is_replaced(pair: Pair) {
    const NEW: Entity<str, String> = ROW.version(2);
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    for id in ["a", "b", "c"] {
        node.write(id, Some("one")).await.unwrap();
    }
    let asked = ids(&["a", "b", "c"]);
    for (hits, loaded) in [(0, 3), (3, 0)] {
        let load = |missing: Vec<String>| {
            let store = node.store.clone();
            async move { Ok::<_, StoreError>(store.get_many(&missing).await) }
        };
        let read = node.cached.read_many(&NEW, &asked, load).await.unwrap();
        assert_eq!(
            (read.hits, read.loaded, read.values.len()),
            (hits, loaded, 3)
        );
    }
    let stats = node.cached.stats();
    assert_eq!(
        (stats.decode_errors, stats.misses, stats.bypassed()),
        (3, 3, 0)
    );
}

async fn without_the_cache_all_are_loaded_at_once(pair: Pair) {
    let ground = Ground::with_own_redis(pair).await;
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    if let Some(redis) = &ground.redis {
        redis.kill().await.unwrap();
    } else {
        node.cached.shutdown().await;
    }
    let read = read(&node, &ids(&["a", "b"])).await;
    assert_eq!((read.hits, read.loaded, loads(&node)), (0, 2, 1));
    assert_eq!(read.values, rows(&[("a", "one")]));
    assert_eq!(node.cached.stats().bypassed(), 2);
}

/// The load has read the old value of one key when a write of it is acknowledged.
async fn a_write_during_the_load_refuses_its_fill_and_no_other(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("old")).await.unwrap();
    node.cached.clear(&ROW).await.unwrap();
    let (gate, many) = held(|gate| {
        let node = node.clone();
        async move { read_slowly(&node, &ids(&["a", "b"]), gate).await }
    })
    .await;
    node.write("a", Some("new")).await.unwrap();
    gate.let_through();
    let values = many.await.unwrap().values;
    assert_eq!(
        values,
        rows(&[("a", "old")]),
        "it overlapped the write, so it may"
    );
    let after = read(&node, &ids(&["a", "b"])).await;
    assert_eq!((after.hits, after.values), (2, rows(&[("a", "new")])));
    let stats = node.cached.stats();
    assert_eq!((stats.refused_fills, stats.misses), (1, 2));
}

async fn single_reads_share_the_load(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let (gate, many) = held(|gate| {
        let node = node.clone();
        async move { read_slowly(&node, &ids(&["a", "b"]), gate).await }
    })
    .await;
    let mut singles = node.readers("a", 5);
    singles.extend(node.readers("b", 5));
    until("all wait", async || node.cached.stats().waiting == 10).await;
    gate.let_through();
    many.await.unwrap();
    for single in singles {
        assert_eq!(single.await.unwrap(), ReadOutcome::Coalesced);
    }
    assert_eq!(loads(&node), 1);
}

async fn a_failed_load_frees_the_leases(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let fail = |_| async { Err::<Vec<(String, String)>, _>(StoreError("down".into())) };
    let asked = ids(&["a", "b"]);
    let failed = node.cached.read_many(&ROW, &asked, fail).await;
    assert!(matches!(failed, Err(ReadError::Load(StoreError(_)))));
    let started = tokio::time::Instant::now();
    until("the leases are free", async || {
        read(&node, &asked).await.hits == 2
    })
    .await;
    assert!(
        started.elapsed() < Settings::default().fill_lease,
        "they were not left to lapse"
    );
}

async fn a_reader_of_many_that_is_dropped_lets_the_next_one_fill(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let (_gate, many) = held(|gate| {
        let node = node.clone();
        async move { read_slowly(&node, &ids(&["a", "b"]), gate).await }
    })
    .await;
    many.abort();
    assert!(many.await.is_err());
    let started = tokio::time::Instant::now();
    until("both are filled", async || {
        read(&node, &ids(&["a", "b"])).await.hits == 2
    })
    .await;
    assert!(
        started.elapsed() < Settings::default().fill_lease,
        "they were not left to lapse"
    );
}

async fn a_load_that_outlasts_its_leases_still_fills(pair: Pair) {
    let ground = Ground::new(pair).await;
    let settings = Settings {
        fill_lease: Duration::from_millis(300),
        ..Settings::default()
    };
    let node = ground.node_with(settings).await;
    let load = |_| async {
        tokio::time::sleep(Duration::from_millis(1000)).await;
        Ok::<_, StoreError>(vec![("a".to_owned(), "one".to_owned())])
    };
    let asked = ids(&["a", "b"]);
    node.cached.read_many(&ROW, &asked, load).await.unwrap();
    assert!(node.cached.stats().renewed_leases >= 10);
    assert_eq!(read(&node, &asked).await.hits, 2);
}

/// A text that must not be cached when it begins with a dot.
#[derive(Debug, Clone, PartialEq)]
struct Dotted(String);

impl CacheValue for Dotted {
    fn encode(&self) -> Bytes {
        Bytes::copy_from_slice(self.0.as_bytes())
    }

    fn decode(bytes: Bytes) -> Result<Self, DecodeError> {
        String::from_utf8(bytes.to_vec())
            .map(Self)
            .map_err(|error| DecodeError(error.to_string()))
    }

    fn may_be_cached(&self) -> bool {
        !self.0.starts_with('.')
    }
}

async fn what_may_not_be_kept_is_served_and_its_lease_is_free(pair: Pair) {
    const DOTTED: Entity<str, Dotted, AsBytes> = Entity::new("row");
    let ground = Ground::new(pair).await;
    let settings = Settings {
        max_value_bytes: 5,
        ..Settings::default()
    };
    let node = ground.node_with(settings).await;
    let asked = ids(&["short", "longer", "dotted"]);
    let load = |missing: Vec<String>| async move {
        let value = |id: &str| match id {
            "short" => "five.",
            "longer" => "6 long",
            _ => ".no",
        };
        let values = missing.into_iter();
        let values: Vec<_> = values
            .map(|id| (id.clone(), Dotted(value(&id).into())))
            .collect();
        Ok::<_, StoreError>(values)
    };
    for (round, hits) in [(1, 0), (2, 1), (3, 1)] {
        let read = node.cached.read_many(&DOTTED, &asked, load).await.unwrap();
        assert_eq!((read.values.len(), read.hits), (3, hits));
        let stats = node.cached.stats();
        assert_eq!((stats.oversized, stats.declined), (round, round));
        assert_eq!(stats.bypassed(), 0, "nobody's lease was in the way");
    }
}

async fn what_was_not_asked_for_is_ignored(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let load = |_| async { Ok::<_, StoreError>(rows(&[("a", "one"), ("other", "two")])) };
    let read = node
        .cached
        .read_many(&ROW, &ids(&["a"]), load)
        .await
        .unwrap();
    assert_eq!(read.values, rows(&[("a", "one")]));
    assert_eq!(node.read("other").await.outcome, ReadOutcome::Filled);
}

/// A key that holds what is none of ours, in a form that fails each command on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_of_another_type_fails_alone() {
    let ground = Ground::new(Pair::RedisLocal).await;
    let node = ground.node().await;
    let redis = ground.redis.as_ref().unwrap();
    redis
        .command(&["LPUSH", &node.cache_key("list"), "V"])
        .await
        .unwrap();
    redis
        .command(&["SET", &node.cache_key("junk"), "?"])
        .await
        .unwrap();
    let asked = ids(&["a", "list", "junk", "b"]);
    for hits in [0, 2] {
        assert_eq!(read(&node, &asked).await.hits, hits);
    }
    let stats = node.cached.stats();
    assert_eq!((stats.misses, stats.bypassed()), (2, 4));
    assert!(node.cached.status().connected);
}

/// Round trips, by the time that they take over a slow link: one for 200 hits, three for 200 misses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_ids_cost_one_round_trip_or_three() {
    const ROUND_TRIP: Duration = Duration::from_millis(80);
    let ground = Ground::new(Pair::RedisLocal).await;
    let link = ground.link_to_redis().await;
    let url = link.url_for(&ground.redis.as_ref().unwrap().url());
    let cache = RedisCache::connect(RedisSettings::new(url)).unwrap();
    let node = ground.start(Settings::default(), Arc::new(cache), ground.fence());
    node.cached.ready(support::PATIENCE).await.unwrap();
    link.delay(ROUND_TRIP / 2);
    let asked = numbers(200);
    for (hits, round_trips) in [(0, 3), (200, 1)] {
        let read = read(&node, &asked).await;
        assert_eq!(read.hits, hits);
        let took = read.cache_time.as_secs_f64() / ROUND_TRIP.as_secs_f64();
        println!("{hits} hits of 200: {took:.2} round trips");
        let expected = f64::from(round_trips);
        assert!(
            (expected..expected + 0.9).contains(&took),
            "{took} round trips"
        );
    }
}
