//! The cache and the fence for services' own tests: each command has the effect that it says, on an engine
//! as a service has it, and whatever is commanded no read goes back.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use writethrough::testing::{TestCache, TestFence};
use writethrough::{
    Bypass, CacheError, Entity, FenceError, NotReady, OpError, Read, ReadOutcome, Settings,
    Unavailable, WriteError, WriteThrough, Written,
};

const PRICE: Entity<str, u32> = Entity::new("price");
const PATIENCE: Duration = Duration::from_secs(10);

/// One node of a service that keeps prices.
#[derive(Clone)]
struct Node {
    cached: WriteThrough,
    table: Arc<Mutex<HashMap<String, u32>>>,
    /// How many times the operation of a write was run.
    runs: Arc<AtomicUsize>,
}

fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.timing.hold_off = Duration::ZERO;
    settings
}

impl Node {
    fn start(cache: &TestCache, fence: &TestFence, settings: Settings) -> Self {
        let engine = WriteThrough::builder(cache.clone(), fence.clone()).settings(settings);
        Self {
            cached: engine.start().unwrap(),
            table: Arc::default(),
            runs: Arc::default(),
        }
    }

    /// A node that uses its cache.
    async fn ready(cache: &TestCache, fence: &TestFence) -> Self {
        let node = Self::start(cache, fence, settings());
        node.cached.ready(PATIENCE).await.unwrap();
        node
    }

    async fn read(&self) -> Read<u32> {
        let load = || async { Ok::<_, Infallible>(self.table.lock().unwrap().get("tea").copied()) };
        self.cached.read(&PRICE.key("tea"), load).await.unwrap()
    }

    async fn write(&self, cents: u32) -> Result<Written<()>, WriteError<Infallible>> {
        let context = (self.table.clone(), self.runs.clone());
        let key = PRICE.key("tea");
        let write = self.cached.write(&key).with(context);
        write
            .guarded(move |mut guarded, price, (table, runs)| async move {
                runs.fetch_add(1, Ordering::SeqCst);
                table.lock().unwrap().insert("tea".to_owned(), cents);
                guarded.cache(&price, &cents);
                Ok::<_, OpError<Infallible>>(guarded.commit(()))
            })
            .await
    }

