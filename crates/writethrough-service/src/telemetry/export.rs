//! What stands between the tracing library's processor and its exporter, so that no span is lost in
//! silence: bounds that are counted, failures that are said once, and lines for the console.

use std::fmt::Debug;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use opentelemetry::trace::SpanId;
use opentelemetry::{Context, Value};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Span, SpanData, SpanExporter, SpanProcessor,
};
use tokio::runtime::Handle;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context as LayerContext, Layer};

use super::settings::TraceSettings;
use crate::causes::chain;

/// The spans of this process that have ended, by what became of them. A process has one tracer.
pub(crate) static SPANS: SpanCounts = SpanCounts {
    exported: AtomicU64::new(0),
    queue_full: AtomicU64::new(0),
    failed: AtomicU64::new(0),
    rejected: AtomicU64::new(0),
};

/// Counts of spans.
#[derive(Debug)]
pub(crate) struct SpanCounts {
    exported: AtomicU64,
    queue_full: AtomicU64,
    failed: AtomicU64,
    rejected: AtomicU64,
}

impl SpanCounts {
    /// Spans that were handed over.
    pub(crate) fn exported(&self) -> u64 {
        self.exported.load(Ordering::Relaxed)
    }

    /// Spans that were lost, by reason.
    pub(crate) fn dropped(&self) -> [(&'static str, u64); 3] {
        [
            ("queue_full", &self.queue_full),
            ("export_failed", &self.failed),
            ("rejected", &self.rejected),
        ]
        .map(|(reason, count)| (reason, count.load(Ordering::Relaxed)))
    }
}

/// A batch processor in front of `exporter`, with the bounds of `settings`.
pub(super) fn processor<E: SpanExporter + 'static>(
    settings: &TraceSettings,
    destination: String,
    failure: LastFailure,
    exporter: E,
) -> impl SpanProcessor + 'static {
    let waiting = Arc::new(AtomicUsize::new(0));
    let watched = Watched {
        exporter,
        destination,
        failure,
        waiting: waiting.clone(),
        failing: AtomicBool::new(false),
    };
    let batches = BatchConfigBuilder::default()
        .with_max_queue_size(settings.queue_size)
        .with_max_export_batch_size(settings.batch_size)
        .with_scheduled_delay(settings.schedule_delay)
        .build();
    Bounded {
        processor: BatchSpanProcessor::builder(watched)
            .with_batch_config(batches)
            .build(),
        waiting,
        queue_size: settings.queue_size,
        attribute_length: settings.attribute_length,
    }
}

/// Counts the spans that find the queue full, which the processor itself would drop unseen, and cuts
/// long attributes.
#[derive(Debug)]
struct Bounded {
    processor: BatchSpanProcessor,
    /// Spans that were queued and not yet handed to the exporter: at least those in the queue.
    waiting: Arc<AtomicUsize>,
    queue_size: usize,
    attribute_length: Option<usize>,
}

impl SpanProcessor for Bounded {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.processor.on_start(span, context);
    }

    fn on_end(&self, mut span: SpanData) {
        if !span.span_context.is_sampled() {
            return;
        }
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.queue_size {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            SPANS.queue_full.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if let Some(length) = self.attribute_length {
            for attribute in &mut span.attributes {
                if let Value::String(text) = &attribute.value
                    && let Some((end, _)) = text.as_str().char_indices().nth(length)
                {
                    attribute.value = text.as_str()[..end].to_owned().into();
                }
            }
        }
        self.processor.on_end(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.processor.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.processor.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.processor.set_resource(resource);
    }
}

/// Counts what an exporter did, and says when it begins to fail and when it works again.
#[derive(Debug)]
struct Watched<E> {
    exporter: E,
    destination: String,
    failure: LastFailure,
    waiting: Arc<AtomicUsize>,
    failing: AtomicBool,
}

impl<E: SpanExporter> SpanExporter for Watched<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.waiting.fetch_sub(spans, Ordering::Relaxed);
        let result = self.exporter.export(batch).await;
        let destination = &self.destination;
        match &result {
            Ok(()) => {
                SPANS.exported.fetch_add(spans as u64, Ordering::Relaxed);
                if self.failing.swap(false, Ordering::Relaxed) {
                    tracing::info!("traces are sent to {destination} again");
                }
            }
            Err(error) => {
                SPANS.failed.fetch_add(spans as u64, Ordering::Relaxed);
                if !self.failing.swap(true, Ordering::Relaxed) {
                    let reason = self.failure.take().unwrap_or_else(|| reason(error));
                    tracing::warn!(
                        "traces cannot be sent to {destination}: {reason}; until they can, spans are \
                         lost and counted in otel_dropped_spans_total"
                    );
                }
            }
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// The library's error without the names of its own parts.
fn reason(error: &OTelSdkError) -> String {
    let text = error.to_string();
    for part in ["export failed with gRPC code: ", "HTTP export failed with "] {
        if let Some((_, reason)) = text.split_once(part) {
            return reason.to_owned();
        }
    }
    text
}

/// Why the last request failed; the exporter says only that it did.
#[derive(Debug, Clone, Default)]
pub(super) struct LastFailure(Arc<Mutex<Option<String>>>);

impl LastFailure {
    fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn set(&self, reason: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }
}

/// An HTTP client that works on the runtime: the thread of the batch processor has none.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) client: Arc<dyn HttpClient>,
    pub(super) runtime: Handle,
    pub(super) failure: LastFailure,
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let client = self.client.clone();
        let exchange = self
            .runtime
            .spawn(async move { client.send_bytes(request).await });
        let result = match exchange.await {
            Ok(result) => result,
            Err(stopped) => Err(stopped.into()),
        };
        let reason = result.as_ref().err().map(|error| {
            let reason = chain(&**error);
            // It was reached, and its answer was no HTTP/1.
            let hint = if reason.contains("(SendRequest)") {
                " (if that port speaks gRPC, set OTEL_EXPORTER_OTLP_PROTOCOL=grpc)"
            } else {
                ""
            };
            reason + hint
        });
        self.failure.set(reason);
        result
    }
}

