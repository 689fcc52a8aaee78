//! The API's description: what the routes' own annotations do not say, and the two forms in which it is
//! served.
//!
//! The annotations give OpenAPI 3.1. Most generators of clients stop there (a type that may be null is a
//! list of types in 3.1), so `/openapi.json` is the same in 3.0; `/openapi-3.1.json` is for tools that
//! read JSON Schema.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use utoipa::openapi::{ContentBuilder, Ref, RefOr, Response, ResponseBuilder};
use utoipa::{IntoResponses, OpenApi};

use crate::problem::{Kind, ProblemBody};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "writethrough: items",
        description = "Items in a database behind a write-through cache. Every read is \
            linearizable: once a write is acknowledged, no read returns anything older.\n\n\
            Reads carry `ETag`, `Cache-Status` (RFC 9211) and `Server-Timing`; every answer carries \
            `x-trace-id`. Errors are `application/problem+json` (RFC 9457).\n\n\
            A parameter or a field that is not described here is refused by name. Answers may get \
            new fields.\n\n\
            This description comes in two forms: `/openapi.json` is OpenAPI 3.0, which generators of \
            clients read; `/openapi-3.1.json` is OpenAPI 3.1, whose schemas are JSON Schema.",
        contact(name = "The writethrough project"),
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0")
    ),
    servers((url = "/", description = "The service that this description comes from")),
    components(schemas(ProblemBody)),
    tags(
        (name = "items", description = "Items: the list and each one"),
        (name = "cache", description = "The cache: its state, and emptying it"),
        (name = "operation", description = "Health, probes and metrics")
    )
)]
struct Description;

/// Headers of responses: the name, the name among the components, and what it says.
const HEADERS: [(&str, &str, &str); 7] = [
    (
        "ETag",
        "ETag",
        "The version, for `If-Match` and `If-None-Match`",
    ),
    (
        "Cache-Status",
        "CacheStatus",
        "Where the answer came from (RFC 9211): `writethrough; hit`, `writethrough; fwd=miss; stored`, \
         `writethrough; fwd=bypass; detail=...`",
    ),
    (
        "Server-Timing",
        "ServerTiming",
        "The time spent waiting for Redis and for Postgres, in milliseconds",
    ),
    ("Location", "Location", "The path of the item"),
    (RETRY_AFTER, "RetryAfter", "When to try again, in seconds"),
    (TRACE_ID, "TraceId", "The trace of the request"),
    (
        WWW_AUTHENTICATE,
        "WWWAuthenticate",
        "What is asked for (RFC 6750): `Bearer`, with `error=\"invalid_token\"` when it was wrong",
    ),
];
/// What the headers of requests hold: `*`, or entity tags (RFC 9110, 8.8.3).
const ENTITY_TAGS: &str =
    r#"^(\*|(W/)?"[\x21\x23-\x7e\x80-\xff]*"(, *(W/)?"[\x21\x23-\x7e\x80-\xff]*")*)?$"#;
const RETRY_AFTER: &str = "Retry-After";
const TRACE_ID: &str = "x-trace-id";
const WWW_AUTHENTICATE: &str = "WWW-Authenticate";

/// The description without the routes, which add themselves.
pub fn description() -> utoipa::openapi::OpenApi {
    let mut description = Description::openapi();
    let kinds = Kind::ALL.map(|kind| {
        format!(
            "- `{}` ({}): {}",
            kind.uri(),
            kind.status().as_u16(),
            kind.title()
        )
    });
    if let Some(text) = &mut description.info.description {
        text.push_str("\n\nThe types of problems:\n");
        text.push_str(&kinds.join("\n"));
    }
    description
}

/// The description with all routes, as OpenAPI 3.1.
///
/// # Errors
///
/// It cannot be written as JSON.
pub fn version_3_1(description: &utoipa::openapi::OpenApi) -> serde_json::Result<Value> {
    let mut document = serde_json::to_value(description)?;
    // Items ask for no credential; said, so that nobody thinks it was forgotten.
    document["security"] = json!([]);
    document["components"]["securitySchemes"]["adminToken"] = json!({
        "type": "http",
        "scheme": "bearer",
        "description": "The token of --admin-token, if the service was started with one"
    });
    let headers = HEADERS.map(|(_, component, text)| {
        let header = json!({"description": text, "schema": {"type": "string"}});
        (component.to_owned(), header)
    });
    document["components"]["headers"] = Map::from_iter(headers).into();
    for operation in operations(&mut document) {
        for (status, response) in members(&mut operation["responses"]) {
            let mut names = vec![TRACE_ID];
            match status.as_str() {
                "503" => names.push(RETRY_AFTER),
                "401" => names.push(WWW_AUTHENTICATE),
                _ => {}
            }
            for name in names {
                response["headers"][name] = Value::Null;
            }
            for (name, header) in members(&mut response["headers"]) {
                if let Some((_, component, _)) = HEADERS.iter().find(|(known, ..)| known == name) {
                    *header = json!({"$ref": format!("#/components/headers/{component}")});
                }
            }
        }
        // A header or a parameter is absent, never null.
        for parameter in parameters(operation) {
            parameter["schema"]["type"] = not_null(&parameter["schema"]["type"]);
            if parameter["in"] == "header" {
                parameter["schema"]["pattern"] = json!(ENTITY_TAGS);
            }
        }
    }
    // A field that is not known is refused in a request; answers are left open.
    for request in ["ItemFields", "ItemReplacement"] {
        document["components"]["schemas"][request]["additionalProperties"] = json!(false);
    }
    Ok(document)
}

