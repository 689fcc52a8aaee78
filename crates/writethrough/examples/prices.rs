//! The library in front of a table of its own, on Postgres and Redis:
//! `cargo run -p writethrough --example prices -- POSTGRES_URL REDIS_URL`.
#![allow(clippy::print_stdout, reason = "a program whose output is its purpose")]

use std::time::Duration;

use deadpool_postgres::{Manager, Pool, PoolError};
use tokio_postgres::NoTls;
use writethrough::postgres::Statement;
use writethrough::{Entity, PostgresFence, RedisCache, RedisSettings, WriteThrough};

/// Prices in cents, by their names.
const PRICE: Entity<str, i64> = Entity::new("price");

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Sets a price: one statement, which goes together with its guard and its commit.
async fn set(cached: &WriteThrough, pool: &Pool, name: &str, cents: i64) -> Result<(), Failure> {
    let write = cached.write(PRICE.key(name)).with((name.to_owned(), cents));
    let op = |statement: Statement, price, (name, cents): (String, i64)| async move {
        const SQL: &str = "INSERT INTO prices VALUES ($1, $2)
                           ON CONFLICT (name) DO UPDATE SET cents = excluded.cents";
        let (_, mut done) = statement.execute(SQL, &[&name, &cents]).await?;
        done.cache(&price, &cents);
        Ok::<_, tokio_postgres::Error>(done.commit(()))
    };
    write.statement(pool, op).await?;
    Ok(())
}

/// Reads a price, and tells where it came from.
async fn show(cached: &WriteThrough, pool: &Pool, name: &str) -> Result<(), Failure> {
    let load = || async {
        let client = pool.get().await?;
        const SQL: &str = "SELECT cents FROM prices WHERE name = $1";
        let row = client.query_opt(SQL, &[&name]).await?;
        Ok::<_, PoolError>(row.map(|row| row.get(0)))
    };
    let read = cached.read(&PRICE.key(name), load).await?;
    println!("{name}: {:?} ({:?})", read.value, read.outcome);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let mut argument = || {
        arguments
            .next()
            .ok_or("usage: prices POSTGRES_URL REDIS_URL")
    };
    let (postgres, redis) = (argument()?, argument()?);
    let pool = Pool::builder(Manager::new(postgres.parse()?, NoTls)).build()?;
    let mut client = pool.get().await?;
    PostgresFence::migrate(&mut client).await?;
    let table = "CREATE TABLE IF NOT EXISTS prices (name text PRIMARY KEY, cents bigint NOT NULL)";
    client.batch_execute(table).await?;
    drop(client);

    let cache = RedisCache::connect(RedisSettings::new(redis))?;
    let cached = WriteThrough::builder(cache, PostgresFence::new(pool.clone())).start()?;
    // Optional: without it the first reads come from Postgres.
    cached.ready(Duration::from_secs(5)).await?;

    show(&cached, &pool, "coffee").await?;
    set(&cached, &pool, "tea", 450).await?;
    show(&cached, &pool, "tea").await?;
    set(&cached, &pool, "tea", 500).await?;
    show(&cached, &pool, "tea").await?;
    cached.clear(&PRICE).await?;
    show(&cached, &pool, "tea").await?;
    show(&cached, &pool, "tea").await?;
    cached.shutdown().await;
    Ok(())
}
