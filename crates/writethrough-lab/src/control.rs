//! The socket through which other terminals reach a running lab: one line of JSON in, one out, and
//! the connection ends. Every wait has a bound.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc::Sender;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::request::Request;
use crate::stack::Stack;
use writethrough_service::causes::chain;

/// The socket's name in the lab's folder.
const SOCKET: &str = "control";
/// Marks a folder as a lab's, so that what a crash of the machine left may be removed.
const MARK: &str = ".writethrough-lab";
/// How long a command may take: starting Postgres on a busy machine is the slowest.
const COMMAND_BOUND: Duration = Duration::from_secs(60);
/// How long the client waits for the answer, which includes the command's own bound.
const ANSWER_BOUND: Duration = Duration::from_secs(70);
const CONNECT_BOUND: Duration = Duration::from_secs(5);
/// The longest request.
const REQUEST_BYTES: u64 = 4096;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Done(String),
    Failed(String),
}

/// The running lab's end of the socket. Dropping it stops it.
pub(crate) struct Server {
    accepting: JoinHandle<()>,
}

impl Server {
    /// Listens in `folder`. `down` is told when somebody asks for the end.
    pub(crate) fn open(folder: &Path, stack: Arc<Stack>, down: Sender<()>) -> anyhow::Result<Self> {
        std::fs::write(
            folder.join(MARK),
            "the data of `writethrough lab`; `writethrough lab down` removes them\n",
        )?;
        let path = socket(folder);
        let listener = UnixListener::bind(&path).with_context(|| {
            format!(
                "{} cannot be used as a socket; its path may be too long: choose a shorter --folder",
                path.display()
            )
        })?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let accepting = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    continue;
                };
                let (stack, down) = (stack.clone(), down.clone());
                tokio::spawn(async move {
                    // A client that goes away does not want the answer.
                    let _ = serve(stream, &stack, &down).await;
                });
            }
        });
        Ok(Self { accepting })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn serve(stream: UnixStream, stack: &Stack, down: &Sender<()>) -> anyhow::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut read = BufReader::new(read.take(REQUEST_BYTES));
    timeout(CONNECT_BOUND, read.read_line(&mut line)).await??;
    let request: Option<Request> = serde_json::from_str(&line).ok();
    let answer = match &request {
        None => Answer::Failed("the lab does not know this command: is it another version?".into()),
        Some(Request::Down) => Answer::Done(String::new()),
        Some(request) => match timeout(COMMAND_BOUND, stack.handle(request)).await {
            Ok(Ok(text)) => Answer::Done(text),
            Ok(Err(error)) => Answer::Failed(chain(error.as_ref())),
            Err(_) => Answer::Failed(format!(
                "gave up after {COMMAND_BOUND:?}; `writethrough lab status` tells what runs"
            )),
        },
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    timeout(CONNECT_BOUND, write.write_all(&text)).await??;
    if request == Some(Request::Down) {
        let _ = down.send(()).await;
    }
    Ok(())
}

/// Asks the lab in `folder`, and returns its answer.
///
/// # Errors
///
/// No lab runs there, or it refused; the message says which and what to do.
pub(crate) async fn ask(folder: &Path, request: &Request) -> anyhow::Result<String> {
    let connected = timeout(CONNECT_BOUND, UnixStream::connect(socket(folder))).await;
    let mut stream = match connected {
        Ok(Ok(stream)) => stream,
        Ok(Err(error))
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused
            ) =>
        {
            bail!(
                "no lab runs in {}: start one with `writethrough lab`, or name its --folder",
                folder.display()
            );
        }
        Ok(Err(error)) => {
            return Err(error)
                .with_context(|| format!("the lab in {} cannot be reached", folder.display()));
        }
        Err(_) => bail!("the lab in {} does not answer", folder.display()),
    };
    let exchange = async {
        let mut text = serde_json::to_vec(request)?;
        text.push(b'\n');
        stream.write_all(&text).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        anyhow::Ok(serde_json::from_slice::<Answer>(&answer)?)
    };
    let answer = timeout(ANSWER_BOUND, exchange)
        .await
        .with_context(|| format!("the lab in {} does not answer", folder.display()))?
        .context("the lab broke off")?;
    match answer {
        Answer::Done(text) => Ok(text),
        Answer::Failed(why) => bail!(why),
    }
}

/// Removes what a lab left whose machine went down; `true` when there was something. Other folders are
/// left alone. The caller has made sure that no lab answers there.
pub(crate) fn remove_remains(folder: &Path) -> anyhow::Result<bool> {
    if !folder.join(MARK).is_file() {
        return Ok(false);
    }
    match std::fs::remove_dir_all(folder) {
        // A lab that is just ending removes its folder itself.
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed", folder.display()))
        }
        _ => Ok(true),
    }
}

fn socket(folder: &Path) -> PathBuf {
    folder.join(SOCKET)
}
