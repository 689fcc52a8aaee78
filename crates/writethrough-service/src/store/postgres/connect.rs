//! Connections to Postgres: the URL, TLS, the pool and its bounds.

use std::str::FromStr;
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio_postgres::config::{SslMode, TargetSessionAttrs};
use tokio_postgres::{Client, Config, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

/// The longest that the server works on one statement. The bound on this side is the same.
pub(super) const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest wait for a connection, made or free.
pub(super) const POOL_WAIT: Duration = Duration::from_secs(1);
/// The longest that making a connection takes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How to connect: a URL understood, with this service's bounds added.
#[derive(Clone)]
pub struct Connector {
    config: Config,
    tls: Option<MakeRustlsConnect>,
}

/// Whether a URL is one to connect with. The reason never contains a part of the URL.
///
/// # Errors
///
/// What is wrong with it.
pub fn check_url(url: &str) -> Result<(), String> {
    Connector::new(url, "check").map(drop)
}

impl Connector {
    /// Understands a URL. `sslmode` is `disable`, `prefer` (no TLS), or `require`, `verify-ca` or
    /// `verify-full`, which all three encrypt and verify the server's certificate against the
    /// system's authorities or `sslrootcert`.
    ///
    /// # Errors
    ///
    /// What is wrong with the URL, without any part of it.
    pub fn new(url: &str, application_name: &str) -> Result<Self, String> {
        let (url, options) = split_tls_options(url);
        let mut config = Config::from_str(&url).map_err(|error| super::super::chain(&error))?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err("the host is missing".to_owned());
        }
        if options.required {
            config.ssl_mode(SslMode::Require);
        }
        let tls = match config.get_ssl_mode() {
            SslMode::Disable | SslMode::Prefer => None,
            _ => Some(tls(options.root_certificate.as_deref())?),
        };
        // The guard needs READ COMMITTED: only there does a statement see what was committed while
        // it waited for the lock.
        let mut arguments = format!(
            "-c statement_timeout={} -c default_transaction_isolation=read\\ committed",
            STATEMENT_TIMEOUT.as_millis()
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
            // After a failover the old primary may live on as a replica; it must not answer reads.
            .target_session_attrs(TargetSessionAttrs::ReadWrite);
        if config.get_application_name().is_none() {
            config.application_name(application_name);
        }
        Ok(Self { config, tls })
    }

    /// Where it connects to, for the log.
    #[must_use]
    pub fn address(&self) -> String {
        let hosts = self.config.get_hosts().iter().map(|host| match host {
            tokio_postgres::config::Host::Tcp(name) => name.clone(),
            tokio_postgres::config::Host::Unix(path) => path.display().to_string(),
        });
        let port = self.config.get_ports().first().copied().unwrap_or(5432);
        format!("{}:{port}", hosts.collect::<Vec<_>>().join(","))
    }

    /// A pool of at most `size` connections, made when they are needed.
    ///
    /// # Errors
    ///
    /// A bound that the pool refuses.
    pub fn pool(&self, size: usize) -> Result<Pool, String> {
        let manager_config = ManagerConfig {
            recycling_method: RecyclingMethod::Fast,
        };
        let config = self.config.clone();
        let manager = match &self.tls {
            Some(tls) => Manager::from_config(config, tls.clone(), manager_config),
            None => Manager::from_config(config, NoTls, manager_config),
        };
        Pool::builder(manager)
            .max_size(size)
            .wait_timeout(Some(POOL_WAIT))
            .create_timeout(Some(CONNECT_TIMEOUT * 2))
            .recycle_timeout(Some(POOL_WAIT))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| super::super::chain(&error))
    }

    /// One connection outside of any pool, without a statement timeout: for migrations.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub async fn connect(&self) -> Result<Client, tokio_postgres::Error> {
        let client = match &self.tls {
            Some(tls) => {
                let (client, connection) = self.config.connect(tls.clone()).await?;
                tokio::spawn(connection);
                client
            }
            None => {
                let (client, connection) = self.config.connect(NoTls).await?;
                tokio::spawn(connection);
                client
            }
        };
        client.batch_execute("SET statement_timeout = 0").await?;
        Ok(client)
    }
}

struct TlsOptions {
    required: bool,
    root_certificate: Option<String>,
}

/// Takes the options out of a URL that libpq knows and tokio-postgres does not.
fn split_tls_options(url: &str) -> (String, TlsOptions) {
    let mut options = TlsOptions {
        required: false,
        root_certificate: None,
    };
    let Some((base, query)) = url.split_once('?') else {
        return (url.to_owned(), options);
    };
    let mut kept = Vec::new();
    for pair in query.split('&') {
        match pair.split_once('=') {
            Some(("sslmode", "verify-ca" | "verify-full")) => options.required = true,
            Some(("sslmode", "allow")) => kept.push("sslmode=prefer"),
            Some(("sslrootcert", "system")) => {}
            Some(("sslrootcert", path)) => {
                options.root_certificate = Some(path.replace("%2F", "/").replace("%2f", "/"));
            }
            _ => kept.push(pair),
        }
    }
    let url = if kept.is_empty() {
        base.to_owned()
    } else {
        format!("{base}?{}", kept.join("&"))
    };
    (url, options)
}

fn tls(root_certificate: Option<&str>) -> Result<MakeRustlsConnect, String> {
    let mut roots = rustls::RootCertStore::empty();
    match root_certificate {
        Some(path) => {
            let unreadable = |_| format!("sslrootcert: cannot read certificates from {path}");
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
        return Err(
            "TLS is required, but no certificate authorities were found; install \
                    ca-certificates or set sslrootcert"
                .to_owned(),
        );
    }
    let provider = rustls::crypto::ring::default_provider();
    let config = rustls::ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_understood_or_refused_without_being_repeated() {
        for url in [
            "postgres://labuser:pw@localhost:5432/items_db",
            "postgresql://u@h/d?sslmode=disable",
            "postgres://u:p%40w@h/d?sslmode=prefer&application_name=x",
            "postgres://u@h/d?sslmode=allow",
        ] {
            assert_eq!(check_url(url), Ok(()), "{url}");
        }
        for url in [
            "postgres://u:s3cret@h:port/d",
            "postgres:///d?user=s3cret",
            "postgres://u:s3cret@h/d?sslmode=perhaps",
            "postgres://u:s3cret@h/d?colour=red",
            "postgres://u:s3cret@h/d?sslmode=verify-full&sslrootcert=/nonexistent",
        ] {
            let reason = check_url(url).unwrap_err();
            assert!(!reason.contains("s3cret"), "{reason}");
        }
    }
}
