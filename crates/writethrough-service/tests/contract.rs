//! The contract over HTTP, written once and held against each pair of backends: a test for each case
//! and pair, such as `prices_are_exact::embedded`.
//!
//! Cases are independent: any of them runs alone, in any order. Each checks all answers that it has got
//! against the service's description.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeSet;
use std::io::Read;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use support::{ApiClient, SAMPLE, Service, config, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;
use tokio::sync::{Mutex, OnceCell};
use writethrough_service::config::{CacheBackend, Database};
use writethrough_testbed::{Postgres, Redis, Testbed};

/// Makes a test of each case on each pair of backends.
macro_rules! on_every_pair {
    (shared: [$($shared:ident,)+] own: [$($own:ident,)+]) => {
        $(on_every_pair! { @ $shared run_shared })+
        $(on_every_pair! { @ $own run_alone })+
    };
    (@ $case:ident $run:ident) => {
        mod $case {
            on_every_pair! { @ $case $run embedded Embedded }
            on_every_pair! { @ $case $run postgres_and_redis PostgresAndRedis }
            on_every_pair! { @ $case $run postgres_alone PostgresAlone }
            on_every_pair! { @ $case $run redis_alone RedisAlone }
        }
    };
    (@ $case:ident $run:ident $name:ident $pair:ident) => {
        #[test]
        fn $name() {
            super::Pair::$pair.$run(async |client| super::$case(client).await);
        }
    };
}

on_every_pair! {
    // One after the other on one service of the pair.
    shared: [
        an_item_is_created_as_it_was_sent,
        prices_are_exact,
        names_keep_every_character,
        a_read_after_a_write_is_a_hit,
        the_list_contains_what_was_just_created,
        the_list_is_walked_by_its_cursors,
        lists_behind_made_up_cursors_are_served_and_not_cached,
        an_update_makes_a_new_version,
        concurrent_updates_are_all_counted,
        a_deleted_item_is_gone,
        absence_is_cached_too,
        a_client_that_has_the_version_gets_304,
        a_304_does_not_speak_of_a_length,
        a_write_can_be_conditional,
        a_write_can_spare_what_is_there,
        a_read_can_want_one_version,
        an_item_that_was_read_can_be_changed_and_sent_back,
        a_put_with_the_services_own_fields_must_mean_this_item,
        bad_bodies_are_refused_by_field,
        broken_json_is_told_apart,
        bad_parameters_are_refused_by_name,
        large_bodies_are_refused,
        a_body_must_be_json,
        unknown_parameters_are_refused_on_every_route,
        unknown_routes_and_methods,
        a_slash_too_many_leads_to_the_route,
        options_are_told,
        caches_on_the_way_keep_nothing_that_changes,
        every_problem_type_is_described,
        the_callers_trace_is_continued,
        clearing_the_cache_makes_the_next_read_a_fill,
        statistics_add_up,
        long_lists_are_served_and_not_cached,
        health_and_probes,
        metrics_are_exported,
        metrics_come_in_the_form_that_is_asked_for,
        the_api_describes_itself,
        every_operation_that_is_described_succeeds,
        the_index_comes_in_two_forms,
    ]
    // On a new service.
    own: [
        the_table_starts_with_three_samples,
    ]
}

/// A shared service outlives the test that has started it, hence one runtime for all tests.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pair {
    Embedded,
    PostgresAndRedis,
    /// A usual store without a cache server.
    PostgresAlone,
    /// A cache server without a store.
    RedisAlone,
}

impl Pair {
    /// Starts a service with an empty table.
    async fn service(self) -> Service {
        static TESTBED: OnceCell<Testbed> = OnceCell::const_new();
        static POSTGRES: OnceCell<Postgres> = OnceCell::const_new();
        static REDIS: OnceCell<Redis> = OnceCell::const_new();
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let testbed = TESTBED.get_or_init(async || Testbed::new().await.unwrap());
        let testbed = testbed.await;
        let name = format!("contract_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let database = match self {
            Self::Embedded => Database::Sqlite(testbed.folder().join(name)),
            Self::RedisAlone => Database::Temporary,
            Self::PostgresAndRedis | Self::PostgresAlone => {
                let start = async || testbed.postgres().await.unwrap();
                let postgres = POSTGRES.get_or_init(start).await;
                let create = format!("CREATE DATABASE {name}");
                postgres.run(&create).await.unwrap();
                let url = postgres.url();
                let (server, _) = url.rsplit_once('/').unwrap();
                Database::Postgres(format!("{server}/{name}"))
            }
        };
        let cache = match self {
            Self::Embedded | Self::PostgresAlone => CacheBackend::InProcess,
            Self::PostgresAndRedis | Self::RedisAlone => {
                let start = async || testbed.redis().await.unwrap();
                CacheBackend::Redis(REDIS.get_or_init(start).await.url())
            }
        };
        Service::start(config(database, cache)).await.cached().await
    }

    /// Runs a case on a new service.
    fn run_alone(self, case: impl AsyncFnOnce(&ApiClient)) {
        RUNTIME.block_on(async {
            let service = self.service().await;
            case(&service).await;
            support::description::check_answers(&service).await;
            service.running.shutdown().await;
        });
    }

    /// Runs a case on the service that cases of the pair share: one at a time, because some look at
    /// lists, counters or the whole cache.
    fn run_shared(self, case: impl AsyncFnOnce(&ApiClient)) {
        static SERVICES: [Mutex<Option<Service>>; 4] = [const { Mutex::const_new(None) }; 4];
        RUNTIME.block_on(async {
            let mut shared = SERVICES[self as usize].lock().await;
            let service = match &mut *shared {
                Some(service) => service,
                None => shared.insert(self.service().await),
            };
            let client = ApiClient::new(service.url(""));
            case(&client).await;
            support::description::check_answers(&client).await;
        });
    }
}

async fn the_table_starts_with_three_samples(client: &ApiClient) {
    let list = client.get("/items").await;
    assert_eq!(list.status, 200);
    assert_eq!(list.json()["count"], 3);
    assert_eq!(list.json()["next_cursor"], Value::Null);
    for last in 1..=3 {
        let id = format!("550e8400-e29b-41d4-a716-44665544000{last}");
        let item = client.get(&format!("/items/{id}")).await;
        assert_eq!(item.status, 200);
        let item = item.json();
        assert_eq!((&item["id"], &item["version"]), (&json!(id), &json!(1)));
        assert!(item["name"].is_string() && item["price"].is_number());
    }
}

