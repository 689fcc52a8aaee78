//! A receiver for the nodes' traces, and a trace as a tree in a terminal: the lab's stand-in for a
//! trace viewer.
//!
//! What arrives is kept undecoded, up to a bound, and only decoded when somebody asks.

use std::collections::VecDeque;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tokio::task::JoinHandle;
use writethrough_testbed::until;

/// How much is kept.
const KEPT_BYTES: usize = 32 << 20;
/// The largest batch.
const BATCH_BYTES: usize = 16 << 20;
/// How long `show` waits for a trace that is still on its way.
const ARRIVAL_BOUND: Duration = Duration::from_secs(5);
/// A trace is whole when its server span is there, which is sent last.
const SERVER: i32 = 2;
/// How wide the bars are, in columns.
const BAR: usize = 40;

type Batches = Arc<Mutex<Kept>>;

#[derive(Default)]
struct Kept {
    batches: VecDeque<Bytes>,
    bytes: usize,
}

/// The receiver. Dropping it ends it.
pub(crate) struct Traces {
    kept: Batches,
    address: SocketAddr,
    serving: JoinHandle<()>,
}

impl Traces {
    /// Starts to collect on a free port of 127.0.0.1.
    pub(crate) async fn collect() -> anyhow::Result<Self> {
        let kept = Batches::default();
        let router = Router::new()
            .route("/v1/traces", post(keep))
            .layer(DefaultBodyLimit::max(BATCH_BYTES))
            .with_state(kept.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .context("no port for traces")?;
        let address = listener.local_addr()?;
        let serving = tokio::spawn(async move {
            // It fails only when the listener does, and then there are no traces.
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self {
            kept,
            address,
            serving,
        })
    }

    /// Where nodes send traces.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The trace with this id, or the last one of a request for items, as a tree.
    ///
    /// # Errors
    ///
    /// The id is none, or no such trace has arrived.
    pub(crate) async fn show(&self, id: Option<&str>) -> anyhow::Result<String> {
        let wanted = id
            .map(|id| {
                u128::from_str_radix(id, 16)
                    .ok()
                    .filter(|_| id.len() == 32)
                    .with_context(|| {
                        format!("`{id}` is not a trace id: use the 32 digits of `x-trace-id`")
                    })
            })
            .transpose()?;
        // A trace that has just been made is on its way for a moment.
        if wanted.is_none() {
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
        let found = until("", ARRIVAL_BOUND, || {
            let found = find(&self.batches(), wanted);
            async move { found }
        })
        .await;
        match found {
            Ok(spans) => Ok(tree(&spans)),
            Err(_) => bail!(
                "there is no such trace: old ones are dropped, and /livez, /readyz and /metrics make \
                 none"
            ),
        }
    }

    fn batches(&self) -> Vec<Bytes> {
        lock(&self.kept).batches.iter().cloned().collect()
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn keep(State(kept): State<Batches>, batch: Bytes) {
    let mut kept = lock(&kept);
    kept.bytes += batch.len();
    kept.batches.push_back(batch);
    while kept.bytes > KEPT_BYTES {
        let Some(oldest) = kept.batches.pop_front() else {
            break;
        };
        kept.bytes -= oldest.len();
    }
}

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The spans of a trace, if its server span is there; the newest batches are looked at first.
fn find(batches: &[Bytes], wanted: Option<u128>) -> Option<Vec<Span>> {
    let id = match wanted {
        Some(id) => id.to_be_bytes().to_vec(),
        None => {
            let mut newest = batches.iter().rev().flat_map(spans);
            let of_items = |span: &Span| is_root(span) && span.name.contains("/items");
            newest.find(of_items).map(|span| span.trace_id)?
        }
    };
    let of_trace: Vec<Span> = batches
        .iter()
        .flat_map(spans)
        .filter(|span| span.trace_id == id)
        .collect();
    of_trace.iter().any(is_root).then_some(of_trace)
}

/// The spans of a batch, the newest first.
fn spans(batch: &Bytes) -> Vec<Span> {
    let Ok(request) = ExportTraceServiceRequest::decode(batch.clone()) else {
        return Vec::new();
    };
    let mut spans: Vec<Span> = request
        .resource_spans
        .into_iter()
        .flat_map(|resource| resource.scope_spans)
        .flat_map(|scope| scope.spans)
        .collect();
    spans.sort_by_key(|span| std::cmp::Reverse(span.start_time_unix_nano));
    spans
}

fn is_root(span: &Span) -> bool {
    span.kind == SERVER
}

/// The attributes worth a look, in this order.
const SHOWN: [&str; 5] = [
    "http.response.status_code",
    "db.operation.name",
    "cache.hit",
    "cache.key",
    "error.type",
];

/// Draws the server span and its children, one line each, with bars on one scale.
fn tree(spans: &[Span]) -> String {
    let mut text = String::new();
    let Some(root) = spans.iter().find(|span| is_root(span)) else {
        return text;
    };
    let mut children: Vec<&Span> = spans
        .iter()
        .filter(|span| span.parent_span_id == root.span_id)
        .collect();
    children.sort_by_key(|span| (span.start_time_unix_nano, span.end_time_unix_nano));
    let id: String = root.trace_id.iter().fold(String::new(), |mut id, byte| {
        let _ = write!(id, "{byte:02x}");
        id
    });
    let _ = writeln!(text, "trace {id}");
    let names = children.iter().map(|span| span.name.len() + 3);
    let width = names.chain([root.name.len()]).max().unwrap_or(0);
    draw(&mut text, root.name.clone(), width, root, root);
    for (index, span) in children.iter().enumerate() {
        let branch = if index + 1 == children.len() {
            "└─ "
        } else {
            "├─ "
        };
        draw(
            &mut text,
            format!("{branch}{}", span.name),
            width,
            span,
            root,
        );
    }
    text
}

fn draw(text: &mut String, name: String, width: usize, span: &Span, root: &Span) {
    let ms = span
        .end_time_unix_nano
        .saturating_sub(span.start_time_unix_nano) as f64
        / 1e6;
    let details: Vec<String> = SHOWN
        .iter()
        .filter_map(|shown| span.attributes.iter().find(|found| found.key == *shown))
        .map(|found| format!("{}={}", found.key, value(found)))
        .collect();
    let line = format!(
        "{name:<width$}  {ms:>9.3} ms  {}  {}",
        bar(span, root),
        details.join(" ")
    );
    let _ = writeln!(text, "{}", line.trim_end());
}

/// Where in the root's time the span lies.
fn bar(span: &Span, root: &Span) -> String {
    let start = root.start_time_unix_nano;
    let whole = root.end_time_unix_nano.saturating_sub(start).max(1) as f64;
    let column = |at: u64| {
        let share = at.saturating_sub(start) as f64 / whole;
        ((share * BAR as f64) as usize).min(BAR)
    };
    let from = column(span.start_time_unix_nano).min(BAR - 1);
    let to = column(span.end_time_unix_nano).max(from + 1);
    format!(
        "{}{}{}",
        " ".repeat(from),
        "█".repeat(to - from),
        " ".repeat(BAR - to)
    )
}

fn value(attribute: &KeyValue) -> String {
    match attribute.value.as_ref().and_then(|any| any.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::BoolValue(value)) => value.to_string(),
        Some(Value::IntValue(value)) => value.to_string(),
        Some(Value::DoubleValue(value)) => value.to_string(),
        _ => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans};

    fn span(id: u8, parent: u8, name: &str, from_us: u64, to_us: u64) -> Span {
        Span {
            trace_id: 7u128.to_be_bytes().to_vec(),
            span_id: vec![id; 8],
            parent_span_id: vec![parent; 8],
            name: name.to_owned(),
            kind: if id == 1 { SERVER } else { 3 },
            start_time_unix_nano: from_us * 1000,
            end_time_unix_nano: to_us * 1000,
            ..Span::default()
        }
    }

    fn batch(spans: Vec<Span>) -> Bytes {
        let scope_spans = vec![ScopeSpans {
            spans,
            ..ScopeSpans::default()
        }];
        let request = ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                scope_spans,
                ..ResourceSpans::default()
            }],
        };
        request.encode_to_vec().into()
    }

    #[test]
    fn a_trace_is_shown_when_its_server_span_is_there_children_in_their_order() {
        let children = batch(vec![
            span(3, 1, "postgres_update", 400, 900),
            span(2, 1, "redis_intent", 100, 300),
        ]);
        assert!(find(std::slice::from_ref(&children), Some(7)).is_none());
        let batches = [
            children,
            batch(vec![span(1, 9, "PUT /items/{id}", 0, 1000)]),
        ];
        assert!(find(&batches, Some(8)).is_none());
        for wanted in [Some(7), None] {
            let text = tree(&find(&batches, wanted).unwrap());
            let lines: Vec<_> = text.lines().collect();
            assert_eq!(lines.len(), 4, "{text}");
            assert_eq!(lines[0], "trace 00000000000000000000000000000007");
            assert!(lines[1].starts_with("PUT /items/{id}"), "{text}");
            assert!(lines[1].contains(&"█".repeat(BAR)), "{text}");
            assert!(lines[2].starts_with("├─ redis_intent"), "{text}");
            assert!(lines[2].contains("0.200 ms"), "{text}");
            assert!(lines[3].starts_with("└─ postgres_update"), "{text}");
        }
    }

    #[test]
    fn only_so_much_is_kept() {
        let kept = Batches::default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        for _ in 0..5 {
            let batch = Bytes::from(vec![0; KEPT_BYTES / 3]);
            runtime.block_on(keep(State(kept.clone()), batch));
        }
        assert_eq!(lock(&kept).batches.len(), 3);
        assert!(lock(&kept).bytes <= KEPT_BYTES);
    }
}
