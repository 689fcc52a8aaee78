//! Who may do what over HTTP, as docs/SECURITY.md promises: the token, the listener for operators, this
//! machine, the names in `Host`, and pages of other sites.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use reqwest::Method;
use support::{Answer, ApiClient, SAMPLE, Service, config};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use writethrough_service::config::{CacheBackend, Config, Database};
use writethrough_service::middleware::access::{AdminAccess, AdminToken, AllowedHosts};

const PATIENCE: Duration = Duration::from_secs(20);
const TOKEN: &str = "0123456789abcdef-token";
/// What a program sends that is not curl: nothing but the request.
const CLEAR: &str = "POST /cache/clear HTTP/1.1\r\ncontent-length: 0\r\n";
const FOR_OPERATORS: [(Method, &str); 3] = [
    (Method::GET, "/metrics"),
    (Method::GET, "/cache/stats"),
    (Method::POST, "/cache/clear"),
];

async fn start(change: impl FnOnce(&mut Config)) -> Service {
    let mut config = config(Database::Temporary, CacheBackend::InProcess);
    change(&mut config);
    Service::start(config).await
}

fn token() -> AdminAccess {
    AdminAccess::Token(AdminToken::new(TOKEN).unwrap())
}

/// Sends a head, without what clients add, and returns the status.
async fn raw(address: impl Into<SocketAddr>, head: &str, headers: &[(&str, &str)]) -> u16 {
    let mut stream = TcpStream::connect(address.into()).await.unwrap();
    let mut request = head.to_owned();
    for (name, value) in headers {
        request += &format!("{name}: {value}\r\n");
    }
    request += "connection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let read = timeout(PATIENCE, stream.read_to_string(&mut answer)).await;
    read.expect("the server answers in time").unwrap();
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

/// How many requests the metrics count as refused for this reason.
async fn refused(client: &ApiClient, headers: &[(&str, &str)], reason: &str) -> u64 {
    let metrics = client.send(Method::GET, "/metrics", headers, None).await;
    let line = format!("http_server_refused_requests_total{{reason=\"{reason}\"}} ");
    let text = metrics.text();
    let count = text.lines().find_map(|text| text.strip_prefix(&line));
    count.unwrap_or_else(|| panic!("{line}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_token_the_routes_for_operators_ask_for_it_and_the_others_do_not() {
    let service = start(|config| config.admin = token()).await;
    let right = format!("Bearer {TOKEN}");
    let (shorter, longer, basic) = (&right[..right.len() - 1], format!("{right}x"), "Basic abc");
    let mut refusals = 0;
    for (method, path) in FOR_OPERATORS {
        let send = async |authorization: Option<&str>| {
            let headers = authorization.map(|value| ("authorization", value));
            let headers = headers.as_slice();
            service.send(method.clone(), path, headers, None).await
        };
        for wrong in [
            None,
            Some(basic),
            Some("Bearer"),
            Some(TOKEN),
            Some(shorter),
            Some(&longer),
        ] {
            let answer = send(wrong).await;
            assert_eq!(answer.problem(401, "unauthorized"), ["Authorization"]);
            let challenge = answer.header("www-authenticate");
            assert!(challenge.starts_with("Bearer realm="), "{challenge}");
            let has_a_token = wrong.is_some_and(|value| value.starts_with("Bearer "));
            assert_eq!(challenge.contains("error="), has_a_token, "{wrong:?}");
            assert!(!answer.text().contains(TOKEN));
            refusals += 1;
        }
        for right in [&right, &right.replace("Bearer ", "bearer  ")] {
            let answer = send(Some(right)).await;
            assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        }
    }
    for path in ["/items", "/health", "/livez", "/readyz", "/docs"] {
        assert_eq!(service.get(path).await.status, 200, "{path}");
    }
    let headers = [("authorization", right.as_str())];
    assert_eq!(refused(&service, &headers, "token").await, refusals);
    service.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_token_only_this_machine_empties_the_cache() {
    let service = start(|config| config.listen = ([0, 0, 0, 0], 0).into()).await;
    let port = service.running.addr().port();
    let here = SocketAddr::from(([127, 0, 0, 1], port));
    let own = ("host", "localhost");
    assert_eq!(raw(here, CLEAR, &[own]).await, 200);
    // Behind a proxy on this machine everybody's peer is this machine.
    for header in ["forwarded", "x-forwarded-for", "x-real-ip", "via"] {
        assert_eq!(raw(here, CLEAR, &[own, (header, "10.0.0.1")]).await, 403);
    }
    assert_eq!(raw(here, CLEAR, &[("host", "evil.example")]).await, 403);
    // An own address that is not the loopback is what another machine's would be.
    let interfaces = if_addrs::get_if_addrs().unwrap();
    let outward = interfaces.iter().map(|interface| interface.ip());
    let outward = outward.filter(|ip| ip.is_ipv4() && !ip.is_loopback());
    let mut elsewhere = 0;
    for ip in outward {
        let there = SocketAddr::from((ip, port));
        assert_eq!(raw(there, CLEAR, &[own]).await, 403, "{there}");
        let look = "GET /cache/stats HTTP/1.1\r\n";
        assert_eq!(raw(there, look, &[own]).await, 200, "{there}");
        elsewhere += 1;
    }
    let client = ApiClient::new(format!("http://{here}"));
    assert_eq!(refused(&client, &[], "not-local").await, 5 + elsewhere);
    let answer = client
        .send(
            Method::POST,
            "/cache/clear",
            &[("x-forwarded-for", "::1")],
            None,
        )
        .await;
    answer.problem(403, "forbidden");
    assert!(answer.text().contains("--admin-token"), "the remedy");
    service.running.shutdown().await;

    let open = start(|config| config.admin = AdminAccess::Anyone).await;
    let proxied = [own, ("x-forwarded-for", "10.0.0.1")];
    assert_eq!(raw(open.running.addr(), CLEAR, &proxied).await, 200);
    open.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_listener_for_operators_each_one_serves_its_own() {
    let service = start(|config| {
        config.admin_listen = Some(([127, 0, 0, 1], 0).into());
        config.admin = token();
    })
    .await;
    let admin = service.running.admin_addr().unwrap();
    let operators = ApiClient::new(format!("http://{admin}"));
    let authorization = format!("Bearer {TOKEN}");
    let headers = [("authorization", authorization.as_str())];
    for (method, path) in FOR_OPERATORS {
        let answer = service.send(method.clone(), path, &headers, None).await;
        answer.problem(403, "forbidden");
        assert!(answer.text().contains("--admin-listen"), "the remedy");
        let answer = operators.send(method.clone(), path, &[], None).await;
        answer.problem(401, "unauthorized");
        let answer = operators.send(method, path, &headers, None).await;
        assert_eq!(answer.status, 200, "{path}");
    }
    let item = format!("/items/{SAMPLE}");
    for path in ["/items", &item] {
        assert_eq!(service.get(path).await.status, 200);
        operators.get(path).await.problem(404, "route-not-found");
    }
    for path in ["/health", "/livez", "/readyz", "/openapi.json", "/docs"] {
        assert_eq!(service.get(path).await.status, 200, "{path}");
        assert_eq!(operators.get(path).await.status, 200, "{path}");
    }
    assert_eq!(refused(&operators, &headers, "entrance").await, 5);
    service.running.shutdown().await;
    assert!(TcpStream::connect(admin).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_get_in_when_clients_take_all_places() {
    let service = start(|config| {
        config.admin_listen = Some(([127, 0, 0, 1], 0).into());
        config.max_connections = 1;
    })
    .await;
    let _crowd = TcpStream::connect(service.running.addr()).await.unwrap();
    let admin = service.running.admin_addr().unwrap();
    assert_eq!(raw(admin, CLEAR, &[("host", "localhost")]).await, 200);
    service.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_was_made_to_lead_here_is_not_served() {
    let local = start(|_| ()).await;
    let named = start(|config| {
        config.allowed_hosts = Some(AllowedHosts::Names(vec![
            "shop.example".to_owned(),
            ".all.example".to_owned(),
        ]));
    })
    .await;
    let open = start(|config| config.listen = ([0, 0, 0, 0], 0).into()).await;
    let port = open.running.addr().port();
    let open_at = SocketAddr::from((IpAddr::from([127, 0, 0, 1]), port));
    let at = local.running.addr();
    let get = "GET /items HTTP/1.1\r\n";
    for host in ["localhost", "LOCALHOST:8000", "[::1]:1", "10.1.2.3", "api"] {
        assert_eq!(raw(at, get, &[("host", host)]).await, 200, "{host}");
    }
    let foreign = [("host", "evil.example:8000")];
    let delete = format!("DELETE /items/{SAMPLE} HTTP/1.1\r\n");
    for head in [
        get,
        CLEAR,
        &delete,
        "GET / HTTP/1.1\r\n",
        "GET /metrics HTTP/1.1\r\n",
        "GET /nothing HTTP/1.1\r\n",
        "OPTIONS /items HTTP/1.1\r\n",
    ] {
        assert_eq!(raw(at, head, &foreign).await, 421, "{head}");
    }
    // The target's own name counts before the header (RFC 9112, 3.2.2), so neither may be foreign.
    let absolute = "GET http://evil.example/items HTTP/1.1\r\n";
    assert_eq!(raw(at, absolute, &[("host", "localhost")]).await, 421);
    assert_eq!(local.get(&format!("/items/{SAMPLE}")).await.status, 200);
    assert_eq!(refused(&local, &[], "host").await, 8);
    let answer = local
        .send(Method::GET, "/items", &[("host", "evil.example")], None)
        .await;
    assert_eq!(answer.problem(421, "host-not-allowed"), ["Host"]);
    assert!(answer.text().contains("--allowed-hosts"), "the remedy");

    for (host, status) in [
        ("shop.example", 200),
        ("Shop.Example.:443", 200),
        ("localhost", 200),
        ("not.shop.example", 421),
        ("shop.example.evil.example", 421),
        ("all.example", 200),
        ("a.b.all.example", 200),
        ("small.example", 421),
        ("notall.example", 421),
        ("all.example.evil.example", 421),
    ] {
        let answer = raw(named.running.addr(), get, &[("host", host)]).await;
        assert_eq!(answer, status, "{host}");
    }
    // Who listens for others is asked by names that it cannot know.
    assert_eq!(raw(open_at, get, &foreign).await, 200);
    for service in [local, named, open] {
        service.running.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_another_site_changes_nothing() {
    let service = start(|config| config.admin = AdminAccess::Anyone).await;
    let item = r#"{"name": "Planted", "price": 1}"#;
    // A page may have these sent without asking first: by a form, by `fetch` with `no-cors`.
    for media_type in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain; application/json",
    ] {
        for (path, body) in [("/items", item), ("/cache/clear", "{}")] {
            let headers = [("content-type", media_type)];
            let answer = service.send(Method::POST, path, &headers, Some(body)).await;
            assert_eq!(
                answer.problem(415, "unsupported-media-type"),
                ["Content-Type"]
            );
        }
    }
    // A `Blob` without a type: a body, and no word on what it is.
    for head in ["POST /items HTTP/1.1\r\n", "POST /cache/clear HTTP/1.1\r\n"] {
        let mut stream = TcpStream::connect(service.running.addr()).await.unwrap();
        let length = item.len();
        let request = format!(
            "{head}host: localhost\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{item}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 415"), "{head}: {answer}");
    }
    let port = service.running.addr().port();
    let host = format!("127.0.0.1:{port}");
    let own_origin = format!("http://{host}");
    for (headers, status) in [
        (&[("origin", "http://evil.example")][..], 403),
        (&[("origin", "null")], 403),
        (&[("sec-fetch-site", "cross-site")], 403),
        (&[("sec-fetch-site", "same-site")], 403),
        (&[("origin", own_origin.as_str())], 200),
        (
            &[("sec-fetch-site", "same-origin"), ("origin", "http://x")],
            200,
        ),
        (&[], 200),
        // A browser asks before it sends this, and is not allowed to.
        (
            &[
                ("origin", "http://evil.example"),
                ("content-type", "application/json"),
            ],
            200,
        ),
    ] {
        let headers = [&[("host", host.as_str())], headers].concat();
        let answer = raw(service.running.addr(), CLEAR, &headers).await;
        assert_eq!(answer, status, "{headers:?}");
    }
    let list = service.get("/items?limit=100").await.text();
    assert!(!list.contains("Planted"), "{list}");
    assert_eq!(refused(&service, &[], "cross-site").await, 4);
    service.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_is_open_to_other_sites_or_taken_for_what_it_is_not() {
    let service = start(|_| ()).await;
    let preflight = [
        ("origin", "http://evil.example"),
        ("access-control-request-method", "DELETE"),
        ("access-control-request-headers", "content-type"),
        ("access-control-request-private-network", "true"),
    ];
    let item = format!("/items/{SAMPLE}");
    let tag = service.get(&item).await.header("etag").to_owned();
    let check = |shown: &str, answer: &Answer| {
        assert_eq!(
            answer.header("x-content-type-options"),
            "nosniff",
            "{shown}"
        );
        for name in answer.headers.keys() {
            assert!(!name.as_str().starts_with("access-control-"), "{shown}");
        }
    };
    for (method, path, status) in [
        (Method::GET, "/", 200),
        (Method::GET, "/docs", 200),
        (Method::GET, "/docs/page.js", 200),
        (Method::GET, "/openapi.json", 200),
        (Method::GET, "/problems/forbidden", 200),
        (Method::GET, "/items", 200),
        (Method::HEAD, "/items", 200),
        (Method::GET, item.as_str(), 200),
        (Method::GET, "/health", 200),
        (Method::GET, "/metrics", 200),
        (Method::GET, "/cache/stats", 200),
        (Method::GET, "/items/", 308),
        (Method::GET, "/items/no", 400),
        (Method::GET, "/nothing", 404),
        (Method::PATCH, "/items", 405),
        (Method::POST, "/cache/clear", 403),
        (Method::OPTIONS, "/items", 204),
        (Method::OPTIONS, "/cache/clear", 204),
    ] {
        let shown = format!("{method} {path}");
        let answer = service.unfollowed(method, path, &preflight).await;
        assert_eq!(answer.status, status, "{shown}");
        check(&shown, &answer);
    }
    let unchanged = service
        .send(Method::GET, &item, &[("if-none-match", &tag)], None)
        .await;
    assert_eq!(unchanged.status, 304);
    check("304", &unchanged);
    // Nor one that hyper writes by itself.
    let mut stream = TcpStream::connect(service.running.addr()).await.unwrap();
    stream.write_all(b"no HTTP\r\n\r\n").await.unwrap();
    let mut refused = String::new();
    let read = timeout(PATIENCE, stream.read_to_string(&mut refused)).await;
    read.expect("the server answers in time").unwrap();
    assert!(refused.starts_with("HTTP/1.1 400"), "{refused}");
    assert!(
        refused.contains("x-content-type-options: nosniff\r\n"),
        "{refused}"
    );
    // Nor does a page of another site show ours in a frame, or put a script into it.
    for page in ["/", "/docs"] {
        let answer = service.get(page).await;
        let policy = answer.header("content-security-policy");
        for rule in [
            "default-src 'none'",
            "script-src 'self'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
        ] {
            assert!(policy.contains(rule), "{page}: {policy}");
        }
        let text = answer.text();
        assert!(!text.contains("<script>") && !text.contains(" onclick="));
    }
    service.running.shutdown().await;
}