    async fn read_until(&self, is_right: impl Fn(ReadOutcome) -> bool) -> Read<u32> {
        let started = Instant::now();
        loop {
            let read = self.read().await;
            if is_right(read.outcome) {
                return read;
            }
            assert!(started.elapsed() < PATIENCE, "{:?}", read.outcome);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Reads until the value comes from the cache.
    async fn hits(&self) -> Read<u32> {
        self.read_until(|outcome| outcome == ReadOutcome::Hit).await
    }

    /// Reads under a lease, which may run out on a busy machine.
    async fn read_leased(&self) -> Read<u32> {
        let no_lease = ReadOutcome::Bypassed(Bypass::NoLease);
        self.read_until(|outcome| outcome != no_lease).await
    }
}

fn is_bypassed(read: &Read<u32>) -> bool {
    matches!(read.outcome, ReadOutcome::Bypassed(_))
}

#[tokio::test]
async fn while_the_cache_is_away_reads_go_to_the_store() {
    let (cache, fence) = (TestCache::new(), TestFence::new());
    let node = Node::ready(&cache, &fence).await;
    node.write(450).await.unwrap();
    node.hits().await;
    cache.disconnect();
    let read = node.read().await;
    assert!(is_bypassed(&read), "{:?}", read.outcome);
    assert_eq!(read.value, Some(450));
    node.write(500).await.unwrap();
    let why = node.cached.ready(Duration::from_millis(1)).await;
    assert!(
        matches!(why, Err(NotReady::Cache(Some(CacheError::Connection(_))))),
        "{why:?}"
    );
    let read = node.read().await;
    assert!(is_bypassed(&read), "{:?}", read.outcome);
    assert_eq!(read.value, Some(500));
    // The cache holds 450 still.
    cache.reconnect();
    node.cached.ready(PATIENCE).await.unwrap();
    assert_eq!(node.read().await.value, Some(500));
    assert_eq!(node.hits().await.value, Some(500));
}

#[tokio::test]
async fn a_connection_that_comes_back_at_once_finds_what_was_there() {
    let (cache, fence) = (TestCache::new(), TestFence::new());
    let node = Node::ready(&cache, &fence).await;
    let written = node.write(450).await.unwrap();
    cache.disconnect();
    cache.reconnect();
    assert_eq!(node.hits().await.value, Some(450));
    assert_eq!(node.cached.status().epoch, Some(written.epoch));
    assert_eq!(node.cached.stats().misses, 0);
}

#[tokio::test]
async fn commands_fail_until_they_do_not() {
    let (cache, fence) = (TestCache::new(), TestFence::new());
    let node = Node::ready(&cache, &fence).await;
    let before = node.write(450).await.unwrap();
    node.hits().await;
    cache.fail(true);
    let read = node.read_leased().await;
    assert_eq!(read.outcome, ReadOutcome::Bypassed(Bypass::CacheError));
    // It cannot be announced, so it is made past the cache.
    let written = node.write(500).await.unwrap();
    assert!(written.epoch > before.epoch);
    assert_eq!(node.read().await.value, Some(500));
    cache.fail(false);
    node.cached.ready(PATIENCE).await.unwrap();
    assert_eq!(node.hits().await.value, Some(500));
}

#[tokio::test]
async fn an_answer_is_late_and_one_that_is_too_late_is_an_error() {
    let (cache, fence) = (TestCache::new(), TestFence::new());
    let node = Node::ready(&cache, &fence).await;
    let before = node.write(450).await.unwrap();
    let late = Duration::from_millis(30);
    cache.delay(late);
    // The answers to its announcement and to its end.
    let written = node.write(500).await.unwrap();
    assert!(written.cache_time >= late * 2, "{:?}", written.cache_time);
    assert_eq!(written.epoch, before.epoch);
    cache.delay(TestCache::COMMAND_TIMEOUT * 2);
    let read = node.read_leased().await;
    assert_eq!(read.outcome, ReadOutcome::Bypassed(Bypass::CacheError));
    // It was announced, but the node does not know it.
    let written = node.write(550).await.unwrap();
    assert!(written.epoch > before.epoch);
    cache.delay(Duration::ZERO);
    node.cached.ready(PATIENCE).await.unwrap();
    assert_eq!(node.hits().await.value, Some(550));
}

#[tokio::test]
async fn a_cache_that_lost_everything_is_another_server_and_empty() {
    let (cache, fence) = (TestCache::new(), TestFence::new());
    let node = Node::ready(&cache, &fence).await;
    let before = node.write(450).await.unwrap();
    let server = node.cached.status().server;
    cache.lose_everything();
    assert_eq!(node.read().await.value, Some(450));
    let written = node.write(500).await.unwrap();
    assert!(written.epoch > before.epoch);
    node.cached.ready(PATIENCE).await.unwrap();
    let status = node.cached.status();
    assert!(status.server.is_some());
    assert_ne!(status.server, server);
    assert_eq!(node.cached.cached_values(&PRICE).await, Some(0));
    assert_eq!(node.read().await.value, Some(500));
    assert_eq!(node.hits().await.value, Some(500));
}

#[tokio::test]
async fn a_cache_that_lost_everything_while_it_was_away_stays_away() {
    let (cache, fence) = (TestCache::new(), TestFence::new());
    let node = Node::ready(&cache, &fence).await;
    let server = node.cached.status().server;
    cache.disconnect();
    cache.lose_everything();
    node.write(450).await.unwrap();
    assert!(!node.cached.status().connected);
    cache.reconnect();
    node.cached.ready(PATIENCE).await.unwrap();
    assert_ne!(node.cached.status().server, server);
}

#[tokio::test]
async fn an_answer_is_held_back_until_it_is_released_or_its_connection_is_lost() {
    let (cache, fence) = (TestCache::new(), TestFence::new());
    let node = Node::ready(&cache, &fence).await;
    node.write(450).await.unwrap();
    node.hits().await;
    for lose in [false, true] {
        cache.hold();
        let reader = node.clone();
        let read = tokio::spawn(async move { reader.read_leased().await });
        cache.until_held().await;
        assert!(!read.is_finished());
        if lose {
            cache.disconnect();
        } else {
            cache.release();
        }
        let read = read.await.unwrap();
        assert_eq!(read.value, Some(450));
        assert_eq!(is_bypassed(&read), lose, "{:?}", read.outcome);
    }
}

#[tokio::test]
async fn a_write_whose_epoch_has_ended_is_run_in_the_next_one() {
    let (cache, fence) = (TestCache::new(), TestFence::new());
    let node = Node::ready(&cache, &fence).await;
    let before = node.write(450).await.unwrap();
    cache.hold();
    let writer = node.clone();
    let write = tokio::spawn(async move { writer.write(500).await });
    cache.until_held().await;
    let next = fence.end_epoch().await;
    assert!(next > before.epoch);
    assert_eq!(node.runs.load(Ordering::SeqCst), 1);
    cache.release();
    let written = write.await.unwrap().unwrap();
    assert!(written.epoch >= next);
    assert_eq!(
        node.runs.load(Ordering::SeqCst),
        2,
        "the operation was not run under the guard that was refused"
    );
    assert_eq!(node.read().await.value, Some(500));
}

#[tokio::test]
async fn an_epoch_ends_after_the_write_that_holds_its_guard() {
    let (cache, fence) = (TestCache::new(), TestFence::new());
    let node = Node::ready(&cache, &fence).await;
    let (began, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let key = PRICE.key("tea");
    let write = node.cached.write(&key).with((began.clone(), go_on.clone()));
    let write = write.guarded(|guarded, _, (began, go_on)| async move {
        began.notify_one();
        go_on.notified().await;
        Ok::<_, OpError<Infallible>>(guarded.commit(()))
    });
    let ending = async {
        began.notified().await;
        let mut ending = Box::pin(fence.end_epoch());
        // Longer than the fence itself waits.
        let soon = tokio::time::timeout(Duration::from_millis(150), &mut ending).await;
        assert!(soon.is_err(), "the write holds a guard");
        go_on.notify_one();
        ending.await
    };
    let (written, next) = tokio::join!(write, ending);
    assert!(written.unwrap().epoch < next);
}

#[tokio::test]
async fn a_fence_that_is_away_gives_no_epoch_until_it_is_back() {
    let (cache, fence) = (TestCache::new(), TestFence::new());
    fence.away();
    let write_deadline = Duration::from_millis(300);
    let hasty = Settings {
        write_timeout: write_deadline / 2,
        write_deadline,
        ..settings()
    };
    let node = Node::start(&cache, &fence, hasty);
    let refused = node.write(450).await.unwrap_err();
    assert!(
        matches!(refused, WriteError::Unavailable(Unavailable::Fence)),
        "{refused:?}"
    );
    let why = node.cached.ready(Duration::from_millis(1)).await;
    assert!(
        matches!(why, Err(NotReady::Fence(FenceError::Away(_)))),
        "{why:?}"
    );
    assert!(is_bypassed(&node.read().await));
    fence.back();
    node.cached.ready(PATIENCE).await.unwrap();
    node.write(500).await.unwrap();
    assert_eq!(node.hits().await.value, Some(500));
    // What was polled before it went is believed no longer than the lease.
    fence.away();
    let no_lease = ReadOutcome::Bypassed(Bypass::NoLease);
    let read = node.read_until(|outcome| outcome == no_lease).await;
    assert_eq!(read.value, Some(500));
}

#[tokio::test]
async fn a_write_does_not_wait_for_a_fence_that_is_broken() {
    let (cache, fence) = (TestCache::new(), TestFence::new());
    fence.broken("its table is gone");
    let node = Node::start(&cache, &fence, settings());
    let started = Instant::now();
    let refused = node.write(450).await.unwrap_err();
    assert!(started.elapsed() < Settings::WRITE_DEADLINE / 2);
    match refused {
        WriteError::Unavailable(Unavailable::FenceBroken(reason)) => {
            assert!(reason.contains("its table is gone"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    fence.back();
    node.cached.ready(PATIENCE).await.unwrap();
    node.write(500).await.unwrap();
}

#[tokio::test]
async fn nodes_that_share_a_cache_and_a_fence_read_what_the_others_write() {
    let (cache, fence) = (TestCache::new(), TestFence::new());
    let one = Node::ready(&cache, &fence).await;
    let other = Node {
        table: one.table.clone(),
        ..Node::ready(&cache, &fence).await
    };
    one.write(450).await.unwrap();
    assert_eq!(other.hits().await.value, Some(450));
    other.write(500).await.unwrap();
    assert_eq!(one.hits().await.value, Some(500));
    assert_eq!(other.cached.stats().misses + one.cached.stats().misses, 0);
    cache.lose_everything();
    one.write(550).await.unwrap();
    assert_eq!(other.read().await.value, Some(550));
    other.cached.ready(PATIENCE).await.unwrap();
    one.cached.ready(PATIENCE).await.unwrap();
    assert_eq!(other.hits().await.value, Some(550));
    assert_eq!(one.hits().await.value, Some(550));
}

#[tokio::test]
async fn the_next_engine_starts_on_a_cache_that_the_last_one_has_closed() {
    let (cache, fence) = (TestCache::new(), TestFence::new());
    let last = Node::ready(&cache, &fence).await;
    last.write(450).await.unwrap();
    last.cached.shutdown().await;
    cache.reconnect();
    let next = Node {
        table: last.table.clone(),
        ..Node::ready(&cache, &fence).await
    };
    assert_eq!(next.hits().await.value, Some(450));
    assert_eq!(next.cached.stats().misses, 0, "the contents have stayed");
}
