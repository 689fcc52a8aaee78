//! Requests that are none of HTTP/1.1 (RFC 9112): what must be right before anything acts on one, and
//! the answers that hyper gives by itself to what it cannot read. Those have no body; here they become
//! problems like all others, and are counted.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::extract::Request;
use axum::http::header::{self, HeaderMap};
use axum::http::{Method, StatusCode, Version};
use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::authority::is_host;
use crate::metrics::Metrics;
use crate::middleware::trace_context::RequestTrace;
use crate::problem::{Kind, Problem};

/// The longest target of a request.
pub(crate) const TARGET_BYTES: usize = 8 * 1024;

/// Checks what hyper lets pass.
///
/// # Errors
///
/// A [`Problem`]; the connection should be closed after it, because the two sides may not agree on where
/// the request ends.
pub fn check(request: &Request) -> Result<(), Problem> {
    let headers = request.headers();
    check_target(request)?;
    check_host(headers, request.version())?;
    check_transfer_encoding(headers)
}

/// RFC 9112, 3.2: a path begins with a slash; only CONNECT names a host and a port alone.
fn check_target(request: &Request) -> Result<(), Problem> {
    let uri = request.uri();
    let right = match (uri.authority(), uri.scheme()) {
        (None, _) => true,
        (Some(_), None) if request.method() != Method::CONNECT => false,
        (Some(authority), _) => is_host(authority.as_str().as_bytes()),
    };
    if right {
        return Ok(());
    }
    Err(Problem::new(Kind::MalformedRequest)
        .detail("Send a path that begins with `/`.")
        .error("path", "must begin with `/`"))
}

/// RFC 9112, 3.2: one `Host`, which HTTP/1.0 may leave out. Of two, a proxy may obey the other one.
fn check_host(headers: &HeaderMap, version: Version) -> Result<(), Problem> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let wrong = match (hosts.next(), hosts.next()) {
        (None, _) if version < Version::HTTP_11 => return Ok(()),
        (None, _) => "is required",
        (Some(_), Some(_)) => "is given more than once",
        (Some(host), None) if is_host(host.as_bytes()) => return Ok(()),
        (Some(_), None) => "must be a host, with a port if need be, such as localhost:8000",
    };
    Err(Problem::new(Kind::MalformedRequest)
        .detail("Send the header `Host` once, with the host and the port of the service.")
        .error("Host", wrong))
}

/// RFC 9112, 6.1: no coding but `chunked` is understood, and that one at most once. The status is 400 and
/// not 501, which would count as a failure of the service.
fn check_transfer_encoding(headers: &HeaderMap) -> Result<(), Problem> {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let only_chunked = match (codings.next(), codings.next()) {
        (None, _) => true,
        (Some(coding), None) => coding.as_bytes().eq_ignore_ascii_case(b"chunked"),
        (Some(_), Some(_)) => false,
    };
    if only_chunked {
        return Ok(());
    }
    Err(Problem::new(Kind::MalformedRequest)
        .detail("Send the body as it is, with its length or in chunks.")
        .error("Transfer-Encoding", "must be `chunked`, once, or left out"))
}

/// How long the first line is of what was received.
#[derive(Default)]
struct FirstLine {
    length: usize,
    ended: bool,
}

impl FirstLine {
    fn add(&mut self, bytes: &[u8]) {
        if !self.ended {
            let end = bytes.iter().position(|byte| *byte == b'\n');
            self.ended = end.is_some();
            self.length += end.unwrap_or(bytes.len());
        }
    }

    fn is_too_long(&self) -> bool {
        self.length > TARGET_BYTES
    }
}

/// A connection on which the answers that hyper gives by itself have a body.
pub struct Explaining<S> {
    stream: S,
    metrics: Arc<Metrics>,
    /// Whether anything was received.
    begun: bool,
    /// The first line since the last answer.
    line: FirstLine,
    /// What is left of the answer that is written in place of hyper's.
    instead: Option<Bytes>,
}

