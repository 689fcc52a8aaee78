//! The library without a server: values in this process's memory, in front of a store of one's own.
//! `cargo run -p writethrough --example in_memory`
#![allow(clippy::print_stdout, reason = "a program whose output is its purpose")]

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use writethrough::writing::Guarded;
use writethrough::{Entity, LocalFence, MemoryCache, OpError, WriteThrough};

const STOCK: Entity<str, u32> = Entity::new("stock");

/// Any store will do that one process alone writes to.
#[derive(Clone, Default)]
struct Store(Arc<Mutex<HashMap<String, u32>>>);

impl Store {
    fn get(&self, name: &str) -> Option<u32> {
        let rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rows.get(name).copied()
    }

    fn put(&self, name: &str, count: u32) {
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rows.insert(name.to_owned(), count);
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let store = Store::default();
    let cache = MemoryCache::new(16 << 20);
    let cached = WriteThrough::builder(cache, LocalFence::new()).start()?;
    cached.ready(Duration::from_secs(5)).await?;

    let key = STOCK.key("tea");
    for _ in 0..2 {
        let load = || async { Ok::<_, Infallible>(store.get("tea")) };
        let read = cached.read(&key, load).await?;
        println!("{:?} ({:?})", read.value, read.outcome);
    }
    let write = cached.write(&key).with(store.clone());
    let op = |mut guarded: Guarded, slot, store: Store| async move {
        store.put("tea", 12);
        guarded.cache(&slot, &12);
        Ok::<_, OpError<Infallible>>(guarded.commit(()))
    };
    write.guarded(op).await?;
    let load = || async { Ok::<_, Infallible>(store.get("tea")) };
    let read = cached.read(&key, load).await?;
    println!("{:?} ({:?})", read.value, read.outcome);
    cached.shutdown().await;
    Ok(())
}
