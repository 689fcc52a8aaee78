//! What the `OTEL_*` variables of OpenTelemetry's specification say about traces.
//!
//! A value that would lose traces stops the start. What is set and has no effect is a [`note`](
//! TraceSettings::notes), said once at start; no value of a variable is in it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Uri};
use percent_encoding::percent_decode_str;

use crate::config::{ConfigError, cleaned, form};

/// The specification's ports: one for each protocol.
const GRPC_PORT: u16 = 4317;
const HTTP_PORT: u16 = 4318;
const HTTP_PATH: &str = "/v1/traces";

/// How traces are made, kept and sent.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceSettings {
    /// The receiver; `None` for none.
    pub otlp: Option<Otlp>,
    /// Whether each span becomes a line of standard output.
    pub console: bool,
    /// Whether a caller's `traceparent` is continued.
    pub propagate: bool,
    /// Spans that may wait to be sent; more are dropped.
    pub queue_size: usize,
    /// Spans sent at once.
    pub batch_size: usize,
    /// How long a span may wait for a batch to be full.
    pub schedule_delay: Duration,
    /// Attributes of one span; more are dropped.
    pub attribute_count: u32,
    /// Characters of one attribute's text; the rest is cut off.
    pub attribute_length: Option<usize>,
    /// What all spans say about this process.
    pub resource: Vec<(String, String)>,
    /// What is set and has no effect, for the log.
    pub notes: Vec<String>,
}

/// A receiver of traces.
#[derive(Debug, Clone, PartialEq)]
pub struct Otlp {
    /// How it is spoken to.
    pub protocol: Protocol,
    /// The whole URL, with the path of the signal.
    pub endpoint: String,
    /// Sent with every request. May be secrets; their values are marked as such.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// How long one export may take, with its repetitions.
    pub timeout: Duration,
    /// Whether requests are packed.
    pub gzip: bool,
    /// A file with the certificate authorities to trust instead of the system's.
    pub certificate: Option<String>,
}

impl Otlp {
    /// A receiver with the specification's defaults.
    #[must_use]
    pub fn new(protocol: Protocol, endpoint: impl Into<String>) -> Self {
        Self {
            protocol,
            endpoint: endpoint.into(),
            headers: Vec::new(),
            timeout: Duration::from_secs(10),
            gzip: false,
            certificate: None,
        }
    }

    /// The endpoint as it may be printed: without a query, and without a path that is not the usual one,
    /// because receivers that others run take secrets in both.
    #[must_use]
    pub fn shown(&self) -> String {
        let endpoint = self.endpoint.split('?').next().unwrap_or_default();
        let (scheme, rest) = endpoint.split_once("://").unwrap_or_default();
        match rest.split_once('/') {
            None | Some((_, "" | "v1/traces")) => endpoint.to_owned(),
            Some((place, _)) => format!("{scheme}://{place}/..."),
        }
    }
}

/// A protocol of OTLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// `http/protobuf`.
    Http,
    /// `grpc`.
    Grpc,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => "http/protobuf",
            Self::Grpc => "grpc",
        })
    }
}

impl Default for TraceSettings {
    fn default() -> Self {
        Self {
            otlp: None,
            console: false,
            propagate: true,
            queue_size: 2048,
            batch_size: 512,
            schedule_delay: Duration::from_secs(5),
            attribute_count: 128,
            attribute_length: None,
            resource: Vec::new(),
            notes: Vec::new(),
        }
    }
}

impl TraceSettings {
    /// The service's name among the attributes of the resource.
    #[must_use]
    pub fn service_name(&self) -> Option<String> {
        let mut attributes = self.resource.iter().rev();
        let (_, value) = attributes.find(|(name, _)| name == "service.name")?;
        (!value.is_empty()).then(|| value.clone())
    }

