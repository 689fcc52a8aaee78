//! One suite over every pair of cache and fence.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[macro_use]
mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use support::{Gate, Ground, Node, Pair, ROW, ROWS, Store, StoreError, held, until};
use tokio::task::JoinHandle;
use writethrough::format::AsBytes;
use writethrough::writing::set::{Changes, Slot};
use writethrough::writing::{Commit, Guarded};
use writethrough::{
    Bypass, CacheValue, Collection, DecodeError, Entity, Epoch, Fence, FenceError, Fenced, Guard,
    Indeterminate, LocalFence, OpError, Phase, ReadError, ReadOutcome, RedisCache, RedisSettings,
    Settings, Unavailable, WriteError,
};
use writethrough_protocol::{Proposal, Sighting};
use writethrough_testbed::Testbed;

on_every_pair!(
    a_miss_fills_and_the_next_read_hits,
    a_write_is_read_from_the_cache_afterwards,
    what_does_not_exist_is_remembered_until_it_is_written,
    a_delete_is_seen,
    readers_of_one_key_share_one_load,
    a_read_after_a_write_does_not_join_an_older_load,
    overlapping_writers_leave_no_value_behind,
    a_reader_that_is_dropped_lets_the_next_one_fill,
    a_writer_that_is_dropped_still_finishes,
    a_refused_write_leaves_no_intent,
    an_unknown_outcome_keeps_readers_on_the_store,
    a_fenced_write_starts_again,
    a_proposal_waits_for_the_write_that_holds_the_guard,
    a_page_is_cached_until_the_collection_changes,
    a_slow_page_load_is_refused_after_a_write,
    readers_of_one_page_share_one_load,
    clearing_makes_the_next_read_a_miss_that_fills,
    clearing_leaves_intents_alone,
    values_expire,
    bytes_of_another_type_are_read_from_the_store,
    what_cannot_be_decoded_is_loaded_once_for_1000_reads,
    a_value_of_another_version_is_a_miss_that_is_replaced,
    a_value_that_its_format_cannot_write_is_served_and_not_cached,
    an_entity_says_how_long_its_values_are_kept,
    shutdown_waits_for_writes_and_refuses_new_ones,
    a_load_error_is_returned_and_frees_the_lease,
    loads_longer_than_the_wait_are_cached,
    pages_that_load_longer_than_the_wait_are_cached,
    a_load_that_outlasts_its_lease_still_fills,
    past_the_cache_reads_share_the_load_that_begins_after_them,
    past_the_cache_no_read_joins_a_load_that_runs,
    one_load_too_many_is_refused_at_once,
    a_load_that_never_ends_is_given_up_by_all_who_wait,
    followers_of_a_failed_load_try_once_more_and_are_told,
    a_store_that_gets_slower_with_its_load_still_fills_the_cache,
    what_is_too_long_is_served_and_not_cached,
    what_says_that_it_may_not_be_cached_is_served_and_not_cached,
    a_value_under_a_key_that_was_not_announced_ends_the_epoch,
    a_write_that_ignores_its_guard_is_not_believed,
    the_count_of_values_is_never_older_than_an_own_write,
    writers_of_one_key_take_turns,
);

async fn a_miss_fills_and_the_next_read_hits(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    node.cached.clear(&ROW).await.unwrap();
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Filled);
    let read = node.read("a").await;
    assert_eq!(read.outcome, ReadOutcome::Hit);
    assert_eq!(read.value, Some("one".into()));
    let stats = node.cached.stats();
    assert_eq!((stats.hits, stats.misses, stats.bypassed()), (1, 1, 0));
    assert_eq!(node.cached.cached_values(&ROW).await, Some(1));
}

async fn a_write_is_read_from_the_cache_afterwards(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    for value in ["one", "two", "three"] {
        let written = node.write("a", Some(value)).await.unwrap();
        assert_eq!(Some(written.epoch), node.cached.status().epoch);
        let read = node.read("a").await;
        assert_eq!(read.outcome, ReadOutcome::Hit);
        assert_eq!(read.value, Some(value.into()));
    }
    assert_eq!(
        node.store.loads.load(Ordering::SeqCst),
        0,
        "no read went to the store"
    );
}

async fn what_does_not_exist_is_remembered_until_it_is_written(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Filled);
    let read = node.read("a").await;
    assert_eq!((read.outcome, read.value), (ReadOutcome::Hit, None));
    node.write("a", Some("one")).await.unwrap();
    assert_eq!(node.value("a").await.as_deref(), Some("one"));
}

async fn a_delete_is_seen(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    node.write("a", None).await.unwrap();
    assert_eq!(node.value("a").await, None);
}

/// Readers that wait for a load as long as a test may take.
fn patient() -> Settings {
    let long = support::PATIENCE;
    Settings {
        fill_wait: long,
        fill_lease: long,
        load_timeout: long * 2,
        ..Settings::default()
    }
}

async fn readers_of_one_key_share_one_load(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node_with(patient()).await;
    let (gate, first) = node.held_read("a").await;
    let others = node.readers("a", 20);
    until("the others wait", async || {
        node.cached.stats().waiting == 20
    })
    .await;
    gate.let_through();
    assert_eq!(first.await.unwrap().outcome, ReadOutcome::Filled);
    for other in others {
        let outcome = other.await.unwrap();
        assert!(
            matches!(outcome, ReadOutcome::Coalesced | ReadOutcome::Hit),
            "{outcome:?}"
        );
    }
    assert_eq!(node.store.loads.load(Ordering::SeqCst), 1);
}

/// The slow fill of the textbook: a load reads the old value, is held up, and ends after a write
/// was acknowledged. Neither may the next read share that load, nor may its fill be accepted.
async fn a_read_after_a_write_does_not_join_an_older_load(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("old")).await.unwrap();
    node.cached.clear(&ROW).await.unwrap();
    let (gate, slow) = node.held_read("a").await;
    node.write("a", Some("new")).await.unwrap();
    assert_eq!(node.value("a").await.as_deref(), Some("new"));
    gate.let_through();
    let slow = slow.await.unwrap();
    assert_eq!(
        slow.value,
        Some("old".into()),
        "it overlapped the write, so it may"
    );
    assert_eq!(slow.outcome, ReadOutcome::Unfilled);
    assert_eq!(node.value("a").await.as_deref(), Some("new"));
    assert_eq!(node.cached.stats().refused_fills, 1);
}

/// Two writers of one key commit in one order and end in the other.
async fn overlapping_writers_leave_no_value_behind(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let (gate, first) = node.held_write("a", Some("first")).await;
    node.write("a", Some("second")).await.unwrap();
    let during = node.read("a").await;
    assert_eq!(during.outcome, ReadOutcome::Bypassed(Bypass::Intent));
    assert_eq!(during.value, Some("second".into()));
    gate.let_through();
    first.await.unwrap().unwrap();
    let after = node.read("a").await;
    assert_eq!(after.outcome, ReadOutcome::Filled);
    assert_eq!(after.value, Some("first".into()));
}

