//! Metrics, and the text of a scrape. Handles are resolved once; what the engine and the pool count
//! themselves is read when somebody scrapes.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use axum::http::{Method, StatusCode};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use writethrough::{ReadOutcome, Stats};

use crate::engine::State;
use crate::exposition::{self, Format};
use crate::middleware::access::Refusal;
use crate::route::{ROUTES, Route};
use crate::store::{Operation, PoolUse};
use crate::telemetry::export::SPANS;
use crate::telemetry::log::lost_lines;

/// Bounds of the duration histograms, in seconds: a hit takes tens of microseconds, a write in an
/// outage seconds. Few, because each is a time series for each combination of labels; the bounds of
/// the alerts are among them.
const BUCKETS: [f64; 9] = [0.00025, 0.001, 0.0025, 0.01, 0.05, 0.1, 0.5, 2.5, 10.0];

/// The label of every path without a route, so that nobody can make up labels.
const OTHER: &str = "other";

const METHODS: [&str; 6] = ["GET", "HEAD", "POST", "PUT", "DELETE", "other"];

const STATUSES: [u16; 19] = [
    200, 201, 304, 400, 404, 405, 408, 412, 413, 414, 415, 422, 431, 500, 501, 502, 503, 504, 0,
];

/// Why a request was turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shed {
    /// The limit of requests at once.
    InFlight,
    /// The limit of a request's time.
    Deadline,
    /// The limit of connections: it came on a spare one.
    Connections,
}

/// Why a connection was closed by the server alone, or never opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// Idle for the longest time when all places were taken.
    Idle,
    /// Its client did not read an answer.
    Stalled,
    /// The system gave none, for want of file descriptors for example.
    NotAccepted,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    route: &'static str,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StoreLabels {
    operation: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WriteLabels {
    operation: &'static str,
    part: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TraceLabel {
    trace_id: String,
}

type RequestHistogram = HistogramWithExemplars<TraceLabel>;

fn request_histogram() -> RequestHistogram {
    RequestHistogram::new(BUCKETS.into_iter())
}

fn duration_histogram() -> Histogram {
    Histogram::new(BUCKETS)
}

/// One slot for each combination that can occur, resolved when it first does.
struct RequestDurations {
    family: Family<RequestLabels, RequestHistogram, fn() -> RequestHistogram>,
    slots: Box<[OnceLock<RequestHistogram>]>,
}

impl RequestDurations {
    fn handle(
        &self,
        method: &Method,
        route: Option<&Route>,
        status: StatusCode,
    ) -> &RequestHistogram {
        let place = |names: &[&str], name: &str| {
            names
                .iter()
                .position(|known| *known == name)
                .unwrap_or(names.len() - 1)
        };
        let method = place(&METHODS, method.as_str());
        let route = route
            .and_then(|route| ROUTES.iter().position(|known| known == route))
            .unwrap_or(ROUTES.len());
        let status = STATUSES
            .iter()
            .position(|known| *known == status.as_u16())
            .unwrap_or(STATUSES.len() - 1);
        let slot = (method * (ROUTES.len() + 1) + route) * STATUSES.len() + status;
        self.slots[slot].get_or_init(|| {
            self.family.get_or_create_owned(&RequestLabels {
                method: METHODS[method],
                route: ROUTES.get(route).map_or(OTHER, |route| route.path),
                status: STATUSES[status],
            })
        })
    }
}

/// Where a write spent its time.
#[derive(Debug, Clone, Copy)]
pub struct WriteTiming {
    /// Waiting for the cache.
    pub cache: Duration,
    /// In the store.
    pub store: Duration,
    /// In total.
    pub total: Duration,
}

/// A kind of write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteKind {
    /// Creating an item.
    Create,
    /// Replacing one.
    Update,
    /// Removing one.
    Delete,
}

