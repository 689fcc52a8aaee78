//! The spans of each operation: exactly the promised children, one after the other, as a collector
//! receives them. One test, because a process has one tracer.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use reqwest::Method;
use support::{SAMPLE, Service, config};
use writethrough_service::config::{CacheBackend, Config, Database};
use writethrough_service::engine::Consistency;
use writethrough_service::telemetry::Telemetry;
use writethrough_service::telemetry::settings::{Otlp, Protocol, TraceSettings};
use writethrough_testbed::Testbed;

const SERVER: i32 = 2;
const CLIENT: i32 = 3;
const CALLER: &str = "00f067aa0ba902b7";
const BODY: &str = r#"{"name": "Lamp", "price": 24.50}"#;

type Received = Arc<Mutex<Vec<ExportTraceServiceRequest>>>;

/// A collector that keeps what it is sent.
async fn collector() -> (String, Received) {
    async fn traces(State(received): State<Received>, body: Bytes) {
        let request = ExportTraceServiceRequest::decode(body).expect("OTLP as protobuf");
        received.lock().unwrap().push(request);
    }
    let received = Received::default();
    let router = Router::new()
        .route("/v1/traces", post(traces))
        .with_state(received.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = hyper_util::service::TowerToHyperService::new(router.clone());
            let io = hyper_util::rt::TokioIo::new(stream);
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
        }
    });
    (url, received)
}

/// Requests, each in a trace of its own.
struct Traced<'a> {
    service: &'a Service,
    made: Vec<(u128, &'static str, &'static [&'static str])>,
}

impl Traced<'_> {
    /// Sends a request that must have exactly these children.
    async fn expect(
        &mut self,
        name: &'static str,
        children: &'static [&'static str],
        method: Method,
        path: &str,
        body: Option<&str>,
    ) -> support::Answer {
        let service = self.service;
        // A read that a busy machine made bypass the cache is not the one that is looked at.
        let (trace, answer) = support::until("the cache is in use", async || {
            let trace = fresh_trace();
            let traceparent = format!("00-{trace:032x}-{CALLER}-01");
            let headers = [("traceparent", traceparent.as_str())];
            let answer = service.send(method.clone(), path, &headers, body).await;
            let bypassed = answer.header("cache-status").contains("fwd=bypass");
            (!bypassed).then_some((trace, answer))
        })
        .await;
        assert!(answer.status.as_u16() < 500, "{name}: {}", answer.text());
        assert_eq!(answer.header("x-trace-id"), format!("{trace:032x}"));
        self.made.push((trace, name, children));
        answer
    }
}

fn fresh_trace() -> u128 {
    uuid::Uuid::new_v4().as_u128()
}