    /// Whether any traces are made.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.otlp.is_some() || self.console
    }

    /// Reads the variables. `endpoint` is that of the flag or, when there is none, of its variable.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] for the first variable with a value that is not understood.
    pub fn from_variables(
        endpoint: Option<String>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let variables = Variables(variable);
        let mut settings = Self::default();
        settings.propagate = variables.propagate(&mut settings.notes);
        settings.resource = variables.resource(&mut settings.notes);

        settings.queue_size = variables
            .number(&["OTEL_BSP_MAX_QUEUE_SIZE"], 1, 1_000_000)?
            .unwrap_or(settings.queue_size);
        settings.batch_size = variables
            .number(&["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"], 1, 1_000_000)?
            .unwrap_or(settings.batch_size)
            .min(settings.queue_size);
        settings.schedule_delay = variables
            .milliseconds(&["OTEL_BSP_SCHEDULE_DELAY"])?
            .unwrap_or(settings.schedule_delay);
        let count = [
            "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
            "OTEL_ATTRIBUTE_COUNT_LIMIT",
        ];
        settings.attribute_count = variables
            .number(&count, 0, u32::MAX)?
            .unwrap_or(settings.attribute_count);
        let length = [
            "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT",
            "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT",
        ];
        settings.attribute_length = variables.number(&length, 0, usize::MAX)?;

        let disabled = variables.boolean("OTEL_SDK_DISABLED", &mut settings.notes);
        let exporters = variables.exporters()?;
        let receiver = variables.receiver(endpoint, exporters.otlp == Some(true));
        if disabled {
            return Ok(settings);
        }
        settings.console = exporters.console;
        if exporters.otlp != Some(false) {
            settings.otlp = variables.otlp(receiver, &mut settings.notes)?;
        }
        Ok(settings)
    }
}

/// Where the exporter's endpoint comes from.
enum Endpoint {
    /// The base: the signal's path is added.
    Base(String),
    /// Used as it is.
    Exact(String),
    /// The specification's default of the protocol.
    Default,
}

struct Exporters {
    /// `None` when the variable is not set: then an endpoint decides.
    otlp: Option<bool>,
    console: bool,
}

struct Variables<V>(V);

