//! Query parameters. One rule for all routes: a parameter that the route does not know is refused by name,
//! since a filter that is misspelt and ignored gives a wrong answer that looks right.

use axum::extract::rejection::QueryRejection;
use axum::extract::{MatchedPath, Query, Request};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;

use crate::problem::{FieldError, Kind, Problem};

/// How many wrong parameters are named; a few are enough to go on.
pub(super) const MOST_ERRORS: usize = 20;

/// The parameters in their order, repeated ones included.
pub(super) type QueryPairs = Result<Query<Vec<(String, String)>>, QueryRejection>;

/// The layer around the routes of the API: all but the list take no parameter.
pub(super) async fn refuse(
    route: MatchedPath,
    query: QueryPairs,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let reads = [Method::GET, Method::HEAD].contains(request.method());
    if !(route.as_str() == "/items" && reads) {
        let Query(pairs) = query.map_err(|_| malformed())?;
        if !pairs.is_empty() {
            let names = pairs.iter().take(MOST_ERRORS);
            return Err(wrong(
                names
                    .map(|(name, _)| unknown(name, "leave it out"))
                    .collect(),
            ));
        }
    }
    Ok(next.run(request).await)
}

/// The error of a parameter that the route does not know.
pub(super) fn unknown(name: &str, remedy: &str) -> FieldError {
    FieldError::new(
        shown(name),
        format!("is not a parameter of this route; {remedy}"),
    )
}

/// A name as errors repeat it.
pub(super) fn shown(name: &str) -> String {
    name.chars().take(100).collect()
}

/// A query string that cannot be read.
pub(super) fn malformed() -> Problem {
    wrong(vec![FieldError::new(
        "query",
        "must be a valid query string",
    )])
}

/// The problem of parameters that are wrong.
pub(super) fn wrong(errors: Vec<FieldError>) -> Problem {
    Problem::new(Kind::InvalidParameter)
        .detail("Correct the parameters listed under `errors` and send the request again.")
        .errors(errors)
}
