//! Configuration: flags and environment variables in, one checked [`Config`] out.
//!
//! A flag wins over its variable; an empty variable counts as not set, and every text is
//! [`cleaned`] in the same way. A wrong value is a [`ConfigError`], which is one line. Nothing here
//! connects to anything. What is printed of a setting that connects somewhere are the parts that
//! were understood, or nothing but the form of the text.

mod error;
mod redis;
pub(crate) mod setting;
mod value;

use std::fmt;
use std::io::Read;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tracing::level_filters::LevelFilter;

use crate::engine::{Consistency, UnknownConsistency};
use crate::listen;
use crate::middleware::access::{AdminAccess, AdminToken, AllowedHosts};
use crate::telemetry::settings::TraceSettings;

pub use error::ConfigError;
pub use value::{cleaned, form, is_host, option_name, shown};

/// The flags of `writethrough serve`, as text. [`Config::from_args`] checks them.
#[derive(clap::Args, Clone, Default)]
pub struct ServeArgs {
    /// Address and port to listen on; `:8000` is port 8000 of all addresses, and so is the variable
    /// PORT, which is read when LISTEN_ADDR is not set [default: 127.0.0.1:8000].
    #[arg(
        long,
        env = "LISTEN_ADDR",
        value_name = "ADDRESS:PORT",
        hide_env_values = true
    )]
    pub listen: Option<String>,

    /// A second address, for /cache/... and /metrics alone: --listen does not serve them then [default:
    /// none, --listen serves all].
    #[arg(
        long,
        env = "ADMIN_LISTEN_ADDR",
        value_name = "ADDRESS:PORT",
        hide_env_values = true
    )]
    pub admin_listen: Option<String>,

    /// The secret that /cache/... and /metrics ask for, as `Authorization: Bearer TOKEN`: 16 characters
    /// or more. `none`: everybody may use them. The variable ADMIN_TOKEN_FILE names a file that holds
    /// it [default: everybody may look, and POST /cache/clear is for this machine only].
    #[arg(
        long,
        env = "ADMIN_TOKEN",
        value_name = "TOKEN",
        hide_env_values = true
    )]
    pub admin_token: Option<String>,

    /// Names of this service that a request may have in `Host`, separated by commas, or `*`;
    /// `.example.org` stands for all names below it, too. IP addresses, `localhost` and names without a
    /// dot may always be used [default: no other name on an address of this machine alone such as
    /// 127.0.0.1, every name elsewhere].
    #[arg(
        long,
        env = "ALLOWED_HOSTS",
        value_name = "NAME,...",
        hide_env_values = true
    )]
    pub allowed_hosts: Option<String>,

    /// The store: `embedded` (the file writethrough.db), `sqlite:PATH` or `postgres://...`. The
    /// variable DATABASE_URL is read when POSTGRES_URL is not set. POSTGRES_URL_FILE and
    /// DATABASE_URL_FILE name a file that holds the URL [default: embedded].
    #[arg(long, env = "POSTGRES_URL", value_name = "URL", hide_env_values = true)]
    pub database: Option<String>,

    /// The cache: `in-process`, `redis://...` or `rediss://...`. The variable REDIS_URL_FILE names a
    /// file that holds the URL [default: in-process].
    #[arg(long, env = "REDIS_URL", value_name = "URL", hide_env_values = true)]
    pub cache: Option<String>,

    /// How long a value stays cached, in seconds [default: 300].
    #[arg(
        long,
        env = "CACHE_TTL_SECONDS",
        value_name = "SECONDS",
        hide_env_values = true
    )]
    pub ttl: Option<String>,

    /// `strict` (linearizable), `textbook` (commit, then SET: not linearizable) or `off` (no cache)
    /// [default: strict].
    #[arg(long, env = "CONSISTENCY", value_name = "MODE", hide_env_values = true)]
    pub consistency: Option<String>,

    /// Room for the in-process cache, in bytes [default: 67108864].
    #[arg(
        long,
        env = "CACHE_CAPACITY_BYTES",
        value_name = "BYTES",
        hide_env_values = true
    )]
    pub cache_capacity_bytes: Option<String>,

    /// The longest item that is cached, in bytes; a longer one is served from the database
    /// [default: 1048576].
    #[arg(
        long,
        env = "CACHE_MAX_VALUE_BYTES",
        value_name = "BYTES",
        hide_env_values = true
    )]
    pub cache_max_value_bytes: Option<String>,

    /// The longest part of a list that is cached, in bytes; a longer one is served from the database
    /// [default: 262144].
    #[arg(
        long,
        env = "CACHE_MAX_PAGE_BYTES",
        value_name = "BYTES",
        hide_env_values = true
    )]
    pub cache_max_page_bytes: Option<String>,

    /// Connections to Postgres for items [default: 16].
    #[arg(
        long,
        env = "DATABASE_POOL_SIZE",
        value_name = "N",
        hide_env_values = true
    )]
    pub database_pool_size: Option<String>,

    /// Requests served at once; more wait for a second at most and then get 503 [default: 1024].
    #[arg(long, env = "MAX_IN_FLIGHT", value_name = "N", hide_env_values = true)]
    pub max_in_flight: Option<String>,

    /// Client connections held at once, as far as the limit of open files allows; for one more, the one
    /// that was idle for the longest time is closed [default: 4096].
    #[arg(
        long,
        env = "MAX_CONNECTIONS",
        value_name = "N",
        hide_env_values = true
    )]
    pub max_connections: Option<String>,

    /// How long requests under way may take to finish after SIGTERM, in seconds [default: 10].
    #[arg(
        long,
        env = "DRAIN_SECONDS",
        value_name = "SECONDS",
        hide_env_values = true
    )]
    pub drain: Option<String>,

    /// How long to go on accepting, with /readyz already at 503, before draining, in seconds
    /// [default: 0].
    #[arg(
        long,
        env = "DRAIN_DELAY_SECONDS",
        value_name = "SECONDS",
        hide_env_values = true
    )]
    pub drain_delay: Option<String>,

    /// `human` or `json` [default: human].
    #[arg(
        long,
        env = "LOG_FORMAT",
        value_name = "FORMAT",
        hide_env_values = true
    )]
    pub log_format: Option<String>,

    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,writethrough=debug`.
    /// The variable RUST_LOG is read when LOG_LEVEL is not set [default: info].
    #[arg(long, env = "LOG_LEVEL", value_name = "LEVEL", hide_env_values = true)]
    pub log_level: Option<String>,

    /// The service's name in traces and in /health [default: api].
    #[arg(
        long,
        env = "OTEL_SERVICE_NAME",
        value_name = "NAME",
        hide_env_values = true
    )]
    pub service_name: Option<String>,

    /// Where to send traces, over OTLP: http://HOST:4318 for http/protobuf, http://HOST:4317 for grpc.
    /// Other variables OTEL_... are read too, see docs/OPERATIONS.md [default: nowhere].
    #[arg(
        long,
        env = "OTEL_EXPORTER_OTLP_ENDPOINT",
        value_name = "URL",
        hide_env_values = true
    )]
    pub otlp_endpoint: Option<String>,

    /// Which requests are traced: `always_on`, `always_off`, `traceidratio`, or one of them after
    /// `parentbased_` [default: parentbased_always_on].
    #[arg(
        long,
        env = "OTEL_TRACES_SAMPLER",
        value_name = "SAMPLER",
        hide_env_values = true
    )]
    pub traces_sampler: Option<String>,

    /// The ratio of `traceidratio`, 0 to 1 [default: 1].
    #[arg(
        long,
        env = "OTEL_TRACES_SAMPLER_ARG",
        value_name = "RATIO",
        hide_env_values = true
    )]
    pub traces_sampler_arg: Option<String>,
}

/// Where items are kept.
#[derive(Clone, PartialEq, Eq)]
pub enum Database {
    /// A SQLite file of this process.
    Sqlite(PathBuf),
    /// A SQLite database in memory, which vanishes with the process.
    Temporary,
    /// A Postgres server. May contain a password.
    Postgres(String),
}

/// Where cached values are kept.
#[derive(Clone, PartialEq, Eq)]
pub enum CacheBackend {
    /// In this process.
    InProcess,
    /// A Redis server. May contain a password.
    Redis(String),
}

/// The form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Human,
    /// One JSON object a line.
    Json,
}

/// Which requests are traced. The decision is made before a span exists.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// The share of requests traced when no caller has decided, 0 to 1.
    pub ratio: f64,
    /// Whether an incoming `traceparent` decides instead.
    pub parent_based: bool,
}

/// Everything that `serve` needs to know.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where the routes for operators are served, if not there.
    pub admin_listen: Option<SocketAddr>,
    /// Who may use the routes for operators.
    pub admin: AdminAccess,
    /// The names that a request may have in `Host`; `None` is every name, but no name of others where
    /// the listener is of this machine alone.
    pub allowed_hosts: Option<AllowedHosts>,
    /// The store.
    pub database: Database,
    /// The cache.
    pub cache: CacheBackend,
    /// How long a value stays cached.
    pub ttl: Duration,
    /// How the cache and the store are kept together.
    pub consistency: Consistency,
    /// Room for the in-process cache.
    pub cache_capacity_bytes: u64,
    /// The longest item that is cached.
    pub cache_max_value_bytes: usize,
    /// The longest part of a list that is cached.
    pub cache_max_page_bytes: usize,
    /// Connections to Postgres for items.
    pub database_pool_size: usize,
    /// Requests served at once.
    pub max_in_flight: usize,
    /// Client connections held at once.
    pub max_connections: usize,
    /// How long requests under way may take to finish at shutdown.
    pub drain: Duration,
    /// How long to go on accepting at shutdown before draining.
    pub drain_delay: Duration,
    /// The form of the log.
    pub log_format: LogFormat,
    /// The filter of the log.
    pub log_level: String,
    /// The service's name.
    pub service_name: String,
    /// How traces are made and where they go; nowhere makes tracing free.
    pub traces: TraceSettings,
    /// Which requests are traced.
    pub sampling: Sampling,
}

/// A setting that is a whole number: its names, its default and what is allowed. The help and the
/// tables of the documents repeat the defaults; a test compares them.
struct Number<T> {
    setting: &'static str,
    default: T,
    least: T,
    most: T,
}

const TTL: Number<u64> = Number {
    setting: "--ttl (CACHE_TTL_SECONDS)",
    default: 300,
    least: 1,
    most: 31_536_000,
};
const CAPACITY: Number<u64> = Number {
    setting: "--cache-capacity-bytes (CACHE_CAPACITY_BYTES)",
    default: 64 << 20,
    least: 1 << 20,
    most: 1 << 40,
};
const MAX_VALUE: Number<usize> = Number {
    setting: "--cache-max-value-bytes (CACHE_MAX_VALUE_BYTES)",
    default: 1 << 20,
    least: 1,
    most: 16 << 20,
};
const MAX_PAGE: Number<usize> = Number {
    setting: "--cache-max-page-bytes (CACHE_MAX_PAGE_BYTES)",
    default: 256 << 10,
    least: 1,
    most: 16 << 20,
};
const POOL: Number<usize> = Number {
    setting: "--database-pool-size (DATABASE_POOL_SIZE)",
    default: 16,
    least: 1,
    most: 1000,
};
const IN_FLIGHT: Number<usize> = Number {
    setting: "--max-in-flight (MAX_IN_FLIGHT)",
    default: 1024,
    least: 1,
    most: 1_000_000,
};
const CONNECTIONS: Number<usize> = Number {
    setting: "--max-connections (MAX_CONNECTIONS)",
    default: 4096,
    least: 1,
    most: 1_000_000,
};
const DRAIN: Number<u64> = Number {
    setting: "--drain (DRAIN_SECONDS)",
    default: 10,
    least: 0,
    most: 600,
};
const DRAIN_DELAY: Number<u64> = Number {
    setting: "--drain-delay (DRAIN_DELAY_SECONDS)",
    default: 0,
    least: 0,
    most: 600,
};

impl<T: FromStr + PartialOrd + fmt::Display + Copy> Number<T> {
    fn of(&self, value: &Option<String>) -> Result<T, ConfigError> {
        parsed(
            value,
            self.setting,
            self.default,
            |n| (self.least..=self.most).contains(n),
            || format!("use a whole number from {} to {}", self.least, self.most),
        )
    }
}

/// The file of the embedded default, in the current folder.
pub const EMBEDDED_FILE: &str = "writethrough.db";

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8000)),
            admin_listen: None,
            admin: AdminAccess::default(),
            allowed_hosts: None,
            database: Database::Sqlite(PathBuf::from(EMBEDDED_FILE)),
            cache: CacheBackend::InProcess,
            ttl: Duration::from_secs(TTL.default),
            consistency: Consistency::Strict,
            cache_capacity_bytes: CAPACITY.default,
            cache_max_value_bytes: MAX_VALUE.default,
            cache_max_page_bytes: MAX_PAGE.default,
            database_pool_size: POOL.default,
            max_in_flight: IN_FLIGHT.default,
            max_connections: CONNECTIONS.default,
            drain: Duration::from_secs(DRAIN.default),
            drain_delay: Duration::from_secs(DRAIN_DELAY.default),
            log_format: LogFormat::Human,
            log_level: "info".to_owned(),
            service_name: "api".to_owned(),
            traces: TraceSettings::default(),
            sampling: Sampling {
                ratio: 1.0,
                parent_based: true,
            },
        }
    }
}

impl Config {
    /// Checks the flags. `variable` looks up the environment variables that stand in for another
    /// one (`DATABASE_URL`, `RUST_LOG`, `PORT`), that name a file, or that have no flag (`OTEL_...`).
    ///
    /// # Errors
    ///
    /// [`ConfigError`] for the first setting that is wrong.
    pub fn from_args(
        args: &ServeArgs,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let default = Self::default();
        for (name, file) in setting::FILES {
            let both = [name, file].map(|name| given(&variable(name), file));
            if let [Ok(Some(_)), Ok(Some(path))] = both {
                let allowed = format!("use either it or {name}, which is set too");
                return Err(ConfigError::new(file, &path, allowed));
            }
        }
        let log_level = match given(&args.log_level, setting::LOG_LEVEL)? {
            None => given(&variable("RUST_LOG"), setting::LOG_LEVEL)?,
            level => level,
        };
        let sampling = sampling(
            given(&args.traces_sampler, setting::SAMPLER)?,
            &args.traces_sampler_arg,
        )?;
        let mut traces =
            TraceSettings::from_variables(given(&args.otlp_endpoint, setting::OTLP)?, &variable)?;
        if sampling.unused_argument {
            traces.notes.push(format!(
                "{} is set and has no effect: only `traceidratio` takes a ratio",
                setting::SAMPLER_ARG
            ));
        }
        let service_name = match given(&args.service_name, setting::SERVICE_NAME)? {
            None => traces.service_name(),
            name => name,
        };
        Ok(Self {
            listen: listen(&args.listen, &variable)?,
            admin_listen: given(&args.admin_listen, setting::ADMIN_LISTEN)?
                .map(|text| parse_listen(setting::ADMIN_LISTEN, &text))
                .transpose()?,
            admin: admin_access(args, &variable)?,
            allowed_hosts: given(&args.allowed_hosts, setting::ALLOWED_HOSTS)?
                .map(|text| parse_allowed_hosts(&text))
                .transpose()?,
            database: database_url(args, &variable)?
                .map_or(Ok(default.database), |text| parse_database(&text))?,
            cache: cache_url(args, &variable)?
                .map_or(Ok(default.cache), |text| parse_cache(&text))?,
            ttl: Duration::from_secs(TTL.of(&args.ttl)?),
            consistency: given(&args.consistency, setting::CONSISTENCY)?
                .map_or(Ok(default.consistency), |text| parse_consistency(&text))?,
            cache_capacity_bytes: CAPACITY.of(&args.cache_capacity_bytes)?,
            cache_max_value_bytes: MAX_VALUE.of(&args.cache_max_value_bytes)?,
            cache_max_page_bytes: MAX_PAGE.of(&args.cache_max_page_bytes)?,
            database_pool_size: POOL.of(&args.database_pool_size)?,
            max_in_flight: IN_FLIGHT.of(&args.max_in_flight)?,
            max_connections: CONNECTIONS.of(&args.max_connections)?,
            drain: Duration::from_secs(DRAIN.of(&args.drain)?),
            drain_delay: Duration::from_secs(DRAIN_DELAY.of(&args.drain_delay)?),
            log_format: given(&args.log_format, setting::LOG_FORMAT)?
                .map_or(Ok(default.log_format), |text| parse_log_format(&text))?,
            log_level: log_level.map_or(Ok(default.log_level), parse_log_level)?,
            service_name: service_name.map_or(Ok(default.service_name), parse_service_name)?,
            traces,
            sampling: sampling.decision,
        })
    }
}

/// A setting's value, [`cleaned`]; `None` when it is empty, because compose files pass on unset
/// variables as empty ones.
fn given(value: &Option<String>, setting: &'static str) -> Result<Option<String>, ConfigError> {
    let Some(text) = value else {
        return Ok(None);
    };
    cleaned(text).map_err(|allowed| ConfigError::new(setting, text, allowed))
}

/// The address to listen on: the flag or its variable, else all addresses at `PORT`, else the
/// default. What serves and what asks whether it does must agree on it.
///
/// # Errors
///
/// [`ConfigError`].
pub fn listen(
    value: &Option<String>,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<SocketAddr, ConfigError> {
    if let Some(text) = given(value, setting::LISTEN)? {
        return parse_listen(setting::LISTEN, &text);
    }
    if let Some(text) = given(&variable(setting::PORT), setting::PORT)? {
        return listen::parse_port(&text)
            .map(|port| (Ipv6Addr::UNSPECIFIED, port).into())
            .ok_or_else(|| ConfigError::new(setting::PORT, &text, "use a number up to 65535"));
    }
    Ok(Config::default().listen)
}

fn parse_listen(setting: &'static str, text: &str) -> Result<SocketAddr, ConfigError> {
    listen::parse(text).map_err(|allowed| ConfigError::new(setting, text, allowed))
}

/// Who may use the routes for operators. `none` is a choice that is made in plain sight, so it is no
/// secret that a file may hold.
fn admin_access(
    args: &ServeArgs,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<AdminAccess, ConfigError> {
    const ALLOWED: &str = "use 16 to 512 visible ASCII characters without a space, such as \
                           `openssl rand -hex 32` prints";
    let (setting, token) = match given(&args.admin_token, setting::ADMIN_TOKEN)? {
        Some(text) if text == "none" => return Ok(AdminAccess::Anyone),
        Some(text) => (setting::ADMIN_TOKEN, Some(text)),
        None => (
            setting::ADMIN_TOKEN_FILE,
            in_file(setting::ADMIN_TOKEN_FILE, variable)?,
        ),
    };
    let Some(text) = token else {
        return Ok(AdminAccess::Local);
    };
    match AdminToken::new(&text) {
        Some(token) => Ok(AdminAccess::Token(token)),
        None if setting == setting::ADMIN_TOKEN => Err(ConfigError::new(
            setting,
            &text,
            format!("{ALLOWED}, or `none` to let everybody in"),
        )),
        None => Err(ConfigError::new(setting, &text, ALLOWED)),
    }
}

fn parse_allowed_hosts(text: &str) -> Result<AllowedHosts, ConfigError> {
    if text == "*" {
        return Ok(AllowedHosts::Any);
    }
    let names: Vec<_> = text
        .split(',')
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    if names.iter().all(|name| is_host(name)) {
        Ok(AllowedHosts::Names(names))
    } else {
        Err(ConfigError::new(
            setting::ALLOWED_HOSTS,
            text,
            "use names such as `shop.example.org`, or `.example.org` for all below it, without a \
             port and separated by commas; or `*`",
        ))
    }
}

/// The database's URL, from the first place that has one.
fn database_url(
    args: &ServeArgs,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<Option<String>, ConfigError> {
    if let Some(url) = given(&args.database, setting::DATABASE)? {
        return Ok(Some(url));
    }
    if let Some(url) = in_file(setting::POSTGRES_URL_FILE, variable)? {
        return Ok(Some(url));
    }
    match given(&variable("DATABASE_URL"), setting::DATABASE)? {
        None => in_file(setting::DATABASE_URL_FILE, variable),
        url => Ok(url),
    }
}

/// The cache's URL, from the first place that has one.
fn cache_url(
    args: &ServeArgs,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<Option<String>, ConfigError> {
    match given(&args.cache, setting::CACHE)? {
        None => in_file(setting::REDIS_URL_FILE, variable),
        url => Ok(url),
    }
}

/// What the file holds that a variable names. A variable that names a file without a value in it
/// is an error: without it the service would start with the default.
fn in_file(
    name: &'static str,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<Option<String>, ConfigError> {
    /// More than any URL or token has.
    const LONGEST: u64 = 64 << 10;
    let Some(path) = given(&variable(name), name)? else {
        return Ok(None);
    };
    let wrong = |why: String| {
        let allowed = format!("use the path of a file that holds the value; {why}");
        ConfigError::new(name, &path, allowed)
    };
    // A pipe could be waited for without end.
    let metadata = std::fs::metadata(&path).map_err(|error| wrong(error.to_string()))?;
    if !metadata.is_file() {
        return Err(wrong("it is not a regular file".into()));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(&path)
        .and_then(|file| file.take(LONGEST + 1).read_to_end(&mut bytes))
        .map_err(|error| wrong(error.to_string()))?;
    if bytes.len() as u64 > LONGEST {
        return Err(wrong(format!("it has more than {LONGEST} bytes")));
    }
    let text =
        cleaned(&String::from_utf8_lossy(&bytes)).map_err(|allowed| wrong(allowed.into()))?;
    text.map(Some).ok_or_else(|| wrong("it is empty".into()))
}

fn parsed<T: FromStr>(
    value: &Option<String>,
    setting: &'static str,
    default: T,
    allowed: impl Fn(&T) -> bool,
    describe: impl Fn() -> String,
) -> Result<T, ConfigError> {
    let Some(text) = given(value, setting)? else {
        return Ok(default);
    };
    match text.parse() {
        Ok(parsed) if allowed(&parsed) => Ok(parsed),
        _ => Err(ConfigError::new(setting, &text, describe())),
    }
}

fn parse_database(text: &str) -> Result<Database, ConfigError> {
    const ALLOWED: &str = "use `embedded`, `sqlite:PATH` or \
                           `postgres://USER:PASSWORD@HOST:PORT/DATABASE`";
    let wrong = |allowed: String| ConfigError::new(setting::DATABASE, text, allowed);
    if text == "embedded" {
        return Ok(Database::Sqlite(PathBuf::from(EMBEDDED_FILE)));
    }
    if let Some((scheme, address)) = text.split_once(':')
        && scheme.eq_ignore_ascii_case("sqlite")
    {
        return match crate::store::sqlite::address::parse(address) {
            Ok(path) => Ok(path.map_or(Database::Temporary, Database::Sqlite)),
            Err(reason) => Err(wrong(format!("{ALLOWED}; {reason}"))),
        };
    }
    if text.contains("://") {
        return match crate::store::postgres::check_url(text) {
            Ok(url) => Ok(Database::Postgres(url)),
            Err(Some(remedy)) => Err(wrong(remedy)),
            Err(None) => Err(wrong(ALLOWED.into())),
        };
    }
    Err(wrong(ALLOWED.into()))
}