impl<S> Explaining<S> {
    /// Wraps a connection.
    pub fn new(stream: S, metrics: Arc<Metrics>) -> Self {
        Self {
            stream,
            metrics,
            begun: false,
            line: FirstLine::default(),
            instead: None,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Explaining<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        self.line.add(&buffer.filled()[before..]);
        if !self.begun {
            self.begun = true;
            // The preface of HTTP/2, which hyper answers with nothing at all; what is no method is
            // answered.
            let first = &mut buffer.filled_mut()[before..];
            if first.starts_with(b"PRI * HTTP/2") {
                first[0] = b' ';
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Explaining<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.instead.is_none() {
            let line = std::mem::take(&mut this.line);
            let Some(mut status) = bare_refusal(bytes) else {
                return Pin::new(&mut this.stream).poll_write(context, bytes);
            };
            // hyper has one bound for the whole head, and says 431 when the target alone is over it.
            if status == StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE && line.is_too_long() {
                status = StatusCode::URI_TOO_LONG;
            }
            this.metrics.unreadable(status);
            this.instead = Some(explained(bytes, status));
        }
        if let Some(instead) = &mut this.instead {
            while instead.has_remaining() {
                match ready!(Pin::new(&mut this.stream).poll_write(context, instead))? {
                    0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    written => instead.advance(written),
                }
            }
        }
        this.instead = None;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match slices {
            [head] => self.poll_write(context, head),
            _ => {
                self.line = FirstLine::default();
                Pin::new(&mut self.stream).poll_write_vectored(context, slices)
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The status of an answer that hyper gives by itself: a head alone, of length 0, with an error. Every
/// answer of this service names its trace.
fn bare_refusal(bytes: &[u8]) -> Option<StatusCode> {
    let status = bytes.strip_prefix(b"HTTP/1.")?.get(2..5)?;
    if status[0] != b'4' || !bytes.ends_with(b"\r\n\r\n") {
        return None;
    }
    let has = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    if has(b"\r\nx-trace-id: ") || !has(EMPTY) {
        return None;
    }
    StatusCode::from_bytes(status).ok()
}

const EMPTY: &[u8] = b"\r\ncontent-length: 0\r\n";

/// hyper's answer with the body of a problem.
fn explained(bare: &[u8], status: StatusCode) -> Bytes {
    let problem = match status {
        StatusCode::URI_TOO_LONG => Problem::new(Kind::TargetTooLong).error("path", "is too long"),
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => {
            Problem::new(Kind::HeadTooLong).error("headers", "are too many, or too long")
        }
        _ => Problem::new(Kind::MalformedRequest),
    };
    let trace_id = RequestTrace::new(None, None).to_string();
    let body = problem.body(&trace_id);
    let head = String::from_utf8_lossy(bare);
    let head = head.replace("431 Request Header Fields Too Large", &status.to_string());
    let headers = format!(
        "\r\ncontent-type: application/problem+json\r\ncache-control: no-store\r\n\
         x-content-type-options: nosniff\r\nx-trace-id: {trace_id}\r\ncontent-length: {}\r\n",
        body.len()
    );
    let head = head.replace("\r\ncontent-length: 0\r\n", &headers);
    [head.as_bytes(), &body].concat().into()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn wrong(version: Version, headers: &[(&str, &str)]) -> Option<String> {
        let mut request = Request::builder().version(version);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let problem = check(&request.body(Body::empty()).unwrap()).err()?;
        assert_eq!(problem.kind(), Kind::MalformedRequest);
        Some(problem.errors_for_tests()[0].field.clone())
    }

    #[test]
    fn one_host_is_needed_and_no_other_coding_than_chunked() {
        for host in [
            "h",
            "h:80",
            "H.example.org:8000",
            "127.0.0.1",
            "[::1]:8000",
            "",
            "h:",
            "a_b",
            "xn--a",
        ] {
            assert_eq!(wrong(Version::HTTP_11, &[("host", host)]), None, "{host}");
        }
        for host in [
            "a b", "a,b", "u@h", "h:x", "h:99999", "h/", "http://h", ":80", "[::1", "h?", "a\tb",
        ] {
            let wrong = wrong(Version::HTTP_11, &[("host", host)]);
            assert_eq!(wrong.as_deref(), Some("Host"), "{host}");
        }
        let twice = [("host", "h"), ("host", "h")];
        assert_eq!(wrong(Version::HTTP_11, &twice).as_deref(), Some("Host"));
        assert_eq!(wrong(Version::HTTP_11, &[]).as_deref(), Some("Host"));
        assert_eq!(wrong(Version::HTTP_10, &[]), None);
        assert_eq!(wrong(Version::HTTP_10, &twice).as_deref(), Some("Host"));

        let coded = |coding| {
            wrong(
                Version::HTTP_11,
                &[("host", "h"), ("transfer-encoding", coding)],
            )
        };
        assert_eq!((coded("chunked"), coded("Chunked")), (None, None));
        for coding in [
            "gzip, chunked",
            "chunked, chunked",
            "identity",
            "chunked;q=1",
            "",
        ] {
            assert_eq!(
                coded(coding).as_deref(),
                Some("Transfer-Encoding"),
                "{coding}"
            );
        }
    }

    #[test]
    fn the_first_line_is_measured_however_it_comes() {
        let long = "a".repeat(TARGET_BYTES);
        for (pieces, too_long) in [
            (&["GET /", &long][..], true),
            (&["GET /", &long, " HTTP/1.1\r\n"], true),
            (&["GET / HTTP/1.1\r\nx: ", &long], false),
            (&["GET / HTTP/1.1\r\n", &long, "\n", &long], false),
        ] {
            let mut line = FirstLine::default();
            pieces.iter().for_each(|piece| line.add(piece.as_bytes()));
            assert_eq!(line.is_too_long(), too_long);
        }
    }

    #[test]
    fn only_an_answer_without_a_trace_and_a_body_is_taken_for_one_of_hypers() {
        let head = |status: &str, headers: &str| {
            format!("HTTP/1.1 {status}\r\n{headers}date: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n")
        };
        let bare = "connection: close\r\ncontent-length: 0\r\n";
        let refused = head("431 Request Header Fields Too Large", bare);
        let status = bare_refusal(refused.as_bytes()).unwrap();
        assert_eq!(status, 431);
        let said = String::from_utf8(explained(refused.as_bytes(), status).to_vec()).unwrap();
        let (head_said, body) = said.split_once("\r\n\r\n").unwrap();
        assert!(
            head_said.contains(&format!("content-length: {}\r\n", body.len())),
            "{said}"
        );
        assert!(body.contains("/problems/head-too-long"), "{said}");
        for other in [
            head("400 Bad Request", "x-trace-id: 1\r\ncontent-length: 0\r\n"),
            head("400 Bad Request", "content-length: 10\r\n"),
            head("200 OK", bare),
            head("400 Bad Request", bare) + "{}",
            "HTTP/1.1 4".to_owned(),
            String::new(),
        ] {
            assert_eq!(bare_refusal(other.as_bytes()), None, "{other}");
        }
    }
}
