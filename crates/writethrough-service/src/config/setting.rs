//! The settings' names as errors print them.

pub(crate) const LISTEN: &str = "--listen (LISTEN_ADDR)";
pub(crate) const ADMIN_LISTEN: &str = "--admin-listen (ADMIN_LISTEN_ADDR)";
pub(super) const ADMIN_TOKEN: &str = "--admin-token (ADMIN_TOKEN)";
pub(super) const ADMIN_TOKEN_FILE: &str = "ADMIN_TOKEN_FILE";
pub(super) const ALLOWED_HOSTS: &str = "--allowed-hosts (ALLOWED_HOSTS)";
pub(super) const PORT: &str = "PORT";
pub(crate) const DATABASE: &str = "--database (POSTGRES_URL, DATABASE_URL)";
pub(crate) const CACHE: &str = "--cache (REDIS_URL)";
pub(super) const CONSISTENCY: &str = "--consistency (CONSISTENCY)";
pub(super) const LOG_FORMAT: &str = "--log-format (LOG_FORMAT)";
pub(super) const LOG_LEVEL: &str = "--log-level (LOG_LEVEL, RUST_LOG)";
pub(super) const SERVICE_NAME: &str = "--service-name (OTEL_SERVICE_NAME)";
pub(crate) const OTLP: &str = "--otlp-endpoint (OTEL_EXPORTER_OTLP_ENDPOINT)";
pub(super) const SAMPLER: &str = "--traces-sampler (OTEL_TRACES_SAMPLER)";
pub(super) const SAMPLER_ARG: &str = "--traces-sampler-arg (OTEL_TRACES_SAMPLER_ARG)";
pub(super) const POSTGRES_URL_FILE: &str = "POSTGRES_URL_FILE";
pub(super) const DATABASE_URL_FILE: &str = "DATABASE_URL_FILE";
pub(super) const REDIS_URL_FILE: &str = "REDIS_URL_FILE";

/// Variables that hold a secret, and those that name a file with it in place of them.
pub(super) const FILES: [(&str, &str); 4] = [
    ("ADMIN_TOKEN", ADMIN_TOKEN_FILE),
    ("POSTGRES_URL", POSTGRES_URL_FILE),
    ("DATABASE_URL", DATABASE_URL_FILE),
    ("REDIS_URL", REDIS_URL_FILE),
];

/// Those that may hold a secret, or be given one by mistake: their values are never shown.
pub(super) const SECRET: &[&str] = &[
    ADMIN_TOKEN,
    ADMIN_TOKEN_FILE,
    DATABASE,
    CACHE,
    OTLP,
    POSTGRES_URL_FILE,
    DATABASE_URL_FILE,
    REDIS_URL_FILE,
];
