//! The binary `writethrough`: how it starts, what it says when a setting is wrong, how it ends.

#![allow(clippy::unwrap_used)]

mod support;

use std::process::{Command, Output};
use std::time::{Duration, Instant};

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
            &["REDIS_URL", "http://h", "redis://"],
        ),
        (
            &[],
            &[("REDIS_URL", "redis://h:6379/x")],
            &["REDIS_URL", "redis://h:6379/x"],
        ),
        (
            &[],
            &[("POSTGRES_URL", "oracle://h")],
            &["POSTGRES_URL", "oracle://h", "`embedded`"],
        ),
        (
            &[],
            &[("DATABASE_URL", "oracle://h")],
            &["DATABASE_URL", "oracle://h", "`embedded`"],
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
    ];
    for (args, variables, expected) in cases {
        let mut variables = variables.to_vec();
        if !args.contains(&"--listen") && !variables.iter().any(|(name, _)| *name == "LISTEN_ADDR")
        {
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

#[test]
fn neither_errors_nor_help_show_a_password() {
    for variables in [
        ("POSTGRES_URL", "postgres://u:s3cret@h:notaport/d"),
        ("POSTGRES_URL", "postgres://u:s3cret@h/d?sslmode=perhaps"),
        ("POSTGRES_URL", "host=h user=u password=s3cret"),
        ("REDIS_URL", "redis://:s3cret@h:6379/x"),
        ("REDIS_URL", "redis://:s3cret@"),
    ] {
        for args in [&[][..], &["--help"], &["serve", "--help"], &["--ttl", "x"]] {
            let output = run(args, &[variables]);
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8(said).unwrap();
            assert!(!said.is_empty() && !said.contains("s3cret"), "{said}");
        }
    }
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