async fn a_reader_that_is_dropped_lets_the_next_one_fill(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let (_gate, reader) = node.held_read("a").await;
    reader.abort();
    assert!(reader.await.is_err());
    let started = tokio::time::Instant::now();
    let outcome = node.read("a").await.outcome;
    assert_eq!(
        outcome,
        ReadOutcome::Filled,
        "the lease was broken, not left to lapse"
    );
    assert!(started.elapsed() < Settings::default().fill_lease);
}

async fn a_writer_that_is_dropped_still_finishes(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("old")).await.unwrap();
    let (gate, writer) = node.held_write("a", Some("new")).await;
    writer.abort();
    assert!(writer.await.is_err());
    assert_eq!(
        node.value("a").await.as_deref(),
        Some("old"),
        "not yet written"
    );
    gate.let_through();
    until("the write is done", async || {
        node.cached.stats().writes == 2
    })
    .await;
    let read = node.read("a").await;
    assert_eq!(
        (read.outcome, read.value),
        (ReadOutcome::Hit, Some("new".into()))
    );
}

async fn a_refused_write_leaves_no_intent(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    let refuse =
        |_, _, ()| async { Err::<Commit<()>, _>(OpError::Rejected(StoreError("no".into()))) };
    let refused = node.cached.write(ROW.key("a")).guarded(refuse).await;
    assert!(matches!(refused, Err(WriteError::Rejected(StoreError(_)))));
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Filled);
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
}

async fn an_unknown_outcome_keeps_readers_on_the_store(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    let write = node.cached.write(ROW.key("a")).with(node.store.clone());
    let unknown = write
        .guarded(|guarded, _, store: Store| async move {
            store.put(&guarded, "a", Some("two")).await?;
            Err::<Commit<()>, _>(OpError::Unknown(StoreError("connection lost".into())))
        })
        .await;
    assert!(matches!(
        unknown,
        Err(WriteError::Indeterminate(Indeterminate::Store(_)))
    ));
    let read = node.read("a").await;
    assert_eq!(read.outcome, ReadOutcome::Bypassed(Bypass::Intent));
    assert_eq!(read.value, Some("two".into()));
}

/// The epoch ends between the announcement and the database write.
async fn a_fenced_write_starts_again(pair: Pair) {
    if matches!(pair, Pair::MemoryLocal | Pair::RedisLocal) {
        // The local guard is taken before the operation runs and keeps the epoch in place, as the
        // next case shows: there is no such window.
        return;
    }
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let (gate, writer) = node.held_write("a", Some("one")).await;
    let epoch = node.cached.status().epoch.unwrap();
    end_epoch(&node).await;
    gate.let_through();
    let written = writer.await.unwrap().unwrap();
    assert!(written.epoch > epoch);
    // The first try was refused; the second may be, if the cache came back at that very moment.
    assert!(node.store.writes.load(Ordering::SeqCst) >= 2);
    assert_eq!(node.value("a").await.as_deref(), Some("one"));
}

async fn end_epoch(node: &Node) -> writethrough_protocol::Sighting {
    let row = node.fence.poll().await.unwrap().row;
    let proposal = writethrough_protocol::Node::bypass_from(row.number);
    node.fence.propose(&proposal).await.unwrap()
}

async fn a_proposal_waits_for_the_write_that_holds_the_guard(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let row = node.fence.poll().await.unwrap().row;
    let proposal = writethrough_protocol::Node::bypass_from(row.number);
    match &ground.database {
        None => {
            let guard = node.fence.enter(row.number).await.unwrap();
            node.fence
                .propose(&proposal)
                .await
                .expect_err("the guard is held");
            drop(guard);
        }
        Some(url) => {
            let mut client = support::pool_of(url, 1).get().await.unwrap();
            let transaction = client.transaction().await.unwrap();
            let number = i64::try_from(row.number.0).unwrap();
            let guard = "SELECT writethrough.guard($1)";
            transaction.query(guard, &[&number]).await.unwrap();
            node.fence
                .propose(&proposal)
                .await
                .expect_err("the guard is held");
            transaction.commit().await.unwrap();
            let repeatable = client
                .build_transaction()
                .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead);
            let transaction = repeatable.start().await.unwrap();
            let error = transaction.query(guard, &[&number]).await.unwrap_err();
            assert!(error.to_string().contains("db error"), "{error}");
        }
    }
    let next = node.fence.propose(&proposal).await.unwrap().row;
    assert_eq!(next.number.0, row.number.0 + 1);
}

const PAGE: &str = "limit=10";

async fn page(node: &Node, gate: Arc<Gate>) -> writethrough::Read<String> {
    let load = || async {
        let value = node.store.get("a").await.unwrap_or_default();
        gate.pass().await;
        Ok::<_, StoreError>(value)
    };
    node.cached
        .read_page(&ROWS.all(), PAGE, load)
        .await
        .unwrap()
}

/// One whose load is held up.
async fn held_page(node: &Node) -> (Arc<Gate>, JoinHandle<writethrough::Read<String>>) {
    let node = node.clone();
    held(|gate| async move { page(&node, gate).await }).await
}

async fn write_member(node: &Node, value: &'static str) {
    let write = node.cached.write((ROW.key("a"), ROWS.all()));
    let write = write.with(node.store.clone());
    let op = move |mut guarded: Guarded, (slot, ()), store: Store| async move {
        store.put(&guarded, "a", Some(value)).await?;
        guarded.cache(&slot, &value.to_owned());
        Ok(guarded.commit(()))
    };
    write.guarded(op).await.unwrap();
}

async fn a_page_is_cached_until_the_collection_changes(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    write_member(&node, "one").await;
    assert_eq!(page(&node, Gate::open()).await.outcome, ReadOutcome::Filled);
    let hit = page(&node, Gate::open()).await;
    assert_eq!(
        (hit.outcome, hit.value),
        (ReadOutcome::Hit, Some("one".into()))
    );
    // A second page of the same collection fills under the same stamp.
    let load = || async { Ok::<_, StoreError>("other".to_owned()) };
    let other = node
        .cached
        .read_page(&ROWS.all(), "limit=3", load)
        .await
        .unwrap();
    assert_eq!(other.outcome, ReadOutcome::Filled);
    assert_eq!(page(&node, Gate::open()).await.outcome, ReadOutcome::Hit);
    write_member(&node, "two").await;
    // The other page is the first to be filled, under a new stamp, which the old page lacks.
    let other = node
        .cached
        .read_page(&ROWS.all(), "limit=3", load)
        .await
        .unwrap();
    assert_eq!(other.outcome, ReadOutcome::Filled);
    let read = page(&node, Gate::open()).await;
    assert_eq!(
        (read.outcome, read.value),
        (ReadOutcome::Filled, Some("two".into()))
    );
}

