//! Connections to Postgres: the URL, TLS, the pool and its bounds.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{Hook, HookError, Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use tokio::time::timeout;
use tokio_postgres::config::{Host, SslMode, SslNegotiation, TargetSessionAttrs};
use tokio_postgres::{Client, Config};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::bounds::{POOL_WAIT, STATEMENT_TIMEOUT};
use super::fitness::verify;
use super::hosts::{Hosts, address};
use super::obstacle::Obstacle;
use super::room::Room;
use crate::config::{is_host, option_name};

/// The longest wait for one lock. A write of a locked row may wait for two, that of the row and that of
/// its place in the queue; with the wait for a connection it is less than a write may take in all (5 s),
/// so that its outcome is known.
const LOCK_TIMEOUT: Duration = Duration::from_millis(1800);
/// The longest that one address may take to accept a connection; a name may have several.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(450);
/// The longest that making a connection takes, over all hosts.
const CREATE_TIMEOUT: Duration = Duration::from_secs(2);

/// Options of a URL whose values the service sets itself: a request must not wait for longer.
const OWN_BOUNDS: &[&str] = &[
    "connect_timeout",
    "tcp_user_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_retries",
];

/// How to connect: a URL understood, with this service's bounds added.
#[derive(Clone)]
pub struct Connector {
    config: Config,
    hosts: Hosts,
    room: Arc<Room>,
    unused: Vec<&'static str>,
}

/// Checks a URL, and returns it as it is to be used.
///
/// # Errors
///
/// What to write instead, if it is known, without any part of the URL but the name of an option.
pub fn check_url(url: &str) -> Result<String, Option<String>> {
    let (scheme, rest) = url.split_once("://").ok_or(None)?;
    let scheme = scheme.to_ascii_lowercase();
    match scheme.as_str() {
        "postgres" | "postgresql" => {}
        "psql" | "pgsql" | "postgis" => {
            return Err(Some(format!(
                "use `postgresql://` in place of `{scheme}://`"
            )));
        }
        "unix" => {
            return Err(Some(
                "use `postgresql:///DATABASE?user=USER&host=FOLDER`, where FOLDER is the one of \
                 the Unix socket"
                    .to_owned(),
            ));
        }
        other if other.starts_with("jdbc:") => {
            return Err(Some(
                "use `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`, without `jdbc:` and with \
                 user and password before the host"
                    .to_owned(),
            ));
        }
        other if other.starts_with("postgres+") || other.starts_with("postgresql+") => {
            return Err(Some(
                "use `postgresql://`, without the `+` and the name of a driver".to_owned(),
            ));
        }
        _ => return Err(None),
    }
    let url = format!("{scheme}://{rest}");
    Connector::new(&url, "check").map_err(Some)?;
    Ok(url)
}

/// The parts of a URL that tell where it leads to; `None` when it cannot be used.
#[must_use]
pub fn shown_url(url: &str) -> Option<String> {
    let (config, _) = understand(url).ok()?;
    let database = config
        .get_dbname()
        .or(config.get_user())
        .unwrap_or_default();
    Some(format!("postgres://{}/{database}", address(&config)))
}

impl Connector {
    /// Understands a URL. `sslmode` is `disable`; `prefer`, the default (TLS with whoever answers, plain
    /// text where there is no TLS; `allow` means the same); or `require`, `verify-ca` or
    /// `verify-full`, which all three encrypt and verify the server's certificate against the
    /// system's authorities or `sslrootcert`. With `sslrootcert` alone they are meant.
    ///
    /// # Errors
    ///
    /// What is wrong with the URL, without any part of it but the name of an option.
    pub fn new(url: &str, application_name: &str) -> Result<Self, String> {
        let (mut config, own) = understand(url)?;
        let tls = match config.get_ssl_mode() {
            SslMode::Disable => None,
            SslMode::Prefer => Some(MakeRustlsConnect::new(crate::tls::unverified_config()?)),
            _ => Some(tls(own.root_certificate.as_deref())?),
        };
        // The guard needs READ COMMITTED: only there does a statement see what was committed while
        // it waited for the lock.
        let mut arguments = format!(
            "-c statement_timeout={} -c lock_timeout={} \
             -c default_transaction_isolation=read\\ committed",
            STATEMENT_TIMEOUT.as_millis(),
            LOCK_TIMEOUT.as_millis()
        );
        if let Some(given) = config.get_options() {
            arguments = format!("{given} {arguments}");
        }
        config
            .options(arguments)
            .connect_timeout(CONNECT_TIMEOUT)
            .keepalives(true)
            .keepalives_idle(Duration::from_secs(10))
            .keepalives_interval(Duration::from_secs(3))
            .keepalives_retries(3)
            .tcp_user_timeout(Duration::from_secs(10))
            // Which of several hosts is the primary is found out by `Hosts`.
            .target_session_attrs(TargetSessionAttrs::Any);
        if config.get_application_name().is_none() {
            config.application_name(application_name);
        }
        Ok(Self {
            hosts: Hosts::new(&config, tls),
            room: Arc::default(),
            config,
            unused: own.unused,
        })
    }

