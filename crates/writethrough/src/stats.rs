//! Counters and state of the engine, for statistics pages and metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use writethrough_protocol::read::Bypass;
use writethrough_protocol::{Astray, Epoch, ServerId};

/// A counter; relaxed, because nothing is decided by it.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
    pub(crate) coalesced: Counter,
    pub(crate) bypasses: [Counter; Bypass::ALL.len()],
    pub(crate) shared_bypasses: Counter,
    pub(crate) loads: Counter,
    pub(crate) slow_loads: Counter,
    pub(crate) refused_reads: Counter,
    pub(crate) renewed_leases: Counter,
    pub(crate) late_timeouts: Counter,
    pub(crate) refused_fills: Counter,
    pub(crate) oversized: Counter,
    pub(crate) declined: Counter,
    pub(crate) intents: Counter,
    pub(crate) epoch_changes: Counter,
    pub(crate) unannounced_writes: Counter,
    pub(crate) unguarded_writes: Counter,
    pub(crate) refused_writes: Counter,
    pub(crate) writes: Counter,
    pub(crate) indeterminate_writes: Counter,
    pub(crate) decode_errors: Counter,
    pub(crate) encode_errors: Counter,
    pub(crate) cache_errors: Counter,
    pub(crate) degraded_us: Counter,
    pub(crate) abandoned_writes: Counter,
}

impl Counters {
    /// What was counted, and the reads that wait and the loads under way now.
    pub(crate) fn snapshot(&self, waiting: u64, loads_under_way: u64) -> Stats {
        Stats {
            hits: self.hits.get(),
            misses: self.misses.get(),
            coalesced: self.coalesced.get(),
            waiting,
            bypasses: Bypass::ALL.map(|reason| (reason, self.bypasses[reason.index()].get())),
            shared_bypasses: self.shared_bypasses.get(),
            loads: self.loads.get(),
            loads_under_way,
            slow_loads: self.slow_loads.get(),
            refused_reads: self.refused_reads.get(),
            renewed_leases: self.renewed_leases.get(),
            late_timeouts: self.late_timeouts.get(),
            refused_fills: self.refused_fills.get(),
            oversized: self.oversized.get(),
            declined: self.declined.get(),
            intents: self.intents.get(),
            epoch_changes: self.epoch_changes.get(),
            unannounced_writes: self.unannounced_writes.get(),
            unguarded_writes: self.unguarded_writes.get(),
            refused_writes: self.refused_writes.get(),
            writes: self.writes.get(),
            indeterminate_writes: self.indeterminate_writes.get(),
            decode_errors: self.decode_errors.get(),
            encode_errors: self.encode_errors.get(),
            cache_errors: self.cache_errors.get(),
            degraded_seconds: Duration::from_micros(self.degraded_us.get()).as_secs_f64(),
            abandoned_writes: self.abandoned_writes.get(),
        }
    }
}

