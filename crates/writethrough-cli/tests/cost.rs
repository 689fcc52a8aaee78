//! What each operation costs, counted: statements by Postgres itself, round trips by the time they
//! take over links that are slow.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and shows its figures when it does"
)]

use std::time::Duration;

use reqwest::{Client, Response};
use serde_json::{Value, json};
use writethrough_lab::cluster::Serve;
use writethrough_testbed::{Testbed, until};

const DELAY: Duration = Duration::from_millis(60);
const PATIENCE: Duration = Duration::from_secs(20);

/// Milliseconds that a `Server-Timing` header gives to a part; 0 when it is not mentioned.
fn part(response: &Response, name: &str) -> f64 {
    let header = response
        .headers()
        .get("server-timing")
        .map_or("", |value| value.to_str().unwrap());
    let part = header
        .split(", ")
        .find_map(|part| part.strip_prefix(name)?.strip_prefix(";dur="));
    part.map_or(0.0, |duration| duration.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_operation_costs_what_is_promised() {
    let testbed = Testbed::new().await.unwrap();
    let (postgres, redis) = tokio::join!(testbed.postgres(), testbed.redis());
    let (postgres, redis) = (postgres.unwrap(), redis.unwrap());
    let to_redis = testbed.link(redis.addr()).await.unwrap();
    let to_postgres = testbed.link(postgres.addr()).await.unwrap();
    let api = Serve::new("api", env!("CARGO_BIN_EXE_writethrough"))
        .database(&to_postgres.url_for(&postgres.url()))
        .cache(&to_redis.url_for(&redis.url()));
    let api = api.start(&testbed).await.unwrap();
    let items = format!("{}/items", api.url());
    let client = Client::builder().timeout(PATIENCE).build().unwrap();

    let create = async || {
        let body = json!({"name": "n", "price": 1});
        client
            .post(&items)
            .json(&body)
            .send()
            .await
            .unwrap()
            .error_for_status()
            .unwrap()
    };
    let put = async |id: &str| {
        let body = json!({"name": "m", "price": 2});
        let response = client
            .put(format!("{items}/{id}"))
            .json(&body)
            .send()
            .await
            .unwrap();
        response.error_for_status().unwrap()
    };
    let delete = async |id: &str| {
        let response = client.delete(format!("{items}/{id}")).send().await.unwrap();
        response.error_for_status().unwrap()
    };
    let get = async |id: &str| {
        let response = client.get(format!("{items}/{id}")).send().await.unwrap();
        response.error_for_status().unwrap()
    };
    let list = async || {
        client
            .get(&items)
            .send()
            .await
            .unwrap()
            .error_for_status()
            .unwrap()
    };
    let clear = async || {
        let clear = format!("{}/cache/clear", api.url());
        client
            .post(clear)
            .send()
            .await
            .unwrap()
            .error_for_status()
            .unwrap();
    };
    let statements = async || -> i64 {
        let count = "SELECT coalesce(sum(calls), 0) FROM pg_stat_statements
                     WHERE query LIKE '%items%' AND query NOT LIKE '%pg_stat%'";
        postgres.run(count).await.unwrap().trim().parse().unwrap()
    };

    // Once each, so that the connections are made and the statements prepared.
    until("the cache is in use", PATIENCE, || async {
        let sample = format!("{items}/550e8400-e29b-41d4-a716-446655440001");
        let response = client.get(sample).send().await.ok()?;
        let cache = response
            .headers()
            .get("cache-status")?
            .to_str()
            .ok()?
            .to_owned();
        cache.contains("hit").then_some(())
    })
    .await
    .unwrap_or_else(|error| panic!("{error}\n{}", api.process().log_tail(30)));
    let warm = create().await.json::<Value>().await.unwrap()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    clear().await;
    get(&warm).await;
    put(&warm).await;
    list().await;
    delete(&warm).await;

    to_redis.delay(DELAY);
    to_postgres.delay(DELAY);
    let counted = async |operation: &str, response: Response, before: i64| {
        let (redis, postgres) = (part(&response, "redis"), part(&response, "postgres"));
        let calls = statements().await - before;
        println!("{operation}: {calls} statements, redis {redis} ms, postgres {postgres} ms");
        (response, calls, redis, postgres)
    };

    let before = statements().await;
    let (created, create_calls, create_redis, create_postgres) =
        counted("create", create().await, before).await;
    let id = created.json::<Value>().await.unwrap()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let before = statements().await;
    let (_, hit_calls, round, hit_postgres) = counted("hit", get(&id).await, before).await;
    let before = statements().await;
    let (_, put_calls, put_redis, put_postgres) = counted("update", put(&id).await, before).await;
    clear().await;
    let before = statements().await;
    let (_, miss_calls, miss_redis, miss_postgres) = counted("miss", get(&id).await, before).await;
    let before = statements().await;
    let (_, list_calls, list_redis, list_postgres) = counted("list", list().await, before).await;
    let before = statements().await;
    let (_, list_hit_calls, list_hit_redis, _) = counted("list hit", list().await, before).await;
    let before = statements().await;
    let (_, delete_calls, delete_redis, delete_postgres) =
        counted("delete", delete(&id).await, before).await;

    assert!(
        round >= DELAY.as_secs_f64() * 1000.0,
        "the link is not slow: {round} ms"
    );
    let rounds = |duration: f64| (duration / round).round();
    assert_eq!((hit_calls, hit_postgres), (0, 0.0));
    assert_eq!(
        (miss_calls, rounds(miss_redis), rounds(miss_postgres)),
        (1, 3.0, 1.0)
    );
    assert_eq!(
        (create_calls, rounds(create_redis), rounds(create_postgres)),
        (1, 2.0, 1.0)
    );
    assert_eq!(
        (put_calls, rounds(put_redis), rounds(put_postgres)),
        (1, 2.0, 1.0)
    );
    assert_eq!(
        (delete_calls, rounds(delete_redis), rounds(delete_postgres)),
        (1, 2.0, 1.0)
    );
    assert_eq!(
        (list_calls, rounds(list_redis), rounds(list_postgres)),
        (1, 3.0, 1.0)
    );
    assert_eq!((list_hit_calls, rounds(list_hit_redis)), (0, 1.0));
}
