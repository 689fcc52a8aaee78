//! The page docs/ADOPT.md, followed to the letter in a fresh folder: what it says is built and run as two
//! nodes, and no read goes back while Redis is killed and started again under them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::JoinSet;
use writethrough_testbed::{Child, ChildSpec, Testbed, free_port, until};

const PAGE: &str = include_str!("../../../docs/ADOPT.md");
const PATIENCE: Duration = Duration::from_secs(20);
const PRODUCTS: usize = 4;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

/// The first block of this language after the heading.
fn block(heading: &str, language: &str) -> String {
    let section = PAGE.split_once(&format!("\n## {heading}\n")).unwrap().1;
    let block = section.split_once(&format!("\n```{language}\n")).unwrap().1;
    block.split_once("\n```").unwrap().0.to_owned() + "\n"
}

/// Follows the page in an empty folder, and builds what it says with `change` made to the program. The
/// library is the one of this workspace, until it is published; so are the versions of all crates.
fn build(folder: &Path, heading: &str, change: impl Fn(String) -> String) -> PathBuf {
    let root = workspace();
    let mut manifest = block(heading, "toml");
    manifest.push_str("\n[workspace]\n\n[patch.crates-io]\n");
    for name in ["writethrough", "writethrough-protocol"] {
        let path = root.join("crates").join(name);
        manifest.push_str(&format!("{name} = {{ path = {path:?} }}\n"));
    }
    fs::create_dir_all(folder.join("src")).unwrap();
    fs::write(folder.join("Cargo.toml"), manifest).unwrap();
    fs::write(folder.join("src/main.rs"), change(block(heading, "rust"))).unwrap();
    fs::copy(root.join("Cargo.lock"), folder.join("Cargo.lock")).unwrap();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("adopt");
    let cargo = |more: &[&str]| {
        Command::new(env!("CARGO"))
            .args(["build", "--quiet"])
            .args(more)
            .env("CARGO_TARGET_DIR", &target)
            .env("CARGO_PROFILE_DEV_DEBUG", "false")
            .env("CARGO_INCREMENTAL", "0")
            .current_dir(folder)
            .output()
            .unwrap()
    };
    let mut built = cargo(&["--offline"]);
    if !built.status.success() {
        // A crate that nothing else here needs is not there yet.
        built = cargo(&[]);
    }
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    let name = block(heading, "toml");
    let name = name
        .split_once("name = \"")
        .unwrap()
        .1
        .split_once('"')
        .unwrap()
        .0;
    // Another test may build another program of this name.
    let program = folder.join(name);
    fs::copy(target.join("debug").join(name), &program).unwrap();
    program
}

struct Node {
    url: String,
    _child: Child,
}