/// What this engine has counted since it started. Each id of a [`crate::WriteThrough::read_many`] counts
/// as a read of its own, their load as one load, and a [`crate::WriteThrough::invalidate`] as a write.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Stats {
    /// Reads answered from the cache.
    pub hits: u64,
    /// Reads that found nothing and loaded, whether or not their fill was accepted.
    pub misses: u64,
    /// Reads that shared the load of another read.
    pub coalesced: u64,
    /// Reads that wait for the load of another read now.
    pub waiting: u64,
    /// Reads that went to the store without the cache, by reason.
    pub bypasses: [(Bypass, u64); Bypass::ALL.len()],
    /// Of these, reads that shared a load which began after them.
    pub shared_bypasses: u64,
    /// Loads from the store that were begun.
    pub loads: u64,
    /// Loads from the store that are under way now.
    pub loads_under_way: u64,
    /// Loads that took longer than [`crate::Settings::fill_wait`].
    pub slow_loads: u64,
    /// Reads that ended without an answer: too many loads were under way, or one took too long.
    pub refused_reads: u64,
    /// Writes that were given up because others of the same value or collection took all turns
    /// ([`crate::Unavailable::Busy`]).
    pub refused_writes: u64,
    /// Fill leases that were renewed while their load ran.
    pub renewed_leases: u64,
    /// Cache commands of writes that got no answer in time while this process was late itself, so that
    /// the cache was not blamed for it.
    pub late_timeouts: u64,
    /// Fills that came too late, because a write or a clearing came between.
    pub refused_fills: u64,
    /// Values and pages that were served and not cached, because they are longer than
    /// [`crate::Settings::max_value_bytes`] or [`crate::Settings::max_page_bytes`].
    pub oversized: u64,
    /// Values and pages that were served and not cached, because they said so themselves
    /// ([`crate::format::Format::may_be_cached`]).
    pub declined: u64,
    /// Keys announced by writes.
    pub intents: u64,
    /// New epochs seen.
    pub epoch_changes: u64,
    /// Writes that had a value to cache under a key that they had not named: a fault of
    /// the program. The value was not cached, and each ended its epoch.
    pub unannounced_writes: u64,
    /// Writes that never asked for the parameter of their [`crate::Guard`]: a fault of the program. Each
    /// ended the epoch.
    pub unguarded_writes: u64,
    /// Writes acknowledged.
    pub writes: u64,
    /// Writes whose outcome stayed unknown.
    pub indeterminate_writes: u64,
    /// Cached bytes that were not a value of the expected type, or were of another version.
    pub decode_errors: u64,
    /// Values that their format could not write: they were served, and not cached.
    pub encode_errors: u64,
    /// Cache commands that failed.
    pub cache_errors: u64,
    /// Seconds during which this node could not use the cache.
    pub degraded_seconds: f64,
    /// Writes that were ended half-way, because their runtime ended or their operation panicked; not
    /// among the writes whose outcome stayed unknown, although it did.
    pub abandoned_writes: u64,
}

impl Default for Stats {
    fn default() -> Self {
        Counters::default().snapshot(0, 0)
    }
}

impl Stats {
    /// All reads that bypassed the cache.
    #[must_use]
    pub fn bypassed(&self) -> u64 {
        self.bypasses.iter().map(|(_, count)| count).sum()
    }
}

/// What a node does with the cache now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Phase {
    /// It has not seen an epoch yet: reads go to the store, writes wait.
    #[default]
    Unknown,
    /// It waits until no other node reads in an older epoch: reads go to the store, writes wait.
    Observing,
    /// The epoch uses no cache: reads and writes go to the store.
    Bypass,
    /// The epoch uses the cache.
    Cached,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 4] = [Self::Unknown, Self::Observing, Self::Bypass, Self::Cached];

    /// Gives the name for statistics and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Observing => "observing",
            Self::Bypass => "bypass",
            Self::Cached => "cached",
        }
    }
}

/// The engine's state now.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct Status {
    /// What this node does with the cache.
    pub phase: Phase,
    /// The newest epoch seen; none before the first poll.
    pub epoch: Option<Epoch>,
    /// The id of the database's history, which every cache key carries as `@<history>.<epoch>`.
    pub history: Option<String>,
    /// The id of the cache server that this node is connected to.
    pub server: Option<ServerId>,
    /// Whether there is a verified cache connection.
    pub connected: bool,
    /// The background task that has ended, with its runtime or by a panic: this node uses no cache and
    /// writes nothing from then on. None while all run, and after a shutdown.
    pub ended: Option<&'static str>,
    /// Why the last poll of the epoch row failed; none when it succeeded.
    pub fence_error: Option<String>,
    /// Why this node cannot change the epoch row, though it can read it (a missing permission, a database
    /// that turned read-only): it follows the epochs of other nodes and makes none. None when the last
    /// change was not refused.
    pub refused_change: Option<String>,
    /// How long ago the poll began that gave the current read lease; none without a valid one.
    pub lease_age: Option<Duration>,
    /// Why the epoch row that was read last is not believed; none when it is.
    pub astray: Option<Astray>,
    /// The last bypass that this node proposed; none when it never did.
    pub proposed_bypass: Option<ProposedBypass>,
    /// The last load that took longer than [`crate::Settings::fill_wait`], if it was lately.
    pub slow_loads: Option<SlowLoads>,
}

/// A bypass that a node proposed: it ended the epoch for the whole fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProposedBypass {
    /// The epoch that it wanted to end.
    pub epoch: Epoch,
    /// Why.
    pub reason: String,
    /// How long ago.
    pub ago: Duration,
}

/// Loads from the store are slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlowLoads {
    /// How long the last slow load took.
    pub took: Duration,
    /// How long ago it ended.
    pub ago: Duration,
}
