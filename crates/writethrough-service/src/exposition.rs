//! The forms in which `/metrics` is sent: which one a scraper asks for, and how the encoder's
//! OpenMetrics text becomes Prometheus' older text.

use std::io::Write;

use axum::http::header::{ACCEPT, ACCEPT_ENCODING, AsHeaderName};
use axum::http::{HeaderMap, HeaderValue};
use flate2::Compression;
use flate2::write::GzEncoder;

/// A text format of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' text format 0.0.4: what everything reads.
    Prometheus,
    /// OpenMetrics 1.0, the only one with exemplars.
    OpenMetrics,
}

impl Format {
    /// The format that the request prefers; [`Format::Prometheus`] when it does not say, or asks for
    /// something that there is not.
    #[must_use]
    pub fn preferred(headers: &HeaderMap) -> Self {
        let ranges = preferences(headers, ACCEPT);
        let rank = |format: Self| {
            let fits = ranges.iter().enumerate().filter_map(|(place, range)| {
                let precision = format.precision(range)?;
                // The most precise range decides about a format, not the one of the highest weight.
                Some((precision, range.weight, std::cmp::Reverse(place)))
            });
            let (precision, weight, place) = fits.max()?;
            (weight > 0).then_some((weight, precision, place))
        };
        if rank(Self::OpenMetrics) > rank(Self::Prometheus) {
            Self::OpenMetrics
        } else {
            Self::Prometheus
        }
    }

    /// How precisely a media range names this format; `None` if it names another one.
    fn precision(self, range: &Preference) -> Option<u8> {
        let (kind, any_of_kind, versions) = match self {
            Self::Prometheus => ("text/plain", "text/*", &["0.0.4"][..]),
            // The present text is valid by the draft too.
            Self::OpenMetrics => (
                "application/openmetrics-text",
                "application/*",
                &["1.0.0", "0.0.1"][..],
            ),
        };
        match range.name.as_str() {
            "*/*" => Some(0),
            name if name == any_of_kind => Some(1),
            name if name == kind => match &range.version {
                None => Some(2),
                Some(version) => versions.contains(&version.as_str()).then_some(3),
            },
            _ => None,
        }
    }

    /// The media type to declare.
    #[must_use]
    pub fn content_type(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        })
    }
}

/// Whether the request prefers an answer packed with gzip.
#[must_use]
pub fn wants_gzip(headers: &HeaderMap) -> bool {
    let codings = preferences(headers, ACCEPT_ENCODING);
    let weight = |names: &[&str]| {
        let named = codings
            .iter()
            .find(|coding| names.contains(&&*coding.name))?;
        Some(named.weight)
    };
    let gzip = weight(&["gzip", "x-gzip"]).or_else(|| weight(&["*"]));
    gzip.is_some_and(|gzip| gzip > 0 && gzip >= weight(&["identity"]).unwrap_or(0))
}

/// The text packed with gzip.
///
/// # Errors
///
/// None that can be met in practice: the result is written to memory.
pub fn gzip(text: &str) -> std::io::Result<Vec<u8>> {
    let mut packed = GzEncoder::new(Vec::with_capacity(text.len() / 8), Compression::fast());
    packed.write_all(text.as_bytes())?;
    packed.finish()
}

/// One element of a header that lists what a client takes.
struct Preference {
    name: String,
    version: Option<String>,
    /// In thousandths, as RFC 9110 has it.
    weight: u16,
}

/// The elements of all headers of this name; those whose weight is not valid are left out.
fn preferences(headers: &HeaderMap, name: impl AsHeaderName) -> Vec<Preference> {
    let values = headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let elements = values.flat_map(|value| value.split(','));
    elements
        .filter_map(|element| {
            let mut parts = element.split(';').map(str::trim);
            let mut preference = Preference {
                name: parts.next()?.to_ascii_lowercase(),
                version: None,
                weight: 1000,
            };
            for part in parts {
                let (key, value) = part.split_once('=').unwrap_or((part, ""));
                let value = value.trim().trim_matches('"');
                match key.trim().to_ascii_lowercase().as_str() {
                    "q" => {
                        let weight: f32 = value.parse().ok()?;
                        preference.weight = (0.0..=1.0)
                            .contains(&weight)
                            .then_some((weight * 1000.0).round() as u16)?;
                    }
                    "version" => preference.version = Some(value.to_owned()),
                    _ => {}
                }
            }
            Some(preference)
        })
        .collect()
}

/// Turns OpenMetrics text into Prometheus' text format 0.0.4: families have the names of their samples,
/// and units, exemplars and the mark of the end do not exist.
#[must_use]
pub fn prometheus_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    // `HELP` comes before `TYPE`, which decides about the family's name.
    let mut help = None;
    for line in open_metrics.lines() {
        let Some(comment) = line.strip_prefix("# ") else {
            text.push_str(without_exemplar(line));
            text.push('\n');
            continue;
        };
        let mut words = comment.splitn(3, ' ');
        let (word, family, rest) = (words.next(), words.next(), words.next());
        match (word, family, rest) {
            (Some("HELP"), Some(family), rest) => help = Some((family, rest.unwrap_or_default())),
            (Some("TYPE"), Some(family), Some(kind)) => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", kind),
                    "info" => ("_info", "gauge"),
                    "stateset" => ("", "gauge"),
                    "unknown" => ("", "untyped"),
                    kind => ("", kind),
                };
                if let Some((of, said)) = help.take()
                    && of == family
                {
                    // Quotation marks are escaped in OpenMetrics only.
                    let said = said.replace("\\\"", "\"");
                    text.push_str(&format!("# HELP {family}{suffix} {said}\n"));
                }
                text.push_str(&format!("# TYPE {family}{suffix} {kind}\n"));
            }
            _ => {}
        }
    }
    text
}

