//! The binary `writethrough`: how it starts, what it says when a setting is wrong, how it ends.

#![allow(clippy::unwrap_used)]

#[path = "../../writethrough-service/tests/support/mod.rs"]
mod support;

use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use reqwest::Method;
use support::ApiClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use writethrough_testbed::{Child, ChildSpec, Testbed, free_port};

const PROGRAM: &str = env!("CARGO_BIN_EXE_writethrough");
const PATIENCE: Duration = Duration::from_secs(20);

/// The program without this process's environment.
fn program() -> Command {
    let mut command = Command::new(PROGRAM);
    command.env_clear();
    command
}

fn run(args: &[&str], variables: &[(&str, &str)]) -> Output {
    program()
        .args(args)
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

/// Starts the program on a free port and in a folder of its own.
async fn start(testbed: &Testbed, args: &[&str], variables: &[(&str, &str)]) -> (Child, ApiClient) {
    let folder = tempfile::tempdir_in(testbed.folder()).unwrap().keep();
    let mut spec = ChildSpec::new("api", PROGRAM).args(args).folder(folder);
    for (name, value) in variables {
        spec = spec.env(*name, *value);
    }
    let address = format!("127.0.0.1:{}", free_port());
    let child = testbed
        .child(spec.env("LISTEN_ADDR", &address))
        .await
        .unwrap();
    child.wait_for_log("listening on", PATIENCE).await.unwrap();
    (child, ApiClient::new(format!("http://{address}")))
}

#[test]
fn a_wrong_setting_stops_the_start_with_one_line() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], &'a [&'a str]);
    let cases: &[Case<'_>] = &[
        (
            &["--listen", "127.0.0.1:0", "--admin-listen", &taken],
            &[],
            &["--admin-listen (ADMIN_LISTEN_ADDR)", &taken, "free address"],
        ),
        (
            &[],
            &[("ADMIN_TOKEN", "short")],
            &["--admin-token (ADMIN_TOKEN)", "openssl rand -hex 32"],
        ),
        (
            &["--listen", "nowhere"],
            &[],
            &["--listen (LISTEN_ADDR)", "nowhere", "127.0.0.1:8000"],
        ),
        (
            &["serve"],
            &[("LISTEN_ADDR", "8000")],
            &["LISTEN_ADDR", "8000"],
        ),
        (
            &["--listen", &taken],
            &[],
            &["--listen (LISTEN_ADDR)", &taken, "use a free address"],
        ),
        (
            &[],
            &[("CACHE_TTL_SECONDS", "soon")],
            &["CACHE_TTL_SECONDS", "soon", "from 1 to"],
        ),
        (&["--ttl", "0"], &[], &["--ttl", "\"0\"", "from 1 to"]),
        (
            &["--consistency", "eventual"],
            &[],
            &["--consistency", "eventual", "`strict`"],
        ),
        (
            &[],
            &[("REDIS_URL", "http://h")],
            &[
                "REDIS_URL",
                "a URL with scheme `http`, 8 characters",
                "redis://",
            ],
        ),
        (
            &[],
            &[("REDIS_URL", "redis://h:6379/x")],
            &["REDIS_URL", "16 characters", "with DB a number"],
        ),
        (
            &[],
            &[("POSTGRES_URL", "oracle://h")],
            &["POSTGRES_URL", "a URL with scheme `oracle`", "`embedded`"],
        ),
        (
            &[],
            &[("DATABASE_URL", "oracle://h")],
            &["DATABASE_URL", "a URL with scheme `oracle`", "`embedded`"],
        ),
        (
            &["--database", "sqlite:/nonexistent/a.db"],
            &[],
            &["--database", "/nonexistent/a.db"],
        ),
        (
            &[],
            &[("LOG_FORMAT", "xml")],
            &["LOG_FORMAT", "xml", "`json`"],
        ),
        (
            &[],
            &[("OTEL_EXPORTER_OTLP_ENDPOINT", "h:4318")],
            &["OTEL_EXPORTER_OTLP_ENDPOINT"],
        ),
        (
            &[],
            &[("PORT", "tcp://10.0.0.1:80")],
            &["PORT is a URL", "use a number"],
        ),
        (&["--ttl", "-1"], &[], &["--ttl", "\"-1\"", "from 1 to"]),
        (
            &["--drain=-0.5"],
            &[],
            &["--drain", "\"-0.5\"", "from 0 to"],
        ),
        (
            &["--log-level", "verbose"],
            &[],
            &["--log-level (LOG_LEVEL, RUST_LOG)", "\"verbose\"", "`info`"],
        ),
        (
            &[],
            &[("RUST_LOG", "all")],
            &["RUST_LOG", "\"all\"", "`info`"],
        ),
        (
            &[],
            &[("OTEL_TRACES_SAMPLER_ARG", "junk")],
            &["OTEL_TRACES_SAMPLER_ARG", "\"junk\"", "from 0 to 1"],
        ),
        (
            &[],
            &[("POSTGRES_URL", "postgres://u:@hunter2@h/db")],
            &["POSTGRES_URL", "26 characters", "write @ as %40"],
        ),
        (
            &["postgres://u:hunter2@h/d"],
            &[],
            &["a URL with scheme `postgres`", "--help"],
        ),
        (&["serve", "redis://h"], &[], &["a URL with scheme `redis`"]),
        (&["--ttl"], &[], &["--ttl", "a value is required"]),
        (&["check"], &[], &["required", "--target"]),
        (
            &["check", "--keys", "-1", "--target", "x"],
            &[],
            &["--keys"],
        ),
        (&["lab", "--nodes", "many"], &[], &["--nodes", "many"]),
        (&["sevre"], &[], &["'sevre'", "'serve'"]),
        (
            &[],
            &[("REDIS_URL_FILE", "/nonexistent")],
            &["REDIS_URL_FILE", "a text without a scheme", "No such file"],
        ),
    ];
    for (args, variables, expected) in cases {
        let mut variables = variables.to_vec();
        let says_where = |(name, _): &(&str, &str)| matches!(*name, "LISTEN_ADDR" | "PORT");
        if !args.contains(&"--listen") && !variables.iter().any(says_where) {
            variables.push(("LISTEN_ADDR", "127.0.0.1:0"));
        }
        let output = run(args, &variables);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            output.status.code(),
            Some(2),
            "{args:?} {variables:?}: {said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.starts_with("error: "), "{said}");
        assert!(output.stdout.is_empty());
        for part in *expected {
            assert!(said.contains(part), "no {part} in {said}");
        }
    }
}

