//! The layer around every request and its response: admission, the time limit, the trace, the
//! metrics, and the bodies of problems.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use opentelemetry::trace::TraceContextExt;
use tracing::{Instrument, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use writethrough::Settings;

use crate::app::App;
use crate::connections::Origin;
use crate::json::BODY_TIMEOUT;
use crate::metrics::Shed;
use crate::middleware::access::{self, Caller};
use crate::middleware::body_watch::{Rest, Unread};
use crate::middleware::malformed::{self, TARGET_BYTES};
use crate::middleware::trace_context::{RequestTrace, TraceParent};
use crate::problem::{Kind, Problem};
use crate::route::Route;
use crate::throttle::Throttle;

/// The longest that a request may take: above the time for its body and the engine's bound of a
/// write, so that those answer first.
const REQUEST_TIMEOUT: Duration =
    Duration::from_secs(BODY_TIMEOUT.as_secs() + Settings::WRITE_DEADLINE.as_secs() + 1);

const TRACE_ID: HeaderName = HeaderName::from_static("x-trace-id");

/// Serves one request.
pub async fn serve(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = request.method().clone();
    let matched = request.extensions().get::<MatchedPath>();
    let route = matched.and_then(|matched| Route::of(matched.as_str()));
    let parent = app
        .propagate
        .then(|| TraceParent::from_headers(request.headers()))
        .flatten();
    // Nobody wants a trace of every probe and scrape; who does, sends its own.
    let sampling = app
        .sampling
        .filter(|_| parent.is_some() || !is_probe(route));
    let mut trace = RequestTrace::new(parent, sampling);
    let span = server_span(&mut trace, &request, route);
    let origin = request.extensions().get::<Origin>().cloned();
    let connection = origin.as_ref().map(|origin| &origin.connection);
    let spare = connection.is_some_and(|connection| connection.is_spare());
    let (request, rest) = Rest::watch(request);

    let checked = malformed::check(&request);
    let malformed = checked.is_err();
    let checked = checked
        .and_then(|()| check_length(&request))
        .and_then(|()| {
            admit(
                &app,
                origin.as_ref().map(|origin| origin.caller),
                &request,
                route,
            )
        });
    let mut response = if let Err(problem) = checked {
        if !malformed {
            // Its body is not needed, and may be read away.
            drop(request);
        }
        problem.into_response()
    } else if is_probe(route) {
        run(request, next).instrument(span.clone()).await
    } else if spare {
        app.metrics.shed(Shed::Connections);
        Problem::new(Kind::Overloaded)
            .detail("All connections are taken. Try again after the time in `Retry-After`.")
            .into_response()
    } else if let Some(admitted) = app.admission.enter().await {
        let work = run(request, next).instrument(span.clone());
        let answered = tokio::time::timeout(REQUEST_TIMEOUT, work).await;
        if let Some(connection) = connection {
            connection.holds(admitted);
        }
        match answered {
            Ok(response) => response,
            Err(_) => {
                app.metrics.shed(Shed::Deadline);
                out_of_time(&method, route).into_response()
            }
        }
    } else {
        app.metrics.shed(Shed::InFlight);
        Problem::new(Kind::Overloaded).into_response()
    };

    let trace_id = trace.to_string();
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        log_fault(&problem, &method, route, &trace_id);
        // A HEAD has no body; its length is that of the GET.
        let body = problem.body(&trace_id);
        response
            .headers_mut()
            .insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        if method != Method::HEAD {
            *response.body_mut() = Body::from(body);
        }
    }
    limit_caching(&mut response, route);
    if let Ok(value) = HeaderValue::from_str(&trace_id) {
        response.headers_mut().insert(TRACE_ID, value);
    }
    // What is no script, no style and no page is not taken for one, whatever it looks like.
    response.headers_mut().insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    let unread = !rest.discard().await;
    if unread {
        response.extensions_mut().insert(Unread);
    }
    // With a body half read the server closes the connection; a client that is not told would send
    // its next request on it, and lose it.
    let last = connection.is_some_and(|connection| connection.is_last());
    if app.draining() || unread || malformed || last {
        response
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let status = response.status();
    if !span.is_none() {
        span.record("http.response.status_code", status.as_u16());
        if status.is_server_error() {
            span.record("otel.status_code", "ERROR");
        }
    }
    let exemplar = trace.sampled().then_some(trace_id.as_str());
    app.metrics
        .request(&method, route, status, started.elapsed(), exemplar);
    response
}

/// Lets a request in, or counts it as refused and says so in the log.
///
/// # Errors
///
/// The answer.
fn admit(
    app: &App,
    caller: Option<Caller>,
    request: &Request,
    route: Option<&Route>,
) -> Result<(), Problem> {
    app.access
        .check(caller, request, route)
        .map_err(|(refusal, problem)| {
            app.metrics.refused(refusal);
            access::log_refusal(refusal, caller, request, route);
            problem
        })
}

/// Refuses a target that is too long before anything looks into it.
fn check_length(request: &Request) -> Result<(), Problem> {
    let target = request.uri().path_and_query();
    if target.map_or(0, |target| target.as_str().len()) <= TARGET_BYTES {
        return Ok(());
    }
    let allowed = format!("must have at most {TARGET_BYTES} bytes");
    Err(Problem::new(Kind::TargetTooLong).error("path", allowed))
}

/// Says what caches between here and the client may do: nothing, with an error and with what changes by
/// the second; otherwise they ask here each time, or the promise that no read is stale would be theirs to
/// break.
fn limit_caching(response: &mut Response, route: Option<&'static Route>) {
    let status = response.status();
    let failed = status.is_client_error() || status.is_server_error();
    let operational = route.is_some_and(|route| route.probe || route.operator);
    let value = if failed || operational {
        "no-store"
    } else {
        "no-cache"
    };
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static(value));
}