async fn a_slow_page_load_is_refused_after_a_write(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    write_member(&node, "old").await;
    let (gate, slow) = held_page(&node).await;
    write_member(&node, "new").await;
    assert_eq!(page(&node, Gate::open()).await.value, Some("new".into()));
    gate.let_through();
    assert_eq!(slow.await.unwrap().outcome, ReadOutcome::Unfilled);
    assert_eq!(page(&node, Gate::open()).await.value, Some("new".into()));
}

async fn readers_of_one_page_share_one_load(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node_with(patient()).await;
    let (gate, first) = held_page(&node).await;
    let others: Vec<_> = (0..20)
        .map(|_| node.spawn(async |node| page(&node, Gate::open()).await.outcome))
        .collect();
    until("the others wait", async || {
        node.cached.stats().waiting == 20
    })
    .await;
    gate.let_through();
    assert_eq!(first.await.unwrap().outcome, ReadOutcome::Filled);
    for other in others {
        let outcome = other.await.unwrap();
        assert!(
            matches!(outcome, ReadOutcome::Coalesced | ReadOutcome::Hit),
            "{outcome:?}"
        );
    }
    assert_eq!(node.store.loads.load(Ordering::SeqCst), 1);
}

async fn clearing_makes_the_next_read_a_miss_that_fills(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    for id in 0..500 {
        node.read(&id.to_string()).await;
    }
    write_member(&node, "one").await;
    page(&node, Gate::open()).await;
    assert_eq!(node.cached.clear(&ROW).await.unwrap(), 501);
    // The stamp and the page.
    assert_eq!(node.cached.clear(&ROWS).await.unwrap(), 2);
    assert_eq!(node.cached.cached_values(&ROW).await, Some(0));
    assert_eq!(node.read("7").await.outcome, ReadOutcome::Filled);
    assert_eq!(page(&node, Gate::open()).await.outcome, ReadOutcome::Filled);
}

async fn clearing_leaves_intents_alone(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let (gate, writer) = node.held_write("a", Some("one")).await;
    assert_eq!(node.cached.clear(&ROW).await.unwrap(), 0);
    assert_eq!(
        node.read("a").await.outcome,
        ReadOutcome::Bypassed(Bypass::Intent)
    );
    gate.let_through();
    writer.await.unwrap().unwrap();
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
}

async fn values_expire(pair: Pair) {
    let ground = Ground::new(pair).await;
    let ttl = Duration::from_millis(100);
    let node = ground
        .node_with(Settings {
            ttl,
            negative_ttl: ttl,
            ..Settings::default()
        })
        .await;
    node.write("a", Some("one")).await.unwrap();
    until("the value expired", async || {
        node.read("a").await.outcome == ReadOutcome::Filled
    })
    .await;
    node.read("none").await;
    until("the absence expired", async || {
        node.read("none").await.outcome == ReadOutcome::Filled
    })
    .await;
}

/// The same names with another type of values, as after a deployment.
const NUMBER: Entity<str, i32> = Entity::new("row");
const NUMBERS: Collection<(), i32> = Collection::new("rows");

async fn bytes_of_another_type_are_read_from_the_store(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("text")).await.unwrap();
    let load = || async { Ok::<_, StoreError>(Some(7)) };
    let read = node.cached.read(&NUMBER.key("a"), load).await.unwrap();
    assert_eq!(read.value, Some(7));
    assert_eq!(read.outcome, ReadOutcome::Filled);
    let stats = node.cached.stats();
    assert_eq!((stats.decode_errors, stats.cache_errors), (1, 0));
}

/// After a deployment with another form of the value: each entry is loaded once, a page likewise.
async fn what_cannot_be_decoded_is_loaded_once_for_1000_reads(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node_with(patient()).await;
    node.write("a", Some("text")).await.unwrap();
    let rows = ROWS.all();
    let page = || async { Ok::<_, StoreError>("text".to_owned()) };
    node.cached.read_page(&rows, "all", page).await.unwrap();
    let (values, pages) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let readers: Vec<_> = (0..1000)
        .map(|_| {
            let node = node.clone();
            let (values, pages) = (values.clone(), pages.clone());
            tokio::spawn(async move {
                let load = || async {
                    values.fetch_add(1, Ordering::SeqCst);
                    Ok::<_, StoreError>(Some(7))
                };
                let key = NUMBER.key("a");
                let value = node.cached.read(&key, load).await.unwrap().value;
                let load = || async {
                    pages.fetch_add(1, Ordering::SeqCst);
                    Ok::<_, StoreError>(8)
                };
                let page = node
                    .cached
                    .read_page(&NUMBERS.all(), "all", load)
                    .await
                    .unwrap();
                (value, page.value)
            })
        })
        .collect();
    for reader in readers {
        assert_eq!(reader.await.unwrap(), (Some(7), Some(8)));
    }
    assert_eq!(values.load(Ordering::SeqCst), 1);
    // A read that looked just before a page was filled, and came to load just after, loads too.
    let pages = pages.load(Ordering::SeqCst);
    assert!(pages < 20, "{pages} loads of one page");
    let stats = node.cached.stats();
    assert_eq!((stats.bypassed(), stats.cache_errors), (0, 0));
    assert!(stats.decode_errors >= 2);
}

/// An old and a new version of a program side by side: neither takes the other's bytes.
async fn a_value_of_another_version_is_a_miss_that_is_replaced(pair: Pair) {
    const NEW: Entity<str, String> = ROW.version(2);
    const NEW_LISTS: Collection<(), String> = ROWS.version(2);
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    assert_eq!(page(&node, Gate::open()).await.outcome, ReadOutcome::Filled);
    let read_new = async || {
        let load = || async { Ok::<_, StoreError>(node.store.get("a").await) };
        let read = node.cached.read(&NEW.key("a"), load).await.unwrap();
        let load = || async { Ok::<_, StoreError>("new".to_owned()) };
        let all = NEW_LISTS.all();
        let page = node.cached.read_page(&all, PAGE, load).await.unwrap();
        assert_eq!(read.value.as_deref(), Some("one"));
        assert_eq!(page.value.as_deref(), Some("new"));
        (read.outcome, page.outcome)
    };
    let replaced = (ReadOutcome::Filled, ReadOutcome::Filled);
    let hits = (ReadOutcome::Hit, ReadOutcome::Hit);
    assert_eq!(read_new().await, replaced);
    assert_eq!(read_new().await, hits);
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Filled);
    assert_eq!(page(&node, Gate::open()).await.outcome, ReadOutcome::Filled);
    assert_eq!(read_new().await, replaced);
    // A write of the old version is seen by the new one: they share the key.
    node.write("a", None).await.unwrap();
    let load = || async { Ok::<_, StoreError>(node.store.get("a").await) };
    let read = node.cached.read(&NEW.key("a"), load).await.unwrap();
    assert_eq!((read.outcome, read.value), (ReadOutcome::Filled, None));
    assert_eq!(node.cached.stats().decode_errors, 6);
}

