//! The hosts of a URL: which of them to connect to.
//!
//! Each has a bound of its own, the handshake included, so that one that hangs does not use up the time
//! of the others; and the one that was good is asked first the next time.
//!
//! Where `sslmode` leaves it open, TLS is tried first and plain text then, as libpq does it; and the log
//! says once when a password has left the machine in plain text.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use deadpool_postgres::Connect;
use tokio::net::lookup_host;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::config::{Host, LoadBalanceHosts, SslMode};
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Client, Config, Error, NoTls, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::bounds::POOL_WAIT;
use super::obstacle::{Lasts, lasts, more_hopeful};
use super::room::{Room, is_full};
use crate::causes::chain;

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
    /// For each host, whether its first connection in plain text was looked at.
    seen_plain: Arc<[AtomicBool]>,
    /// For connections that matter more than those for items, which make room for them.
    room: Option<Arc<Room>>,
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
            seen_plain: configs.iter().map(|_| AtomicBool::new(false)).collect(),
            configs: configs.into(),
            tls,
            first: Arc::new(first.into()),
            room: None,
        }
    }

    /// The same for connections for which those for items make room.
    pub(super) fn before_items(mut self, room: Arc<Room>) -> Self {
        self.room = Some(room);
        self
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
        let (mut failed, mut hung) = (None, false);
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
                Ok(Err(error)) => failed = Some(more_hopeful(failed.take(), error)),
                Err(_) => {
                    hung = true;
                    // Whoever waits may give up before the end of this loop.
                    self.first.store((index + 1) % count, Ordering::Relaxed);
                }
            }
        }
        match (best, failed) {
            (Some((_, index, connected)), _) => {
                self.first.store(index, Ordering::Relaxed);
                Ok(connected)
            }
            (None, Some(error)) if !hung || lasts(&error) == Lasts::AWhile => Err(error),
            // Those that hang may yet answer: the caller's own bound ends this.
            (None, _) => self.connect_to(first % count).await,
        }
    }

    async fn connect_to(&self, index: usize) -> Result<Connected, Error> {
        let config = &self.configs[index];
        let by_socket = matches!(config.get_hosts().first(), Some(Host::Unix(_)));
        let preferred = config.get_ssl_mode() == SslMode::Prefer;
        let Some(tls) = self.tls.as_ref().filter(|_| !(by_socket && preferred)) else {
            return plain(config).await;
        };
        let tls = Noted::new(tls.clone());
        let why = match config.connect(tls.clone()).await {
            Ok((client, connection)) => {
                let connected = (client, tokio::spawn(run(connection)));
                if tls.is_begun() {
                    return Ok(connected);
                }
                self.warn_of_plain(index, "the server has no TLS").await;
                return Ok(connected);
            }
            Err(error) if preferred && refuses_tls(&error, &tls) => chain(&error),
            Err(error) => return Err(error),
        };
        let connected = plain(config).await?;
        self.warn_of_plain(index, &why).await;
        Ok(connected)
    }

    /// Says once for each host that its password went over the network in plain text.
    async fn warn_of_plain(&self, index: usize, why: &str) {
        let config = &self.configs[index];
        if self.seen_plain[index].swap(true, Ordering::Relaxed)
            || config.get_password().is_none()
            || !leaves_the_machine(config).await
        {
            return;
        }
        tracing::warn!(
            "the connection to Postgres at {} is not encrypted ({why}), so the password and all data \
             can be read on their way: use `sslmode=verify-full` in --database (POSTGRES_URL, \
             DATABASE_URL), or `sslmode=disable` if it is meant so",
            address(config)
        );
    }
}

async fn plain(config: &Config) -> Result<Connected, Error> {
    let (client, connection) = config.connect(NoTls).await?;
    Ok((client, tokio::spawn(run(connection))))
}

