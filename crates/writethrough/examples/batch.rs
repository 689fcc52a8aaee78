//! Many values in one call: hits in one round trip to Redis, and one statement for what it does not have.
//! `cargo run -p writethrough --example batch` starts a Redis and a Postgres of its own; what it saves is
//! measured by the example `read_many`.
#![allow(clippy::print_stdout, reason = "a program whose output is its purpose")]

use std::time::Duration;

use deadpool_postgres::{Manager, Pool, PoolError};
use tokio_postgres::NoTls;
use writethrough::{Entity, PostgresFence, RedisCache, RedisSettings, WriteThrough};
use writethrough_testbed::Testbed;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const COLOUR: Entity<i32, String> = Entity::new("colour");

async fn show(cached: &WriteThrough, pool: &Pool, ids: &[i32]) -> Result<(), Failure> {
    // Returns what there is, in any order: an id that is left out does not exist.
    let load = |missing: Vec<i32>| async move {
        let client = pool.get().await?;
        const SQL: &str = "SELECT id, name FROM colours WHERE id = ANY ($1)";
        let rows = client.query(SQL, &[&missing]).await?;
        let values = rows.iter().map(|row| (row.get(0), row.get(1)));
        Ok::<Vec<(i32, String)>, PoolError>(values.collect())
    };
    let read = cached.read_many(&COLOUR, ids, load).await?;
    let names: Vec<_> = ids.iter().map(|id| read.values.get(id)).collect();
    println!("{names:?}: {} hits, {} loaded", read.hits, read.loaded);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let testbed = Testbed::new().await?;
    let (postgres, redis) = tokio::try_join!(testbed.postgres(), testbed.redis())?;
    let pool = Pool::builder(Manager::new(postgres.url().parse()?, NoTls)).build()?;
    let mut client = pool.get().await?;
    PostgresFence::migrate(&mut client).await?;
    let table = "CREATE TABLE colours (id int PRIMARY KEY, name text NOT NULL);
                 INSERT INTO colours VALUES (1, 'red'), (2, 'green'), (3, 'blue')";
    client.batch_execute(table).await?;
    drop(client);
    let cache = RedisCache::connect(RedisSettings::new(redis.url()))?;
    let cached = WriteThrough::builder(cache, PostgresFence::new(pool.clone())).start()?;
    cached.ready(Duration::from_secs(10)).await?;

    show(&cached, &pool, &[1, 2]).await?;
    show(&cached, &pool, &[3, 1, 4, 2]).await?;
    // That there is no colour 4 is known by now.
    show(&cached, &pool, &[3, 1, 4, 2]).await?;
    cached.shutdown().await;
    Ok(())
}
