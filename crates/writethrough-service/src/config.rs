//! Configuration: flags and environment variables in, one checked [`Config`] out.
//!
//! A flag wins over its variable; an empty variable counts as not set. A wrong value is a
//! [`ConfigError`], which is one line. Nothing here connects to anything, and nothing that is
//! printed from here contains a password.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use writethrough::Consistency;

/// The flags of `writethrough serve`, as text. [`Config::from_args`] checks them.
#[derive(clap::Args, Clone, Default)]
pub struct ServeArgs {
    /// Address and port to listen on [default: 127.0.0.1:8000].
    #[arg(
        long,
        env = "LISTEN_ADDR",
        value_name = "ADDRESS:PORT",
        hide_env_values = true
    )]
    pub listen: Option<String>,

    /// The store: `embedded` (the file writethrough.db), `sqlite:PATH` or `postgres://...`. The
    /// variable DATABASE_URL is read when POSTGRES_URL is not set [default: embedded].
    #[arg(long, env = "POSTGRES_URL", value_name = "URL", hide_env_values = true)]
    pub database: Option<String>,

    /// The cache: `in-process`, `redis://...` or `rediss://...` [default: in-process].
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

    /// Connections to Postgres for items [default: 16].
    #[arg(
        long,
        env = "DATABASE_POOL_SIZE",
        value_name = "N",
        hide_env_values = true
    )]
    pub database_pool_size: Option<String>,

    /// Requests served at once; more get 503 at once [default: 1024].
    #[arg(long, env = "MAX_IN_FLIGHT", value_name = "N", hide_env_values = true)]
    pub max_in_flight: Option<String>,

    /// Client connections held at once; more wait to be accepted [default: 4096].
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

    /// Where to send traces, over OTLP/HTTP, such as http://otel-collector:4318 [default: nowhere].
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
    /// Where traces go; `None` for nowhere, which makes tracing free.
    pub otlp_endpoint: Option<String>,
    /// Which requests are traced.
    pub sampling: Sampling,
}

/// The file of the embedded default, in the current folder.
pub const EMBEDDED_FILE: &str = "writethrough.db";

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8000)),
            database: Database::Sqlite(PathBuf::from(EMBEDDED_FILE)),
            cache: CacheBackend::InProcess,
            ttl: Duration::from_secs(300),
            consistency: Consistency::Strict,
            cache_capacity_bytes: 64 << 20,
            database_pool_size: 16,
            max_in_flight: 1024,
            max_connections: 4096,
            drain: Duration::from_secs(10),
            drain_delay: Duration::ZERO,
            log_format: LogFormat::Human,
            log_level: "info".to_owned(),
            service_name: "api".to_owned(),
            otlp_endpoint: None,
            sampling: Sampling {
                ratio: 1.0,
                parent_based: true,
            },
        }
    }
}

/// A setting with a value that is not allowed. Displays as one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{setting} is {value:?}, which is not allowed: {allowed}")]
pub struct ConfigError {
    /// The flag and its variable.
    pub setting: &'static str,
    /// The value, without secrets.
    pub value: String,
    /// What is allowed.
    pub allowed: String,
}

impl ConfigError {
    fn new(setting: &'static str, value: &str, allowed: impl Into<String>) -> Self {
        Self {
            setting,
            value: without_secrets(value),
            allowed: allowed.into(),
        }
    }
}

