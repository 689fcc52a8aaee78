//! Pages for people: the index, the API's description and the page to try it on. No page loads
//! anything from elsewhere.

use std::sync::Arc;

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use serde_json::json;

use crate::app::App;
use crate::json::json_bytes;
use crate::openapi;
use crate::problem::{Kind, Problem};

const INDEX: &str = include_str!("../pages/index.html");
const DOCS: &str = include_str!("../pages/docs.html");
const DOCS_SCRIPT: &str = include_str!("../pages/docs.js");

/// Allows what the pages need and nothing else.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; \
     style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; \
     form-action 'none'; frame-ancestors 'none'";

pub(super) fn router(description: &utoipa::openapi::OpenApi) -> Router<Arc<App>> {
    let newest = openapi::version_3_1(description).unwrap_or_default();
    let newest_text = Bytes::from(newest.to_string());
    let common_text = Bytes::from(openapi::version_3_0(newest).to_string());
    Router::new()
        .route("/", get(index))
        .route("/docs", get(|| async { page(DOCS) }))
        .route("/docs/page.js", get(script))
        .route(
            "/openapi.json",
            get(async || json_bytes(StatusCode::OK, common_text)),
        )
        .route(
            "/openapi-3.1.json",
            get(async || json_bytes(StatusCode::OK, newest_text)),
        )
        .route("/problems/{slug}", get(problem))
}

async fn index(headers: HeaderMap) -> Response {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok());
    let mut response = if accept.is_some_and(|accept| accept.contains("application/json")) {
        let index = json!({
            "service": "writethrough",
            "version": env!("CARGO_PKG_VERSION"),
            "endpoints": {
                "items": "/items",
                "item": "/items/{id}",
                "cache_stats": "/cache/stats",
                "cache_clear": "/cache/clear",
                "health": "/health",
                "live": "/livez",
                "ready": "/readyz",
                "metrics": "/metrics",
                "openapi": "/openapi.json",
                "docs": "/docs",
            },
        });
        json_bytes(StatusCode::OK, index.to_string().into())
    } else {
        page(INDEX)
    };
    response
        .headers_mut()
        .insert(header::VARY, HeaderValue::from_static("accept"));
    response
}

fn page(html: &'static str) -> Response {
    let mut response = Html(html).into_response();
    response.headers_mut().insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(CONTENT_SECURITY_POLICY),
    );
    response
}

async fn script() -> Response {
    (
        [(header::CONTENT_TYPE, "text/javascript; charset=utf-8")],
        DOCS_SCRIPT,
    )
        .into_response()
}

/// What a problem's type means: the `type` of every problem leads here.
async fn problem(Path(slug): Path<String>) -> Result<Response, Problem> {
    let uri = format!("/problems/{slug}");
    let kind = Kind::ALL.into_iter().find(|kind| kind.uri() == uri);
    let kind = kind.ok_or_else(|| Problem::new(Kind::RouteNotFound))?;
    let text = format!(
        "{} ({})\n\n{}\n",
        kind.title(),
        kind.status().as_u16(),
        kind.meaning()
    );
    Ok(text.into_response())
}
