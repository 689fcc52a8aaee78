//! The memory that the in-process cache takes from the machine: never more than its capacity, whatever
//! is put into it.
#![cfg(target_os = "linux")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and shows its figures"
)]

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::{Builder, Runtime};
use writethrough::cache::{Cache, MemoryCache, Session};
use writethrough_protocol::Token;

const CAPACITY: u64 = 64 << 20;
const HOUR: Duration = Duration::from_secs(3600);

/// Resident memory of this process.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}

struct Filling {
    runtime: Runtime,
    session: Arc<dyn Session>,
    most: u64,
    done: u64,
}

impl Filling {
    /// Puts a value under key `number`, and reads it: the bytes are handed out.
    fn put(&mut self, number: u64, payload: Option<Bytes>) {
        let key = key(number);
        self.runtime.block_on(async {
            self.session.set(&key, payload, HOUR).await.unwrap();
            self.session.get(&key).await.unwrap();
        });
        self.look();
    }

    fn look(&mut self) {
        self.done += 1;
        if self.done.is_multiple_of(4096) {
            self.most = self.most.max(resident());
        }
    }
}

fn key(number: u64) -> String {
    format!("item:{number}@1234567890")
}

/// A payload of `length` bytes with a buffer to itself.
fn bytes(length: usize) -> Option<Bytes> {
    Some(Bytes::from(vec![b'x'; length]))
}

/// Set in the process that measures.
const CHILD: &str = "WRITETHROUGH_MEASURES";

/// Runs the test of this name again in a process of its own, in which nothing else has used memory,
/// and there fills a cache.
fn stays_within_its_capacity(test: &str, fill: impl FnOnce(&mut Filling)) {
    stays_within(CAPACITY, test, fill);
}

fn stays_within(bound: u64, test: &str, fill: impl FnOnce(&mut Filling)) {
    if std::env::var_os(CHILD).is_none() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        println!("{}", String::from_utf8_lossy(&said));
        assert!(output.status.success());
        return;
    }
    // What the first use of everything costs.
    drop(MemoryCache::new(CAPACITY));
    let before = resident();
    let cache = MemoryCache::new(CAPACITY);
    let session = cache.sessions().borrow().clone().unwrap();
    let mut filling = Filling {
        runtime: Builder::new_current_thread().build().unwrap(),
        session,
        most: 0,
        done: 0,
    };
    fill(&mut filling);
    let most = filling.most.max(resident()) - before;
    println!(
        "measured: {:.1} MiB, by its own count {:.1}",
        most as f64 / f64::from(1 << 20),
        cache.weight_bytes() as f64 / f64::from(1 << 20)
    );
    assert!(cache.weight_bytes() <= CAPACITY);
    assert!(most <= bound, "{most} bytes");
}

#[test]
fn small_values_take_no_more_than_the_capacity() {
    stays_within_its_capacity("small_values_take_no_more_than_the_capacity", |cache| {
        (0..600_000).for_each(|number| cache.put(number, bytes(1)));
    });
}

#[test]
fn absent_values_take_no_more_than_the_capacity() {
    stays_within_its_capacity("absent_values_take_no_more_than_the_capacity", |cache| {
        (0..600_000).for_each(|number| cache.put(number, None));
    });
}

#[test]
fn a_small_part_of_a_large_buffer_does_not_keep_the_buffer() {
    stays_within_its_capacity(
        "a_small_part_of_a_large_buffer_does_not_keep_the_buffer",
        |cache| {
            for number in 0..5_000 {
                let buffer = bytes(64 << 10).unwrap();
                cache.put(number, Some(buffer.slice(7..8)));
            }
        },
    );
}

#[test]
fn values_of_many_sizes_put_again_and_again_take_no_more_than_the_capacity() {
    stays_within_its_capacity(
        "values_of_many_sizes_put_again_and_again_take_no_more_than_the_capacity",
        |cache| {
            for round in 0..10 {
                for number in 0..40_000 {
                    let length = (number * 7919 + round * 31) % 4000;
                    cache.put(number, bytes(length as usize));
                }
            }
        },
    );
}

/// The tables keep the places of all entries that there ever were at once: large values that come
/// afterwards have what is left.
#[test]
fn large_values_after_many_small_ones_take_no_more_than_the_capacity() {
    stays_within_its_capacity(
        "large_values_after_many_small_ones_take_no_more_than_the_capacity",
        |cache| {
            (0..600_000).for_each(|number| cache.put(number, None));
            (0..20_000).for_each(|number| cache.put(number, bytes(60_000)));
        },
    );
}

/// Here an allocator has much memory to give back, in pieces, and keeps some of it for a while: up to
/// 16 MiB were measured with glibc's and with mimalloc.
#[test]
fn many_small_values_after_large_ones_take_little_more_than_the_capacity() {
    stays_within(
        CAPACITY + CAPACITY / 3,
        "many_small_values_after_large_ones_take_little_more_than_the_capacity",
        |cache| {
            (0..20_000).for_each(|number| cache.put(number, bytes(60_000)));
            (0..600_000).for_each(|number| cache.put(number, bytes(1)));
        },
    );
}

#[test]
fn leases_take_no_more_than_the_capacity() {
    stays_within_its_capacity("leases_take_no_more_than_the_capacity", |cache| {
        for number in 0..300_000 {
            let key = key(number);
            let lease = cache.session.acquire_fill(&key, Token(1), HOUR);
            cache.runtime.block_on(lease).unwrap();
            cache.look();
        }
    });
}

/// An intent stays while it lasts, whatever room there is. Nobody ends the intent of a writer that
/// died; when it has lapsed it must not stay for ever.
#[test]
fn lapsed_intents_make_room() {
    stays_within_its_capacity("lapsed_intents_make_room", |cache| {
        for number in 0..300_000 {
            let (keys, lifetime) = ([key(number)], Duration::from_millis(1));
            let begun = cache.session.begin(&keys, Token(1), lifetime);
            cache.runtime.block_on(begun).unwrap();
            cache.look();
        }
        (1_000_000..1_300_000).for_each(|number| cache.put(number, bytes(100)));
    });
}