fn parse_cache(text: &str) -> Result<CacheBackend, ConfigError> {
    if text == "in-process" {
        return Ok(CacheBackend::InProcess);
    }
    match redis::check(text) {
        Ok(()) => Ok(CacheBackend::Redis(text.to_owned())),
        Err(allowed) => Err(ConfigError::new(setting::CACHE, text, allowed)),
    }
}

fn parse_consistency(text: &str) -> Result<Consistency, ConfigError> {
    let wrong =
        |error: UnknownConsistency| ConfigError::new(setting::CONSISTENCY, text, error.to_string());
    text.parse().map_err(wrong)
}

fn parse_log_format(text: &str) -> Result<LogFormat, ConfigError> {
    match text {
        "human" => Ok(LogFormat::Human),
        "json" => Ok(LogFormat::Json),
        _ => Err(ConfigError::new(
            setting::LOG_FORMAT,
            text,
            "use `human` or `json`",
        )),
    }
}

/// A filter of the log. A word that is no level would be taken for the name of a part of the program,
/// and silence all others; what is said of some parts leaves `info` for the rest.
fn parse_log_level(text: String) -> Result<String, ConfigError> {
    let is_level = |part: &str| part.parse::<LevelFilter>().is_ok();
    let mut parts = text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty());
    // Names of spans and fields may hold anything.
    let (plain, whole) = (!text.contains('['), parts.clone().any(is_level));
    let of_a_part = |part: &str| {
        let (name, level) = part.split_once('=').unwrap_or_default();
        !name.trim().is_empty() && !level.trim().is_empty()
    };
    let unknown = plain && parts.any(|part| !is_level(part) && !of_a_part(part));
    let filter = if plain && !whole {
        format!("info,{text}")
    } else {
        text.clone()
    };
    if unknown || tracing_subscriber::EnvFilter::try_new(&filter).is_err() {
        return Err(ConfigError::new(
            setting::LOG_LEVEL,
            &text,
            "use `error`, `warn`, `info`, `debug`, `trace`, `off` or a filter such as \
             `info,writethrough=debug`",
        ));
    }
    Ok(filter)
}

