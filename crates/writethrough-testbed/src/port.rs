//! TCP ports of 127.0.0.1 that stay ours while their server is down.
//!
//! A port found by binding number 0 lies in the range from which the kernel takes the local ports of
//! outgoing connections. While its server is down, any connection may take it, and a client that
//! keeps trying to reconnect can even connect to itself; the server can then not come back on it.
//! Therefore ports are taken from below that range. And since a test may keep a server down while
//! other tests look for ports, a port is claimed by holding the UDP port of the same number: the
//! kernel releases the claim when its process dies, however it dies.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use parking_lot::Mutex;

use crate::error::{Error, Result};

/// The lowest port handed out; well-known services live below it.
const LOWEST: u16 = 12_000;

/// How many numbers are tried before the kernel is asked for any.
const ATTEMPTS: u32 = 500;

/// A TCP port of 127.0.0.1, claimed until dropped.
#[derive(Debug)]
pub(crate) struct Port {
    number: u16,
    _claim: UdpSocket,
}

impl Port {
    /// Claims a port that nobody listens on.
    pub(crate) fn claim() -> Result<Self> {
        let end = ephemeral_start().max(LOWEST + 1_000);
        for _ in 0..ATTEMPTS {
            let number = fastrand::u16(LOWEST..end);
            if let Ok(claim) = UdpSocket::bind(loopback(number))
                && TcpListener::bind(loopback(number)).is_ok()
            {
                return Ok(Self {
                    number,
                    _claim: claim,
                });
            }
        }
        // A machine with unusual settings: any port is better than none.
        let listener = TcpListener::bind(loopback(0)).map_err(Error::io("find a free port"))?;
        let number = listener
            .local_addr()
            .map_err(Error::io("find a free port"))?
            .port();
        let claim = UdpSocket::bind(loopback(number)).map_err(Error::io("claim a port"))?;
        Ok(Self {
            number,
            _claim: claim,
        })
    }

    pub(crate) fn number(&self) -> u16 {
        self.number
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        loopback(self.number)
    }
}

/// Returns a TCP port of 127.0.0.1 that nobody listens on and that no other testbed will choose while
/// this process lives.
///
/// # Panics
///
/// When the machine has no free port at all.
pub fn free_port() -> u16 {
    static CLAIMS: Mutex<Vec<Port>> = Mutex::new(Vec::new());
    let port = Port::claim().expect("a machine has a free port");
    let number = port.number();
    CLAIMS.lock().push(port);
    number
}

/// The first port that the kernel may give to an outgoing connection.
fn ephemeral_start() -> u16 {
    std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|range| range.split_whitespace().next()?.parse().ok())
        .unwrap_or(32_768)
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn ports_are_free_distinct_and_below_the_ephemeral_range() {
        let ports: HashSet<u16> = (0..50).map(|_| free_port()).collect();
        assert_eq!(ports.len(), 50);
        for port in ports {
            assert!(port < ephemeral_start().max(LOWEST + 1_000));
            TcpListener::bind(loopback(port)).unwrap();
        }
    }
}
