//! The whole checker, from the driver to the verdict, against small services of our own: a correct
//! one, and some with the faults that the checker exists to find.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use clap::Parser;
use serde_json::{Value, json};
use writethrough_check::{CheckArgs, run_to};

/// What is wrong with a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Some reads come from a copy that is refreshed now and then.
    StaleReads,
    /// The same for lists.
    StaleLists,
    /// Some updates are acknowledged and not made.
    LostUpdates,
    /// Some answers to updates never come; half of those updates are made, a moment later.
    SilentUpdates,
    /// Two updates read the same version.
    LostVersions,
    /// Nothing works.
    Broken,
}

#[derive(Clone, Debug, Default)]
struct Tables {
    items: HashMap<String, Value>,
    order: Vec<String>,
}

struct Service {
    fault: Fault,
    tables: Mutex<Tables>,
    copy: Mutex<Tables>,
}

fn chance(percent: u8) -> bool {
    fastrand::u8(0..100) < percent
}

fn stamp(number: usize) -> String {
    format!(
        "2026-01-01T{:02}:{:02}:{:02}.5Z",
        number / 3600,
        number / 60 % 60,
        number % 60
    )
}

/// Lets other requests in between, as a real service does.
async fn breathe() {
    tokio::time::sleep(Duration::from_micros(fastrand::u64(0..1500))).await;
}

fn not_found() -> Response {
    (
        StatusCode::NOT_FOUND,
        Json(json!({"type": "https://x/not-found"})),
    )
        .into_response()
}

impl Service {
    fn read_from(&self, stale: Fault) -> Tables {
        let table = if self.fault == stale && chance(20) {
            &self.copy
        } else {
            &self.tables
        };
        table.lock().unwrap().clone()
    }

    fn update(&self, id: &str, new: &Value, version: Option<u64>) -> Option<Value> {
        let mut tables = self.tables.lock().unwrap();
        let item = tables.items.get_mut(id)?;
        let version = version.unwrap_or_else(|| item["version"].as_u64().unwrap()) + 1;
        for field in ["name", "description", "price"] {
            item[field] = new[field].clone();
        }
        item["version"] = version.into();
        Some(item.clone())
    }
}

type Shared = State<Arc<Service>>;

async fn create(State(service): Shared, Json(mut item): Json<Value>) -> Response {
    if service.fault == Fault::Broken {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    breathe().await;
    let created = {
        let mut tables = service.tables.lock().unwrap();
        let id = format!("item-{}", tables.order.len());
        item["id"] = id.clone().into();
        item["version"] = 1.into();
        item["created_at"] = stamp(tables.order.len()).into();
        tables.items.insert(id.clone(), item.clone());
        tables.order.push(id);
        item
    };
    breathe().await;
    (StatusCode::CREATED, Json(created)).into_response()
}

async fn read(State(service): Shared, Path(id): Path<String>) -> Response {
    breathe().await;
    let item = service.read_from(Fault::StaleReads).items.get(&id).cloned();
    breathe().await;
    item.map_or_else(not_found, |item| Json(item).into_response())
}

async fn update(
    State(service): Shared,
    Path(id): Path<String>,
    Json(new): Json<Value>,
) -> Response {
    breathe().await;
    match service.fault {
        Fault::LostUpdates if chance(2) => {
            let item = service.tables.lock().unwrap().items.get(&id).cloned();
            return item.map_or_else(not_found, |mut item| {
                item["name"] = new["name"].clone();
                item["version"] = (item["version"].as_u64().unwrap() + 1).into();
                Json(item).into_response()
            });
        }
        Fault::SilentUpdates if chance(4) => {
            if chance(50) {
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(0..600))).await;
                    service.update(&id, &new, None);
                });
            }
            return std::future::pending().await;
        }
        Fault::LostVersions => {
            let version = {
                let tables = service.tables.lock().unwrap();
                tables
                    .items
                    .get(&id)
                    .and_then(|item| item["version"].as_u64())
            };
            breathe().await;
            return service
                .update(&id, &new, version)
                .map_or_else(not_found, |item| Json(item).into_response());
        }
        _ => {}
    }
    let item = service.update(&id, &new, None);
    breathe().await;
    item.map_or_else(not_found, |item| Json(item).into_response())
}

async fn delete(State(service): Shared, Path(id): Path<String>) -> Response {
    breathe().await;
    let item = service.tables.lock().unwrap().items.remove(&id);
    breathe().await;
    item.map_or_else(not_found, |_| {
        Json(json!({"status": "deleted", "id": id})).into_response()
    })
}

