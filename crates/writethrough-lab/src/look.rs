//! One look at a server of the lab: a GET request, and its answer if there is one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use writethrough_check::client::{Client, Reply, Target};

/// How long a look may take.
const BOUND: Duration = Duration::from_secs(1);

/// Asks for `path`; `None` when no whole answer comes in time.
pub(crate) async fn get(address: SocketAddr, path: &str) -> Option<(StatusCode, Bytes)> {
    let target = Target::parse(&format!("http://{address}")).ok()?;
    let mut client = Client::new(Arc::new(target), BOUND);
    match client.send(Method::GET, path, None).await {
        Reply::Answer { status, body, .. } => Some((status, body)),
        Reply::NotSent(_) | Reply::Lost(_) => None,
    }
}
