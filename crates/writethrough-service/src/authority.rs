//! Authorities: the host of a request, with or without a port (RFC 9110, 7.2).

use axum::http::uri::Authority;

/// The host of an authority in its usual form: letters, digits, dots and hyphens, then perhaps a port. That
/// is what nearly every request has, and looking at it costs no allocation.
pub(crate) fn plain_host(authority: &[u8]) -> Option<&str> {
    let (host, port) = match authority.iter().position(|byte| *byte == b':') {
        Some(at) => (&authority[..at], &authority[at + 1..]),
        None => (authority, &[][..]),
    };
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
    let port_fits = match port.len() {
        0 => true,
        1..=4 => port.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    let plain = !host.is_empty() && host.iter().all(is_plain) && port_fits;
    plain.then(|| std::str::from_utf8(host).ok()).flatten()
}

/// Whether this is a host with or without a port, or nothing, which stands for "no host".
pub(crate) fn is_host(text: &[u8]) -> bool {
    if text.is_empty() || plain_host(text).is_some() {
        return true;
    }
    let Ok(authority) = Authority::try_from(text) else {
        return false;
    };
    let after_host = &authority.as_str()[authority.host().len()..];
    !authority.as_str().contains(['@', ','])
        && !authority.host().is_empty()
        && (matches!(after_host, "" | ":") || authority.port_u16().is_some())
}