/// The settings' names as errors print them.
mod setting {
    pub(super) const LISTEN: &str = "--listen (LISTEN_ADDR)";
    pub(super) const DATABASE: &str = "--database (POSTGRES_URL, DATABASE_URL)";
    pub(super) const CACHE: &str = "--cache (REDIS_URL)";
    pub(super) const TTL: &str = "--ttl (CACHE_TTL_SECONDS)";
    pub(super) const CONSISTENCY: &str = "--consistency (CONSISTENCY)";
    pub(super) const CAPACITY: &str = "--cache-capacity-bytes (CACHE_CAPACITY_BYTES)";
    pub(super) const POOL: &str = "--database-pool-size (DATABASE_POOL_SIZE)";
    pub(super) const IN_FLIGHT: &str = "--max-in-flight (MAX_IN_FLIGHT)";
    pub(super) const CONNECTIONS: &str = "--max-connections (MAX_CONNECTIONS)";
    pub(super) const DRAIN: &str = "--drain (DRAIN_SECONDS)";
    pub(super) const DRAIN_DELAY: &str = "--drain-delay (DRAIN_DELAY_SECONDS)";
    pub(super) const LOG_FORMAT: &str = "--log-format (LOG_FORMAT)";
    pub(super) const LOG_LEVEL: &str = "--log-level (LOG_LEVEL, RUST_LOG)";
    pub(super) const SERVICE_NAME: &str = "--service-name (OTEL_SERVICE_NAME)";
    pub(super) const OTLP: &str = "--otlp-endpoint (OTEL_EXPORTER_OTLP_ENDPOINT)";
    pub(super) const SAMPLER: &str = "--traces-sampler (OTEL_TRACES_SAMPLER)";
    pub(super) const SAMPLER_ARG: &str = "--traces-sampler-arg (OTEL_TRACES_SAMPLER_ARG)";
}

impl Config {
    /// Checks the flags. `variable` looks up the environment variables that stand in for another
    /// one (`DATABASE_URL`, `RUST_LOG`).
    ///
    /// # Errors
    ///
    /// [`ConfigError`] for the first setting that is wrong.
    pub fn from_args(
        args: &ServeArgs,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let default = Self::default();
        let database = given(&args.database).or_else(|| present(variable("DATABASE_URL")));
        let log_level = given(&args.log_level).or_else(|| present(variable("RUST_LOG")));
        let sampling = sampling(given(&args.traces_sampler), given(&args.traces_sampler_arg))?;
        Ok(Self {
            listen: parsed(
                &args.listen,
                setting::LISTEN,
                default.listen,
                |_| true,
                || "use an IP address and a port, such as 127.0.0.1:8000 or 0.0.0.0:8000".into(),
            )?,
            database: database.map_or(Ok(default.database), |text| parse_database(&text))?,
            cache: given(&args.cache).map_or(Ok(default.cache), |text| parse_cache(&text))?,
            ttl: Duration::from_secs(number(&args.ttl, setting::TTL, 300, 1, 31_536_000)?),
            consistency: given(&args.consistency)
                .map_or(Ok(default.consistency), |text| parse_consistency(&text))?,
            cache_capacity_bytes: number(
                &args.cache_capacity_bytes,
                setting::CAPACITY,
                default.cache_capacity_bytes,
                1 << 20,
                1 << 40,
            )?,
            database_pool_size: number(&args.database_pool_size, setting::POOL, 16, 1, 1000)?,
            max_in_flight: number(&args.max_in_flight, setting::IN_FLIGHT, 1024, 1, 1_000_000)?,
            max_connections: number(
                &args.max_connections,
                setting::CONNECTIONS,
                4096,
                1,
                1_000_000,
            )?,
            drain: Duration::from_secs(number(&args.drain, setting::DRAIN, 10, 0, 600)?),
            drain_delay: Duration::from_secs(number(
                &args.drain_delay,
                setting::DRAIN_DELAY,
                0,
                0,
                600,
            )?),
            log_format: given(&args.log_format)
                .map_or(Ok(default.log_format), |text| parse_log_format(&text))?,
            log_level: log_level.map_or(Ok(default.log_level), parse_log_level)?,
            service_name: given(&args.service_name)
                .map_or(Ok(default.service_name), parse_service_name)?,
            otlp_endpoint: given(&args.otlp_endpoint).map(parse_endpoint).transpose()?,
            sampling,
        })
    }
}

/// A flag's value, unless it is empty: compose files pass on unset variables as empty ones.
fn given(value: &Option<String>) -> Option<String> {
    present(value.clone())
}

fn present(value: Option<String>) -> Option<String> {
    value.filter(|text| !text.trim().is_empty())
}

