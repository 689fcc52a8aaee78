//! Who may do what: checks a request by where it comes from, whom it is meant for and what it carries,
//! before anything is done for it. docs/SECURITY.md says against whom. Knows nothing of items.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use subtle::ConstantTimeEq;

use crate::authority::plain_host;
use crate::config::shown;
use crate::json::is_json;
use crate::problem::{Kind, Problem};
use crate::route::Route;

/// How often the log repeats that requests are refused for one reason.
const REMINDER: Duration = Duration::from_secs(60);

/// Headers that a proxy adds: with one of them, the peer is not who asks.
const OF_PROXIES: [&str; 6] = [
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
];

/// Who may use the routes for operators: `/cache/...` and `/metrics`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AdminAccess {
    /// Everybody may look; what changes something is for this machine.
    #[default]
    Local,
    /// Everybody who reaches them.
    Anyone,
    /// Who sends the token.
    Token(AdminToken),
}

impl AdminAccess {
    /// The word for the log.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Local => "changes from this machine only",
            Self::Anyone => "anyone",
            Self::Token(_) => "token",
        }
    }
}

/// The secret of the operators. Is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct AdminToken(String);

impl AdminToken {
    /// The fewest characters: what nobody guesses over a network.
    const SHORTEST: usize = 16;
    const LONGEST: usize = 512;

    /// A token of 16 to 512 visible ASCII characters.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let fits = (Self::SHORTEST..=Self::LONGEST).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_graphic());
        fits.then(|| Self(text.to_owned()))
    }

    /// Whether it is the same; takes as long for a good guess as for a bad one.
    fn is(&self, other: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(other).into()
    }
}

impl fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AdminToken")
    }
}

/// The names by which the service may be asked for, beside those that nobody else can own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowedHosts {
    /// Every name.
    Any,
    /// These, in lower case; with a dot before it a name stands for those below it, too.
    Names(Vec<String>),
}

/// Which listener a request came in by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entrance {
    /// The one of `--listen`.
    Public,
    /// The one of `--admin-listen`.
    Admin,
}

/// Where a request comes from.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// Which listener took the connection.
    pub entrance: Entrance,
    /// Whether the listener can be reached from this machine only.
    pub loopback: bool,
    /// The other end of the connection.
    pub peer: IpAddr,
}

/// Why a request is refused. The order is that of the metric's labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is meant for a name that is not ours.
    Host,
    /// The other listener serves this route.
    Entrance,
    /// The token is missing or wrong.
    Token,
    /// It is not from this machine.
    NotLocal,
    /// A page of another site makes a browser send it.
    CrossSite,
}

impl Refusal {
    /// All, in their order.
    pub const ALL: [Self; 5] = [
        Self::Host,
        Self::Entrance,
        Self::Token,
        Self::NotLocal,
        Self::CrossSite,
    ];

    /// The value of the metric's label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Entrance => "entrance",
            Self::Token => "token",
            Self::NotLocal => "not-local",
            Self::CrossSite => "cross-site",
        }
    }
}

/// The rules for all requests.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Who may use the routes for operators.
    pub admin: AdminAccess,
    /// Whether those routes have a listener of their own.
    pub apart: bool,
    /// `None`: any name, unless the listener is of this machine alone.
    pub hosts: Option<AllowedHosts>,
}

