//! The embedded store as processes meet it: one file, one process, whatever the file is called.

#![allow(clippy::unwrap_used)]

#[path = "../../writethrough-service/tests/support/mod.rs"]
mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use support::ApiClient;
use writethrough_testbed::{Child, ChildSpec, Testbed};

const PROGRAM: &str = env!("CARGO_BIN_EXE_writethrough");
const PATIENCE: Duration = Duration::from_secs(20);

fn folder(testbed: &Testbed) -> PathBuf {
    tempfile::tempdir_in(testbed.folder()).unwrap().keep()
}

/// Starts the program in `folder` on a free port; it may refuse to start.
async fn run(testbed: &Testbed, folder: &Path, database: &str) -> Child {
    let spec = ChildSpec::new("api", PROGRAM)
        .args(["--database", database])
        .folder(folder)
        .env("LISTEN_ADDR", "127.0.0.1:0");
    testbed.child(spec).await.unwrap()
}

async fn serving(testbed: &Testbed, folder: &Path, database: &str) -> (Child, ApiClient) {
    let node = run(testbed, folder, database).await;
    let listening = node.wait_for_log("listening on", PATIENCE).await;
    let line = listening.unwrap_or_else(|error| panic!("{database}: {error}"));
    let url = line.split("listening on ").nth(1).unwrap();
    let url = url.split(' ').next().unwrap().to_owned();
    (node, ApiClient::new(url))
}

/// Starts the program, which must refuse: returns the one line that it says.
async fn refused(testbed: &Testbed, folder: &Path, database: &str) -> String {
    let node = run(testbed, folder, database).await;
    let status = node.wait(PATIENCE).await;
    let said = node.log().unwrap();
    let status = status.unwrap_or_else(|error| panic!("{database}: {error}: {said}"));
    assert_eq!(status.code(), Some(2), "{database}: {said}");
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("error")).collect();
    assert_eq!(lines.len(), 1, "{database}: {said}");
    lines[0].to_owned()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// SQLite finds locks and log by the name it is given (and by what a URI means), so a lock beside
/// the name is no lock on the file: two processes with two caches would serve one table.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_is_refused_however_it_calls_the_database_file() {
    let testbed = Testbed::new().await.unwrap();
    let folder = folder(&testbed);
    let absolute = folder.join("shop.db").display().to_string();
    fs::create_dir(folder.join("x")).unwrap();
    symlink(".", folder.join("here")).unwrap();
    symlink("shop.db", folder.join("link.db")).unwrap();
    symlink("link.db", folder.join("link to link.db")).unwrap();
    let aliases = [
        "sqlite:shop.db".to_owned(),
        "sqlite:./x/../shop.db".to_owned(),
        "sqlite:here/shop.db".to_owned(),
        "sqlite:link.db".to_owned(),
        "sqlite:link%20to%20link.db".to_owned(),
        "sqlite:hard.db".to_owned(),
        "sqlite://shop.db".to_owned(),
        "sqlite:shop%2Edb".to_owned(),
        "sqlite:shop.db?mode=rwc".to_owned(),
        "sqlite:file:shop.db".to_owned(),
        "sqlite:file:./here/link.db?mode=rwc".to_owned(),
        format!("sqlite:{absolute}"),
        format!("sqlite://{absolute}"),
        format!("sqlite:file://{absolute}"),
        format!("sqlite:file://localhost{absolute}"),
    ];
    // The owner came by the plain name, by a link (which did not lead anywhere yet) or by a URI.
    for owner in ["sqlite:link.db", "sqlite:shop.db", "sqlite:file:shop.db"] {
        let (node, client) = serving(&testbed, &folder, owner).await;
        if !folder.join("hard.db").exists() {
            fs::hard_link(folder.join("shop.db"), folder.join("hard.db")).unwrap();
        }
        client.create("Kept").await;
        let before = names(&folder);
        for alias in &aliases {
            let said = refused(&testbed, &folder, alias).await;
            assert!(
                said.contains("in use by another process"),
                "{alias}: {said}"
            );
        }
        assert_eq!(names(&folder), before, "refusing leaves no file behind");
        node.terminate(PATIENCE).await.unwrap();
    }
    // The next owner may call it as it likes.
    let (node, client) = serving(&testbed, &folder, &aliases[3]).await;
    assert_eq!(client.get("/items").await.json()["count"], 6);
    node.terminate(PATIENCE).await.unwrap();
}

