//! Callers, executors and runtimes other than the usual one: what works, what is an error, what is
//! counted. Nothing panics.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::convert::Infallible;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use futures::executor::block_on;
use support::{Ground, Node, Pair, ROW, ROWS, until};
use tokio::runtime::{Builder, Runtime};
use writethrough::writing::Commit;
use writethrough::{
    Bypass, Indeterminate, LocalFence, MemoryCache, OpError, ReadOutcome, RedisCache,
    RedisSettings, Settings, WriteError, WriteThrough,
};

fn driven_all_the_time() -> Runtime {
    let mut runtime = Builder::new_multi_thread();
    runtime.worker_threads(1).enable_all().build().unwrap()
}

fn driven_by_calls() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

#[test]
fn starting_and_connecting_outside_of_a_runtime_are_errors_with_the_remedy() {
    let started = WriteThrough::builder(MemoryCache::new(1 << 20), LocalFence::new()).start();
    let connected = RedisCache::connect(RedisSettings::new("redis://127.0.0.1:1"));
    for error in [
        started.err().unwrap().to_string(),
        connected.err().unwrap().to_string(),
    ] {
        assert!(error.contains("#[tokio::main]"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let runtime = driven_all_the_time();
    let _entered = runtime.enter();
    RedisCache::connect(RedisSettings::new("redis://127.0.0.1:1")).unwrap();
}

/// Timers and tasks of tokio panic under an executor that is not tokio's.
fn another_executor_may_poll_every_call(pair: Pair) {
    let runtime = driven_all_the_time();
    let ground = runtime.block_on(Ground::new(pair));
    let node = runtime.block_on(ground.node());
    block_on(async {
        assert_eq!(node.value("1").await, None);
        node.write("1", Some("new")).await.unwrap();
        let read = node.read("1").await;
        assert_eq!(read.value.unwrap(), "new");
        assert_eq!(read.outcome, ReadOutcome::Hit);
        let load = || async { Ok::<_, Infallible>("page".to_owned()) };
        let rows = ROWS.all();
        node.cached.read_page(&rows, "q", load).await.unwrap();
        assert_eq!(node.cached.cached_values(&ROW).await, Some(1));
        assert_eq!(node.cached.clear(&ROW).await.unwrap(), 1);
        assert_eq!(node.cached.clear(&ROWS).await.unwrap(), 2);
        // Loads and renews for longer than a fill lease lasts.
        let load = || async {
            tokio::time::sleep(Settings::default().fill_lease * 4 / 3).await;
            Ok::<_, Infallible>(Some("slow".to_owned()))
        };
        let read = node.cached.read(&ROW.key("2"), load).await.unwrap();
        assert_eq!(read.outcome, ReadOutcome::Filled);
        node.cached.shutdown().await;
    });
    assert_eq!(node.cached.stats().abandoned_writes, 0);
}

#[test]
fn another_executor_may_poll_every_call_in_process() {
    another_executor_may_poll_every_call(Pair::MemoryLocal);
}

#[test]
fn another_executor_may_poll_every_call_on_redis() {
    another_executor_may_poll_every_call(Pair::RedisLocal);
}

/// Begins a write that waits in its operation for ever, on `runtime`.
fn begin_write(runtime: &Runtime, node: &Node) -> Receiver<()> {
    let (begun, wait) = channel();
    let cached = node.cached.clone();
    runtime.spawn(async move {
        let op = |_, _, begun: Sender<()>| async move {
            begun.send(()).unwrap();
            std::future::pending::<Result<Commit<()>, OpError<Infallible>>>().await
        };
        cached.write(ROW.key("1")).with(begun).guarded(op).await
    });
    wait
}

/// The task of a write is dropped with the runtime that it runs in: nobody ends it.
#[test]
fn a_write_that_its_runtime_ends_is_counted_and_its_key_is_read_from_the_store() {
    let runtime = driven_all_the_time();
    let ground = runtime.block_on(Ground::new(Pair::MemoryLocal));
    let node = runtime.block_on(ground.node());
    runtime.block_on(node.write("1", Some("old"))).unwrap();
    for callers in [driven_all_the_time(), driven_by_calls()] {
        let before = node.cached.stats().abandoned_writes;
        let begun = begin_write(&callers, &node);
        callers.block_on(async {
            let received = tokio::task::spawn_blocking(move || begun.recv());
            received.await.unwrap().unwrap();
        });
        assert_eq!(node.cached.stats().abandoned_writes, before);
        callers.shutdown_background();
        runtime.block_on(until("the write is counted", async || {
            node.cached.stats().abandoned_writes == before + 1
        }));
    }
    let read = runtime.block_on(node.read("1"));
    assert_eq!(read.value.unwrap(), "old");
    assert_eq!(read.outcome, ReadOutcome::Bypassed(Bypass::Intent));
    // Nothing waits for what has ended.
    let started = Instant::now();
    runtime.block_on(node.cached.shutdown());
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_write_whose_operation_panics_is_counted_and_its_outcome_is_unknown() {
    let runtime = driven_all_the_time();
    let ground = runtime.block_on(Ground::new(Pair::MemoryLocal));
    let node = runtime.block_on(ground.node());
    let write = node.cached.write(ROW.key("1"));
    let op = |_, _, ()| async { panic!("an operation of the test") };
    let written = runtime.block_on(write.guarded::<(), Infallible, _, _>(op));
    assert!(matches!(
        written,
        Err(WriteError::Indeterminate(Indeterminate::Abandoned))
    ));
    assert_eq!(node.cached.stats().abandoned_writes, 1);
}

/// Between the calls nobody polls the epoch, so the read lease is over when the next one comes.
#[test]
fn in_a_runtime_driven_only_by_calls_reads_are_right_and_come_from_the_store() {
    let runtime = driven_by_calls();
    let ground = runtime.block_on(Ground::new(Pair::MemoryLocal));
    let node = runtime.block_on(ground.node());
    runtime.block_on(node.write("1", Some("new"))).unwrap();
    assert_eq!(runtime.block_on(node.read("1")).outcome, ReadOutcome::Hit);
    let lease = Settings::default().timing.lease;
    driven_all_the_time().block_on(async { tokio::time::sleep(lease).await });
    let read = runtime.block_on(node.read("1"));
    assert_eq!(read.value.unwrap(), "new");
    assert!(
        matches!(read.outcome, ReadOutcome::Bypassed(_)),
        "{:?}",
        read.outcome
    );
}
