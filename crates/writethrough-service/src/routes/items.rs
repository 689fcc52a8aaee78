//! `/items` and `/items/{id}`.

use std::collections::HashSet;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use utoipa::IntoParams;
use writethrough::ReadOutcome;

use super::preconditions::{self, Accepted, Send, Wanted};
use super::query::{self, QueryPairs};
use crate::app::App;
use crate::item::{Cursor, ItemId, PageRequest};
use crate::items::{Document, Fetched, ItemsError};
use crate::json::{header_value, json, json_bytes, read_body};
use crate::metrics::WriteTiming;
use crate::openapi::{Errors, ReadErrors, WriteErrors};
use crate::problem::{FieldError, Kind, Problem};
use crate::validation;
use crate::wire::{
    DeletedBody, DeletedStatus, ItemBody, ItemFieldsBody, ItemReplacementBody, PageBody,
};

const DEFAULT_LIMIT: u8 = 10;

const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

type PathId = Result<Path<String>, PathRejection>;

// It only describes: `page_request` reads.
/// What a list takes.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code)]
pub(super) struct ListParameters {
    /// How many items at most.
    #[param(minimum = 1, maximum = 100, default = 10)]
    limit: Option<u8>,
    /// Where to start: `next_cursor` of the part before, or nothing for the newest items.
    // A time that can be shown, in microseconds as a signed number, and an id.
    #[param(
        pattern = r"^(|(0([0-2][0-9a-f]{2}|3[0-7][0-9a-f]|38[0-3])|ff(2[4-9a-f]|[3-9a-f][0-9a-f]))[0-9a-f]{44})$"
    )]
    cursor: Option<String>,
}

/// Lists items, newest first.
///
/// A list is served from the cache when it can be, and is never older than the last write.
#[utoipa::path(
    get,
    path = "/items",
    operation_id = "listItems",
    tag = "items",
    params(
        ListParameters,
        ("If-None-Match" = Option<String>, Header,
         description = "The ETag of the part that the client has; 304 if it is still the same")
    ),
    responses(
        (status = 200, description = "A part of the list", body = PageBody, headers(
            ("ETag" = String), ("Cache-Status" = String), ("Server-Timing" = String)
        )),
        (status = 304, description = "The client has this part already (`If-None-Match`)", headers(
            ("ETag" = String), ("Cache-Status" = String), ("Server-Timing" = String)
        )),
        (status = 412, description = "The part is not the one that `If-Match` names",
         body = crate::problem::ProblemBody, content_type = "application/problem+json"),
        ReadErrors
    )
)]
pub(super) async fn list(
    State(app): State<Arc<App>>,
    query: QueryPairs,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let request = page_request(query)?;
    let wanted = Wanted::of(&headers)?;
    let fetched = app.items()?.list(request).await?;
    Ok(read_response(&fetched, &wanted, |document| {
        format!("{:016x}", document.tag())
    }))
}

/// Creates an item.
///
/// The service sets the id, the times and the version.
#[utoipa::path(
    post,
    path = "/items",
    operation_id = "createItem",
    tag = "items",
    request_body = ItemFieldsBody,
    responses(
        (status = 201, description = "The item as it is stored", body = ItemBody, headers(
            ("Location" = String), ("ETag" = String), ("Server-Timing" = String)
        )),
        Errors, WriteErrors
    )
)]
pub(super) async fn create(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Problem> {
    preconditions::refuse(request.headers())?;
    let items = app.items()?.clone();
    let fields = validation::item_fields(&read_body(request).await?)?;
    let id = ItemId::generate();
    let written = items.create(id, fields).await?;
    let mut response = json_bytes(StatusCode::CREATED, written.output.json());
    let headers = response.headers_mut();
    headers.insert(header::LOCATION, header_value(format!("/items/{id}")));
    headers.insert(header::ETAG, etag(&version_of(&written.output)));
    headers.insert(SERVER_TIMING, write_timing(&written.timing));
    Ok(response)
}

/// Reads an item.
///
/// It is served from the cache when it can be, and is never older than the last write.
#[utoipa::path(
    get,
    path = "/items/{id}",
    operation_id = "getItem",
    tag = "items",
    params(
        ("id" = String, Path, format = Uuid, description = "The item's id"),
        ("If-None-Match" = Option<String>, Header,
         description = "The ETag of the version that the client has; 304 if it is still the same")
    ),
    responses(
        (status = 200, description = "The item", body = ItemBody, headers(
            ("ETag" = String), ("Cache-Status" = String), ("Server-Timing" = String)
        )),
        (status = 304, description = "The client has this version already (`If-None-Match`)", headers(
            ("ETag" = String), ("Cache-Status" = String), ("Server-Timing" = String)
        )),
        (status = 404, description = "There is no such item", body = crate::problem::ProblemBody,
         content_type = "application/problem+json"),
        (status = 412, description = "The item's version is not one that `If-Match` names",
         body = crate::problem::ProblemBody, content_type = "application/problem+json"),
        ReadErrors
    )
)]
pub(super) async fn get(
    State(app): State<Arc<App>>,
    id: PathId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let id = item_id(id)?;
    let wanted = Wanted::of(&headers)?;
    let fetched = app.items()?.get(id).await?;
    Ok(read_response(&fetched, &wanted, version_of))
}