/// JSON has no maps whose keys are pairs.
async fn a_value_that_its_format_cannot_write_is_served_and_not_cached(pair: Pair) {
    type Pairs = HashMap<(u8, u8), u8>;
    const PAIRS: Entity<str, Pairs> = Entity::new("pairs");
    let ground = Ground::new(pair).await;
    let node = ground.node_with(patient()).await;
    let pairs = Pairs::from([((1, 2), 3)]);
    let gate = Gate::shut();
    let reads: Vec<_> = (0..5)
        .map(|_| {
            let (node, pairs, gate) = (node.clone(), pairs.clone(), gate.clone());
            tokio::spawn(async move {
                let load = || async {
                    gate.pass().await;
                    Ok::<_, StoreError>(Some(pairs))
                };
                node.cached.read(&PAIRS.key("a"), load).await.unwrap()
            })
        })
        .collect();
    until("all but one wait", async || {
        node.cached.stats().waiting == 4
    })
    .await;
    gate.let_through();
    let (mut alone, mut unfilled) = (0, 0);
    for read in reads {
        let read = read.await.unwrap();
        assert_eq!(read.value.as_ref(), Some(&pairs));
        match read.outcome {
            ReadOutcome::Unfilled => unfilled += 1,
            ReadOutcome::Bypassed(Bypass::Undecodable) => alone += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((unfilled, alone), (1, 4), "nobody waits a second time");
    let stats = node.cached.stats();
    assert_eq!((stats.encode_errors, stats.decode_errors), (1, 0));
    // What does not exist has a form in every format.
    let none = || async { Ok::<_, StoreError>(None) };
    let read = node.cached.read(&PAIRS.key("b"), none).await.unwrap();
    assert_eq!(read.outcome, ReadOutcome::Filled);
}

async fn an_entity_says_how_long_its_values_are_kept(pair: Pair) {
    const SHORT: Duration = Duration::from_millis(100);
    const BRIEF: Entity<str, String> = ROW.ttl(SHORT).negative_ttl(SHORT);
    const BRIEF_LISTS: Collection<(), String> = ROWS.ttl(SHORT);
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    // The same names without these times, kept for as long as the settings say.
    node.read("kept").await;
    for (id, value) in [("a", Some("one".to_owned())), ("b", None)] {
        let read = async || {
            let load = || async { Ok::<_, StoreError>(value.clone()) };
            let read = node.cached.read(&BRIEF.key(id), load).await;
            read.unwrap().outcome
        };
        assert_eq!(read().await, ReadOutcome::Filled);
        until("the value expired", async || {
            read().await == ReadOutcome::Filled
        })
        .await;
    }
    let read_page = async || {
        let load = || async { Ok::<_, StoreError>("page".to_owned()) };
        let all = BRIEF_LISTS.all();
        let read = node.cached.read_page(&all, PAGE, load).await;
        read.unwrap().outcome
    };
    read_page().await;
    until("the page expired", async || {
        read_page().await == ReadOutcome::Filled
    })
    .await;
    assert_eq!(node.read("kept").await.outcome, ReadOutcome::Hit);
}

async fn shutdown_waits_for_writes_and_refuses_new_ones(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let (gate, writer) = node.held_write("a", Some("one")).await;
    let shutdown = node.spawn(async |node| node.cached.shutdown().await);
    until("new writes are refused", async || {
        let refused = node.write("b", Some("no")).await;
        matches!(
            refused,
            Err(WriteError::Unavailable(Unavailable::ShuttingDown))
        )
    })
    .await;
    assert!(!shutdown.is_finished());
    gate.let_through();
    assert!(writer.await.unwrap().is_ok());
    shutdown.await.unwrap();
    let read = node.read("a").await;
    assert!(
        matches!(read.outcome, ReadOutcome::Bypassed(_)),
        "reads go on from the store"
    );
    assert_eq!(read.value, Some("one".into()));
}

async fn a_load_error_is_returned_and_frees_the_lease(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let load = || async { Err::<Option<String>, _>(StoreError("down".into())) };
    let read = node.cached.read(&ROW.key("a"), load).await;
    assert!(matches!(read, Err(ReadError::Load(StoreError(why))) if why == "down"));
    let started = tokio::time::Instant::now();
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Filled);
    assert!(started.elapsed() < Settings::default().fill_lease);
}

async fn what_is_too_long_is_served_and_not_cached(pair: Pair) {
    let ground = Ground::new(pair).await;
    // Of the stored form: a text has two quotes more.
    let settings = Settings {
        max_value_bytes: 12,
        max_page_bytes: 8,
        ..Settings::default()
    };
    let node = ground.node_with(settings).await;
    node.write("a", Some("short")).await.unwrap();
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
    let (fits, long) = ("ten bytes.", "eleven long");
    for (value, read) in [
        (fits, ReadOutcome::Hit),
        (long, ReadOutcome::Unfilled),
        (fits, ReadOutcome::Hit),
    ] {
        node.write("a", Some(value)).await.unwrap();
        for _ in 0..2 {
            let found = node.read("a").await;
            assert_eq!(found.value, Some(value.into()));
            assert_eq!(found.outcome, read, "{value}");
        }
    }
    // One write, two reads.
    assert_eq!(node.cached.stats().oversized, 3);
    let epoch = node.cached.status().epoch;
    let page_of = async |text: &'static str| {
        let load = || async { Ok::<_, StoreError>(text.to_owned()) };
        let collection = ROWS.all();
        let read = node
            .cached
            .read_page(&collection, text, load)
            .await
            .unwrap();
        assert_eq!(read.value, Some(text.to_owned()));
        read.outcome
    };
    for _ in 0..2 {
        assert_eq!(page_of("longer!").await, ReadOutcome::Unfilled);
    }
    assert_eq!(page_of("limit1").await, ReadOutcome::Filled);
    assert_eq!(page_of("limit1").await, ReadOutcome::Hit);
    assert_eq!(page_of("longer!").await, ReadOutcome::Unfilled);
    assert_eq!(node.cached.stats().oversized, 6);
    let stats = node.cached.stats();
    assert_eq!((stats.cache_errors, stats.refused_fills), (0, 0));
    assert_eq!(node.cached.status().epoch, epoch);
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

async fn what_says_that_it_may_not_be_cached_is_served_and_not_cached(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    const DOTTED: Entity<str, Dotted, AsBytes> = Entity::new("row");
    const LISTS: Collection<(), Dotted, AsBytes> = Collection::new("rows");
    let key = DOTTED.key("a");
    let collection = LISTS.all();
    let write = async |value: &'static str| {
        let op = move |mut guarded: Guarded, slot, store: Store| async move {
            store.put(&guarded, "a", Some(value)).await?;
            guarded.cache(&slot, &Dotted(value.to_owned()));
            Ok(guarded.commit(()))
        };
        let write = node.cached.write(&key).with(node.store.clone());
        write.guarded(op).await.unwrap();
    };
    let read = async || {
        let load = || async { Ok::<_, StoreError>(node.store.get("a").await.map(Dotted)) };
        let read = node.cached.read(&key, load).await.unwrap();
        (read.outcome, read.value.unwrap().0)
    };
    write("one").await;
    assert_eq!(read().await, (ReadOutcome::Hit, "one".to_owned()));
    write(".two").await;
    for _ in 0..2 {
        assert_eq!(read().await, (ReadOutcome::Unfilled, ".two".to_owned()));
    }
    for _ in 0..2 {
        let load = || async { Ok::<_, StoreError>(Dotted(".page".to_owned())) };
        let page = node.cached.read_page(&collection, "p", load).await.unwrap();
        assert_eq!(page.outcome, ReadOutcome::Unfilled);
    }
    assert_eq!(node.cached.stats().declined, 5);
    write("three").await;
    assert_eq!(read().await, (ReadOutcome::Hit, "three".to_owned()));
}