/// A database in memory belongs to one connection. One for each connection would take writes that
/// no read finds.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_in_memory_is_one_database_however_it_is_written() {
    let testbed = Testbed::new().await.unwrap();
    for database in [
        "sqlite::memory:",
        "sqlite://:memory:",
        "sqlite:///:memory:",
        "sqlite:file::memory:",
        "sqlite:file::memory:?cache=shared",
        "sqlite:file:x?mode=memory",
        "sqlite:file:x?mode=memory&cache=shared",
        "sqlite:x?mode=memory",
    ] {
        let folder = folder(&testbed);
        let (node, client) = serving(&testbed, &folder, database).await;
        let path = client.create("Kept").await;
        assert_eq!(client.get(&path).await.status, 200, "{database}");
        // A page is read from the store the first time.
        assert_eq!(client.get("/items").await.json()["count"], 4, "{database}");
        assert_eq!(names(&folder), [""; 0], "{database}");
        node.terminate(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_made_under_the_name_that_its_address_means() {
    let testbed = Testbed::new().await.unwrap();
    for (database, file) in [
        ("sqlite:shop.db?mode=rwc", "shop.db"),
        ("sqlite://shop.db?mode=rwc", "shop.db"),
        ("sqlite:file:shop.db?mode=rwc&cache=private", "shop.db"),
        ("sqlite:my%20shop.db", "my shop.db"),
        ("sqlite:file:my%20shop%3f.db", "my shop?.db"),
        ("sqlite:./12:30.db", "12:30.db"),
    ] {
        let folder = folder(&testbed);
        let (node, client) = serving(&testbed, &folder, database).await;
        let path = client.create("Kept").await;
        assert_eq!(client.get(&path).await.status, 200, "{database}");
        node.terminate(PATIENCE).await.unwrap();
        assert_eq!(names(&folder), [file], "{database}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_cannot_be_honoured_is_refused_by_name_and_makes_no_file() {
    let testbed = Testbed::new().await.unwrap();
    for (database, reason) in [
        ("sqlite:shop.db?mode=ro", "mode=ro"),
        ("sqlite:file:shop.db?mode=ro", "mode=ro"),
        ("sqlite:shop.db?mode=rw", "mode=rw"),
        ("sqlite:shop.db?mode=", "mode"),
        ("sqlite:shop.db?cache=shared", "cache=shared"),
        ("sqlite:shop.db?immutable=1", "immutable"),
        ("sqlite:shop.db?vfs=unix-none", "vfs"),
        ("sqlite:shop.db?_journal_mode=WAL", "unknown option"),
        ("sqlite:?mode=rwc", "path"),
        ("sqlite://", "path"),
        ("sqlite:file:", "path"),
        ("sqlite:file://shop.db", "file:///"),
        ("sqlite:shop.db#main", "%23"),
        ("sqlite:shop.db%00", "%00"),
        ("sqlite:./:memory:", ":memory:"),
        ("sqlite:memory:", "sqlite::memory:"),
        (
            "sqlite:sqlite:shop.db",
            "write `./` before a name with a colon",
        ),
        (
            "sqlite:postgres://h/d",
            "write `./` before a name with a colon",
        ),
        ("sqlite:shop/", "folder"),
        ("sqlite:.", "folder"),
        ("sqlite:/dev/null", "not a file"),
    ] {
        let folder = folder(&testbed);
        let said = refused(&testbed, &folder, database).await;
        assert!(said.contains("--database"), "{database}: {said}");
        assert!(said.contains(reason), "{database}: {said}");
        assert_eq!(names(&folder), [""; 0], "{database}");
    }
}