/// Replaces an item.
///
/// An item as it was read can be sent back with changes: the fields that the service sets may be there. Then
/// `id` must be that of the path, `version` acts as `If-Match`, and the times are ignored.
#[utoipa::path(
    put,
    path = "/items/{id}",
    operation_id = "replaceItem",
    tag = "items",
    params(
        ("id" = String, Path, format = Uuid, description = "The item's id"),
        ("If-Match" = Option<String>, Header,
         description = "The ETag of the version to replace; 412 if the item has another one"),
        ("If-None-Match" = Option<String>, Header,
         description = "ETags of versions not to replace; 412 if the item has one of them, and always with `*`")
    ),
    request_body = ItemReplacementBody,
    responses(
        (status = 200, description = "The item as it is stored now", body = ItemBody, headers(
            ("ETag" = String), ("Server-Timing" = String)
        )),
        (status = 404, description = "There is no such item", body = crate::problem::ProblemBody,
         content_type = "application/problem+json"),
        (status = 412, description = "The item has another version",
         body = crate::problem::ProblemBody, content_type = "application/problem+json"),
        Errors, WriteErrors
    )
)]
pub(super) async fn replace(
    State(app): State<Arc<App>>,
    id: PathId,
    request: Request,
) -> Result<Response, Problem> {
    let id = item_id(id)?;
    let mut accepted = Accepted::of(request.headers())?;
    let items = app.items()?.clone();
    let replacement = validation::replacement(&read_body(request).await?, id)?;
    if let Some(version) = replacement.version {
        accepted.only(version);
    }
    let written = items
        .replace(id, replacement.fields, accepted.condition())
        .await
        .map_err(|error| accepted.problem(error))?;
    let mut response = json_bytes(StatusCode::OK, written.output.json());
    let headers = response.headers_mut();
    headers.insert(header::ETAG, etag(&version_of(&written.output)));
    headers.insert(SERVER_TIMING, write_timing(&written.timing));
    Ok(response)
}

/// Removes an item.
///
/// It is gone from lists at once.
#[utoipa::path(
    delete,
    path = "/items/{id}",
    operation_id = "deleteItem",
    tag = "items",
    params(
        ("id" = String, Path, format = Uuid, description = "The item's id"),
        ("If-Match" = Option<String>, Header,
         description = "The ETag of the version to remove; 412 if the item has another one"),
        ("If-None-Match" = Option<String>, Header,
         description = "ETags of versions not to remove; 412 if the item has one of them, and always with `*`")
    ),
    responses(
        (status = 200, description = "The item is gone", body = DeletedBody, headers(
            ("Server-Timing" = String)
        )),
        (status = 404, description = "There is no such item", body = crate::problem::ProblemBody,
         content_type = "application/problem+json"),
        (status = 412, description = "The item has another version",
         body = crate::problem::ProblemBody, content_type = "application/problem+json"),
        Errors
    )
)]
pub(super) async fn remove(
    State(app): State<Arc<App>>,
    id: PathId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let id = item_id(id)?;
    let accepted = Accepted::of(&headers)?;
    let written = app
        .items()?
        .remove(id, accepted.condition())
        .await
        .map_err(|error| accepted.problem(error))?;
    let body = DeletedBody {
        status: DeletedStatus::Deleted,
        id: id.uuid(),
    };
    let mut response = json(StatusCode::OK, &body);
    response
        .headers_mut()
        .insert(SERVER_TIMING, write_timing(&written.timing));
    Ok(response)
}