    /// The options of the URL whose values are not used, because the service sets its own bounds.
    #[must_use]
    pub fn unused_options(&self) -> &[&'static str] {
        &self.unused
    }

    /// Where it connects to, for the log.
    #[must_use]
    pub fn address(&self) -> String {
        address(&self.config)
    }

    /// A pool of at most `size` connections, made when they are needed, each of them found fit
    /// before it is used.
    ///
    /// # Errors
    ///
    /// A bound that the pool refuses.
    pub fn pool(&self, size: usize) -> Result<Pool, String> {
        self.pool_over(self.hosts.clone().before_items(self.room.clone()), size)
    }

    /// The same for items, whose connections make room for those of the other pools.
    pub(super) fn pool_for_items(&self, size: usize) -> Result<Pool, String> {
        self.pool_over(self.hosts.clone(), size)
    }

    /// What is known of the server's room.
    pub(super) fn room(&self) -> Arc<Room> {
        self.room.clone()
    }

    fn pool_over(&self, hosts: Hosts, size: usize) -> Result<Pool, String> {
        let manager_config = ManagerConfig {
            recycling_method: RecyclingMethod::Fast,
        };
        let manager = Manager::from_connect(self.config.clone(), hosts, manager_config);
        let fit = Hook::async_fn(|client, _| {
            Box::pin(async {
                let verified = verify(client).await;
                verified.map_err(|unfit| HookError::message(unfit.to_string()))
            })
        });
        Pool::builder(manager)
            .max_size(size)
            .post_create(fit)
            .wait_timeout(Some(POOL_WAIT))
            .create_timeout(Some(CREATE_TIMEOUT))
            .recycle_timeout(Some(POOL_WAIT))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| crate::causes::chain(&error))
    }

    /// One connection outside of any pool, found fit: for migrations.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub async fn connect(&self) -> Result<Client, Obstacle> {
        let made = timeout(CREATE_TIMEOUT, self.hosts.client()).await;
        let (client, _) = made
            .map_err(|_| {
                Obstacle::passing(format!(
                    "no connection within {} s",
                    CREATE_TIMEOUT.as_secs()
                ))
            })?
            .map_err(|error| Obstacle::from(&error))?;
        verify(&client).await?;
        Ok(client)
    }
}

/// The options of a URL that are not tokio-postgres' business.
#[derive(Default)]
struct OwnOptions {
    tls_required: bool,
    /// `sslmode` leaves it open.
    tls_optional: bool,
    root_certificate: Option<String>,
    unused: Vec<&'static str>,
}

