//! The URL of a Redis server: which is used, and what to write instead of another one.

use url::{Host, Url};

use super::value::{is_host, option_name};

const ALLOWED: &str = "use `in-process` or `redis://HOST:PORT/DB` (`rediss://` for TLS; a password \
                       goes in as `redis://:PASSWORD@HOST:PORT`)";

/// Checks a URL.
///
/// # Errors
///
/// What to write instead, without any part of the URL but the name of an option.
pub(super) fn check(text: &str) -> Result<(), String> {
    let Some((scheme, _)) = text.split_once("://") else {
        return Err(format!(
            "{ALLOWED}; a host and a port alone need `redis://` before them, such as \
             redis://localhost:6379"
        ));
    };
    match scheme.to_ascii_lowercase().as_str() {
        "redis" | "rediss" | "valkey" | "valkeys" => {}
        "redis+tls" | "redis+ssl" | "valkey+tls" | "tls" => {
            return Err("use `rediss://` for TLS".to_owned());
        }
        "unix" | "redis+unix" | "redis+socket" | "valkey+unix" => {
            return Err(
                "use `redis://HOST:PORT`, and let Redis listen on a TCP port: Unix sockets are \
                 not supported"
                    .to_owned(),
            );
        }
        "redis+sentinel" | "redis-sentinel" | "redis+cluster" | "redis-cluster" => {
            return Err(
                "use `redis://HOST:PORT` with a name or an address that follows the primary: \
                 neither Sentinel nor Redis Cluster is asked"
                    .to_owned(),
            );
        }
        _ => return Err(ALLOWED.to_owned()),
    }
    let url = Url::parse(text).ok().filter(has_host).ok_or_else(|| {
        format!(
            "{ALLOWED}, and percent-encode other characters than letters and digits in a password"
        )
    })?;
    if url.fragment().is_some() {
        return Err(
            "use the URL without `#`, which a password holds as `%23`; certificates are always \
             verified"
                .to_owned(),
        );
    }
    check_options(&url)?;
    database(&url)
        .map(drop)
        .ok_or_else(|| format!("{ALLOWED}, with DB a number"))
}

/// The parts of a URL that tell where it leads to; `None` when it is not one that [`check`] lets
/// pass.
pub(super) fn shown(text: &str) -> Option<String> {
    check(text).ok()?;
    let url = Url::parse(text).ok()?;
    let port = url.port().unwrap_or(6379);
    let database = database(&url)?;
    Some(format!(
        "{}://{}:{port}/{database}",
        url.scheme(),
        url.host_str()?
    ))
}

fn has_host(url: &Url) -> bool {
    url.port() != Some(0)
        && match url.host() {
            // The client refuses these two, which stand for every address of a machine.
            Some(Host::Domain(name)) => is_host(name) && name != "0.0.0.0",
            Some(Host::Ipv6(address)) => !address.is_unspecified(),
            Some(Host::Ipv4(address)) => !address.is_unspecified(),
            None => false,
        }
}

fn database(url: &Url) -> Option<u32> {
    match url.path().trim_matches('/') {
        "" => Some(0),
        number if number.bytes().all(|digit| digit.is_ascii_digit()) => number.parse().ok(),
        _ => None,
    }
}

/// No option is known: the first one is refused by name.
fn check_options(url: &Url) -> Result<(), String> {
    let Some(query) = url.query().filter(|query| !query.is_empty()) else {
        return Ok(());
    };
    let first = query.split('&').next().unwrap_or_default();
    let name = first.split('=').next().unwrap_or_default();
    // What stands before an `@` is a password that began before the `?`.
    let name = option_name(0, name, query.contains('@'));
    Err(match name.trim_matches(['`', '?', '=']) {
        "ssl" | "tls" | "use_tls" | "use_ssl" => {
            format!("use `rediss://` in place of {name}")
        }
        "db" | "database" => {
            format!("use the path for the database, as in redis://HOST:PORT/3, in place of {name}")
        }
        "password" | "username" | "user" | "auth" => {
            format!("use `redis://USER:PASSWORD@HOST:PORT` (USER may be empty) in place of {name}")
        }
        "ssl_cert_reqs" | "ssl_ca_certs" | "ssl_check_hostname" => format!(
            "use the URL without {name}: certificates are always verified, against the \
             authorities of the system or of SSL_CERT_FILE"
        ),
        _ => format!("use the URL without {name}, which is not supported"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_that_is_used_is_shown_from_its_parts() {
        for (url, expected) in [
            ("redis://h", "redis://h:6379/0"),
            ("REDIS://h:6380/2", "redis://h:6380/2"),
            (
                "rediss://u:hunter2@h.example.org",
                "rediss://h.example.org:6379/0",
            ),
            (
                "valkey://:hunter2@10.0.0.1:6379",
                "valkey://10.0.0.1:6379/0",
            ),
            ("valkeys://[::1]:6379/", "valkeys://[::1]:6379/0"),
        ] {
            assert_eq!(check(url), Ok(()), "{url}");
            assert_eq!(shown(url).as_deref(), Some(expected));
        }
    }

    #[test]
    fn what_is_refused_says_what_to_write_and_nothing_of_the_password() {
        for (url, remedy) in [
            ("localhost:6379", "redis://localhost:6379"),
            ("redis-cli -h h -a hunter2", "use `in-process` or `redis://"),
            ("h:6380,pw=hunter2", "use `in-process` or `redis://"),
            ("redis+tls://:hunter2@h", "use `rediss://`"),
            ("unix:///run/hunter2.sock", "Unix sockets are not supported"),
            ("redis-sentinel://h/hunter2", "follows the primary"),
            ("https://h/hunter2", "use `in-process` or `redis://"),
            ("redis://", "redis://HOST:PORT"),
            ("redis://u:hunter2", "redis://HOST:PORT"),
            ("redis://h,password=hunter2", "redis://HOST:PORT"),
            ("redis://:hunt/er2@h", "percent-encode"),
            ("redis://h@hunter2@:6379", "percent-encode"),
            ("redis://h:6379/hunter2", "with DB a number"),
            ("redis://h:6379/-1", "with DB a number"),
            ("redis://h:0", "redis://HOST:PORT"),
            ("redis://0.0.0.0:6379", "redis://HOST:PORT"),
            ("rediss://h#insecure", "always verified"),
            ("redis://hunter2#x@h", "`%23`"),
            ("redis://h?ssl=true", "use `rediss://` in place of `?ssl=`"),
            ("redis://h?db=3", "redis://HOST:PORT/3, in place of `?db=`"),
            ("redis://h?password=hunter2", "in place of `?password=`"),
            ("redis://h?timeout=5", "without `?timeout=`"),
            ("redis://h?hunter2", "option number 1"),
            ("redis://u?hunter=x@h", "option number 1"),
        ] {
            let reason = check(url).unwrap_err();
            assert!(reason.starts_with("use "), "{url}: {reason}");
            assert!(reason.contains(remedy), "{url}: {reason}");
            assert!(!reason.contains("hunt"), "{url}: {reason}");
            assert_eq!(shown(url), None);
        }
    }
}
