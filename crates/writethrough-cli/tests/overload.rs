//! More clients, connections or bytes than the service has room for: it serves as many as it can, probes
//! always, and says what it turned away.

#![allow(clippy::unwrap_used)]

#[path = "../../writethrough-service/tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use serde_json::json;
use support::{SAMPLE, Service, config, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};
use writethrough_service::config::{CacheBackend, Config, Database};
use writethrough_service::engine::Consistency;
use writethrough_testbed::{ChildSpec, Link, Postgres, Testbed, free_port};

const PROGRAM: &str = env!("CARGO_BIN_EXE_writethrough");
const PATIENCE: Duration = Duration::from_secs(20);

/// A service without a cache, its Postgres, and the link to it.
async fn beside_postgres(
    testbed: &Testbed,
    change: impl FnOnce(&mut Config),
) -> (Service, Postgres, Link) {
    let postgres = testbed.postgres().await.unwrap();
    let link = testbed.link(postgres.addr()).await.unwrap();
    let database = Database::Postgres(link.url_for(&postgres.url()));
    let mut config = Config {
        consistency: Consistency::Off,
        ..config(database, CacheBackend::InProcess)
    };
    change(&mut config);
    let service = Service::start(config).await;
    until("the service is ready", async || {
        (service.get("/readyz").await.status == 200).then_some(())
    })
    .await;
    (service, postgres, link)
}

async fn embedded(change: impl FnOnce(&mut Config)) -> Service {
    let mut config = config(Database::Temporary, CacheBackend::InProcess);
    change(&mut config);
    Service::start(config).await.cached().await
}

fn sample() -> String {
    format!("/items/{SAMPLE}")
}

async fn connect(service: &Service) -> TcpStream {
    TcpStream::connect(service.address()).await.unwrap()
}

/// Asks on a connection of its own and returns the whole answer.
async fn ask_at(address: &str, target: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    let mut answer = String::new();
    let exchange = async {
        stream.write_all(request.as_bytes()).await?;
        stream.read_to_string(&mut answer).await
    };
    timeout(Duration::from_secs(5), exchange).await??;
    Ok(answer)
}

async fn ask(service: &Service, target: &str) -> String {
    ask_at(service.address(), target)
        .await
        .unwrap_or_else(|error| panic!("{target}: {error}"))
}

/// The value of a counter or gauge.
async fn metric(service: &Service, name: &str) -> u64 {
    let text = ask(service, "/metrics").await;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0, |value| value.parse().unwrap())
}