/// Understands every part of a URL, or says what to write instead.
fn understand(url: &str) -> Result<(Config, OwnOptions), String> {
    const ENCODE: &str = "use letters, digits and `.`, `-`, `_` in the parts of \
                          `postgres://USER:PASSWORD@HOST:PORT/DATABASE`, and percent-encode any \
                          other character in them";
    let (scheme, rest) = url.split_once("://").unwrap_or_default();
    // Of several, some parsers take the first one for the end of the password, and some the last one.
    if rest.matches('@').count() > 1 {
        return Err(
            "use one `@`, the one before the host, and write @ as %40 in user, password and options"
                .to_owned(),
        );
    }
    let (credentials, rest) = match rest.split_once('@') {
        Some((credentials, rest)) => (Some(credentials), rest),
        None => (None, rest),
    };
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (_, database) = place.split_once('/').unwrap_or_default();
    let user = credentials.and_then(|both| both.split(':').next());
    // The server repeats these two in its errors, so they must be what they seem to be.
    if !is_plain(database) || !is_plain(user.unwrap_or_default()) {
        return Err(ENCODE.to_owned());
    }
    let mut own = OwnOptions::default();
    let mut kept = Vec::new();
    let mut after_password = false;
    let mut verified = false;
    for (position, pair) in query.split('&').filter(|pair| !pair.is_empty()).enumerate() {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let refuse = |remedy: &str| {
            let name = option_name(position, name, after_password);
            Err(remedy.replace("OPTION", &name))
        };
        if let Some(bound) = OWN_BOUNDS.iter().find(|bound| **bound == name) {
            own.unused.push(bound);
            continue;
        }
        match (name, value) {
            ("sslmode", "verify-ca" | "verify-full") => own.tls_required = true,
            ("sslmode", "allow" | "prefer") => own.tls_optional = true,
            ("sslmode", "disable" | "require") => kept.push(pair),
            ("sslmode", _) => {
                return refuse(
                    "use `disable`, `allow`, `prefer`, `require`, `verify-ca` or `verify-full` for \
                     OPTION",
                );
            }
            ("sslrootcert", "system") => verified = true,
            ("sslrootcert", path) => {
                own.root_certificate = Some(path.replace("%2F", "/").replace("%2f", "/"));
                verified = true;
            }
            // The only one there is for a store: a standby answers with the past.
            ("target_session_attrs", "read-write") => {}
            ("target_session_attrs", _) => {
                return refuse("use `read-write` for OPTION, or leave it out");
            }
            ("user" | "dbname", value) if !is_plain(value) => return Err(ENCODE.to_owned()),
            ("password", _) => {
                kept.push(pair);
                after_password = true;
            }
            (
                "user" | "dbname" | "options" | "application_name" | "sslnegotiation" | "host"
                | "hostaddr" | "port" | "channel_binding" | "load_balance_hosts",
                _,
            ) => kept.push(pair),
            ("schema" | "currentSchema" | "search_path", _) => {
                return refuse("use `options=-csearch_path%3DSCHEMA` in place of OPTION");
            }
            ("pgbouncer" | "statement_cache_size" | "prepareThreshold", _) => {
                return refuse(
                    "use the URL without OPTION; PgBouncer needs version 1.21 or newer and \
                     session pooling",
                );
            }
            ("ssl" | "sslaccept" | "tls", _) => {
                return refuse("use `sslmode=require` or `sslmode=disable` in place of OPTION");
            }
            ("sslcert" | "sslkey" | "sslidentity" | "sslpassword", _) => {
                return refuse("use the URL without OPTION: client certificates are not supported");
            }
            (
                "connection_limit" | "pool_size" | "pool_max_size" | "max_connections"
                | "maximumPoolSize" | "pool_timeout",
                _,
            ) => {
                return refuse("use --database-pool-size (DATABASE_POOL_SIZE) in place of OPTION");
            }
            _ => return refuse("use the URL without OPTION, which is not supported"),
        }
    }
    let credentials = credentials.map_or(String::new(), |both| format!("{both}@"));
    let query = match kept.as_slice() {
        [] => String::new(),
        kept => format!("?{}", kept.join("&")),
    };
    let mut config = Config::from_str(&format!("{scheme}://{credentials}{place}{query}"))
        .map_err(|error| format!("{ENCODE}; {}", crate::causes::chain(&error)))?;
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        return Err(
            "use a URL with a host, such as `postgres://USER:PASSWORD@HOST/DATABASE`".into(),
        );
    }
    let hosts_are_hosts = config.get_hosts().iter().all(|host| match host {
        Host::Tcp(name) => is_host(name),
        Host::Unix(_) => true,
    });
    let no_control = |text: Option<&str>| !text.unwrap_or_default().contains(char::is_control);
    if !hosts_are_hosts || !no_control(config.get_dbname()) || !no_control(config.get_user()) {
        return Err(ENCODE.to_owned());
    }
    if verified && own.tls_optional {
        return Err("use `sslmode=verify-full` with `sslrootcert`".into());
    }
    if own.tls_required || (verified && config.get_ssl_mode() == SslMode::Prefer) {
        config.ssl_mode(SslMode::Require);
    }
    if config.get_ssl_negotiation() == SslNegotiation::Direct
        && config.get_ssl_mode() != SslMode::Require
    {
        return Err("use `sslmode=verify-full` with `sslnegotiation=direct`".into());
    }
    Ok((config, own))
}

/// Whether a part of a URL needs no percent-encoding, or has it.
fn is_plain(part: &str) -> bool {
    part.chars().all(|letter| {
        letter.is_alphanumeric() || matches!(letter, '.' | '-' | '_' | '~' | '$' | '%')
    })
}