impl WriteKind {
    const ALL: [(Self, &'static str); 3] = [
        (Self::Create, "create"),
        (Self::Update, "update"),
        (Self::Delete, "delete"),
    ];
}

/// What the engine and the store count themselves, and is read at the time of a scrape.
pub trait Live: Send + Sync {
    /// The engine's counters.
    fn stats(&self) -> Stats;

    /// The engine's state.
    fn state(&self) -> State;

    /// The use of the store's connections.
    fn pool_use(&self) -> PoolUse;
}

/// Everything that is counted.
pub struct Metrics {
    registry: Registry,
    requests: RequestDurations,
    in_flight: Gauge,
    shed_in_flight: Counter,
    shed_deadline: Counter,
    /// In the order of `Refusal::ALL`.
    refused: [Counter; Refusal::ALL.len()],
    shed_connections: Counter,
    /// By [`Dropped`].
    dropped: [Counter; 3],
    connections: Gauge,
    /// For each operation: succeeded, failed.
    store: [[Histogram; 2]; 5],
    /// Hit, miss, coalesced, bypass.
    reads: [Histogram; 4],
    /// For each kind of write: redis, postgres, total.
    writes: [[Histogram; 3]; 3],
    live: Arc<OnceLock<Weak<dyn Live>>>,
}

impl Metrics {
    /// Metrics with everything at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::default();

        let requests = RequestDurations {
            family: Family::new_with_constructor(request_histogram as fn() -> RequestHistogram),
            slots: std::iter::repeat_with(OnceLock::new)
                .take(METHODS.len() * (ROUTES.len() + 1) * STATUSES.len())
                .collect(),
        };
        registry.register_with_unit(
            "http_server_request_duration",
            "Time from the request's head to the response's head",
            Unit::Seconds,
            requests.family.clone(),
        );
        let in_flight = Gauge::default();
        registry.register(
            "http_server_active_requests",
            "Requests that are being served",
            in_flight.clone(),
        );
        let connections = Gauge::default();
        registry.register(
            "http_server_connections",
            "Client connections that are open",
            connections.clone(),
        );
        let shed = Family::<ReasonLabel, Counter>::default();
        registry.register(
            "http_server_shed_requests",
            "Requests turned away",
            shed.clone(),
        );
        let refused = Family::<ReasonLabel, Counter>::default();
        registry.register(
            "http_server_refused_requests",
            "Requests that their sender may not make",
            refused.clone(),
        );

        let family = Family::<ReasonLabel, Counter>::default();
        registry.register(
            "http_server_dropped_connections",
            "Client connections that the server closed, or could not open, for want of room or progress",
            family.clone(),
        );
        let dropped = ["idle", "stalled", "not_accepted"]
            .map(|reason| family.get_or_create_owned(&ReasonLabel { reason }));

        let store_family =
            Family::<StoreLabels, Histogram, fn() -> Histogram>::new_with_constructor(
                duration_histogram as fn() -> Histogram,
            );
        registry.register_with_unit(
            "db_client_operation_duration",
            "Time of a database operation, with the wait for a connection",
            Unit::Seconds,
            store_family.clone(),
        );
        let store = Operation::ALL.map(|operation| {
            ["ok", "error"].map(|outcome| {
                let labels = StoreLabels {
                    operation: operation.as_str(),
                    outcome,
                };
                store_family.get_or_create_owned(&labels)
            })
        });

        let read_family =
            Family::<OutcomeLabel, Histogram, fn() -> Histogram>::new_with_constructor(
                duration_histogram as fn() -> Histogram,
            );
        registry.register_with_unit(
            "writethrough_read_duration",
            "Time of a read, from the cache or the database",
            Unit::Seconds,
            read_family.clone(),
        );
        let reads = ["hit", "miss", "coalesced", "bypass"]
            .map(|outcome| read_family.get_or_create_owned(&OutcomeLabel { outcome }));

