//! A transaction of several statements over a service's own sqlx: money goes from one account to another.
//! `cargo run -p writethrough --example sqlx_transfer` starts a Redis and a Postgres of its own.
#![allow(clippy::print_stdout, reason = "a program whose output is its purpose")]

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use writethrough::sqlx::Transaction;
use writethrough::{Entity, RedisCache, RedisSettings, SqlxFence, WriteThrough};
use writethrough_testbed::Testbed;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What an account holds, in cents, by its name.
const BALANCE: Entity<str, i64> = Entity::new("balance");

async fn change(tx: &mut PgConnection, name: &str, by: i64) -> Result<i64, sqlx::Error> {
    const SQL: &str = "UPDATE accounts SET cents = cents + $2 WHERE name = $1 RETURNING cents";
    let update = sqlx::query_scalar(SQL).bind(name).bind(by);
    update.fetch_one(tx).await
}

/// Both values are written, or none; the check of the table refuses to overdraw an account.
async fn transfer(cached: &WriteThrough, pool: &PgPool, cents: i64) -> Result<(), Failure> {
    let op = move |mut tx: Transaction, (from, to), ()| async move {
        let left = change(&mut tx, "ada", -cents).await?;
        let held = change(&mut tx, "bob", cents).await?;
        tx.cache(&from, &left);
        tx.cache(&to, &held);
        Ok::<_, sqlx::Error>(tx.commit(()))
    };
    let write = cached.write((BALANCE.key("ada"), BALANCE.key("bob")));
    write.transaction(pool, op).await?;
    Ok(())
}

async fn show(cached: &WriteThrough, pool: &PgPool, name: &str) -> Result<(), Failure> {
    let load = || {
        const SQL: &str = "SELECT cents FROM accounts WHERE name = $1";
        sqlx::query_scalar(SQL).bind(name).fetch_optional(pool)
    };
    let read = cached.read(&BALANCE.key(name), load).await?;
    println!("{name}: {:?} ({:?})", read.value, read.outcome);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let testbed = Testbed::new().await?;
    let (postgres, redis) = tokio::try_join!(testbed.postgres(), testbed.redis())?;
    let pool = PgPool::connect(&postgres.url()).await?;
    SqlxFence::migrate(&mut *pool.acquire().await?).await?;
    let table =
        "CREATE TABLE accounts (name text PRIMARY KEY, cents bigint NOT NULL CHECK (cents >= 0));
                 INSERT INTO accounts VALUES ('ada', 500), ('bob', 0)";
    sqlx::raw_sql(table).execute(&pool).await?;
    let cache = RedisCache::connect(RedisSettings::new(redis.url()))?;
    let cached = WriteThrough::builder(cache, SqlxFence::new(pool.clone())).start()?;
    cached.ready(Duration::from_secs(10)).await?;

    transfer(&cached, &pool, 400).await?;
    show(&cached, &pool, "ada").await?;
    show(&cached, &pool, "bob").await?;
    if let Err(refused) = transfer(&cached, &pool, 400).await {
        println!("{refused}");
    }
    show(&cached, &pool, "ada").await?;
    cached.shutdown().await;
    Ok(())
}
