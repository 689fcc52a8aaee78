//! TLS of the connections that this process makes: to Postgres and to a receiver of traces.

use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

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
                    .map_err(|error| error.to_string())?;
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
    let provider = rustls::crypto::ring::default_provider();
    let config = ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}
