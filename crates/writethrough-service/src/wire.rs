//! The JSON that clients send and get. These are not the domain's types, and nothing is decided here.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};
use serde_json::value::RawValue;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::item::{Item, Page, Price};

/// What `POST /items` and `PUT /items/{id}` take. It only describes; [`crate::validation`] reads.
#[derive(ToSchema)]
#[schema(as = ItemFields)]
#[allow(dead_code)]
pub(crate) struct ItemFieldsBody {
    /// 1 to 255 characters, no control characters.
    #[schema(min_length = 1, max_length = 255, examples("Lamp"))]
    name: String,
    /// Free text.
    #[schema(examples("Bright, and bends."))]
    description: Option<String>,
    /// An exact decimal with at most two decimals.
    #[schema(
        minimum = 0,
        maximum = 99_999_999.99,
        multiple_of = 0.01,
        examples(24.50)
    )]
    price: f64,
}

/// An item.
#[derive(Serialize, ToSchema)]
#[schema(as = Item)]
pub(crate) struct ItemBody<'a> {
    #[schema(value_type = String, format = Uuid, examples("550e8400-e29b-41d4-a716-446655440001"))]
    id: Uuid,
    #[schema(examples("Lamp"))]
    name: &'a str,
    description: Option<&'a str>,
    /// An exact decimal, always with two decimals.
    #[schema(value_type = f64, examples(24.50))]
    #[serde(serialize_with = "as_number")]
    price: Price,
    /// RFC 3339, UTC, to the microsecond, by the database's clock.
    #[schema(format = DateTime, examples("2025-01-02T03:04:05.678901Z"))]
    created_at: String,
    #[schema(format = DateTime, examples("2025-01-02T03:04:05.678901Z"))]
    updated_at: String,
    /// 1 at first; one more with every update.
    #[schema(minimum = 1, examples(1))]
    version: i64,
}

fn as_number<S: Serializer>(price: &Price, serializer: S) -> Result<S::Ok, S::Error> {
    RawValue::from_string(price.to_string())
        .map_err(serde::ser::Error::custom)?
        .serialize(serializer)
}

impl<'a> From<&'a Item> for ItemBody<'a> {
    fn from(item: &'a Item) -> Self {
        Self {
            id: item.id.uuid(),
            name: &item.fields.name,
            description: item.fields.description.as_deref(),
            price: item.fields.price,
            created_at: item.created_at.to_string(),
            updated_at: item.updated_at.to_string(),
            version: item.version,
        }
    }
}

/// A part of the list.
#[derive(Serialize, ToSchema)]
#[schema(as = Page)]
pub(crate) struct PageBody<'a> {
    /// Newest first.
    items: Vec<ItemBody<'a>>,
    /// How many items this part has.
    count: usize,
    /// Pass it as `cursor` to get the next part; null at the end.
    next_cursor: Option<String>,
}

impl<'a> From<&'a Page> for PageBody<'a> {
    fn from(page: &'a Page) -> Self {
        Self {
            items: page.items.iter().map(ItemBody::from).collect(),
            count: page.items.len(),
            next_cursor: page.next.map(|cursor| cursor.to_string()),
        }
    }
}

/// The answer to `DELETE /items/{id}`.
#[derive(Serialize, ToSchema)]
#[schema(as = Deleted)]
pub(crate) struct DeletedBody {
    #[schema(examples("deleted"))]
    pub(crate) status: &'static str,
    #[schema(value_type = String, format = Uuid)]
    pub(crate) id: Uuid,
}

/// The answer to `POST /cache/clear`.
#[derive(Serialize, ToSchema)]
#[schema(as = Cleared)]
pub(crate) struct ClearedBody {
    #[schema(examples("cleared"))]
    pub(crate) status: &'static str,
    /// How many keys were removed from the cache.
    pub(crate) keys_deleted: u64,
}

/// The answer to `GET /cache/stats`. Counts are those of this process since it started.
#[derive(Serialize, ToSchema)]
#[schema(as = CacheStats)]
pub(crate) struct StatsBody {
    /// Items in the cache that reads may use now; up to a second old.
    pub(crate) cached_items: u64,
    /// Reads answered from the cache.
    pub(crate) total_hits: u64,
    /// Reads that found nothing in the cache and loaded.
    pub(crate) total_misses: u64,
    /// Hits in percent of hits and misses, with two decimals.
    #[schema(examples(87.5))]
    pub(crate) hit_rate: f64,
    /// `strict`, `textbook` or `off`.
    pub(crate) consistency: &'static str,
    /// `cached`, `bypass`, `observing`, `unknown`, `textbook` or `off`.
    pub(crate) mode: &'static str,
    /// The epoch in force, in strict mode.
    pub(crate) epoch: Option<u64>,
    /// Reads that went to the database without the cache.
    pub(crate) total_bypasses: u64,
    /// The same by reason.
    pub(crate) bypasses: BTreeMap<&'static str, u64>,
    /// Reads that shared the load of another read.
    pub(crate) coalesced_loads: u64,
    /// Fills that came too late and were refused.
    pub(crate) refused_fills: u64,
    /// Keys announced by writes.
    pub(crate) intents: u64,
    /// Writes acknowledged.
    pub(crate) writes: u64,
    /// Writes whose outcome stayed unknown.
    pub(crate) indeterminate_writes: u64,
    /// New epochs seen.
    pub(crate) epoch_changes: u64,
    /// Cache commands that failed.
    pub(crate) cache_errors: u64,
    /// Cached bytes that could not be read.
    pub(crate) decode_errors: u64,
    /// Time during which this node could not use the cache, in seconds.
    pub(crate) degraded_seconds: f64,
}

/// The answer to `GET /health`.
#[derive(Serialize, ToSchema)]
#[schema(as = Health)]
pub(crate) struct HealthBody {
    /// `ok`; `degraded` without Redis (reads and writes go on from the database); `down` without
    /// the database.
    #[schema(examples("ok"))]
    pub(crate) status: &'static str,
    /// The service's name.
    #[schema(examples("api"))]
    pub(crate) service: String,
    pub(crate) dependencies: DependenciesBody,
    /// What plays the part of each dependency.
    pub(crate) backends: BackendsBody,
    /// `strict`, `textbook` or `off`.
    pub(crate) consistency: &'static str,
    /// `cached`, `bypass`, `observing`, `unknown`, `textbook` or `off`.
    pub(crate) mode: &'static str,
    /// The epoch in force, in strict mode.
    pub(crate) epoch: Option<u64>,
    /// The program's version.
    pub(crate) version: &'static str,
    pub(crate) uptime_seconds: u64,
}

/// `ok` or `down` for each dependency.
#[derive(Serialize, ToSchema)]
#[schema(as = Dependencies)]
pub(crate) struct DependenciesBody {
    #[schema(examples("ok"))]
    pub(crate) redis: &'static str,
    #[schema(examples("ok"))]
    pub(crate) postgres: &'static str,
}

/// What plays the part of each dependency.
#[derive(Serialize, ToSchema)]
#[schema(as = Backends)]
pub(crate) struct BackendsBody {
    /// `redis`, `in-process`, or `none` when the cache is switched off.
    pub(crate) cache: &'static str,
    /// `postgres` or `embedded`.
    pub(crate) database: &'static str,
}

/// The answer to the probes.
#[derive(Serialize, ToSchema)]
#[schema(as = Probe)]
pub(crate) struct ProbeBody {
    /// `ok`, `starting` or `draining`.
    pub(crate) status: &'static str,
}