/// Whether it is worth trying without TLS, for which nobody has been asked for a password yet: there was
/// no answer to the request for TLS, the handshake failed, or `pg_hba.conf` lets nobody in this way.
fn refuses_tls(error: &Error, tls: &Noted) -> bool {
    match error.as_db_error() {
        Some(answer) => {
            *answer.code() == SqlState::INVALID_AUTHORIZATION_SPECIFICATION
                && answer.routine() == Some("ClientAuthentication")
        }
        // The client has no better way to tell.
        None if tls.is_begun() => error.to_string().starts_with("error performing TLS"),
        None => error.to_string().starts_with("error communicating"),
    }
}

/// Whether a host is another machine, as far as its address tells.
async fn leaves_the_machine(config: &Config) -> bool {
    let other = |address: IpAddr| !address.to_canonical().is_loopback();
    match (config.get_hostaddrs().first(), config.get_hosts().first()) {
        (Some(address), _) => other(*address),
        (None, Some(Host::Tcp(name))) => match lookup_host((name.as_str(), 0)).await {
            Ok(mut addresses) => addresses.any(|address| other(address.ip())),
            Err(_) => true,
        },
        _ => false,
    }
}

/// TLS that notes whether it was begun, which the server decides.
#[derive(Clone)]
struct Noted {
    tls: MakeRustlsConnect,
    begun: Arc<AtomicBool>,
}

type Rustls = <MakeRustlsConnect as MakeTlsConnect<Socket>>::TlsConnect;

struct NotedConnect {
    tls: Rustls,
    begun: Arc<AtomicBool>,
}

impl Noted {
    fn new(tls: MakeRustlsConnect) -> Self {
        let begun = Arc::default();
        Self { tls, begun }
    }

    fn is_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }
}

impl MakeTlsConnect<Socket> for Noted {
    type Stream = <Rustls as TlsConnect<Socket>>::Stream;
    type TlsConnect = NotedConnect;
    type Error = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Error;

    fn make_tls_connect(&mut self, domain: &str) -> Result<NotedConnect, Self::Error> {
        Ok(NotedConnect {
            tls: MakeTlsConnect::<Socket>::make_tls_connect(&mut self.tls, domain)?,
            begun: self.begun.clone(),
        })
    }
}

impl TlsConnect<Socket> for NotedConnect {
    type Stream = <Rustls as TlsConnect<Socket>>::Stream;
    type Error = <Rustls as TlsConnect<Socket>>::Error;
    type Future = <Rustls as TlsConnect<Socket>>::Future;

    fn connect(self, stream: Socket) -> Self::Future {
        self.begun.store(true, Ordering::Relaxed);
        self.tls.connect(stream)
    }
}

impl Connect for Hosts {
    fn connect(
        &self,
        _: &Config,
    ) -> Pin<Box<dyn Future<Output = Result<Connected, Error>> + Send + '_>> {
        Box::pin(async {
            let connected = self.client().await;
            if let (Some(room), Err(error)) = (&self.room, &connected)
                && is_full(error)
            {
                room.make(&chain(error));
            }
            connected
        })
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
    let name_of = |one: &mut Config, index: usize| {
        // Without a name there is no TLS.
        if let (true, Some(address)) = (
            config.get_hosts().is_empty(),
            config.get_hostaddrs().get(index),
        ) {
            one.host(address.to_string());
        }
    };
    if count <= 1 {
        let mut one = config.clone();
        name_of(&mut one, 0);
        return vec![one];
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
                None => name_of(&mut one, index),
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

/// Each host with its port.
pub(super) fn address(config: &Config) -> String {
    let names: Vec<String> = match config.get_hosts() {
        [] => config
            .get_hostaddrs()
            .iter()
            .map(IpAddr::to_string)
            .collect(),
        hosts => hosts
            .iter()
            .map(|host| match host {
                Host::Tcp(name) => name.clone(),
                Host::Unix(folder) => folder.display().to_string(),
            })
            .collect(),
    };
    let ports = config.get_ports();
    let port_of = |index: usize| match ports {
        [one] => *one,
        ports => ports.get(index).copied().unwrap_or(5432),
    };
    let places = names.iter().enumerate().map(|(index, name)| {
        let port = port_of(index);
        if name.contains(':') {
            format!("[{name}]:{port}")
        } else {
            format!("{name}:{port}")
        }
    });
    places.collect::<Vec<_>>().join(",")
}