fn parsed<T: FromStr>(
    value: &Option<String>,
    setting: &'static str,
    default: T,
    allowed: impl Fn(&T) -> bool,
    describe: impl Fn() -> String,
) -> Result<T, ConfigError> {
    let Some(text) = given(value) else {
        return Ok(default);
    };
    match text.trim().parse() {
        Ok(parsed) if allowed(&parsed) => Ok(parsed),
        _ => Err(ConfigError::new(setting, &text, describe())),
    }
}

fn number<T: FromStr + PartialOrd + fmt::Display + Copy>(
    value: &Option<String>,
    setting: &'static str,
    default: T,
    least: T,
    most: T,
) -> Result<T, ConfigError> {
    parsed(
        value,
        setting,
        default,
        |n| (least..=most).contains(n),
        || format!("use a whole number from {least} to {most}"),
    )
}

fn parse_database(text: &str) -> Result<Database, ConfigError> {
    const ALLOWED: &str = "use `embedded`, `sqlite:PATH` or \
                           `postgres://USER:PASSWORD@HOST:PORT/DATABASE`";
    let wrong = |allowed: String| ConfigError::new(setting::DATABASE, text, allowed);
    if text == "embedded" {
        return Ok(Database::Sqlite(PathBuf::from(EMBEDDED_FILE)));
    }
    if let Some(address) = text.strip_prefix("sqlite:") {
        return match crate::store::sqlite::address::parse(address) {
            Ok(path) => Ok(path.map_or(Database::Temporary, Database::Sqlite)),
            Err(reason) => Err(wrong(format!("{ALLOWED}; {reason}"))),
        };
    }
    if text.starts_with("postgres://") || text.starts_with("postgresql://") {
        crate::store::postgres::check_url(text)
            .map_err(|reason| wrong(format!("{ALLOWED}; {reason}")))?;
        return Ok(Database::Postgres(text.to_owned()));
    }
    Err(wrong(ALLOWED.into()))
}

fn parse_cache(text: &str) -> Result<CacheBackend, ConfigError> {
    const ALLOWED: &str = "use `in-process` or `redis://HOST:PORT/DB` \
                           (`rediss://` for TLS; a password goes in as `redis://:PASSWORD@HOST:PORT`)";
    if text == "in-process" {
        return Ok(CacheBackend::InProcess);
    }
    let rest = text
        .strip_prefix("redis://")
        .or_else(|| text.strip_prefix("rediss://"));
    match rest {
        Some(rest) if has_host(rest) => Ok(CacheBackend::Redis(text.to_owned())),
        _ => Err(ConfigError::new(setting::CACHE, text, ALLOWED)),
    }
}

