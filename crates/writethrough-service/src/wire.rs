//! The JSON that clients send and get. These are not the domain's types, and nothing is decided here.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};
use serde_json::json;
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa::openapi::extensions::ExtensionsBuilder;
use utoipa::openapi::schema::{Object, ObjectBuilder, Type};
use uuid::Uuid;

use crate::item::{Item, Page, Price};

/// A price. It is a number without a format: `double` would make the exact decimal a binary float, and
/// with `multipleOf` a validator that calculates in floats refuses one price in seven.
fn price() -> Object {
    // Generators of Go clients make a number without a format 32 bits wide.
    let go = ExtensionsBuilder::new()
        .add("x-go-type", "exact.Number")
        .add(
            "x-go-type-import",
            json!({"name": "exact", "path": "encoding/json"}),
        );
    ObjectBuilder::new()
        .schema_type(Type::Number)
        .description(Some(
            "An exact decimal from 0 to 99999999.99 with at most two decimals. Answers always have two. \
             Read it into a decimal type where there is one.",
        ))
        .minimum(Some(0))
        .maximum(Some(99_999_999.99))
        .examples([json!(24.5)])
        .extensions(Some(go.build()))
        .build()
}

// These two only describe: `validation` reads.

/// What a new item contains.
#[derive(ToSchema)]
#[schema(as = ItemFields)]
#[allow(dead_code)]
pub(crate) struct ItemFieldsBody {
    /// 1 to 255 characters, no control characters.
    #[schema(
        min_length = 1,
        max_length = 255,
        pattern = r"^[^\x00-\x1f\x7f-\x9f]*$",
        examples("Lamp")
    )]
    name: String,
    /// Free text, without the NUL character.
    #[schema(pattern = r"^[^\x00]*$", examples("Bright, and bends."))]
    description: Option<String>,
    #[schema(schema_with = price)]
    price: f64,
}

/// What an item is to contain, and, if wanted, what the service sets: an item as it was read, with the
/// changes.
#[derive(ToSchema)]
#[schema(as = ItemReplacement)]
#[allow(dead_code)]
pub(crate) struct ItemReplacementBody {
    /// 1 to 255 characters, no control characters.
    #[schema(
        min_length = 1,
        max_length = 255,
        pattern = r"^[^\x00-\x1f\x7f-\x9f]*$",
        examples("Lamp")
    )]
    name: String,
    /// Free text, without the NUL character; removed if left out.
    #[schema(pattern = r"^[^\x00]*$", examples("Bright, and bends."))]
    description: Option<String>,
    #[schema(schema_with = price)]
    price: f64,
    /// The id of the path, or left out.
    #[schema(required = false)]
    id: Uuid,
    /// Ignored: the service sets it.
    #[schema(required = false, format = DateTime)]
    created_at: String,
    /// Ignored: the service sets it.
    #[schema(required = false, format = DateTime)]
    updated_at: String,
    /// The version to replace; 412 if the item has another one. Left out, any version is replaced.
    #[schema(required = false, minimum = 1)]
    version: i64,
}

/// An item.
#[derive(Serialize, ToSchema)]
#[schema(as = Item)]
pub(crate) struct ItemBody<'a> {
    #[schema(value_type = String, format = Uuid, examples("550e8400-e29b-41d4-a716-446655440001"))]
    id: Uuid,
    #[schema(examples("Lamp"))]
    name: &'a str,
    #[schema(required, examples("Bright, and bends."))]
    description: Option<&'a str>,
    #[schema(schema_with = price)]
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
    #[schema(required)]
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

/// Always the same.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DeletedStatus {
    Deleted,
}

/// The answer to `DELETE /items/{id}`.
#[derive(Serialize, ToSchema)]
#[schema(as = Deleted)]
pub(crate) struct DeletedBody {
    #[schema(inline)]
    pub(crate) status: DeletedStatus,
    #[schema(value_type = String, format = Uuid)]
    pub(crate) id: Uuid,
}

/// Always the same.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ClearedStatus {
    Cleared,
}

/// The answer to `POST /cache/clear`.
#[derive(Serialize, ToSchema)]
#[schema(as = Cleared)]
pub(crate) struct ClearedBody {
    #[schema(inline)]
    pub(crate) status: ClearedStatus,
    /// How many keys were removed from the cache.
    pub(crate) keys_deleted: u64,
}

// The words that others choose are described here; the tests hold the answers against the description.

/// What reads are promised: `strict` is linearizable, `textbook` is not, `off` is the database alone.
#[derive(ToSchema)]
#[schema(as = Consistency, rename_all = "lowercase")]
#[allow(dead_code)]
pub(crate) enum ConsistencyName {
    Strict,
    Textbook,
    Off,
}