fn attribute(span: &Span, name: &str) -> Option<String> {
    let found = span
        .attributes
        .iter()
        .find(|attribute| attribute.key == name)?;
    Some(match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => text.clone(),
        Value::BoolValue(value) => value.to_string(),
        Value::IntValue(value) => value.to_string(),
        other => format!("{other:?}"),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn each_operation_has_exactly_the_promised_children() {
    let testbed = Testbed::new().await.unwrap();
    let (postgres, redis) = (
        testbed.postgres().await.unwrap(),
        testbed.redis().await.unwrap(),
    );
    let (endpoint, received) = collector().await;
    let base = config(
        Database::Postgres(postgres.url()),
        CacheBackend::Redis(redis.url()),
    );
    let base = Config {
        traces: TraceSettings {
            otlp: Some(Otlp::new(Protocol::Http, format!("{endpoint}/v1/traces"))),
            ..TraceSettings::default()
        },
        log_level: "warn".to_owned(),
        ..base
    };
    let mut telemetry = Telemetry::start(&base).unwrap();
    let mut made = Vec::new();

    let strict = Service::start(base.clone()).await.cached().await;
    let mut traced = Traced {
        service: &strict,
        made: Vec::new(),
    };
    let sample = format!("/items/{SAMPLE}");
    const FILL: &[&str] = &["redis_get", "redis_lease", "postgres_select", "redis_set"];
    const FILL_PAGE: &[&str] = &[
        "redis_get",
        "redis_lease",
        "postgres_select_all",
        "redis_set",
    ];
    traced
        .expect("GET /items/{id}", FILL, Method::GET, &sample, None)
        .await;
    traced
        .expect(
            "GET /items/{id}",
            &["redis_get"],
            Method::GET,
            &sample,
            None,
        )
        .await;
    let created = traced
        .expect(
            "POST /items",
            &["redis_intent", "postgres_insert", "redis_set"],
            Method::POST,
            "/items",
            Some(BODY),
        )
        .await;
    let path = created.header("location").to_owned();
    traced
        .expect("GET /items", FILL_PAGE, Method::GET, "/items", None)
        .await;
    traced
        .expect("GET /items", &["redis_get"], Method::GET, "/items", None)
        .await;
    traced
        .expect(
            "PUT /items/{id}",
            &["redis_intent", "postgres_update", "redis_set"],
            Method::PUT,
            &path,
            Some(BODY),
        )
        .await;
    traced
        .expect(
            "DELETE /items/{id}",
            &["redis_intent", "postgres_delete", "redis_del"],
            Method::DELETE,
            &path,
            None,
        )
        .await;
    traced
        .expect("POST /items", &[], Method::POST, "/items", Some("{}"))
        .await;
    traced
        .expect("GET", &[], Method::GET, "/nothing", None)
        .await;
    made.append(&mut traced.made);

    // Not sampled by the caller: no span, but the trace's id all the same.
    let unsampled = fresh_trace();
    let traceparent = format!("00-{unsampled:032x}-{CALLER}-00");
    let headers = [("traceparent", traceparent.as_str())];
    let answer = strict.send(Method::GET, &sample, &headers, None).await;
    assert_eq!(answer.header("x-trace-id"), format!("{unsampled:032x}"));
    // Without a caller's trace, the id that the client is told is that of the trace.
    let own = u128::from_str_radix(strict.get(&sample).await.header("x-trace-id"), 16).unwrap();
    strict.running.shutdown().await;

    let textbook = Service::start(Config {
        consistency: Consistency::Textbook,
        ..base.clone()
    })
    .await;
    support::until("the cache is connected", async || {
        (textbook.get("/health").await.json()["status"] == "ok").then_some(())
    })
    .await;
    let mut traced = Traced {
        service: &textbook,
        made: Vec::new(),
    };
    let children: &[&str] = &["postgres_insert", "redis_set"];
    let created = traced
        .expect("POST /items", children, Method::POST, "/items", Some(BODY))
        .await;
    let path = created.header("location").to_owned();
    traced
        .expect("GET /items/{id}", &["redis_get"], Method::GET, &path, None)
        .await;
    let children: &[&str] = &["postgres_update", "redis_set"];
    traced
        .expect("PUT /items/{id}", children, Method::PUT, &path, Some(BODY))
        .await;
    let children: &[&str] = &["postgres_delete", "redis_del"];
    traced
        .expect("DELETE /items/{id}", children, Method::DELETE, &path, None)
        .await;
    let children: &[&str] = &["redis_get", "postgres_select", "redis_set"];
    traced
        .expect("GET /items/{id}", children, Method::GET, &path, None)
        .await;
    made.append(&mut traced.made);
    textbook.running.shutdown().await;
    telemetry.shutdown().await;

    let requests = received.lock().unwrap();
    let resources = requests.iter().flat_map(|request| &request.resource_spans);
    let mut spans: Vec<&Span> = Vec::new();
    for resource in resources {
        let attributes = &resource.resource.as_ref().unwrap().attributes;
        let service = attributes
            .iter()
            .find(|attribute| attribute.key == "service.name")
            .unwrap();
        let name = service.value.as_ref().unwrap().value.as_ref().unwrap();
        assert_eq!(name, &Value::StringValue("api".to_owned()));
        spans.extend(resource.scope_spans.iter().flat_map(|scope| &scope.spans));
    }
    let of_trace = |trace: u128| -> Vec<&Span> {
        let id = trace.to_be_bytes();
        spans
            .iter()
            .filter(|span| span.trace_id == id)
            .copied()
            .collect()
    };

    for (trace, name, children) in made {
        let found = of_trace(trace);
        let (servers, mut clients): (Vec<&Span>, Vec<&Span>) =
            found.into_iter().partition(|span| span.kind == SERVER);
        let [server] = servers.as_slice() else {
            panic!("{name}: {servers:?}")
        };
        assert_eq!(server.name, name);
        let caller: String = server
            .parent_span_id
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        assert_eq!(caller, CALLER);
        assert!(attribute(server, "http.response.status_code").is_some());
        clients.sort_by_key(|span| span.start_time_unix_nano);
        let names: Vec<_> = clients.iter().map(|span| span.name.as_str()).collect();
        assert_eq!(names, children, "{name}");
        for pair in clients.windows(2) {
            assert!(
                pair[0].end_time_unix_nano <= pair[1].start_time_unix_nano,
                "{name}: {} and {} overlap",
                pair[0].name,
                pair[1].name
            );
        }
        for client in clients {
            assert_eq!(
                (client.kind, &client.parent_span_id),
                (CLIENT, &server.span_id)
            );
            let system = attribute(client, "db.system.name").unwrap();
            assert!(
                attribute(client, "db.operation.name").is_some(),
                "{client:?}"
            );
            match client.name.split_once('_').unwrap().0 {
                "redis" => {
                    assert_eq!(system, "redis");
                    assert!(attribute(client, "cache.key").is_some(), "{client:?}");
                }
                "postgres" => assert_eq!(system, "postgresql"),
                other => panic!("{other}"),
            }
            if client.name == "redis_get" {
                let hit = (children.len() == 1).to_string();
                assert_eq!(attribute(client, "cache.hit"), Some(hit));
            }
        }
    }
    assert!(of_trace(unsampled).is_empty());
    assert_eq!(
        of_trace(own)
            .iter()
            .filter(|span| span.kind == SERVER)
            .count(),
        1
    );
    // Epochs are on the spans of the strict mode.
    assert!(
        spans
            .iter()
            .any(|span| attribute(span, "cache.epoch").is_some())
    );
}
