//! `writethrough lab`: the whole lab in one process, its commands from other processes, its end.

#![allow(clippy::unwrap_used)]

#[path = "../../writethrough-service/tests/support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use support::{ApiClient, SAMPLE};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use writethrough_testbed::{Child, ChildSpec, Testbed};

const PROGRAM: &str = env!("CARGO_BIN_EXE_writethrough");
const PATIENCE: Duration = Duration::from_secs(60);

/// A lab that runs, and the other terminal.
struct Lab {
    child: Child,
    folder: PathBuf,
    urls: Vec<String>,
}

impl Lab {
    async fn start(testbed: &Testbed, args: &[&str]) -> Self {
        let folder = testbed.folder().join("writethrough-lab");
        let spec = ChildSpec::new("lab", PROGRAM)
            .args(["lab", "--listen", "127.0.0.1:0"])
            .args(args)
            .env("WRITETHROUGH_LAB", &folder);
        let child = testbed.child(spec).await.unwrap();
        child
            .wait_for_log("The lab is ready", PATIENCE)
            .await
            .unwrap();
        let log = child.log().unwrap();
        let urls = log
            .lines()
            .filter(|line| line.trim_start().starts_with("api"))
            .filter_map(|line| {
                line.split_whitespace()
                    .find(|word| word.starts_with("http://"))
            })
            .map(str::to_owned)
            .collect();
        Self {
            child,
            folder,
            urls,
        }
    }

    fn client(&self, node: usize) -> ApiClient {
        ApiClient::new(self.urls[node].clone())
    }

