//! What a hit allocates, counted: the path of most requests must not grow unseen.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and shows its figures"
)]

mod support;

use std::convert::Infallible;

use bytes::Bytes;
use support::{Ground, Pair};
use tokio::runtime::Builder;
use writethrough::format::AsBytes;
use writethrough::{Entity, Key};
use writethrough::{ReadOutcome, WriteThrough};

const ROW: Entity<str, Bytes, AsBytes> = Entity::new("row");

/// The allocations of one hit with everything that it causes on this thread, the client's driver
/// included. The fewest of many, because the poll of the epoch falls into some of them.
fn allocations_of_a_hit(pair: Pair) -> u64 {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let ground = runtime.block_on(Ground::new(pair));
    let node = runtime.block_on(ground.node());
    let key = ROW.key("1");
    runtime.block_on(read(&node.cached, &key));
    let counts = (0..200).map(|_| {
        let mut outcome = ReadOutcome::Unfilled;
        // Boxed beforehand: the runtime boxes what is large, at a size that depends on the build.
        let hit = Box::pin(read(&node.cached, &key));
        let counted = allocation_counter::measure(|| {
            outcome = runtime.block_on(hit);
        });
        match outcome {
            ReadOutcome::Hit => counted.count_total,
            _ => u64::MAX,
        }
    });
    let fewest = counts.min().unwrap();
    println!("{pair:?}: a hit makes {fewest} allocations");
    fewest
}

async fn read(cached: &WriteThrough, key: &Key<Bytes, AsBytes>) -> ReadOutcome {
    let load = || async { Ok::<_, Infallible>(Some(Bytes::from_static(b"value"))) };
    cached.read(key, load).await.unwrap().outcome
}

#[test]
fn a_hit_in_process_allocates_little() {
    let fewest = allocations_of_a_hit(Pair::MemoryLocal);
    assert!(fewest <= 2, "{fewest} allocations");
}

#[test]
fn a_hit_in_redis_allocates_little() {
    let fewest = allocations_of_a_hit(Pair::RedisLocal);
    assert!(fewest <= 10, "{fewest} allocations");
}