/// Slots of `a` and of `b`, of a write that is over.
async fn old_slots(node: &Node) -> Vec<Slot<String>> {
    let write = node.cached.write(vec![ROW.key("a"), ROW.key("b")]);
    let refuse = |_, slots, ()| async { Err::<Commit<()>, _>(OpError::Rejected(slots)) };
    match write.guarded(refuse).await {
        Err(WriteError::Rejected(slots)) => slots,
        other => panic!("{other:?}"),
    }
}

/// Changes both rows, and caches both, whatever was announced.
async fn write_both(
    node: &Node,
    slots: &[Slot<String>],
    changes: impl Changes,
    value: &'static str,
) {
    let context = (node.store.clone(), slots.to_vec());
    let op = move |mut guarded: Guarded, _, context: (Store, Vec<Slot<String>>)| async move {
        let (store, slots) = context;
        for (id, slot) in ["a", "b"].iter().zip(&slots) {
            store.put(&guarded, id, Some(value)).await?;
            guarded.cache(slot, &value.to_owned());
        }
        Ok(guarded.commit(()))
    };
    let write = node.cached.write(changes).with(context);
    write.guarded(op).await.unwrap();
}

/// A write of `a` that has also changed `b`, which it did not announce: the cached `b` would be a hit
/// until its lifetime ends.
async fn a_value_under_a_key_that_was_not_announced_ends_the_epoch(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let slots = old_slots(&node).await;
    for count in 1..=3 {
        until("the cache is in use", async || node.cached.uses_cache()).await;
        node.write("b", Some("old")).await.unwrap();
        assert_eq!(node.read("b").await.outcome, ReadOutcome::Hit);
        let before = node.cached.status().epoch.unwrap();
        match count {
            1 => write_both(&node, &slots, ROW.key("a"), "new").await,
            2 => write_both(&node, &slots, ROWS.all(), "new").await,
            _ => write_both(&node, &slots, (), "new").await,
        }
        assert_eq!(node.value("b").await.as_deref(), Some("new"));
        assert_eq!(node.value("a").await.as_deref(), Some("new"));
        let status = node.cached.status();
        assert!(status.epoch.unwrap() > before, "the epoch is over");
        let why = status.proposed_bypass.unwrap().reason;
        assert!(why.contains("`row:*`"), "{why}");
        assert_eq!(node.cached.stats().unannounced_writes, count);
    }
    // Both announced, nothing is wrong.
    until("the cache is in use", async || node.cached.uses_cache()).await;
    let before = node.cached.status().epoch;
    let both = vec![ROW.key("a"), ROW.key("b")];
    write_both(&node, &slots, both, "newer").await;
    assert_eq!(node.read("b").await.outcome, ReadOutcome::Hit);
    assert_eq!(node.cached.status().epoch, before);
    assert_eq!(node.cached.stats().unannounced_writes, 3);
}

/// Every announced writer is named in its key's intent: a thousand at once made an entry that kept Redis
/// from answering in time, and took the cache from all nodes.
async fn writers_of_one_key_take_turns(pair: Pair) {
    let ground = Ground::new(pair).await;
    let settings = Settings {
        max_writers: 32,
        ..Settings::default()
    };
    let node = ground.node_with(settings).await;
    let (first, one) = node.held_write("a", Some("one")).await;
    let (second, two) = node.held_write("a", Some("two")).await;
    let before = node.cached.stats().intents;
    let refused = node.write("a", Some("three"));
    let (refused, other) = tokio::join!(refused, node.write("b", Some("other")));
    other.unwrap();
    assert!(
        matches!(refused, Err(WriteError::Unavailable(Unavailable::Busy))),
        "{refused:?}"
    );
    let stats = node.cached.stats();
    assert_eq!(stats.intents, before + 1, "that of the other key");
    assert_eq!(stats.refused_writes, 1);
    let waiting = node.spawn(async |node| node.write("a", Some("four")).await);
    first.let_through();
    one.await.unwrap().unwrap();
    waiting.await.unwrap().unwrap();
    second.let_through();
    two.await.unwrap().unwrap();
    assert_eq!(node.value("a").await.as_deref(), Some("two"));
    assert_eq!(node.cached.stats().refused_writes, 1);
}

/// A write that does not put its guard into its statement is not stopped by a change of the epoch: it
/// may land under what was filled in a later one. A guard that is held holds without its help.
async fn a_write_that_ignores_its_guard_is_not_believed(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("old")).await.unwrap();
    let row = node.fence.poll().await.unwrap().row;
    let gate = Gate::shut();
    let context = (node.store.clone(), gate.clone());
    let write = node.spawn(async move |node| {
        let write = node.cached.write(ROW.key("a")).with(context);
        let op = |mut guarded: Guarded, slot, (store, gate): (Store, Arc<Gate>)| async move {
            gate.pass().await;
            store.put_unguarded("a", "new").await;
            guarded.cache(&slot, &"new".to_owned());
            Ok::<_, OpError<StoreError>>(guarded.commit(()))
        };
        write.guarded(op).await.map(drop)
    });
    gate.arrival().await;
    let next = writethrough_protocol::Node::bypass_from(row.number);
    if ground.database.is_none() {
        let refused = node.fence.propose(&next).await;
        refused.expect_err("the engine holds the guard itself");
        gate.let_through();
        write.await.unwrap().unwrap();
        assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
        assert_eq!(node.cached.stats().unguarded_writes, 0);
        assert_eq!(node.cached.status().epoch, Some(row.number));
        return;
    }
    // The epoch of the write ends, the next one that uses the cache begins, and there the old value is
    // filled, before the write lands.
    node.fence.propose(&next).await.unwrap();
    until("the next epoch uses the cache", async || {
        let status = node.cached.status();
        status.epoch > Some(row.number) && node.cached.uses_cache()
    })
    .await;
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Filled);
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
    gate.let_through();
    write.await.unwrap().unwrap();
    assert_eq!(node.value("a").await.as_deref(), Some("new"));
    assert_eq!(node.cached.stats().unguarded_writes, 1);
    let why = node.cached.status().proposed_bypass.unwrap().reason;
    assert!(why.contains("not guarded"), "{why}");
}