/// A sample without the exemplar that may follow its value.
fn without_exemplar(sample: &str) -> &str {
    let mut quoted = false;
    let mut escaped = false;
    for (place, byte) in sample.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'#' if !quoted => return sample[..place].trim_end(),
            _ => {}
        }
    }
    sample
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use prometheus_client::encoding::text::encode;
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::metrics::exemplar::HistogramWithExemplars;
    use prometheus_client::metrics::family::Family;
    use prometheus_client::metrics::gauge::Gauge;
    use prometheus_client::metrics::info::Info;
    use prometheus_client::registry::{Registry, Unit};

    use super::*;

    fn headers(name: axum::http::HeaderName, values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(&name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn the_format_is_the_one_that_the_request_prefers_and_text_when_it_does_not_say() {
        const PROMETHEUS_2: &str = "application/openmetrics-text;version=1.0.0,\
            application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        const PROMETHEUS_3: &str = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
            application/openmetrics-text;version=0.0.1;q=0.4,\
            text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        const PROMETHEUS_3_TEXT_FIRST: &str = "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,\
            text/plain;version=0.0.4;q=0.4,application/openmetrics-text;version=1.0.0;q=0.3,*/*;q=0.1";
        for open_metrics in [
            "application/openmetrics-text",
            "Application/OpenMetrics-Text; Version=\"1.0.0\"; charset=utf-8",
            "application/openmetrics-text;version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            PROMETHEUS_2,
            PROMETHEUS_3,
            "text/plain;q=0.3, application/openmetrics-text;q=0.300, */*;q=0.2, \
             application/openmetrics-text;q=0.31",
            "application/openmetrics-text, */*",
            "application/openmetrics-text, text/plain",
            "text/plain;q=0, */*",
            "application/*",
        ] {
            let found = Format::preferred(&headers(ACCEPT, &[open_metrics]));
            assert_eq!(found, Format::OpenMetrics, "{open_metrics}");
        }
        for text in [
            "",
            "*/*",
            "text/*",
            "text/plain",
            "text/plain; version=0.0.4",
            "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
            "application/json",
            "application/openmetrics-text;q=0",
            "application/openmetrics-text;q=0.1, text/plain;q=0.2",
            "text/plain, application/openmetrics-text",
            "application/openmetrics-text;version=2.0.0",
            "application/openmetrics-text;q=many",
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited",
            PROMETHEUS_3_TEXT_FIRST,
        ] {
            let found = Format::preferred(&headers(ACCEPT, &[text]));
            assert_eq!(found, Format::Prometheus, "{text}");
        }
        assert_eq!(
            Format::preferred(&HeaderMap::new()),
            Format::Prometheus,
            "no header"
        );
        let two = headers(
            ACCEPT,
            &["text/plain;q=0.1", "application/openmetrics-text"],
        );
        assert_eq!(Format::preferred(&two), Format::OpenMetrics);
    }

    #[test]
    fn an_answer_is_packed_only_where_that_is_preferred() {
        for (value, expected) in [
            ("gzip", true),
            ("x-gzip", true),
            ("deflate, gzip;q=0.5", true),
            ("identity;q=0.5, gzip", true),
            ("*", true),
            ("gzip;q=0", false),
            ("gzip;q=0, *", false),
            ("gzip;q=0.1, identity", false),
            ("br, deflate", false),
            ("identity", false),
            ("", false),
        ] {
            let headers = headers(ACCEPT_ENCODING, &[value]);
            assert_eq!(wants_gzip(&headers), expected, "{value}");
        }
        assert!(!wants_gzip(&HeaderMap::new()));

        let mut text = String::new();
        let packed = gzip("some text").unwrap();
        flate2::read::GzDecoder::new(packed.as_slice())
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "some text");
    }

    #[test]
    fn each_kind_of_metric_becomes_text_of_the_older_format() {
        let mut registry = Registry::default();
        let counted = Family::<Vec<(String, String)>, Counter>::default();
        registry.register("counted", "What \\\"counts\\\"", counted.clone());
        let label = "a \"b\" # {c=\"d\"} \\ \n e".to_owned();
        counted
            .get_or_create(&vec![("label".to_owned(), label)])
            .inc();
        let gauge = Gauge::<i64>::default();
        registry.register("now", "Now", gauge.clone());
        gauge.set(-3);
        let times = HistogramWithExemplars::<Vec<(String, String)>>::new([0.5, 1.0].into_iter());
        registry.register_with_unit("time", "Time", Unit::Seconds, times.clone());
        let trace = vec![("trace_id".to_owned(), "0123".to_owned())];
        times.observe(0.25, Some(trace), None);
        times.observe(7.0, None, None);
        registry.register("build", "Build", Info::new([("version", "1")]));
        let mut open_metrics = String::new();
        encode(&mut open_metrics, &registry).unwrap();
        assert!(open_metrics.contains("trace_id"), "{open_metrics}");

        assert_eq!(
            prometheus_text(&open_metrics),
            r##"# HELP counted_total What "counts".
# TYPE counted_total counter
counted_total{label="a \"b\" # {c=\"d\"} \\ \n e"} 1
# HELP now Now.
# TYPE now gauge
now -3
# HELP time_seconds Time.
# TYPE time_seconds histogram
time_seconds_sum 7.25
time_seconds_count 2
time_seconds_bucket{le="0.5"} 1
time_seconds_bucket{le="1.0"} 1
time_seconds_bucket{le="+Inf"} 2
# HELP build_info Build.
# TYPE build_info gauge
build_info{version="1"} 1
"##
        );
    }
}
