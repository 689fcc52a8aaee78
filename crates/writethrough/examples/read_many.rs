//! What 200 values cost when they are read together, and one by one: time, and round trips to Redis.
//! `cargo run --release -p writethrough --example read_many` starts a Redis and a Postgres of its own.
#![allow(clippy::print_stdout, reason = "a program whose output is its purpose")]

use std::time::{Duration, Instant};

use deadpool_postgres::{Manager, Pool, PoolError};
use tokio_postgres::NoTls;
use writethrough::{Entity, PostgresFence, ReadOutcome, RedisCache, RedisSettings, WriteThrough};
use writethrough_testbed::Testbed;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const ROW: Entity<i32, String> = Entity::new("row");
const COUNT: i32 = 200;
const PATIENCE: Duration = Duration::from_secs(10);
/// Of the slow link on which round trips are counted.
const ROUND_TRIP: Duration = Duration::from_millis(20);

/// What one way of reading has cost.
struct Cost {
    time: Duration,
    in_cache: Duration,
    hits: usize,
}

async fn together(cached: &WriteThrough, pool: &Pool) -> Result<Cost, Failure> {
    const SQL: &str = "SELECT id, value FROM rows WHERE id = ANY($1)";
    let ids: Vec<i32> = (0..COUNT).collect();
    let load = |missing: Vec<i32>| async move {
        let client = pool.get().await?;
        let select = client.prepare_cached(SQL).await?;
        let rows = client.query(&select, &[&missing]).await?;
        let values = rows.iter().map(|row| (row.get(0), row.get(1)));
        Ok::<Vec<(i32, String)>, PoolError>(values.collect())
    };
    let started = Instant::now();
    let read = cached.read_many(&ROW, &ids, load).await?;
    Ok(Cost {
        time: started.elapsed(),
        in_cache: read.cache_time,
        hits: read.hits,
    })
}

async fn one_by_one(cached: &WriteThrough, pool: &Pool) -> Result<Cost, Failure> {
    const SQL: &str = "SELECT value FROM rows WHERE id = $1";
    let (mut in_cache, mut hits) = (Duration::ZERO, 0);
    let started = Instant::now();
    for id in 0..COUNT {
        let load = || async {
            let client = pool.get().await?;
            let select = client.prepare_cached(SQL).await?;
            let row = client.query_opt(&select, &[&id]).await?;
            Ok::<_, PoolError>(row.map(|row| row.get(0)))
        };
        let read = cached.read(&ROW.key(id), load).await?;
        in_cache += read.cache_time;
        hits += usize::from(read.outcome == ReadOutcome::Hit);
    }
    Ok(Cost {
        time: started.elapsed(),
        in_cache,
        hits,
    })
}

/// Reads in both ways, nothing cached and then everything.
async fn measure(cached: &WriteThrough, pool: &Pool) -> Result<[Cost; 4], Failure> {
    cached.clear(&ROW).await?;
    let missed = together(cached, pool).await?;
    let hit = together(cached, pool).await?;
    cached.clear(&ROW).await?;
    let missed_singly = one_by_one(cached, pool).await?;
    let hit_singly = one_by_one(cached, pool).await?;
    Ok([hit, hit_singly, missed, missed_singly])
}

async fn engine(url: String, pool: &Pool) -> Result<WriteThrough, Failure> {
    let cache = RedisCache::connect(RedisSettings::new(url))?;
    let cached = WriteThrough::builder(cache, PostgresFence::new(pool.clone())).start()?;
    cached.ready(PATIENCE).await?;
    Ok(cached)
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let testbed = Testbed::new().await?;
    let (postgres, redis) = tokio::try_join!(testbed.postgres(), testbed.redis())?;
    let pool = Pool::builder(Manager::new(postgres.url().parse()?, NoTls)).build()?;
    let mut client = pool.get().await?;
    PostgresFence::migrate(&mut client).await?;
    let fill = format!(
        "CREATE TABLE rows (id int PRIMARY KEY, value text NOT NULL);
         INSERT INTO rows SELECT id, 'value ' || id FROM generate_series(0, {COUNT} - 1) AS id"
    );
    client.batch_execute(&fill).await?;
    drop(client);

    let near = engine(redis.url(), &pool).await?;
    // Connections, prepared statements.
    measure(&near, &pool).await?;
    let times = measure(&near, &pool).await?;
    near.shutdown().await;

    let link = testbed.link(redis.addr()).await?;
    let far = engine(link.url_for(&redis.url()), &pool).await?;
    link.delay(ROUND_TRIP / 2);
    let trips = measure(&far, &pool).await?;
    far.shutdown().await;

    println!("{COUNT} values, Redis and Postgres on this machine; round trips are those to Redis");
    let ways = [
        "hits, read_many",
        "hits, one by one",
        "misses, read_many",
        "misses, one by one",
    ];
    for (way, (near, far)) in ways.into_iter().zip(times.iter().zip(&trips)) {
        let trips = far.in_cache.as_secs_f64() / ROUND_TRIP.as_secs_f64();
        let (time, hits) = (near.time, near.hits);
        println!("{way:<20} {time:>10.2?}  {trips:>4.0} round trips  {hits:>3} hits");
    }
    Ok(())
}
