//! Every fault of a link does what its documentation says.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use writethrough_testbed::{Link, Testbed, until};

/// A wait that must not come true.
const SILENCE: Duration = Duration::from_millis(100);
const BOUND: Duration = Duration::from_secs(5);

/// A server that answers every byte with `answer`, and ends a connection whose client has ended it.
async fn server(answer: u8) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                while stream.read_u8().await.is_ok() {
                    if stream.write_u8(answer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    addr
}

async fn bed(answer: u8) -> (Testbed, Link) {
    let testbed = Testbed::new().await.unwrap();
    let link = testbed.link(server(answer).await).await.unwrap();
    (testbed, link)
}

async fn ask(stream: &mut TcpStream) -> std::io::Result<u8> {
    stream.write_u8(b'?').await?;
    tokio::time::timeout(BOUND, stream.read_u8())
        .await
        .expect("an answer or an end")
}

async fn silent(stream: &mut TcpStream) -> bool {
    tokio::time::timeout(SILENCE, stream.read_u8())
        .await
        .is_err()
}

#[tokio::test]
async fn a_slow_link_carries_so_many_bytes_a_second_until_it_is_healed() {
    let (_testbed, link) = bed(b'a').await;
    let mut stream = TcpStream::connect(link.addr()).await.unwrap();
    assert_eq!(ask(&mut stream).await.unwrap(), b'a');
    link.slow_down(500);
    let started = Instant::now();
    stream.write_all(&[b'?'; 100]).await.unwrap();
    let mut answers = [0; 100];
    stream.read_exact(&mut answers).await.unwrap();
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(200), "{took:?}");
    assert!(took < BOUND, "{took:?}");
    link.slow_down(1);
    stream.write_all(&[b'?'; 100]).await.unwrap();
    assert!(silent(&mut stream).await);
    link.heal();
    let rest = tokio::time::timeout(BOUND, stream.read_exact(&mut answers)).await;
    rest.expect("healed").unwrap();
}

#[tokio::test]
async fn a_cut_link_resets_old_and_new_connections_until_it_is_healed() {
    let (_testbed, link) = bed(b'a').await;
    let mut old = TcpStream::connect(link.addr()).await.unwrap();
    assert_eq!(ask(&mut old).await.unwrap(), b'a');

    link.cut();
    assert!(ask(&mut old).await.is_err());
    if let Ok(mut new) = TcpStream::connect(link.addr()).await {
        assert!(ask(&mut new).await.is_err());
    }
    until("no connection", BOUND, || async {
        (link.counts().open == 0).then_some(())
    })
    .await
    .unwrap();

    link.heal();
    let mut new = TcpStream::connect(link.addr()).await.unwrap();
    assert_eq!(ask(&mut new).await.unwrap(), b'a');
    let counts = link.counts();
    assert_eq!((counts.accepted, counts.open), (2, 1));
    assert_eq!((counts.to_target_bytes, counts.to_client_bytes), (2, 2));
}

#[tokio::test]
async fn a_stalled_link_holds_bytes_and_ends_and_then_passes_them_in_order() {
    let (_testbed, link) = bed(b'a').await;
    let mut old = TcpStream::connect(link.addr()).await.unwrap();
    assert_eq!(ask(&mut old).await.unwrap(), b'a');

    link.stall();
    let before = link.counts();
    old.write_all(b"???").await.unwrap();
    old.shutdown().await.unwrap();
    let mut new = TcpStream::connect(link.addr()).await.unwrap();
    new.write_u8(b'?').await.unwrap();
    assert!(silent(&mut old).await && silent(&mut new).await);
    assert_eq!(link.counts().to_target_bytes, before.to_target_bytes);

    link.heal();
    let mut rest = Vec::new();
    tokio::time::timeout(BOUND, old.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(rest, b"aaa");
    assert_eq!(new.read_u8().await.unwrap(), b'a');
}

#[tokio::test]
async fn replies_are_held_back_while_requests_pass_and_lost_when_the_link_is_cut() {
    let (_testbed, link) = bed(b'a').await;
    let mut stream = TcpStream::connect(link.addr()).await.unwrap();
    assert_eq!(ask(&mut stream).await.unwrap(), b'a');

    link.stall_replies();
    stream.write_u8(b'?').await.unwrap();
    until("the request", BOUND, || async {
        (link.counts().to_target_bytes == 2).then_some(())
    })
    .await
    .unwrap();
    assert!(silent(&mut stream).await);
    link.cut();
    let end = tokio::time::timeout(BOUND, stream.read_u8()).await.unwrap();
    assert!(end.is_err());
    assert_eq!(link.counts().to_client_bytes, 1);
}

#[tokio::test]
async fn a_slow_link_delays_each_direction_and_keeps_its_throughput() {
    let (_testbed, link) = bed(b'a').await;
    let mut stream = TcpStream::connect(link.addr()).await.unwrap();
    let delay = Duration::from_millis(50);
    link.delay(delay);
    let start = Instant::now();
    assert_eq!(ask(&mut stream).await.unwrap(), b'a');
    assert!(start.elapsed() >= 2 * delay);

    // What is under way at the same time is late once, not once each.
    let start = Instant::now();
    for _ in 0..20 {
        stream.write_u8(b'?').await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut answers = [0; 20];
    stream.read_exact(&mut answers).await.unwrap();
    assert!(start.elapsed() < 20 * delay);

    // Healing ends a delay that is under way.
    link.delay(Duration::from_secs(60));
    stream.write_u8(b'?').await.unwrap();
    assert!(silent(&mut stream).await);
    link.heal();
    assert_eq!(
        tokio::time::timeout(BOUND, stream.read_u8())
            .await
            .unwrap()
            .unwrap(),
        b'a'
    );
}

#[tokio::test]
async fn a_retargeted_link_leads_elsewhere() {
    let (testbed, link) = bed(b'a').await;
    let mut old = TcpStream::connect(link.addr()).await.unwrap();
    assert_eq!(ask(&mut old).await.unwrap(), b'a');

    link.retarget(server(b'b').await);
    assert!(ask(&mut old).await.is_err());
    let mut new = TcpStream::connect(link.addr()).await.unwrap();
    assert_eq!(ask(&mut new).await.unwrap(), b'b');

    link.reset();
    assert!(ask(&mut new).await.is_err());

    // A target that refuses is passed on as a reset, and a dropped testbed closes its links.
    link.retarget("127.0.0.1:1".parse().unwrap());
    let mut refused = TcpStream::connect(link.addr()).await.unwrap();
    assert!(ask(&mut refused).await.is_err());
    drop(testbed);
    until("the port to close", BOUND, || async {
        TcpStream::connect(link.addr()).await.is_err().then_some(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_megabyte_passes_unchanged_both_ways() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let testbed = Testbed::new().await.unwrap();
    let link = testbed.link(listener.local_addr().unwrap()).await.unwrap();
    let echo = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut from, mut to) = stream.split();
        tokio::io::copy(&mut from, &mut to).await.unwrap();
    });
    let sent: Vec<u8> = (0..3_000_000_u32)
        .map(|number| (number / 7) as u8)
        .collect();
    let mut stream = TcpStream::connect(link.addr()).await.unwrap();
    let (mut from, mut to) = stream.split();
    let mut received = Vec::new();
    let write = async {
        to.write_all(&sent).await.unwrap();
        to.shutdown().await.unwrap();
    };
    let ((), read) = tokio::join!(write, from.read_to_end(&mut received));
    read.unwrap();
    assert!(received == sent);
    echo.await.unwrap();
}
