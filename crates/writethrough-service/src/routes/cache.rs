//! `/cache/clear` and `/cache/stats`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;

use crate::app::App;
use crate::json::{declared_json, json};
use crate::openapi::{ClearErrors, OperatorErrors, ReadErrors};
use crate::problem::Problem;
use crate::wire::{ClearedBody, ClearedStatus, StatsBody};

/// Empties the cache.
///
/// Nobody else waits for it, and the next read of anything is a miss that fills. One runs at a time;
/// those that are asked for meanwhile share the next one.
#[utoipa::path(
    post,
    path = "/cache/clear",
    operation_id = "clearCache",
    tag = "cache",
    security((), ("adminToken" = [])),
    responses(
        (status = 200, description = "The cache is empty", body = ClearedBody),
        ClearErrors, OperatorErrors
    )
)]
pub(super) async fn clear(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Problem> {
    declared_json(&request)?;
    let keys_deleted = app.items()?.clear_cache().await?;
    Ok(json(
        StatusCode::OK,
        &ClearedBody {
            status: ClearedStatus::Cleared,
            keys_deleted,
        },
    ))
}

/// Says how the cache is doing.
///
/// The counts are those of this process since it started.
#[utoipa::path(
    get,
    path = "/cache/stats",
    operation_id = "getCacheStats",
    tag = "cache",
    security((), ("adminToken" = [])),
    responses(
        (status = 200, description = "Counts since the start", body = StatsBody),
        ReadErrors, OperatorErrors
    )
)]
pub(super) async fn stats(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    let items = app.items()?;
    let stats = items.engine().stats();
    let state = items.engine().state();
    let body = StatsBody {
        cached_items: items.cached_items().await,
        total_hits: stats.hits,
        total_misses: stats.misses,
        hit_rate: hit_rate(stats.hits, stats.misses),
        consistency: state.consistency.as_str(),
        mode: state.mode(),
        epoch: state.status.epoch.map(|epoch| epoch.0),
        total_bypasses: stats.bypassed(),
        bypasses: stats
            .bypasses
            .iter()
            .map(|(why, count)| (why.as_str(), *count))
            .collect(),
        coalesced_loads: stats.coalesced,
        refused_fills: stats.refused_fills,
        oversized: stats.oversized,
        declined: stats.declined,
        intents: stats.intents,
        writes: stats.writes,
        indeterminate_writes: stats.indeterminate_writes,
        epoch_changes: stats.epoch_changes,
        cache_errors: stats.cache_errors,
        decode_errors: stats.decode_errors,
        degraded_seconds: (stats.degraded_seconds * 1000.0).round() / 1000.0,
    };
    Ok(json(StatusCode::OK, &body))
}

/// In percent, with two decimals; 0 before the first read.
fn hit_rate(hits: u64, misses: u64) -> f64 {
    let reads = hits.saturating_add(misses);
    if reads == 0 {
        0.0
    } else {
        (hits as f64 / reads as f64 * 10_000.0).round() / 100.0
    }
}

#[cfg(test)]
mod tests {
    use super::hit_rate;

    #[test]
    fn the_rate_is_a_percentage_with_two_decimals() {
        assert_eq!(hit_rate(0, 0), 0.0);
        assert_eq!(hit_rate(2, 1), 66.67);
        assert_eq!(hit_rate(1, 0), 100.0);
    }
}