    /// Runs a command that must succeed, and returns what it printed.
    fn run(&self, args: &[&str]) -> String {
        let output = lab(&self.folder, args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail with one line, and returns it.
    fn refused(&self, args: &[&str]) -> String {
        let output = lab(&self.folder, args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(said.lines().count(), 1, "{said}");
        said
    }

    /// The processes whose command line names the lab's folder, and the nodes.
    fn processes(&self) -> Vec<String> {
        let folder = self.folder.to_string_lossy().into_owned();
        std::fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| {
                let in_folder = std::fs::read_link(entry.path().join("cwd"))
                    .is_ok_and(|cwd| cwd.starts_with(&self.folder));
                let line = std::fs::read(entry.path().join("cmdline")).ok()?;
                let line = String::from_utf8_lossy(&line).replace('\0', " ");
                (in_folder || line.contains(&folder)).then_some(line)
            })
            .collect()
    }

    /// Waits until the folder and every process in it are gone.
    async fn gone(&self) {
        support::until("the lab to leave nothing behind", async || {
            (!self.folder.exists() && self.processes().is_empty()).then_some(())
        })
        .await;
    }
}

fn lab(folder: &Path, args: &[&str]) -> Output {
    Command::new(PROGRAM)
        .arg("lab")
        .args(args)
        .env("WRITETHROUGH_LAB", folder)
        .output()
        .unwrap()
}

/// Reads until the answer's `Cache-Status` is as wanted.
async fn read_until(client: &ApiClient, wanted: &str) -> support::Answer {
    let path = format!("/items/{SAMPLE}");
    support::until(wanted, async || {
        let answer = client.get(&path).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer
            .header("cache-status")
            .contains(wanted)
            .then_some(answer)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_from_another_terminal_act_and_no_read_is_ever_stale() {
    let testbed = Testbed::new().await.unwrap();
    let lab = Lab::start(&testbed, &["--nodes", "2", "--replica", "--no-prometheus"]).await;
    assert_eq!(lab.urls.len(), 2);
    let (first, second) = (lab.client(0), lab.client(1));
    let path = format!("/items/{SAMPLE}");
    let mut price = 100;
    let mut write = async || {
        price += 1;
        let body = format!(r#"{{"name": "Lamp", "price": {price}}}"#);
        let answer = first.put(&path, &body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        for client in [&first, &second] {
            let read = client.get(&path).await;
            let read_price = read.json()["price"].as_f64().unwrap();
            assert_eq!(read_price, f64::from(price), "{}", read.text());
        }
    };

    read_until(&first, "hit").await;
    read_until(&second, "hit").await;
    let tree = lab.run(&["trace"]);
    assert!(tree.contains("GET /items/{id}"), "{tree}");
    assert!(tree.contains("└─ redis_get"), "{tree}");
    assert!(tree.contains("cache.hit=true"), "{tree}");
    assert!(lab.refused(&["trace", "7"]).contains("32 digits"));

    let rows = lab.run(&["psql", "-At", "-c", "SELECT count(*) FROM items"]);
    assert_eq!(rows.trim(), "3");
    assert_eq!(lab.run(&["redis-cli", "ping"]).trim(), "PONG");
    let keys = lab.run(&["redis-cli", "keys", "item:*"]);
    assert!(keys.contains(&format!("item:{SAMPLE}@")), "{keys}");

    // Old contents come back in three ways. What is read was written last, each time.
    assert!(
        lab.refused(&["restore", "redis"])
            .contains("snapshot redis")
    );
    lab.run(&["snapshot", "redis"]);
    write().await;
    lab.run(&["restore", "redis"]);
    write().await;
    lab.run(&["stop", "redis"]);
    assert!(lab.run(&["stop", "redis"]).contains("is not running"));
    write().await;
    assert!(lab.run(&["status"]).contains("stopped"));
    lab.run(&["start", "redis"]);
    write().await;
    lab.run(&["pause", "redis"]);
    assert!(lab.run(&["status"]).contains("paused"));
    write().await;
    lab.run(&["resume", "redis"]);
    write().await;
    lab.run(&["lag", "redis"]);
    write().await;
    lab.run(&["failover", "redis"]);
    write().await;
    assert!(lab.refused(&["failover", "redis"]).contains("already"));
    read_until(&second, "hit").await;

    lab.run(&["kill", "api-2"]);
    write_while_one_node_is_down(&first).await;
    assert!(lab.run(&["start", "api"]).contains("api-2: started"));
    assert_eq!(second.get(&path).await.status, 200);
    assert!(lab.refused(&["stop", "mysql"]).contains("api-2"));

    let again = lab_up_again(&lab.folder);
    assert!(again.contains("writethrough lab down"), "{again}");
    assert_eq!(lab.run(&["down"]), "");
    lab.gone().await;
    assert!(lab.refused(&["status"]).contains("no lab runs in"));
}

async fn write_while_one_node_is_down(client: &ApiClient) {
    let body = r#"{"name": "Lamp", "price": 7}"#;
    let answer = client.put(&format!("/items/{SAMPLE}"), body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// Starts a second lab in the folder, which must fail with one line.
fn lab_up_again(folder: &Path) -> String {
    let output = lab(folder, &["--listen", "127.0.0.1:0"]);
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

/// The command line of another version may ask for what this lab does not know.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_not_known_is_answered() {
    let testbed = Testbed::new().await.unwrap();
    let lab = Lab::start(&testbed, &["--no-prometheus"]).await;
    for request in [
        "{\"dance\":\"redis\"}\n",
        "{\"change\":[\"dance\",\"redis\"]}\n",
    ] {
        let control = lab.folder.join("control");
        let mut stream = tokio::net::UnixStream::connect(control).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains("another version"), "{answer}");
    }
    lab.run(&["down"]);
    lab.gone().await;
}

#[tokio::test(flavor = "multi_thread")]
#[allow(unsafe_code, reason = "only kill, which touches no memory")]
async fn nothing_is_left_by_ctrl_c_nor_by_a_kill() {
    for signal in [libc::SIGINT, libc::SIGKILL] {
        let testbed = Testbed::new().await.unwrap();
        let lab = Lab::start(&testbed, &["--consistency", "textbook"]).await;
        assert!(lab.run(&["status"]).contains("textbook"));
        let running = lab.processes();
        assert!(running.len() >= 3, "{running:?}");
        let pid = i32::try_from(lab.child.pid().unwrap()).unwrap();
        // SAFETY: no memory is involved; the process is the one that was just started here.
        unsafe { libc::kill(pid, signal) };
        lab.child.wait(PATIENCE).await.unwrap();
        lab.gone().await;
    }
}

#[test]
fn what_is_not_installed_is_named_in_one_line() {
    let folder = std::env::temp_dir().join(format!("lab-without-{}", std::process::id()));
    let output = Command::new(PROGRAM)
        .args(["lab", "--listen", "127.0.0.1:0"])
        .env("WRITETHROUGH_LAB", &folder)
        .env("PATH", "/nonexistent")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("install Debian package"), "{said}");
    assert!(!folder.exists());
}

/// What a shell may hold for other programs: each of these once stopped the lab or its tools.
const OTHERS: [(&str, &str); 13] = [
    ("RUST_LOG", "error"),
    ("LOG_LEVEL", "error"),
    ("LOG_FORMAT", "json"),
    ("DATABASE_POOL_SIZE", "0"),
    ("MAX_IN_FLIGHT", "none"),
    ("CACHE_TTL_SECONDS", "soon"),
    ("OTEL_TRACES_SAMPLER", "never"),
    ("PORT", "none"),
    ("POSTGRES_URL_FILE", "/nonexistent"),
    ("PGOPTIONS", "-c no.such=thing -c nonsense=1"),
    ("PGSERVICE", "nowhere"),
    ("PGSSLMODE", "verify-full"),
    ("REDISCLI_AUTH", "s3cret"),
];

#[tokio::test(flavor = "multi_thread")]
async fn settings_of_other_programs_in_the_shell_reach_neither_the_lab_nor_its_tools() {
    let testbed = Testbed::new().await.unwrap();
    let folder = testbed.folder().join("writethrough-lab");
    let mut spec = ChildSpec::new("lab", PROGRAM)
        .args(["lab", "--listen", "127.0.0.1:0", "--no-prometheus"])
        .env("WRITETHROUGH_LAB", &folder);
    for (name, value) in OTHERS {
        spec = spec.env(name, value);
    }
    let lab = testbed.child(spec).await.unwrap();
    lab.wait_for_log("The lab is ready", PATIENCE)
        .await
        .unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command
            .arg("lab")
            .args(args)
            .env("WRITETHROUGH_LAB", &folder);
        let output = command.envs(OTHERS).output().unwrap();
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(output.status.success(), "{args:?}: {said}");
        said
    };
    assert!(run(&["status"]).contains("mode cached"));
    assert_eq!(run(&["psql", "-Atc", "SELECT 40 + 2"]), "42\n");
    assert_eq!(run(&["redis-cli", "ping"]), "PONG\n");
    for verb in ["stop", "start"] {
        run(&[verb, "api"]);
    }
    assert!(run(&["status"]).contains("mode cached"));
}

#[tokio::test(flavor = "multi_thread")]
async fn they_do_not_reach_the_nodes_of_a_cluster_either() {
    let testbed = Testbed::new().await.unwrap();
    let options = ["--duration", "1s", "--faults", "none", "--processes", "2"];
    let mut spec = ChildSpec::new("check", PROGRAM)
        .args(["check", "--cluster", "nodes=1"])
        .args(options);
    for (name, value) in OTHERS {
        spec = spec.env(name, value);
    }
    let check = testbed.child(spec).await.unwrap();
    let status = check.wait(PATIENCE).await.unwrap();
    assert_eq!(status.code(), Some(0), "{}", check.log().unwrap());
}

#[test]
fn a_folder_for_temporary_files_that_is_not_there_is_named_in_one_line() {
    let folder = std::env::temp_dir().join(format!("lab-no-tmp-{}", std::process::id()));
    let lab: &[&str] = &["lab", "--listen", "127.0.0.1:0"];
    for args in [lab, &["check", "--cluster", "nodes=1"]] {
        let output = Command::new(PROGRAM)
            .args(args)
            .env("WRITETHROUGH_LAB", &folder)
            .env("TMPDIR", "/nonexistent/folder")
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("TMPDIR is /nonexistent/folder"), "{said}");
    }
    assert!(!folder.exists());
}

#[test]
fn a_folder_with_other_files_in_it_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("mine"), "").unwrap();
    for args in [&["--listen", "127.0.0.1:0"][..], &["down"]] {
        let output = lab(folder.path(), args);
        assert_eq!(output.status.code(), Some(2));
        assert!(folder.path().join("mine").exists());
    }
}

#[tokio::test]
async fn health_tells_a_ready_server_from_none() {
    let testbed = Testbed::new().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let spec = ChildSpec::new("api", PROGRAM)
        .args(["serve", "--listen", "127.0.0.1:0"])
        .folder(folder.path());
    let child = testbed.child(spec).await.unwrap();
    let line = child.wait_for_log("listening on", PATIENCE).await.unwrap();
    let (_, address) = line.split_once("http://").unwrap();
    let address = address.split_whitespace().next().unwrap();
    let health = |args: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.arg("health").args(args);
        command.env("LISTEN_ADDR", address).output().unwrap()
    };
    let ready = health(&[]);
    assert!(ready.status.success());
    assert_eq!(ready.stdout, b"200: {\"status\":\"ok\"}\n");
    assert_eq!(health(&["--path", "/nothing"]).status.code(), Some(1));
    child.kill().await.unwrap();
    assert_eq!(health(&[]).status.code(), Some(2));
}
