//! Request bodies that tell whether they were read to their end.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};

/// Whether a request's body was read to its end.
#[derive(Debug, Clone)]
pub struct BodyRead(Arc<AtomicBool>);

impl BodyRead {
    /// Watches the request's body.
    pub fn watch(request: Request) -> (Request, Self) {
        let read = Self(Arc::new(AtomicBool::new(request.body().is_end_stream())));
        if read.to_the_end() {
            return (request, read);
        }
        let watched = read.clone();
        let request = request.map(|body| {
            Body::new(WatchedBody {
                body,
                read: watched,
            })
        });
        (request, read)
    }

    /// Whether nothing of the body is left. A connection with something left of it cannot be used
    /// for another request.
    pub fn to_the_end(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

struct WatchedBody {
    body: Body,
    read: BodyRead,
}

impl HttpBody for WatchedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        if matches!(frame, Poll::Ready(None)) || self.body.is_end_stream() {
            self.read.0.store(true, Ordering::Relaxed);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
