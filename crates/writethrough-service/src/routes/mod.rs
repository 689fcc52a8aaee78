//! Routes: thin handlers that turn requests into calls and answers into responses.

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Redirect, Response};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::middleware;
use crate::openapi;
use crate::problem::{Kind, Problem};

mod cache;
mod failure;
mod health;
mod items;
mod pages;
mod preconditions;
mod query;

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
        .route_layer(from_fn(query::refuse))
        .split_for_parts();
    let paths: Arc<[String]> = description.paths.paths.keys().cloned().collect();
    router
        .merge(pages::router(&description))
        .method_not_allowed_fallback(other_method)
        .fallback(move |method, uri| no_route(method, uri, paths))
        // Bodies are read by `json::read_body`, which has a limit of its own.
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn_with_state(app.clone(), middleware::serve))
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::Config;
    use crate::route::ROUTES;

    /// A route that is missing in the table has no metrics of its own, and nobody protects it.
    #[tokio::test]
    async fn the_table_has_the_routes_of_the_router() {
        let router = router(Arc::new(App::new(&Config::default())));
        let routed = format!("{router:?}");
        let routed: BTreeSet<&str> = routed
            .split('"')
            .filter(|part| part.starts_with('/') && !part.contains("__private"))
            .collect();
        let table: BTreeSet<&str> = ROUTES.iter().map(|route| route.path).collect();
        assert_eq!(routed, table);
    }
}
