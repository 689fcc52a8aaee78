//! How a connection to Redis is made: its settings, and why they cannot be used.

use std::fmt;
use std::time::Duration;

use redis::RedisError;

use crate::runtime::NoRuntime;

/// Settings of the Redis connection.
#[derive(Clone)]
pub struct RedisSettings {
    /// `redis://[user:password@]host[:port][/db]`, or `rediss://` for TLS.
    pub url: String,
    /// The bound of every command, 250 ms by default.
    pub command_timeout: Duration,
    /// The bound of connecting and verifying, 1 s by default.
    pub connect_timeout: Duration,
    /// What the keys begin with, as in `item:` and `{items}`, with the namespace in front if there is
    /// one (`shop/item:`); none by default. A new connection is
    /// verified on such keys, so that rights that its user lacks are found before a write needs them.
    /// Keys that are not named here are verified once one of them was refused.
    pub key_prefixes: Vec<String>,
    /// Certificates for `rediss://`, which needs the feature `redis-tls`; the system's authorities and
    /// no client certificate by default.
    pub certificates: RedisCertificates,
}

/// Certificates of a connection with TLS, as PEM.
#[derive(Clone, Default)]
pub struct RedisCertificates {
    /// The authorities that may vouch for the server, in place of the system's.
    pub authorities: Option<Vec<u8>>,
    /// The certificate by which the server knows this client (with those between it and its authority),
    /// and its key.
    pub client: Option<(Vec<u8>, Vec<u8>)>,
}

impl fmt::Debug for RedisCertificates {
    /// Tells what there is, and nothing of it: there is a private key in it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisCertificates")
            .field("authorities", &self.authorities.is_some())
            .field("client", &self.client.is_some())
            .finish()
    }
}

impl RedisSettings {
    /// The defaults for this server.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            command_timeout: Duration::from_millis(250),
            connect_timeout: Duration::from_secs(1),
            key_prefixes: Vec::new(),
            certificates: RedisCertificates::default(),
        }
    }
}

impl fmt::Debug for RedisSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisSettings")
            .field("command_timeout", &self.command_timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("key_prefixes", &self.key_prefixes)
            .finish_non_exhaustive()
    }
}

/// The Redis URL cannot be used. The message does not repeat the URL, which may hold a password.
#[derive(Debug, thiserror::Error)]
#[error(
    "not a Redis URL ({0}); allowed: redis://[user:password@]host[:port][/db] or rediss:// for TLS"
)]
pub struct InvalidRedisUrl(String);

impl InvalidRedisUrl {
    /// Only the fixed description: a detail could repeat a part of the URL.
    pub(super) fn because(error: RedisError) -> Self {
        Self(format!("{:?}", error.kind()))
    }
}

/// The certificates for Redis cannot be used. The message says which, and nothing of them.
#[derive(Debug, thiserror::Error)]
#[error("the certificates for Redis cannot be used: {0}")]
pub struct InvalidRedisCertificates(pub(super) &'static str);

/// Why connecting could not even begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RedisConnectError {
    /// The URL is malformed.
    #[error(transparent)]
    Url(#[from] InvalidRedisUrl),
    /// The certificates cannot be used, or the URL is one without TLS.
    #[error(transparent)]
    Certificates(#[from] InvalidRedisCertificates),
    /// The URL or the certificates ask for TLS.
    #[error("TLS to Redis needs the feature `redis-tls` of the crate `writethrough`")]
    BuiltWithoutTls,
    /// It was not called inside of a runtime.
    #[error(transparent)]
    NoRuntime(#[from] NoRuntime),
}
