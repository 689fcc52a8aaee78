//! A TCP link that can be cut, stalled, slowed down and led elsewhere.
//!
//! A link sits between one client and one server, so that a test can take the network away from one
//! node only. It moves bytes and understands none of them.
//!
//! A byte is forwarded under the lock that guards the link's state. Hence a fault is exact: when the
//! call that causes it returns, no further byte passes.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::error::{Error, Result};

/// How much one direction of a connection holds back before it stops reading from the sender.
const HOLD_BYTES: usize = 1024 * 1024;

/// How long a link waits after it could not accept a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// A port of 127.0.0.1 whose connections lead to another address.
///
/// A clone is another handle of the same link. The link closes with its testbed, or with the tokio
/// runtime that it was opened on.
#[derive(Debug, Clone)]
pub struct Link {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    addr: SocketAddr,
    state: watch::Sender<State>,
    /// Held while bytes are forwarded and while the state changes.
    passing: Mutex<()>,
    counters: Counters,
    listening: Mutex<Option<AbortHandle>>,
}

#[derive(Debug, Default)]
struct Counters {
    accepted: AtomicU64,
    open: AtomicU64,
    to_target_bytes: AtomicU64,
    to_client_bytes: AtomicU64,
}

/// What a link has carried since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkCounts {
    /// Connections accepted, those refused by a cut link not included.
    pub accepted: u64,
    /// Connections open now.
    pub open: u64,
    /// Bytes forwarded from clients to the target.
    pub to_target_bytes: u64,
    /// Bytes forwarded from the target to clients.
    pub to_client_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct State {
    target: SocketAddr,
    cut: bool,
    hold_requests: bool,
    hold_replies: bool,
    delay: Duration,
    /// Bytes a second that each direction of a connection carries, if that is bounded.
    speed: Option<u32>,
    /// Grows when all connections are to be closed; each knows the number it was made under.
    generation: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToTarget,
    ToClient,
}

impl State {
    fn holds(&self, direction: Direction) -> bool {
        match direction {
            Direction::ToTarget => self.hold_requests,
            Direction::ToClient => self.hold_replies,
        }
    }
}

impl Link {
    pub(crate) async fn open(target: SocketAddr) -> Result<Self> {
        let action = "open a port for a link";
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .map_err(Error::io(action))?;
        let addr = listener.local_addr().map_err(Error::io(action))?;
        let state = State {
            target,
            cut: false,
            hold_requests: false,
            hold_replies: false,
            delay: Duration::ZERO,
            speed: None,
            generation: 0,
        };
        let shared = Arc::new(Shared {
            addr,
            state: watch::Sender::new(state),
            passing: Mutex::default(),
            counters: Counters::default(),
            listening: Mutex::default(),
        });
        let listening = tokio::spawn(listen(listener, shared.clone()));
        *shared.listening.lock() = Some(listening.abort_handle());
        Ok(Self { shared })
    }

    /// The address that clients connect to.
    pub fn addr(&self) -> SocketAddr {
        self.shared.addr
    }

    /// The address that new connections lead to.
    pub fn target(&self) -> SocketAddr {
        self.shared.state.borrow().target
    }

    /// The same URL, with this link's address in place of the host and port.
    pub fn url_for(&self, url: &str) -> String {
        let start = url.find("://").map_or(0, |at| at + 3);
        let (before, after) = url.split_at(start);
        let (authority, rest) = after.split_at(after.find(['/', '?', '#']).unwrap_or(after.len()));
        let user = authority.rfind('@').map_or("", |at| &authority[..=at]);
        format!("{before}{user}{}{rest}", self.addr())
    }

    /// Cuts the link: open connections are reset, and so are new ones as soon as they are made.
    ///
    /// Bytes that were held back are lost. No byte passes after this returns; clients may see the reset
    /// a moment later.
    pub fn cut(&self) {
        self.change(|state| {
            state.cut = true;
            state.generation += 1;
        });
    }

    /// Resets the open connections, and goes on with new ones.
    pub fn reset(&self) {
        self.change(|state| state.generation += 1);
    }

    /// Stalls the link: bytes are accepted and held back, both ways, and so is the end of a connection.
    /// New connections are accepted, and reach the target when the link is healed.
    ///
    /// No byte passes after this returns. At most 1 MiB is held in each direction of a connection, and
    /// whatever the kernel's buffers take.
    pub fn stall(&self) {
        self.change(|state| {
            state.hold_requests = true;
            state.hold_replies = true;
        });
    }

