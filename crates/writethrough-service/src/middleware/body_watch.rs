//! The two ends of an exchange that a client can hold up: what is left of a request's body once the
//! answer is decided (RFC 9112, section 9.6), and an answer that the client does not read.
//!
//! A socket that is closed with bytes in it that nobody has read is reset, and the reset throws away
//! the answer on its way to the client. So a small rest is read away and the connection lives on;
//! before a large one the answer says `Connection: close`, and the connection lingers.
//!
//! An answer keeps its memory, and its request's place among those that are served, until the client has
//! read it, so a client that reads too slowly is cut off.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::header;
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::{Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};

use crate::connections::Connection;
use crate::metrics::{Dropped, Metrics};
use crate::throttle::Throttle;

/// The largest rest of a body that is read away to keep the connection.
const REST_BYTES: usize = 64 * 1024;
/// The longest that the answer waits for such a rest.
const REST_TIMEOUT: Duration = Duration::from_millis(250);
/// The longest that a connection lingers: the time a client has to send what it has begun and to read
/// the answer.
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);
/// The most that a lingering connection throws away.
const LINGER_BYTES: usize = 64 * 1024 * 1024;

/// The longest that sending an answer may stand still.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);
/// An answer that has stood still must come on at this rate, on the average, or one byte at a time could
/// hold it for ever.
const SLOWEST_BYTES_PER_SECOND: u32 = 16 * 1024;

static STALLED: Throttle = Throttle::new(Duration::from_secs(10));

/// What is left of a request's body.
pub struct Rest(Option<Arc<Mutex<Left>>>);

enum Left {
    /// Somebody may still read on.
    InUse,
    Nothing,
    Body(Body),
    /// The client sends it only when it is asked to, and nobody has asked.
    NotAskedFor,
}

impl Rest {
    /// Watches what is read of the request's body.
    pub fn watch(request: Request) -> (Request, Self) {
        if request.body().is_end_stream() {
            return (request, Self(None));
        }
        let left = Arc::new(Mutex::new(Left::InUse));
        let asks = request.headers().contains_key(header::EXPECT);
        let request = request.map(|body| {
            Body::new(Watched {
                body,
                asks,
                ended: false,
                left: left.clone(),
            })
        });
        (request, Self(Some(left)))
    }

    /// Reads a small rest away. Returns whether nothing is left: if not, the connection cannot be used
    /// for another request.
    pub async fn discard(self) -> bool {
        let Some(left) = self.0 else {
            return true;
        };
        let left = std::mem::replace(&mut *lock(&left), Left::InUse);
        let body = match left {
            Left::Nothing => return true,
            Left::InUse | Left::NotAskedFor => return false,
            Left::Body(body) => body,
        };
        if body.size_hint().lower() > REST_BYTES as u64 {
            return false;
        }
        let mut body = Limited::new(body, REST_BYTES);
        let to_the_end = async {
            while let Some(frame) = body.frame().await {
                if frame.is_err() {
                    return false;
                }
            }
            true
        };
        tokio::time::timeout(REST_TIMEOUT, to_the_end)
            .await
            .unwrap_or(false)
    }
}

fn lock(left: &Mutex<Left>) -> std::sync::MutexGuard<'_, Left> {
    left.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A body that its reader leaves behind instead of dropping it.
struct Watched {
    body: Body,
    /// Reading makes the server ask for the body (`100 Continue`).
    asks: bool,
    ended: bool,
    left: Arc<Mutex<Left>>,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.asks = false;
        let frame = Pin::new(&mut self.body).poll_frame(context);
        self.ended = matches!(frame, Poll::Ready(None));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        *lock(&self.left) = if self.ended || self.body.is_end_stream() {
            Left::Nothing
        } else if self.asks {
            Left::NotAskedFor
        } else {
            Left::Body(std::mem::take(&mut self.body))
        };
    }
}

/// In a response's extensions: a part of the request was not read, so the connection must linger.
#[derive(Debug, Clone, Copy)]
pub struct Unread;

/// A connection that lingers when the server closes it: it ends its own side, and then reads and throws
/// away what the client still sends, within bounds, until the client ends its side too. One whose
/// client does not read is cut off.
pub struct Lingering {
    stream: TcpStream,
    connection: Arc<Connection>,
    metrics: Arc<Metrics>,
    /// When an answer that has stood still must have come on.
    stalled: Option<Pin<Box<Sleep>>>,
    unread: Arc<AtomicBool>,
    stop: watch::Receiver<bool>,
    until: Option<Pin<Box<Sleep>>>,
    discarded: usize,
}

impl Lingering {
    /// Wraps a connection. When the server is about to `stop`, only one with something `unread` lingers:
    /// an idle client need not notice the end of the connection, and would hold up the stop.
    pub fn new(
        stream: TcpStream,
        connection: Arc<Connection>,
        metrics: Arc<Metrics>,
        unread: Arc<AtomicBool>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        Self {
            stream,
            connection,
            metrics,
            stalled: None,
            unread,
            stop,
            until: None,
            discarded: 0,
        }
    }

    /// Bounds the time of an answer by what was written of it.
    fn bounded(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(Ok(bytes)) => {
                if let Some(until) = &mut self.stalled {
                    let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
                    let longer = Duration::from_secs(1) * bytes / SLOWEST_BYTES_PER_SECOND;
                    let latest = Instant::now() + STALL_TIMEOUT;
                    let until_then = (until.deadline() + longer).min(latest);
                    until.as_mut().reset(until_then);
                }
            }
            Poll::Pending => {
                let until = self
                    .stalled
                    .get_or_insert_with(|| Box::pin(tokio::time::sleep(STALL_TIMEOUT)));
                ready!(until.as_mut().poll(context));
                self.metrics.dropped(Dropped::Stalled);
                if let Some(count) = STALLED.pass() {
                    tracing::warn!(
                        "{count} connections were cut off: their clients did not read the answer"
                    );
                }
                // Or the system would keep what is unsent, for minutes.
                let _ = self.stream.set_zero_linger();
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            Poll::Ready(Err(_)) => {}
        }
        written
    }
}

impl AsyncRead for Lingering {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Lingering {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.bounded(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.bounded(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        if flushed.is_ready() {
            self.stalled = None;
            self.connection.sent();
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.until.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(context))?;
            if *this.stop.borrow() && !this.unread.load(Ordering::Relaxed) {
                return Poll::Ready(Ok(()));
            }
        }
        let until = this
            .until
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER_TIMEOUT)));
        let mut buffer = [0; 8 * 1024];
        while this.discarded < LINGER_BYTES && until.as_mut().poll(context).is_pending() {
            let mut buffer = ReadBuf::new(&mut buffer);
            match ready!(Pin::new(&mut this.stream).poll_read(context, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => this.discarded += buffer.filled().len(),
                // The client has ended its side too, or is gone.
                Ok(()) | Err(_) => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}
