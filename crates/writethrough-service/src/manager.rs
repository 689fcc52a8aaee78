//! What the service manager is told, over the socket that it names in `NOTIFY_SOCKET` (systemd's
//! `Type=notify`). Without that variable nobody is told anything.

use sd_notify::NotifyState;
use tokio::task::JoinHandle;

/// A manager that has been told that the service is up.
pub struct Manager {
    /// Says that the process is alive, as often as the manager wants to hear it.
    alive: Option<JoinHandle<()>>,
}

impl Manager {
    /// Tells that the service has started: it listens. Whether its database is there is another
    /// question, which `/readyz` answers. Must be called within a tokio runtime.
    #[must_use]
    pub fn started() -> Self {
        tell(NotifyState::Ready);
        let within = sd_notify::watchdog_enabled().filter(|within| !within.is_zero());
        let alive = within.map(|within| {
            tokio::spawn(async move {
                let mut tick = tokio::time::interval(within / 2);
                tick.tick().await;
                while tell(NotifyState::Watchdog) {
                    tick.tick().await;
                }
            })
        });
        Self { alive }
    }

    /// Tells that the service has begun to end.
    pub fn stopping(&self) {
        tell(NotifyState::Stopping);
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if let Some(alive) = &self.alive {
            alive.abort();
        }
    }
}

/// Whether that is told, or there is nobody to tell it to.
fn tell(state: NotifyState<'_>) -> bool {
    let told = sd_notify::notify(std::slice::from_ref(&state));
    if let Err(error) = &told {
        tracing::warn!("the service manager cannot be told `{state}` (NOTIFY_SOCKET): {error}");
    }
    told.is_ok()
}
