//! Redis over TLS with the library alone: no other crate of the process brings what TLS needs.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::time::Duration;

use rcgen::generate_simple_self_signed;
use tokio::time::timeout;
use writethrough::{Cache, RedisCache, RedisCertificates, RedisSettings};
use writethrough_testbed::{Redis, Testbed, free_port, until};

const PATIENCE: Duration = Duration::from_secs(20);

/// A certificate for 127.0.0.1 that vouches for itself, and its key, as PEM.
fn certificate() -> (String, String) {
    let made = generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

/// A server that knows clients by their certificates, if `clients` is `yes`; its port.
async fn encrypt(testbed: &Testbed, redis: &Redis, pem: &(String, String), clients: &str) -> u16 {
    let path = |name: &str, text: &str| {
        let path = testbed.folder().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (certificate, key) = (path("server.pem", &pem.0), path("server.key", &pem.1));
    let port = free_port();
    let port_text = port.to_string();
    let command = [
        "CONFIG",
        "SET",
        "tls-cert-file",
        &certificate,
        "tls-key-file",
        &key,
        "tls-ca-cert-file",
        &certificate,
        "tls-auth-clients",
        clients,
        "tls-port",
        &port_text,
    ];
    redis.command(&command).await.unwrap();
    port
}

async fn is_verified(cache: &RedisCache) -> bool {
    let mut sessions = cache.sessions();
    let verified = sessions.wait_for(Option::is_some);
    timeout(PATIENCE, verified)
        .await
        .is_ok_and(|verified| verified.is_ok())
}

async fn trouble(cache: &RedisCache) -> String {
    let look = || async { cache.trouble().map(|error| error.to_string()) };
    until("the trouble is told", PATIENCE, look).await.unwrap()
}

/// The client of Redis panicked in a background task, for want of a provider of cryptography, and every
/// request went past the cache without a word.
#[tokio::test(flavor = "multi_thread")]
async fn the_library_alone_verifies_the_server_and_is_known_by_its_certificate() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let pem = certificate();
    let (authorities, client) = (
        Some(pem.0.clone().into_bytes()),
        Some((pem.0.clone().into_bytes(), pem.1.clone().into_bytes())),
    );
    let port = encrypt(&testbed, &redis, &pem, "no").await;
    let connect = |certificates: RedisCertificates| {
        let mut settings = RedisSettings::new(format!("rediss://127.0.0.1:{port}"));
        settings.certificates = certificates;
        RedisCache::connect(settings).unwrap()
    };
    let unknown = trouble(&connect(RedisCertificates::default())).await;
    assert!(unknown.contains("certificate"), "{unknown}");
    let known = connect(RedisCertificates {
        authorities: authorities.clone(),
        client: None,
    });
    assert!(is_verified(&known).await);
    drop(known);

    redis
        .command(&["CONFIG", "SET", "tls-auth-clients", "yes"])
        .await
        .unwrap();
    let nobody = connect(RedisCertificates {
        authorities: authorities.clone(),
        client: None,
    });
    trouble(&nobody).await;
    let somebody = connect(RedisCertificates {
        authorities,
        client,
    });
    assert!(is_verified(&somebody).await);
}

#[tokio::test]
async fn certificates_that_cannot_be_used_are_an_error_of_connect() {
    let (certificate, key) = certificate();
    let (certificate, key) = (certificate.into_bytes(), key.into_bytes());
    let no_pem = || b"s3cret".to_vec();
    let authorities = |authorities| RedisCertificates {
        authorities: Some(authorities),
        client: None,
    };
    let client = |certificate, key| RedisCertificates {
        authorities: None,
        client: Some((certificate, key)),
    };
    for (scheme, certificates, words) in [
        ("rediss", authorities(no_pem()), "authorities"),
        ("rediss", authorities(key.clone()), "authorities"),
        ("rediss", client(no_pem(), key.clone()), "client"),
        ("rediss", client(certificate.clone(), no_pem()), "key"),
        ("redis", authorities(certificate.clone()), "rediss://"),
    ] {
        let mut settings = RedisSettings::new(format!("{scheme}://127.0.0.1"));
        settings.certificates = certificates;
        let error = RedisCache::connect(settings).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
        assert!(!error.contains("s3cret"), "{error}");
    }
}
