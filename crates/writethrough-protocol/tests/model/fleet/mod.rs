//! A model of a whole fleet, for a model checker, driven by the crate's own functions: the states
//! of keys and pages, the nodes, the epoch row and the decisions of reads and writes are not copied
//! here, they are called.
//!
//! # What there is
//!
//! - Two **nodes**, A and B, each a [`writethrough_protocol::Node`]; a few concurrent
//!   **operations**, each on its node: writes, reads of the one item, lists (reads of one of two
//!   pages of the one collection).
//! - Two **cache servers**. Nodes start on redis a; a connection may change to redis b at any time
//!   (a failover, a restart with an old snapshot: a server that was started again is another
//!   server). Every epoch has its own cells in each server: item, collection, two pages. Redis a may
//!   also take over the contents of redis b under living connections: it is a third server then,
//!   and every answer to a command meant for the first one says so.
//! - The **database**: the epoch row, and the number of writes committed, which is the version of
//!   the item and of both pages. Version order is commit order. It may fail over, once, to a standby
//!   that lags: row and version go back, and the timeline is another one.
//!
//! # What is asked
//!
//! An operation that begins after another has ended never sees less: a read returns at least the
//! newest version that any operation which ended before it began had returned or been acknowledged
//! with. Versions are unique and a write takes effect at once, so this is linearizability, of item
//! and pages together. Where an intent may be evicted (assumption A4 broken), only acknowledged
//! writes oblige later reads. A write whose outcome is unknown obliges nobody until it is seen.
//! What a failover of the database has lost obliges nobody either, and no read that begins more than
//! a lease after the failover may return it.
//!
//! # What is one step
//!
//! - A command to a cache server: it is sent, executed and answered at once, and its sender may
//!   then pause for as long as it likes before it looks at the answer. Where that makes a difference
//!   (the lease is asked for after the answer) looking is a step of its own. `MGET` of collection and
//!   page is one step, as are the scripts. The keys of a write are one pipeline: others may come in
//!   between, and if one gets no answer none of the rest does.
//! - A load; the guarded commit with its check of the epoch; a change of the epoch row.
//! - A poll, except in the searches where its answer is a step of its own.
//!
//! # What goes wrong
//!
//! - A command gets **no answer**. From then on it may execute at any time, even after everything
//!   else, or never: lost commands, lost replies and delayed commands are all this. Its sender gives
//!   up or, for `begin` and `end`, may send it again; nothing orders the two. A `get` without an
//!   answer has no effect and its reader goes to the database; it is left out.
//! - A database write gets no answer; it may commit later, while the guard lets it and before its
//!   intent's deadline (assumption A3).
//! - A node **crashes**: its operations never end, what they were about to send may have been sent,
//!   and it starts again knowing nothing.
//! - A value, a page or a fill lease is gone at any time (**evicted**, expired, cleared, flushed); an
//!   intent lapses at its deadline, or is evicted where the search says so.
//! - A node ends the epoch because of **trouble** with some other key.
//! - A connection **changes** to the other server; commands on the way keep going to the first.
//! - A reader is **dropped** while it loads; the break of its lease is a late command.
//!
//! # Time
//!
//! A global clock of a few ticks; a lease is one tick, an intent lasts two, a new epoch is observed
//! for one. Any number of steps fit into one tick and any step may be delayed over any number of
//! ticks, so nodes and operations pause wherever they like. One node's clock may lose a tick in the
//! searches with drift, where the observation is a tick longer. Servers' clocks are the global one.
//! The hold-off is zero: it is a courtesy, safety must not rest on it.
//!
//! # What keeps it small, and loses nothing
//!
//! - A search stops where no read can be stale any more. Of two operations that differ in nothing
//!   the first begins first. Keys that no operation of the search reads are not written.
//! - A decision that is the same whether the lease holds or not is made with the step before it.
//! - Of a node only what decides about its future is part of the state's hash; cells, commands and
//!   writes of epochs that nobody is in any more are forgotten (not in mutants).
//! - What the replica copies from the first server lies under names of epochs that are the first
//!   server's, so nobody looks at it; the copy is a step only where somebody does: in some mutants,
//!   and where the first server takes it over.
//! - A lease that its holder renews is one that does not expire, and any lease may expire at any time;
//!   so a renewal is a step only in the mutant where it does something. A load past the cache is one
//!   step, so reads that share it are reads that take that step together; a load that lasts is a step
//!   of its own only in the mutant where a read joins it.
//!
//! # What is left out
//!
//! Progress (only safety is asked for), a second item, two primaries at once (their rows have different
//! own ids, so they share no key), refusals by the database, failed proposals (a
//! node that proposes and does not hear of it is one that polls later), errors inside a node, the
//! encoding, writes that bypass the protocol.

pub(crate) mod bounds;
pub(crate) mod schedule;
pub(crate) mod state;
pub(crate) mod step;
pub(crate) mod tally;

use stateright::{Model, Property};
use writethrough_protocol::ServerId;

use bounds::{Bounds, Kind};
use schedule::Log;
use state::{Fleet, Key};
use step::Action;
use tally::Tally;

/// The name of the one safety property.
pub(crate) const NEVER_STALE: &str = "no operation sees less than was known before it began";

/// One search: its bounds and what it has come across.
#[derive(Debug)]
pub(crate) struct Search {
    pub(crate) bounds: Bounds,
    pub(crate) ids: [ServerId; 3],
    /// The keys of a write that some read of this search looks at, in the order in which the write
    /// begins and ends them.
    pub(crate) keys: Vec<Key>,
    pub(crate) tally: Tally,
}

impl Search {
    pub(crate) fn new(bounds: Bounds) -> Self {
        let looks_at = |key| {
            let mut kinds = bounds.operations.iter().map(|operation| operation.kind);
            kinds.any(|kind| match kind {
                Kind::Read => key == Key::Item,
                Kind::List(_) => key == Key::List,
                Kind::Write => false,
            })
        };
        Self {
            keys: [Key::Item, Key::List]
                .into_iter()
                .filter(|key| looks_at(*key))
                .collect(),
            bounds,
            ids: ["a", "b", "a with b's data"].map(ServerId::new),
            tally: Tally::default(),
        }
    }
}

impl Model for Search {
    type State = Fleet;
    type Action = Action;

    fn init_states(&self) -> Vec<Fleet> {
        vec![self.first()]
    }

    fn actions(&self, state: &Fleet, actions: &mut Vec<Action>) {
        self.possible(state, actions);
    }

    fn next_state(&self, state: &Fleet, action: Action) -> Option<Fleet> {
        let mut next = state.clone();
        self.step(&mut next, action, &mut Log::default())
            .then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let safety = Property::always(NEVER_STALE, |_, fleet: &Fleet| fleet.stale.is_none());
        let met = self.bounds.must_meet.iter().map(|event| event.property());
        std::iter::once(safety).chain(met).collect()
    }
}
