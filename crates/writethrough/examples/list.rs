//! A list, page by page: every page is cached, and a write that names the list ends all of them.
//! `cargo run -p writethrough --example list` starts a Redis and a Postgres of its own.
#![allow(clippy::print_stdout, reason = "a program whose output is its purpose")]

use std::time::Duration;

use deadpool_postgres::{Manager, Pool, PoolError};
use tokio_postgres::NoTls;
use writethrough::postgres::Statement;
use writethrough::{Collection, PostgresFence, RedisCache, RedisSettings, WriteThrough};
use writethrough_testbed::Testbed;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The notes of one author, the newest first, as pages of texts.
const NOTES_OF: Collection<str, Vec<String>> = Collection::new("notes_of");

async fn add(cached: &WriteThrough, pool: &Pool, author: &str, text: &str) -> Result<(), Failure> {
    let context = (author.to_owned(), text.to_owned());
    let write = cached.write(NOTES_OF.of(author)).with(context);
    // A list leaves no value: its pages are loaded again when they are asked for.
    let op = |statement: Statement, (), (author, text): (String, String)| async move {
        const SQL: &str = "INSERT INTO notes (author, text) VALUES ($1, $2)";
        let (_, done) = statement.execute(SQL, &[&author, &text]).await?;
        Ok::<_, tokio_postgres::Error>(done.commit(()))
    };
    write.statement(pool, op).await?;
    Ok(())
}

async fn show(cached: &WriteThrough, pool: &Pool, author: &str, page: i64) -> Result<(), Failure> {
    let load = || async {
        const SQL: &str = "SELECT text FROM notes WHERE author = $1 ORDER BY id DESC LIMIT 2 OFFSET 2 * $2::bigint";
        let client = pool.get().await?;
        let rows = client.query(SQL, &[&author, &page]).await?;
        Ok::<Vec<String>, PoolError>(rows.iter().map(|row| row.get(0)).collect())
    };
    let list = NOTES_OF.of(author);
    let read = cached.read_page(&list, &page.to_string(), load).await?;
    println!("page {page}: {:?} ({:?})", read.value, read.outcome);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let testbed = Testbed::new().await?;
    let (postgres, redis) = tokio::try_join!(testbed.postgres(), testbed.redis())?;
    let pool = Pool::builder(Manager::new(postgres.url().parse()?, NoTls)).build()?;
    let mut client = pool.get().await?;
    PostgresFence::migrate(&mut client).await?;
    let table =
        "CREATE TABLE notes (id bigserial PRIMARY KEY, author text NOT NULL, text text NOT NULL)";
    client.batch_execute(table).await?;
    drop(client);
    let cache = RedisCache::connect(RedisSettings::new(redis.url()))?;
    let cached = WriteThrough::builder(cache, PostgresFence::new(pool.clone())).start()?;
    cached.ready(Duration::from_secs(10)).await?;

    for text in ["one", "two", "three"] {
        add(&cached, &pool, "ada", text).await?;
    }
    for page in [0, 1, 0, 1] {
        show(&cached, &pool, "ada", page).await?;
    }
    add(&cached, &pool, "ada", "four").await?;
    show(&cached, &pool, "ada", 1).await?;
    cached.shutdown().await;
    Ok(())
}
