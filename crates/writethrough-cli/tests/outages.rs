//! The service while a dependency is missing, silent or overwhelmed, and while it stops.

#![allow(clippy::unwrap_used)]

#[path = "../../writethrough-service/tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use support::{Answer, SAMPLE, Service, config, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use writethrough_lab::cluster::Serve;
use writethrough_service::config::{CacheBackend, Config, Database};
use writethrough_service::engine::Consistency;
use writethrough_testbed::{Link, Postgres, Redis, Testbed};

const BODY: &str = r#"{"name": "Lamp", "price": 24.50}"#;

/// Postgres behind a link, and Redis.
struct Backends {
    postgres: Postgres,
    link: Link,
    redis: Redis,
    /// Dropped last: it ends whatever is left.
    _testbed: Testbed,
}

impl Backends {
    async fn start() -> Self {
        let testbed = Testbed::new().await.unwrap();
        let postgres = testbed.postgres().await.unwrap();
        let redis = testbed.redis().await.unwrap();
        let link = testbed.link(postgres.addr()).await.unwrap();
        Self {
            postgres,
            link,
            redis,
            _testbed: testbed,
        }
    }

    fn config(&self) -> Config {
        config(
            Database::Postgres(self.link.url_for(&self.postgres.url())),
            CacheBackend::Redis(self.redis.url()),
        )
    }
}

fn sample() -> String {
    format!("/items/{SAMPLE}")
}

