//! The trace that a request belongs to: `traceparent` and `tracestate` in, a sampling decision,
//! `x-trace-id` out.

use std::fmt;
use std::str::FromStr;

use axum::http::HeaderMap;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};

use crate::config::Sampling;

/// A caller's trace, as W3C's `traceparent` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    trace: u128,
    parent: u64,
    sampled: bool,
}

impl TraceParent {
    /// Reads `traceparent`; `None` when it is missing or not valid, which means a new trace.
    #[must_use]
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all("traceparent").iter();
        let value = values.next()?.to_str().ok()?;
        if values.next().is_some() {
            None
        } else {
            Self::parse(value)
        }
    }

    fn parse(value: &str) -> Option<Self> {
        let mut parts = value.trim().split('-');
        let version = hex::<2>(parts.next()?)?;
        let trace = hex::<32>(parts.next()?)?;
        let parent = u64::try_from(hex::<16>(parts.next()?)?).ok()?;
        let flags = hex::<2>(parts.next()?)?;
        // Later versions may have more parts; version 00 has none, and ff is forbidden.
        let valid = version != 0xff && (version > 0 || parts.next().is_none());
        (valid && trace != 0 && parent != 0).then_some(Self {
            trace,
            parent,
            sampled: flags & 1 == 1,
        })
    }
}

/// Reads exactly `DIGITS` lower-case hexadecimal digits.
fn hex<const DIGITS: usize>(text: &str) -> Option<u128> {
    let valid = text.len() == DIGITS
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    if valid {
        u128::from_str_radix(text, 16).ok()
    } else {
        None
    }
}

/// The trace of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestTrace {
    id: u128,
    parent: Option<TraceParent>,
    sampled: bool,
}

impl RequestTrace {
    /// Decides whether the request is traced, before any span is made.
    #[must_use]
    pub fn new(parent: Option<TraceParent>, sampling: Option<Sampling>) -> Self {
        let id = parent.map_or_else(|| fastrand::u128(1..), |parent| parent.trace);
        let sampled = match (sampling, parent) {
            (None, _) => false,
            (Some(sampling), Some(parent)) if sampling.parent_based => parent.sampled,
            // The same for all services that use the lower 63 bits, so that a trace is whole.
            (Some(sampling), _) => {
                sampling.ratio >= 1.0
                    || ((id as u64 >> 1) as f64) < sampling.ratio * (1_u64 << 63) as f64
            }
        };
        Self {
            id,
            parent,
            sampled,
        }
    }

    /// Whether the request is traced.
    #[must_use]
    pub fn sampled(&self) -> bool {
        self.sampled
    }

    /// The caller's context with its `tracestate`, for the server span to continue; `None` when the
    /// trace begins here.
    #[must_use]
    pub fn remote_context(&self, headers: &HeaderMap) -> Option<opentelemetry::Context> {
        let parent = self.parent?;
        let state: Vec<&str> = headers
            .get_all("tracestate")
            .iter()
            .filter_map(|value| value.to_str().ok())
            .collect();
        let context = SpanContext::new(
            TraceId::from(parent.trace),
            SpanId::from(parent.parent),
            TraceFlags::SAMPLED,
            true,
            // One that is not valid is dropped, as its specification says.
            TraceState::from_str(&state.join(",")).unwrap_or_default(),
        );
        Some(opentelemetry::Context::new().with_remote_span_context(context))
    }

    /// Takes over the id that the tracer chose for a new trace.
    pub fn adopt(&mut self, id: TraceId) {
        if id != TraceId::INVALID {
            self.id = u128::from_be_bytes(id.to_bytes());
        }
    }
}

impl fmt::Display for RequestTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn headers(traceparent: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", traceparent.parse().unwrap());
        headers
    }

    #[test]
    fn only_a_valid_traceparent_is_continued() {
        let parent = TraceParent::parse(VALID).unwrap();
        assert!(parent.sampled);
        for wrong in [
            "",
            "00",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(TraceParent::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_callers_decision_counts_if_it_is_asked_for() {
        let always = Some(Sampling {
            ratio: 1.0,
            parent_based: true,
        });
        let never = Some(Sampling {
            ratio: 0.0,
            parent_based: true,
        });
        let deaf = Some(Sampling {
            ratio: 1.0,
            parent_based: false,
        });
        let unsampled = VALID.replace("-01", "-00");
        let sampled = |value: &str, sampling| {
            RequestTrace::new(TraceParent::parse(value), sampling).sampled()
        };
        assert!(sampled(VALID, always) && sampled(VALID, never) && sampled(&unsampled, deaf));
        assert!(!sampled(&unsampled, always) && !sampled(VALID, None));
        assert!(RequestTrace::new(None, always).sampled());
        assert!(!RequestTrace::new(None, never).sampled());
    }

    #[test]
    fn the_id_told_to_the_client_is_the_callers() {
        let parent = TraceParent::from_headers(&headers(VALID));
        let trace = RequestTrace::new(parent, None);
        assert_eq!(trace.to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_ne!(RequestTrace::new(None, None).to_string(), "0".repeat(32));
    }

    #[test]
    fn the_callers_state_is_handed_on_unless_it_is_not_valid() {
        let state = |values: &[&str]| {
            let mut headers = headers(VALID);
            for value in values {
                headers.append("tracestate", value.parse().unwrap());
            }
            let trace = RequestTrace::new(TraceParent::from_headers(&headers), None);
            let context = trace.remote_context(&headers).unwrap();
            context.span().span_context().trace_state().header()
        };
        assert_eq!(state(&[]), "");
        assert_eq!(
            state(&["rojo=1,congo=t61", "last=x"]),
            "rojo=1,congo=t61,last=x"
        );
        assert_eq!(state(&["no state"]), "");
    }
}