        let write_family =
            Family::<WriteLabels, Histogram, fn() -> Histogram>::new_with_constructor(
                duration_histogram as fn() -> Histogram,
            );
        registry.register_with_unit(
            "writethrough_write_duration",
            "Time of an acknowledged write, in the cache, in the database and in total",
            Unit::Seconds,
            write_family.clone(),
        );
        let writes = WriteKind::ALL.map(|(_, operation)| {
            ["redis", "postgres", "total"]
                .map(|part| write_family.get_or_create_owned(&WriteLabels { operation, part }))
        });

        registry.register(
            "writethrough_build",
            "The program's version",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
        );
        let live = Arc::new(OnceLock::new());
        registry.register_collector(Box::new(LiveCollector { live: live.clone() }));

        Self {
            registry,
            requests,
            in_flight,
            shed_in_flight: shed.get_or_create_owned(&ReasonLabel {
                reason: "in_flight",
            }),
            refused: Refusal::ALL.map(|refusal| {
                refused.get_or_create_owned(&ReasonLabel {
                    reason: refusal.as_str(),
                })
            }),
            shed_deadline: shed.get_or_create_owned(&ReasonLabel { reason: "deadline" }),
            shed_connections: shed.get_or_create_owned(&ReasonLabel {
                reason: "connections",
            }),
            dropped,
            connections,
            store,
            reads,
            writes,
            live,
        }
    }

    /// Tells the metrics where to read the engine's and the pool's own numbers.
    pub fn observe(&self, live: Weak<dyn Live>) {
        let _ = self.live.set(live);
    }

    /// Counts a request. `trace_id` becomes an exemplar when the request is traced.
    pub(crate) fn request(
        &self,
        method: &Method,
        route: Option<&Route>,
        status: StatusCode,
        duration: Duration,
        trace_id: Option<&str>,
    ) {
        let exemplar = trace_id.map(|id| TraceLabel {
            trace_id: id.to_owned(),
        });
        self.requests
            .handle(method, route, status)
            .observe(duration.as_secs_f64(), exemplar, None);
    }

    /// Counts a request that was refused because its head could not be read.
    pub fn unreadable(&self, status: StatusCode) {
        // Counts as `other`, whatever stood there.
        self.request(&Method::CONNECT, None, status, Duration::ZERO, None);
    }

    /// Counts a request that is turned away.
    pub fn shed(&self, reason: Shed) {
        match reason {
            Shed::InFlight => self.shed_in_flight.inc(),
            Shed::Deadline => self.shed_deadline.inc(),
            Shed::Connections => self.shed_connections.inc(),
        };
    }

    /// Counts a request that its sender may not make.
    pub fn refused(&self, refusal: Refusal) {
        self.refused[refusal as usize].inc();
    }

    /// Counts a connection that is closed, or not opened.
    pub fn dropped(&self, reason: Dropped) {
        self.dropped[reason as usize].inc();
    }

    /// The gauge of requests that are being served.
    #[must_use]
    pub fn in_flight(&self) -> &Gauge {
        &self.in_flight
    }

    /// The gauge of open client connections.
    #[must_use]
    pub fn connections(&self) -> &Gauge {
        &self.connections
    }

    /// Counts an operation of the store.
    pub fn store_operation(&self, operation: Operation, duration: Duration, ok: bool) {
        let [succeeded, failed] = &self.store[operation as usize];
        let histogram = if ok { succeeded } else { failed };
        histogram.observe(duration.as_secs_f64());
    }

    /// Counts a read that was answered.
    pub fn read(&self, outcome: ReadOutcome, duration: Duration) {
        let [hit, miss, coalesced, bypass] = &self.reads;
        let histogram = match outcome {
            ReadOutcome::Hit => hit,
            ReadOutcome::Filled | ReadOutcome::Unfilled => miss,
            ReadOutcome::Coalesced => coalesced,
            ReadOutcome::Bypassed(_) => bypass,
        };
        histogram.observe(duration.as_secs_f64());
    }

