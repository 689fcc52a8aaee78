//! A GET request to a server nearby: what `writethrough health` and the lab ask of a node.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;

/// The longest body that is read.
const BODY_BYTES: usize = 4 << 20;

/// Sends `GET path` over a new connection; the whole exchange takes `bound` at most.
///
/// # Errors
///
/// The server cannot be reached, breaks off, or takes too long.
pub async fn get(
    address: SocketAddr,
    path: &str,
    bound: Duration,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let exchange = async {
        let stream = tokio::net::TcpStream::connect(address).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = Request::get(path)
            .header(header::HOST, address.to_string())
            .header(header::CONNECTION, "close")
            .body(Empty::<Bytes>::new())?;
        let answer = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), BODY_BYTES)
                .collect()
                .await
                .map_err(|error| anyhow::anyhow!(error))?;
            anyhow::Ok((status, body.to_bytes()))
        };
        // The connection does its work only while it is polled, and may end before the answer is read.
        let (answer, _) = tokio::join!(answer, connection);
        answer
    };
    tokio::time::timeout(bound, exchange)
        .await
        .map_err(|_| anyhow::anyhow!("no answer from {address} within {bound:?}"))?
}

/// Where to reach a server of this machine that listens on `address`, which may stand for all addresses.
#[must_use]
pub fn local(mut address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => {
            address.set_ip(Ipv4Addr::LOCALHOST.into())
        }
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => {
            address.set_ip(Ipv6Addr::LOCALHOST.into())
        }
        _ => {}
    }
    address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_are_reached_through_this_machines_own() {
        for (listen, reach) in [
            ("0.0.0.0:8000", "127.0.0.1:8000"),
            ("[::]:8000", "[::1]:8000"),
            ("10.1.2.3:80", "10.1.2.3:80"),
        ] {
            assert_eq!(local(listen.parse().unwrap()), reach.parse().unwrap());
        }
    }
}
