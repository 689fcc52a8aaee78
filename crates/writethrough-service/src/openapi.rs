//! The API's description: what the routes' own annotations do not say.

use std::collections::BTreeMap;

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
            `x-trace-id`. Errors are `application/problem+json` (RFC 9457)."
    ),
    components(schemas(ProblemBody)),
    tags(
        (name = "items", description = "Items: the list and each one"),
        (name = "cache", description = "The cache: its state, and emptying it"),
        (name = "operation", description = "Health, probes and metrics")
    )
)]
struct Description;

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
        problems(&[Kind::InvalidParameter, Kind::Overloaded, Kind::Unavailable])
    }
}

/// What can go wrong with any write.
pub(crate) struct Errors;

impl IntoResponses for Errors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        problems(&[
            Kind::MalformedJson,
            Kind::InvalidParameter,
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
