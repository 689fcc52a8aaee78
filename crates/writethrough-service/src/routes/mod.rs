//! Routes: thin handlers that turn requests into calls and answers into responses.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::{Router, middleware};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use writethrough::Unavailable;

use crate::app::App;
use crate::exchange;
use crate::items::ItemsError;
use crate::openapi;
use crate::problem::{Kind, Problem};
use crate::store::StoreFailure;
use crate::throttle::Throttle;

mod cache;
mod health;
mod items;
mod pages;
mod preconditions;
mod query;

/// The largest body.
const BODY_LIMIT: usize = 64 * 1024;
/// The longest that a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// All routes, with the layer around each request.
pub fn router(app: Arc<App>) -> Router {
    let (router, description) = OpenApiRouter::with_openapi(openapi::description())
        .routes(routes!(items::list, items::create))
        .routes(routes!(items::get, items::replace, items::remove))
        .routes(routes!(cache::clear))
        .routes(routes!(cache::stats))
        .routes(routes!(health::health))
        .routes(routes!(health::livez))
        .routes(routes!(health::readyz))
        .routes(routes!(health::metrics))
        .route_layer(middleware::from_fn(query::refuse))
        .split_for_parts();
    let paths: Arc<[String]> = description.paths.paths.keys().cloned().collect();
    router
        .merge(pages::router(&description))
        .method_not_allowed_fallback(other_method)
        .fallback(move |method, uri| no_route(method, uri, paths))
        // Bodies are read by `read_body`, which has a limit of its own.
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(app.clone(), exchange::serve))
        .with_state(app)
}

/// A known route with a method that it does not know. The router adds the header `Allow`.
async fn other_method(method: Method) -> Response {
    if method == Method::OPTIONS {
        StatusCode::NO_CONTENT.into_response()
    } else {
        Problem::new(Kind::MethodNotAllowed).into_response()
    }
}

/// No route: the server as a whole (`OPTIONS *`), a route with a slash too many, or nothing.
async fn no_route(method: Method, uri: Uri, paths: Arc<[String]>) -> Response {
    if method == Method::OPTIONS && uri.path() == "*" {
        let all = [(header::ALLOW, "GET,HEAD,POST,PUT,DELETE,OPTIONS")];
        return (StatusCode::NO_CONTENT, all).into_response();
    }
    let path = uri.path().trim_end_matches('/');
    // Only to a route of this service: `//elsewhere/` would lead to another host.
    if path != uri.path() && paths.iter().any(|pattern| leads_to(pattern, path)) {
        let query = uri
            .query()
            .map_or(String::new(), |query| format!("?{query}"));
        return Redirect::permanent(&format!("{path}{query}")).into_response();
    }
    Problem::new(Kind::RouteNotFound).into_response()
}

/// Whether a path is one of the route `pattern`, in which a part in braces stands for anything.
fn leads_to(pattern: &str, path: &str) -> bool {
    let (mut pattern, mut path) = (pattern.split('/'), path.split('/'));
    loop {
        match (pattern.next(), path.next()) {
            (None, None) => return true,
            (Some(pattern), Some(part))
                if pattern == part || (pattern.starts_with('{') && !part.is_empty()) => {}
            _ => return false,
        }
    }
}

/// Reads a JSON body, within bounds of size and time.
async fn read_body(request: Request) -> Result<Bytes, Problem> {
    declared_json(&request)?;
    let (head, body) = request.into_parts();
    let encoded = |value: &HeaderValue| !value.as_bytes().eq_ignore_ascii_case(b"identity");
    if head
        .headers
        .get_all(header::CONTENT_ENCODING)
        .iter()
        .any(encoded)
    {
        return Err(Problem::new(Kind::UnsupportedMediaType)
            .detail("Send the body as it is, without `Content-Encoding`.")
            .error("Content-Encoding", "must be left out")
            .header(
                header::ACCEPT_ENCODING,
                HeaderValue::from_static("identity"),
            ));
    }
    let too_large = || {
        Problem::new(Kind::BodyTooLarge)
            .error("body", format!("must have at most {BODY_LIMIT} bytes"))
    };
    // A body that says it is too large is not read at all.
    let length = head
        .headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok());
    if length.and_then(|length| length.parse::<u64>().ok()) > Some(BODY_LIMIT as u64) {
        return Err(too_large());
    }
    match tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, BODY_LIMIT).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(Problem::new(Kind::MalformedJson)
            .detail("The body broke off. Send the request again.")
            .error("body", "must be complete")),
        Err(_) => Err(Problem::new(Kind::RequestTimeout).error("body", "must arrive within 5 s")),
    }
}

