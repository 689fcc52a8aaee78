//! JSON in the bodies of requests and responses.

use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;

use crate::problem::{Kind, Problem};

/// The largest body.
const BODY_LIMIT: usize = 64 * 1024;
/// The longest that a body may take to arrive.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// Reads a JSON body, within bounds of size and time.
pub(crate) async fn read_body(request: Request) -> Result<Bytes, Problem> {
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
        Err(_) => Err(Problem::new(Kind::RequestTimeout).error(
            "body",
            format!("must arrive within {} s", BODY_TIMEOUT.as_secs()),
        )),
    }
}

/// Refuses a body that is not declared to be JSON. A page of another site can send any other without
/// asking the service first.
pub(crate) fn declared_json(request: &Request) -> Result<(), Problem> {
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
pub(crate) fn json(status: StatusCode, body: &impl Serialize) -> Response {
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
pub(crate) fn json_bytes(status: StatusCode, body: Bytes) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    *response.headers_mut() = HeaderMap::with_capacity(HEADERS);
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

/// A header's value from text that this program made; such text is always fit for one.
pub(crate) fn header_value(text: String) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}