impl Access {
    /// Whether a request to this route may be served.
    ///
    /// # Errors
    ///
    /// Why not, and the answer.
    pub(crate) fn check(
        &self,
        caller: Option<Caller>,
        request: &Request,
        route: Option<&Route>,
    ) -> Result<(), (Refusal, Problem)> {
        let headers = request.headers();
        if (self.hosts.is_some() || caller.is_some_and(|caller| caller.loopback))
            && !is_asked_as(request, |name| self.allows(name))
        {
            let problem = Problem::new(Kind::HostNotAllowed).error(
                "Host",
                "must be `localhost`, an IP address, or a name in --allowed-hosts",
            );
            return Err((Refusal::Host, problem));
        }
        let Some(route) = route else {
            return Ok(());
        };
        let for_operators = route.operator;
        let entrance = caller.map_or(Entrance::Public, |caller| caller.entrance);
        if for_operators && self.apart && entrance == Entrance::Public {
            let problem = Problem::new(Kind::Forbidden)
                .detail("This route is served at the address of --admin-listen alone. Ask there.");
            return Err((Refusal::Entrance, problem));
        }
        if entrance == Entrance::Admin && route.items {
            let problem = Problem::new(Kind::RouteNotFound)
                .detail("Items are served at the address of --listen alone. Ask there.");
            return Err((Refusal::Entrance, problem));
        }
        let method = request.method();
        if !for_operators || method == Method::OPTIONS {
            return Ok(());
        }
        let changes = ![Method::GET, Method::HEAD].contains(method);
        match &self.admin {
            AdminAccess::Token(token) => show_token(token, headers)?,
            AdminAccess::Local if changes && !is_local(caller, request) => {
                let problem = Problem::new(Kind::Forbidden).detail(
                    "This is taken from the service's own machine only, and not through a proxy. \
                     Send it there, or start the service with --admin-token and send the token.",
                );
                return Err((Refusal::NotLocal, problem));
            }
            AdminAccess::Local | AdminAccess::Anyone => {}
        }
        if changes && is_unasked(headers) {
            let problem = Problem::new(Kind::Forbidden)
                .detail(
                    "A page of another site sent this. A program that means it sends the header \
                     `Content-Type: application/json`.",
                )
                .error("Origin", "must be that of this service");
            return Err((Refusal::CrossSite, problem));
        }
        Ok(())
    }

    fn allows(&self, name: &str) -> bool {
        is_local_name(name)
            || match &self.hosts {
                None => false,
                Some(AllowedHosts::Any) => true,
                Some(AllowedHosts::Names(names)) => names.iter().any(|known| {
                    known == name
                        || (known.starts_with('.')
                            && (name.ends_with(known.as_str()) || known[1..] == *name))
                }),
            }
    }
}

/// Whether somebody on this machine asks: neither a proxy for somebody else, nor a page whose name was
/// made to lead here.
fn is_local(caller: Option<Caller>, request: &Request) -> bool {
    caller.is_some_and(|caller| caller.peer.to_canonical().is_loopback())
        && !OF_PROXIES
            .iter()
            .any(|name| request.headers().contains_key(*name))
        && is_asked_as(request, is_local_name)
}

/// Whether all names that the request gives its target are among these.
fn is_asked_as(request: &Request, known: impl Fn(&str) -> bool) -> bool {
    let given = request.headers().get_all(header::HOST).iter();
    let given = given.map(|host| host.to_str().unwrap_or("\u{fffd}"));
    let target = request.uri().authority().map(Authority::as_str);
    given.chain(target).all(|authority| {
        authority.is_empty() || name_of(authority).is_some_and(|name| known(&name))
    })
}

/// The host of an authority, in lower case, without the port and the dot at its end.
fn name_of(authority: &str) -> Option<Cow<'_, str>> {
    if let Some(host) = plain_host(authority.as_bytes())
        && !host.bytes().any(|byte| byte.is_ascii_uppercase())
    {
        return Some(host.strip_suffix('.').unwrap_or(host).into());
    }
    let authority: Authority = authority.parse().ok()?;
    if authority.as_str().contains('@') {
        return None;
    }
    let name = authority.host().to_ascii_lowercase();
    Some(name.strip_suffix('.').unwrap_or(&name).to_owned().into())
}

/// Whether no stranger can own the name and make it lead here: a name with a dot can be bought, an
/// address cannot, and without a dot it is one of the own network.
fn is_local_name(name: &str) -> bool {
    let address = name.trim_start_matches('[').trim_end_matches(']');
    address.parse::<IpAddr>().is_ok() || !name.contains('.') || name.ends_with(".localhost")
}

