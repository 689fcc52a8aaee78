//! Problems: every error that a client can meet, as RFC 9457 `application/problem+json`.
//!
//! A [`Problem`] becomes a response without a body; the outermost layer ([`crate::middleware`]) writes
//! the body, because it knows the trace id. No text here comes from the database.

use std::borrow::Cow;
use std::error::Error;
use std::sync::Arc;

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

/// How long a client should wait before it tries again, in seconds.
const RETRY_AFTER_SECONDS: &str = "1";

/// The kinds of problem. The slug of each is its stable name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request is not one of HTTP/1.1.
    MalformedRequest,
    /// The body is not JSON.
    MalformedJson,
    /// A field of the body is wrong.
    Validation,
    /// The path, the query or a header is wrong.
    InvalidParameter,
    /// The path and the query are over the limit.
    TargetTooLong,
    /// The headers are over the limit.
    HeadTooLong,
    /// The token is missing or wrong.
    Unauthorized,
    /// The sender may not do this.
    Forbidden,
    /// The request is meant for another host.
    HostNotAllowed,
    /// There is no item of this id.
    ItemNotFound,
    /// There is no such route.
    RouteNotFound,
    /// The route does not know this method.
    MethodNotAllowed,
    /// `If-Match` names another version.
    PreconditionFailed,
    /// The body is over the limit.
    BodyTooLarge,
    /// The body is not declared to be JSON.
    UnsupportedMediaType,
    /// The body did not arrive in time.
    RequestTimeout,
    /// Too many requests at once.
    Overloaded,
    /// The database is not reachable, or not ready yet.
    Unavailable,
    /// The write may or may not have happened.
    OutcomeUnknown,
    /// The cache cannot be cleared now.
    CacheUnavailable,
    /// A fault of the service.
    Internal,
}

impl Kind {
    /// All kinds, for the description of the API.
    pub const ALL: [Self; 21] = [
        Self::MalformedRequest,
        Self::MalformedJson,
        Self::Validation,
        Self::InvalidParameter,
        Self::TargetTooLong,
        Self::HeadTooLong,
        Self::Unauthorized,
        Self::Forbidden,
        Self::HostNotAllowed,
        Self::ItemNotFound,
        Self::RouteNotFound,
        Self::MethodNotAllowed,
        Self::PreconditionFailed,
        Self::BodyTooLarge,
        Self::UnsupportedMediaType,
        Self::RequestTimeout,
        Self::Overloaded,
        Self::Unavailable,
        Self::OutcomeUnknown,
        Self::CacheUnavailable,
        Self::Internal,
    ];

    /// Type URI, status, title and what it means.
    const fn row(self) -> (&'static str, StatusCode, &'static str, &'static str) {
        match self {
            Self::MalformedRequest => (
                "/problems/malformed-request",
                StatusCode::BAD_REQUEST,
                "The request is not one of HTTP/1.1",
                "Correct the request line, the headers or the length of the body (RFC 9112).",
            ),
            Self::MalformedJson => (
                "/problems/malformed-json",
                StatusCode::BAD_REQUEST,
                "The body is not valid JSON",
                "Correct the body and send the request again.",
            ),
            Self::Validation => (
                "/problems/validation",
                StatusCode::UNPROCESSABLE_ENTITY,
                "A field is missing, unknown or has a wrong value",
                "`errors` lists each field and what is wrong with it.",
            ),
            Self::InvalidParameter => (
                "/problems/invalid-parameter",
                StatusCode::BAD_REQUEST,
                "The path, the query or a header has a wrong value",
                "`errors` names the parameter and what is allowed.",
            ),
            Self::TargetTooLong => (
                "/problems/target-too-long",
                StatusCode::URI_TOO_LONG,
                "The path and the query are too long",
                "Send at most 8192 bytes of them.",
            ),
            Self::HeadTooLong => (
                "/problems/head-too-long",
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "The headers are too long",
                "Send at most 65536 bytes of them.",
            ),
            Self::Unauthorized => (
                "/problems/unauthorized",
                StatusCode::UNAUTHORIZED,
                "The token is missing or wrong",
                "Send the header `Authorization: Bearer TOKEN` with the token of --admin-token.",
            ),
            Self::Forbidden => (
                "/problems/forbidden",
                StatusCode::FORBIDDEN,
                "This is not for everybody",
                "`detail` says from where, or how, to send the request.",
            ),
            Self::HostNotAllowed => (
                "/problems/host-not-allowed",
                StatusCode::MISDIRECTED_REQUEST,
                "The request is meant for another host",
                "Use `localhost` or an IP address, or start the service with the name in \
                 --allowed-hosts.",
            ),
            Self::ItemNotFound => (
                "/problems/item-not-found",
                StatusCode::NOT_FOUND,
                "There is no such item",
                "Check the id; GET /items lists the items there are.",
            ),
            Self::RouteNotFound => (
                "/problems/route-not-found",
                StatusCode::NOT_FOUND,
                "There is no such route",
                "GET /openapi.json describes the routes there are.",
            ),
            Self::MethodNotAllowed => (
                "/problems/method-not-allowed",
                StatusCode::METHOD_NOT_ALLOWED,
                "The route does not know this method",
                "The header `Allow` lists the methods it knows.",
            ),
            Self::PreconditionFailed => (
                "/problems/precondition-failed",
                StatusCode::PRECONDITION_FAILED,
                "The item has another version",
                "Nothing was written. Read the item again and decide anew with its current ETag.",
            ),
            Self::BodyTooLarge => (
                "/problems/body-too-large",
                StatusCode::PAYLOAD_TOO_LARGE,
                "The body is too large",
                "Send at most 65536 bytes.",
            ),
            Self::UnsupportedMediaType => (
                "/problems/unsupported-media-type",
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "The body is not declared to be JSON",
                "Send the header `Content-Type: application/json`.",
            ),
            Self::RequestTimeout => (
                "/problems/request-timeout",
                StatusCode::REQUEST_TIMEOUT,
                "The body did not arrive in time",
                "Nothing was written. Send the request again.",
            ),
            Self::Overloaded => (
                "/problems/overloaded",
                StatusCode::SERVICE_UNAVAILABLE,
                "Too many requests at once",
                "Nothing was done. Try again after the time in `Retry-After`.",
            ),
            Self::Unavailable => (
                "/problems/unavailable",
                StatusCode::SERVICE_UNAVAILABLE,
                "The database is not available",
                "Nothing was written. Try again after the time in `Retry-After`.",
            ),
            Self::OutcomeUnknown => (
                "/problems/outcome-unknown",
                StatusCode::SERVICE_UNAVAILABLE,
                "The outcome of the write is unknown",
                "It may or may not have been written. Read the item before you send the write again.",
            ),
            Self::CacheUnavailable => (
                "/problems/cache-unavailable",
                StatusCode::SERVICE_UNAVAILABLE,
                "The cache is not available",
                "Try again after the time in `Retry-After`; reads are served from the database.",
            ),
            Self::Internal => (
                "/problems/internal",
                StatusCode::INTERNAL_SERVER_ERROR,
                "The service failed",
                "Report it with the trace id.",
            ),
        }
    }