    /// Counts an acknowledged write.
    pub fn write(&self, kind: WriteKind, timing: &WriteTiming) {
        let [redis, postgres, total] = &self.writes[kind as usize];
        redis.observe(timing.cache.as_secs_f64());
        postgres.observe(timing.store.as_secs_f64());
        total.observe(timing.total.as_secs_f64());
    }

    /// The text of a scrape.
    ///
    /// # Errors
    ///
    /// None that can be met in practice: the text is written to memory.
    pub fn text(&self, format: Format) -> Result<String, std::fmt::Error> {
        let mut text = String::with_capacity(64 * 1024);
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(match format {
            Format::OpenMetrics => text,
            Format::Prometheus => exposition::prometheus_text(&text),
        })
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads what others count, at the time of a scrape.
#[derive(Debug)]
struct LiveCollector {
    live: Arc<OnceLock<Weak<dyn Live>>>,
}

const MODES: [&str; 6] = [
    "cached",
    "bypass",
    "observing",
    "unknown",
    "textbook",
    "off",
];

impl Collector for LiveCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let exported = encoder.encode_descriptor(
            "otel_exported_spans",
            "Spans of traces that were sent",
            None,
            MetricType::Counter,
        )?;
        ConstCounter::new(SPANS.exported()).encode(exported)?;
        counters(
            &mut encoder,
            "otel_dropped_spans",
            "Spans of traces that were lost, by reason",
            "reason",
            &SPANS.dropped(),
        )?;
        let lost = encoder.encode_descriptor(
            "log_lost_lines",
            "Lines of the log that were lost, because standard error was not read",
            None,
            MetricType::Counter,
        )?;
        ConstCounter::new(lost_lines() as u64).encode(lost)?;
        let Some(live) = self.live.get().and_then(Weak::upgrade) else {
            return Ok(());
        };
        let stats = live.stats();
        let state = live.state();
        let status = &state.status;
        let pool = live.pool_use();
        let encoder = &mut encoder;

        let reads = [
            ("hit", stats.hits),
            ("miss", stats.misses),
            ("coalesced", stats.coalesced),
            ("bypass", stats.bypassed()),
        ];
        counters(
            encoder,
            "writethrough_reads",
            "Reads by outcome",
            "outcome",
            &reads,
        )?;
        let bypasses = stats
            .bypasses
            .map(|(reason, count)| (reason.as_str(), count));
        counters(
            encoder,
            "writethrough_bypassed_reads",
            "Reads that went to the database without the cache, by reason",
            "reason",
            &bypasses,
        )?;
        for (name, help, value) in [
            ("writethrough_writes", "Writes acknowledged", stats.writes),
            (
                "writethrough_indeterminate_writes",
                "Writes whose outcome stayed unknown",
                stats.indeterminate_writes,
            ),
            (
                "writethrough_abandoned_writes",
                "Writes that were ended half-way, by a panic or the end of their runtime",
                stats.abandoned_writes,
            ),
            (
                "writethrough_intents",
                "Keys announced by writes",
                stats.intents,
            ),
            (
                "writethrough_refused_fills",
                "Fills that came too late and were refused",
                stats.refused_fills,
            ),
            (
                "writethrough_oversized",
                "Values and pages that were too long to be cached",
                stats.oversized,
            ),
            (
                "writethrough_declined",
                "Pages that were not cached, because their cursor names no item that is there",
                stats.declined,
            ),
            (
                "writethrough_unannounced_writes",
                "Writes with a value under a key that they had not announced: a fault of the program",
                stats.unannounced_writes,
            ),
            (
                "writethrough_unguarded_writes",
                "Writes that did not ask for their guard: a fault of the program",
                stats.unguarded_writes,
            ),
            (
                "writethrough_epoch_changes",
                "New epochs seen",
                stats.epoch_changes,
            ),
            (
                "writethrough_decode_errors",
                "Cached bytes that were not a value of the expected type",
                stats.decode_errors,
            ),
            (
                "writethrough_cache_errors",
                "Cache commands that failed",
                stats.cache_errors,
            ),
            ("writethrough_loads", "Loads from the database", stats.loads),
            (
                "writethrough_slow_loads",
                "Loads from the database that took longer than 250 ms",
                stats.slow_loads,
            ),
            (
                "writethrough_shared_bypasses",
                "Reads past the cache that shared the load of another",
                stats.shared_bypasses,
            ),
            (
                "writethrough_refused_reads",
                "Reads that were refused: too many loads, or one that took too long",
                stats.refused_reads,
            ),
            (
                "writethrough_refused_writes",
                "Writes that were refused: others of the same item or list took all turns",
                stats.refused_writes,
            ),
            (
                "writethrough_renewed_leases",
                "Fill leases renewed while their load ran",
                stats.renewed_leases,
            ),
            (
                "writethrough_late_timeouts",
                "Cache commands without an answer in time while this node was late itself",
                stats.late_timeouts,
            ),
        ] {
            let counter = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(value).encode(counter)?;
        }
        let degraded = encoder.encode_descriptor(
            "writethrough_degraded",
            "Time during which this node could not use the cache",
            Some(&Unit::Seconds),
            MetricType::Counter,
        )?;
        ConstCounter::new(stats.degraded_seconds).encode(degraded)?;
        gauge(
            encoder,
            "writethrough_loads_under_way",
            "Loads from the database under way now",
            None,
            stats.loads_under_way as f64,
        )?;

        if let Some(epoch) = status.epoch {
            gauge(
                encoder,
                "writethrough_epoch",
                "The newest epoch seen",
                None,
                epoch.0 as f64,
            )?;
        }
        let modes: Vec<_> = MODES
            .iter()
            .map(|mode| (*mode, f64::from(u8::from(*mode == state.mode()))))
            .collect();
        gauges(
            encoder,
            "writethrough_mode",
            "1 for the mode this node is in",
            "mode",
            &modes,
        )?;
        if let Some(age) = status.lease_age {
            gauge(
                encoder,
                "writethrough_read_lease_age",
                "Time since the poll that gave the read lease",
                Some(&Unit::Seconds),
                age.as_secs_f64(),
            )?;
        }
        for (name, help, value) in [
            (
                "writethrough_cache_connected",
                "1 with a verified cache connection",
                status.connected,
            ),
            (
                "writethrough_fence_reachable",
                "1 when the epoch row was last read",
                status.fence_error.is_none(),
            ),
        ] {
            gauge(encoder, name, help, None, f64::from(u8::from(value)))?;
        }
        let idle = pool.open.saturating_sub(pool.used);
        let states = [("idle", idle as f64), ("used", pool.used as f64)];
        gauges(
            encoder,
            "db_client_connections",
            "Connections of the pool, by state",
            "state",
            &states,
        )?;
        gauge(
            encoder,
            "db_client_connections_limit",
            "The most connections the pool opens",
            None,
            pool.limit as f64,
        )?;
        gauge(
            encoder,
            "db_client_connections_waiting",
            "Requests that wait for a connection",
            None,
            pool.waiting as f64,
        )?;
        counters(
            encoder,
            "db_client_refused_operations",
            "Database operations that were refused before they were sent, by reason",
            "reason",
            &[
                ("busy_row", pool.refused_at_row),
                ("no_connection", pool.refused_without_connection),
            ],
        )
    }
}

fn counters(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &'static str,
    values: &[(&'static str, u64)],
) -> Result<(), std::fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (value, count) in values {
        let labels = [(label, *value)];
        ConstCounter::new(*count).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauges(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &'static str,
    values: &[(&'static str, f64)],
) -> Result<(), std::fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (value, number) in values {
        let labels = [(label, *value)];
        ConstGauge::new(*number).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    value: f64,
) -> Result<(), std::fmt::Error> {
    let gauge = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
    ConstGauge::new(value).encode(gauge)
}
