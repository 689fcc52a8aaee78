//! An HTTP client for one process: one connection to each target, kept alive, with a bounded time
//! for each request.
//!
//! It is built on hyper's connection itself and not on a pooling client, because the checker has to
//! know whether a request that brought no answer may have reached the service, and because nothing
//! may be tried again behind its back.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

/// Larger answers are not read.
const BODY_LIMIT: usize = 8 * 1024 * 1024;

/// A service to be checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    host: String,
    port: u16,
    prefix: String,
}

impl Target {
    /// Parses `http://host[:port][/prefix]`.
    ///
    /// # Errors
    ///
    /// Fails when the text is no such URL, and says what to use instead. The error does not repeat
    /// the text, which may hold a password.
    pub fn parse(url: &str) -> Result<Self, String> {
        let url = url.trim();
        let wrong = |why: &str| {
            let length = url.chars().count();
            format!(
                "--target is a text of {length} characters that is not the base URL of a service \
                 ({why}): use http://HOST:PORT, or http://HOST:PORT/PREFIX"
            )
        };
        let uri: Uri = url.parse().map_err(|_| wrong("it cannot be parsed"))?;
        match uri.scheme_str() {
            Some(scheme) if scheme.eq_ignore_ascii_case("http") => {}
            Some(scheme) if scheme.eq_ignore_ascii_case("https") => {
                return Err(wrong("TLS is not supported"));
            }
            _ => return Err(wrong("it does not start with http://")),
        }
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        if authority.contains('@') {
            return Err(wrong("a user and a password are not supported"));
        }
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let is_name = host
            .chars()
            .all(|letter| letter.is_alphanumeric() || matches!(letter, '.' | '-' | '_' | ':'));
        if host.is_empty() || !is_name {
            return Err(wrong("it has no host"));
        }
        let port = match uri.port_u16() {
            Some(port) => port,
            None if authority.ends_with(host) || authority.ends_with(']') => 80,
            None => return Err(wrong("its port is not a number up to 65535")),
        };
        if uri.query().is_some() || url.contains('#') {
            return Err(wrong("it has a query or a fragment"));
        }
        Ok(Self {
            host: host.to_owned(),
            port,
            prefix: uri.path().trim_end_matches('/').to_owned(),
        })
    }

    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// The outcome of a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// The service answered.
    Answer {
        /// The status.
        status: StatusCode,
        /// The body.
        body: Bytes,
        /// Whether the service says that it answered from its cache (`Cache-Status`, RFC 9211).
        hit: bool,
    },
    /// Nothing was sent: the service cannot know of the request.
    NotSent(String),
    /// Something may have been sent, and no whole answer came.
    Lost(String),
}

/// A process' connection to one target.
#[derive(Debug)]
pub struct Client {
    target: Arc<Target>,
    timeout: Duration,
    connection: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    /// Makes a client that connects when it is first used.
    #[must_use]
    pub fn new(target: Arc<Target>, timeout: Duration) -> Self {
        Self {
            target,
            timeout,
            connection: None,
        }
    }