async fn an_item_is_created_as_it_was_sent(client: &ApiClient) {
    let sent = r#"{"name": "Lamp", "description": "Bright,\nand bends.", "price": 24.5}"#;
    let answer = client.post("/items", sent).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    let item = answer.json();
    let members: Vec<_> = item.as_object().unwrap().keys().cloned().collect();
    let expected = [
        "created_at",
        "description",
        "id",
        "name",
        "price",
        "updated_at",
        "version",
    ]
    .map(String::from);
    assert_eq!(
        members.iter().collect::<BTreeSet<_>>(),
        expected.iter().collect()
    );
    assert_eq!(item["name"], "Lamp");
    assert_eq!(item["description"], "Bright,\nand bends.");
    assert_eq!(item["version"], 1);
    assert_eq!(item["created_at"], item["updated_at"]);
    let created = item["created_at"].as_str().unwrap();
    let format = &time::format_description::well_known::Rfc3339;
    let parsed = time::OffsetDateTime::parse(created, format).unwrap();
    assert!(
        parsed.offset().is_utc() && created.ends_with('Z') && created.len() == 27,
        "{created}"
    );
    assert_eq!(
        answer.header("location"),
        format!("/items/{}", item["id"].as_str().unwrap())
    );
    assert_eq!(answer.header("etag"), "\"1\"");
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.timed(), ["redis", "postgres"]);

    let read = client.get(answer.header("location")).await;
    assert_eq!(read.json(), item);
    let bare = client
        .post("/items", r#"{"name": "Bare", "price": 0}"#)
        .await;
    assert_eq!(bare.json()["description"], Value::Null);
}

