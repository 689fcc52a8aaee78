//! Connections to Redis with TLS: certificates and the provider of cryptography.

use redis::{Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, TlsCertificates};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::settings::{
    InvalidRedisCertificates, InvalidRedisUrl, RedisCertificates, RedisConnectError,
};

/// Makes the client for a server, with TLS if its address asks for it.
pub(super) fn client(
    info: ConnectionInfo,
    certificates: &RedisCertificates,
) -> Result<Client, RedisConnectError> {
    let with_tls = matches!(info.addr(), ConnectionAddr::TcpTls { .. });
    if with_tls && CryptoProvider::get_default().is_none() {
        // The client would panic without one. Another thread may have been faster.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
    match certificates.checked()? {
        None => Ok(Client::open(info).map_err(InvalidRedisUrl::because)?),
        Some(_) if !with_tls => {
            Err(InvalidRedisCertificates("the URL has no TLS; use `rediss://`").into())
        }
        Some(certificates) => {
            // Nothing of what was given is repeated.
            let unusable = |_| InvalidRedisCertificates("the client does not take them");
            Ok(Client::build_with_tls(info, certificates).map_err(unusable)?)
        }
    }
}

impl RedisCertificates {
    /// As the client takes them; none when there are none.
    fn checked(&self) -> Result<Option<TlsCertificates>, InvalidRedisCertificates> {
        let has_certificates = |pem: &[u8]| {
            let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
            all.is_ok_and(|all| !all.is_empty())
        };
        let authorities = self.authorities.clone();
        if authorities
            .as_deref()
            .is_some_and(|pem| !has_certificates(pem))
        {
            return Err(InvalidRedisCertificates(
                "those of the authorities are no certificates in PEM",
            ));
        }
        let client_tls = match self.client.clone() {
            Some((certificate, _)) if !has_certificates(&certificate) => {
                return Err(InvalidRedisCertificates(
                    "that of the client is no certificate in PEM",
                ));
            }
            Some((_, key)) if PrivateKeyDer::from_pem_slice(&key).is_err() => {
                return Err(InvalidRedisCertificates(
                    "the key of the client is no key in PEM",
                ));
            }
            client => client.map(|(client_cert, client_key)| ClientTlsConfig {
                client_cert,
                client_key,
            }),
        };
        if authorities.is_none() && client_tls.is_none() {
            return Ok(None);
        }
        Ok(Some(TlsCertificates {
            client_tls,
            root_cert: authorities,
        }))
    }
}
