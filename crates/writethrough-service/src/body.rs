//! What is left of a request's body once the answer is decided, and what becomes of it (RFC 9112,
//! section 9.6).
//!
//! A socket that is closed with bytes in it that nobody has read is reset, and the reset throws away
//! the answer on its way to the client. So a small rest is read away and the connection lives on;
//! before a large one the answer says `Connection: close`, and the connection lingers.

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
use tokio::time::Sleep;

/// The largest rest of a body that is read away to keep the connection.
const REST_BYTES: usize = 64 * 1024;
/// The longest that the answer waits for such a rest.
const REST_TIMEOUT: Duration = Duration::from_millis(250);
/// The longest that a connection lingers: the time a client has to send what it has begun and to read
/// the answer.
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);
/// The most that a lingering connection throws away.
const LINGER_BYTES: usize = 64 * 1024 * 1024;

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
/// away what the client still sends, within bounds, until the client ends its side too.
pub struct Lingering {
    stream: TcpStream,
    unread: Arc<AtomicBool>,
    stop: watch::Receiver<bool>,
    until: Option<Pin<Box<Sleep>>>,
    discarded: usize,
}

impl Lingering {
    /// Wraps a connection. When the server is about to `stop`, only one with something `unread` lingers:
    /// an idle client need not notice the end of the connection, and would hold up the stop.
    pub fn new(stream: TcpStream, unread: Arc<AtomicBool>, stop: watch::Receiver<bool>) -> Self {
        Self {
            stream,
            unread,
            stop,
            until: None,
            discarded: 0,
        }
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
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
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
