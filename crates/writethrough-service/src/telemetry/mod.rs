//! Logs and traces of the process.
//!
//! Logs go to standard error. Traces go to an OTLP receiver or to standard output, and only if one of
//! them is configured; without them no span is ever made. Request spans never reach the log.

use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderMap;
use hyper_rustls::HttpsConnectorBuilder;
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_http::HttpClient;
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_otlp::tonic_types::metadata::MetadataMap;
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig};
use opentelemetry_otlp::{Compression, WithExportConfig, WithHttpConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, TracerProviderBuilder};
use tokio::runtime::Handle;
use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

use crate::config::Config;
use crate::telemetry::export::{Client, Console, LastFailure, Rejections};
use crate::telemetry::settings::{Otlp, Protocol, TraceSettings};

pub(crate) mod export;
pub(crate) mod log;
pub mod settings;

/// The setting with the certificate authorities of the receiver.
const CERTIFICATE: &str = "OTEL_EXPORTER_OTLP_CERTIFICATE";
/// How long the last export may take at shutdown.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);

/// The process's telemetry; traces end with [`Telemetry::shutdown`], the log when this is dropped.
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
    _log: WorkerGuard,
}

/// Telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The exporter refuses its configuration.
    #[error("traces cannot be exported: {0}")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
    /// The receiver cannot be spoken to safely.
    #[error("traces cannot be exported: {0}")]
    Tls(String),
    /// The process has a subscriber already.
    #[error("telemetry is set up already: {0}")]
    Subscriber(#[from] TryInitError),
}

impl Telemetry {
    /// Sets up the process's log and, if an endpoint is configured, its traces. Once per process, in
    /// the context of a runtime that lives as long as the result.
    ///
    /// # Errors
    ///
    /// [`TelemetryError`].
    pub fn start(config: &Config) -> Result<Self, TelemetryError> {
        let provider = if config.traces.enabled() {
            Some(provider(config)?)
        } else {
            None
        };
        // Sampled requests are the only ones that have spans, so everything that arrives is kept.
        let traces = provider.as_ref().map(|provider| {
            tracing_opentelemetry::layer()
                .with_tracer(provider.tracer("writethrough"))
                .with_location(false)
                .with_threads(false)
                .with_level(false)
                .with_target(false)
                .with_tracked_inactivity(false)
                .with_filter(filter_fn(|metadata| {
                    metadata.is_span() && metadata.target() == "writethrough"
                }))
        });
        let rejections = provider.as_ref().map(|_| Rejections::default());
        let (log, guard) = log::layer(config);
        tracing_subscriber::registry()
            .with(traces)
            .with(rejections)
            .with(log)
            .try_init()?;
        log::take_panics();
        tokio::spawn(log::tell_losses());
        if let Some(otlp) = &config.traces.otlp {
            tracing::info!("traces go to {} over {}", otlp.shown(), otlp.protocol);
        }
        for note in &config.traces.notes {
            tracing::warn!("{note}");
        }
        let variables = std::env::vars_os().map(|(name, value)| {
            let text = |part: std::ffi::OsString| part.to_string_lossy().into_owned();
            (text(name), text(value))
        });
        if let Some(line) = settings::without_effect(variables) {
            tracing::warn!("{line}");
        }
        Ok(Self {
            provider,
            _log: guard,
        })
    }

    /// Sends what has not been sent yet, for a few seconds at most.
    pub async fn shutdown(&mut self) {
        let Some(provider) = self.provider.take() else {
            return;
        };
        let flushed =
            tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(FLUSH_TIMEOUT));
        match tokio::time::timeout(FLUSH_TIMEOUT * 2, flushed).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::warn!("the last traces were not sent: {error}"),
            Ok(Err(_)) | Err(_) => tracing::warn!("the last traces were not sent in time"),
        }
    }
}