async fn the_count_of_values_is_never_older_than_an_own_write(pair: Pair) {
    let ground = Ground::with_own_redis(pair).await;
    let node = ground.node().await;
    let count = async || node.cached.cached_values(&ROW).await.unwrap();
    assert_eq!(count().await, 0);
    for (values, id) in ["a", "b", "c"].into_iter().enumerate() {
        node.write(id, Some("one")).await.unwrap();
        assert_eq!(count().await, values as u64 + 1);
    }
    node.write("b", None).await.unwrap();
    assert_eq!(count().await, 2);
    // Without a write of this node's own the count may be a second old: askers cost no walk each.
    let other = ground.redis.as_ref();
    if let Some(redis) = other {
        redis.flush().await.unwrap();
        assert_eq!(count().await, 2);
        until("the count is made anew", async || count().await == 0).await;
    }
}

/// Two nodes on one Redis and one Postgres: what one writes the other reads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_read_each_others_writes() {
    let ground = Ground::new(Pair::RedisPostgres).await;
    let (a, b) = tokio::join!(ground.node(), ground.node());
    for round in 0..50 {
        let value = format!("value {round}");
        a.write("a", Some(&value)).await.unwrap();
        let read = b.read("a").await;
        assert_eq!(read.value, Some(value.clone()));
        assert_eq!(read.outcome, ReadOutcome::Hit);
        let value = format!("{value} again");
        b.write("a", Some(&value)).await.unwrap();
        assert_eq!(a.value("a").await, Some(value));
    }
}

/// Two processes that each have an in-process cache in front of one Postgres: only one at a time
/// has a cache, and both stay linearizable.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_with_caches_of_their_own_stay_linearizable() {
    let ground = Ground::new(Pair::MemoryPostgres).await;
    let a = ground.node().await;
    let b = ground.start(Settings::default(), ground.cache(), ground.fence());
    for round in 0..6 {
        let value = format!("value {round}");
        let (writer, reader) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        writer.write("a", Some(&value)).await.unwrap();
        assert_eq!(reader.value("a").await.as_deref(), Some(value.as_str()));
        assert_eq!(writer.value("a").await.as_deref(), Some(value.as_str()));
    }
}

/// A write is announced, its intent is evicted, a reader takes the fill lease and loads the old value,
/// the write commits, and then the writer's connection hangs so that it cannot end the write. The
/// fill is accepted, for nothing in the cache speaks against it. So the writer must not acknowledge
/// before the epoch that holds it is over for everybody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_cannot_be_ended_is_acknowledged_only_in_the_next_epoch() {
    let ground = Ground::new(Pair::RedisPostgres).await;
    let redis = ground.redis.as_ref().unwrap();
    let testbed = Testbed::new().await.unwrap();
    let link = testbed.link(redis.addr()).await.unwrap();
    let through_link = RedisSettings::new(link.url_for(&redis.url()));
    let cache = Arc::new(RedisCache::connect(through_link).unwrap());
    // The writer's own supervisor must not be what ends the epoch.
    let patient = Settings {
        reconnect_grace: support::PATIENCE,
        ..Settings::default()
    };
    let writer = ground.start(patient, cache, ground.fence());
    let reader = ground.node().await;
    until("the writer uses the cache", async || {
        writer.cached.uses_cache()
    })
    .await;
    reader.write("a", Some("old")).await.unwrap();

    let (commit, write) = writer.held_write("a", Some("new")).await;
    let epoch = reader.cached.status().epoch.unwrap();
    let evicted: u64 = redis.query(&["DEL", &reader.cache_key("a")]).await.unwrap();
    assert_eq!(evicted, 1, "the intent was there");
    let (fill, read) = reader.held_read("a").await;
    link.stall();
    commit.let_through();
    until("the write has committed", async || {
        writer.store.get("a").await.as_deref() == Some("new")
    })
    .await;
    fill.let_through();
    assert_eq!(
        read.await.unwrap().outcome,
        ReadOutcome::Filled,
        "with the old value"
    );
    write.await.unwrap().unwrap();
    let seen = reader.read("a").await;
    assert_eq!(seen.value, Some("new".into()), "{:?}", seen.outcome);
    assert!(reader.cached.status().epoch > Some(epoch));
}

/// A read whose load takes this long.
async fn read_for(
    node: &Node,
    id: &str,
    takes: Duration,
) -> Result<ReadOutcome, ReadError<StoreError>> {
    let load = || async {
        let value = node.store.get(id).await;
        tokio::time::sleep(takes).await;
        Ok::<_, StoreError>(value)
    };
    let read = node.cached.read(&ROW.key(id), load).await?;
    Ok(read.outcome)
}

