//! Postgres and Redis over TLS: both are encrypted, and a certificate that nobody vouches for is refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, generate_simple_self_signed};
use reqwest::Client;
use writethrough_lab::cluster::{Node, Serve};
use writethrough_service::store::postgres::{Connector, Obstacle};
use writethrough_testbed::{Child, Postgres, Redis, Testbed, free_port, until};

const PATIENCE: Duration = Duration::from_secs(20);
const SAMPLE: &str = "/items/550e8400-e29b-41d4-a716-446655440001";

/// A certificate for 127.0.0.1 that vouches for itself, and its key, as PEM.
fn certificate() -> (String, String) {
    let made = generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

/// The same as `openssl req -x509` makes it: that of an authority.
fn certificate_of_an_authority() -> (String, String) {
    let mut parameters = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let certificate = parameters.self_signed(&key).unwrap();
    (certificate.pem(), key.serialize_pem())
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
    redis.command(&command).await.unwrap();
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
    async fn new((certificate, key): (String, String)) -> Self {
        let testbed = Testbed::new().await.unwrap();
        let (postgres, redis) = tokio::try_join!(testbed.postgres(), testbed.redis()).unwrap();
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

    /// A node that believes in this authority.
    async fn serve(&self, authority: &Path) -> Node {
        let root = authority.to_str().unwrap();
        let database = format!(
            "{}?sslmode=verify-full&sslrootcert={root}",
            self.postgres.url()
        );
        let serve = Serve::new("api", env!("CARGO_BIN_EXE_writethrough"))
            .database(&database)
            .cache(&self.cache)
            .env("SSL_CERT_FILE", root);
        serve.start(&self.testbed).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_connections_are_encrypted() {
    let ground = Ground::new(certificate()).await;
    let node = ground.serve(&ground.authority).await;
    let (api, base) = (node.process(), node.url());
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
    let ground = Ground::new(certificate()).await;
    let (other, _) = certificate();
    let other = file(ground.testbed.folder(), "other.pem", &other);
    let node = ground.serve(&other).await;
    let (api, base) = (node.process(), node.url());
    told_of_both(api, &["certificate", "SSL_CERT_FILE"]).await;
    let answer = Client::new().get(format!("{base}/readyz")).send().await;
    assert_eq!(answer.unwrap().status(), 503);
}

/// Whoever makes a certificate for a test names it as the authority too; the error alone says
/// `CaUsedAsEndEntity`.
#[tokio::test(flavor = "multi_thread")]
async fn the_certificate_of_an_authority_is_refused_with_the_remedy() {
    let ground = Ground::new(certificate_of_an_authority()).await;
    let node = ground.serve(&ground.authority).await;
    told_of_both(
        node.process(),
        &["certificate", "basicConstraints=CA:FALSE"],
    )
    .await;
}

/// Waits for one line of the log about each server with all of these words.
async fn told_of_both(api: &Child, words: &[&str]) {
    for server in ["Redis cannot be used", "waiting for Postgres"] {
        let refused = || async {
            let log = api.log().ok()?;
            let mut lines = log.lines().filter(|line| line.contains(server));
            lines.find(|line| words.iter().all(|word| line.contains(word)))?;
            Some(())
        };
        let told = until("the certificate is refused", PATIENCE, refused).await;
        told.unwrap_or_else(|error| panic!("{server}: {error}\n{}", api.log_tail(30)));
    }
}

/// Without a word about TLS every connection was in plain text, although the server would have
/// encrypted it.
#[tokio::test(flavor = "multi_thread")]
async fn tls_is_tried_first_where_the_url_leaves_it_open() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let address = postgres.addr().to_string();
    let by_address = format!(
        "/items_db?user=labuser&hostaddr=127.0.0.1&port={}&",
        postgres.port()
    );
    let encrypted = async |options: &str| {
        let url = postgres.url().replace("labuser", "labuser:wrong");
        let url = match options.strip_prefix("hostaddr ") {
            Some(options) => url.replace(&format!("{address}/items_db"), &by_address) + options,
            None => format!("{url}?{options}"),
        };
        let client = Connector::new(&url, "test").unwrap().connect().await?;
        let look = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        let row = client.query_one(look, &[]).await.unwrap();
        Ok::<bool, Obstacle>(row.get(0))
    };
    let open = [
        "",
        "sslmode=prefer",
        "sslmode=allow",
        "hostaddr sslmode=prefer",
    ];
    for options in open {
        assert_eq!(encrypted(options).await, Ok(false), "{options}");
    }
    let (certificate, key) = certificate();
    encrypt_postgres(&postgres, &certificate, &key).await;
    for options in open {
        assert_eq!(encrypted(options).await, Ok(true), "{options}");
    }
    assert_eq!(encrypted("sslmode=disable").await, Ok(false));
    // As nobody vouches for the certificate.
    encrypted("sslmode=require").await.unwrap_err();

    let access = async |rules: &str| {
        let path = postgres.run("SHOW hba_file").await.unwrap();
        fs::write(path, format!("local all all trust\n{rules}\n")).unwrap();
        postgres.run("SELECT pg_reload_conf()").await.unwrap();
    };
    // Not with TLS, by a rule or for want of one.
    for rules in [
        "hostnossl all all all trust",
        "hostssl all all all reject\nhost all all all trust",
    ] {
        access(rules).await;
        let plain = || async { (encrypted("").await == Ok(false)).then_some(()) };
        until("without TLS", PATIENCE, plain).await.unwrap();
    }
    // A password that was refused is not sent once more, for everybody to read.
    access("hostssl all all all scram-sha-256\nhostnossl all all all trust").await;
    let refused = || async {
        encrypted("")
            .await
            .err()
            .filter(|error| error.to_string().contains("password"))
    };
    until("the password is refused", PATIENCE, refused)
        .await
        .unwrap();
    assert_eq!(encrypted("sslmode=disable").await, Ok(false));
}

/// A password went over the network in plain text, and nobody was told.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_leaves_the_machine_in_plain_text_is_told_once() {
    const WARNING: &str = "is not encrypted (the server has no TLS)";
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let port = postgres.port();
    let cases = [
        // This leads to the machine itself, by an address that does not say so.
        (format!("labuser:s3cret@0.0.0.0:{port}/items_db"), 1),
        (
            format!("labuser:s3cret@0.0.0.0:{port}/items_db?sslmode=disable"),
            0,
        ),
        (format!("labuser@0.0.0.0:{port}/items_db"), 0),
        (format!("labuser:s3cret@127.0.0.1:{port}/items_db"), 0),
        (format!("labuser:s3cret@localhost:{port}/items_db"), 0),
    ];
    for (place, times) in cases {
        let serve = Serve::new("api", env!("CARGO_BIN_EXE_writethrough"));
        let serve = serve.database(&format!("postgres://{place}"));
        let node = serve.start(&testbed).await.unwrap();
        let (api, base) = (node.process(), node.url());
        let health = || async {
            let answer = Client::new()
                .get(format!("{base}/health"))
                .send()
                .await
                .ok()?;
            let ok = answer.text().await.ok()?.contains(r#""status":"ok""#);
            ok.then_some(())
        };
        let well = until("it is well", PATIENCE, health).await;
        well.unwrap_or_else(|error| panic!("{error}\n{}", api.log_tail(30)));
        let log = api.log().unwrap();
        assert_eq!(log.matches(WARNING).count(), times, "{place}: {log}");
        assert!(!log.contains("s3cret"), "{log}");
        api.kill().await.unwrap();
    }
}