async fn start(testbed: &Testbed, program: &Path, name: &str, database: &str, cache: &str) -> Node {
    let addr = format!("127.0.0.1:{}", free_port());
    let child = ChildSpec::new(name, program)
        .env("DATABASE_URL", database)
        .env("REDIS_URL", cache)
        .env("LISTEN_ADDR", &addr);
    let child = testbed.child(child).await.unwrap();
    let url = format!("http://{addr}/products");
    let client = reqwest::Client::new();
    until("the node answers", PATIENCE, || async {
        client.get(format!("{url}/1")).send().await.ok()
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {}", child.log_tail(20)));
    Node { url, _child: child }
}

/// What is known of one product: no read that begins now may return less.
#[derive(Default)]
struct Floor(AtomicI64);

impl Floor {
    /// Says whether a read that began when the floor was `before` went back, and raises the floor.
    fn read(&self, before: i64, found: i64) -> bool {
        self.0.fetch_max(found, Ordering::SeqCst);
        found < before
    }
}

/// What the readers and writers have seen.
#[derive(Default)]
struct Seen {
    floors: [Floor; PRODUCTS],
    reads: AtomicU64,
    writes: AtomicU64,
    went_back: AtomicU64,
    over: AtomicBool,
}

async fn read(seen: Arc<Seen>, urls: Vec<String>, which: usize) {
    let client = reqwest::Client::new();
    for turn in which.. {
        if seen.over.load(Ordering::SeqCst) {
            return;
        }
        let floor = &seen.floors[turn % PRODUCTS];
        let before = floor.0.load(Ordering::SeqCst);
        let url = format!("{}/{}", urls[turn / PRODUCTS % urls.len()], turn % PRODUCTS);
        let Ok(answer) = client.get(url).send().await else {
            continue;
        };
        if !answer.status().is_success() {
            continue;
        }
        let product: Value = answer.json().await.unwrap();
        seen.reads.fetch_add(1, Ordering::SeqCst);
        if floor.read(before, product["cents"].as_i64().unwrap()) {
            seen.went_back.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Writes one product, each time with a higher price. A write whose outcome is unknown may happen later,
/// so each price is written once, and a read of a later one settles it.
async fn write(seen: Arc<Seen>, url: String, product: usize) {
    let client = reqwest::Client::new();
    for cents in 1_i64.. {
        if seen.over.load(Ordering::SeqCst) {
            return;
        }
        let body = json!({"name": "Lamp", "cents": cents}).to_string();
        let put = client
            .put(format!("{url}/{product}"))
            .header("content-type", "application/json")
            .body(body);
        match put.send().await {
            Ok(answer) if answer.status().is_success() => {
                seen.floors[product].0.fetch_max(cents, Ordering::SeqCst);
                seen.writes.fetch_add(1, Ordering::SeqCst);
            }
            // Unknown: it ends before its bound, and nothing else is written meanwhile.
            _ => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Runs two nodes of the program with Redis killed and started again twice; what was seen.
async fn check(heading: &str, change: impl Fn(String) -> String) -> Arc<Seen> {
    let testbed = Testbed::new().await.unwrap();
    let folder = testbed.folder().join("adopt");
    let program = build(&folder, heading, change);
    let (postgres, redis) = (
        testbed.postgres().await.unwrap(),
        testbed.redis().await.unwrap(),
    );
    let (database, cache) = (postgres.url(), redis.url());
    let first = start(&testbed, &program, "first", &database, &cache).await;
    let second = start(&testbed, &program, "second", &database, &cache).await;
    let urls = vec![first.url.clone(), second.url.clone()];
    let seen = Arc::new(Seen::default());
    let mut tasks = JoinSet::new();
    for product in 0..PRODUCTS {
        tasks.spawn(write(seen.clone(), urls[product % 2].clone(), product));
    }
    for which in 0..6 {
        tasks.spawn(read(seen.clone(), urls.clone(), which));
    }
    let progress = async |what: &str, more: u64| {
        let until_reads = seen.reads.load(Ordering::SeqCst) + more;
        let until_writes = seen.writes.load(Ordering::SeqCst) + more / 20;
        until(what, Duration::from_secs(40), || async {
            (seen.reads.load(Ordering::SeqCst) >= until_reads
                && seen.writes.load(Ordering::SeqCst) >= until_writes)
                .then_some(())
        })
        .await
        .unwrap();
    };
    for _ in 0..2 {
        progress("reads and writes with Redis", 1000).await;
        until("products are cached", PATIENCE, || async {
            let keys: Vec<String> = redis.query(&["KEYS", "product:*"]).await.unwrap();
            (!keys.is_empty()).then_some(())
        })
        .await
        .unwrap();
        redis.kill().await.unwrap();
        progress("reads and writes without Redis", 500).await;
        redis.start().await.unwrap();
    }
    progress("reads and writes with Redis again", 1000).await;
    seen.over.store(true, Ordering::SeqCst);
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    seen
}

fn as_written(program: String) -> String {
    program
}

#[tokio::test(flavor = "multi_thread")]
async fn with_sqlx_no_read_goes_back() {
    let seen = check("axum, sqlx and Postgres", as_written).await;
    assert_eq!(
        seen.went_back.load(Ordering::SeqCst),
        0,
        "of {:?}",
        seen.reads
    );
}

/// With tokio-postgres; then with one fault in the program, which the same check must find: the write names
/// another key than the reads.
#[tokio::test(flavor = "multi_thread")]
async fn with_tokio_postgres_no_read_goes_back_and_a_wrong_key_is_found() {
    let heading = "axum and tokio-postgres";
    let seen = check(heading, as_written).await;
    assert_eq!(
        seen.went_back.load(Ordering::SeqCst),
        0,
        "of {:?}",
        seen.reads
    );
    let wrong_key = |program: String| {
        let wrong = program.replace("write(PRODUCT.key(id))", "write(PRODUCT.key(id + 100))");
        assert_ne!(program, wrong);
        wrong
    };
    let seen = check(heading, wrong_key).await;
    assert_ne!(
        seen.went_back.load(Ordering::SeqCst),
        0,
        "of {:?}",
        seen.reads
    );
}

#[test]
fn the_programs_of_the_page_have_at_most_80_lines() {
    for heading in ["axum, sqlx and Postgres", "axum and tokio-postgres"] {
        let lines = block(heading, "rust").lines().count();
        assert!(lines <= 80, "{heading}: {lines}");
    }
}