fn provider(config: &Config) -> Result<SdkTracerProvider, TelemetryError> {
    let settings = &config.traces;
    let mut builder = SdkTracerProvider::builder()
        .with_resource(resource(config))
        // Whether a request is traced was decided before; a second decision would differ.
        .with_sampler(Sampler::AlwaysOn)
        .with_max_attributes_per_span(settings.attribute_count);
    if settings.console {
        let destination = "standard output".to_owned();
        let failure = LastFailure::default();
        builder =
            builder.with_span_processor(export::processor(settings, destination, failure, Console));
    }
    if let Some(otlp) = &settings.otlp {
        builder = with_receiver(builder, settings, otlp)?;
    }
    Ok(builder.build())
}

fn with_receiver(
    builder: TracerProviderBuilder,
    settings: &TraceSettings,
    otlp: &Otlp,
) -> Result<TracerProviderBuilder, TelemetryError> {
    let failure = LastFailure::default();
    let certificate = otlp.certificate.as_deref();
    let headers = otlp.headers.iter().cloned();
    let exporter = match otlp.protocol {
        Protocol::Http => {
            let client: Arc<dyn HttpClient> = if otlp.endpoint.starts_with("https://") {
                let tls = crate::tls::client_config(certificate, CERTIFICATE)
                    .map_err(TelemetryError::Tls)?;
                let connector = HttpsConnectorBuilder::new()
                    .with_tls_config(tls)
                    .https_only()
                    .enable_http1()
                    .build();
                Arc::new(HyperClient::new(connector, otlp.timeout, None))
            } else {
                Arc::new(HyperClient::with_default_connector(otlp.timeout, None))
            };
            let client = Client {
                client,
                runtime: Handle::current(),
                failure: failure.clone(),
            };
            let headers = headers.filter_map(|(name, value)| {
                Some((name.to_string(), value.to_str().ok()?.to_owned()))
            });
            let exporter = opentelemetry_otlp::SpanExporter::builder()
                .with_http()
                .with_http_client(client)
                .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
                .with_endpoint(&otlp.endpoint)
                .with_headers(headers.collect())
                .with_timeout(otlp.timeout);
            if otlp.gzip {
                exporter.with_compression(Compression::Gzip).build()?
            } else {
                exporter.build()?
            }
        }
        Protocol::Grpc => {
            let mut exporter = opentelemetry_otlp::SpanExporter::builder()
                .with_tonic()
                .with_endpoint(&otlp.endpoint)
                .with_metadata(MetadataMap::from_headers(HeaderMap::from_iter(headers)))
                .with_timeout(otlp.timeout);
            if otlp.endpoint.starts_with("https://") {
                // Says what is wrong with the file, which the exporter would not.
                crate::tls::client_config(certificate, CERTIFICATE).map_err(TelemetryError::Tls)?;
                let tls = match certificate.map(std::fs::read).transpose() {
                    Ok(Some(pem)) => {
                        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem))
                    }
                    Ok(None) => ClientTlsConfig::new().with_native_roots(),
                    Err(error) => return Err(TelemetryError::Tls(error.to_string())),
                };
                exporter = exporter.with_tls_config(tls);
            }
            if otlp.gzip {
                exporter = exporter.with_compression(Compression::Gzip);
            }
            exporter.build()?
        }
    };
    let destination = format!("{} over {}", otlp.shown(), otlp.protocol);
    let processor = export::processor(settings, destination, failure, exporter);
    Ok(builder.with_span_processor(processor))
}

/// What all spans say about this process. What the operator sets wins over what the program knows.
fn resource(config: &Config) -> Resource {
    let given = config
        .traces
        .resource
        .iter()
        .map(|(name, value)| KeyValue::new(name.clone(), value.clone()));
    let instance = uuid::Uuid::new_v4().to_string();
    Resource::builder_empty()
        .with_detector(Box::new(
            opentelemetry_sdk::resource::TelemetryResourceDetector,
        ))
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", instance),
        ])
        .with_attributes(given)
        .with_service_name(config.service_name.clone())
        .build()
}