/// Looks for the token in `Authorization: Bearer` (RFC 6750).
fn show_token(token: &AdminToken, headers: &HeaderMap) -> Result<(), (Refusal, Problem)> {
    let shown = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, token) = value.as_bytes().split_at_checked("Bearer ".len())?;
        scheme
            .eq_ignore_ascii_case(b"Bearer ")
            .then(|| token.trim_ascii())
    });
    if shown.is_some_and(|shown| token.is(shown)) {
        return Ok(());
    }
    let (challenge, wrong) = match shown {
        None => (
            "Bearer realm=\"writethrough\"",
            "must be `Bearer` and the token",
        ),
        Some(_) => (
            "Bearer realm=\"writethrough\", error=\"invalid_token\"",
            "has another token",
        ),
    };
    let problem = Problem::new(Kind::Unauthorized)
        .error("Authorization", wrong)
        .header(
            header::WWW_AUTHENTICATE,
            HeaderValue::from_static(challenge),
        );
    Err((Refusal::Token, problem))
}

/// Whether a page of another site may have made a browser send this without asking the service first.
/// For JSON a browser asks, and is not allowed; of the rest it says where it comes from (Fetch Metadata,
/// or `Origin` from older ones and without TLS).
fn is_unasked(headers: &HeaderMap) -> bool {
    const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
    let declared = headers.get(header::CONTENT_TYPE);
    if declared.is_some_and(|declared| is_json(declared.as_bytes())) {
        return false;
    }
    if let Some(site) = headers.get(FETCH_SITE) {
        return ![&b"same-origin"[..], b"none"].contains(&site.as_bytes());
    }
    let Some(origin) = headers.get(header::ORIGIN) else {
        return false;
    };
    let host = headers.get(header::HOST).map(HeaderValue::as_bytes);
    let own = [&b"http://"[..], b"https://"].into_iter().any(|scheme| {
        let origin = origin.as_bytes().strip_prefix(scheme);
        origin.is_some() && origin == host
    });
    !own
}