/// Whether what follows the scheme of a URL has a host and, if any, a valid port.
fn has_host(rest: &str) -> bool {
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default();
    if host.is_empty() || host.contains(char::is_whitespace) {
        return false;
    }
    let (name, port) = match host.strip_prefix('[').and_then(|v6| v6.split_once(']')) {
        Some((v6, port)) => (v6, port.strip_prefix(':')),
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    !name.is_empty() && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

fn parse_consistency(text: &str) -> Result<Consistency, ConfigError> {
    match text {
        "strict" => Ok(Consistency::Strict),
        "textbook" => Ok(Consistency::Textbook),
        "off" => Ok(Consistency::Off),
        _ => Err(ConfigError::new(
            setting::CONSISTENCY,
            text,
            "use `strict`, `textbook` or `off`",
        )),
    }
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

fn parse_log_level(text: String) -> Result<String, ConfigError> {
    match tracing_subscriber::EnvFilter::try_new(&text) {
        Ok(_) => Ok(text),
        Err(_) => Err(ConfigError::new(
            setting::LOG_LEVEL,
            &text,
            "use `error`, `warn`, `info`, `debug`, `trace` or a filter such as \
             `info,writethrough=debug`",
        )),
    }
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

fn parse_endpoint(text: String) -> Result<String, ConfigError> {
    match text.strip_prefix("http://") {
        Some(rest) if has_host(rest) => Ok(text.trim_end_matches('/').to_owned()),
        _ => Err(ConfigError::new(
            setting::OTLP,
            &text,
            "use `http://HOST:PORT` of an OTLP/HTTP receiver, such as http://localhost:4318 (for \
             TLS, put a collector beside the service)",
        )),
    }
}

fn sampling(name: Option<String>, ratio: Option<String>) -> Result<Sampling, ConfigError> {
    let name = name.unwrap_or_else(|| "parentbased_always_on".to_owned());
    let (parent_based, root) = match name.strip_prefix("parentbased_") {
        Some(root) => (true, root),
        None => (false, name.as_str()),
    };
    let ratio = match root {
        "always_on" => 1.0,
        "always_off" => 0.0,
        "traceidratio" => parsed(
            &ratio,
            setting::SAMPLER_ARG,
            1.0,
            |r| (0.0..=1.0).contains(r),
            || "use a number from 0 to 1, such as 0.1".into(),
        )?,
        _ => {
            return Err(ConfigError::new(
                setting::SAMPLER,
                &name,
                "use `always_on`, `always_off`, `traceidratio`, `parentbased_always_on`, \
                 `parentbased_always_off` or `parentbased_traceidratio`",
            ));
        }
    };
    Ok(Sampling {
        ratio,
        parent_based,
    })
}

/// A value as it may be printed: without user, password and query of a URL, and not at all when it
/// looks like a secret in another form.
#[must_use]
pub fn without_secrets(value: &str) -> String {
    if let Some((scheme, rest)) = value.split_once("://") {
        // A password may contain any character, also a raw `/` or `@`: everything up to the last
        // `@` goes.
        let (hidden, shown) = match rest.rsplit_once('@') {
            Some((_, shown)) => ("***@", shown),
            None => ("", rest),
        };
        let shown = shown.split(['?', '#']).next().unwrap_or_default();
        let shown = if hidden.is_empty() && rest.matches(':').count() > 1 && !rest.starts_with('[')
        {
            "***"
        } else {
            shown
        };
        return format!("{scheme}://{hidden}{shown}");
    }
    let lower = value.to_lowercase();
    if lower.contains("pass") || lower.contains('@') || lower.contains("secret") {
        return "***".to_owned();
    }
    value.chars().take(200).collect()
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Temporary => f.write_str("sqlite::memory:"),
            Self::Postgres(url) => f.write_str(&without_secrets(url)),
        }
    }
}

impl fmt::Debug for CacheBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InProcess => f.write_str("in-process"),
            Self::Redis(url) => f.write_str(&without_secrets(url)),
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
        assert_eq!(config.otlp_endpoint, None);
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
            ("--otlp-endpoint", "collector:4318", |a, v| {
                a.otlp_endpoint = Some(v.into())
            }),
            ("--traces-sampler", "sometimes", |a, v| {
                a.traces_sampler = Some(v.into())
            }),
        ];
        for (setting, value, change) in cases {
            let error = config(|args| change(args, value)).unwrap_err().to_string();
            assert!(error.starts_with(setting), "{error}");
            assert!(error.contains(value), "{error}");
            assert!(error.contains(": use "), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn no_form_of_a_url_shows_its_password() {
        for url in [
            "postgres://u:s3cret@h:5432/d",
            "postgres://u:s3cret/@h:5432/d",
            "postgres://u:s3c@s3cret@h/d",
            "postgres://h/d?user=u&password=s3cret",
            "mysql://u:s3cret@h:notaport/d",
            "postgres://u:s3cret:5432/d",
            "host=h password=s3cret",
            "redis://:s3cret@h:99999",
        ] {
            for change in [
                |a: &mut ServeArgs, v: &str| a.database = Some(v.into()),
                |a: &mut ServeArgs, v: &str| a.cache = Some(v.into()),
            ] {
                let shown = match config(|args| change(args, url)) {
                    Ok(config) => format!("{config:?}"),
                    Err(error) => format!("{error} {error:?}"),
                };
                assert!(!shown.contains("s3c"), "{shown}");
            }
        }
    }
}