/// Whether the node uses the cache: `cached`, or `bypass` (it is not usable), `observing` (a new epoch
/// has begun), `unknown` (the database has not said yet); `textbook` and `off` as configured.
#[derive(ToSchema)]
#[schema(as = CacheMode, rename_all = "lowercase")]
#[allow(dead_code)]
pub(crate) enum ModeName {
    Cached,
    Bypass,
    Observing,
    Unknown,
    Textbook,
    Off,
}

/// The answer to `GET /cache/stats`. Counts are those of this process since it started.
#[derive(Serialize, ToSchema)]
#[schema(as = CacheStats)]
pub(crate) struct StatsBody {
    /// Items in the cache that reads may use now; up to a second old, but never older than a write that
    /// this node has acknowledged.
    pub(crate) cached_items: u64,
    /// Reads answered from the cache.
    pub(crate) total_hits: u64,
    /// Reads that found nothing in the cache and loaded.
    pub(crate) total_misses: u64,
    /// Hits in percent of hits and misses, with two decimals.
    #[schema(examples(87.5))]
    pub(crate) hit_rate: f64,
    #[schema(value_type = ConsistencyName)]
    pub(crate) consistency: &'static str,
    #[schema(value_type = ModeName)]
    pub(crate) mode: &'static str,
    /// The epoch in force; null outside strict mode, and before the database was reached.
    #[schema(required)]
    pub(crate) epoch: Option<u64>,
    /// Reads that went to the database without the cache.
    pub(crate) total_bypasses: u64,
    /// The same by reason.
    pub(crate) bypasses: BTreeMap<&'static str, u64>,
    /// Reads that shared the load of another read.
    pub(crate) coalesced_loads: u64,
    /// Fills that came too late and were refused.
    pub(crate) refused_fills: u64,
    /// Items and lists that were too long to be cached.
    pub(crate) oversized: u64,
    /// Lists that were not cached, because their cursor names no item that is there.
    pub(crate) declined: u64,
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

/// `ok`; `degraded` without Redis (reads and writes go on from the database); `down` without the database.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum HealthStatus {
    Ok,
    Degraded,
    Down,
}

/// Whether there is a connection that works.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DependencyStatus {
    Ok,
    Down,
}

impl DependencyStatus {
    pub(crate) fn of(up: bool) -> Self {
        if up { Self::Ok } else { Self::Down }
    }
}

/// `ok`, `starting` (waiting for the database) or `draining` (about to stop).
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ProbeStatus {
    Ok,
    Starting,
    Draining,
}

/// `redis`, `in-process`, or `none` when the cache is switched off.
#[derive(ToSchema)]
#[schema(as = CacheBackend, rename_all = "kebab-case")]
#[allow(dead_code)]
pub(crate) enum CacheBackendName {
    Redis,
    InProcess,
    None,
}

/// `postgres`, or `embedded` for SQLite.
#[derive(ToSchema)]
#[schema(as = DatabaseBackend, rename_all = "lowercase")]
#[allow(dead_code)]
pub(crate) enum DatabaseBackendName {
    Postgres,
    Embedded,
}

/// The answer to `GET /health`.
#[derive(Serialize, ToSchema)]
#[schema(as = Health)]
pub(crate) struct HealthBody {
    pub(crate) status: HealthStatus,
    /// Why it is not well, or what an operator should know although it is: slow loads from the
    /// database. Null when there is nothing to say.
    #[schema(
        required,
        examples("there is no verified connection to the cache; the log says why")
    )]
    pub(crate) reason: Option<String>,
    /// The service's name.
    #[schema(examples("api"))]
    pub(crate) service: String,
    pub(crate) dependencies: DependenciesBody,
    pub(crate) backends: BackendsBody,
    #[schema(value_type = ConsistencyName)]
    pub(crate) consistency: &'static str,
    #[schema(value_type = ModeName)]
    pub(crate) mode: &'static str,
    /// The epoch in force; null outside strict mode, and before the database was reached.
    #[schema(required)]
    pub(crate) epoch: Option<u64>,
    /// The program's version.
    pub(crate) version: &'static str,
    pub(crate) uptime_seconds: u64,
}

/// How each dependency is.
#[derive(Serialize, ToSchema)]
#[schema(as = Dependencies)]
pub(crate) struct DependenciesBody {
    pub(crate) redis: DependencyStatus,
    pub(crate) postgres: DependencyStatus,
}

/// What plays the part of each dependency.
#[derive(Serialize, ToSchema)]
#[schema(as = Backends)]
pub(crate) struct BackendsBody {
    #[schema(value_type = CacheBackendName)]
    pub(crate) cache: &'static str,
    #[schema(value_type = DatabaseBackendName)]
    pub(crate) database: &'static str,
}

/// The answer to the probes.
#[derive(Serialize, ToSchema)]
#[schema(as = Probe)]
pub(crate) struct ProbeBody {
    pub(crate) status: ProbeStatus,
}