/// A line for each reason at most once a minute: anybody can make the service refuse something.
pub(crate) fn log_refusal(
    refusal: Refusal,
    caller: Option<Caller>,
    request: &Request,
    route: Option<&Route>,
) {
    static LAST: Mutex<[Option<Instant>; Refusal::ALL.len()]> =
        Mutex::new([None; Refusal::ALL.len()]);
    {
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        let last = &mut last[refusal as usize];
        if last.is_some_and(|at| at.elapsed() < REMINDER) {
            return;
        }
        *last = Some(Instant::now());
    }
    let why = match refusal {
        Refusal::Host => {
            let host = request.headers().get(header::HOST);
            let host = host.map_or("nothing".into(), |host| {
                shown(&String::from_utf8_lossy(host.as_bytes()))
            });
            format!("its Host is {host}; if that is this service, name it in --allowed-hosts")
        }
        Refusal::Entrance => "the other listener serves it (--listen, --admin-listen)".to_owned(),
        Refusal::Token => "the token of --admin-token is missing or wrong".to_owned(),
        Refusal::NotLocal => {
            "it is not from this machine, or comes through a proxy, and there is no --admin-token"
                .to_owned()
        }
        Refusal::CrossSite => "a page of another site sent it".to_owned(),
    };
    let peer = caller.map_or_else(|| "?".to_owned(), |caller| caller.peer.to_string());
    let route = route.map_or("no route", |route| route.path);
    tracing::warn!("refused: {} {route} from {peer}: {why}", request.method());
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn request(method: &str, headers: &[(&str, &str)]) -> Request {
        let request = headers.iter().fold(
            Request::builder().method(method).uri("/cache/clear"),
            |request, (name, value)| request.header(*name, *value),
        );
        request.body(Body::empty()).unwrap()
    }

    fn from(peer: &str) -> Option<Caller> {
        Some(Caller {
            entrance: Entrance::Public,
            loopback: false,
            peer: peer.parse().unwrap(),
        })
    }

    #[test]
    fn without_a_token_only_this_machine_changes_something() {
        let access = Access::default();
        let refused = |peer: &str, headers: &[(&str, &str)]| {
            let request = request("POST", headers);
            let checked = access.check(from(peer), &request, Route::of("/cache/clear"));
            checked.err().map(|(refusal, _)| refusal)
        };
        let own = [("host", "localhost:8000")];
        for peer in ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(refused(peer, &own), None, "{peer}");
        }
        for peer in ["10.0.0.1", "172.17.0.1", "fe80::1", "::ffff:10.0.0.1", "::"] {
            assert_eq!(refused(peer, &own), Some(Refusal::NotLocal), "{peer}");
        }
        for name in OF_PROXIES {
            let headers = [own[0], (name, "127.0.0.1")];
            assert_eq!(
                refused("127.0.0.1", &headers),
                Some(Refusal::NotLocal),
                "{name}"
            );
        }
        // A listener for everybody takes any Host; but it does not make a page of that name local.
        let rebound = [("host", "evil.example:8000")];
        assert_eq!(refused("127.0.0.1", &rebound), Some(Refusal::NotLocal));
        // Nobody knows where it comes from.
        let unknown = access.check(None, &request("POST", &own), Route::of("/cache/clear"));
        assert_eq!(unknown.unwrap_err().0, Refusal::NotLocal);
        // Looking is for everybody.
        for method in ["GET", "HEAD", "OPTIONS"] {
            let request = request(method, &own);
            for route in ["/metrics", "/cache/stats"] {
                let checked = access.check(from("10.0.0.1"), &request, Route::of(route));
                assert!(checked.is_ok(), "{method} {route}");
            }
        }
    }

    #[test]
    fn names_that_nobody_can_buy_are_local() {
        for authority in [
            "localhost",
            "LocalHost:8000",
            "localhost.",
            "api.localhost:80",
            "127.0.0.1:8000",
            "[::1]:8000",
            "192.168.1.7",
            "api:8000",
        ] {
            let name = name_of(authority).unwrap();
            assert!(is_local_name(&name), "{authority}");
        }
        for authority in [
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "127.0.0.1.nip.io:8000",
            "localhost.evil.example.",
            "evillocalhost.example",
        ] {
            let name = name_of(authority).unwrap();
            assert!(!is_local_name(&name), "{authority}");
        }
        for authority in ["localhost@evil.example", "a b", "[::1", "\u{fffd}", "a/b"] {
            assert_eq!(name_of(authority), None, "{authority}");
        }
    }

    #[test]
    fn a_token_is_compared_as_a_whole_and_not_shown() {
        let token = AdminToken::new("0123456789abcdef").unwrap();
        assert!(token.is(b"0123456789abcdef"));
        for other in [
            &b""[..],
            b"0123456789abcde",
            b"0123456789abcdeF",
            b"0123456789abcdef0",
        ] {
            assert!(!token.is(other));
        }
        assert!(!format!("{:?}", AdminAccess::Token(token)).contains("0123"));
        for unfit in [
            "",
            "0123456789abcde",
            "0123456789 abcdef",
            "0123456789abcdeé",
        ] {
            assert_eq!(AdminToken::new(unfit), None, "{unfit}");
        }
        assert_eq!(AdminToken::new(&"a".repeat(513)), None);
    }

    #[test]
    fn a_page_of_another_site_is_told_by_what_its_browser_says() {
        for (headers, unasked) in [
            (&[][..], false),
            (&[("origin", "http://h:1"), ("host", "h:1")], false),
            (&[("origin", "https://h"), ("host", "h")], false),
            (&[("origin", "http://h:2"), ("host", "h:1")], true),
            (&[("origin", "null"), ("host", "h:1")], true),
            (&[("origin", "ftp://h:1"), ("host", "h:1")], true),
            (&[("origin", "http://evil.example")], true),
            (
                &[("sec-fetch-site", "same-origin"), ("origin", "http://h")],
                false,
            ),
            (&[("sec-fetch-site", "none")], false),
            (&[("sec-fetch-site", "cross-site")], true),
            (&[("sec-fetch-site", "same-site")], true),
            (
                &[("content-type", "text/plain"), ("origin", "http://e")],
                true,
            ),
            (
                &[("content-type", "application/json"), ("origin", "http://e")],
                false,
            ),
        ] {
            let request = request("POST", headers);
            assert_eq!(is_unasked(request.headers()), unasked, "{headers:?}");
        }
    }
}
