//! TLS of the connections that this process makes: to Postgres and to a receiver of traces.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

/// A client that trusts the certificate authorities of the file, which `setting` names, or else those
/// of the system.
///
/// # Errors
///
/// One line, without the file's name, which may be a secret put into the wrong place: the file cannot
/// be read, or there are no authorities.
pub fn client_config(file: Option<&str>, setting: &str) -> Result<ClientConfig, String> {
    let mut roots = rustls::RootCertStore::empty();
    match file {
        Some(path) => {
            let unreadable = |_| {
                format!("use a file with certificates in PEM for `{setting}`, one that can be read")
            };
            for certificate in CertificateDer::pem_file_iter(path).map_err(unreadable)? {
                roots
                    .add(certificate.map_err(unreadable)?)
                    .map_err(|error| format!("use other certificates for `{setting}`: {error}"))?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        return Err(format!(
            "TLS is required, but no certificate authorities were found; install ca-certificates or \
             set {setting}"
        ));
    }
    let config = ClientConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

/// A client that encrypts, with whoever answers: better than plain text, where that would be used
/// otherwise.
///
/// # Errors
///
/// None that can be met in practice: the provider has the protocol's versions.
pub fn unverified_config() -> Result<ClientConfig, String> {
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_no_client_auth();
    Ok(config)
}

/// Takes every certificate, from a server that has its key: channel binding rests on that.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// What to do about a certificate that was refused, if the error, whose text this is, does not say so
/// itself.
pub(crate) fn remedy(error: &str) -> Option<&'static str> {
    const AUTHORITY: &str = "name a file with the certificate of the authority that signed the server's: `sslrootcert=` in \
         the URL of Postgres, OTEL_EXPORTER_OTLP_CERTIFICATE for traces, SSL_CERT_FILE for all";
    const REMEDIES: [(&str, &str); 4] = [
        (
            "CaUsedAsEndEntity",
            "the server shows the certificate of an authority as its own: give it one that is made for a \
             server (`basicConstraints=CA:FALSE`), signed by itself or by that authority",
        ),
        (
            "UnsupportedCertVersion",
            "give the server a certificate of X.509 version 3 with its name in `subjectAltName`",
        ),
        ("UnknownIssuer", AUTHORITY),
        // Another authority of the same name.
        ("BadSignature", AUTHORITY),
    ];
    let found = REMEDIES.iter().find(|(sign, _)| error.contains(sign));
    found.map(|(_, remedy)| *remedy)
}
