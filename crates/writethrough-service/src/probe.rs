//! A GET request to a server nearby: what `writethrough health` and the lab ask of a node.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use axum::body::Bytes;
use axum::http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;

/// The longest body that is read.
const BODY_BYTES: usize = 4 << 20;

/// Sends `GET path` to each address at once, and returns the first answer.
///
/// # Errors
///
/// No address answers: why the last one did not.
pub async fn get_any(
    addresses: &[SocketAddr],
    path: &str,
    bound: Duration,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let asked = addresses.iter().map(|address| {
        let answer = async move {
            let answer = get(*address, path, bound).await;
            answer.with_context(|| format!("{address} does not answer"))
        };
        Box::pin(answer)
    });
    let (answer, _) = futures::future::select_ok(asked).await?;
    Ok(answer)
}

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