fn tls(root_certificate: Option<&str>) -> Result<MakeRustlsConnect, String> {
    crate::tls::client_config(root_certificate, "?sslrootcert=").map(MakeRustlsConnect::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_understood_whatever_the_case_of_their_scheme() {
        for (url, used) in [
            ("postgres://labuser:pw@localhost:5432/items_db", None),
            ("postgresql://u@h/d?sslmode=disable", None),
            (
                "postgres://u:p%40w@h/d?sslmode=prefer&application_name=x",
                None,
            ),
            ("postgres://u@h/d?sslmode=allow", None),
            ("postgres://u@h/d?options=-csearch_path%3Dshop", None),
            ("postgres://u@h/d?target_session_attrs=read-write", None),
            ("postgres://u@h1:1,h2:2/d", None),
            ("PostgreSQL://u@H/D", Some("postgresql://u@H/D")),
        ] {
            let used = used.unwrap_or(url);
            assert_eq!(check_url(url).as_deref(), Ok(used), "{url}");
        }
    }

    #[test]
    fn what_is_refused_says_what_to_write_and_nothing_of_the_url() {
        for (url, remedy) in [
            (
                "postgres://u:s3cret@h:port/d",
                "invalid value for option `port`",
            ),
            ("postgres:///d?user=s3cret", "with a host"),
            ("postgres://u:s3cret@h/d?sslmode=perhaps", "`require`"),
            ("postgres://u:s3cret@h/d?colour=red", "without `?colour=`"),
            (
                "postgres://u:s3cret@h/d?sslmode=verify-full&sslrootcert=/s3cret",
                "`?sslrootcert=`",
            ),
            ("postgresql+asyncpg://u:s3cret@h/d", "use `postgresql://`"),
            ("postgres+psycopg2://u:s3cret@h/d", "use `postgresql://`"),
            ("pgsql://u:s3cret@h/d", "use `postgresql://`"),
            ("jdbc:postgresql://h/d?password=s3cret", "without `jdbc:`"),
            ("unix:///run/s3cret", "host=FOLDER"),
            (
                "postgres://u:s3cret@h/d?schema=shop",
                "options=-csearch_path%3DSCHEMA",
            ),
            (
                "postgres://u:s3cret@h/d?pgbouncer=true",
                "without `?pgbouncer=`",
            ),
            (
                "postgres://u:s3cret@h/d?connection_limit=5",
                "DATABASE_POOL_SIZE",
            ),
            ("postgres://u:s3cret@h/d?ssl=true", "use `sslmode=require`"),
            ("postgres://u@h/d?sslkey=s3cret", "client certificates"),
            (
                "postgres://u:s3cret@h/d?sslmode=prefer&sslrootcert=/s3cret",
                "`sslmode=verify-full`",
            ),
            (
                "postgres://u:s3cret@h/d?sslnegotiation=direct",
                "`sslmode=verify-full`",
            ),
            (
                "postgres://u@h/d?target_session_attrs=primary",
                "use `read-write`",
            ),
            (
                "postgres://u@h/d?target_session_attrs=any",
                "use `read-write`",
            ),
            ("postgres://u:s3@cret@h/d", "write @ as %40"),
            ("postgres://u:@s3cret@h/d", "write @ as %40"),
            ("postgres://u:p@s3cret@/d", "write @ as %40"),
            ("postgres://u@s3:cret@h/d", "write @ as %40"),
            ("postgres://u:p@h/d@s3cret", "write @ as %40"),
            (
                "postgres://u:p@h/d?application_name=s3@cret",
                "write @ as %40",
            ),
            ("postgres://h/d?password=s3@cret", "percent-encode"),
            ("postgres://h/d?application_name=s3@cret", "percent-encode"),
            ("postgres://u:x@h/d%0D", "percent-encode"),
            ("postgres://u:x@h/d?password=a&s3cret=b", "option number 2"),
        ] {
            let reason = check_url(url).unwrap_err().unwrap();
            assert!(reason.starts_with("use "), "{url}: {reason}");
            assert!(reason.contains(remedy), "{url}: {reason}");
            assert!(
                !reason.contains("s3") && !reason.contains("cret"),
                "{reason}"
            );
        }
        for url in ["mysql://u:s3cret@h/d", "host=h", ""] {
            assert_eq!(check_url(url), Err(None));
        }
    }

    #[test]
    fn an_authority_alone_means_that_the_server_is_verified() {
        let modes = [
            ("", SslMode::Prefer),
            ("?sslmode=allow", SslMode::Prefer),
            ("?sslmode=disable", SslMode::Disable),
            ("?sslrootcert=system", SslMode::Require),
            ("?sslrootcert=/file", SslMode::Require),
            ("?sslmode=disable&sslrootcert=/file", SslMode::Disable),
        ];
        for (options, mode) in modes {
            let (config, _) = understand(&format!("postgres://u@h/d{options}")).unwrap();
            assert_eq!(config.get_ssl_mode(), mode, "{options}");
        }
    }

    #[test]
    fn options_that_are_not_used_are_told() {
        let url = "postgres://u@h/d?connect_timeout=10&keepalives=1&application_name=x";
        let connector = Connector::new(url, "test").unwrap();
        assert_eq!(
            connector.unused_options(),
            ["connect_timeout", "keepalives"]
        );
    }
}
