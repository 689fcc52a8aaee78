//! In place of `tls`, where the feature `redis-tls` is off.

use redis::{Client, ConnectionInfo};

use super::settings::{InvalidRedisUrl, RedisCertificates, RedisConnectError};

/// Makes the client for a server.
pub(super) fn client(
    info: ConnectionInfo,
    certificates: &RedisCertificates,
) -> Result<Client, RedisConnectError> {
    if certificates.authorities.is_some() || certificates.client.is_some() {
        return Err(RedisConnectError::BuiltWithoutTls);
    }
    Ok(Client::open(info).map_err(InvalidRedisUrl::because)?)
}