    /// The stable type, a reference relative to the service.
    #[must_use]
    pub const fn uri(self) -> &'static str {
        self.row().0
    }

    /// The HTTP status.
    #[must_use]
    pub const fn status(self) -> StatusCode {
        self.row().1
    }

    /// A short summary, the same for every problem of the kind.
    #[must_use]
    pub const fn title(self) -> &'static str {
        self.row().2
    }

    /// What the problem means and what to do, in general.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        self.row().3
    }
}

/// What is wrong with one field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct FieldError {
    /// The field, parameter or header.
    #[schema(examples("price"))]
    pub field: String,
    /// What is wrong, or what is allowed.
    #[schema(examples("must be from 0 to 99999999.99"))]
    pub message: String,
}

impl FieldError {
    /// An error of this field.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            message: message.into(),
        }
    }
}

/// One error as a client sees it.
#[derive(Debug, Clone)]
pub struct Problem {
    kind: Kind,
    detail: Cow<'static, str>,
    errors: Vec<FieldError>,
    headers: Vec<(HeaderName, HeaderValue)>,
    /// For the log alone.
    cause: Option<Arc<dyn Error + Send + Sync>>,
}

/// An error (RFC 9457).
#[derive(Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody<'a> {
    /// The stable type, a reference relative to the service.
    #[serde(rename = "type")]
    #[schema(examples("/problems/validation"))]
    uri: &'a str,
    /// A short summary, the same for every problem of the type.
    title: &'a str,
    /// The HTTP status.
    #[schema(minimum = 400, maximum = 599, examples(422))]
    status: u16,
    /// What happened here, and what to do.
    detail: &'a str,
    /// The wrong fields, if any.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    errors: &'a [FieldError],
    /// The trace of the request, as in `x-trace-id`.
    trace_id: &'a str,
}

impl Problem {
    /// A problem of this kind, with the kind's general advice as its detail.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        let headers = if kind.status() == StatusCode::SERVICE_UNAVAILABLE {
            vec![(
                header::RETRY_AFTER,
                HeaderValue::from_static(RETRY_AFTER_SECONDS),
            )]
        } else {
            Vec::new()
        };
        Self {
            kind,
            detail: Cow::Borrowed(kind.meaning()),
            errors: Vec::new(),
            headers,
            cause: None,
        }
    }

    /// Says what happened here and what to do.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<Cow<'static, str>>) -> Self {
        self.detail = detail.into();
        self
    }

    /// Names one wrong field.
    #[must_use]
    pub fn error(mut self, field: impl Into<String>, message: impl Into<String>) -> Self {
        self.errors.push(FieldError::new(field, message));
        self
    }

    /// Names the wrong fields.
    #[must_use]
    pub fn errors(mut self, errors: Vec<FieldError>) -> Self {
        self.errors = errors;
        self
    }

    /// Adds a header to the answer.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// Keeps what failed inside of the service for the log; the client does not get to see it.
    #[must_use]
    pub fn caused_by(mut self, cause: impl Error + Send + Sync + 'static) -> Self {
        self.cause = Some(Arc::new(cause));
        self
    }

    /// What failed inside of the service, for the log.
    #[must_use]
    pub fn cause(&self) -> Option<&(dyn Error + Send + Sync)> {
        self.cause.as_deref()
    }

    /// The kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The body, with the trace id of the request.
    #[must_use]
    pub fn body(&self, trace_id: &str) -> Vec<u8> {
        let body = ProblemBody {
            uri: self.kind.uri(),
            title: self.kind.title(),
            status: self.kind.status().as_u16(),
            detail: &self.detail,
            errors: &self.errors,
            trace_id,
        };
        serde_json::to_vec(&body).unwrap_or_default()
    }

    #[cfg(test)]
    pub(crate) fn errors_for_tests(&self) -> &[FieldError] {
        &self.errors
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.kind.status().into_response();
        for (name, value) in &self.headers {
            response.headers_mut().append(name.clone(), value.clone());
        }
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        response.extensions_mut().insert(self);
        response
    }
}