impl<V: Fn(&str) -> Option<String>> Variables<V> {
    /// The first of these variables that is set, which is the most specific one.
    fn first(&self, names: &[&'static str]) -> Option<(&'static str, String)> {
        names.iter().find_map(|name| Some((*name, self.get(name)?)))
    }

    fn get(&self, name: &str) -> Option<String> {
        let value = (self.0)(name)?;
        // What cannot be cleaned is refused as the wrong value that it is.
        cleaned(&value).unwrap_or(Some(value))
    }

    fn number<T: FromStr + PartialOrd + fmt::Display>(
        &self,
        names: &[&'static str],
        least: T,
        most: T,
    ) -> Result<Option<T>, ConfigError> {
        let Some((name, text)) = self.first(names) else {
            return Ok(None);
        };
        match text.parse() {
            Ok(number) if (&least..=&most).contains(&&number) => Ok(Some(number)),
            _ => Err(refused(
                name,
                text,
                format!("use a whole number from {least} to {most}"),
            )),
        }
    }

    fn milliseconds(&self, names: &[&'static str]) -> Result<Option<Duration>, ConfigError> {
        let number = self.number(names, 1, 600_000)?;
        Ok(number.map(Duration::from_millis))
    }

    /// Only `true` is true; everything else is false, as the specification has it.
    fn boolean(&self, name: &'static str, notes: &mut Vec<String>) -> bool {
        let text = self.get(name).map(|text| text.to_ascii_lowercase());
        match text.as_deref() {
            Some("true") => true,
            None | Some("false") => false,
            Some(_) => {
                notes.push(format!(
                    "{name} is neither `true` nor `false`: taken as `false`"
                ));
                false
            }
        }
    }

    fn exporters(&self) -> Result<Exporters, ConfigError> {
        const NAME: &str = "OTEL_TRACES_EXPORTER";
        let Some(text) = self.get(NAME) else {
            return Ok(Exporters {
                otlp: None,
                console: false,
            });
        };
        let mut exporters = Exporters {
            otlp: Some(false),
            console: false,
        };
        for one in text.split(',').map(str::trim) {
            match one.to_ascii_lowercase().as_str() {
                "otlp" => exporters.otlp = Some(true),
                // The name it had before.
                "console" | "logging" => exporters.console = true,
                "none" | "" => {}
                _ => {
                    let allowed = "use `otlp`, `console` or `none` (a collector speaks to others)";
                    return Err(refused(NAME, text, allowed));
                }
            }
        }
        Ok(exporters)
    }

    /// The names of propagators that are set and not known are noted.
    fn propagate(&self, notes: &mut Vec<String>) -> bool {
        const NAME: &str = "OTEL_PROPAGATORS";
        let Some(text) = self.get(NAME) else {
            return true;
        };
        let names: Vec<String> = text
            .split(',')
            .map(|name| name.trim().to_ascii_lowercase())
            .collect();
        // Nothing is called from here that baggage could be handed on to.
        let known = ["tracecontext", "baggage", "none", ""];
        if !names.iter().all(|name| known.contains(&name.as_str())) {
            notes.push(format!(
                "{NAME} names propagators that are not supported; `tracecontext` and `none` are"
            ));
        }
        names.iter().any(|name| name == "tracecontext")
    }

    fn resource(&self, notes: &mut Vec<String>) -> Vec<(String, String)> {
        const NAME: &str = "OTEL_RESOURCE_ATTRIBUTES";
        let text = self.get(NAME).unwrap_or_default();
        pairs(&text).unwrap_or_else(|| {
            // All or nothing, as the specification has it.
            notes.push(format!(
                "{NAME} is ignored: it is not a list of `name=value`, separated by commas, with \
                 other characters as `%2C`"
            ));
            Vec::new()
        })
    }

    /// Where traces go, and the setting that says so; `None` for nowhere.
    fn receiver(&self, base: Option<String>, wanted: bool) -> Option<(&'static str, Endpoint)> {
        const BASE: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
        const EXACT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
        const SETTING: &str = crate::config::setting::OTLP;
        let base = base
            .map(|text| text.trim().to_owned())
            .filter(|text| !text.is_empty());
        // A flag wins over all variables, the variable of the signal over that of all signals.
        let flag = base.is_some() && base != self.get(BASE);
        match (self.get(EXACT), base) {
            (Some(exact), _) if !flag => Some((EXACT, Endpoint::Exact(exact))),
            (_, Some(base)) => Some((SETTING, Endpoint::Base(base))),
            (_, None) => wanted.then_some((SETTING, Endpoint::Default)),
        }
    }

    fn otlp(
        &self,
        receiver: Option<(&'static str, Endpoint)>,
        notes: &mut Vec<String>,
    ) -> Result<Option<Otlp>, ConfigError> {
        let protocol = self.protocol()?;
        let headers = self.headers()?;
        let gzip = self.gzip()?;
        let timeout = self.milliseconds(&[
            "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
            "OTEL_EXPORTER_OTLP_TIMEOUT",
        ])?;
        let limit = self.milliseconds(&["OTEL_BSP_EXPORT_TIMEOUT"])?;
        let certificate = self.first(&[
            "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
            "OTEL_EXPORTER_OTLP_CERTIFICATE",
        ]);
        let Some((setting, endpoint)) = receiver else {
            let set = protocol.is_some() || gzip || !headers.is_empty() || certificate.is_some();
            if set || timeout.is_some() {
                notes.push(
                    "variables OTEL_EXPORTER_OTLP_... are set, but no endpoint is, so no traces are \
                     sent: set OTEL_EXPORTER_OTLP_ENDPOINT, or OTEL_TRACES_EXPORTER=otlp for this \
                     machine"
                        .to_owned(),
                );
            }
            return Ok(None);
        };
        let mut otlp = self.address(setting, endpoint, protocol, notes)?;
        otlp.headers = headers;
        otlp.gzip = gzip;
        otlp.timeout = timeout.unwrap_or(otlp.timeout);
        otlp.timeout = limit.map_or(otlp.timeout, |limit| limit.min(otlp.timeout));
        if let Some((name, path)) = certificate {
            if otlp.endpoint.starts_with("https://") {
                otlp.certificate = Some(path);
            } else {
                notes.push(format!("{name} has no effect: the endpoint is `http://`"));
            }
        }
        Ok(Some(otlp))
    }

    /// Protocol and whole URL.
    fn address(
        &self,
        setting: &'static str,
        endpoint: Endpoint,
        protocol: Option<Protocol>,
        notes: &mut Vec<String>,
    ) -> Result<Otlp, ConfigError> {
        const EXAMPLE: &str = "use `http://HOST:PORT` or `https://HOST:PORT`, such as \
                               http://otel-collector:4318";
        let (text, exact) = match endpoint {
            Endpoint::Base(text) => (text, false),
            Endpoint::Exact(text) => (text, true),
            Endpoint::Default => {
                let protocol = protocol.unwrap_or(Protocol::Http);
                return Ok(match protocol {
                    Protocol::Http => {
                        Otlp::new(protocol, format!("http://localhost:{HTTP_PORT}{HTTP_PATH}"))
                    }
                    Protocol::Grpc => Otlp::new(protocol, format!("http://localhost:{GRPC_PORT}")),
                });
            }
        };
        let wrong = |allowed: &str| Err(refused(setting, form(&text), allowed));
        let mut url = text.clone();
        if protocol == Some(Protocol::Grpc) && !url.contains("://") {
            let insecure = [
                "OTEL_EXPORTER_OTLP_TRACES_INSECURE",
                "OTEL_EXPORTER_OTLP_INSECURE",
            ];
            let insecure = self
                .first(&insecure)
                .is_some_and(|(name, _)| self.boolean(name, notes));
            url = format!("{}://{url}", if insecure { "http" } else { "https" });
        }
        let parsed: Option<Uri> = url.parse().ok();
        let authority = parsed.as_ref().and_then(Uri::authority);
        let (Some(uri), Some(authority)) = (&parsed, authority) else {
            return wrong(EXAMPLE);
        };
        let scheme = match uri.scheme_str() {
            Some(scheme @ ("http" | "https")) => scheme,
            _ => return wrong(EXAMPLE),
        };
        if authority.as_str().contains('@') {
            return wrong(
                "put no user or password into it: they go into OTEL_EXPORTER_OTLP_HEADERS, such as \
                 `authorization=Basic%20...`",
            );
        }
        let port = authority.as_str().rsplit_once(':');
        let port = port.filter(|(_, port)| !port.ends_with(']'));
        if authority.host().is_empty()
            || port.is_some_and(|(_, port)| !port.parse::<u16>().is_ok_and(|port| port > 0))
        {
            return wrong(EXAMPLE);
        }
        let port = authority.port_u16();
        let protocol = match protocol {
            Some(protocol) => protocol,
            // What listens there speaks nothing else, unless somebody took pains to change it.
            None if port == Some(GRPC_PORT) && uri.path() == "/" => Protocol::Grpc,
            None => Protocol::Http,
        };
        match (protocol, port) {
            (Protocol::Http, Some(GRPC_PORT)) => notes.push(format!(
                "traces go to port {GRPC_PORT} over http/protobuf, but that port is gRPC's: set \
                 OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or use port {HTTP_PORT}, unless it was changed"
            )),
            (Protocol::Grpc, Some(HTTP_PORT)) => notes.push(format!(
                "traces go to port {HTTP_PORT} over grpc, but that port is that of http/protobuf: set \
                 OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, or use port {GRPC_PORT}, unless it was \
                 changed"
            )),
            _ => {}
        }
        if url.contains('#') {
            return wrong("remove the part after `#`");
        }
        let base = format!("{scheme}://{authority}");
        match protocol {
            Protocol::Grpc if uri.path() != "/" || uri.query().is_some() => {
                wrong("gRPC has no path and no query: use `http://HOST:PORT` alone")
            }
            Protocol::Grpc => Ok(Otlp::new(protocol, base)),
            Protocol::Http if exact => {
                let path = uri.path_and_query().map_or("/", |path| path.as_str());
                Ok(Otlp::new(protocol, format!("{base}{path}")))
            }
            Protocol::Http if uri.query().is_some() => wrong(
                "a base has no query: `/v1/traces` is added to it. Use \
                 OTEL_EXPORTER_OTLP_TRACES_ENDPOINT for a whole URL, or OTEL_EXPORTER_OTLP_HEADERS \
                 for keys",
            ),
            Protocol::Http if uri.path().trim_end_matches('/').ends_with(HTTP_PATH) => wrong(
                "leave out `/v1/traces`, which is added to a base, or use \
                 OTEL_EXPORTER_OTLP_TRACES_ENDPOINT for a whole URL",
            ),
            Protocol::Http => {
                let path = uri.path().trim_end_matches('/');
                Ok(Otlp::new(protocol, format!("{base}{path}{HTTP_PATH}")))
            }
        }
    }

    fn protocol(&self) -> Result<Option<Protocol>, ConfigError> {
        let names = [
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
            "OTEL_EXPORTER_OTLP_PROTOCOL",
        ];
        let Some((name, text)) = self.first(&names) else {
            return Ok(None);
        };
        match text.to_ascii_lowercase().as_str() {
            "grpc" => Ok(Some(Protocol::Grpc)),
            "http/protobuf" => Ok(Some(Protocol::Http)),
            _ => Err(refused(name, text, "use `http/protobuf` or `grpc`")),
        }
    }

    fn gzip(&self) -> Result<bool, ConfigError> {
        let names = [
            "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION",
            "OTEL_EXPORTER_OTLP_COMPRESSION",
        ];
        let Some((name, text)) = self.first(&names) else {
            return Ok(false);
        };
        match text.to_ascii_lowercase().as_str() {
            "gzip" => Ok(true),
            "none" => Ok(false),
            _ => Err(refused(name, text, "use `gzip` or `none`")),
        }
    }

    fn headers(&self) -> Result<Vec<(HeaderName, HeaderValue)>, ConfigError> {
        let names = [
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
            "OTEL_EXPORTER_OTLP_HEADERS",
        ];
        let Some((name, text)) = self.first(&names) else {
            return Ok(Vec::new());
        };
        let header = |(name, value): (String, String)| {
            let mut value = HeaderValue::try_from(value).ok()?;
            // Neither a log nor the form for debugging shows it.
            value.set_sensitive(true);
            // Other bytes than ASCII cannot be sent over gRPC.
            value.to_str().is_ok().then_some(())?;
            Some((HeaderName::try_from(name).ok()?, value))
        };
        let headers = pairs(&text).and_then(|pairs| pairs.into_iter().map(header).collect());
        headers.ok_or_else(|| {
            refused(
                name,
                form(&text),
                "use `name=value`, separated by commas, with other characters as `%2C`",
            )
        })
    }
}

/// Pairs as W3C's `baggage` writes them; `None` when one is not valid.
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let decoded = |text: &str| -> Option<String> {
        let text = percent_decode_str(text.trim()).decode_utf8().ok()?;
        Some(text.into_owned())
    };
    let parts = text.split(',').filter(|part| !part.trim().is_empty());
    parts
        .map(|part| {
            let (name, value) = part.split_once('=')?;
            let name = decoded(name)?;
            (!name.is_empty()).then_some((name, decoded(value)?))
        })
        .collect()
}

fn refused(setting: &'static str, value: String, allowed: impl Into<String>) -> ConfigError {
    ConfigError {
        setting,
        value,
        allowed: allowed.into(),
    }
}

/// The variables that have an effect, or whose only effect would be on what this service never makes
/// (events and links of spans).
const HONOURED: [&str; 36] = [
    "OTEL_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT",
    "OTEL_BSP_EXPORT_TIMEOUT",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_EXPORTER_OTLP_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_COMPRESSION",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_INSECURE",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
    "OTEL_EXPORTER_OTLP_TIMEOUT",
    "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_INSECURE",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
    "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_PROPAGATORS",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_SDK_DISABLED",
    "OTEL_SERVICE_NAME",
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT",
    "OTEL_SPAN_EVENT_COUNT_LIMIT",
    "OTEL_SPAN_LINK_COUNT_LIMIT",
    "OTEL_TRACES_EXPORTER",
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
    // `none` is what happens; see `without_effect` for other values.
    "OTEL_LOGS_EXPORTER",
    "OTEL_METRICS_EXPORTER",
    "OTEL_METRICS_EXEMPLAR_FILTER",
];

/// One line that names the variables that are set and have no effect, if there are any.
#[must_use]
pub fn without_effect(variables: impl IntoIterator<Item = (String, String)>) -> Option<String> {
    let mut names: Vec<String> = variables
        .into_iter()
        .filter(|(name, value)| {
            let value = value.trim();
            let only = match name.as_str() {
                "OTEL_LOGS_EXPORTER" | "OTEL_METRICS_EXPORTER" => Some("none"),
                "OTEL_METRICS_EXEMPLAR_FILTER" => Some("trace_based"),
                _ => None,
            };
            let honoured = HONOURED.contains(&name.as_str())
                && only.is_none_or(|only| value.eq_ignore_ascii_case(only));
            name.starts_with("OTEL_") && !value.is_empty() && !honoured
        })
        .map(|(name, _)| name)
        .collect();
    names.sort_unstable();
    (!names.is_empty()).then(|| {
        format!(
            "set, and without effect here: {} (docs/OPERATIONS.md lists what has one)",
            names.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    type Set<'a> = &'a [(&'a str, &'a str)];

    fn read(set: Set<'_>) -> Result<TraceSettings, ConfigError> {
        let variable = |name: &str| {
            let found = set.iter().find(|(known, _)| *known == name)?;
            Some(found.1.to_owned())
        };
        TraceSettings::from_variables(variable("OTEL_EXPORTER_OTLP_ENDPOINT"), variable)
    }

    const BASE: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
    const EXACT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
    const PROTOCOL: &str = "OTEL_EXPORTER_OTLP_PROTOCOL";
    const OF_TRACES: &str = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL";
    const EXPORTER: &str = "OTEL_TRACES_EXPORTER";

    #[test]
    fn of_the_endpoint_only_the_place_is_printed_and_the_usual_path() {
        for (endpoint, shown) in [
            ("http://h:4318", "http://h:4318/"),
            ("https://[::1]:4318/", "https://[::1]:4318/"),
            ("http://h:4318/v1/traces", "http://h:4318/v1/traces"),
            (
                "http://h:4318/v1/traces?key=hunter2",
                "http://h:4318/v1/traces",
            ),
            ("https://h/otlp/hunter2/v1/traces", "https://h/..."),
            ("https://h/hunter2", "https://h/..."),
        ] {
            let settings = read(&[(EXACT, endpoint)]).unwrap();
            assert_eq!(settings.otlp.unwrap().shown(), shown, "{endpoint}");
        }
    }

    #[test]
    fn traces_go_where_and_how_the_specification_says() {
        use Protocol::{Grpc, Http};
        let cases: &[(Set<'_>, Protocol, &str)] = &[
            (&[(BASE, "http://c:4318")], Http, "http://c:4318/v1/traces"),
            (
                &[(BASE, " http://c:4318/ ")],
                Http,
                "http://c:4318/v1/traces",
            ),
            (&[(BASE, "HTTP://c/otlp/")], Http, "http://c/otlp/v1/traces"),
            (
                &[(BASE, "https://[::1]:4318")],
                Http,
                "https://[::1]:4318/v1/traces",
            ),
            (&[(EXACT, "http://c:4318")], Http, "http://c:4318/"),
            (&[(EXACT, "http://c/in?key=1")], Http, "http://c/in?key=1"),
            (
                &[(BASE, "http://b:4318"), (EXACT, "http://c/in")],
                Http,
                "http://c/in",
            ),
            (
                &[(BASE, "http://b:4318"), (EXACT, "")],
                Http,
                "http://b:4318/v1/traces",
            ),
            (&[(BASE, "http://c:4317")], Grpc, "http://c:4317"),
            (&[(BASE, "http://c:4317/")], Grpc, "http://c:4317"),
            (
                &[(BASE, "http://c:9"), (PROTOCOL, "GRPC")],
                Grpc,
                "http://c:9",
            ),
            (
                &[
                    (BASE, "http://c:9"),
                    (PROTOCOL, "http/protobuf"),
                    (OF_TRACES, "grpc"),
                ],
                Grpc,
                "http://c:9",
            ),
            (
                &[(BASE, "http://c:4317"), (PROTOCOL, "http/protobuf")],
                Http,
                "http://c:4317/v1/traces",
            ),
            (&[(BASE, "c:9"), (PROTOCOL, "grpc")], Grpc, "https://c:9"),
            (
                &[
                    (BASE, "c:9"),
                    (PROTOCOL, "grpc"),
                    ("OTEL_EXPORTER_OTLP_INSECURE", "true"),
                ],
                Grpc,
                "http://c:9",
            ),
            (
                &[(EXPORTER, "otlp")],
                Http,
                "http://localhost:4318/v1/traces",
            ),
            (
                &[(EXPORTER, "otlp"), (PROTOCOL, "grpc")],
                Grpc,
                "http://localhost:4317",
            ),
        ];
        for (set, protocol, endpoint) in cases {
            let otlp = read(set).unwrap().otlp.unwrap_or_else(|| panic!("{set:?}"));
            assert_eq!(
                (otlp.protocol, otlp.endpoint.as_str()),
                (*protocol, *endpoint),
                "{set:?}"
            );
        }
        for nowhere in [
            &[][..],
            &[(BASE, "http://c:4318"), ("OTEL_SDK_DISABLED", "TRUE")],
            &[(BASE, "http://c:4318"), (EXPORTER, "none")],
            &[(EXACT, "http://c:4318"), (EXPORTER, "console")],
        ] {
            let settings = read(nowhere).unwrap();
            assert_eq!(settings.otlp, None, "{nowhere:?}");
            assert_eq!(
                settings.console,
                nowhere.len() == 2 && nowhere[1].1 == "console"
            );
            assert!(settings.notes.is_empty(), "{:?}", settings.notes);
        }
        // A flag wins over all variables.
        let settings = TraceSettings::from_variables(Some("http://flag:1".to_owned()), |name| {
            (name == EXACT).then(|| "http://variable:1".to_owned())
        });
        assert_eq!(
            settings.unwrap().otlp.unwrap().endpoint,
            "http://flag:1/v1/traces"
        );
    }

    #[test]
    fn what_would_lose_traces_is_refused_with_the_remedy_and_without_the_value() {
        let cases: &[(Set<'_>, &str, &str)] = &[
            (&[(BASE, "s3cret:4318")], BASE, "http://HOST:PORT"),
            (
                &[(BASE, "authorization=Bearer s3cret")],
                BASE,
                "http://HOST:PORT",
            ),
            (&[(BASE, "ftp://s3cret")], BASE, "http://HOST:PORT"),
            (&[(BASE, "http://")], BASE, "http://HOST:PORT"),
            (&[(BASE, "http://s3cret:99999")], BASE, "http://HOST:PORT"),
            (&[(BASE, "http://s3cret:")], BASE, "http://HOST:PORT"),
            (
                &[(BASE, "http://u:s3cret@h:4318")],
                BASE,
                "OTEL_EXPORTER_OTLP_HEADERS",
            ),
            (
                &[(BASE, "http://h:4318/v1/traces")],
                BASE,
                "leave out `/v1/traces`",
            ),
            (
                &[(BASE, "http://h:4318/a/v1/traces/")],
                BASE,
                "leave out `/v1/traces`",
            ),
            (
                &[(BASE, "http://h:4317/v1/traces")],
                BASE,
                "leave out `/v1/traces`",
            ),
            (&[(BASE, "http://h:4318?x=s3cret")], BASE, EXACT),
            (&[(BASE, "http://h:4318/#s3cret")], BASE, "`#`"),
            (
                &[(BASE, "http://h:4317/a"), (PROTOCOL, "grpc")],
                BASE,
                "gRPC has no path",
            ),
            (&[(EXACT, "s3cret")], EXACT, "http://HOST:PORT"),
            (
                &[(BASE, "http://h"), (PROTOCOL, "http/json")],
                PROTOCOL,
                "`http/protobuf` or `grpc`",
            ),
            (
                &[(EXPORTER, "zipkin")],
                EXPORTER,
                "`otlp`, `console` or `none`",
            ),
            (
                &[("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd")],
                "OTLP_COMPRESSION",
                "`gzip`",
            ),
            (
                &[("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "10s")],
                "TRACES_TIMEOUT",
                "from 1 to",
            ),
            (
                &[("OTEL_BSP_SCHEDULE_DELAY", "0")],
                "SCHEDULE_DELAY",
                "from 1 to",
            ),
            (
                &[("OTEL_BSP_MAX_QUEUE_SIZE", "many")],
                "QUEUE_SIZE",
                "from 1 to",
            ),
            (
                &[("OTEL_ATTRIBUTE_COUNT_LIMIT", "-1")],
                "COUNT_LIMIT",
                "from 0 to",
            ),
            (
                &[("OTEL_EXPORTER_OTLP_HEADERS", "s3cret")],
                "HEADERS",
                "name=value",
            ),
            (
                &[("OTEL_EXPORTER_OTLP_HEADERS", "a b=s3cret")],
                "HEADERS",
                "name=value",
            ),
            (
                &[("OTEL_EXPORTER_OTLP_HEADERS", "a=s3cret%0A")],
                "HEADERS",
                "name=value",
            ),
        ];
        for (set, setting, remedy) in cases {
            let error = read(set).unwrap_err();
            let said = error.to_string();
            assert!(said.contains(setting) && said.contains(remedy), "{said}");
            assert!(!format!("{said}{error:?}").contains("s3cret"), "{said}");
            assert_eq!(said.lines().count(), 1);
        }
    }

    #[test]
    fn what_is_set_and_has_no_effect_is_noted_without_its_value() {
        let cases: &[(Set<'_>, &str)] = &[
            (&[("OTEL_SDK_DISABLED", "s3cret")], "OTEL_SDK_DISABLED"),
            (
                &[("OTEL_PROPAGATORS", "s3cret,tracecontext")],
                "OTEL_PROPAGATORS",
            ),
            (
                &[("OTEL_RESOURCE_ATTRIBUTES", "a=1,s3cret")],
                "OTEL_RESOURCE_ATTRIBUTES",
            ),
            (
                &[("OTEL_RESOURCE_ATTRIBUTES", "a=%FFs3cret")],
                "OTEL_RESOURCE_ATTRIBUTES",
            ),
            (&[(PROTOCOL, "grpc")], "no endpoint is"),
            (
                &[("OTEL_EXPORTER_OTLP_HEADERS", "key=s3cret")],
                "no endpoint is",
            ),
            (
                &[(BASE, "http://h:4317"), (PROTOCOL, "http/protobuf")],
                "PROTOCOL=grpc",
            ),
            (
                &[(BASE, "http://h:4318"), (PROTOCOL, "grpc")],
                "PROTOCOL=http/protobuf",
            ),
            (
                &[
                    (BASE, "http://h:4318"),
                    ("OTEL_EXPORTER_OTLP_CERTIFICATE", "s3cret"),
                ],
                "CERTIFICATE",
            ),
        ];
        for (set, part) in cases {
            let notes = read(set).unwrap().notes;
            let [note] = notes.as_slice() else {
                panic!("{set:?}: {notes:?}");
            };
            assert!(note.contains(part) && !note.contains("s3cret"), "{note}");
        }
        let some = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let line = without_effect([
            some("OTEL_LOG_LEVEL", "debug"),
            some("OTEL_EXPORTER_JAEGER_ENDPOINT", "s3cret"),
            some("OTEL_METRICS_EXPORTER", "otlp"),
            some("OTEL_LOGS_EXPORTER", "none"),
            some("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", ""),
            some(BASE, "http://h"),
            some("HOME", "/"),
        ]);
        let line = line.unwrap();
        assert!(
            line.contains("OTEL_EXPORTER_JAEGER_ENDPOINT, OTEL_LOG_LEVEL, OTEL_METRICS_EXPORTER ("),
            "{line}"
        );
        assert_eq!(without_effect([some(BASE, "http://h")]), None);
    }

    #[test]
    fn the_other_settings_are_read_the_more_specific_one_first() {
        let settings = read(&[
            (BASE, "https://h:4318"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=general"),
            (
                "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
                "Authorization=Basic%20YTpi==, x-a = b ",
            ),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1000"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2000"),
            ("OTEL_BSP_EXPORT_TIMEOUT", "1500"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca.pem"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "64"),
            ("OTEL_BSP_SCHEDULE_DELAY", "100"),
            ("OTEL_ATTRIBUTE_COUNT_LIMIT", "9"),
            ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "8"),
            ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "7"),
            ("OTEL_PROPAGATORS", "none"),
            (
                "OTEL_RESOURCE_ATTRIBUTES",
                "service.name=shop%2Cfront, a.b=50%,=ignored",
            ),
        ]);
        let settings = settings.unwrap();
        let otlp = settings.otlp.as_ref().unwrap();
        let headers: Vec<_> = otlp
            .headers
            .iter()
            .map(|(n, v)| (n.as_str(), v.as_bytes()))
            .collect();
        assert_eq!(
            headers,
            [("authorization", &b"Basic YTpi=="[..]), ("x-a", b"b")]
        );
        assert!(!format!("{settings:?}").contains("Basic"));
        assert_eq!(otlp.timeout, Duration::from_millis(1500));
        assert!(otlp.gzip);
        assert_eq!(otlp.certificate.as_deref(), Some("/ca.pem"));
        // Never more than the queue holds.
        assert_eq!((settings.queue_size, settings.batch_size), (64, 64));
        assert_eq!(settings.schedule_delay, Duration::from_millis(100));
        assert_eq!(
            (settings.attribute_count, settings.attribute_length),
            (8, Some(7))
        );
        assert!(!settings.propagate);
        assert!(settings.resource.is_empty() && settings.notes.len() == 1);

        let named = read(&[(
            "OTEL_RESOURCE_ATTRIBUTES",
            "service.name=shop%2Cfront, a.b=50%",
        )])
        .unwrap();
        assert_eq!(named.service_name().as_deref(), Some("shop,front"));
        assert_eq!(named.resource[1], ("a.b".to_owned(), "50%".to_owned()));
        for (names, expected) in [("b3,tracecontext", true), ("b3", false), ("baggage", false)] {
            assert_eq!(
                read(&[("OTEL_PROPAGATORS", names)]).unwrap().propagate,
                expected
            );
        }
    }
}