    /// Holds back what the target sends, while requests pass: commands are carried out, and their
    /// replies are late, or lost when the link is then cut.
    pub fn stall_replies(&self) {
        self.change(|state| {
            state.hold_requests = false;
            state.hold_replies = true;
        });
    }

    /// Delays every byte that arrives from now on, in each direction; a round trip takes twice that.
    pub fn delay(&self, delay: Duration) {
        self.change(|state| state.delay = delay);
    }

    /// Lets each direction of a connection carry so many bytes a second, from now on.
    pub fn slow_down(&self, bytes_per_second: u32) {
        self.change(|state| state.speed = Some(bytes_per_second.max(1)));
    }

    /// Ends every fault: the bytes that were held back pass, in order, and new bytes without delay.
    pub fn heal(&self) {
        self.change(|state| {
            state.cut = false;
            state.hold_requests = false;
            state.hold_replies = false;
            state.delay = Duration::ZERO;
            state.speed = None;
        });
    }

    /// Leads new connections to another address, and resets the open ones. Faults stay as they are.
    pub fn retarget(&self, target: SocketAddr) {
        self.change(|state| {
            state.target = target;
            state.generation += 1;
        });
    }

    /// What the link has carried so far.
    pub fn counts(&self) -> LinkCounts {
        let counters = &self.shared.counters;
        LinkCounts {
            accepted: counters.accepted.load(Relaxed),
            open: counters.open.load(Relaxed),
            to_target_bytes: counters.to_target_bytes.load(Relaxed),
            to_client_bytes: counters.to_client_bytes.load(Relaxed),
        }
    }

    /// Closes the link for good.
    pub(crate) fn close(&self) {
        self.cut();
        if let Some(listening) = self.shared.listening.lock().take() {
            listening.abort();
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let _passing = self.shared.passing.lock();
        self.shared.state.send_modify(change);
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((client, _)) = listener.accept().await else {
            // The listener is sound, but this process may be out of descriptors for a while.
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let state = *shared.state.borrow();
        if state.cut {
            let _ = client.set_zero_linger();
            continue;
        }
        shared.counters.accepted.fetch_add(1, Relaxed);
        shared.counters.open.fetch_add(1, Relaxed);
        let shared = shared.clone();
        tokio::spawn(async move {
            // Counted down however the task ends.
            let _open = Open(shared.clone());
            serve(client, state.generation, &shared).await;
        });
    }
}

struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.counters.open.fetch_sub(1, Relaxed);
    }
}

/// Carries one connection until it ends or is reset.
async fn serve(mut client: TcpStream, generation: u64, shared: &Shared) {
    let mut state = shared.state.subscribe();
    let mut closing = shared.state.subscribe();
    let closed = async move {
        let _ = closing
            .wait_for(|state| state.generation != generation)
            .await;
    };
    tokio::pin!(closed);

    let connect = async {
        let target = state
            .wait_for(|state| !state.hold_requests)
            .await
            .ok()?
            .target;
        TcpStream::connect(target).await.ok()
    };
    let connected = tokio::select! {
        connected = connect => connected,
        () = &mut closed => None,
    };
    let Some(mut target) = connected else {
        let _ = client.set_zero_linger();
        return;
    };
    let _ = client.set_nodelay(true);
    let _ = target.set_nodelay(true);

    let orderly = {
        let (client_in, client_out) = client.split();
        let (target_in, target_out) = target.split();
        let requests = Pump::new(shared, Direction::ToTarget, generation);
        let replies = Pump::new(shared, Direction::ToClient, generation);
        let both = async {
            tokio::try_join!(
                requests.run(client_in, target_out),
                replies.run(target_in, client_out)
            )
        };
        tokio::select! {
            ended = both => ended.is_ok(),
            () = &mut closed => false,
        }
    };
    if !orderly {
        let _ = client.set_zero_linger();
        let _ = target.set_zero_linger();
    }
}

/// One direction of a connection.
struct Pump<'a> {
    shared: &'a Shared,
    direction: Direction,
    generation: u64,
    held: Mutex<Held>,
    arrived: Notify,
    left: Notify,
}

/// What has arrived and was not forwarded yet.
#[derive(Default)]
struct Held {
    /// Each piece with the moment from which it may pass.
    pieces: VecDeque<(Instant, Piece)>,
    bytes: usize,
}

/// What can arrive. The end of a connection waits its turn like any byte: a partition hides it, too.
enum Piece {
    Bytes(Vec<u8>),
    End,
    Reset,
}

