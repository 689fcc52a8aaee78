//! Postgres and Redis over TLS: both are encrypted, and a certificate that nobody vouches for is refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::generate_simple_self_signed;
use reqwest::Client;
use writethrough_testbed::{Child, ChildSpec, Postgres, Redis, Testbed, free_port, until};

const PATIENCE: Duration = Duration::from_secs(20);
const SAMPLE: &str = "/items/550e8400-e29b-41d4-a716-446655440001";

/// A certificate for 127.0.0.1 that vouches for itself, and its key, as PEM.
fn certificate() -> (String, String) {
    let made = generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

fn file(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    path
}

async fn encrypt_postgres(postgres: &Postgres, certificate: &str, key: &str) {
    let folder = postgres.run("SHOW data_directory").await.unwrap();
    for (name, text) in [("server.crt", certificate), ("server.key", key)] {
        // Written by the server, which must own its key.
        let path = format!("{folder}/{name}");
        let lines = format!("unnest(string_to_array('{text}', E'\\n')) AS line");
        let copy = format!("COPY (SELECT line FROM {lines}) TO '{path}'");
        postgres.run(&copy).await.unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    }
    postgres.run("ALTER SYSTEM SET ssl = on").await.unwrap();
    postgres.run("SELECT pg_reload_conf()").await.unwrap();
    let on = || async { (postgres.run("SHOW ssl").await.ok()? == "on").then_some(()) };
    until("Postgres takes TLS", PATIENCE, on).await.unwrap();
}

/// Returns the URL to use then.
async fn encrypt_redis(redis: &Redis, certificate: &Path, key: &Path) -> String {
    let (certificate, key) = (certificate.to_str().unwrap(), key.to_str().unwrap());
    let port = free_port();
    let settings = [
        ["tls-cert-file", certificate],
        ["tls-key-file", key],
        ["tls-ca-cert-file", certificate],
        ["tls-auth-clients", "no"],
        ["tls-port", &port.to_string()],
    ];
    let command: Vec<&str> = ["CONFIG", "SET"]
        .into_iter()
        .chain(settings.into_iter().flatten())
        .collect();
    redis.order(&command).await.unwrap();
    format!("rediss://127.0.0.1:{port}")
}

struct Ground {
    testbed: Testbed,
    postgres: Postgres,
    /// The Redis URL with TLS.
    cache: String,
    authority: PathBuf,
    _redis: Redis,
}

impl Ground {
    async fn new() -> Self {
        let testbed = Testbed::new().await.unwrap();
        let (postgres, redis) = tokio::try_join!(testbed.postgres(), testbed.redis()).unwrap();
        let (certificate, key) = certificate();
        let authority = file(testbed.folder(), "authority.pem", &certificate);
        let key_file = file(testbed.folder(), "redis-key.pem", &key);
        encrypt_postgres(&postgres, &certificate, &key).await;
        let cache = encrypt_redis(&redis, &authority, &key_file).await;
        Self {
            testbed,
            postgres,
            cache,
            authority,
            _redis: redis,
        }
    }

    /// A node that believes in this authority; its base address, too.
    async fn serve(&self, authority: &Path) -> (Child, String) {
        let listen = format!("127.0.0.1:{}", free_port());
        let root = authority.to_str().unwrap();
        let database = format!(
            "{}?sslmode=verify-full&sslrootcert={root}",
            self.postgres.url()
        );
        let serve = ChildSpec::new("api", env!("CARGO_BIN_EXE_writethrough"))
            .args(["serve", "--listen", &listen, "--cache", &self.cache])
            .args(["--database", &database])
            .env("SSL_CERT_FILE", root);
        let api = self.testbed.child(serve).await.unwrap();
        (api, format!("http://{listen}"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_connections_are_encrypted() {
    let ground = Ground::new().await;
    let (api, base) = ground.serve(&ground.authority).await;
    let client = Client::builder().timeout(PATIENCE).build().unwrap();
    let hit = || async {
        let answer = client.get(format!("{base}{SAMPLE}")).send().await.ok()?;
        let cache = answer.headers().get("cache-status")?.to_str().ok()?;
        cache.ends_with("hit").then_some(())
    };
    let found = until("a hit", PATIENCE, hit).await;
    found.unwrap_or_else(|error| panic!("{error}\n{}", api.log_tail(30)));
    let plain = "SELECT count(*) FILTER (WHERE ssl), count(*) FILTER (WHERE NOT ssl)
                 FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
                 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
    let counts = ground.postgres.run(plain).await.unwrap();
    let (encrypted, plain) = counts.split_once('|').unwrap();
    assert!(encrypted.parse::<u32>().unwrap() > 0, "{counts}");
    assert_eq!(plain, "0", "a connection without TLS");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_certificate_is_refused() {
    let ground = Ground::new().await;
    let (other, _) = certificate();
    let other = file(ground.testbed.folder(), "other.pem", &other);
    let (api, base) = ground.serve(&other).await;
    for server in ["Redis cannot be used", "ostgres"] {
        let refused = || async {
            let log = api.log().ok()?;
            let mut lines = log.lines();
            lines.find(|line| line.contains(server) && line.contains("certificate"))?;
            Some(())
        };
        let told = until("the certificate is refused", PATIENCE, refused).await;
        told.unwrap_or_else(|error| panic!("{server}: {error}\n{}", api.log_tail(30)));
    }
    let answer = Client::new().get(format!("{base}/readyz")).send().await;
    assert_eq!(answer.unwrap().status(), 503);
}
