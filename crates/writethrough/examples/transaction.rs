//! A transaction of several statements: an order takes from the stock, or nothing of it is written.
//! `cargo run -p writethrough --example transaction` starts a Redis and a Postgres of its own.
#![allow(clippy::print_stdout, reason = "a program whose output is its purpose")]

use std::time::Duration;

use deadpool_postgres::{Manager, Pool};
use tokio_postgres::NoTls;
use writethrough::postgres::Transaction;
use writethrough::{Entity, PostgresFence, RedisCache, RedisSettings, WriteError, WriteThrough};
use writethrough_testbed::Testbed;

const STOCK: Entity<str, i32> = Entity::new("stock");
const ORDERS: Entity<str, i64> = Entity::new("orders");

/// Why an order was not taken; nothing of it was written then.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("there are not that many")]
    SoldOut,
    #[error(transparent)]
    Database(#[from] tokio_postgres::Error),
}

/// Returns how many are left.
async fn order(cached: &WriteThrough, pool: &Pool, count: i32) -> Result<i32, WriteError<Refusal>> {
    const TAKE: &str = "UPDATE stock SET count = count - $1 WHERE name = 'tea' RETURNING count";
    const NOTE: &str = "INSERT INTO orders (name, count) VALUES ('tea', $1)";
    const COUNT: &str = "SELECT count(*) FROM orders WHERE name = 'tea'";
    let op = move |mut tx: Transaction, (stock, orders), ()| async move {
        let left: i32 = tx.query_one(TAKE, &[&count]).await?.get(0);
        if left < 0 {
            return Err(Refusal::SoldOut);
        }
        tx.execute(NOTE, &[&count]).await?;
        let noted: i64 = tx.query_one(COUNT, &[]).await?.get(0);
        tx.cache(&stock, &left);
        tx.cache(&orders, &noted);
        Ok(tx.commit(left))
    };
    let write = cached.write((STOCK.key("tea"), ORDERS.key("tea")));
    Ok(write.transaction(pool, op).await?.output)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let testbed = Testbed::new().await?;
    let (postgres, redis) = tokio::try_join!(testbed.postgres(), testbed.redis())?;
    let pool = Pool::builder(Manager::new(postgres.url().parse()?, NoTls)).build()?;
    let mut client = pool.get().await?;
    PostgresFence::migrate(&mut client).await?;
    let tables = "CREATE TABLE stock (name text PRIMARY KEY, count int NOT NULL);
                  CREATE TABLE orders (id bigserial PRIMARY KEY, name text, count int NOT NULL);
                  INSERT INTO stock VALUES ('tea', 5)";
    client.batch_execute(tables).await?;
    drop(client);
    let cache = RedisCache::connect(RedisSettings::new(redis.url()))?;
    let cached = WriteThrough::builder(cache, PostgresFence::new(pool.clone())).start()?;
    cached.ready(Duration::from_secs(10)).await?;

    for count in [3, 3, 2] {
        match order(&cached, &pool, count).await {
            Ok(left) => println!("{count} ordered, {left} left"),
            Err(WriteError::Rejected(refusal)) => println!("{count} refused: {refusal}"),
            Err(error) => return Err(error.into()),
        }
    }
    cached.shutdown().await;
    Ok(())
}