impl<'a> Pump<'a> {
    fn new(shared: &'a Shared, direction: Direction, generation: u64) -> Self {
        Pump {
            shared,
            direction,
            generation,
            held: Mutex::default(),
            arrived: Notify::new(),
            left: Notify::new(),
        }
    }

    async fn run(&self, from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> std::io::Result<()> {
        let ((), passed) = tokio::join!(self.take(from), self.pass(&mut to));
        passed
    }

    /// Takes in what arrives.
    async fn take(&self, mut from: ReadHalf<'_>) {
        use tokio::io::AsyncReadExt;
        let mut buffer = vec![0; 16 * 1024];
        // When the last piece will have passed, at the speed that is allowed.
        let mut passed = Instant::now();
        loop {
            while self.held.lock().bytes >= HOLD_BYTES {
                self.left.notified().await;
            }
            let piece = match from.read(&mut buffer).await {
                Ok(0) => Piece::End,
                Ok(length) => Piece::Bytes(buffer[..length].to_vec()),
                Err(_) => Piece::Reset,
            };
            let length = if let Piece::Bytes(bytes) = &piece {
                bytes.len()
            } else {
                0
            };
            let (now, state) = (Instant::now(), *self.shared.state.borrow());
            passed = passed.max(now);
            if let Some(speed) = state.speed {
                passed += Duration::from_secs(1).mul_f64(length as f64 / f64::from(speed));
            }
            let due = passed + state.delay;
            {
                let mut held = self.held.lock();
                held.bytes += length;
                held.pieces.push_back((due, piece));
            }
            self.arrived.notify_one();
            if length == 0 {
                return;
            }
        }
    }

    /// Forwards what is due, unless the link holds it back.
    async fn pass(&self, to: &mut WriteHalf<'_>) -> std::io::Result<()> {
        use tokio::io::AsyncWriteExt;
        let mut state = self.shared.state.subscribe();
        loop {
            let Some((due, piece)) = self.next() else {
                self.arrived.notified().await;
                continue;
            };
            // Healing ends the delay of what is under way, too.
            let healed = state.wait_for(|state| state.delay.is_zero() && state.speed.is_none());
            let _ = tokio::time::timeout_at(due, healed).await;
            let mut bytes = match piece {
                Piece::Bytes(bytes) => bytes,
                Piece::End | Piece::Reset => {
                    self.unheld(&mut state).await;
                    if matches!(piece, Piece::Reset) {
                        return Err(std::io::ErrorKind::ConnectionReset.into());
                    }
                    return to.shutdown().await;
                }
            };
            while !bytes.is_empty() {
                self.unheld(&mut state).await;
                to.writable().await?;
                let sent = {
                    let _passing = self.shared.passing.lock();
                    let now = *self.shared.state.borrow();
                    if now.generation != self.generation {
                        return Err(std::io::ErrorKind::ConnectionReset.into());
                    }
                    if now.holds(self.direction) {
                        continue;
                    }
                    match to.try_write(&bytes) {
                        Ok(sent) => sent,
                        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => 0,
                        Err(error) => return Err(error),
                    }
                };
                bytes.drain(..sent);
                self.held.lock().bytes -= sent;
                self.left.notify_one();
                let counters = &self.shared.counters;
                let counter = match self.direction {
                    Direction::ToTarget => &counters.to_target_bytes,
                    Direction::ToClient => &counters.to_client_bytes,
                };
                counter.fetch_add(sent as u64, Relaxed);
            }
        }
    }

    /// Waits until the link does not hold back this direction. The state lives as long as the pump.
    async fn unheld(&self, state: &mut watch::Receiver<State>) {
        let _ = state.wait_for(|state| !state.holds(self.direction)).await;
    }

    fn next(&self) -> Option<(Instant, Piece)> {
        self.held.lock().pieces.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_url_keeps_everything_but_its_host_and_port() {
        let link = Link::open("127.0.0.1:1".parse().unwrap()).await.unwrap();
        let addr = link.addr();
        for (url, expected) in [
            ("redis://127.0.0.1:1", format!("redis://{addr}")),
            (
                "postgresql://u:p@h:5/db?x=a@b",
                format!("postgresql://u:p@{addr}/db?x=a@b"),
            ),
            ("http://[::1]:8000/items", format!("http://{addr}/items")),
        ] {
            assert_eq!(link.url_for(url), expected);
        }
    }
}