fn parse_service_name(text: String) -> Result<String, ConfigError> {
    if text.chars().count() <= 255 && !text.contains(char::is_control) {
        Ok(text)
    } else {
        Err(ConfigError::new(
            setting::SERVICE_NAME,
            &text,
            "use at most 255 characters, none of them a control character",
        ))
    }
}

/// Which requests are traced, as the settings say it.
struct SamplingSettings {
    decision: Sampling,
    /// The sampler takes no argument, and one is given.
    unused_argument: bool,
}

fn sampling(name: Option<String>, ratio: &Option<String>) -> Result<SamplingSettings, ConfigError> {
    let name = name.unwrap_or_else(|| "parentbased_always_on".to_owned());
    let (parent_based, root) = match name.strip_prefix("parentbased_") {
        Some(root) => (true, root),
        None => (false, name.as_str()),
    };
    // Whether the sampler takes it or not: a wrong one is a mistake.
    let argument = parsed(
        ratio,
        setting::SAMPLER_ARG,
        1.0,
        |r| (0.0..=1.0).contains(r),
        || "use a number from 0 to 1, such as 0.1".into(),
    )?;
    let ratio_given = given(ratio, setting::SAMPLER_ARG)?.is_some();
    let (ratio, unused_argument) = match root {
        "always_on" => (1.0, ratio_given),
        "always_off" => (0.0, ratio_given),
        "traceidratio" => (argument, false),
        _ => {
            return Err(ConfigError::new(
                setting::SAMPLER,
                &name,
                "use `always_on`, `always_off`, `traceidratio`, `parentbased_always_on`, \
                 `parentbased_always_off` or `parentbased_traceidratio`",
            ));
        }
    };
    Ok(SamplingSettings {
        decision: Sampling {
            ratio,
            parent_based,
        },
        unused_argument,
    })
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Temporary => f.write_str("sqlite::memory:"),
            Self::Postgres(url) => {
                let shown = crate::store::postgres::shown_url(url);
                f.write_str(&shown.unwrap_or_else(|| form(url)))
            }
        }
    }
}