fn assert_unavailable(answer: &Answer) {
    answer.problem(503, "unavailable");
    assert!(
        answer
            .header("retry-after")
            .parse::<u32>()
            .is_ok_and(|seconds| seconds > 0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_it_starts_degraded_and_uses_redis_when_it_comes() {
    let backends = Backends::start().await;
    backends.redis.stop().await.unwrap();
    let service = Service::start(backends.config()).await;
    service.until_ready().await;

    let created = service.post("/items", BODY).await;
    assert_eq!(created.status, 201, "{}", created.text());
    let path = created.header("location").to_owned();
    let read = service.get(&path).await;
    assert_eq!(read.json(), created.json());
    assert!(
        read.header("cache-status")
            .starts_with("writethrough; fwd=bypass; detail=")
    );
    assert_eq!(read.timed(), ["postgres"]);
    let health = service.get("/health").await;
    assert_eq!(health.status, 200);
    assert_eq!(health.json()["status"], "degraded");
    assert_eq!(
        health.json()["dependencies"],
        json!({"redis": "down", "postgres": "ok"})
    );
    let stats = service.get("/cache/stats").await.json();
    assert_eq!(
        (&stats["cached_items"], &stats["mode"]),
        (&json!(0), &json!("bypass"))
    );
    let cleared = service.post("/cache/clear", "").await;
    cleared.problem(503, "cache-unavailable");
    assert!(!cleared.header("retry-after").is_empty());

    backends.redis.start().await.unwrap();
    until("reads hit", async || {
        let read = service.get(&path).await;
        assert_eq!(read.json(), created.json());
        (read.header("cache-status") == "writethrough; hit").then_some(())
    })
    .await;
    assert_eq!(service.get("/health").await.json()["status"], "ok");
    service.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_listens_before_postgres_is_there_and_serves_when_it_comes() {
    let backends = Backends::start().await;
    backends.postgres.stop().await.unwrap();
    let service = Service::start(backends.config()).await;
    assert_unavailable(&service.get("/items").await);
    assert_unavailable(&service.post("/items", BODY).await);
    let health = service.get("/health").await;
    assert_eq!(
        (health.status.as_u16(), &health.json()["status"]),
        (503, &json!("down"))
    );
    assert_eq!(health.json()["dependencies"]["postgres"], "down");
    assert_eq!(health.header("cache-control"), "no-store");
    assert_eq!(service.get("/livez").await.status, 200);
    let ready = service.get("/readyz").await;
    assert_eq!(
        (ready.status.as_u16(), ready.header("retry-after")),
        (503, "1")
    );
    assert_eq!(service.get("/docs").await.status, 200);
    backends.postgres.start().await.unwrap();
    service.until_ready().await;
    assert_eq!(service.get(&sample()).await.status, 200);
    service.running.shutdown().await;
}

/// Redis is what its connection says, also while there is no database and so no cache in use.
#[tokio::test(flavor = "multi_thread")]
async fn health_tells_redis_from_its_own_connection_while_postgres_refuses() {
    let backends = Backends::start().await;
    let of_redis = async |service: &Service, word: &str| {
        until(&format!("health says that Redis is {word}"), async || {
            let health = service.get("/health").await;
            assert_eq!(
                (health.status.as_u16(), &health.json()["status"]),
                (503, &json!("down"))
            );
            let dependencies = &health.json()["dependencies"];
            assert_eq!(dependencies["postgres"], "down");
            (dependencies["redis"] == word).then_some(())
        })
        .await;
    };
    backends.postgres.stop().await.unwrap();
    let service = Service::start(backends.config()).await;
    of_redis(&service, "ok").await;
    backends.redis.stop().await.unwrap();
    of_redis(&service, "down").await;
    backends.redis.start().await.unwrap();
    of_redis(&service, "ok").await;

    backends.postgres.start().await.unwrap();
    let service = service.cached().await;
    backends.postgres.kill().await.unwrap();
    until("it is noticed", async || {
        (service.get("/health").await.status == 503).then_some(())
    })
    .await;
    of_redis(&service, "ok").await;
    backends.redis.stop().await.unwrap();
    of_redis(&service, "down").await;
    service.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_postgres_goes_requests_get_503_and_when_it_is_back_they_succeed() {
    let backends = Backends::start().await;
    let service = Service::start(backends.config()).await.cached().await;
    assert_eq!(service.get(&sample()).await.status, 200);
    assert_eq!(service.get("/items").await.status, 200);
    backends.postgres.kill().await.unwrap();
    // Hits go on while the read lease lasts, a second at most.
    let down = until("reads stop", async || {
        let answer = service.get(&sample()).await;
        (answer.status != 200).then_some(answer)
    })
    .await;
    assert_unavailable(&down);
    assert_unavailable(&service.get("/items").await);
    let write = service.post("/items", BODY).await;
    assert_eq!(write.status, 503, "{}", write.text());
    assert!(!write.header("retry-after").is_empty());
    let health = until("it is noticed", async || {
        let health = service.get("/health").await;
        (health.status == 503).then_some(health)
    })
    .await;
    assert_eq!(health.json()["status"], "down");
    assert_eq!(health.json()["dependencies"]["postgres"], "down");

    backends.postgres.start().await.unwrap();
    until("reads succeed", async || {
        (service.get(&sample()).await.status == 200).then_some(())
    })
    .await;
    until("writes succeed", async || {
        (service.post("/items", BODY).await.status == 201).then_some(())
    })
    .await;
    until("reads hit", async || {
        let read = service.get(&sample()).await;
        (read.header("cache-status") == "writethrough; hit").then_some(())
    })
    .await;
    service.running.shutdown().await;
}

/// A pool full of connections that the server has closed must not cost a read.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_survives_that_its_connection_was_closed() {
    let backends = Backends::start().await;
    let service = Service::start(Config {
        consistency: Consistency::Off,
        ..backends.config()
    })
    .await;
    service.until_ready().await;
    for _ in 0..3 {
        let reads = (0..8)
            .map(|_| service.client.clone())
            .map(|client| async move { client.get(&sample()).await.status.as_u16() });
        assert_eq!(futures::future::join_all(reads).await, [200; 8]);
        backends.postgres.terminate_connections().await.unwrap();
    }
    service.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_outcome_is_unknown_says_so_and_where_to_look() {
    let backends = Backends::start().await;
    // One connection, so that the statements are prepared on the one that falls silent.
    let service = Service::start(Config {
        database_pool_size: 1,
        ..backends.config()
    })
    .await;
    let service = service.cached().await;
    let path = service.create("Known").await;
    service.put(&path, BODY).await;

    backends.link.stall_replies();
    let begun = Instant::now();
    let (post, put) = (service.client.clone(), service.client.clone());
    let created = tokio::spawn(async move { post.post("/items", BODY).await })
        .await
        .unwrap();
    assert!(
        begun.elapsed() < Duration::from_secs(12),
        "{:?}",
        begun.elapsed()
    );
    created.problem(503, "outcome-unknown");
    let location = created.header("location").to_owned();
    assert!(
        created.json()["detail"]
            .as_str()
            .unwrap()
            .contains(&location)
    );

    backends.link.cut();
    backends.link.heal();
    // The statement had reached Postgres.
    until("the item is found", async || {
        (service.get(&location).await.status == 200).then_some(())
    })
    .await;
    until("writes succeed", async || {
        (put.put(&path, BODY).await.status == 200).then_some(())
    })
    .await;
    service.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_postgres_costs_a_bounded_time() {
    let backends = Backends::start().await;
    let service = Service::start(Config {
        consistency: Consistency::Off,
        ..backends.config()
    })
    .await;
    service.until_ready().await;
    backends.link.stall();
    let begun = Instant::now();
    assert_unavailable(&service.get(&sample()).await);
    assert!(
        begun.elapsed() < Duration::from_secs(7),
        "{:?}",
        begun.elapsed()
    );
    let health = service.get("/health").await;
    assert_eq!(health.status, 503);
    backends.link.heal();
    until("reads succeed", async || {
        (service.get(&sample()).await.status == 200).then_some(())
    })
    .await;
    service.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_ends_is_given_up() {
    let service = Service::start(config(Database::Temporary, CacheBackend::InProcess)).await;
    let mut stream = TcpStream::connect(service.address()).await.unwrap();
    let head = "POST /items HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                content-length: 20\r\nconnection: close\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer);
    tokio::time::timeout(Duration::from_secs(10), read)
        .await
        .unwrap()
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("/problems/request-timeout"), "{answer}");
    service.running.shutdown().await;
}

/// Idle clients that keep their connection open must not hold up the end, and a request under way must
/// be answered before it.
#[tokio::test(flavor = "multi_thread")]
async fn shutdown_waits_for_requests_but_not_for_idle_connections() {
    let backends = Backends::start().await;
    let config = Config {
        consistency: Consistency::Off,
        drain: Duration::from_secs(10),
        ..backends.config()
    };
    let service = Service::start(config).await;
    service.until_ready().await;
    let mut idle = TcpStream::connect(service.address()).await.unwrap();
    idle.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let mut first = [0; 1024];
    assert!(idle.read(&mut first).await.unwrap() > 0);

    // So that the slow request needs no new connection, which would take longer than it may.
    assert_eq!(service.get(&sample()).await.status, 200);
    backends.link.delay(Duration::from_millis(300));
    let client = service.client.clone();
    let under_way = tokio::spawn(async move { client.get(&sample()).await });
    until("it is being served", async || {
        let metrics = service.get("/metrics").await.text();
        metrics
            .contains("http_server_active_requests 1")
            .then_some(())
    })
    .await;
    let begun = Instant::now();
    service.running.shutdown().await;
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(under_way.await.unwrap().status, 200);
    assert_eq!(
        idle.read(&mut first).await.unwrap(),
        0,
        "the idle connection was closed"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn while_it_drains_it_is_not_ready_and_asks_clients_to_go() {
    let config = Config {
        drain_delay: Duration::from_secs(1),
        ..config(Database::Temporary, CacheBackend::InProcess)
    };
    let Service { running, client } = Service::start(config).await;
    assert_eq!(client.get("/readyz").await.status, 200);
    let stopping = tokio::spawn(running.shutdown());
    until("it is not ready", async || {
        let answer = client.get("/readyz").await;
        (answer.status == 503).then(|| {
            assert_eq!(answer.json()["status"], "draining");
        })
    })
    .await;
    let answer = client.get(&sample()).await;
    assert_eq!(
        (answer.status.as_u16(), answer.header("connection")),
        (200, "close")
    );
    stopping.await.unwrap();
    assert!(
        client
            .try_send(Method::GET, "/livez", &[], None)
            .await
            .is_err()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_modes_do_what_they_say() {
    let backends = Backends::start().await;
    let of = |consistency| Config {
        consistency,
        ..backends.config()
    };
    let off = Service::start(of(Consistency::Off)).await;
    off.until_ready().await;
    let path = off.create("Off").await;
    let read = off.get(&path).await;
    assert!(
        read.header("cache-status")
            .starts_with("writethrough; fwd=bypass")
    );
    assert_eq!(off.put(&path, BODY).await.json()["version"], 2);
    assert_eq!(off.get("/items").await.json()["items"][0]["version"], 2);
    assert_eq!(off.delete(&path).await.status, 200);
    assert_eq!(off.get("/cache/stats").await.json()["mode"], "off");
    let health = off.get("/health").await.json();
    assert_eq!(
        (&health["status"], &health["backends"]["cache"]),
        (&json!("ok"), &json!("none"))
    );
    let keys: u64 = backends.redis.query(&["DBSIZE"]).await.unwrap();
    assert_eq!(keys, 0);
    off.running.shutdown().await;

    let textbook = Service::start(of(Consistency::Textbook)).await;
    until("the cache is connected", async || {
        (textbook.get("/health").await.json()["status"] == "ok").then_some(())
    })
    .await;
    let path = textbook.create("By the book").await;
    let read = textbook.get(&path).await;
    assert_eq!(read.header("cache-status"), "writethrough; hit");
    // Guards are for epochs: these statements have none.
    assert_eq!(textbook.put(&path, BODY).await.json()["version"], 2);
    let stale = [("if-match", "\"1\"")];
    let refused = textbook.send(Method::PUT, &path, &stale, Some(BODY)).await;
    refused.problem(412, "precondition-failed");
    let key = path.trim_start_matches("/items/");
    let exists = ["EXISTS", &format!("item:{key}")];
    assert_eq!(backends.redis.query::<u64>(&exists).await.unwrap(), 1);
    assert_eq!(textbook.delete(&path).await.status, 200);
    textbook.get(&path).await.problem(404, "item-not-found");
    textbook.running.shutdown().await;
}

/// A Redis, or a way to it, that closes the connections again and again: told of once a minute, and each
/// loss that was told of has its end told too.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_lost_again_and_again_are_told_of_once() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let node = Serve::new("node", env!("CARGO_BIN_EXE_writethrough"))
        .database("sqlite::memory:")
        .cache(&redis.url());
    let node = node.start(&testbed).await.unwrap();
    let mut newest = 0;
    for _ in 0..8 {
        // Both connections of a session that is newer than the last.
        newest = until("the node is connected", async || {
            let list: String = redis.query(&["CLIENT", "LIST"]).await.unwrap();
            let ids: Vec<u64> = list
                .lines()
                .filter(|line| line.contains("resp=3"))
                .filter_map(|line| line.split([' ', '=']).nth(1)?.parse().ok())
                .filter(|id| *id > newest)
                .collect();
            // An older session was given up before these were opened.
            let health = reqwest::get(format!("{}/health", node.url())).await.ok()?;
            let health: Value = health.json().await.ok()?;
            let connected = health["dependencies"]["redis"] == "ok" && ids.len() == 2;
            connected.then(|| ids.into_iter().max().unwrap_or_default())
        })
        .await;
        let kill = ["CLIENT", "KILL", "TYPE", "normal"];
        redis.command(&kill).await.unwrap();
    }
    let count = |text: &str| {
        let log = node.process().log_tail(1000);
        log.lines().filter(|line| line.contains(text)).count()
    };
    // Whichever connection is met first, there are two ways at most to say that it is closed.
    let lost = count("Redis connection lost");
    assert!((1..=2).contains(&lost), "{}", node.process().log_tail(30));
    until("the last end is told", async || {
        (count("Redis is connected and verified") == lost + 1).then_some(())
    })
    .await;
}