async fn list(State(service): Shared, Query(query): Query<HashMap<String, String>>) -> Response {
    breathe().await;
    let limit: usize = query
        .get("limit")
        .map_or(10, |limit| limit.parse().unwrap());
    let before: usize = query
        .get("cursor")
        .map_or(usize::MAX, |cursor| cursor.parse().unwrap());
    let tables = service.read_from(Fault::StaleLists);
    let mut rest = tables
        .order
        .iter()
        .enumerate()
        .rev()
        .filter(|(at, id)| *at < before && tables.items.contains_key(*id));
    let page: Vec<(usize, Value)> = rest
        .by_ref()
        .take(limit)
        .map(|(at, id)| (at, tables.items[id].clone()))
        .collect();
    let next = rest.next().and(page.last()).map(|(at, _)| at.to_string());
    let items: Vec<Value> = page.into_iter().map(|(_, item)| item).collect();
    breathe().await;
    Json(json!({"items": items, "count": items.len(), "next_cursor": next})).into_response()
}

/// Starts a service on a free port. It ends with the test's runtime.
async fn serve(fault: Fault) -> String {
    let service = Arc::new(Service {
        fault,
        tables: Mutex::default(),
        copy: Mutex::default(),
    });
    let lagging = service.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let tables = lagging.tables.lock().unwrap().clone();
            *lagging.copy.lock().unwrap() = tables;
        }
    });
    let router = Router::new()
        .route("/items", get(list).post(create))
        .route("/items/{id}", get(read).put(update).delete(delete))
        .with_state(service);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    url
}

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    args: CheckArgs,
}

async fn check(arguments: &[&str]) -> (u8, String) {
    let args = Command::parse_from([&["check"], arguments].concat()).args;
    let (mut out, mut complaints) = (Vec::new(), Vec::new());
    let code = run_to(args, &mut out, &mut complaints).await.unwrap();
    assert_eq!(String::from_utf8(complaints).unwrap(), "");
    (code, String::from_utf8(out).unwrap())
}

async fn verdict(fault: Fault, more: &[&str]) -> (u8, Value) {
    let url = serve(fault).await;
    let common = [
        "--target",
        &url,
        "--json",
        "--processes",
        "12",
        "--keys",
        "4",
        "--seed",
        "5",
    ];
    let limits = ["--operations", "4000", "--duration", "20s"];
    let (code, text) = check(&[&common[..], &limits, more].concat()).await;
    (
        code,
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")),
    )
}

