//! Child processes can be watched, paused, ended and started again.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::time::Duration;

use writethrough_testbed::{Child, ChildSpec, Error, Testbed, until};

const BOUND: Duration = Duration::from_secs(5);

fn shell(script: &str) -> ChildSpec {
    ChildSpec::new("node", "sh").args(["-c", script])
}

/// How many lines the child has written.
fn lines(child: &Child) -> usize {
    child.log().unwrap().lines().count()
}

async fn wait_for_more(child: &Child) {
    let before = lines(child);
    until("another line", BOUND, || async {
        (lines(child) > before).then_some(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_paused_child_does_nothing_until_it_is_resumed() {
    let testbed = Testbed::new().await.unwrap();
    // It waits without another process. A shell that has just begun one by vfork, and is stopped together
    // with it, is in the kernel until that one goes on, and is not seen to be stopped.
    let ticks = "exec 3<> <(:); while :; do echo tick; read -t 0.01 -u 3; done";
    let ticks = ChildSpec::new("node-1", "bash").args(["-c", ticks]);
    let child = testbed.child(ticks).await.unwrap();
    wait_for_more(&child).await;

    child.pause().await.unwrap();
    let paused = lines(&child);
    let more = tokio::time::timeout(Duration::from_millis(200), wait_for_more(&child)).await;
    assert!(more.is_err());
    assert_eq!(lines(&child), paused);
    assert!(child.is_running());

    child.resume().await.unwrap();
    wait_for_more(&child).await;
}

#[tokio::test]
async fn a_child_ends_by_request_or_by_force_and_starts_again() {
    let testbed = Testbed::new().await.unwrap();
    let script = "trap 'echo bye; exit 3' TERM; echo $GREETING $0; while :; do sleep 0.01; done";
    let child = testbed
        .child(shell(script).arg("arg").env("GREETING", "hello"))
        .await
        .unwrap();
    assert_eq!(child.name(), "node-1");
    assert_eq!(
        child.wait_for_log("hello", BOUND).await.unwrap(),
        "hello arg"
    );
    assert!(matches!(child.start().await, Err(Error::Misuse(_))));

    assert_eq!(child.terminate(BOUND).await.unwrap().code(), Some(3));
    assert_eq!(child.log_tail(1), "bye");
    assert!(!child.is_running());

    child.start().await.unwrap();
    child.wait_for_log("hello", BOUND).await.unwrap();
    let pid = child.pid().unwrap();
    child.restart().await.unwrap();
    assert_ne!(child.pid().unwrap(), pid);
    child.wait_for_log("hello", BOUND).await.unwrap();
    child.kill().await.unwrap();
    assert_eq!(child.ended_by_signal(), Some(9));
    assert_eq!(child.log().unwrap().matches("hello").count(), 3);
}

#[tokio::test]
async fn errors_carry_the_end_of_the_log() {
    let testbed = Testbed::new().await.unwrap();
    let child = testbed
        .child(shell("echo no such port; exit 1"))
        .await
        .unwrap();
    let error = child
        .wait_for_log("listening", BOUND)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("exit code 1") && error.contains("no such port"),
        "{error}"
    );

    let child = testbed
        .child(shell("trap '' TERM; echo deaf; sleep 100"))
        .await
        .unwrap();
    child.wait_for_log("deaf", BOUND).await.unwrap();
    let error = child
        .terminate(Duration::from_millis(100))
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("node-2") && error.contains("deaf"),
        "{error}"
    );
    assert!(child.is_running());

    let missing = testbed
        .child(ChildSpec::new("node", "/no/such/program"))
        .await
        .unwrap_err();
    assert!(missing.to_string().contains("start node-3"), "{missing}");
}