impl fmt::Debug for CacheBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InProcess => f.write_str("in-process"),
            Self::Redis(url) => f.write_str(&redis::shown(url).unwrap_or_else(|| form(url))),
        }
    }
}

impl fmt::Debug for ServeArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServeArgs").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use clap::Args;

    use super::*;

    fn config(change: impl FnOnce(&mut ServeArgs)) -> Result<Config, ConfigError> {
        let mut args = ServeArgs::default();
        change(&mut args);
        Config::from_args(&args, |_| None)
    }

    #[test]
    fn nothing_set_means_the_documented_defaults() {
        let config = config(|_| ()).unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:8000");
        assert_eq!(config.database, Database::Sqlite("writethrough.db".into()));
        assert_eq!(config.cache, CacheBackend::InProcess);
        assert_eq!(config.ttl, Duration::from_secs(300));
        assert_eq!(config.consistency, Consistency::Strict);
        assert_eq!(config.service_name, "api");
        assert!(!config.traces.enabled());
    }

    #[test]
    fn the_help_and_the_tables_of_the_documents_repeat_the_defaults() {
        fn row<T: fmt::Display>(number: &Number<T>) -> (&'static str, String) {
            (number.setting, number.default.to_string())
        }
        let numbers = [
            row(&TTL),
            row(&CAPACITY),
            row(&MAX_VALUE),
            row(&MAX_PAGE),
            row(&POOL),
            row(&IN_FLIGHT),
            row(&CONNECTIONS),
            row(&DRAIN),
            row(&DRAIN_DELAY),
        ];
        let command = ServeArgs::augment_args(clap::Command::new("serve"));
        let help_of = |flag: &str| {
            let argument = command
                .get_arguments()
                .find(|argument| argument.get_long() == flag.strip_prefix("--"));
            argument.unwrap().get_help().unwrap().to_string()
        };
        let documents = [
            include_str!("../../../docs/OPERATIONS.md"),
            include_str!("../../../README.md"),
        ];
        for (setting, default) in numbers {
            let flag = setting.split(' ').next().unwrap();
            let help = help_of(flag);
            assert!(help.contains(&format!("[default: {default}]")), "{help}");
            let named = format!("| `{flag}` |");
            let rows = documents
                .iter()
                .flat_map(|document| document.lines())
                .filter(|line| line.starts_with(&named));
            let mut found = 0;
            for row in rows {
                assert_eq!(
                    row.split('|').nth(3).map(str::trim),
                    Some(&*default),
                    "{row}"
                );
                found += 1;
            }
            assert!(found > 0, "{flag} is in no table");
        }
    }

    #[test]
    fn an_empty_variable_counts_as_not_set_and_the_second_name_of_a_setting_is_read() {
        let args = ServeArgs {
            database: Some(String::new()),
            ..ServeArgs::default()
        };
        let config = Config::from_args(&args, |name| {
            (name == "DATABASE_URL").then(|| "postgres://u:p@h/d".to_owned())
        });
        assert_eq!(
            config.unwrap().database,
            Database::Postgres("postgres://u:p@h/d".to_owned())
        );
    }

    #[test]
    fn each_wrong_value_is_one_line_with_setting_value_and_what_is_allowed() {
        type Change = fn(&mut ServeArgs, &str);
        let cases: &[(&str, &str, Change)] = &[
            ("--listen (LISTEN_ADDR)", "localhost", |a, v| {
                a.listen = Some(v.into())
            }),
            ("--listen (LISTEN_ADDR)", "127.0.0.1:70000", |a, v| {
                a.listen = Some(v.into())
            }),
            ("--database", "mysql://h/d", |a, v| {
                a.database = Some(v.into())
            }),
            ("--database", "sqlite:", |a, v| a.database = Some(v.into())),
            ("--database", "postgres://h:notaport/d", |a, v| {
                a.database = Some(v.into())
            }),
            ("--cache", "memcached://h", |a, v| a.cache = Some(v.into())),
            ("--cache", "redis://", |a, v| a.cache = Some(v.into())),
            ("--cache", "redis://h:99999", |a, v| {
                a.cache = Some(v.into())
            }),
            ("--ttl", "0", |a, v| a.ttl = Some(v.into())),
            ("--ttl", "five", |a, v| a.ttl = Some(v.into())),
            ("--ttl", "-1", |a, v| a.ttl = Some(v.into())),
            ("--consistency", "eventual", |a, v| {
                a.consistency = Some(v.into())
            }),
            ("--max-in-flight", "0", |a, v| {
                a.max_in_flight = Some(v.into())
            }),
            ("--log-format", "xml", |a, v| a.log_format = Some(v.into())),
            ("--admin-listen", "localhost", |a, v| {
                a.admin_listen = Some(v.into())
            }),
            ("--admin-token", "hunter2", |a, v| {
                a.admin_token = Some(v.into())
            }),
            ("--admin-token", "hunter2 hunter2 hunter2", |a, v| {
                a.admin_token = Some(v.into())
            }),
            ("--admin-token", "no", |a, v| a.admin_token = Some(v.into())),
            ("--allowed-hosts", "shop.example:80", |a, v| {
                a.allowed_hosts = Some(v.into())
            }),
            ("--allowed-hosts", "a.example,", |a, v| {
                a.allowed_hosts = Some(v.into())
            }),
            ("--allowed-hosts", "a.example,*", |a, v| {
                a.allowed_hosts = Some(v.into())
            }),
            ("--traces-sampler", "sometimes", |a, v| {
                a.traces_sampler = Some(v.into())
            }),
        ];
        for (setting, value, change) in cases {
            let error = config(|args| change(args, value)).unwrap_err().to_string();
            assert!(error.starts_with(setting), "{error}");
            let secret = ["--admin-token", "--database", "--cache", "--otlp"]
                .iter()
                .any(|name| setting.starts_with(name));
            let shown = if secret {
                form(value)
            } else {
                format!("{value:?}")
            };
            assert!(error.contains(&format!(" is {shown}, which")), "{error}");
            assert!(error.contains(": use "), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn white_space_and_quotes_around_any_value_go_and_a_line_break_in_it_is_refused() {
        let every = |before: &str, after: &str| {
            let of = |value: &str| Some(format!("{before}{value}{after}"));
            let args = ServeArgs {
                listen: of("127.0.0.1:1"),
                admin_listen: of("127.0.0.1:2"),
                admin_token: of("none"),
                allowed_hosts: of("shop.example"),
                database: of("postgres://u:p@h:1/d1"),
                cache: of("redis://h:1"),
                ttl: of("7"),
                consistency: of("off"),
                cache_capacity_bytes: of("2000000"),
                cache_max_value_bytes: of("2000"),
                cache_max_page_bytes: of("2000"),
                database_pool_size: of("7"),
                max_in_flight: of("7"),
                max_connections: of("7"),
                drain: of("7"),
                drain_delay: of("7"),
                log_format: of("json"),
                log_level: of("debug"),
                service_name: of("shop"),
                otlp_endpoint: of("http://h:4318"),
                traces_sampler: of("traceidratio"),
                traces_sampler_arg: of("0.5"),
            };
            Config::from_args(&args, |_| None)
        };
        let plain = format!("{:?}", every("", "").unwrap());
        for (before, after) in [("", "\r"), (" ", "\r\n"), ("\"", "\""), (" '", "' ")] {
            let config = every(before, after).unwrap();
            assert_eq!(format!("{config:?}"), plain);
            assert_eq!(
                config.database,
                Database::Postgres("postgres://u:p@h:1/d1".into())
            );
        }
        type Change = fn(&mut ServeArgs, String);
        let changes: [Change; 6] = [
            |a, v| a.listen = Some(v),
            |a, v| a.database = Some(v),
            |a, v| a.cache = Some(v),
            |a, v| a.ttl = Some(v),
            |a, v| a.service_name = Some(v),
            |a, v| a.log_level = Some(v),
        ];
        for change in changes {
            for value in ["a\rb", "postgres://h/d1\r?x", "1\n2", "info\0"] {
                let error = config(|args| change(args, value.to_owned())).unwrap_err();
                assert!(error.to_string().contains("use one line"), "{error}");
                assert_eq!(error.to_string().lines().count(), 1);
            }
        }
    }

    /// `EnvFilter` takes a word that is no level for a target, and then lets nothing else pass.
    #[test]
    fn a_log_level_is_a_level_or_a_filter_that_leaves_the_rest_its_log() {
        let filter = |text: &str| {
            let config = config(|args| args.log_level = Some(text.to_owned()));
            config.map(|config| config.log_level)
        };
        for (text, expected) in [
            ("debug", "debug"),
            ("WARN", "WARN"),
            ("off", "off"),
            ("info,writethrough=debug", "info,writethrough=debug"),
            ("writethrough=debug, error", "writethrough=debug, error"),
            ("writethrough=debug", "info,writethrough=debug"),
            ("verbose=debug", "info,verbose=debug"),
        ] {
            assert_eq!(filter(text).as_deref(), Ok(expected), "{text}");
        }
        for text in [
            "verbose",
            "notice",
            "infos",
            "info,verbose",
            "hyper",
            "6",
            "info debug",
            "info=",
            "info;debug",
            "writethrough=loud",
            "=",
            "info,writethrough:debug",
        ] {
            let error = filter(text).unwrap_err().to_string();
            assert!(
                error.starts_with("--log-level (LOG_LEVEL, RUST_LOG) is "),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn a_ratio_that_no_sampler_takes_is_told_and_a_wrong_one_refused() {
        let with = |sampler: &str, ratio: &str| {
            config(|args| {
                args.traces_sampler = Some(sampler.to_owned());
                args.traces_sampler_arg = Some(ratio.to_owned());
            })
        };
        for sampler in [
            "",
            "always_on",
            "always_off",
            "traceidratio",
            "parentbased_traceidratio",
        ] {
            for ratio in ["junk", "1.5", "-1", "NaN", "inf", "0,1"] {
                let error = with(sampler, ratio).unwrap_err().to_string();
                assert!(error.starts_with("--traces-sampler-arg"), "{error}");
            }
            let notes = with(sampler, "0.5").unwrap().traces.notes;
            let told = notes
                .iter()
                .any(|note| note.contains("OTEL_TRACES_SAMPLER_ARG"));
            assert_eq!(
                told,
                !sampler.ends_with("traceidratio"),
                "{sampler}: {notes:?}"
            );
            assert!(with(sampler, "").unwrap().traces.notes.is_empty());
        }
    }

    #[test]
    fn the_port_alone_is_read_when_no_address_is_given() {
        let listen = |address: Option<&str>, port: &str| {
            listen(&address.map(str::to_owned), |name| {
                (name == "PORT").then(|| port.to_owned())
            })
            .map(|address| address.to_string())
        };
        assert_eq!(listen(None, "3000\r").unwrap(), "[::]:3000");
        assert_eq!(listen(Some(""), "3000").unwrap(), "[::]:3000");
        assert_eq!(listen(Some(":8000"), "3000").unwrap(), "[::]:8000");
        assert_eq!(listen(None, "").unwrap(), "127.0.0.1:8000");
        let error = listen(None, "tcp://10.0.0.1:80").unwrap_err().to_string();
        assert!(
            error.starts_with("PORT is ") && error.contains(": use "),
            "{error}"
        );
    }

    #[test]
    fn a_url_may_be_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let postgres = file("postgres", b"postgres://u:hunter2@h/d\r\n");
        let redis = file("redis", b" \"redis://:hunter2@h/1\"\n");
        let config = |variables: &[(&str, &str)]| {
            Config::from_args(&ServeArgs::default(), |name| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        for name in ["POSTGRES_URL_FILE", "DATABASE_URL_FILE"] {
            let config = config(&[(name, &postgres), ("REDIS_URL_FILE", &redis)]).unwrap();
            assert_eq!(
                config.database,
                Database::Postgres("postgres://u:hunter2@h/d".into())
            );
            assert_eq!(
                config.cache,
                CacheBackend::Redis("redis://:hunter2@h/1".into())
            );
        }
        // What is more precise comes first.
        let other = file("other", b"postgres://h2/d2");
        let both = config(&[
            ("POSTGRES_URL_FILE", &postgres),
            ("DATABASE_URL_FILE", &other),
        ]);
        assert_eq!(
            both.unwrap().database,
            Database::Postgres("postgres://u:hunter2@h/d".into())
        );

        let long = file("long", &[b'x'; 100_000]);
        let (empty, lines) = (file("empty", b"\n"), file("lines", b"a\nb"));
        let bytes = file("bytes", b"redis://\xff@h");
        let folder = folder.path().display().to_string();
        for (value, why) in [
            ("/nonexistent/hunter2", "No such file"),
            ("redis://:hunter2@h", "No such file"),
            (&folder, "not a regular file"),
            ("/dev/zero", "not a regular file"),
            (&long, "more than 65536 bytes"),
            (&empty, "it is empty"),
            (&lines, "use one line"),
            (&bytes, "use UTF-8"),
        ] {
            let error = config(&[("REDIS_URL_FILE", value)])
                .unwrap_err()
                .to_string();
            assert!(error.starts_with("REDIS_URL_FILE is "), "{error}");
            assert!(error.contains(why) && !error.contains("hunter2"), "{error}");
            assert_eq!(error.lines().count(), 1);
        }
        for name in ["POSTGRES_URL", "DATABASE_URL", "REDIS_URL"] {
            let variables = [(name, "x"), (&format!("{name}_FILE"), "y")];
            let error = config(&variables).unwrap_err().to_string();
            assert!(error.contains("use either it or"), "{error}");
        }
    }

    #[test]
    fn who_may_use_the_routes_for_operators_is_a_choice_and_the_token_is_not_shown() {
        let token = "hunter2-hunter2-hunter2";
        let expected = AdminAccess::Token(AdminToken::new(token).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let from_file = |path: String| {
            Config::from_args(&ServeArgs::default(), |name| {
                (name == "ADMIN_TOKEN_FILE").then(|| path.clone())
            })
        };
        assert_eq!(config(|_| ()).unwrap().admin, AdminAccess::Local);
        let open = config(|args| args.admin_token = Some("none".into())).unwrap();
        assert_eq!(open.admin, AdminAccess::Anyone);
        let given = config(|args| args.admin_token = Some(format!(" '{token}'\r\n"))).unwrap();
        let kept = from_file(file("token", &format!("{token}\n"))).unwrap();
        for config in [given, kept] {
            assert_eq!(config.admin, expected);
            assert!(!format!("{config:?}").contains("hunter2"));
        }
        // A file holds a secret; whoever wants none says so where it is seen.
        for (name, text) in [("none", "none"), ("short", "hunter2"), ("empty", "")] {
            let error = from_file(file(name, text)).unwrap_err().to_string();
            assert!(error.starts_with("ADMIN_TOKEN_FILE is "), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let both = Config::from_args(&ServeArgs::default(), |name| {
            ["ADMIN_TOKEN", "ADMIN_TOKEN_FILE"]
                .contains(&name)
                .then(|| token.to_owned())
        });
        let error = both.unwrap_err().to_string();
        assert!(error.contains("use either it or ADMIN_TOKEN"), "{error}");
    }

    #[test]
    fn names_that_hosts_may_have_are_told_apart_by_commas() {
        let hosts = |text: &str| {
            config(|args| args.allowed_hosts = Some(text.into()))
                .unwrap()
                .allowed_hosts
        };
        assert_eq!(hosts(""), None);
        assert_eq!(hosts("*"), Some(AllowedHosts::Any));
        let names = ["shop.example", "localhost"].map(str::to_owned).to_vec();
        assert_eq!(
            hosts("Shop.example, localhost"),
            Some(AllowedHosts::Names(names))
        );
    }

    #[test]
    fn a_connection_that_was_not_understood_is_not_shown_and_one_that_was_by_its_parts() {
        let refused = [
            "postgres://u:hunter2",
            "postgres://u:hunter2:5432/d",
            "postgres://u:hunt@hunter2@h/d",
            "postgres://u:x@h,hunter2=y/d",
            "postgres://u:x@h/d;Password=hunter2",
            "postgres://u;pwd=hunter2@h/d",
            "postgres://h/d?hunter2",
            "postgres://h/d?password=a&hunter=x",
            "postgres://u:x@h/d?sslmode=hunter2",
            "postgres://u:x@h/d?sslmode=require&sslrootcert=/hunter2",
            "mysql://u:hunter2@h:notaport/d",
            "hunter2://u@h",
            "Server=h;Uid=u;Pwd=hunter2",
            "host=h password=hunter2",
            "h:6380,pw=hunter2",
            "redis-cli -h h -a hunter2",
            "redis://:hunter2@h:99999",
            "redis://:hunt/er2@h",
            "authorization=Bearer hunter2,http://h:4318",
            "http://h:4318,hunter2",
            "http://u:hunter2@h:4318",
        ];
        let changes: [fn(&mut ServeArgs, String); 4] = [
            |a, v| a.database = Some(v),
            |a, v| a.cache = Some(v),
            |a, v| a.otlp_endpoint = Some(v),
            // Put into the wrong place.
            |a, v| a.listen = Some(v),
        ];
        for value in refused {
            for (place, change) in changes.into_iter().enumerate() {
                if place == 3 && !value.contains("://") {
                    continue;
                }
                let error = config(|args| change(args, value.to_owned())).unwrap_err();
                let shown = format!("{error} {error:?}");
                assert!(!shown.contains("hunt"), "{value}: {shown}");
                assert!(shown.contains(&form(value)), "{shown}");
                assert!(!error.to_string().contains('\n'));
            }
        }
        for (url, expected) in [
            ("postgres://u:hunter2@h:5433/d", "postgres://h:5433/d"),
            ("POSTGRES://u:hunt/er2@h/d", "postgres://h:5432/d"),
            (
                "postgresql://u:hunt?er2@h/d?password=hunter2",
                "postgres://h:5432/d",
            ),
            ("postgres://u:hunter2@h1:1,h2:2/d", "postgres://h1:1,h2:2/d"),
            (
                "postgres://u:hunt%40er2@[::1]/d%20x",
                "postgres://[::1]:5432/d x",
            ),
            (
                "postgres:///d?host=/run/x&user=u&password=hunter2",
                "postgres:///run/x:5432/d",
            ),
        ] {
            let config = config(|args| args.database = Some(url.to_owned())).unwrap();
            assert_eq!(format!("{:?}", config.database), expected);
        }
        let config = config(|args| args.cache = Some("rediss://u:hunter2@h/3".to_owned())).unwrap();
        assert_eq!(format!("{:?}", config.cache), "rediss://h:6379/3");
    }
}