    /// Sends one request, waits for its answer within the time limit, and never sends it a second
    /// time.
    ///
    /// # Cancellation
    ///
    /// Dropping the future closes the connection at the next use; the request may have been sent.
    pub async fn send(&mut self, method: Method, path: &str, body: Option<Vec<u8>>) -> Reply {
        let deadline = Instant::now() + self.timeout;
        let mut connection = match timeout_at(deadline, self.connect()).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return Reply::NotSent(error),
            Err(_) => return Reply::NotSent("connecting took too long".to_owned()),
        };
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.target.prefix))
            .header(header::HOST, self.target.authority())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::from(body.unwrap_or_default()));
        let request = match request {
            Ok(request) => request,
            Err(error) => return Reply::NotSent(error.to_string()),
        };
        let exchange = async {
            let response = match connection.try_send_request(request).await {
                Ok(response) => response,
                Err(mut error) => {
                    // Handed back as a whole: not a byte of it was written.
                    let unsent = error.take_message().is_some();
                    let reason = error.error().to_string();
                    return Err(if unsent {
                        Reply::NotSent(reason)
                    } else {
                        Reply::Lost(reason)
                    });
                }
            };
            let status = response.status();
            let hit = response
                .headers()
                .get("cache-status")
                .and_then(|value| value.to_str().ok())
                .is_some_and(|value| value.split([';', ',']).any(|part| part.trim() == "hit"));
            match Limited::new(response.into_body(), BODY_LIMIT)
                .collect()
                .await
            {
                Ok(body) => Ok((status, body.to_bytes(), hit)),
                Err(error) => Err(Reply::Lost(format!("the answer broke off: {error}"))),
            }
        };
        match timeout_at(deadline, exchange).await {
            Ok(Ok((status, body, hit))) => {
                self.connection = Some(connection);
                Reply::Answer { status, body, hit }
            }
            Ok(Err(reply)) => reply,
            Err(_) => Reply::Lost(format!("no answer within {:?}", self.timeout)),
        }
    }

    /// Returns the kept connection if it is still good, else a new one.
    async fn connect(&mut self) -> Result<SendRequest<Full<Bytes>>, String> {
        if let Some(mut connection) = self.connection.take()
            && connection.ready().await.is_ok()
        {
            return Ok(connection);
        }
        let place = (self.target.host.as_str(), self.target.port);
        let stream = TcpStream::connect(place)
            .await
            .map_err(|error| error.to_string())?;
        stream
            .set_nodelay(true)
            .map_err(|error| error.to_string())?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| error.to_string())?;
        // Ends when the sender is dropped, or with the connection; its errors reach the sender.
        tokio::spawn(connection);
        sender.ready().await.map_err(|error| error.to_string())?;
        Ok(sender)
    }
}

/// An item as the service shows it. Only what the checker needs; a service may leave out the
/// version.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Item {
    pub(crate) id: String,
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) description: Option<String>,
    pub(crate) price: Price,
    #[serde(default)]
    pub(crate) created_at: Option<String>,
    #[serde(default)]
    pub(crate) version: Option<u64>,
}

/// A price, which services write as a number or as text.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Price {
    Number(f64),
    Text(String),
}

impl Price {
    pub(crate) fn cents(&self) -> Option<i64> {
        let number = match self {
            Self::Number(number) => *number,
            Self::Text(text) => text.parse().ok()?,
        };
        Some((number * 100.0).round() as i64)
    }
}

/// One page of the list.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ItemsPage {
    pub(crate) items: Vec<Item>,
    #[serde(default)]
    pub(crate) next_cursor: Option<String>,
}

/// Returns the last part of a problem's type: `database-unavailable` of
/// `https://example.org/problems/database-unavailable`.
pub(crate) fn problem_type(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Problem {
        #[serde(rename = "type")]
        kind: String,
    }
    let problem: Problem = serde_json::from_slice(body).ok()?;
    problem
        .kind
        .rsplit(['/', '#', ':'])
        .next()
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let target = Target::parse("http://127.0.0.1:8000/").unwrap();
        assert_eq!(
            (target.authority().as_str(), target.prefix.as_str()),
            ("127.0.0.1:8000", "")
        );
        let target = Target::parse("http://[::1]/api/").unwrap();
        assert_eq!(
            (target.authority().as_str(), target.prefix.as_str()),
            ("[::1]:80", "/api")
        );
        for written in ["HTTP://h:8000", " http://h:8000\r\n"] {
            assert_eq!(Target::parse(written).unwrap().authority(), "h:8000");
        }
    }

    #[test]
    fn what_is_no_target_is_not_repeated() {
        for (text, why) in [
            ("https://s3cret.example.org", "TLS"),
            ("s3cret", "http://"),
            ("", "parsed"),
            ("h;Pwd=s3cret", "http://"),
            ("http://u:s3cret@h", "a user and a password"),
            ("http://s3cret@h:8000", "a user and a password"),
            ("http://h,s3cret", "host"),
            ("http://h:99999", "port"),
            ("http://h?token=s3cret", "query"),
            ("http://h#s3cret", "fragment"),
            ("http://h s3cret", "parsed"),
        ] {
            let error = Target::parse(text).unwrap_err();
            assert!(
                error.contains(why) && !error.contains("s3cret"),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn problem_types() {
        let body = br#"{"type":"https://example.org/problems/unavailable","title":"x"}"#;
        assert_eq!(problem_type(body).as_deref(), Some("unavailable"));
        assert_eq!(problem_type(b"nonsense"), None);
    }
}