/// A text that is not UTF-8 counted as not set once, and the service started with another database.
#[test]
fn a_setting_that_is_not_utf_8_stops_the_start_by_its_name() {
    let help = String::from_utf8(run(&["--help"], &[]).stdout).unwrap();
    // In one line, whatever the width of the help.
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut variables: Vec<&str> = help
        .split("[env: ")
        .skip(1)
        .map(|rest| rest.split(['=', ']']).next().unwrap())
        .collect();
    assert!(variables.len() > 15, "{variables:?}");
    variables.extend([
        "DATABASE_URL",
        "RUST_LOG",
        "POSTGRES_URL_FILE",
        "REDIS_URL_FILE",
    ]);
    let junk = std::ffi::OsStr::from_bytes(b"postgres://u:hunt\xffer2@h/d");
    for variable in variables {
        let mut program = program();
        if variable != "LISTEN_ADDR" {
            program.env("LISTEN_ADDR", "127.0.0.1:0");
        }
        let output = program.env(variable, junk).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{variable}: {said}");
        assert!(
            said.contains(variable) && said.contains("use UTF-8"),
            "{variable}: {said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!said.contains("hunt"), "{said}");
    }
    let flag = program().arg("--database").arg(junk).output().unwrap();
    let said = String::from_utf8(flag.stderr).unwrap();
    assert!(
        said.starts_with("error: --database") && said.contains("use UTF-8"),
        "{said}"
    );
}

#[test]
fn neither_errors_nor_help_show_a_password() {
    for variables in [
        ("POSTGRES_URL", "postgres://u:s3cret@h:notaport/d"),
        ("POSTGRES_URL", "postgres://u:s3cret@h/d?sslmode=perhaps"),
        ("POSTGRES_URL", "host=h user=u password=s3cret"),
        ("POSTGRES_URL", "postgres://u:s3cret"),
        ("POSTGRES_URL", "Server=h;Uid=u;Pwd=s3cret"),
        ("POSTGRES_URL_FILE", "postgres://u:s3cret@h/d"),
        ("REDIS_URL", "redis://:s3cret@h:6379/x"),
        ("REDIS_URL", "redis://:s3cret@"),
        ("REDIS_URL", "redis-cli -h h -a s3cret"),
        ("REDIS_URL", "h:6380,pw=s3cret"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "authorization=Bearer s3cret"),
        ("LISTEN_ADDR", "postgres://u:s3cret@h/d"),
    ] {
        for args in [&[][..], &["--help"], &["serve", "--help"], &["--ttl", "x"]] {
            let output = run(args, &[variables]);
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8(said).unwrap();
            assert!(!said.is_empty() && !said.contains("s3cret"), "{said}");
        }
    }
}

#[test]
fn neither_does_the_complaint_about_a_command_line() {
    for args in [
        &["postgres://u:s3cret@h/d"][..],
        &["serve", "redis://:s3cret@h"],
        &["serve", "redis-cli -h h -a s3cret"],
        &["--u:s3cret@h"],
        &["--databse=postgres://u:s3cret@h/d"],
        &["lab", "--nodes", "redis://:s3cret@h"],
        &["lab", "redis://:s3cret@h"],
        &["lab", "--listen", "redis://:s3cret@h"],
        &["health", "--listen", "redis://:s3cret@h"],
        &["check", "--keys", "http://u:s3cret@h"],
        &["check", "http://u:s3cret@h"],
        &["check", "--target", "http://u:s3cret@h"],
        &["check", "--target", "h;Pwd=s3cret"],
        &["check", "--target", "http://h,s3cret", "--json"],
    ] {
        let output = run(args, &[]);
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(
            !said.is_empty() && !said.contains("s3cret"),
            "{args:?}: {said}"
        );
    }
    // A mistyped word is repeated, and set right.
    let said = String::from_utf8(run(&["sevre"], &[]).stderr).unwrap();
    assert!(
        said.contains("'sevre'") && said.contains("'serve'"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_health_check_asks_where_others_reach_the_service() {
    let testbed = Testbed::new().await.unwrap();
    let health = |variable: (&str, &str)| {
        let output = run(&["health"], &[variable]);
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (output.status.success(), said)
    };
    // All addresses, as an image is told to listen.
    let port = free_port().to_string();
    let spec = ChildSpec::new("api", PROGRAM).env("PORT", &port);
    let folder = tempfile::tempdir_in(testbed.folder()).unwrap();
    let node = testbed.child(spec.folder(folder.path())).await.unwrap();
    for address in ["127.0.0.1", "localhost"] {
        let client = ApiClient::new(format!("http://{address}:{port}"));
        support::until("it serves", async || {
            let ready = client.try_send(Method::GET, "/readyz", &[], None).await;
            ready.ok()?.status.is_success().then_some(())
        })
        .await;
    }
    let (well, said) = health(("PORT", &port));
    assert!(well, "{said}");
    let (well, said) = health(("LISTEN_ADDR", &format!("[::]:{port}\r")));
    assert!(well, "{said}");
    node.kill().await.unwrap();

    // Only this machine sees the next one, whatever its check is told.
    let others = if_addrs::get_if_addrs().unwrap();
    let loopback = |ip: std::net::IpAddr| ip.is_loopback();
    if others.iter().all(|interface| loopback(interface.ip())) {
        return;
    }
    let (_node, client) = start(&testbed, &[], &[]).await;
    let (_, port) = client.address().rsplit_once(':').unwrap();
    let (well, said) = health(("LISTEN_ADDR", &format!("0.0.0.0:{port}")));
    assert!(!well, "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    let (well, said) = health(("LISTEN_ADDR", client.address()));
    assert!(well, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_anything_it_serves_from_a_file_in_the_current_folder() {
    let testbed = Testbed::new().await.unwrap();
    let folder = tempfile::tempdir_in(testbed.folder()).unwrap();
    let (node, client) = {
        let spec = ChildSpec::new("api", PROGRAM)
            .folder(folder.path())
            .env("LISTEN_ADDR", "127.0.0.1:0");
        let node = testbed.child(spec).await.unwrap();
        let line = node.wait_for_log("listening on", PATIENCE).await.unwrap();
        let url = line
            .split("listening on ")
            .nth(1)
            .unwrap()
            .split(' ')
            .next()
            .unwrap();
        let client = ApiClient::new(url.to_owned());
        (node, client)
    };
    let path = client.create("Kept").await;
    assert!(folder.path().join("writethrough.db").exists());
    // A second process on the same file would not share the cache.
    let second = program()
        .current_dir(folder.path())
        .env("LISTEN_ADDR", "127.0.0.1:0")
        .output();
    let second = second.unwrap();
    let said = String::from_utf8(second.stderr).unwrap();
    let last = said.lines().last().unwrap();
    assert!(
        last.contains("writethrough.db is in use by another process"),
        "{said}"
    );
    assert_eq!(second.status.code(), Some(2));
    let status = node.terminate(PATIENCE).await.unwrap();
    assert_eq!(status.code(), Some(0), "{}", node.log().unwrap());

    let spec = ChildSpec::new("api", PROGRAM)
        .arg("serve")
        .args(["--database", "sqlite:writethrough.db"])
        .folder(folder.path())
        .env("LISTEN_ADDR", client.address());
    let node = testbed.child(spec).await.unwrap();
    node.wait_for_log("listening on", PATIENCE).await.unwrap();
    assert_eq!(client.get(&path).await.json()["name"], "Kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_it_in_bounded_time_with_success() {
    let testbed = Testbed::new().await.unwrap();
    let (node, client) = start(&testbed, &[], &[]).await;
    // An idle client, and one in the middle of sending.
    let mut idle = TcpStream::connect(client.address()).await.unwrap();
    idle.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let mut buffer = [0; 1024];
    assert!(idle.read(&mut buffer).await.unwrap() > 0);
    let mut slow = TcpStream::connect(client.address()).await.unwrap();
    let body = r#"{"name": "Late", "price": 1}"#;
    let head = format!(
        "POST /items HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    slow.write_all(head.as_bytes()).await.unwrap();
    support::until("it is being served", async || {
        let metrics = client.get("/metrics").await.text();
        metrics
            .contains("http_server_active_requests 1")
            .then_some(())
    })
    .await;

    let begun = Instant::now();
    let ended = async { node.terminate(PATIENCE).await.unwrap() };
    let finished = async {
        node.wait_for_log("SIGTERM", PATIENCE).await.unwrap();
        slow.write_all(body.as_bytes()).await.unwrap();
        let mut answer = String::new();
        slow.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let (status, answer) = tokio::join!(ended, finished);
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
    assert_eq!(status.code(), Some(0), "{}", node.log().unwrap());
    assert!(
        begun.elapsed() < Duration::from_secs(12),
        "{:?}",
        begun.elapsed()
    );
    assert!(node.log().unwrap().contains("stopped"));
}

fn send_signal(name: &str, process: u32) {
    let sent = Command::new("kill")
        .args([name, &process.to_string()])
        .status();
    assert!(sent.unwrap().success());
}

/// A terminal that goes away ended it at once, with requests under way.
#[tokio::test(flavor = "multi_thread")]
async fn sighup_drains_like_sigterm_and_stays_ignored_under_nohup() {
    let testbed = Testbed::new().await.unwrap();
    let (node, _) = start(&testbed, &[], &[]).await;
    send_signal("-HUP", node.pid().unwrap());
    let status = node.wait(PATIENCE).await.unwrap();
    assert_eq!(status.code(), Some(0), "{}", node.log().unwrap());
    let log = node.log().unwrap();
    assert!(
        log.contains("SIGHUP: draining") && log.contains("stopped"),
        "{log}"
    );

    let address = format!("127.0.0.1:{}", free_port());
    let spec = ChildSpec::new("api", "/bin/sh")
        .args(["-c", "trap '' HUP; exec \"$0\"", PROGRAM])
        .folder(tempfile::tempdir_in(testbed.folder()).unwrap().keep())
        .env("LISTEN_ADDR", &address);
    let node = testbed.child(spec).await.unwrap();
    node.wait_for_log("listening on", PATIENCE).await.unwrap();
    send_signal("-HUP", node.pid().unwrap());
    let client = ApiClient::new(format!("http://{address}"));
    assert_eq!(client.get("/livez").await.status, 200);
    assert_eq!(node.terminate(PATIENCE).await.unwrap().code(), Some(0));
    assert!(!node.log().unwrap().contains("SIGHUP"));
}

/// A process that nobody can forget.
struct Spawned(std::process::Child);

impl Drop for Spawned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A log that was written by whoever had something to say: with a full pipe behind standard error the
/// start stood still, and so did each request.
#[tokio::test(flavor = "multi_thread")]
async fn a_standard_error_that_nobody_reads_holds_nothing_up() {
    for reads_later in [false, true] {
        let (pipe, mut reader) = tokio::net::unix::pipe::pipe().unwrap();
        pipe.writable().await.unwrap();
        while pipe.try_write(b".").is_ok() {}
        let address = format!("127.0.0.1:{}", free_port());
        let child = program()
            .args(["--database", "sqlite::memory:", "--log-level", "debug"])
            .env("LISTEN_ADDR", &address)
            .stderr(pipe.into_blocking_fd().unwrap())
            .spawn();
        let mut child = Spawned(child.unwrap());
        let client = ApiClient::new(format!("http://{address}"));
        support::until("it serves and loses lines", async || {
            // Each leaves a line about its connection.
            for _ in 0..1000 {
                let mut stream = TcpStream::connect(&address).await.ok()?;
                stream.write_all(b"\0\r\n\r\n").await.ok()?;
                stream.read_to_end(&mut Vec::new()).await.ok()?;
            }
            let metrics = client.get("/metrics").await.text();
            let lost = metrics
                .lines()
                .find_map(|line| line.strip_prefix("log_lost_lines_total "))?;
            (lost != "0").then_some(())
        })
        .await;
        if reads_later {
            let mut said = Vec::new();
            let told = async {
                while !String::from_utf8_lossy(&said).contains("lines of the log were lost") {
                    // The end stays, in case it is the beginning of that line.
                    said.drain(..said.len().saturating_sub(200));
                    let mut bytes = [0; 1 << 16];
                    let length = reader.read(&mut bytes).await.unwrap();
                    said.extend_from_slice(&bytes[..length]);
                }
            };
            tokio::time::timeout(PATIENCE, told).await.unwrap();
        }
        send_signal("-TERM", child.0.id());
        let ended = support::until("it ends", || {
            let ended = child.0.try_wait().unwrap();
            async move { ended }
        })
        .await;
        assert_eq!(ended.code(), Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn harmless_forms_of_urls_lead_to_the_servers_and_the_log_shows_their_parts() {
    let testbed = Testbed::new().await.unwrap();
    let (postgres, redis) = tokio::try_join!(testbed.postgres(), testbed.redis()).unwrap();
    postgres.run("CREATE SCHEMA shop").await.unwrap();
    let file = testbed.folder().join("url");
    let (server, cache) = (postgres.addr(), redis.addr());
    let url = format!(
        "POSTGRES://labuser:s3cret@{server}/items_db?options=-csearch_path%3Dshop&connect_timeout=9"
    );
    std::fs::write(&file, format!("{url}\r\n")).unwrap();
    let variables = [
        ("POSTGRES_URL_FILE", file.to_str().unwrap()),
        ("REDIS_URL", &format!("\"Valkey://{cache}/1\"\r")),
        ("CONSISTENCY", " strict\r"),
    ];
    let (node, client) = start(&testbed, &[], &variables).await;
    let log = node.log().unwrap();
    for part in [
        format!("database=postgres://{server}/items_db"),
        format!("cache=valkey://{cache}/1"),
        "its own bounds: connect_timeout".to_owned(),
    ] {
        assert!(log.contains(&part), "no {part} in {log}");
    }
    let caches = async || {
        let stats = client
            .try_send(Method::GET, "/cache/stats", &[], None)
            .await;
        (stats.ok()?.text().contains("\"mode\":\"cached\"")).then_some(())
    };
    support::until("it caches", caches).await;
    client.create("Forms").await;
    let stored = "SELECT name FROM shop.items WHERE name = 'Forms'";
    assert_eq!(postgres.run(stored).await.unwrap(), "Forms");
    assert!(!node.log().unwrap().contains("s3cret"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_manager_is_told_of_the_start_of_life_and_of_the_end() {
    let testbed = Testbed::new().await.unwrap();
    let path = testbed.folder().join("notify");
    let socket = tokio::net::UnixDatagram::bind(&path).unwrap();
    let hear = async |wanted: &str| {
        let mut heard = Vec::new();
        let wait = async {
            let mut bytes = [0; 1024];
            loop {
                let length = socket.recv(&mut bytes).await.unwrap();
                heard.push(String::from_utf8_lossy(&bytes[..length]).trim().to_owned());
                if heard.last().is_some_and(|last| last == wanted) {
                    return;
                }
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, wait).await.is_ok();
        assert!(in_time, "no {wanted} in {heard:?}");
        heard
    };
    let path = path.display().to_string();
    let variables = [
        ("NOTIFY_SOCKET", path.as_str()),
        ("WATCHDOG_USEC", "200000"),
    ];
    let (node, client) = start(&testbed, &[], &variables).await;
    assert_eq!(hear("READY=1").await, ["READY=1"]);
    assert_eq!(client.get("/livez").await.status, 200);
    for _ in 0..3 {
        hear("WATCHDOG=1").await;
    }
    let (status, _) = tokio::join!(node.terminate(PATIENCE), hear("STOPPING=1"));
    assert_eq!(status.unwrap().code(), Some(0));

    // One that nobody listens on is named, and is no reason to end.
    let variables = [("NOTIFY_SOCKET", "/nonexistent/notify")];
    let (node, client) = start(&testbed, &[], &variables).await;
    let line = node.wait_for_log("NOTIFY_SOCKET", PATIENCE).await.unwrap();
    assert!(line.contains("WARN"), "{line}");
    assert_eq!(client.get("/livez").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_said_once_and_the_token_never() {
    const TOKEN: &str = "s3cret-s3cret-s3cret";
    let testbed = Testbed::new().await.unwrap();
    let variables = [
        ("POSTGRES_URL", "sqlite::memory:"),
        ("ADMIN_TOKEN", TOKEN),
        ("LOG_LEVEL", "debug"),
    ];
    let (node, client) = start(&testbed, &[], &variables).await;
    let wrong = [("authorization", "Bearer s3cret-s3cret-s3crex")];
    for _ in 0..3 {
        let answer = client.send(Method::GET, "/metrics", &wrong, None).await;
        answer.problem(401, "unauthorized");
        let foreign = [("host", "evil.example")];
        let answer = client.send(Method::GET, "/items", &foreign, None).await;
        answer.problem(421, "host-not-allowed");
    }
    let authorization = format!("Bearer {TOKEN}");
    let right = [("authorization", authorization.as_str())];
    let answer = client.send(Method::GET, "/metrics", &right, None).await;
    assert_eq!(answer.status, 200);
    assert_eq!(node.terminate(PATIENCE).await.unwrap().code(), Some(0));
    let log = node.log().unwrap();
    let said: Vec<_> = log
        .lines()
        .filter(|line| line.contains("refused: "))
        .collect();
    assert_eq!(said.len(), 2, "{log}");
    assert!(
        said[0].contains("GET /metrics from 127.0.0.1: the token"),
        "{log}"
    );
    assert!(said[1].contains("--allowed-hosts"), "{log}");
    assert!(!log.contains("s3cret"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_password_reaches_the_log() {
    let testbed = Testbed::new().await.unwrap();
    // Nobody listens there, so that the failures to connect are logged too.
    let nobody = free_port();
    let postgres = format!("postgres://labuser:s3cret@127.0.0.1:{nobody}/items_db");
    let redis = format!("redis://:s3cret@127.0.0.1:{nobody}");
    let (node, client) = start(
        &testbed,
        &[],
        &[
            ("POSTGRES_URL", &postgres),
            ("REDIS_URL", &redis),
            ("LOG_FORMAT", "json"),
            ("LOG_LEVEL", "debug"),
        ],
    )
    .await;
    let line = node
        .wait_for_log("waiting for Postgres", PATIENCE)
        .await
        .unwrap();
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["level"], "WARN");
    assert!(
        line["message"]
            .as_str()
            .unwrap()
            .contains(&nobody.to_string()),
        "{line}"
    );
    assert_eq!(client.get("/items").await.status, 503);
    assert_eq!(node.terminate(PATIENCE).await.unwrap().code(), Some(0));
    let log = node.log().unwrap();
    assert!(!log.contains("s3cret"), "{log}");
    for line in log.lines() {
        assert!(
            serde_json::from_str::<serde_json::Value>(line).is_ok(),
            "{line}"
        );
    }
}
