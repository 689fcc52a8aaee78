//! What Postgres and Redis servers have in common: a process, a port, and one change at a time.
//!
//! It knows neither of them: a server passes in its command line and the question whether it serves.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::process::Signal;
use tokio::sync::MutexGuard;

use crate::error::Result;
use crate::ground::Ground;
use crate::port::Port;
use crate::process::{Process, Reach};

/// How long a restart waits for its old port, and a first start looks for a free one.
const PORT_BOUND: Duration = Duration::from_secs(10);
const PORT_PAUSE: Duration = Duration::from_millis(50);

/// A server that can be started, paused and ended.
#[derive(Debug)]
pub(crate) struct Server {
    process: Arc<Process>,
    port: Mutex<Port>,
    /// Set once the server has served: from then on it keeps its port.
    keeps_port: AtomicBool,
    changing: tokio::sync::Mutex<()>,
}

impl Server {
    /// Makes a server that does not run yet. Its log is in `folder`.
    pub(crate) fn new(ground: &Ground, name: String, folder: &Path, reach: Reach) -> Result<Self> {
        Ok(Self {
            process: ground.process(name, folder.join("log"), reach),
            port: Mutex::new(Port::claim()?),
            keeps_port: AtomicBool::new(false),
            changing: tokio::sync::Mutex::default(),
        })
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.port.lock().addr()
    }

    /// Waits for the change that is under way, and keeps others from starting while the guard lives.
    pub(crate) async fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().await
    }

    /// Starts the server and waits until `serves` returns `true`, up to `bound`.
    ///
    /// If another process has the port, a server that has never served takes another one; any other
    /// server waits for its port.
    pub(crate) async fn start<F>(
        &self,
        bound: Duration,
        command: impl Fn() -> Command,
        serves: impl Fn() -> F,
    ) -> Result<()>
    where
        F: Future<Output = bool>,
    {
        let end = Instant::now() + PORT_BOUND;
        loop {
            self.process.start(command()).await?;
            let ready = self.process.until("to serve", bound, || async {
                match self.process.ended() {
                    Some(status) => Some(Err(status)),
                    None => serves().await.then_some(Ok(())),
                }
            });
            let Err(status) = ready.await? else {
                self.keeps_port.store(true, Relaxed);
                return Ok(());
            };
            let port_is_taken = self.process.run_log().contains("Address already in use");
            if !port_is_taken || Instant::now() >= end {
                return Err(self.process.ended_error(status));
            }
            if self.keeps_port.load(Relaxed) {
                tokio::time::sleep(PORT_PAUSE).await;
            } else {
                let another = Port::claim()?;
                *self.port.lock() = another;
            }
        }
    }

    /// Asks the server to end and waits until it has, up to `bound`. A paused server is resumed first.
    pub(crate) async fn stop(&self, signal: Signal, bound: Duration) -> Result<()> {
        if self.process.pid().is_none() {
            return Ok(());
        }
        self.process.resume().await?;
        self.process.signal_main(signal)?;
        self.process.wait(bound).await.map(|_| ())
    }

    pub(crate) async fn pause(&self) -> Result<()> {
        let _change = self.change().await;
        self.process.pause().await
    }

    pub(crate) async fn resume(&self) -> Result<()> {
        let _change = self.change().await;
        self.process.resume().await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;
    use crate::ground::temporary_folder;

    #[tokio::test]
    async fn a_taken_port_is_changed_before_the_first_start_and_waited_for_later() {
        let folder =
            temporary_folder().map(|base| base.join(format!("server-{:08x}", fastrand::u32(..))));
        let folder = folder.unwrap();
        std::fs::create_dir(&folder).unwrap();
        let ground = Ground::new(folder.clone(), false).unwrap();
        let server = Server::new(&ground, "server".to_owned(), &folder, Reach::Group).unwrap();

        // A server whose first two starts find its port taken.
        let start = async || {
            let starts = AtomicU32::new(0);
            let command = || {
                let script = match starts.fetch_add(1, Relaxed) {
                    0 | 1 => "echo Address already in use; exit 1",
                    _ => "echo serving; exec sleep 1000",
                };
                let mut command = Command::new("sh");
                command.args(["-c", script]);
                command
            };
            let serves = || async { server.process().run_log().contains("serving") };
            let started = server.start(PORT_BOUND, command, serves).await;
            started.map(|()| starts.load(Relaxed)).unwrap()
        };
        let claimed = server.addr();
        assert_eq!(start().await, 3);
        let served = server.addr();
        assert_ne!(served, claimed);

        server.process().kill().await.unwrap();
        assert_eq!(start().await, 3);
        assert_eq!(server.addr(), served);
        ground.close();
    }
}