fn item_id(id: PathId) -> Result<ItemId, Problem> {
    id.ok()
        .and_then(|Path(text)| ItemId::parse(&text))
        .ok_or_else(|| {
            Problem::new(Kind::InvalidParameter)
                .detail("The id in the path is not a UUID. Use an id as POST /items returns it.")
                .error(
                    "id",
                    "must be a UUID, such as 550e8400-e29b-41d4-a716-446655440001",
                )
        })
}

fn page_request(query: QueryPairs) -> Result<PageRequest, Problem> {
    let Query(pairs) = query.map_err(|_| query::malformed())?;
    let (mut limit, mut after) = (None, None);
    let mut seen: HashSet<&str> = HashSet::new();
    let mut errors = Vec::new();
    for (name, value) in &pairs {
        if errors.len() == query::MOST_ERRORS {
            break;
        }
        if !seen.insert(name) {
            errors.push(FieldError::new(
                query::shown(name),
                "is given more than once",
            ));
            continue;
        }
        match name.as_str() {
            "limit" => match value.parse().ok().filter(|limit| (1..=100).contains(limit)) {
                Some(value) => limit = Some(value),
                None => errors.push(FieldError::new(
                    "limit",
                    "must be a whole number from 1 to 100",
                )),
            },
            "cursor" if value.is_empty() => {}
            "cursor" => match Cursor::parse(value) {
                Some(cursor) => after = Some(cursor),
                None => errors.push(FieldError::new(
                    "cursor",
                    "must be `next_cursor` of an earlier answer, or left out for the newest items",
                )),
            },
            _ => errors.push(query::unknown(name, "use `limit` and `cursor`")),
        }
    }
    if errors.is_empty() {
        Ok(PageRequest {
            limit: limit.unwrap_or(DEFAULT_LIMIT),
            after,
        })
    } else {
        Err(query::wrong(errors))
    }
}

fn version_of(document: &Document) -> String {
    document.tag().to_string()
}

fn etag(tag: &str) -> HeaderValue {
    header_value(format!("\"{tag}\""))
}

fn read_response(
    fetched: &Fetched,
    wanted: &Wanted,
    tag_of: impl Fn(&Document) -> String,
) -> Response {
    let mut response = match &fetched.document {
        None => Problem::from(ItemsError::NotFound).into_response(),
        Some(document) => {
            let tag = tag_of(document);
            let mut response = match wanted.of_version(&tag) {
                Send::Whole => json_bytes(StatusCode::OK, document.json()),
                Send::NotModified => StatusCode::NOT_MODIFIED.into_response(),
                Send::Nothing(problem) => problem.into_response(),
            };
            response.headers_mut().insert(header::ETAG, etag(&tag));
            response
        }
    };
    let headers = response.headers_mut();
    headers.insert(CACHE_STATUS, cache_status(fetched.outcome));
    headers.insert(
        SERVER_TIMING,
        server_timing(Some(fetched.cache_time), fetched.store_time),
    );
    response
}

/// RFC 9211.
fn cache_status(outcome: ReadOutcome) -> HeaderValue {
    match outcome {
        ReadOutcome::Hit => HeaderValue::from_static("writethrough; hit"),
        ReadOutcome::Filled => HeaderValue::from_static("writethrough; fwd=miss; stored"),
        ReadOutcome::Unfilled => HeaderValue::from_static("writethrough; fwd=miss"),
        ReadOutcome::Coalesced => HeaderValue::from_static("writethrough; fwd=miss; collapsed"),
        ReadOutcome::Bypassed(reason) => header_value(format!(
            "writethrough; fwd=bypass; detail={}",
            reason.as_str()
        )),
    }
}

fn server_timing(cache: Option<Duration>, store: Option<Duration>) -> HeaderValue {
    let mut text = String::new();
    for (name, spent) in [("redis", cache), ("postgres", store)] {
        let Some(spent) = spent.filter(|spent| !spent.is_zero()) else {
            continue;
        };
        let comma = if text.is_empty() { "" } else { ", " };
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "{comma}{name};dur={:.3}",
            spent.as_secs_f64() * 1000.0
        );
    }
    header_value(text)
}

fn write_timing(timing: &WriteTiming) -> HeaderValue {
    server_timing(Some(timing.cache), Some(timing.store))
}
