//! Nothing survives the process that owns a testbed, however it ends.
//!
//! The owner is this test program again, run with one test that then starts a testbed and never ends.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may")]

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use writethrough_testbed::{ChildSpec, Error, Testbed, until};

const BOUND: Duration = Duration::from_secs(20);

/// Not a test: the owner that the tests of this file kill. Ends at once unless they run it.
#[test]
fn owner() {
    let Some(folder) = std::env::var_os("OWNER_FOLDER") else {
        return;
    };
    // The servers are started on a runtime whose threads end, which must not end the servers.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (testbed, _servers, pids) = runtime.block_on(async {
        let testbed = Testbed::in_folder(folder).await.unwrap();
        let postgres = testbed.postgres().await.unwrap();
        let redis = testbed.redis().await.unwrap();
        let replica = testbed.redis_replica_of(&redis).await.unwrap();
        let spec = ChildSpec::new("node", "sh").args(["-c", "sleep 1000 & echo started; wait"]);
        let child = testbed.child(spec).await.unwrap();
        child.wait_for_log("started", BOUND).await.unwrap();
        // What is paused must end, too.
        let paused = testbed.redis().await.unwrap();
        paused.pause().await.unwrap();
        let paused_postgres = testbed.postgres().await.unwrap();
        paused_postgres.pause().await.unwrap();
        let servers = (postgres, redis, replica, child, paused, paused_postgres);
        let pids = [
            servers.0.pid(),
            servers.1.pid(),
            servers.2.pid(),
            servers.3.pid(),
            servers.4.pid(),
            servers.5.pid(),
        ];
        (testbed, servers, pids)
    });
    drop(runtime);
    let pids: Vec<u32> = pids.into_iter().flatten().collect();
    println!("\nready {} {pids:?}", testbed.folder().display());
    loop {
        std::thread::park();
    }
}

/// An owner that has started everything.
struct Owner {
    process: Child,
    folder: PathBuf,
    /// Every process that it has started, directly or not.
    offspring: Vec<u32>,
    reaper: u32,
}

impl Owner {
    #[allow(unsafe_code, reason = "pre_exec, for calls that are async-signal-safe")]
    fn start() -> Self {
        let name = format!("testbed-survival-{:08x}", fastrand::u32(..));
        let folder = std::env::temp_dir().join(name);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "owner", "--nocapture"])
            .env("OWNER_FOLDER", &folder)
            .env_remove("WRITETHROUGH_TESTBED_KEEP")
            .stdout(Stdio::piped());
        // SAFETY: prctl is async-signal-safe. This test must not leave its owner behind, either.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let mut process = command.spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let ready = output
            .lines()
            .map(Result::unwrap)
            .find(|line| line.starts_with("ready "));
        assert!(ready.is_some(), "the owner did not get ready");
        let offspring = descendants(process.id());
        let reaper = offspring
            .iter()
            .copied()
            .find(|pid| is_reaper(*pid))
            .unwrap();
        // Two Postgres servers of several processes each, three Redis, a shell, its sleep, the reaper.
        assert!(offspring.len() > 2 * 5 + 3 + 2, "{offspring:?}");
        Self {
            process,
            folder,
            offspring,
            reaper,
        }
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Owner {
    /// Ends what the test has found alive, or what only the reaper would have ended.
    fn drop(&mut self) {
        let segments = shared_memory(&self.folder);
        for pid in self
            .offspring
            .iter()
            .chain([&self.process.id()])
            .filter(|pid| runs(**pid))
        {
            kill(*pid);
        }
        let _ = self.process.wait();
        for id in segments {
            let _ = Command::new("ipcrm").args(["-m", &id]).status();
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Kills a process, if it is there still.
fn kill(pid: u32) {
    let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL);
}

fn descendants(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children
            .split_whitespace()
            .map(|child| child.parse().unwrap())
        {
            found.push(child);
            found.extend(descendants(child));
        }
    }
    found
}

fn is_reaper(pid: u32) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.windows(14).any(|bytes| bytes == b"testbed-reaper")
}

