//! The hosts of a URL: which of them to connect to.
//!
//! Each has a bound of its own, the handshake included, so that one that hangs does not use up the time
//! of the others; and the one that was good is asked first the next time.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use deadpool_postgres::Connect;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::config::{Host, LoadBalanceHosts};
use tokio_postgres::{Client, Config, Error, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::connect::POOL_WAIT;

/// The least that a host gets, however many there are: two are tried while a request waits, and the
/// next request goes on from there.
const LEAST: Duration = Duration::from_millis(400);

type Connected = (Client, JoinHandle<()>);

/// The hosts of a URL.
#[derive(Clone)]
pub(super) struct Hosts {
    /// One for each host.
    configs: Arc<[Config]>,
    tls: Option<MakeRustlsConnect>,
    /// Where to begin: the last good one, or the one after the last that hung.
    first: Arc<AtomicUsize>,
}

/// What a server can be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Use {
    /// A standby.
    Nothing,
    /// A primary that refuses writes for now.
    Reads,
    Everything,
}

impl Hosts {
    pub(super) fn new(config: &Config, tls: Option<MakeRustlsConnect>) -> Self {
        let configs = each_host(config);
        let first = match config.get_load_balance_hosts() {
            LoadBalanceHosts::Random => fastrand::usize(..configs.len()),
            _ => 0,
        };
        Self {
            configs: configs.into(),
            tls,
            first: Arc::new(first.into()),
        }
    }

    /// A connection to the primary, to one that is read-only if there is no other, and in the last resort
    /// to a standby: whoever looks it over then says what is wrong.
    pub(super) async fn client(&self) -> Result<Connected, Error> {
        let count = self.configs.len();
        if count == 1 {
            return self.connect_to(0).await;
        }
        let bound = (POOL_WAIT * 4 / 5 / u32::try_from(count).unwrap_or(u32::MAX)).max(LEAST);
        let first = self.first.load(Ordering::Relaxed);
        let mut best: Option<(Use, usize, Connected)> = None;
        let mut failed = None;
        for place in 0..count {
            let index = (first + place) % count;
            let attempt = async {
                let connected = self.connect_to(index).await?;
                Ok::<_, Error>((use_of(&connected.0).await?, connected))
            };
            match timeout(bound, attempt).await {
                Ok(Ok((Use::Everything, connected))) => {
                    self.first.store(index, Ordering::Relaxed);
                    return Ok(connected);
                }
                Ok(Ok((usable, connected))) => {
                    if best.as_ref().is_none_or(|(best, ..)| usable > *best) {
                        best = Some((usable, index, connected));
                    }
                }
                Ok(Err(error)) => failed = Some(error),
                // Whoever waits may give up before the end of this loop.
                Err(_) => self.first.store((index + 1) % count, Ordering::Relaxed),
            }
        }
        match (best, failed) {
            (Some((_, index, connected)), _) => {
                self.first.store(index, Ordering::Relaxed);
                Ok(connected)
            }
            (None, Some(error)) => Err(error),
            // All hang: the caller's own bound ends this.
            (None, None) => self.connect_to(first % count).await,
        }
    }

    async fn connect_to(&self, index: usize) -> Result<Connected, Error> {
        let config = &self.configs[index];
        Ok(match &self.tls {
            Some(tls) => {
                let (client, connection) = config.connect(tls.clone()).await?;
                (client, tokio::spawn(run(connection)))
            }
            None => {
                let (client, connection) = config.connect(NoTls).await?;
                (client, tokio::spawn(run(connection)))
            }
        })
    }
}

impl Connect for Hosts {
    fn connect(
        &self,
        _: &Config,
    ) -> Pin<Box<dyn Future<Output = Result<Connected, Error>> + Send + '_>> {
        Box::pin(self.client())
    }
}

async fn run(connection: impl Future<Output = Result<(), Error>>) {
    if let Err(error) = connection.await {
        tracing::debug!("a connection to Postgres ended: {error}");
    }
}

async fn use_of(client: &Client) -> Result<Use, Error> {
    let look = "SELECT pg_is_in_recovery(), current_setting('transaction_read_only') = 'on'";
    let row = client.query_typed_one(look, &[]).await?;
    Ok(match (row.try_get(0)?, row.try_get(1)?) {
        (true, _) => Use::Nothing,
        (_, true) => Use::Reads,
        _ => Use::Everything,
    })
}

/// The same configuration for each of its hosts alone.
fn each_host(config: &Config) -> Vec<Config> {
    let count = config.get_hosts().len().max(config.get_hostaddrs().len());
    if count <= 1 {
        return vec![config.clone()];
    }
    let ports = config.get_ports();
    (0..count)
        .map(|index| {
            let mut one = Config::new();
            match config.get_hosts().get(index) {
                Some(Host::Tcp(name)) => {
                    one.host(name);
                }
                Some(Host::Unix(folder)) => {
                    one.host_path(folder);
                }
                None => {}
            }
            if let Some(address) = config.get_hostaddrs().get(index) {
                one.hostaddr(*address);
            }
            if let Some(port) = ports
                .get(index)
                .or(ports.first().filter(|_| ports.len() == 1))
            {
                one.port(*port);
            }
            copy_the_rest(config, &mut one);
            one
        })
        .collect()
}

fn copy_the_rest(from: &Config, to: &mut Config) {
    if let Some(user) = from.get_user() {
        to.user(user);
    }
    if let Some(password) = from.get_password() {
        to.password(password);
    }
    if let Some(database) = from.get_dbname() {
        to.dbname(database);
    }
    if let Some(options) = from.get_options() {
        to.options(options);
    }
    if let Some(name) = from.get_application_name() {
        to.application_name(name);
    }
    if let Some(timeout) = from.get_connect_timeout() {
        to.connect_timeout(*timeout);
    }
    if let Some(timeout) = from.get_tcp_user_timeout() {
        to.tcp_user_timeout(*timeout);
    }
    to.keepalives(from.get_keepalives())
        .keepalives_idle(from.get_keepalives_idle())
        .ssl_mode(from.get_ssl_mode())
        .ssl_negotiation(from.get_ssl_negotiation())
        .target_session_attrs(from.get_target_session_attrs())
        .channel_binding(from.get_channel_binding())
        .load_balance_hosts(from.get_load_balance_hosts());
    if let Some(interval) = from.get_keepalives_interval() {
        to.keepalives_interval(interval);
    }
    if let Some(retries) = from.get_keepalives_retries() {
        to.keepalives_retries(retries);
    }
}