fn kinds(summary: &Value) -> Vec<&str> {
    let anomalies = summary["anomalies"].as_array().unwrap();
    anomalies
        .iter()
        .map(|anomaly| anomaly["kind"].as_str().unwrap())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_correct_service_is_found_linearizable() {
    let (code, summary) = verdict(Fault::None, &[]).await;
    assert_eq!(
        (code, &summary["verdict"]),
        (0, &json!("linearizable")),
        "{summary:#}"
    );
    assert!(summary["operations"].as_u64().unwrap() >= 4000);
    assert!(
        summary["items"].as_u64().unwrap() > 20,
        "items come and go: {}",
        summary["items"]
    );
    assert_eq!(summary["unknown"], 0);
    assert_eq!(summary["availability"]["reads"]["percent"], 100.0);
    let invoked: Vec<&Value> = summary["actions"].as_array().unwrap().iter().collect();
    assert_eq!(invoked.len(), 5, "all kinds of operation were invoked");
}

/// A reader that goes away after so many bytes, as `head -c` does, or a full disk.
struct Gone(usize, std::io::ErrorKind);

impl std::io::Write for Gone {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = self.0.min(bytes.len());
        self.0 -= room;
        match room {
            0 => Err(self.1.into()),
            room => Ok(room),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_verdict_stands_when_nobody_reads_it() {
    use std::io::ErrorKind::{BrokenPipe, StorageFull};
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("history").display().to_string();
    for (fault, code) in [(Fault::None, 0), (Fault::StaleReads, 1)] {
        let url = serve(fault).await;
        let options = ["--processes", "12", "--keys", "4", "--operations", "1500"];
        let driven = [&["--target", &url, "--record", &record], &options[..]].concat();
        // To drive the operations takes most of the time, so they are driven once.
        let judged = vec!["--history", &record];
        let in_json = vec!["--history", &record, "--json"];
        let mut cases = vec![(driven, 0, StorageFull)];
        for command in [judged, in_json] {
            for room in [0, 1, 100] {
                cases.push((command.clone(), room, BrokenPipe));
                cases.push((command.clone(), room, StorageFull));
            }
        }
        for (command, room, kind) in cases {
            let args = Command::parse_from([&["check"], &command[..]].concat()).args;
            let (mut out, mut complaints) = (Gone(room, kind), Vec::new());
            let ended = run_to(args, &mut out, &mut complaints).await.unwrap();
            assert_eq!(ended, code, "{command:?}, {room} bytes, {kind}");
            let complaints = String::from_utf8(complaints).unwrap();
            let told = complaints.starts_with("the result could not be printed: ");
            assert_eq!(told, kind == StorageFull, "{complaints}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_outcomes_raise_no_false_alarm() {
    let (code, summary) = verdict(Fault::SilentUpdates, &["--request-timeout", "300ms"]).await;
    assert!(summary["unknown"].as_u64().unwrap() > 5, "{summary:#}");
    assert_eq!(code, 0, "{summary:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stale_reads_are_found() {
    let (code, summary) = verdict(Fault::StaleReads, &[]).await;
    assert_eq!(code, 1);
    assert!(kinds(&summary).contains(&"stale-read"), "{summary:#}");
    assert!(summary["stale_reads"].as_u64().unwrap() > 10);
    // The copy is refreshed every 100 ms; a slow machine may be late.
    let worst = summary["worst_staleness_ms"].as_f64().unwrap();
    assert!((1.0..5_000.0).contains(&worst), "{worst}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stale_lists_are_found() {
    let (code, summary) = verdict(
        Fault::StaleLists,
        &["--mix", "read=30,list=30,update=10,create=15,delete=15"],
    )
    .await;
    assert_eq!(code, 1);
    let kinds = kinds(&summary);
    assert!(kinds.contains(&"list-misses-item"), "{kinds:?}");
    assert!(kinds.contains(&"list-shows-deleted-item"), "{kinds:?}");
    assert!(
        !kinds.contains(&"resurrected-item") && !kinds.contains(&"lost-item"),
        "{kinds:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_updates_are_found() {
    let (code, summary) = verdict(Fault::LostUpdates, &[]).await;
    assert_eq!(code, 1);
    assert!(!kinds(&summary).is_empty());
    let (code, summary) = verdict(Fault::LostVersions, &[]).await;
    assert_eq!(code, 1);
    assert!(kinds(&summary).contains(&"reused-version"), "{summary:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_history_is_recorded_and_judged_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (history, first, again) = (path("h.jsonl"), path("first.html"), path("again.html"));
    let url = serve(Fault::StaleReads).await;
    let (code, text) = check(&[
        "--target",
        &url,
        "--operations",
        "2000",
        "--keys",
        "3",
        "--record",
        &history,
        "--report",
        &first,
        "--seed",
        "9",
    ])
    .await;
    assert_eq!(code, 1, "{text}");
    assert!(
        text.starts_with("seed 9, ") && text.contains("NOT linearizable"),
        "{text}"
    );
    assert!(text.contains("stale-read of item item-"), "{text}");

    let (code, text) = check(&["--history", &history, "--report", &again, "--json"]).await;
    let summary: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (code, &summary["verdict"], &summary["seed"]),
        (1, &json!("anomaly"), &json!(9))
    );
    let page = std::fs::read_to_string(&again).unwrap();
    assert!(page.contains("<svg") && page.contains("staleness histogram"));
    assert!(
        !page.contains("<script") && !page.contains("src="),
        "the page needs nothing else"
    );
}

#[tokio::test]
async fn faults_that_were_recorded_are_shaded_in_the_timeline() {
    let bad = include_str!("histories/bad-stale-read.jsonl");
    let (_, operations) = bad.split_once('\n').unwrap();
    let header = r#"{"history":"writethrough-check/1","faults":[
        {"fault":"lagging-failover","from":12000000,"to":22000000},
        {"fault":"kill-node","target":1,"from":900000000,"to":910000000,"down":[1]}]}"#;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (history, page) = (path("h.jsonl"), path("page.html"));
    std::fs::write(
        &history,
        format!("{}\n{operations}", header.replace('\n', "")),
    )
    .unwrap();
    let (code, _) = check(&["--history", &history, "--report", &page]).await;
    assert_eq!(code, 1);
    let page = std::fs::read_to_string(&page).unwrap();
    assert!(page.contains("class=fault><title>lagging-failover"));
    assert!(!page.contains("kill-node"), "it was not in force then");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_judged_has_its_own_exit_code() {
    let url = serve(Fault::Broken).await;
    let common = ["--operations", "100", "--wait", "500ms", "--target"];
    // Bound and closed again: nobody listens there.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    for target in [
        url,
        format!("http://{port}"),
        "https://127.0.0.1".to_owned(),
    ] {
        let limit = Duration::from_secs(60);
        let arguments = [&common[..], &[&*target]].concat();
        let checked = tokio::time::timeout(limit, check(&arguments));
        let (code, text) = checked.await.unwrap();
        assert_eq!(code, 2, "{text}");
        assert!(text.contains("could not judge"), "{text}");
    }
}