/// Writes each span as a line of JSON to standard output.
#[derive(Debug)]
pub(super) struct Console;

impl SpanExporter for Console {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let mut out = std::io::stdout().lock();
        for span in batch {
            let parent = span.parent_span_id;
            let attributes: serde_json::Map<String, serde_json::Value> = span
                .attributes
                .iter()
                .map(|attribute| {
                    let value = attribute.value.as_str().into_owned();
                    (attribute.key.as_str().to_owned(), value.into())
                })
                .collect();
            let duration = span.end_time.duration_since(span.start_time);
            let line = serde_json::json!({
                "name": span.name,
                "kind": format!("{:?}", span.span_kind).to_lowercase(),
                "trace_id": span.span_context.trace_id().to_string(),
                "span_id": span.span_context.span_id().to_string(),
                "parent_span_id": (parent != SpanId::INVALID).then(|| parent.to_string()),
                "start": time::OffsetDateTime::from(span.start_time)
                    .format(&time::format_description::well_known::Rfc3339)
                    .unwrap_or_default(),
                "duration_ms": duration.unwrap_or_default().as_secs_f64() * 1000.0,
                "attributes": attributes,
            });
            writeln!(out, "{line}").map_err(|error| {
                OTelSdkError::InternalFailure(format!("standard output: {error}"))
            })?;
        }
        Ok(())
    }
}

/// Counts and says what a receiver took only in part, which the library tells nobody but its own log.
#[derive(Debug, Default)]
pub(super) struct Rejections {
    said: AtomicBool,
}

impl Rejections {
    /// The end of the names of the library's events about it.
    const EVENT: &str = ".PartialSuccess";
}

/// Whether an event is one of the tracing library's own, which say in their words what is said here.
pub(super) fn of_the_library(target: &str) -> bool {
    target.starts_with("opentelemetry")
}

impl<S: Subscriber> Layer<S> for Rejections {
    fn on_event(&self, event: &Event<'_>, _: LayerContext<'_, S>) {
        #[derive(Default)]
        struct Partial {
            spans: u64,
            message: String,
        }
        impl Visit for Partial {
            fn record_i64(&mut self, field: &Field, value: i64) {
                if field.name() == "rejected_spans" {
                    self.spans = u64::try_from(value).unwrap_or_default();
                }
            }
            fn record_str(&mut self, field: &Field, value: &str) {
                if field.name() == "error_message" {
                    self.message = value.chars().take(200).collect();
                }
            }
            fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}
        }
        let metadata = event.metadata();
        if !(of_the_library(metadata.target()) && metadata.name().ends_with(Self::EVENT)) {
            return;
        }
        let mut partial = Partial::default();
        event.record(&mut partial);
        SPANS.rejected.fetch_add(partial.spans, Ordering::Relaxed);
        if !self.said.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "the receiver of traces refused {} spans: {:?}; more are only counted in \
                 otel_dropped_spans_total",
                partial.spans,
                partial.message
            );
        }
    }
}