/// The same as OpenAPI 3.0.
#[must_use]
pub fn version_3_0(mut document: Value) -> Value {
    document["openapi"] = json!("3.0.3");
    // 3.0 knows no SPDX expressions.
    document["info"]["license"] = json!({
        "name": document["info"]["license"]["name"],
        "url": "https://www.apache.org/licenses/LICENSE-2.0"
    });
    for operation in operations(&mut document) {
        for parameter in parameters(operation) {
            schema_3_0(&mut parameter["schema"]);
        }
    }
    for (_, schema) in members(&mut document["components"]["schemas"]) {
        schema_3_0(schema);
    }
    // Their 503 is no problem but tells how things are, and generators of Rust clients take one type of
    // error for each operation.
    for path in ["/health", "/readyz"] {
        if let Some(responses) = document["paths"][path]["get"]["responses"].as_object_mut() {
            responses.retain(|status, _| !status.starts_with('4'));
        }
    }
    document
}

/// Turns a schema and those in it into the dialect of 3.0.
fn schema_3_0(schema: &mut Value) {
    let Some(keywords) = schema.as_object_mut() else {
        return;
    };
    // Beside a reference nothing counts.
    if keywords.contains_key("$ref") {
        keywords.retain(|keyword, _| keyword == "$ref");
        return;
    }
    keywords.remove("propertyNames");
    if let Some(Value::Array(mut examples)) = keywords.remove("examples")
        && !examples.is_empty()
    {
        keywords.insert("example".to_owned(), examples.swap_remove(0));
    }
    if let Some(Value::Array(types)) = keywords.get("type") {
        let (of, nullable) = (not_null(&keywords["type"]), types.contains(&json!("null")));
        keywords.insert("type".to_owned(), of);
        if nullable {
            keywords.insert("nullable".to_owned(), json!(true));
        }
    }
    for keyword in ["items", "additionalProperties"] {
        if let Some(schema) = keywords.get_mut(keyword) {
            schema_3_0(schema);
        }
    }
    if let Some(properties) = keywords.get_mut("properties") {
        for (_, schema) in members(properties) {
            schema_3_0(schema);
        }
    }
}

/// The type besides `null`.
fn not_null(types: &Value) -> Value {
    let one = types.as_array().and_then(|types| {
        let mut others = types.iter().filter(|of| *of != "null");
        others.next()
    });
    one.unwrap_or(types).clone()
}

fn operations(document: &mut Value) -> impl Iterator<Item = &mut Value> {
    members(&mut document["paths"])
        .flat_map(|(_, path)| members(path).map(|(_, operation)| operation))
}

fn parameters(operation: &mut Value) -> impl Iterator<Item = &mut Value> {
    let parameters = operation.get_mut("parameters");
    let parameters = parameters.and_then(Value::as_array_mut);
    parameters.into_iter().flatten()
}

fn members(object: &mut Value) -> impl Iterator<Item = (&String, &mut Value)> {
    object.as_object_mut().into_iter().flatten()
}

fn problems(kinds: &[Kind]) -> BTreeMap<String, RefOr<Response>> {
    let mut by_status: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for kind in kinds {
        by_status
            .entry(kind.status().as_str().to_owned())
            .or_default()
            .push(kind.title());
    }
    by_status
        .into_iter()
        .map(|(status, titles)| {
            let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem")));
            let response = ResponseBuilder::new()
                .description(titles.join("; or: "))
                .content("application/problem+json", content.build())
                .build();
            (status, RefOr::T(response))
        })
        .collect()
}

/// What can go wrong with a read.
pub(crate) struct ReadErrors;

impl IntoResponses for ReadErrors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        problems(&[
            Kind::MalformedRequest,
            Kind::InvalidParameter,
            Kind::TargetTooLong,
            Kind::HeadTooLong,
            Kind::HostNotAllowed,
            Kind::Overloaded,
            Kind::Unavailable,
        ])
    }
}

/// What can go wrong with a probe.
pub(crate) struct ProbeErrors;

impl IntoResponses for ProbeErrors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        problems(&[
            Kind::MalformedRequest,
            Kind::InvalidParameter,
            Kind::TargetTooLong,
            Kind::HeadTooLong,
            Kind::HostNotAllowed,
        ])
    }
}

/// What can go wrong with a route for operators.
pub(crate) struct OperatorErrors;

impl IntoResponses for OperatorErrors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        problems(&[Kind::Unauthorized, Kind::Forbidden])
    }
}

/// What can go wrong when the cache is emptied.
pub(crate) struct ClearErrors;

impl IntoResponses for ClearErrors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        problems(&[
            Kind::MalformedRequest,
            Kind::InvalidParameter,
            Kind::TargetTooLong,
            Kind::HeadTooLong,
            Kind::HostNotAllowed,
            Kind::UnsupportedMediaType,
            Kind::Overloaded,
            Kind::Unavailable,
            Kind::CacheUnavailable,
        ])
    }
}

/// What can go wrong with any write.
pub(crate) struct Errors;

impl IntoResponses for Errors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        problems(&[
            Kind::MalformedRequest,
            Kind::MalformedJson,
            Kind::InvalidParameter,
            Kind::TargetTooLong,
            Kind::HeadTooLong,
            Kind::HostNotAllowed,
            Kind::Overloaded,
            Kind::Unavailable,
            Kind::OutcomeUnknown,
        ])
    }
}

/// What can go wrong with a body.
pub(crate) struct WriteErrors;

impl IntoResponses for WriteErrors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        problems(&[
            Kind::RequestTimeout,
            Kind::BodyTooLarge,
            Kind::UnsupportedMediaType,
            Kind::Validation,
        ])
    }
}