async fn prices_are_exact(client: &ApiClient) {
    for (sent, stored) in [
        ("0", "0.00"),
        ("-0", "0.00"),
        ("0.01", "0.01"),
        ("0.29", "0.29"),
        ("1.10", "1.10"),
        ("12.5e-1", "1.25"),
        ("1E2", "100.00"),
        ("4.350000", "4.35"),
        ("99999999.99", "99999999.99"),
    ] {
        let body = format!(r#"{{"name": "Priced", "price": {sent}}}"#);
        let answer = client.post("/items", &body).await;
        assert_eq!(answer.status, 201, "{sent}: {}", answer.text());
        let expected = format!(r#""price":{stored},"#);
        assert!(
            answer.text().contains(&expected),
            "{sent}: {}",
            answer.text()
        );
        let path = answer.header("location").to_owned();
        assert!(client.get(&path).await.text().contains(&expected));
    }
}

async fn names_keep_every_character(client: &ApiClient) {
    let longest = "😀".repeat(255);
    for name in [
        "a",
        " ",
        "Ä\u{301} 漢字 \u{202e}",
        "O'Brien; -- \\\\ %s",
        longest.as_str(),
    ] {
        let body = json!({"name": name, "description": name, "price": 1}).to_string();
        let answer = client.post("/items", &body).await;
        assert_eq!(answer.status, 201, "{}", answer.text());
        assert_eq!(answer.json()["name"], name);
        let read = client.get(answer.header("location")).await.json();
        assert_eq!(
            (&read["name"], &read["description"]),
            (&json!(name), &json!(name))
        );
    }
}

async fn a_read_after_a_write_is_a_hit(client: &ApiClient) {
    let path = client.create("Written through").await;
    for _ in 0..2 {
        let read = client.get_through_cache(&path).await;
        assert_eq!(read.header("cache-status"), "writethrough; hit");
        assert_eq!(read.timed(), ["redis"]);
        assert_eq!(read.header("etag"), "\"1\"");
        assert_eq!(read.header("cache-control"), "no-cache");
        assert_eq!(read.header("x-trace-id").len(), 32);
    }
    client.put(&path, r#"{"name": "Anew", "price": 2}"#).await;
    let read = client.get_through_cache(&path).await;
    assert_eq!(read.header("cache-status"), "writethrough; hit");
    assert_eq!(read.json()["name"], "Anew");
}

async fn the_list_contains_what_was_just_created(client: &ApiClient) {
    for round in 0..3 {
        let path = client.create(&format!("Listed {round}")).await;
        let id = path.trim_start_matches("/items/");
        let first = client.get_through_cache("/items?limit=5").await;
        assert_eq!(first.json()["items"][0]["id"], id);
        assert_eq!(
            first.header("cache-status"),
            "writethrough; fwd=miss; stored"
        );
        assert_eq!(first.timed(), ["redis", "postgres"]);
        let second = client.get_through_cache("/items?limit=5").await;
        assert_eq!(second.header("cache-status"), "writethrough; hit");
        assert_eq!(second.timed(), ["redis"]);
        assert_eq!(second.body, first.body);
        assert_eq!(second.header("etag"), first.header("etag"));
    }
}

async fn the_list_is_walked_by_its_cursors(client: &ApiClient) {
    for number in 0..12 {
        client.create(&format!("Walked {number}")).await;
    }
    let walked = walk(client, 5).await;
    assert_eq!(walked, walk(client, 100).await);
    let ids: BTreeSet<_> = walked.iter().map(|item| item["id"].as_str()).collect();
    assert_eq!(ids.len(), walked.len());
    let times: Vec<_> = walked
        .iter()
        .map(|item| item["created_at"].as_str().unwrap())
        .collect();
    assert!(
        times.is_sorted_by(|newer, older| newer >= older),
        "{times:?}"
    );
    assert_eq!(client.get("/items").await.json()["count"], 10);
}

/// All items, read in pages of so many.
async fn walk(client: &ApiClient, limit: usize) -> Vec<Value> {
    let mut walked = Vec::new();
    let mut path = format!("/items?limit={limit}&cursor=");
    loop {
        let page = client.get(&path).await;
        assert_eq!(page.status, 200, "{}", page.text());
        let page = page.json();
        let items = page["items"].as_array().unwrap();
        assert_eq!(page["count"], items.len());
        walked.extend(items.iter().cloned());
        let Some(cursor) = page["next_cursor"].as_str() else {
            return walked;
        };
        assert_eq!(page["count"], limit);
        path = format!("/items?limit={limit}&cursor={cursor}");
    }
}

async fn an_update_makes_a_new_version(client: &ApiClient) {
    let path = client.create("Before").await;
    let before = client.get(&path).await.json();
    let answer = client
        .put(
            &path,
            r#"{"name": "After", "description": "changed", "price": 3.25}"#,
        )
        .await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("etag"), "\"2\"");
    assert_eq!(answer.timed(), ["redis", "postgres"]);
    let after = answer.json();
    assert_eq!(
        (&after["version"], &after["name"]),
        (&json!(2), &json!("After"))
    );
    assert_eq!(after["created_at"], before["created_at"]);
    assert!(after["updated_at"].as_str() >= before["updated_at"].as_str());
    assert_eq!(client.get(&path).await.json(), after);
    assert_eq!(client.get("/items?limit=1").await.json()["items"][0], after);
    // What is left out is removed: a PUT replaces.
    let bare = client
        .put(&path, r#"{"name": "Bare", "price": 3.25}"#)
        .await
        .json();
    assert_eq!(
        (&bare["description"], &bare["version"]),
        (&Value::Null, &json!(3))
    );
    let missing = "/items/00000000-0000-7000-8000-000000000000";
    client
        .put(missing, r#"{"name": "a", "price": 1}"#)
        .await
        .problem(404, "item-not-found");
}

async fn concurrent_updates_are_all_counted(client: &ApiClient) {
    let path = client.create("Contended").await;
    let put = |number: usize| {
        let (client, path) = (client.clone(), path.clone());
        async move {
            let body = format!(r#"{{"name": "Writer {number}", "price": {number}}}"#);
            let answer = client.put(&path, &body).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            answer.json()["version"].as_i64().unwrap()
        }
    };
    let versions: BTreeSet<_> = join_all((0..10).map(put)).await.into_iter().collect();
    assert_eq!(versions, (2..=11).collect());
    assert_eq!(client.get(&path).await.json()["version"], 11);
}

async fn a_deleted_item_is_gone(client: &ApiClient) {
    let path = client.create("Doomed").await;
    let id = path.trim_start_matches("/items/").to_owned();
    let answer = client.delete(&path).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json(), json!({"status": "deleted", "id": id}));
    client.get(&path).await.problem(404, "item-not-found");
    assert_ne!(
        client.get("/items?limit=1").await.json()["items"][0]["id"],
        id
    );
    client.delete(&path).await.problem(404, "item-not-found");
}

async fn absence_is_cached_too(client: &ApiClient) {
    let path = "/items/00000000-0000-7000-8000-00000000000a";
    let first = client.get_through_cache(path).await;
    first.problem(404, "item-not-found");
    assert_eq!(
        first.header("cache-status"),
        "writethrough; fwd=miss; stored"
    );
    let second = client.get_through_cache(path).await;
    second.problem(404, "item-not-found");
    assert_eq!(second.header("cache-status"), "writethrough; hit");
    assert_eq!(second.timed(), ["redis"]);
}

async fn a_client_that_has_the_version_gets_304(client: &ApiClient) {
    let path = client.create("Known").await;
    let conditional = async |path: &str, tag: &str| {
        client
            .send_through_cache(path, &[("if-none-match", tag)])
            .await
    };
    for tag in ["\"1\"", "W/\"1\"", "\"7\", \"1\"", "*"] {
        let answer = conditional(&path, tag).await;
        assert_eq!(answer.status, 304, "{tag}");
        assert!(answer.body.is_empty());
        assert_eq!(answer.header("etag"), "\"1\"");
        assert_eq!(answer.header("cache-status"), "writethrough; hit");
        assert_eq!(answer.header("x-trace-id").len(), 32);
    }
    assert_eq!(conditional(&path, "\"2\"").await.status, 200);
    client.put(&path, r#"{"name": "New", "price": 1}"#).await;
    assert_eq!(conditional(&path, "\"1\"").await.json()["name"], "New");
    let list = client.get("/items?limit=3").await;
    let tag = list.header("etag");
    assert_eq!(conditional("/items?limit=3", tag).await.status, 304);
    client.create("Newer").await;
    assert_eq!(conditional("/items?limit=3", tag).await.status, 200);
}

/// RFC 9110, 8.6: the length in a 304 is that of the answer that a 200 would carry, or is not there.
async fn a_304_does_not_speak_of_a_length(client: &ApiClient) {
    let path = client.create("Known by its head").await;
    for path in [path.as_str(), "/items?limit=1"] {
        let whole = client.get(path).await;
        for method in ["GET", "HEAD"] {
            let tag = whole.header("etag");
            let request = format!(
                "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
                 if-none-match: {tag}\r\n\r\n"
            );
            let answer = raw_answer(client, &request).await;
            assert!(answer.starts_with("HTTP/1.1 304"), "{answer}");
            let length = answer
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            assert_eq!(length, None, "{answer}");
        }
        let head = format!("HEAD {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let head = raw_answer(client, &head).await;
        let length = format!("content-length: {}\r\n", whole.body.len());
        assert!(head.contains(&length), "{head}");
    }
}

async fn a_write_can_be_conditional(client: &ApiClient) {
    let path = client.create("Conditional").await;
    let body = r#"{"name": "Changed", "price": 1}"#;
    let put = async |path: &str, tag: &str| {
        client
            .send(Method::PUT, path, &[("if-match", tag)], Some(body))
            .await
    };
    assert_eq!(put(&path, "\"1\"").await.json()["version"], 2);
    for stale in ["\"1\"", "W/\"2\"", "\"nonsense\"", "\"02\"", "\"+2\""] {
        assert_eq!(
            put(&path, stale).await.problem(412, "precondition-failed"),
            ["If-Match"]
        );
    }
    assert_eq!(put(&path, "\"9\", \"2\"").await.json()["version"], 3);
    assert_eq!(put(&path, "*").await.json()["version"], 4);
    for malformed in ["4", "\"4", "w/\"4\"", "\"4\" \"5\"", "*, \"4\""] {
        let answer = put(&path, malformed).await;
        assert_eq!(answer.problem(400, "invalid-parameter"), ["If-Match"]);
    }
    let missing = "/items/00000000-0000-7000-8000-000000000000";
    put(missing, "\"1\"").await.problem(404, "item-not-found");
    let delete = async |tag: &str| {
        client
            .send(Method::DELETE, &path, &[("if-match", tag)], None)
            .await
    };
    delete("\"3\"").await.problem(412, "precondition-failed");
    assert_eq!(client.get(&path).await.json()["version"], 4);
    assert_eq!(delete("\"4\"").await.status, 200);
}

/// It was not looked at in writes, so `If-None-Match: *`, which says "only if it is not there", overwrote
/// and removed what was there.
async fn a_write_can_spare_what_is_there(client: &ApiClient) {
    let path = client.create("Spared").await;
    let body = r#"{"name": "Changed", "price": 1}"#;
    let send = async |method: Method, path: &str, tag: &str| {
        let body = (method != Method::DELETE).then_some(body);
        let headers = [("if-none-match", tag)];
        client.send(method, path, &headers, body).await
    };
    for method in [Method::PUT, Method::DELETE] {
        for tag in ["*", "\"1\"", "W/\"1\"", "\"7\", \"1\""] {
            let answer = send(method.clone(), &path, tag).await;
            assert_eq!(
                answer.problem(412, "precondition-failed"),
                ["If-None-Match"]
            );
        }
        let answer = send(method.clone(), &path, "1").await;
        assert_eq!(answer.problem(400, "invalid-parameter"), ["If-None-Match"]);
        let missing = "/items/00000000-0000-7000-8000-000000000000";
        let answer = send(method, missing, "*").await;
        answer.problem(404, "item-not-found");
    }
    assert_eq!(client.get(&path).await.json()["name"], "Spared");
    let changed = send(Method::PUT, &path, "\"2\", \"01\"").await;
    assert_eq!(changed.json()["version"], 2);
    // Both headers must hold, and the version in the body too.
    let both = async |only: &str, not: &str| {
        let headers = [("if-match", only), ("if-none-match", not)];
        let answer = client.send(Method::PUT, &path, &headers, Some(body)).await;
        answer.status.as_u16()
    };
    assert_eq!(both("\"2\"", "\"2\"").await, 412);
    assert_eq!(both("\"1\"", "\"1\"").await, 412);
    assert_eq!(both("*", "\"1\"").await, 200);
    // A new item has no version yet; what looks like a guard against making it twice is none.
    for name in ["if-none-match", "if-match"] {
        let headers = [(name, "*")];
        let answer = client
            .send(Method::POST, "/items", &headers, Some(body))
            .await;
        assert_eq!(answer.problem(400, "invalid-parameter").len(), 1);
    }
    assert_eq!(send(Method::DELETE, &path, "\"1\"").await.status, 200);
}

async fn a_read_can_want_one_version(client: &ApiClient) {
    let path = client.create("Wanted").await;
    let read = async |path: &str, tag: &str| {
        client
            .send(Method::GET, path, &[("if-match", tag)], None)
            .await
    };
    for tag in ["\"1\"", "\"7\", \"1\"", "*"] {
        assert_eq!(read(&path, tag).await.status, 200, "{tag}");
    }
    for tag in ["\"2\"", "W/\"1\"", "\"01\""] {
        let answer = read(&path, tag).await;
        assert_eq!(answer.problem(412, "precondition-failed"), ["If-Match"]);
    }
    for path in [&path, "/items?limit=2"] {
        let answer = read(path, "1").await;
        assert_eq!(answer.problem(400, "invalid-parameter"), ["If-Match"]);
        let headers = [("if-none-match", "1")];
        let answer = client.send(Method::GET, path, &headers, None).await;
        assert_eq!(answer.problem(400, "invalid-parameter"), ["If-None-Match"]);
        read(path, "\"x\"")
            .await
            .problem(412, "precondition-failed");
    }
}

async fn an_item_that_was_read_can_be_changed_and_sent_back(client: &ApiClient) {
    let path = client.create("Round trip").await;
    let mut item = client.get(&path).await.json();
    item["name"] = json!("Changed");
    let answer = client.put(&path, &item.to_string()).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let stored = answer.json();
    assert_eq!(
        (&stored["name"], &stored["version"], &stored["created_at"]),
        (&json!("Changed"), &json!(2), &item["created_at"])
    );

    // What was read is no longer what is stored: nothing is overwritten.
    let again = client.put(&path, &item.to_string()).await;
    assert_eq!(again.problem(412, "precondition-failed"), ["version"]);
    assert_eq!(client.get(&path).await.json(), stored);

    // Clients write times in their own way: with milliseconds, or in another zone.
    let mut item = stored;
    item["created_at"] = json!("2025-01-02T03:04:05.678Z");
    item["updated_at"] = json!("2025-01-02T04:04:05+01:00");
    item["id"] = json!(item["id"].as_str().unwrap().to_uppercase());
    let answer = client.put(&path, &item.to_string()).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_ne!(answer.json()["created_at"], item["created_at"]);

    // `If-Match` and `version` must both hold.
    let put = async |tag: &str, version: u64| {
        let body = json!({"name": "Both", "price": 1, "version": version}).to_string();
        let headers = [("if-match", tag)];
        client.send(Method::PUT, &path, &headers, Some(&body)).await
    };
    put("\"3\"", 2).await.problem(412, "precondition-failed");
    put("\"2\"", 3).await.problem(412, "precondition-failed");
    put("\"4\"", 4).await.problem(412, "precondition-failed");
    assert_eq!(put("\"3\"", 3).await.json()["version"], 4);
    assert_eq!(put("*", 4).await.json()["version"], 5);
    let missing = "/items/00000000-0000-7000-8000-000000000000";
    let body = r#"{"name": "a", "price": 1, "version": 1}"#;
    client
        .put(missing, body)
        .await
        .problem(404, "item-not-found");
}

async fn a_put_with_the_services_own_fields_must_mean_this_item(client: &ApiClient) {
    let path = client.create("This one").await;
    let other = client.get(&client.create("Another").await).await.json();
    let answer = client.put(&path, &other.to_string()).await;
    assert_eq!(answer.problem(422, "validation"), ["id"]);
    assert_eq!(client.get(&path).await.json()["version"], 1);
    // A new item has none of them, and the answer says whose they are.
    let answer = client.post("/items", &other.to_string()).await;
    let mut fields = answer.problem(422, "validation");
    fields.sort();
    assert_eq!(fields, ["created_at", "id", "updated_at", "version"]);
    assert!(answer.text().contains("is set by the service"));
}

async fn bad_bodies_are_refused_by_field(client: &ApiClient) {
    let long = format!(r#"{{"name": "{}", "price": 1}}"#, "ä".repeat(256));
    let cases: &[(&str, &[&str])] = &[
        (r#"{"price": 1}"#, &["name"]),
        (r#"{"name": "a"}"#, &["price"]),
        ("{}", &["name", "price"]),
        (r#"{"name": null, "price": 1}"#, &["name"]),
        (r#"{"name": 5, "price": 1}"#, &["name"]),
        (r#"{"name": ["a"], "price": 1}"#, &["name"]),
        (r#"{"name": "", "price": 1}"#, &["name"]),
        (&long, &["name"]),
        (r#"{"name": "a\u0000b", "price": 1}"#, &["name"]),
        (r#"{"name": "a\nb", "price": 1}"#, &["name"]),
        (r#"{"name": "a\u007fb", "price": 1}"#, &["name"]),
        (r#"{"name": "\ud800", "price": 1}"#, &["name"]),
        (r#"{"name": "a", "price": null}"#, &["price"]),
        (r#"{"name": "a", "price": "1"}"#, &["price"]),
        (r#"{"name": "a", "price": true}"#, &["price"]),
        (r#"{"name": "a", "price": {}}"#, &["price"]),
        (r#"{"name": "a", "price": -0.01}"#, &["price"]),
        (r#"{"name": "a", "price": 100000000}"#, &["price"]),
        (r#"{"name": "a", "price": 99999999.991}"#, &["price"]),
        (r#"{"name": "a", "price": 0.001}"#, &["price"]),
        (r#"{"name": "a", "price": 1e999}"#, &["price"]),
        (r#"{"name": "a", "price": 1e-999}"#, &["price"]),
        (
            r#"{"name": "a", "price": 1, "description": 5}"#,
            &["description"],
        ),
        (
            r#"{"name": "a", "price": 1, "description": "\u0000"}"#,
            &["description"],
        ),
        (r#"{"name": "a", "price": 1, "colour": "red"}"#, &["colour"]),
        (
            r#"{"name": "a", "price": 1, "id": "x", "version": "9"}"#,
            &["id", "version"],
        ),
        (
            r#"{"name": "a", "price": 1, "created_at": 5, "updated_at": "now"}"#,
            &["created_at", "updated_at"],
        ),
        (r#"{"name": "a", "name": "b", "price": 1}"#, &["name"]),
        (r#"{"Name": "a", "price": 1}"#, &["name", "Name"]),
        ("[]", &["body"]),
        ("null", &["body"]),
        ("\"text\"", &["body"]),
        ("5", &["body"]),
    ];
    let path = client.create("Target").await;
    for (body, fields) in cases {
        let post = client.post("/items", body).await;
        assert_eq!(post.problem(422, "validation"), *fields, "{body}");
        let put = client.put(&path, body).await;
        assert_eq!(put.problem(422, "validation"), *fields, "{body}");
    }
    assert_eq!(client.get(&path).await.json()["version"], 1);
}

async fn broken_json_is_told_apart(client: &ApiClient) {
    let deep = "[".repeat(60_000);
    for body in [
        "",
        "   ",
        "{",
        "not json",
        r#"{"name": "a", "price": 1,}"#,
        r#"{"name": "a", "price": 01}"#,
        r#"{"name": "a", "price": NaN}"#,
        r#"{"name": "a", "price": 1} trailing"#,
        r#"{'name': 'a'}"#,
        "{\"name\": \"a\nb\", \"price\": 1}",
        &deep,
    ] {
        let answer = client.post("/items", body).await;
        assert_eq!(
            answer.problem(400, "malformed-json"),
            ["body"],
            "{body:.40}"
        );
    }
}

async fn bad_parameters_are_refused_by_name(client: &ApiClient) {
    let body = r#"{"name": "a", "price": 1}"#;
    for id in [
        "abc",
        "1",
        "550e8400-e29b-41d4-a716-44665544000g",
        "%ff",
        "%00",
        "{}",
        "..%2f..",
    ] {
        let path = format!("/items/{id}");
        for method in [Method::GET, Method::PUT, Method::DELETE] {
            let body = (method == Method::PUT).then_some(body);
            let answer = client.send(method, &path, &[], body).await;
            assert_eq!(answer.problem(400, "invalid-parameter"), ["id"], "{id}");
        }
    }
    let compact = SAMPLE.replace('-', "");
    let answer = client.get(&format!("/items/{compact}")).await;
    assert_eq!(answer.problem(400, "invalid-parameter"), ["id"]);
    let upper = client
        .get(&format!("/items/{}", SAMPLE.to_uppercase()))
        .await;
    assert_eq!(
        (upper.status.as_u16(), &upper.json()["id"]),
        (200, &json!(SAMPLE))
    );

    let cases: &[(&str, &[&str])] = &[
        ("limit=0", &["limit"]),
        ("limit=101", &["limit"]),
        ("limit=-1", &["limit"]),
        ("limit=ten", &["limit"]),
        ("limit=1.5", &["limit"]),
        ("limit=", &["limit"]),
        ("limit=99999999999999999999", &["limit"]),
        ("cursor=abc", &["cursor"]),
        ("cursor=%00", &["cursor"]),
        (
            "cursor=7fffffffffffffff550e8400e29b41d4a716446655440001",
            &["cursor"],
        ),
        ("limit=0&cursor=x", &["limit", "cursor"]),
        ("limit=5&limit=6", &["limit"]),
        ("page=2", &["page"]),
    ];
    for (query, names) in cases {
        let answer = client.get(&format!("/items?{query}")).await;
        assert_eq!(answer.problem(400, "invalid-parameter"), *names, "{query}");
    }
}

async fn large_bodies_are_refused(client: &ApiClient) {
    let of_length = |length: usize| {
        let frame = r#"{"name": "Large", "price": 1, "description": ""}"#;
        let filling = "a".repeat(length - frame.len());
        frame.replace(r#""""#, &format!("\"{filling}\""))
    };
    let fits = of_length(65_536);
    assert_eq!(fits.len(), 65_536);
    assert_eq!(client.post("/items", &fits).await.status, 201);
    let answer = client.post("/items", &of_length(65_537)).await;
    assert_eq!(answer.problem(413, "body-too-large"), ["body"]);

    // Also when the length is not told beforehand, and when it is told and nothing is sent.
    let chunked = "POST /items HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                   transfer-encoding: chunked\r\n\r\n";
    let chunk = format!("10000\r\n{}\r\n", "a".repeat(0x10000));
    assert!(
        raw(client, &format!("{chunked}{chunk}{chunk}0\r\n\r\n"))
            .await
            .contains("413")
    );
    let announced = "POST /items HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                     content-length: 99999999\r\n\r\n";
    assert!(raw(client, announced).await.contains("413"));
}

/// Sends bytes and returns everything until the server closes the connection.
async fn raw_answer(client: &ApiClient, request: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(client.address())
        .await
        .unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Sends bytes and returns the status line.
async fn raw(client: &ApiClient, request: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(client.address())
        .await
        .unwrap();
    // The server may answer and close before it has read everything.
    let _ = stream.write_all(request.as_bytes()).await;
    let mut answer = Vec::new();
    let mut buffer = [0; 1024];
    while !answer.contains(&b'\n') {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(read) => answer.extend_from_slice(&buffer[..read]),
        }
    }
    String::from_utf8_lossy(&answer)
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}

async fn a_body_must_be_json(client: &ApiClient) {
    let body = r#"{"name": "Typed", "price": 1}"#;
    for (media_type, status) in [
        ("application/json", 201),
        ("application/json; charset=utf-8", 201),
        ("Application/JSON", 201),
        ("application/vnd.items+json", 201),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("application/jsonish", 415),
    ] {
        let headers = [("content-type", media_type)];
        let answer = client
            .send(Method::POST, "/items", &headers, Some(body))
            .await;
        assert_eq!(answer.status, status, "{media_type}");
        if status == 415 {
            assert_eq!(
                answer.problem(415, "unsupported-media-type"),
                ["Content-Type"]
            );
        }
    }
}

async fn unknown_parameters_are_refused_on_every_route(client: &ApiClient) {
    let path = client.create("Asked").await;
    let body = r#"{"name": "a", "price": 1}"#;
    for (method, path) in [
        (Method::GET, "/items"),
        (Method::HEAD, "/items"),
        (Method::POST, "/items"),
        (Method::GET, path.as_str()),
        (Method::PUT, path.as_str()),
        (Method::DELETE, path.as_str()),
        (Method::GET, "/cache/stats"),
        (Method::POST, "/cache/clear"),
        (Method::GET, "/health"),
        (Method::GET, "/livez"),
        (Method::GET, "/readyz"),
        (Method::GET, "/metrics"),
    ] {
        let body = [Method::POST, Method::PUT]
            .contains(&method)
            .then_some(body);
        let target = format!("{path}?_=1");
        let answer = client.send(method.clone(), &target, &[], body).await;
        if method == Method::HEAD {
            assert_eq!(answer.status, 400);
        } else {
            let names = answer.problem(400, "invalid-parameter");
            assert_eq!(names, ["_"], "{method} {path}");
        }
    }
    assert_eq!(client.get(&path).await.json()["version"], 1);
    // A question mark alone is no parameter.
    assert_eq!(client.get("/health?").await.status, 200);
}

async fn a_slash_too_many_leads_to_the_route(client: &ApiClient) {
    let id = format!("/items/{SAMPLE}");
    for (method, target, location) in [
        ("GET", "/items/", "/items"),
        ("POST", "/items/", "/items"),
        ("GET", "/items//?limit=2", "/items?limit=2"),
        ("GET", &format!("{id}/"), &id),
        ("GET", "/health/", "/health"),
        ("POST", "/cache/clear/", "/cache/clear"),
    ] {
        let request = format!("{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let answer = raw_answer(client, &request).await;
        assert!(answer.starts_with("HTTP/1.1 308"), "{target}: {answer}");
        let location = format!("location: {location}\r\n");
        assert!(answer.contains(&location), "{target}: {answer}");
    }
    // Clients that follow it send their body again.
    let answer = client
        .post("/items/", r#"{"name": "Followed", "price": 1}"#)
        .await;
    assert_eq!(answer.status, 201, "{}", answer.text());
}

async fn options_are_told(client: &ApiClient) {
    for (target, allowed) in [
        ("*", "GET,HEAD,POST,PUT,DELETE,OPTIONS"),
        ("/items", "GET,HEAD,POST"),
        ("/items/abc", "GET,HEAD,PUT,DELETE"),
        ("/cache/clear", "POST"),
        ("/health", "GET,HEAD"),
        ("/docs", "GET,HEAD"),
    ] {
        let request = format!("OPTIONS {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let answer = raw_answer(client, &request).await;
        assert!(answer.starts_with("HTTP/1.1 204"), "{target}: {answer}");
        let allow = format!("allow: {allowed}\r\n");
        assert!(answer.contains(&allow), "{target}: {answer}");
        // RFC 9110, 8.6: no length in a 204.
        assert!(!answer.contains("content-length"), "{target}: {answer}");
    }
    client
        .send(Method::OPTIONS, "/nothing", &[], None)
        .await
        .problem(404, "route-not-found");
}

async fn caches_on_the_way_keep_nothing_that_changes(client: &ApiClient) {
    let path = client.create("Not kept").await;
    let missing = "/items/00000000-0000-7000-8000-00000000000b";
    for (method, path, status, value) in [
        (Method::GET, path.as_str(), 200, "no-cache"),
        (Method::GET, "/items", 200, "no-cache"),
        (Method::GET, "/openapi.json", 200, "no-cache"),
        (Method::GET, "/health", 200, "no-store"),
        (Method::HEAD, "/health", 200, "no-store"),
        (Method::GET, "/livez", 200, "no-store"),
        (Method::GET, "/readyz", 200, "no-store"),
        (Method::GET, "/metrics", 200, "no-store"),
        (Method::GET, "/cache/stats", 200, "no-store"),
        (Method::POST, "/cache/clear", 200, "no-store"),
        (Method::GET, missing, 404, "no-store"),
        (Method::GET, missing, 404, "no-store"),
        (Method::GET, "/items/no", 400, "no-store"),
        (Method::GET, "/nothing", 404, "no-store"),
        (Method::PATCH, "/items", 405, "no-store"),
        (Method::POST, "/items", 400, "no-store"),
    ] {
        let answer = client.send(method.clone(), path, &[], None).await;
        assert_eq!(
            (answer.status.as_u16(), answer.header("cache-control")),
            (status, value),
            "{method} {path}"
        );
    }
}

async fn unknown_routes_and_methods(client: &ApiClient) {
    for path in [
        "/nothing",
        "/nothing/",
        "/items/a/b",
        "//items/",
        "//localhost/",
        "/cache",
        "//",
        "/Items",
        "/problems/none",
    ] {
        client.get(path).await.problem(404, "route-not-found");
    }
    for (method, path, allowed) in [
        (Method::PATCH, "/items", "GET,HEAD,POST"),
        (Method::DELETE, "/items", "GET,HEAD,POST"),
        (Method::POST, "/items/abc", "GET,HEAD,PUT,DELETE"),
        (Method::GET, "/cache/clear", "POST"),
        (Method::POST, "/health", "GET,HEAD"),
        (Method::PATCH, "/docs", "GET,HEAD"),
    ] {
        let answer = client.send(method, path, &[], None).await;
        answer.problem(405, "method-not-allowed");
        let set = |list: &str| list.split(',').map(str::to_owned).collect::<BTreeSet<_>>();
        assert_eq!(set(answer.header("allow")), set(allowed));
    }
    let head = client
        .send(Method::HEAD, &format!("/items/{SAMPLE}"), &[], None)
        .await;
    assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
    let head = client.send(Method::HEAD, "/nothing", &[], None).await;
    assert_eq!((head.status.as_u16(), head.body.len()), (404, 0));
}

async fn every_problem_type_is_described(client: &ApiClient) {
    for kind in writethrough_service::problem::Kind::ALL {
        let page = client.get(kind.uri()).await;
        assert_eq!(page.status, 200);
        assert!(page.text().contains(kind.title()));
    }
}

async fn the_callers_trace_is_continued(client: &ApiClient) {
    let id = "4bf92f3577b34da6a3ce929d0e0e4736";
    let traceparent = format!("00-{id}-00f067aa0ba902b7-01");
    let headers = [("traceparent", traceparent.as_str())];
    for path in ["/items", "/health", "/nothing"] {
        let answer = client.send(Method::GET, path, &headers, None).await;
        assert_eq!(answer.header("x-trace-id"), id);
    }
    let fresh = |answer: support::Answer| answer.header("x-trace-id").to_owned();
    let (one, other) = (
        fresh(client.get("/items").await),
        fresh(client.get("/items").await),
    );
    assert!(one != other && one.len() == 32 && one.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let headers = [("traceparent", "00-not-a-trace")];
    let answer = client.send(Method::GET, "/items", &headers, None).await;
    assert_eq!(
        (answer.status.as_u16(), answer.header("x-trace-id").len()),
        (200, 32)
    );
}

async fn clearing_the_cache_makes_the_next_read_a_fill(client: &ApiClient) {
    let path = client.create("Cleared").await;
    client.get_through_cache("/items?limit=3").await;
    let status = |answer: support::Answer| answer.header("cache-status").to_owned();
    assert_eq!(
        status(client.get_through_cache(&path).await),
        "writethrough; hit"
    );
    let answer = client.post("/cache/clear", "").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let cleared = answer.json();
    assert_eq!(cleared["status"], "cleared");
    assert!(cleared["keys_deleted"].as_u64().unwrap() >= 2, "{cleared}");
    for path in [path.as_str(), "/items?limit=3"] {
        assert_eq!(
            status(client.get_through_cache(path).await),
            "writethrough; fwd=miss; stored"
        );
        assert_eq!(
            status(client.get_through_cache(path).await),
            "writethrough; hit"
        );
    }
}

/// Anybody can write down a cursor, without end. One that a list has given out names an item.
async fn lists_behind_made_up_cursors_are_served_and_not_cached(client: &ApiClient) {
    let status = |answer: &support::Answer| answer.header("cache-status").to_owned();
    for number in 0..3 {
        client.create(&format!("Behind a cursor {number}")).await;
    }
    let first = client.get("/items?limit=2").await.json();
    let cursor = first["next_cursor"].as_str().unwrap();
    let path = format!("/items?limit=2&cursor={cursor}");
    let page = client.get_through_cache(&path).await;
    assert_eq!(status(&page), "writethrough; fwd=miss; stored");
    let hit = client.get_through_cache(&path).await;
    assert_eq!(status(&hit), "writethrough; hit");
    assert_eq!(hit.json(), page.json());
    // The same place, of an item that is not there; a time that nobody has seen; no time at all.
    let before = client.get("/cache/stats").await.json()["declined"].clone();
    let nobody = format!("{}{}", &cursor[..16], "f".repeat(32));
    let [early, late] = [
        "0".repeat(48),
        format!("00038d7ea4c68000{}", "0".repeat(32)),
    ];
    for made_up in [&nobody, &early, &late] {
        for _ in 0..2 {
            let path = format!("/items?limit=2&cursor={made_up}");
            let answer = client.get_through_cache(&path).await;
            assert_eq!(answer.status, 200);
            assert_eq!(status(&answer), "writethrough; fwd=miss", "{made_up}");
        }
    }
    let declined = client.get("/cache/stats").await.json()["declined"].clone();
    assert_eq!(declined.as_u64().unwrap(), before.as_u64().unwrap() + 6);
    // A cursor outlives its item: the list goes on where it was.
    let gone = first["items"][1]["id"].as_str().unwrap();
    assert_eq!(client.delete(&format!("/items/{gone}")).await.status, 200);
    let answer = client.get_through_cache(&path).await;
    assert_eq!(status(&answer), "writethrough; fwd=miss");
    assert_eq!(answer.json()["items"], page.json()["items"]);
}

async fn long_lists_are_served_and_not_cached(client: &ApiClient) {
    let status = |answer: &support::Answer| answer.header("cache-status").to_owned();
    let before = client.get("/cache/stats").await.json()["oversized"].clone();
    let description = "x".repeat(60_000);
    for number in 0..5 {
        let body =
            json!({"name": format!("Long {number}"), "description": description, "price": 1});
        assert_eq!(client.post("/items", &body.to_string()).await.status, 201);
    }
    for _ in 0..2 {
        let long = client.get_through_cache("/items?limit=5").await;
        assert!(long.text().len() > 256 << 10);
        assert_eq!(status(&long), "writethrough; fwd=miss");
    }
    let short = client.get_through_cache("/items?limit=4").await;
    assert!(short.text().len() < 256 << 10);
    assert_eq!(status(&short), "writethrough; fwd=miss; stored");
    let oversized = client.get("/cache/stats").await.json()["oversized"].clone();
    assert_eq!(oversized.as_u64().unwrap(), before.as_u64().unwrap() + 2);
}

async fn statistics_add_up(client: &ApiClient) {
    let before = client.get("/cache/stats").await.json();
    let path = client.create("Counted").await;
    for _ in 0..3 {
        client.get_through_cache(&path).await;
    }
    client
        .get_through_cache("/items/00000000-0000-7000-8000-0000000000ff")
        .await;
    let after = client.get("/cache/stats").await.json();
    let grown = |name: &str| after[name].as_u64().unwrap() - before[name].as_u64().unwrap();
    assert_eq!(grown("total_hits"), 3);
    assert_eq!(grown("total_misses"), 1);
    assert_eq!((grown("writes"), grown("intents")), (1, 2));
    let (hits, misses) = (after["total_hits"].as_f64(), after["total_misses"].as_f64());
    let rate = hits.unwrap() / (hits.unwrap() + misses.unwrap()) * 100.0;
    assert!(
        (after["hit_rate"].as_f64().unwrap() - rate).abs() <= 0.005,
        "{after}"
    );
    assert_eq!(
        (&after["mode"], &after["consistency"]),
        (&json!("cached"), &json!("strict"))
    );
    assert!(after["epoch"].is_u64());
    for count in [
        "coalesced_loads",
        "refused_fills",
        "oversized",
        "declined",
        "total_bypasses",
        "indeterminate_writes",
        "epoch_changes",
        "cache_errors",
        "decode_errors",
        "degraded_seconds",
    ] {
        assert!(after[count].is_number(), "{count}");
    }
    assert!(after["bypasses"]["intent"].is_u64());
    // Never older than a write of the node's own.
    let cached = async || {
        let stats = client.get("/cache/stats").await.json();
        stats["cached_items"].as_u64().unwrap()
    };
    let mut last = cached().await;
    for number in 0..3 {
        client.create(&format!("Counted at once {number}")).await;
        let now = cached().await;
        assert_eq!(now, last + 1);
        last = now;
    }
}

async fn health_and_probes(client: &ApiClient) {
    let health = client.get("/health").await;
    assert_eq!(health.status, 200);
    let health = health.json();
    assert_eq!(
        (&health["status"], &health["service"]),
        (&json!("ok"), &json!("api"))
    );
    assert_eq!(
        health["dependencies"],
        json!({"redis": "ok", "postgres": "ok"})
    );
    for probe in ["/livez", "/readyz"] {
        assert_eq!(client.get(probe).await.status, 200);
    }
}

async fn metrics_are_exported(client: &ApiClient) {
    let path = client.create("Measured").await;
    assert_eq!(client.get(&path).await.status, 200);
    client.put(&path, r#"{"name": "Anew", "price": 2}"#).await;
    assert_eq!(client.get("/items").await.status, 200);
    assert_eq!(client.get("/nothing").await.status, 404);
    // A request that a client has given up may take a moment to end.
    let text = until("no other request is active", async || {
        let answer = client.get("/metrics").await;
        assert_eq!(answer.status, 200);
        let text = answer.text();
        text.contains("\nhttp_server_active_requests 0\n")
            .then_some(text)
    })
    .await;
    for line in [
        r#"http_server_request_duration_seconds_bucket{le="0.001",method="GET",route="/items/{id}",status="200"}"#,
        r#"http_server_request_duration_seconds_count{method="POST",route="/items",status="201"}"#,
        r#"http_server_request_duration_seconds_count{method="GET",route="other",status="404"}"#,
        "http_server_connections ",
        r#"http_server_shed_requests_total{reason="in_flight"} 0"#,
        r#"db_client_operation_duration_seconds_count{operation="select",outcome="ok"}"#,
        r#"writethrough_write_duration_seconds_count{operation="update",part="redis"}"#,
        r#"writethrough_write_duration_seconds_count{operation="update",part="postgres"}"#,
        r#"writethrough_write_duration_seconds_count{operation="update",part="total"}"#,
        r#"writethrough_reads_total{outcome="hit"}"#,
        r#"writethrough_reads_total{outcome="miss"}"#,
        r#"writethrough_bypassed_reads_total{reason="intent"}"#,
        "writethrough_intents_total ",
        "writethrough_refused_fills_total ",
        "writethrough_oversized_total ",
        "writethrough_declined_total ",
        "writethrough_unannounced_writes_total 0",
        "writethrough_unguarded_writes_total 0",
        "writethrough_epoch_changes_total ",
        "writethrough_degraded_seconds_total ",
        "writethrough_epoch ",
        r#"writethrough_mode{mode="cached"} 1"#,
        r#"writethrough_mode{mode="bypass"} 0"#,
        "writethrough_read_lease_age_seconds ",
        "writethrough_cache_connected 1",
        "writethrough_fence_reachable 1",
        r#"db_client_connections{state="idle"}"#,
        "db_client_connections_limit ",
    ] {
        assert!(
            text.lines().any(|found| found.starts_with(line)),
            "no {line} in\n{text}"
        );
    }
    // What a client makes up is never a label.
    let samples_after_making_up = async |number: usize| {
        let missing = format!("/items/00000000-0000-7000-8000-0000000001{number:02}");
        assert_eq!(client.get(&missing).await.status, 404);
        assert_eq!(client.get(&format!("/no/{number}")).await.status, 404);
        let method = Method::from_bytes(format!("MADE{number}").as_bytes()).unwrap();
        assert_eq!(client.send(method, "/items", &[], None).await.status, 405);
        let text = client.get("/metrics").await.text();
        text.lines().filter(|line| !line.starts_with('#')).count()
    };
    samples_after_making_up(0).await;
    let first = samples_after_making_up(1).await;
    for number in 2..10 {
        assert_eq!(samples_after_making_up(number).await, first);
    }
    assert!(first < 1200, "{first} samples");
}

async fn metrics_come_in_the_form_that_is_asked_for(client: &ApiClient) {
    const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let ask = async |headers: &[(&str, &str)]| {
        let answer = client.send(Method::GET, "/metrics", headers, None).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("vary"), "accept, accept-encoding");
        answer
    };
    for accept in ["*/*", "text/plain; version=0.0.4", "application/json"] {
        let answer = ask(&[("accept", accept)]).await;
        assert_eq!(answer.header("content-type"), TEXT, "{accept}");
    }
    let plain = ask(&[]).await;
    assert_eq!(plain.header("content-type"), TEXT);
    assert_eq!(plain.header("content-encoding"), "");
    assert!(!plain.text().contains("# EOF") && !plain.text().contains("# UNIT"));

    let open_metrics = ask(&[("accept", "application/openmetrics-text; version=1.0.0")]).await;
    assert_eq!(open_metrics.header("content-type"), OPEN_METRICS);
    assert!(open_metrics.text().ends_with("# EOF\n"));

    let packed = ask(&[("accept-encoding", "gzip")]).await;
    assert_eq!(packed.header("content-encoding"), "gzip");
    assert!(packed.body.len() * 4 < plain.body.len());
    let mut unpacked = String::new();
    flate2::read::GzDecoder::new(packed.body.as_slice())
        .read_to_string(&mut unpacked)
        .unwrap();
    assert!(unpacked.contains("\n# TYPE writethrough_reads_total counter\n"));
}

async fn the_api_describes_itself(client: &ApiClient) {
    let answer = client.get("/openapi.json").await;
    assert_eq!(
        (answer.status.as_u16(), answer.header("content-type")),
        (200, "application/json")
    );
    let api = answer.json();
    for (path, methods) in [
        ("/items", &["get", "post"][..]),
        ("/items/{id}", &["get", "put", "delete"]),
        ("/cache/clear", &["post"]),
        ("/cache/stats", &["get"]),
        ("/health", &["get"]),
        ("/livez", &["get"]),
        ("/readyz", &["get"]),
        ("/metrics", &["get"]),
    ] {
        for method in methods {
            let operation = &api["paths"][path][method];
            assert!(operation["responses"].is_object(), "{method} {path}");
        }
    }
    let page = client.get("/docs").await;
    assert!(page.header("content-type").starts_with("text/html"));
    let script = client.get("/docs/page.js").await;
    assert!(script.header("content-type").starts_with("text/javascript"));
    assert!(script.text().contains("/openapi.json"));
    for text in [page.text(), script.text()] {
        assert!(!text.contains("//cdn") && !text.contains("https://") && !text.contains("http://"));
    }
}

/// The description promises no operation that this service does not have.
async fn every_operation_that_is_described_succeeds(client: &ApiClient) {
    let path = client.create("Described").await;
    let body = r#"{"name": "Anew", "price": 2}"#;
    for (method, path) in [
        (Method::GET, "/"),
        (Method::GET, "/items"),
        (Method::GET, path.as_str()),
        (Method::PUT, path.as_str()),
        (Method::DELETE, path.as_str()),
        (Method::GET, "/cache/stats"),
        (Method::POST, "/cache/clear"),
        (Method::GET, "/health"),
        (Method::GET, "/livez"),
        (Method::GET, "/readyz"),
        (Method::GET, "/metrics"),
        (Method::GET, "/openapi.json"),
        (Method::GET, "/openapi-3.1.json"),
    ] {
        let body = (method == Method::PUT).then_some(body);
        let answer = client.send(method.clone(), path, &[], body).await;
        assert_eq!(answer.status, 200, "{method} {path}: {}", answer.text());
    }
    let (succeeded, described) = support::description::check_answers(client).await;
    assert_eq!(succeeded, described);
}

async fn the_index_comes_in_two_forms(client: &ApiClient) {
    let page = client.get("/").await;
    assert!(page.header("content-type").starts_with("text/html"));
    assert!(page.text().contains("/docs"));
    let accept = [("accept", "application/json")];
    let index = client.send(Method::GET, "/", &accept, None).await;
    assert_eq!(index.header("content-type"), "application/json");
    assert_eq!(index.json()["endpoints"]["items"], "/items");
}
