//! `writethrough health`: asks a server nearby whether it is ready. Containers without a shell have nothing else to
//! ask with.

use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use writethrough_service::{config, listen};

/// How long the whole exchange may take.
const BOUND: Duration = Duration::from_secs(3);
/// The longest body that is read.
const BODY_BYTES: usize = 4 << 20;

#[derive(clap::Args)]
pub(crate) struct HealthArgs {
    /// The address that the server listens on. When it stands for all addresses, the server is
    /// asked at one that other machines see. The variable PORT is read when LISTEN_ADDR is not set
    /// [default: 127.0.0.1:8000].
    #[arg(
        long,
        env = "LISTEN_ADDR",
        value_name = "ADDRESS:PORT",
        hide_env_values = true
    )]
    listen: Option<String>,
    /// What to ask for.
    #[arg(long, value_name = "PATH", default_value = "/readyz")]
    path: String,
}

/// Prints the server's answer; the exit code is 0 if it is ready.
///
/// # Errors
///
/// The address is none, or no server answers there.
pub(crate) fn run(
    args: &HealthArgs,
    variable: impl Fn(&str) -> Option<String>,
) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let places = listen::reachable_at(config::listen(&args.listen, variable)?);
    let (status, body) = runtime.block_on(get_any(&places, &args.path, BOUND))?;
    let _ = writeln!(
        std::io::stdout(),
        "{}: {}",
        status.as_u16(),
        String::from_utf8_lossy(&body).trim()
    );
    Ok(if status.is_success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Sends `GET path` to each address at once, and returns the first answer.
///
/// # Errors
///
/// No address answers: why the last one did not.
async fn get_any(
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
async fn get(
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
