//! What the tests of the service share: a server in this process, and a client that keeps whole answers.

#![allow(dead_code)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::header::HeaderMap;
use reqwest::{Client, Method, StatusCode};
use serde_json::Value;
use writethrough_service::config::{CacheBackend, Config, Database};
use writethrough_service::server::{Running, Server};

pub(crate) mod description;

/// The first sample row.
pub(crate) const SAMPLE: &str = "550e8400-e29b-41d4-a716-446655440001";

/// A configuration for tests: a free port, and nothing kept.
pub(crate) fn config(database: Database, cache: CacheBackend) -> Config {
    Config {
        listen: ([127, 0, 0, 1], 0).into(),
        database,
        cache,
        database_pool_size: 8,
        drain: Duration::from_secs(2),
        ..Config::default()
    }
}

/// A server in this process.
pub(crate) struct Service {
    pub(crate) running: Running,
    pub(crate) client: ApiClient,
}

impl Service {
    pub(crate) async fn start(config: Config) -> Self {
        let running = Server::start(config).await.expect("the server starts");
        let client = ApiClient::new(format!("http://{}", running.addr()));
        Self { running, client }
    }

    /// Waits until items are served from the cache.
    pub(crate) async fn cached(self) -> Self {
        until("the cache is in use", || async {
            let stats = self.client.get("/cache/stats").await;
            (stats.status == 200 && stats.json()["mode"] == "cached").then_some(())
        })
        .await;
        self
    }
}

impl std::ops::Deref for Service {
    type Target = ApiClient;

    fn deref(&self) -> &ApiClient {
        &self.client
    }
}

/// A client of one server.
#[derive(Clone)]
pub(crate) struct ApiClient {
    base: String,
    http: Client,
    /// All requests, with their answers.
    seen: Arc<Mutex<Vec<(Method, String, Answer)>>>,
}

impl ApiClient {
    pub(crate) fn new(base: String) -> Self {
        let http = Client::builder()
            .timeout(Duration::from_secs(30))
            .build()
            .expect("a client without TLS can be built");
        Self {
            base,
            http,
            seen: Arc::default(),
        }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    pub(crate) fn address(&self) -> &str {
        self.base.trim_start_matches("http://")
    }

    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&str>,
    ) -> Answer {
        self.try_send(method, path, headers, body)
            .await
            .expect("the server answers")
    }

    pub(crate) async fn try_send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&str>,
    ) -> reqwest::Result<Answer> {
        let mut request = self.http.request(method.clone(), self.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            if !headers
                .iter()
                .any(|(name, _)| name.eq_ignore_ascii_case("content-type"))
            {
                request = request.header("content-type", "application/json");
            }
            request = request.body(body.to_owned());
        }
        let response = request.send().await?;
        let (status, headers) = (response.status(), response.headers().clone());
        let answer = Answer {
            status,
            headers,
            body: response.bytes().await?.to_vec(),
        };
        let seen = (method, path.to_owned(), answer.clone());
        self.seen.lock().expect("no test panics here").push(seen);
        Ok(answer)
    }

    /// Sends a request and returns the answer itself, not where it leads to.
    pub(crate) async fn unfollowed(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Answer {
        let client = Self {
            http: Client::builder()
                .timeout(Duration::from_secs(30))
                .redirect(reqwest::redirect::Policy::none())
                .build()
                .expect("a client without TLS can be built"),
            ..self.clone()
        };
        client.send(method, path, headers, None).await
    }

    pub(crate) async fn until_ready(&self) {
        until("the service is ready", || async {
            (self.get("/readyz").await.status == 200).then_some(())
        })
        .await;
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, &[], None).await
    }

    /// Reads through the cache. On a machine that is too busy to keep the read lease a read bypasses the
    /// cache; that is right, but not what is looked at here, so it is tried again.
    pub(crate) async fn get_through_cache(&self, path: &str) -> Answer {
        self.send_through_cache(path, &[]).await
    }

    pub(crate) async fn send_through_cache(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        until("a read does not bypass the cache", async || {
            let answer = self.send(Method::GET, path, headers, None).await;
            (!answer.header("cache-status").contains("fwd=bypass")).then_some(answer)
        })
        .await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Answer {
        self.send(Method::POST, path, &[], Some(body)).await
    }

    pub(crate) async fn put(&self, path: &str, body: &str) -> Answer {
        self.send(Method::PUT, path, &[], Some(body)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send(Method::DELETE, path, &[], None).await
    }

    /// Creates an item and returns its path.
    pub(crate) async fn create(&self, name: &str) -> String {
        let answer = self
            .post("/items", &format!(r#"{{"name":"{name}","price":1.5}}"#))
            .await;
        assert_eq!(answer.status, 201, "{}", answer.text());
        answer.header("location").to_owned()
    }
}

/// A whole answer.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// The header's value, or nothing.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().expect("headers are ASCII"))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("not JSON ({error}): {}", self.text()))
    }

    /// Checks that this is a whole problem of this kind and returns the fields that it names.
    pub(crate) fn problem(&self, status: u16, slug: &str) -> Vec<String> {
        assert_eq!(self.status, status, "{}", self.text());
        assert_eq!(self.header("content-type"), "application/problem+json");
        let body = self.json();
        assert_eq!(body["type"], format!("/problems/{slug}"), "{body}");
        assert_eq!(body["status"], status);
        for member in ["title", "detail"] {
            assert!(
                body[member].as_str().is_some_and(|text| !text.is_empty()),
                "{body}"
            );
        }
        assert_eq!(body["trace_id"], self.header("x-trace-id"));
        let text = self.text().to_lowercase();
        for leak in [
            "select ",
            "insert into",
            "sqlstate",
            "panicked",
            "tokio",
            "backtrace",
            "libpq",
        ] {
            assert!(!text.contains(leak), "{text}");
        }
        let errors = body["errors"].as_array().cloned().unwrap_or_default();
        let field = |error: &Value| {
            assert!(
                error["message"]
                    .as_str()
                    .is_some_and(|text| !text.is_empty()),
                "{error}"
            );
            error["field"]
                .as_str()
                .expect("each error names a field")
                .to_owned()
        };
        errors.iter().map(field).collect()
    }

    /// The parts of `Server-Timing`.
    pub(crate) fn timed(&self) -> Vec<String> {
        let parts = self.header("server-timing").split(", ");
        parts
            .filter(|part| !part.is_empty())
            .map(|part| {
                let (name, duration) = part.split_once(";dur=").expect("name;dur=ms");
                assert!(duration.parse::<f64>().is_ok_and(|ms| ms >= 0.0), "{part}");
                name.to_owned()
            })
            .collect()
    }
}

/// Polls a fact, for 20 seconds at most.
pub(crate) async fn until<T, F: Future<Output = Option<T>>>(
    fact: &str,
    mut look: impl FnMut() -> F,
) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "it never came true that {fact}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