/// Refuses a body that is not declared to be JSON. A page of another site can send any other without
/// asking the service first.
fn declared_json(request: &Request) -> Result<(), Problem> {
    let json = match request.headers().get(header::CONTENT_TYPE) {
        Some(declared) => is_json(declared.as_bytes()),
        None => request.body().is_end_stream(),
    };
    if json {
        Ok(())
    } else {
        Err(Problem::new(Kind::UnsupportedMediaType)
            .error("Content-Type", "must be application/json"))
    }
}

/// Whether a media type is JSON.
pub(crate) fn is_json(media_type: &[u8]) -> bool {
    let essence = media_type
        .split(|byte| *byte == b';')
        .next()
        .unwrap_or_default();
    let essence = essence.trim_ascii().to_ascii_lowercase();
    essence == b"application/json"
        || (essence.starts_with(b"application/") && essence.ends_with(b"+json"))
}

/// A JSON response.
fn json(status: StatusCode, body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(body) => json_bytes(status, body.into()),
        Err(error) => {
            tracing::error!("a response could not be written as JSON: {error}");
            Problem::new(Kind::Internal).into_response()
        }
    }
}

/// Room for the headers of an answer, those of all layers included: a map that grows on the way is felt in
/// the rate of hits.
const HEADERS: usize = 12;

/// A response of JSON that is ready to send.
fn json_bytes(status: StatusCode, body: Bytes) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    *response.headers_mut() = HeaderMap::with_capacity(HEADERS);
    set(
        response.headers_mut(),
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

fn set(headers: &mut HeaderMap, name: header::HeaderName, value: HeaderValue) {
    headers.insert(name, value);
}

/// A header's value from text that this program made; such text is always fit for one.
fn header_value(text: String) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Logs a failure that comes with an outage. Thousands of requests a second may meet the same one, so
/// only the first in each second is a warning.
fn log_outage(error: &ItemsError) {
    static SECOND: Throttle = Throttle::new(Duration::from_secs(1));
    if SECOND.pass().is_some() {
        tracing::warn!("{error}");
    } else {
        tracing::debug!("{error}");
    }
}

impl From<ItemsError> for Problem {
    /// Logs the cause, which the client does not get to see.
    fn from(error: ItemsError) -> Self {
        match &error {
            ItemsError::NotFound => return Problem::new(Kind::ItemNotFound),
            ItemsError::Mismatch => return Problem::new(Kind::PreconditionFailed),
            ItemsError::Store(cause) => match cause.failure() {
                StoreFailure::Internal => {
                    tracing::error!("{error}");
                    return Problem::new(Kind::Internal);
                }
                StoreFailure::Overloaded => {
                    log_outage(&error);
                    return Problem::new(Kind::Overloaded);
                }
                StoreFailure::Unavailable => {}
            },
            ItemsError::Engine(Unavailable::Busy) => {
                log_outage(&error);
                return Problem::new(Kind::Overloaded);
            }
            ItemsError::Engine(_) | ItemsError::Indeterminate { .. } | ItemsError::Cache(_) => {}
        }
        log_outage(&error);
        match error {
            ItemsError::Indeterminate { id, .. } => Problem::new(Kind::OutcomeUnknown)
                .detail(format!(
                    "The write may or may not have happened. Read /items/{id} before you send it \
                     again."
                ))
                .header(header::LOCATION, header_value(format!("/items/{id}"))),
            ItemsError::Cache(_) => Problem::new(Kind::CacheUnavailable),
            _ => Problem::new(Kind::Unavailable),
        }
    }
}