/// Probes and scrapes are answered also when the service has more to do than it can.
fn is_probe(route: Option<&'static Route>) -> bool {
    route.is_some_and(|route| route.probe)
}

async fn run(request: Request, next: Next) -> Response {
    match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        // The panic's message is in the log already.
        Err(_) => Problem::new(Kind::Internal).into_response(),
    }
}

fn out_of_time(method: &Method, route: Option<&'static Route>) -> Problem {
    let writes = [Method::POST, Method::PUT, Method::DELETE].contains(method);
    if writes && route.is_some_and(|route| route.items) {
        Problem::new(Kind::OutcomeUnknown)
    } else {
        Problem::new(Kind::Unavailable)
            .detail("The request took too long. Try again after the time in `Retry-After`.")
    }
}

/// Logs the cause of a failure of the service, which the client does not get to see. It is logged here
/// and nowhere else.
fn log_fault(problem: &Problem, method: &Method, route: Option<&'static Route>, trace_id: &str) {
    let route = route.map_or("no route", |route| route.path);
    if problem.kind() == Kind::Internal {
        match problem.cause() {
            Some(cause) => tracing::error!(trace_id, "{method} {route} failed: {cause}"),
            None => tracing::error!(trace_id, "{method} {route} failed"),
        }
    } else if let Some(cause) = problem.cause() {
        // Thousands of requests a second may meet the same outage.
        static SECOND: Throttle = Throttle::new(Duration::from_secs(1));
        if SECOND.pass().is_some() {
            tracing::warn!(trace_id, "{method} {route} failed: {cause}");
        } else {
            tracing::debug!(trace_id, "{method} {route} failed: {cause}");
        }
    }
}

/// The server span, or none: a request that is not traced never makes a span, which would cost more
/// than a hit.
fn server_span(trace: &mut RequestTrace, request: &Request, route: Option<&'static Route>) -> Span {
    if !trace.sampled() {
        return Span::none();
    }
    let method = request.method().as_str();
    let name = match route {
        Some(route) => format!("{method} {}", route.path),
        None => method.to_owned(),
    };
    let span = tracing::info_span!(
        target: "writethrough",
        parent: None,
        "request",
        otel.name = name,
        otel.kind = "server",
        otel.status_code = tracing::field::Empty,
        http.request.method = method,
        http.route = route.map(|route| route.path),
        http.response.status_code = tracing::field::Empty,
        url.path = request.uri().path(),
        url.scheme = "http",
    );
    if let Some(context) = trace.remote_context(request.headers()) {
        // Fails only without the tracing layer, and then there is nothing to continue.
        let _ = span.set_parent(context);
    }
    trace.adopt(span.context().span().span_context().trace_id());
    span
}