/// One key, a load of 400 ms, a read each 20 ms. A follower that broke the lease after its wait of
/// 250 ms had every fill refused, and its own load fared the same: not one hit, for ever.
async fn loads_longer_than_the_wait_are_cached(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    node.cached.clear(&ROW).await.unwrap();
    let mut reads = Vec::new();
    for _ in 0..40 {
        let time = Duration::from_millis(400);
        reads.push(node.spawn(async move |node| read_for(&node, "a", time).await.unwrap()));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut hits = 0;
    for read in reads {
        let outcome = read.await.unwrap();
        assert!(!matches!(outcome, ReadOutcome::Bypassed(_)), "{outcome:?}");
        hits += u32::from(outcome == ReadOutcome::Hit);
    }
    assert!(hits >= 5, "{hits} hits in 40 reads");
    assert_eq!(node.store.loads.load(Ordering::SeqCst), 1);
    let status = node.cached.status();
    let slow = status.slow_loads.expect("the load was slow");
    assert!(slow.took >= Duration::from_millis(400));
    assert_eq!(node.cached.stats().slow_loads, 1);
}

async fn pages_that_load_longer_than_the_wait_are_cached(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    write_member(&node, "one").await;
    let load = |loads: Arc<std::sync::atomic::AtomicU64>| async move {
        loads.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(400)).await;
        Ok::<_, StoreError>("page".to_owned())
    };
    let loads = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let mut reads = Vec::new();
    for _ in 0..40 {
        let (node, loads) = (node.clone(), loads.clone());
        reads.push(tokio::spawn(async move {
            let rows = ROWS.all();
            let read = node.cached.read_page(&rows, PAGE, || load(loads)).await;
            read.unwrap().outcome
        }));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut hits = 0;
    for read in reads {
        let outcome = read.await.unwrap();
        assert!(!matches!(outcome, ReadOutcome::Bypassed(_)), "{outcome:?}");
        hits += u32::from(outcome == ReadOutcome::Hit);
    }
    assert!(hits >= 5, "{hits} hits in 40 reads");
    // One read may have seen the lease just before the page was stored, and come to its turn after.
    let loads = loads.load(Ordering::SeqCst);
    assert!(loads <= 2, "{loads} loads");
}

/// The holder's lease is renewed while its load runs.
async fn a_load_that_outlasts_its_lease_still_fills(pair: Pair) {
    let ground = Ground::new(pair).await;
    let settings = Settings {
        fill_lease: Duration::from_millis(300),
        ..Settings::default()
    };
    let node = ground.node_with(settings).await;
    let outcome = read_for(&node, "a", Duration::from_millis(1000))
        .await
        .unwrap();
    assert_eq!(outcome, ReadOutcome::Filled);
    assert!(node.cached.stats().renewed_leases >= 5);
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
}

async fn past_the_cache_reads_share_the_load_that_begins_after_them(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let (written, write) = node.held_write("a", Some("new")).await;
    let (load, first) = node.held_read("a").await;
    let others = node.readers("a", 20);
    until("one forms a load and the others wait for it", async || {
        node.cached.stats().waiting == 19
    })
    .await;
    load.let_through();
    let bypassed = ReadOutcome::Bypassed(Bypass::Intent);
    assert_eq!(first.await.unwrap().outcome, bypassed);
    for other in others {
        assert_eq!(other.await.unwrap(), bypassed);
    }
    assert_eq!(node.store.loads.load(Ordering::SeqCst), 2);
    assert_eq!(node.cached.stats().shared_bypasses, 19);
    written.let_through();
    write.await.unwrap().unwrap();
}

/// A load past the cache reads the old value and is held up; the write is acknowledged; a read that
/// begins then must not be given what that load has read.
async fn past_the_cache_no_read_joins_a_load_that_runs(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.write("a", Some("old")).await.unwrap();
    let (written, write) = node.held_write("a", Some("new")).await;
    let (load, slow) = node.held_read("a").await;
    written.let_through();
    write.await.unwrap().unwrap();
    // A second write, so that the next read goes past the cache as well.
    let (later, second) = node.held_write("a", Some("newer")).await;
    let next = node.spawn(async |node| node.value("a").await);
    load.let_through();
    assert_eq!(slow.await.unwrap().value, Some("old".into()));
    assert_eq!(next.await.unwrap().as_deref(), Some("new"));
    later.let_through();
    second.await.unwrap().unwrap();
}

async fn one_load_too_many_is_refused_at_once(pair: Pair) {
    let ground = Ground::new(pair).await;
    let settings = Settings {
        max_loads: 1,
        ..Settings::default()
    };
    let node = ground.node_with(settings).await;
    let (load, first) = node.held_read("a").await;
    assert_eq!(node.cached.stats().loads_under_way, 1);
    let refused = read_for(&node, "b", Duration::ZERO).await;
    assert!(matches!(refused, Err(ReadError::Overloaded)), "{refused:?}");
    assert_eq!(node.cached.stats().refused_reads, 1);
    load.let_through();
    assert_eq!(first.await.unwrap().outcome, ReadOutcome::Filled);
    assert_eq!(
        read_for(&node, "b", Duration::ZERO).await.unwrap(),
        ReadOutcome::Filled
    );
}

async fn a_load_that_never_ends_is_given_up_by_all_who_wait(pair: Pair) {
    let ground = Ground::new(pair).await;
    let settings = Settings {
        load_timeout: Duration::from_millis(500),
        ..Settings::default()
    };
    let node = ground.node_with(settings).await;
    let reads: Vec<_> = (0..5)
        .map(|_| {
            node.spawn(async |node| {
                let started = tokio::time::Instant::now();
                let read = read_for(&node, "a", support::PATIENCE).await;
                (read, started.elapsed())
            })
        })
        .collect();
    for read in reads {
        let (read, took) = read.await.unwrap();
        assert!(
            matches!(read, Err(ReadError::TimedOut | ReadError::SharedLoadFailed)),
            "{read:?}"
        );
        // Its waits for others, then a load of its own.
        assert!(took < Duration::from_secs(3), "{took:?}");
    }
    assert_eq!(
        read_for(&node, "a", Duration::ZERO).await.unwrap(),
        ReadOutcome::Filled
    );
}

async fn followers_of_a_failed_load_try_once_more_and_are_told(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    let fail = |gate: Arc<Gate>| async move {
        gate.pass().await;
        Err::<Option<String>, _>(StoreError("down".into()))
    };
    let key = ROW.key("a");
    let gate = Gate::shut();
    let reads: Vec<_> = (0..10)
        .map(|_| {
            let (gate, key) = (gate.clone(), key.clone());
            node.spawn(async move |node| node.cached.read(&key, || fail(gate)).await)
        })
        .collect();
    until("all but one wait", async || {
        node.cached.stats().waiting == 9
    })
    .await;
    gate.let_through();
    let (mut own, mut shared) = (0, 0);
    for read in reads {
        match read.await.unwrap() {
            Err(ReadError::Load(_)) => own += 1,
            Err(ReadError::SharedLoadFailed) => shared += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(own >= 2, "{own} loaded, {shared} shared");
    let loads = node.cached.stats().loads;
    assert!((2..=10).contains(&loads), "{loads} loads");
    assert_eq!(
        read_for(&node, "a", Duration::ZERO).await.unwrap(),
        ReadOutcome::Filled
    );
}

/// A store with two places, whose answers take 60 ms: 33 loads a second. Sixty readers ask for twenty
/// keys far faster than that, and the cache is cleared. Breaking leases after 250 ms kept the store
/// overloaded, and the cache empty, for ever.
async fn a_store_that_gets_slower_with_its_load_still_fills_the_cache(pair: Pair) {
    let ground = Ground::new(pair).await;
    let node = ground.node().await;
    node.cached.clear(&ROW).await.unwrap();
    let places = Arc::new(tokio::sync::Semaphore::new(2));
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let readers: Vec<_> = (0..60)
        .map(|reader| {
            let (node, places, stop) = (node.clone(), places.clone(), stop.clone());
            tokio::spawn(async move {
                let key = ROW.key((reader % 20).to_string());
                while !stop.load(Ordering::SeqCst) {
                    let load = || async {
                        let _place = places.acquire().await.unwrap();
                        tokio::time::sleep(Duration::from_millis(60)).await;
                        Ok::<_, StoreError>(Some("v".to_owned()))
                    };
                    node.cached.read(&key, load).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            })
        })
        .collect();
    until("every key is cached while the readers go on", async || {
        node.cached.cached_values(&ROW).await == Some(20)
    })
    .await;
    let loads = node.cached.stats().loads;
    assert!(loads <= 25, "{loads} loads of 20 keys");
    stop.store(true, Ordering::SeqCst);
    for reader in readers {
        reader.await.unwrap();
    }
}

/// Two processes (two engines on one Redis and one Postgres), a load of 1.5 s in one of them. The
/// readers of the other follow its lease for 250 ms, then one of them loads beside it for all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_another_process_share_one_load_beside_the_lease() {
    let ground = Ground::new(Pair::RedisPostgres).await;
    let nodes = [ground.node().await, ground.node().await];
    nodes[0].write("a", Some("one")).await.unwrap();
    nodes[0].cached.clear(&ROW).await.unwrap();
    let long = Duration::from_millis(1500);
    let holder = nodes[0].spawn(async move |node| read_for(&node, "a", long).await.unwrap());
    until("the holder loads", async || {
        nodes[0].cached.stats().loads == 1
    })
    .await;
    let readers: Vec<_> = (0..200)
        .map(|_| nodes[1].spawn(async move |node| read_for(&node, "a", long).await.unwrap()))
        .collect();
    let mut loaded = 0;
    for reader in readers {
        match reader.await.unwrap() {
            ReadOutcome::Bypassed(Bypass::SlowFill) => loaded += 1,
            ReadOutcome::Coalesced | ReadOutcome::Hit => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(loaded <= 1, "{loaded} loads beside the lease");
    assert_eq!(
        holder.await.unwrap(),
        ReadOutcome::Filled,
        "the lease was left alone"
    );
    assert!(ground.store.loads.load(Ordering::SeqCst) <= 2);
    for node in &nodes {
        assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
    }
}

/// A thousand readers on two nodes meet a load of 3 s.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::print_stdout, reason = "the figures")]
async fn a_stampede_on_two_nodes_loads_at_most_twice() {
    let ground = Ground::new(Pair::RedisPostgres).await;
    let nodes = [ground.node().await, ground.node().await];
    let readers: Vec<_> = (0..1000)
        .map(|reader| {
            nodes[reader % 2].spawn(async |node| {
                let started = tokio::time::Instant::now();
                let outcome = read_for(&node, "a", Duration::from_secs(3)).await.unwrap();
                (outcome, started.elapsed())
            })
        })
        .collect();
    let mut times = Vec::new();
    for reader in readers {
        times.push(reader.await.unwrap().1);
    }
    times.sort();
    let loads = ground.store.loads.load(Ordering::SeqCst);
    println!("{loads} loads, p50 {:?}, p99 {:?}", times[500], times[990]);
    assert!(loads <= 2, "{loads} loads");
    for node in &nodes {
        assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
    }
}

/// A fence that panics when it is polled for the second time.
struct Panics(LocalFence, AtomicU64);

#[async_trait::async_trait]
impl Fence for Panics {
    async fn poll(&self) -> Result<Sighting, FenceError> {
        assert!(
            self.1.fetch_add(1, Ordering::SeqCst) < 1,
            "a bug in a fence"
        );
        self.0.poll().await
    }

    async fn propose(&self, proposal: &Proposal) -> Result<Sighting, FenceError> {
        self.0.propose(proposal).await
    }

    async fn mark_settled(&self, epoch: Epoch) -> Result<(), FenceError> {
        self.0.mark_settled(epoch).await
    }

    async fn report_trouble(&self) -> Result<(), FenceError> {
        self.0.report_trouble().await
    }

    async fn enter(&self, epoch: Epoch) -> Result<Guard, Fenced> {
        self.0.enter(epoch).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_background_task_that_dies_is_seen_and_ends_the_writes_at_once() {
    let ground = Ground::new(Pair::MemoryLocal).await;
    let fence = Arc::new(Panics(LocalFence::new(), AtomicU64::new(0)));
    let node = ground.start(Settings::default(), ground.cache(), fence);
    until("the death is seen", async || {
        node.cached.status().ended.is_some()
    })
    .await;
    let status = node.cached.status();
    assert!(status.ended.unwrap().contains("polls"), "{status:?}");
    assert!(status.fence_error.unwrap().contains("task has ended"));
    let written = node.write("a", Some("one")).await;
    assert!(
        matches!(
            written,
            Err(WriteError::Unavailable(Unavailable::TaskEnded))
        ),
        "{written:?}"
    );
    // Reads go on from the store.
    assert_eq!(node.value("a").await, None);
}

/// Its runtime is gone, the engine is used from another one.
#[test]
fn an_engine_whose_runtime_ended_proposes_nothing() {
    let runtime = || tokio::runtime::Runtime::new().unwrap();
    let (first, second) = (runtime(), runtime());
    let (node, other) = first.block_on(async {
        let ground = Ground::new(Pair::MemoryLocal).await;
        let fence = ground.fence();
        let node = ground.start(Settings::default(), ground.cache(), fence.clone());
        until("the cache is in use", async || node.cached.uses_cache()).await;
        (node, fence)
    });
    let epoch = first.block_on(other.poll()).unwrap().row.number;
    drop(first);
    second.block_on(async {
        let written = node.write("a", Some("one")).await;
        assert!(
            matches!(
                written,
                Err(WriteError::Unavailable(Unavailable::TaskEnded))
            ),
            "{written:?}"
        );
        assert_eq!(other.poll().await.unwrap().row.number, epoch);
        assert!(node.cached.status().ended.is_some());
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_with_in_process_caches_go_on_without_and_do_not_flap() {
    let ground = Ground::new(Pair::MemoryPostgres).await;
    let nodes = [(); 2].map(|()| ground.start(Settings::default(), ground.cache(), ground.fence()));
    until("both have a cache", async || {
        nodes.iter().all(|node| node.cached.status().connected)
    })
    .await;
    let started = std::time::Instant::now();
    while nodes.iter().all(|node| node.cached.status().connected) {
        assert!(
            started.elapsed() < support::PATIENCE * 6,
            "they flap for ever"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    until("the cache is out of use", async || {
        nodes
            .iter()
            .all(|node| node.cached.status().phase == Phase::Bypass)
    })
    .await;
    let epoch = nodes[0].cached.status().epoch;
    let started = std::time::Instant::now();
    while started.elapsed() < Duration::from_secs(5) {
        for (node, value) in nodes.iter().zip(["one", "two"]) {
            node.write("a", Some(value)).await.unwrap();
            assert_eq!(nodes[0].value("a").await.as_deref(), Some(value));
        }
        assert_eq!(nodes[0].cached.status().epoch, epoch, "they flap");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