/// Whether a process runs; one that nobody has waited for does not.
fn runs(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').unwrap().1.starts_with(" Z"))
}

async fn wait_gone(pids: &[u32]) {
    until(&format!("the end of {pids:?}"), BOUND, || async {
        (!pids.iter().any(|pid| runs(*pid))).then_some(())
    })
    .await
    .unwrap();
}

/// The ids of the shared memory segments of the Postgres servers in a folder.
fn shared_memory(folder: &Path) -> Vec<String> {
    let servers = std::fs::read_dir(folder).into_iter().flatten().flatten();
    servers
        .filter_map(|server| {
            std::fs::read_to_string(server.path().join("data/postmaster.pid")).ok()
        })
        .filter_map(|file| Some(file.lines().nth(6)?.split_whitespace().nth(1)?.to_owned()))
        .collect()
}

#[tokio::test]
async fn nothing_survives_a_killed_owner() {
    let mut owner = Owner::start();
    let segments = shared_memory(&owner.folder);
    assert_eq!(segments.len(), 2);
    owner.kill();
    wait_gone(&owner.offspring).await;
    assert!(!owner.folder.exists());
    let left = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
    for line in left.lines().skip(1) {
        let id = line.split_whitespace().nth(1).unwrap();
        assert!(
            !segments.iter().any(|segment| segment == id),
            "segment {id} is left"
        );
    }
}

#[tokio::test]
async fn every_server_dies_with_its_owner_even_without_the_reaper() {
    let mut owner = Owner::start();
    kill(owner.reaper);
    let direct: Vec<u32> = owner
        .offspring
        .iter()
        .copied()
        .filter(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            let parent = stat
                .rsplit_once(')')
                .unwrap()
                .1
                .split_whitespace()
                .nth(1)
                .unwrap();
            parent == owner.process.id().to_string()
        })
        .collect();
    assert_eq!(direct.len(), 6 + 1);
    owner.kill();
    wait_gone(&direct).await;
}

#[tokio::test]
async fn a_dropped_testbed_is_gone_at_once_with_its_folder() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let spec = ChildSpec::new("node", "sh").args(["-c", "sleep 1000 & echo $!; wait"]);
    let child = testbed.child(spec).await.unwrap();
    let grandchild = until("a grandchild", BOUND, || async {
        child.log().unwrap().trim().parse::<u32>().ok()
    })
    .await
    .unwrap();
    let pids = [redis.pid().unwrap(), child.pid().unwrap()];
    let folder = testbed.folder().to_owned();
    drop(testbed);
    assert!(!pids.iter().any(|pid| runs(*pid)));
    assert!(!folder.exists());
    wait_gone(&[grandchild]).await;
}

#[tokio::test]
async fn a_folder_with_files_is_refused_and_left_alone() {
    let folder = std::env::temp_dir().join(format!("testbed-full-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("precious"), "data").unwrap();
    let refused = Testbed::in_folder(&folder).await;
    let kept = std::fs::read_to_string(folder.join("precious")).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(matches!(refused, Err(Error::Misuse(_))));
    assert_eq!(kept, "data");
}

#[test]
fn futures_can_be_sent_to_another_thread() {
    fn sendable<T: Send>(_: T) {}
    #[allow(dead_code, reason = "only its types matter")]
    async fn types(testbed: &'static Testbed) {
        let (postgres, redis) = (
            testbed.postgres().await.unwrap(),
            testbed.redis().await.unwrap(),
        );
        let child = testbed.child(ChildSpec::new("node", "sh")).await.unwrap();
        redis.restart_empty().await.unwrap();
        redis.replicate(&redis).await.unwrap();
        postgres.restart().await.unwrap();
        postgres.terminate_connections().await.unwrap();
        child.wait_for_log("x", BOUND).await.unwrap();
        child.terminate(BOUND).await.unwrap();
    }
    let _ = |testbed: &'static Testbed| sendable(types(testbed));
}
