//! The address that the service listens on: how it is written, how it is taken, and where others
//! reach it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::TcpListener;

/// Understands `ADDRESS:PORT`; `:PORT` stands for all addresses and `localhost:PORT` for
/// 127.0.0.1.
///
/// # Errors
///
/// What to write instead.
pub fn parse(text: &str) -> Result<SocketAddr, &'static str> {
    const ALLOWED: &str = "use an IP address and a port, such as 127.0.0.1:8000, or `:8000` for \
                           all addresses";
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let (host, port) = text.rsplit_once(':').ok_or(ALLOWED)?;
    let port = parse_port(port).ok_or(ALLOWED)?;
    match host.to_ascii_lowercase().as_str() {
        "" => Ok((Ipv6Addr::UNSPECIFIED, port).into()),
        "localhost" => Ok((Ipv4Addr::LOCALHOST, port).into()),
        _ => Err(ALLOWED),
    }
}

/// A port in digits; 0 takes a free one.
#[must_use]
pub fn parse_port(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|digit| digit.is_ascii_digit());
    text.parse().ok().filter(|_| digits)
}

/// Listens. `[::]` is every address of IPv4 too, and all there is when IPv6 is off: then it
/// stands for `0.0.0.0`.
///
/// # Errors
///
/// The address is taken, or is not one of this machine.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    bind_with(address, TcpListener::bind).await
}

async fn bind_with<T>(
    address: SocketAddr,
    bind: impl AsyncFn(SocketAddr) -> std::io::Result<T>,
) -> std::io::Result<T> {
    let refused = match bind(address).await {
        Err(error) if address.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED) => error,
        bound => return bound,
    };
    let instead = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
    // A taken port is taken for both; what is left is that there is no IPv6.
    if refused.kind() == std::io::ErrorKind::AddrInUse {
        return Err(refused);
    }
    let bound = bind(instead).await?;
    tracing::info!("{address} cannot be listened on ({refused}): listening on {instead}");
    Ok(bound)
}

/// Where to ask a server of this machine that listens on `address`. When it listens on all
/// addresses, it is asked at one that others see, if the machine has any: at the loopback it would
/// answer even though nobody else can reach it.
#[must_use]
pub fn reachable_at(address: SocketAddr) -> Vec<SocketAddr> {
    if !address.ip().is_unspecified() {
        return vec![address];
    }
    let own = if_addrs::get_if_addrs().unwrap_or_default();
    seen_by_others(address, own.into_iter().map(|interface| interface.ip()))
}

fn seen_by_others(address: SocketAddr, own: impl Iterator<Item = IpAddr>) -> Vec<SocketAddr> {
    let outward = own.filter(|ip| match ip {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        // A link-local address cannot be used without the name of its interface.
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    });
    let mut places: Vec<_> = outward.map(|ip| (ip, address.port()).into()).collect();
    if places.is_empty() {
        // Nobody else is there to see it.
        places = vec![
            (Ipv4Addr::LOCALHOST, address.port()).into(),
            (Ipv6Addr::LOCALHOST, address.port()).into(),
        ];
    }
    places
}

#[cfg(test)]
mod tests {
    use std::io::{Error, ErrorKind};
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn an_address_may_be_written_as_people_write_it() {
        for (text, expected) in [
            ("127.0.0.1:8000", "127.0.0.1:8000"),
            ("[::1]:8000", "[::1]:8000"),
            (":8000", "[::]:8000"),
            ("localhost:8000", "127.0.0.1:8000"),
            ("LocalHost:0", "127.0.0.1:0"),
        ] {
            assert_eq!(parse(text), Ok(expected.parse().unwrap()), "{text}");
        }
        for text in [
            "",
            "8000",
            ":",
            "localhost",
            "localhost:",
            "localhost:+80",
            ":70000",
            "h:8000",
            "127.0.0.1",
            "http://127.0.0.1:8000",
            "::1:8000",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn without_ipv6_all_addresses_are_those_of_ipv4_and_nothing_else_falls_back() {
        let ends = |refused: ErrorKind, listen: &str| {
            let listen: SocketAddr = listen.parse().unwrap();
            async move {
                let tried = Mutex::new(Vec::new());
                let bound = bind_with(listen, async |address| {
                    tried.lock().unwrap().push(address.to_string());
                    match address {
                        SocketAddr::V6(_) => Err(Error::from(refused)),
                        SocketAddr::V4(_) => Ok(()),
                    }
                });
                (bound.await.is_ok(), tried.into_inner().unwrap())
            }
        };
        let there_is_none = ends(ErrorKind::Unsupported, "[::]:8000").await;
        assert_eq!(
            there_is_none,
            (
                true,
                ["[::]:8000", "0.0.0.0:8000"].map(str::to_owned).to_vec()
            )
        );
        let taken = ends(ErrorKind::AddrInUse, "[::]:8000").await;
        assert_eq!(taken, (false, vec!["[::]:8000".to_owned()]));
        let one = ends(ErrorKind::Unsupported, "[::1]:8000").await;
        assert_eq!(one, (false, vec!["[::1]:8000".to_owned()]));
    }

    #[test]
    fn all_addresses_are_asked_where_others_see_them() {
        let asked = |listen: &str, own: &[&str]| -> Vec<String> {
            let own = own.iter().map(|ip| ip.parse().unwrap());
            let places = seen_by_others(listen.parse().unwrap(), own);
            places.iter().map(SocketAddr::to_string).collect()
        };
        let only_ipv6 = ["127.0.0.1", "::1", "fe80::1", "fd00::2"];
        for listen in ["0.0.0.0:80", "[::]:80"] {
            assert_eq!(asked(listen, &only_ipv6), ["[fd00::2]:80"]);
            assert_eq!(
                asked(listen, &["127.0.0.1", "172.18.0.2", "::1"]),
                ["172.18.0.2:80"]
            );
        }
        assert_eq!(
            asked("[::]:80", &["127.0.0.1"]),
            ["127.0.0.1:80", "[::1]:80"]
        );
        let one = "10.1.2.3:80".parse().unwrap();
        assert_eq!(reachable_at(one), [one]);
    }
}
