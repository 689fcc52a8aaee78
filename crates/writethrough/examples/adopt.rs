//! A table that was there before the library, and a program past the library that still writes to it: what
//! that program has changed is invalidated. `cargo run -p writethrough --example adopt` starts a Redis and
//! a Postgres of its own.
#![allow(clippy::print_stdout, reason = "a program whose output is its purpose")]

use std::time::Duration;

use deadpool_postgres::{Manager, Pool, PoolError};
use tokio_postgres::NoTls;
use writethrough::postgres::Statement;
use writethrough::{Entity, PostgresFence, RedisCache, RedisSettings, WriteThrough};
use writethrough_testbed::Testbed;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const CITY: Entity<i32, String> = Entity::new("city");

async fn show(cached: &WriteThrough, pool: &Pool) -> Result<(), Failure> {
    let load = || async {
        let client = pool.get().await?;
        let row = client.query_opt("SELECT name FROM cities WHERE id = 1", &[]);
        Ok::<_, PoolError>(row.await?.map(|row| row.get(0)))
    };
    let read = cached.read(&CITY.key(1), load).await?;
    println!("{:?} ({:?})", read.value, read.outcome);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let testbed = Testbed::new().await?;
    let (postgres, redis) = tokio::try_join!(testbed.postgres(), testbed.redis())?;
    let pool = Pool::builder(Manager::new(postgres.url().parse()?, NoTls)).build()?;
    let mut client = pool.get().await?;
    let old = "CREATE TABLE cities (id int PRIMARY KEY, name text NOT NULL);
               INSERT INTO cities VALUES (1, 'Byzantium')";
    client.batch_execute(old).await?;

    // The table stays as it is. What the library needs is a schema of its own.
    PostgresFence::migrate(&mut client).await?;
    let cache = RedisCache::connect(RedisSettings::new(redis.url()))?;
    let cached = WriteThrough::builder(cache, PostgresFence::new(pool.clone())).start()?;
    cached.ready(Duration::from_secs(10)).await?;
    show(&cached, &pool).await?;
    show(&cached, &pool).await?;

    // The other program. Until it is invalidated, the old name may be read.
    let renamed = "UPDATE cities SET name = 'Constantinople' WHERE id = 1";
    client.batch_execute(renamed).await?;
    show(&cached, &pool).await?;
    cached.invalidate(&CITY.key(1)).await?;
    show(&cached, &pool).await?;

    // Many rows at once: the cache is given up before the statement, and begins empty after it.
    let write = cached.write(CITY.whole());
    let op = |statement: Statement, (), ()| async move {
        let (count, done) = statement
            .execute("UPDATE cities SET name = upper(name)", &[])
            .await?;
        Ok::<_, tokio_postgres::Error>(done.commit(count))
    };
    println!("{} renamed", write.statement(&pool, op).await?.output);
    show(&cached, &pool).await?;
    cached.shutdown().await;
    Ok(())
}
