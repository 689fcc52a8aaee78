//! What becomes of a connection whose request was answered before it was read to its end, at the level
//! of bytes: no client library in between.
//!
//! A server that closes a socket with unread bytes in it resets the connection, and the reset throws
//! away the answer in the client's socket. Whether it does depends on who is faster, so each case runs
//! many times.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use support::{Service, config};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use writethrough_service::config::{CacheBackend, Database};

const ROUNDS: usize = 30;

async fn service() -> Service {
    Service::start(config(Database::Temporary, CacheBackend::InProcess))
        .await
        .cached()
        .await
}

async fn connect(service: &Service) -> TcpStream {
    let stream = TcpStream::connect(service.address()).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

fn head(request_line: &str, headers: &str) -> String {
    format!("{request_line} HTTP/1.1\r\nhost: test\r\n{headers}\r\n")
}

fn with_body(request_line: &str, media_type: &str, body: &str) -> String {
    let length = body.len();
    let headers = format!("content-type: {media_type}\r\ncontent-length: {length}\r\n");
    head(request_line, &headers) + body
}

/// Reads one answer with a length: its head in lower case, and its body.
async fn answer(stream: &mut TcpStream) -> std::io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            let message = format!("no head: {}", String::from_utf8_lossy(&bytes));
            return Err(std::io::Error::other(message));
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let length: usize = length.map_or(0, |length| length.parse().unwrap());
    let mut body = bytes.split_off(end);
    while body.len() < length {
        if stream.read_buf(&mut body).await? == 0 {
            return Err(std::io::Error::other("the body broke off"));
        }
    }
    Ok((head, body))
}

/// Sends the whole request before it looks at the answer, as most clients do.
async fn exchange(stream: &mut TcpStream, request: &[u8]) -> std::io::Result<(String, Vec<u8>)> {
    stream.write_all(request).await?;
    timeout(Duration::from_secs(10), answer(stream)).await?
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_arrives_whole_though_the_request_was_not_read() {
    let service = service().await;
    let large = "a".repeat(2 << 20);
    let chunk = format!("{:x}\r\n{large}\r\n", large.len());
    let chunked = "content-type: application/json\r\ntransfer-encoding: chunked\r\n";
    let cases = [
        (with_body("POST /items", "application/json", &large), "413"),
        (with_body("POST /items", "text/plain", &large), "415"),
        (
            with_body("POST /nothing", "application/json", &large),
            "404",
        ),
        (
            with_body("PUT /items/no", "application/json", &large),
            "400",
        ),
        (with_body("PATCH /items", "application/json", &large), "405"),
        (
            with_body("POST /cache/clear", "application/json", &large),
            "200",
        ),
        (with_body("GET /health", "application/json", &large), "200"),
        (head("POST /items", chunked) + &chunk + "0\r\n\r\n", "413"),
        (head("GET /items", &format!("x: {large}\r\n")), "431"),
    ];
    for (request, status) in &cases {
        for round in 0..ROUNDS {
            let mut stream = connect(&service).await;
            let shown = &request[..20];
            let (head, body) = exchange(&mut stream, request.as_bytes())
                .await
                .unwrap_or_else(|error| panic!("{shown}, round {round}: {error}"));
            assert!(head.starts_with(&format!("http/1.1 {status}")), "{head}");
            assert!(head.contains("connection: close"), "{shown}: {head}");
            serde_json::from_slice::<serde_json::Value>(&body).unwrap();
            // And then the connection ends in order.
            let ended = timeout(Duration::from_secs(10), stream.read(&mut [0; 1])).await;
            assert_eq!(ended.unwrap().unwrap(), 0, "{shown}");
        }
    }
    service.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_lives_on_after_a_small_body_that_nobody_needed() {
    let service = service().await;
    let small = r#"{"name": "a", "price": 1}"#;
    let large = "a".repeat(60_000);
    let chunked = "content-type: text/plain\r\ntransfer-encoding: chunked\r\n";
    let cases = [
        (
            with_body("POST /cache/clear", "application/json", "{}"),
            "200",
        ),
        (with_body("POST /items", "text/plain", small), "415"),
        (with_body("POST /items", "text/plain", &large), "415"),
        (with_body("POST /nothing", "application/json", small), "404"),
        (with_body("PUT /items/no", "application/json", small), "400"),
        (with_body("DELETE /items", "application/json", small), "405"),
        (with_body("GET /items", "application/json", "{}"), "200"),
        (with_body("GET /livez", "application/json", "{}"), "200"),
        (head("POST /items", chunked) + "2\r\n{}\r\n0\r\n\r\n", "415"),
    ];
    let mut stream = connect(&service).await;
    for round in 0..ROUNDS {
        for (request, status) in &cases {
            let shown = &request[..20];
            // In two pieces: the second arrives after the answer could have been sent.
            let (first, second) = request.as_bytes().split_at(request.len() - 1);
            stream.write_all(first).await.unwrap();
            tokio::task::yield_now().await;
            let (head, _) = exchange(&mut stream, second)
                .await
                .unwrap_or_else(|error| panic!("{shown}, round {round}: {error}"));
            assert!(head.starts_with(&format!("http/1.1 {status}")), "{head}");
            assert!(!head.contains("connection: close"), "{shown}: {head}");
        }
    }
    service.running.shutdown().await;
}

/// The rest of a body is not waited for without end: not before the answer, and not after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_in_the_middle_of_its_body_is_answered_and_let_go() {
    let service = service().await;
    let case = async |length: &str, media_type: &str, status: &str| {
        let headers = format!("content-type: {media_type}\r\ncontent-length: {length}\r\n");
        let mut stream = connect(&service).await;
        let request = head("POST /items", &headers) + "{";
        let begun = Instant::now();
        let (head, _) = exchange(&mut stream, request.as_bytes()).await.unwrap();
        assert!(head.starts_with(&format!("http/1.1 {status}")), "{head}");
        assert!(head.contains("connection: close"), "{head}");
        assert!(
            begun.elapsed() < Duration::from_secs(3),
            "{:?}",
            begun.elapsed()
        );
        // The server's side has ended; what still comes is thrown away for a while, then refused.
        assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
        let refused = async {
            while stream.write_all(b"a").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(Duration::from_secs(20), refused)
            .await
            .expect("the connection is let go");
    };
    tokio::join!(
        case("10", "text/plain", "415"),
        case("9999999", "application/json", "413"),
    );
    service.running.shutdown().await;
}

/// A client that waits for `100 Continue` gets the refusal instead, and does not send its body.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_refused_is_not_asked_for() {
    let service = service().await;
    let headers = "content-type: text/plain\r\ncontent-length: 10\r\nexpect: 100-continue\r\n";
    let mut stream = connect(&service).await;
    let request = head("POST /items", headers);
    let (head, _) = exchange(&mut stream, request.as_bytes()).await.unwrap();
    assert!(head.starts_with("http/1.1 415"), "{head}");
    assert!(head.contains("connection: close"), "{head}");
    service.running.shutdown().await;
}

/// Clients with a pool may leave an idle connection open although its other side has ended.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_client_does_not_hold_up_the_stop() {
    let service = service().await;
    let mut stream = connect(&service).await;
    let request = head("GET /livez", "");
    exchange(&mut stream, request.as_bytes()).await.unwrap();
    let begun = Instant::now();
    service.running.shutdown().await;
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
}
