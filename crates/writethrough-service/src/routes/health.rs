//! `/health`, the probes and `/metrics`: for people, orchestrators and Prometheus.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::app::App;
use crate::diagnosis::diagnose;
use crate::exposition::{self, Format};
use crate::json::json;
use crate::openapi::{OperatorErrors, ProbeErrors};
use crate::problem::{Kind, Problem};
use crate::wire::{
    BackendsBody, DependenciesBody, DependencyStatus, HealthBody, HealthStatus, ProbeBody,
    ProbeStatus,
};

/// Says how the service and its dependencies are.
///
/// For people and dashboards; orchestrators ask `/livez` and `/readyz`.
#[utoipa::path(
    get,
    path = "/health",
    operation_id = "getHealth",
    tag = "operation",
    responses(
        (status = 200, description = "`ok`, or `degraded` without the cache", body = HealthBody),
        (status = 503, description = "`down`: no database", body = HealthBody),
        ProbeErrors
    )
)]
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    let database = app.database_is_up().await;
    let state = app.ready_items().map(|items| items.engine().state());
    let cache = app.cache_is_connected();
    let shortage = app.ready_items().and_then(|items| items.store().shortage());
    let diagnosis = diagnose(database, state.as_ref(), shortage);
    let body = HealthBody {
        status: match (database, cache && !diagnosis.degraded) {
            (true, true) => HealthStatus::Ok,
            (true, false) => HealthStatus::Degraded,
            (false, _) => HealthStatus::Down,
        },
        reason: diagnosis.reason,
        service: app.service_name.clone(),
        dependencies: DependenciesBody {
            redis: DependencyStatus::of(cache),
            postgres: DependencyStatus::of(database),
        },
        backends: BackendsBody {
            cache: app.cache_backend,
            database: app.database_backend,
        },
        consistency: app.consistency,
        mode: state.as_ref().map_or("unknown", |state| state.mode()),
        epoch: state.and_then(|state| Some(state.status.epoch?.0)),
        version: env!("CARGO_PKG_VERSION"),
        uptime_seconds: app.started.elapsed().as_secs(),
    };
    let status = if database {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    condition(status, &body)
}

/// What the service or one of its probes says; whoever asked may ask again soon when that is a no.
fn condition(status: StatusCode, body: &impl Serialize) -> Response {
    let mut response = json(status, body);
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// Says that the process runs.
///
/// For an orchestrator's liveness probe.
#[utoipa::path(
    get,
    path = "/livez",
    operation_id = "getLiveness",
    tag = "operation",
    responses((status = 200, description = "The process runs", body = ProbeBody), ProbeErrors)
)]
pub(super) async fn livez() -> Response {
    json(
        StatusCode::OK,
        &ProbeBody {
            status: ProbeStatus::Ok,
        },
    )
}

/// Says whether the process wants requests.
///
/// It does once it was ready, until it is about to stop. It stays so when the database goes away, since
/// then every other node is in the same state.
#[utoipa::path(
    get,
    path = "/readyz",
    operation_id = "getReadiness",
    tag = "operation",
    responses(
        (status = 200, description = "Ready", body = ProbeBody),
        (status = 503, description = "Starting or about to stop", body = ProbeBody),
        ProbeErrors
    )
)]
pub(super) async fn readyz(State(app): State<Arc<App>>) -> Response {
    let (status, word) = if app.draining() {
        (StatusCode::SERVICE_UNAVAILABLE, ProbeStatus::Draining)
    } else if app.ready_items().is_none() {
        (StatusCode::SERVICE_UNAVAILABLE, ProbeStatus::Starting)
    } else {
        (StatusCode::OK, ProbeStatus::Ok)
    };
    condition(status, &ProbeBody { status: word })
}

/// Tells the metrics.
///
/// As Prometheus' text format 0.0.4 or, when `Accept` asks for it, OpenMetrics 1.0 with exemplars;
/// packed with gzip when `Accept-Encoding` asks for that.
#[utoipa::path(
    get,
    path = "/metrics",
    operation_id = "getMetrics",
    tag = "operation",
    security((), ("adminToken" = [])),
    responses((status = 200, description = "Metrics", content(
        (String = "text/plain"),
        (String = "application/openmetrics-text")
    )), ProbeErrors, OperatorErrors)
)]
pub(super) async fn metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    let format = Format::preferred(&headers);
    let written = app.metrics.text(format).map_err(|error| error.to_string());
    let packed = exposition::wants_gzip(&headers);
    let body = written.and_then(|text| {
        if packed {
            exposition::gzip(&text).map_err(|error| error.to_string())
        } else {
            Ok(text.into_bytes())
        }
    });
    let body = match body {
        Ok(body) => body,
        Err(error) => {
            tracing::error!("the metrics could not be written: {error}");
            return Problem::new(Kind::Internal).into_response();
        }
    };
    let mut response = Response::new(Body::from(body));
    let answer = response.headers_mut();
    answer.insert(header::CONTENT_TYPE, format.content_type());
    answer.insert(
        header::VARY,
        HeaderValue::from_static("accept, accept-encoding"),
    );
    if packed {
        answer.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    response
}
