//! Bytes that are no requests, or only almost (RFC 9112 and beyond): each is answered with a problem that
//! has a body, none with an error of the service, and each is counted.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use support::{Service, config};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use writethrough_service::config::{CacheBackend, Config, Database};
use writethrough_testbed::Testbed;

const PATIENCE: Duration = Duration::from_secs(20);
/// What most requests here end with.
const REST: &str = " HTTP/1.1\r\nhost: h\r\n\r\n";

/// What is sent, and the status that it is answered with.
struct Case {
    status: u16,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Cases(Vec<Case>);

impl Cases {
    fn add(&mut self, status: u16, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref().to_owned();
        self.0.push(Case { status, bytes });
    }

    /// Requests for `/livez` with this after the request line.
    fn heads(&mut self, status: u16, heads: &[&str]) {
        for head in heads {
            self.add(status, format!("GET /livez HTTP/1.1\r\n{head}\r\n\r\n"));
        }
    }

    /// New items with these headers and what comes after them.
    fn posts(&mut self, status: u16, posts: &[(&str, &[u8])]) {
        for (headers, body) in posts {
            let head = format!(
                "POST /items HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n{headers}\r\n\r\n"
            );
            self.add(status, [head.as_bytes(), body].concat());
        }
    }
}

fn control_bytes() -> impl Iterator<Item = u8> {
    (0..0x20).chain([0x7f])
}

fn cases() -> Cases {
    let mut cases = Cases::default();
    lines_and_names(&mut cases);
    hosts_and_fields(&mut cases);
    bodies(&mut cases);
    other_protocols(&mut cases);
    cases
}

/// Request lines, targets and names of headers.
fn lines_and_names(cases: &mut Cases) {
    for byte in control_bytes() {
        let with = |before: &str, after: &str| {
            let mut bytes = before.as_bytes().to_vec();
            bytes.push(byte);
            bytes.extend_from_slice(after.as_bytes());
            bytes
        };
        cases.add(400, with("GE", &format!("T /livez{REST}")));
        cases.add(400, with("GET /li", &format!("vez{REST}")));
        let head = "GET /livez HTTP/1.1\r\nhost: h\r\n";
        cases.add(400, with(&format!("{head}x"), "y: 1\r\n\r\n"));
        let allowed = if byte == b'\t' { 200 } else { 400 };
        cases.add(allowed, with(&format!("{head}x: a"), "b\r\n\r\n"));
    }
    for separator in "\"(),/;<=>?@[\\]{} ".chars() {
        cases.heads(400, &[&format!("host: h\r\nx{separator}y: 1")]);
    }
    for line in [
        "GET",
        "GET /livez",
        "GET  /livez HTTP/1.1",
        " GET /livez HTTP/1.1",
        "GET /livez  HTTP/1.1",
        "GET /livez HTTP/1.1 ",
        "GET /livez HTTP/1.1 x",
        "GET /livez http/1.1",
        "GET /livez HTTP/1.2",
        "GET /livez HTTP/2.0",
        "GET /livez HTTP/0.9",
        "GET /livez HTTP/1",
        "GET /livez HTTP/11",
        "GET /livez HTTP/1.1x",
        "GET /livez HTTP/-1.1",
        "GET /livez HTTP/1,1",
        "GET /livez FTP/1.1",
        "GET /li vez HTTP/1.1",
        "GET /livez\tHTTP/1.1",
        "GET livez HTTP/1.1",
        "GET ?x HTTP/1.1",
        "GET #f HTTP/1.1",
        "GET http:// HTTP/1.1",
        "GET http://h:99999/livez HTTP/1.1",
        "GET http://u:p@h/livez HTTP/1.1",
        "POST h:80 HTTP/1.1",
        "GET http://h/li vez HTTP/1.1",
        "GET : HTTP/1.1",
        "GET /%zz\u{0} HTTP/1.1",
        "G(T /livez HTTP/1.1",
        "\u{e9} /livez HTTP/1.1",
        "GET /items/%zz HTTP/1.1",
        "GET /items/%00 HTTP/1.1",
        "GET /items/%ff HTTP/1.1",
        "GET /items/.. HTTP/1.1",
        "GET /items?limit=%ff HTTP/1.1",
        "GET /items?limit=%zz HTTP/1.1",
        "GET /items?=&= HTTP/1.1",
        "GET /items?cursor=%00 HTTP/1.1",
    ] {
        cases.add(400, format!("{line}\r\nhost: h\r\n\r\n"));
    }
    for line in [
        "GET *",
        "GET //",
        "GET /../../etc/passwd",
        "GET /%2e%2e/",
        "GET /LIVEZ",
        "GET /items/a/b",
        "GET /;x",
        "GET /\\",
        "CONNECT h:80",
    ] {
        cases.add(404, format!("{line}{REST}"));
    }
    for line in [
        "get /livez",
        "TRACE /livez",
        "PATCH /items",
        "X-Y_Z! /livez",
    ] {
        cases.add(405, format!("{line}{REST}"));
    }
    cases.add(405, format!("{} /livez{REST}", "A".repeat(10_000)));
    for line in [
        "GET http://h/livez",
        "GET http://other:1/livez",
        "GET /livez#f",
    ] {
        cases.add(200, format!("{line}{REST}"));
    }
    cases.add(414, format!("GET /{}{REST}", "a".repeat(70_000)));
}

/// `Host`, and fields that are wrong as such.
fn hosts_and_fields(cases: &mut Cases) {
    cases.heads(
        400,
        &[
            "x: y",
            "host: h\r\nhost: h",
            "host: h\r\nHOST: other",
            "host: a b",
            "host: a, b",
            "host: u@h",
            "host: h/",
            "host: http://h",
            "host: h:x",
            "host: h:99999",
            "host: [::1",
            "host: :80",
            "host: \u{e9}",
            "host : h",
            " host: h",
            "host: h\r\n folded",
            "host: h\r\nx: y\r\n\tfolded",
            "host: h\r\nno colon",
            "host: h\r\n: no name",
            "host: h\r\n\u{e9}: 1",
            "host: h\r\nx: y\rz: 1",
            "host: h\r\nx: y\r\r\nz: 1",
            "host: h\r\ntransfer-encoding: gzip",
            "host: h\r\ntransfer-encoding: identity",
            "host: h\r\ntransfer-encoding:",
            "host: h\r\ntransfer-encoding: chunked, gzip",
            "host: h\r\ntransfer-encoding: xchunked",
            "host: h\r\ncontent-length: -1",
            "host: h\r\ncontent-length: +1",
            "host: h\r\ncontent-length: 1x",
            "host: h\r\ncontent-length: 0x1",
            "host: h\r\ncontent-length: 1 1",
            "host: h\r\ncontent-length: 1,1",
            "host: h\r\ncontent-length: 1, 2",
            "host: h\r\ncontent-length: 1.0",
            "host: h\r\ncontent-length: 1e1",
            "host: h\r\ncontent-length: \u{0663}",
            "host: h\r\ncontent-length:",
            "host: h\r\ncontent-length: 1\r\ncontent-length: 2",
            "host: h\r\ncontent-length: 18446744073709551616",
            "host: h\r\ncontent-length: 99999999999999999999999",
        ],
    );
    cases.heads(
        200,
        &[
            "host:",
            "host: h:",
            "host: [::1]:8000",
            "host: h\r\nx:",
            "host: h\r\nx: \u{e9}",
            "host: h\r\nx: \t y \t",
            "host: h\r\nx:y: 1",
            "host: h\r\nx: 1\r\nx: 2",
            "host: h\r\nconnection: close, x, ,",
            "host: h\r\nconnection: upgrade\r\nupgrade: h2c\r\nhttp2-settings: x",
            "host: h\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13",
            "host: h\r\nexpect: 100-continue",
            "host: h\r\nexpect: a-miracle",
            "host: h\r\nrange: bytes=5-1",
            "host: h\r\naccept: \u{0661}",
            "host: h\r\ntraceparent: 00-0-0-0",
            "host: h\r\ncookie: a=\"",
        ],
    );
    // Line ends without CR are tolerated (RFC 9112, 2.2), and so is an empty line before a request.
    cases.add(200, "GET /livez HTTP/1.1\nhost: h\n\n");
    cases.add(200, format!("\r\nGET /livez{REST}"));
    cases.add(200, "GET /livez HTTP/1.0\r\n\r\n");
    cases.add(400, "GET /livez HTTP/1.0\r\nhost: h\r\nhost: h\r\n\r\n");
    cases.add(
        400,
        "POST /items HTTP/1.0\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    );
    let many: String = (0..101).map(|n| format!("x{n}: 1\r\n")).collect();
    cases.heads(431, &[&format!("host: h\r\n{many}y: 1")]);
    cases.heads(431, &[&format!("host: h\r\nx: {}", "a".repeat(500_000))]);
    cases.heads(431, &[&format!("host: h\r\n{}: x", "a".repeat(500_000))]);
    for tag in ["3", "\"3", "\"3\" \"4\"", "w/\"3\"", "*, \"3\"", "\u{e9}"] {
        for name in ["if-match", "if-none-match"] {
            let head = format!("GET /items HTTP/1.1\r\nhost: h\r\n{name}: {tag}\r\n\r\n");
            cases.add(400, head);
        }
    }
}

/// Bodies, their lengths and their codings.
fn bodies(cases: &mut Cases) {
    const ITEM: &[u8] = br#"{"name": "a", "price": 1}"#;
    const CHUNKED: &str = "transfer-encoding: chunked";
    let chunked = |before: &[u8]| [before, b"19\r\n", ITEM, b"\r\n0\r\n\r\n"].concat();
    let whole = chunked(b"");
    cases.posts(
        201,
        &[
            ("content-length: 25", ITEM),
            ("content-length: 25\r\ncontent-length: 25", ITEM),
            ("content-length: 000025", ITEM),
            ("content-encoding: identity\r\ncontent-length: 25", ITEM),
            (CHUNKED, &whole),
            ("transfer-encoding: Chunked", &whole),
            // The length counts for nothing then, and the connection ends (RFC 9112, 6.3).
            ("transfer-encoding: chunked\r\ncontent-length: 1", &whole),
            ("content-length: 1\r\ntransfer-encoding: chunked", &whole),
            (
                CHUNKED,
                &[b"19;x=y\r\n", ITEM, b"\r\n0\r\nx: y\r\n\r\n"].concat(),
            ),
        ],
    );
    cases.posts(
        400,
        &[
            ("transfer-encoding: gzip, chunked", &whole),
            ("transfer-encoding: chunked, chunked", &whole),
            (
                "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
                &whole,
            ),
            (
                "transfer-encoding: gzip\r\ntransfer-encoding: chunked",
                &whole,
            ),
            ("transfer-encoding: chunked;q=1", &whole),
            ("transfer-encoding: \"chunked\"", &whole),
            ("transfer-encoding: \u{b}chunked", &whole),
            ("transfer-encoding : chunked", &whole),
            ("x: y\r\n transfer-encoding: chunked", &whole),
            ("", b""),
            ("content-length: 0", b""),
            ("content-length: 3", b"   "),
            ("content-length: 3", b"\xff\xfe\xfd"),
            ("content-length: 3", b"\0\0\0"),
            ("content-length: 5", b"\xef\xbb\xbf{}"),
            ("content-length: 4", b"{]}\""),
            (CHUNKED, b"x\r\n{}\r\n0\r\n\r\n"),
            (CHUNKED, b"-1\r\n{}\r\n0\r\n\r\n"),
            (CHUNKED, b"+2\r\n{}\r\n0\r\n\r\n"),
            (CHUNKED, b"0x2\r\n{}\r\n0\r\n\r\n"),
            (CHUNKED, b" 2\r\n{}\r\n0\r\n\r\n"),
            (CHUNKED, b"\r\n{}\r\n0\r\n\r\n"),
            (CHUNKED, b"2\n{}\r\n0\r\n\r\n"),
            (CHUNKED, b"1\r\n{}\r\n0\r\n\r\n"),
            (CHUNKED, b"2\r\n{}0\r\n\r\n"),
            (CHUNKED, b"10000000000000000\r\n{}\r\n0\r\n\r\n"),
            (CHUNKED, b"2;\n\r\n{}\r\n0\r\n\r\n"),
            (
                CHUNKED,
                &[b"2;", &[b'x'; 20_000][..], b"\r\n{}\r\n0\r\n\r\n"].concat(),
            ),
            (CHUNKED, b"0\r\n\r\n"),
        ],
    );
    let long = vec![b'x'; 70_000];
    cases.posts(
        413,
        &[
            ("content-length: 65537", &long[..65_537]),
            ("content-length: 9223372036854775807", b""),
            (
                CHUNKED,
                &[b"11170\r\n", &long[..], b"\r\n0\r\n\r\n"].concat(),
            ),
        ],
    );
    cases.posts(
        415,
        &[
            ("content-encoding: gzip\r\ncontent-length: 25", ITEM),
            ("content-encoding: identity, br\r\ncontent-length: 25", ITEM),
            ("content-encoding: \u{e9}\r\ncontent-length: 25", ITEM),
        ],
    );
    cases.posts(
        422,
        &[("content-length: 2", b"{}"), ("content-length: 2", b"[]")],
    );
    for media_type in [
        "text/plain",
        "application/json\u{e9}",
        "json",
        "multipart/form-data",
    ] {
        let head = format!("POST /items HTTP/1.1\r\nhost: h\r\ncontent-type: {media_type}\r\n");
        cases.add(415, format!("{head}content-length: 2\r\n\r\n{{}}"));
    }
}

/// What is meant for a server of another kind.
fn other_protocols(cases: &mut Cases) {
    for bytes in [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"[..],
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"PING\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"EHLO h\r\n",
        b"\0\0\0\x08\x04\xd2\x16\x2f",
        b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\nGET /livez HTTP/1.1\r\nhost: h\r\n\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01\x1f\x90\x1f\x90",
        b"OPTIONS rtsp://h/x RTSP/1.0\r\nCSeq: 1\r\n\r\n",
        b"INVITE sip:a@h SIP/2.0\r\n\r\n",
        b"<?xml version=\"1.0\"?><a/>\r\n\r\n",
        b"{\"jsonrpc\": \"2.0\"}\r\n\r\n",
        b"\xff\xfe\xfd\xfc\r\n\r\n",
        b"\xf0\x9f\x98\x80 / HTTP/1.1\r\n\r\n",
    ] {
        cases.add(400, bytes);
    }
}

/// An answer: its status, its head in lower case, and its body.
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

/// Reads one answer; `None` when the connection ends before one begins.
async fn answer(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> Result<Option<Answer>, String> {
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        match stream.read_buf(bytes).await {
            Ok(0) if bytes.is_empty() => return Ok(None),
            Ok(0) => return Err(format!("{:?}", String::from_utf8_lossy(bytes))),
            Ok(_) => {}
            Err(error) => return Err(error.to_string()),
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    let status = head[9..12].parse().map_err(|_| head.clone())?;
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let length: usize = length.map_or(0, |length| length.parse().unwrap());
    while bytes.len() < end + length {
        match stream.read_buf(bytes).await {
            Ok(1..) => {}
            other => return Err(format!("the body broke off: {other:?}")),
        }
    }
    let rest = bytes.split_off(end + length);
    let body = std::mem::replace(bytes, rest).split_off(end);
    Ok(Some(Answer { status, head, body }))
}

async fn exchange(address: &str, request: &[u8]) -> Result<Option<Answer>, String> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The server may answer before it has read everything.
    let _ = stream.write_all(request).await;
    let mut bytes = Vec::new();
    timeout(PATIENCE, answer(&mut stream, &mut bytes))
        .await
        .unwrap_or_else(|_| Err("no answer".to_owned()))
}

/// What is wrong with an answer.
fn wrong(expected: u16, answer: &Answer) -> Option<String> {
    let Answer { status, head, body } = answer;
    if *status != expected {
        return Some(format!(
            "{status} instead of {expected}: {}",
            String::from_utf8_lossy(body)
        ));
    }
    if *status < 400 {
        return None;
    }
    let Ok(problem) = serde_json::from_slice::<serde_json::Value>(body) else {
        return Some(format!("{status} without a problem: {head}"));
    };
    let trace_id = problem["trace_id"].as_str().unwrap_or_default();
    let whole = problem["status"] == expected
        && problem["type"]
            .as_str()
            .is_some_and(|uri| uri.starts_with("/problems/"))
        && trace_id.len() == 32
        && head.contains(&format!("x-trace-id: {trace_id}\r\n"))
        && head.contains("content-type: application/problem+json\r\n")
        && head.contains("cache-control: no-store\r\n")
        && head.contains("date: ");
    (!whole).then(|| format!("{status} is no whole problem: {head}{problem}"))
}

async fn refuses_all(config: Config) {
    let service = Service::start(config).await.cached().await;
    let cases = cases().0;
    assert!(cases.len() >= 251, "{}", cases.len());
    let address = service.address();
    let look = async |case: &Case| {
        let said = match exchange(address, &case.bytes).await {
            Ok(Some(answer)) => wrong(case.status, &answer)?,
            Ok(None) => "nothing".to_owned(),
            Err(error) => error,
        };
        let sent = &case.bytes[..case.bytes.len().min(300)];
        Some(format!("{}\n  -> {said}", sent.escape_ascii()))
    };
    let wrong: Vec<String> = futures::stream::iter(&cases)
        .map(look)
        .buffer_unordered(16)
        .filter_map(async |wrong| wrong)
        .collect()
        .await;
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );

    // It lives, and each one was counted, by its status.
    let mut refused: BTreeMap<u16, f64> = BTreeMap::new();
    for case in cases.iter().filter(|case| case.status >= 400) {
        *refused.entry(case.status).or_default() += 1.0;
    }
    let metrics = service.get("/metrics").await.text();
    let mut counted: BTreeMap<u16, f64> = BTreeMap::new();
    for line in metrics.lines() {
        let labels = line.strip_prefix("http_server_request_duration_seconds_count{");
        let Some((labels, count)) = labels.and_then(|labels| labels.split_once("} ")) else {
            continue;
        };
        let status = labels.split("status=\"").nth(1).unwrap();
        let status: u16 = status.split('"').next().unwrap().parse().unwrap();
        // 503 is what the service says while it starts.
        if (400..500).contains(&status) {
            *counted.entry(status).or_default() += count.parse::<f64>().unwrap();
        }
    }
    assert_eq!(counted, refused);
    let path = service.create("Alive").await;
    assert_eq!(service.get(&path).await.status, 200);
    service.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_embedded_pair() {
    refuses_all(config(Database::Temporary, CacheBackend::InProcess)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_postgres_and_redis() {
    let testbed = Testbed::new().await.unwrap();
    let (postgres, redis) = tokio::try_join!(testbed.postgres(), testbed.redis()).unwrap();
    let (database, cache) = (postgres.url(), redis.url());
    refuses_all(config(
        Database::Postgres(database),
        CacheBackend::Redis(cache),
    ))
    .await;
}

/// hyper's own answer could be written behind a part of the one before, and would then keep its form: the
/// answer before is out first.
#[tokio::test(flavor = "multi_thread")]
async fn what_follows_a_good_request_on_its_connection_is_refused_with_a_body_too() {
    let service = Service::start(config(Database::Temporary, CacheBackend::InProcess))
        .await
        .cached()
        .await;
    for good in ["GET /docs", "HEAD /livez", "GET /items"] {
        for bad in [
            "GE(T / HTTP/1.1\r\n\r\n",
            "GET / HTTP/9.9\r\n\r\n",
            "\0\r\n\r\n",
        ] {
            let mut stream = TcpStream::connect(service.address()).await.unwrap();
            let request = format!("{good}{REST}{bad}");
            stream.write_all(request.as_bytes()).await.unwrap();
            let (mut bytes, mut answers) = (Vec::new(), Vec::new());
            let all = async {
                // A HEAD has no body, whatever its length says.
                if good.starts_with("HEAD") {
                    let mut head = [0; 1];
                    while !bytes.ends_with(b"\r\n\r\n") {
                        stream.read_exact(&mut head).await.unwrap();
                        bytes.push(head[0]);
                    }
                    bytes.clear();
                }
                while let Some(answer) = answer(&mut stream, &mut bytes).await.unwrap() {
                    answers.push(answer);
                }
            };
            timeout(PATIENCE, all).await.unwrap();
            let last = answers.pop().unwrap();
            assert_eq!(wrong(400, &last), None, "{request}");
        }
    }
    service.running.shutdown().await;
}

/// What is not whole is waited for, and nothing is said when the client gives up.
#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_off_is_left_alone() {
    let service = Service::start(config(Database::Temporary, CacheBackend::InProcess))
        .await
        .cached()
        .await;
    for begun in [
        "",
        "\r\n",
        "G",
        "GET /livez",
        "GET /livez HTTP/1.1\r\n",
        "GET /livez HTTP/1.1\r\nhost: h",
        "GET /livez HTTP/1.1\r\nhost: h\r\n",
        "GET /livez HTTP/1.1\r\nhost: h\r\n\r",
    ] {
        let mut stream = TcpStream::connect(service.address()).await.unwrap();
        stream.write_all(begun.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut said = String::new();
        let end = timeout(PATIENCE, stream.read_to_string(&mut said)).await;
        assert_eq!((end.unwrap().unwrap(), said.as_str()), (0, ""), "{begun:?}");
    }
    assert_eq!(service.get("/livez").await.status, 200);
    service.running.shutdown().await;
}