/// A request above the limit was refused at once. Its client asked again at once, and the refusals took
/// the processor from those that were served.
#[tokio::test(flavor = "multi_thread")]
async fn more_requests_than_places_wait_and_are_all_served() {
    let testbed = Testbed::new().await.unwrap();
    let (service, _postgres, link) =
        beside_postgres(&testbed, |config| config.max_in_flight = 4).await;
    assert_eq!(service.get(&sample()).await.status, 200);
    link.delay(Duration::from_millis(5));
    let clients = (0..32).map(|_| {
        let client = service.client.clone();
        tokio::spawn(async move { client.get(&sample()).await.status })
    });
    for answer in clients.collect::<Vec<_>>() {
        assert_eq!(answer.await.unwrap(), 200);
    }
    let shed = metric(
        &service,
        r#"http_server_shed_requests_total{reason="in_flight"}"#,
    );
    assert_eq!(shed.await, 0);
    service.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_gets_no_place_in_time_is_refused_and_probes_need_none() {
    let service = embedded(|config| config.max_in_flight = 2).await;
    let body = r#"{"name": "n", "price": 1}"#;
    let mut busy = Vec::new();
    for _ in 0..2 {
        let mut stream = connect(&service).await;
        let head = format!(
            "POST /items HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        busy.push(stream);
    }
    until("both are being served", async || {
        (metric(&service, "http_server_active_requests").await == 2).then_some(())
    })
    .await;
    let begun = Instant::now();
    let refused = service.get(&sample()).await;
    refused.problem(503, "overloaded");
    assert!(!refused.header("retry-after").is_empty());
    let waited = begun.elapsed();
    let expected = Duration::from_millis(900)..Duration::from_secs(3);
    assert!(expected.contains(&waited), "{waited:?}");
    for probe in ["/livez", "/readyz", "/health", "/metrics"] {
        assert_eq!(service.get(probe).await.status, 200);
    }
    for mut stream in busy {
        stream.write_all(body.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 201");
    }
    assert_eq!(service.get(&sample()).await.status, 200);
    let shed = metric(
        &service,
        r#"http_server_shed_requests_total{reason="in_flight"}"#,
    );
    assert_eq!(shed.await, 1);
    service.running.shutdown().await;
}

/// A new connection waited in the backlog until one of those that were open was closed, for as long as
/// their clients liked; so did that of a probe.
#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_give_way_to_new_ones_the_oldest_first() {
    const LIMIT: usize = 4;
    let service = embedded(|config| config.max_connections = LIMIT).await;
    let mut idle = Vec::new();
    // Some have begun a request and do not end it, which is as good as idle.
    for number in 0..40 {
        let mut stream = connect(&service).await;
        if number % 2 == 0 {
            stream
                .write_all(b"GET /items HTTP/1.1\r\nhost: ")
                .await
                .unwrap();
        }
        idle.push(stream);
    }
    for _ in 0..5 {
        for probe in ["/livez", "/readyz", "/health"] {
            let answer = ask(&service, probe).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        }
        // A spare connection, as long as none of the others was idle for long enough, is for probes.
        until("an item is served", async || {
            let answer = ask(&service, &sample()).await;
            answer.starts_with("HTTP/1.1 200 ").then_some(())
        })
        .await;
    }
    // Long idle, and more than there are places for.
    for (number, stream) in idle.iter_mut().enumerate().take(40 - LIMIT) {
        let closed = timeout(PATIENCE, stream.read(&mut [0; 64])).await;
        // Bytes that nobody has read make the end a reset.
        assert!(
            !matches!(closed.unwrap(), Ok(1..)),
            "connection {number} is still open"
        );
    }
    let closed = metric(
        &service,
        r#"http_server_dropped_connections_total{reason="idle"}"#,
    );
    assert!(closed.await >= 40 - LIMIT as u64);
    service.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_are_answered_when_every_connection_has_a_request_under_way() {
    const LIMIT: usize = 3;
    let testbed = Testbed::new().await.unwrap();
    let (service, _postgres, link) =
        beside_postgres(&testbed, |config| config.max_connections = LIMIT).await;
    link.stall();
    // On the connection that the client has already.
    let client = service.client.clone();
    let first = tokio::spawn(async move { client.get(&sample()).await });
    let mut busy = Vec::new();
    for _ in 1..LIMIT {
        let mut stream = connect(&service).await;
        let request = format!("GET {} HTTP/1.1\r\nhost: localhost\r\n\r\n", sample());
        stream.write_all(request.as_bytes()).await.unwrap();
        busy.push(stream);
    }
    until("all connections are busy", async || {
        let busy = metric(&service, "http_server_active_requests").await;
        (busy == LIMIT as u64).then_some(())
    })
    .await;
    for probe in ["/livez", "/readyz", "/metrics"] {
        let answer = ask(&service, probe).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(
            answer.to_lowercase().contains("connection: close"),
            "{answer}"
        );
    }
    let refused = ask(&service, "/items").await;
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    assert!(refused.contains("/problems/overloaded"), "{refused}");
    let shed = metric(
        &service,
        r#"http_server_shed_requests_total{reason="connections"}"#,
    );
    assert_eq!(shed.await, 1);
    link.heal();
    assert_eq!(first.await.unwrap().status, 200);
    for mut stream in busy {
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
    }
    service.running.shutdown().await;
}

/// Starts the program with limits of open files.
async fn limited(testbed: &Testbed, limits: &str) -> (writethrough_testbed::Child, String) {
    let folder = tempfile::tempdir_in(testbed.folder()).unwrap().keep();
    let address = format!("127.0.0.1:{}", free_port());
    let command = format!("{limits} && exec {PROGRAM}");
    let spec = ChildSpec::new("api", "/bin/sh")
        .args(["-c", &command])
        .folder(folder)
        .env("LISTEN_ADDR", &address);
    (testbed.child(spec).await.unwrap(), address)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lower_limit_of_open_files_is_raised_and_the_upper_one_bounds_the_connections() {
    let testbed = Testbed::new().await.unwrap();
    let (raised, _) = limited(&testbed, "ulimit -Sn 90").await;
    raised.wait_for_log("listening on", PATIENCE).await.unwrap();
    let limits =
        std::fs::read_to_string(format!("/proc/{}/limits", raised.pid().unwrap())).unwrap();
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    let numbers: Vec<_> = files.split_whitespace().skip(3).take(2).collect();
    assert_eq!(numbers[0], numbers[1], "{files}");

    let (bounded, address) = limited(&testbed, "ulimit -n 160").await;
    bounded
        .wait_for_log("listening on", PATIENCE)
        .await
        .unwrap();
    bounded
        .wait_for_log("leaves room for 48 client connections", PATIENCE)
        .await
        .unwrap();
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(TcpStream::connect(&address).await.unwrap());
    }
    for _ in 0..10 {
        for probe in ["/livez", "/readyz", "/health"] {
            let answer = ask_at(&address, probe).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        }
    }
    let log = bounded.log().unwrap();
    assert!(!log.contains("could not be accepted"), "{log}");
    assert!(log.contains("had to give way"), "{log}");
    assert!(log.lines().count() < 15, "{log}");

    let (refused, _) = limited(&testbed, "ulimit -n 100").await;
    let status = refused.wait(PATIENCE).await.unwrap();
    let said = refused.log().unwrap();
    assert_eq!(status.code(), Some(2), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("may have 100 files open"), "{said}");
    assert!(said.contains("LimitNOFILE="), "{said}");
}

/// Each name of a query was compared with all before it, and each made an error of its own: 16 000 names
/// took a thread of the runtime for 0.8 s and were answered with 1.2 MB.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_head_is_refused_and_many_wrong_parameters_are_a_few_errors() {
    let service = embedded(|_| {}).await;
    let names = |length: usize| {
        let mut names = String::new();
        for number in 0.. {
            let name = format!("{number:x}&");
            if names.len() + name.len() > length {
                break;
            }
            names.push_str(&name);
        }
        names
    };
    for path in ["/items", &sample(), "/health", "/cache/stats"] {
        let target = format!("{path}?{}", names(8192 - path.len() - 1));
        let answer = service.get(&target).await;
        let errors = answer.problem(400, "invalid-parameter");
        assert_eq!(errors.len(), 20, "{path}");
        assert!(answer.body.len() < 4096, "{path}: {}", answer.body.len());
    }
    // The same one again and again, and a long one.
    let again = format!("/items?{}", "limit=5&".repeat(1000));
    assert_eq!(
        service
            .get(&again)
            .await
            .problem(400, "invalid-parameter")
            .len(),
        20
    );
    let long = format!("/items?{0}=1&{0}=2", "a".repeat(4000));
    let answer = service.get(&long).await;
    answer.problem(400, "invalid-parameter");
    assert!(answer.body.len() < 1024, "{}", answer.body.len());

    for path in ["/items", &sample(), "/health", "/livez", "/nothing", "/"] {
        let longest = format!("{path}?{}", "a".repeat(8192 - path.len() - 1));
        assert_ne!(service.get(&longest).await.status, 414, "{path}");
        let errors = service.get(&(longest + "a")).await;
        assert_eq!(errors.problem(414, "target-too-long"), ["path"]);
        let headers = [("x-long", "a".repeat(66_000))];
        let headers = headers
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        let errors = service
            .send(reqwest::Method::GET, path, &headers, None)
            .await;
        assert_eq!(errors.problem(431, "head-too-long"), ["headers"]);
    }
    let below = [("x-long", "a".repeat(60_000))];
    let below = below
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let answer = service
        .send(reqwest::Method::GET, "/livez", &below, None)
        .await;
    assert_eq!(answer.status, 200);
    let metrics = service.get("/metrics").await.text();
    for status in ["414", "431"] {
        let counted = metrics.lines().any(|line| {
            line.starts_with("http_server_request_duration_seconds_count")
                && line.contains(&format!(r#"status="{status}""#))
        });
        assert!(counted, "{status}");
    }
    service.running.shutdown().await;
}

/// Asks for the list on a connection with a window of about this many bytes.
async fn ask_for_much(service: &Service, window: u32) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(window).unwrap();
    let mut stream = socket.connect(service.running.addr()).await.unwrap();
    let request = b"GET /items?limit=100 HTTP/1.1\r\nhost: localhost\r\n\r\n";
    stream.write_all(request).await.unwrap();
    stream
}

const STALLED: &str = r#"http_server_dropped_connections_total{reason="stalled"}"#;

/// A service with a list that no socket has room for, and the size of that list.
async fn with_much(max_in_flight: usize) -> (Service, usize) {
    let service = embedded(|config| config.max_in_flight = max_in_flight).await;
    let item = json!({"name": "n", "price": 1, "description": "d".repeat(60_000)}).to_string();
    for _ in 0..100 {
        assert_eq!(service.post("/items", &item).await.status, 201);
    }
    let size = service.get("/items?limit=100").await.body.len();
    assert!(size > 5_000_000, "{size}");
    (service, size)
}

async fn all_places_are_free(service: &Service) {
    until("all places are free", async || {
        (metric(service, "http_server_active_requests").await == 0).then_some(())
    })
    .await;
}

/// An answer that nobody reads was kept for ever, outside of the limit of requests at once.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_not_read_holds_its_place_and_then_the_connection_is_cut_off() {
    let (service, size) = with_much(1).await;
    all_places_are_free(&service).await;
    let mut stream = ask_for_much(&service, 4096).await;
    until("it holds its place", async || {
        (metric(&service, "http_server_active_requests").await == 1).then_some(())
    })
    .await;
    let refused = ask(&service, &sample()).await;
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    until("it is cut off", async || {
        (metric(&service, STALLED).await == 1).then_some(())
    })
    .await;
    all_places_are_free(&service).await;
    let served = ask(&service, &sample()).await;
    assert!(served.starts_with("HTTP/1.1 200 "), "{served}");
    // What has arrived may be read still, and then comes the reset.
    let mut read = Vec::new();
    let end = timeout(PATIENCE, stream.read_to_end(&mut read)).await;
    assert!(end.unwrap().is_err() && read.len() < size);
    service.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_a_few_bytes_at_a_time_is_cut_off_and_a_steady_one_is_not() {
    let (service, size) = with_much(1024).await;
    let read = async |bytes: usize, pause: Duration| {
        let mut stream = ask_for_much(&service, bytes as u32).await;
        let mut read = 0;
        let mut buffer = vec![0; bytes];
        let reading = async {
            while read < size {
                sleep(pause).await;
                match stream.read(&mut buffer).await {
                    Ok(bytes @ 1..) => read += bytes,
                    _ => return,
                }
            }
        };
        timeout(Duration::from_secs(60), reading)
            .await
            .expect("it ends");
        read
    };
    let (trickle, steady) = tokio::join!(
        read(1000, Duration::from_millis(200)),
        read(40_000, Duration::from_millis(100)),
    );
    assert!(trickle < size, "it read {trickle} of {size}");
    assert!(steady >= size, "it read {steady} of {size}");
    all_places_are_free(&service).await;
    assert_eq!(metric(&service, STALLED).await, 1);
    service.running.shutdown().await;
}
