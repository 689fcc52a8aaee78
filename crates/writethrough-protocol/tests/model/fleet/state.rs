//! One state of the fleet: the database, two cache servers, two nodes, the operations, and the
//! commands that are still under way.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use bytes::Bytes;
use writethrough_protocol::page::Page;
use writethrough_protocol::{Acquire, EpochRow, KeyState, Monotonic, Node, Sighting, Token};

/// A version of the item, and of the page that shows it: the number of writes committed before.
pub(crate) type Version = u8;

/// The cells of one epoch in one cache server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Cells {
    pub(crate) item: KeyState,
    pub(crate) list: KeyState,
    pub(crate) pages: [Option<Page>; 2],
}

impl Cells {
    pub(crate) const EMPTY: Self = Self {
        item: KeyState::Absent,
        list: KeyState::Absent,
        pages: [None, None],
    };

    pub(crate) fn key(&mut self, key: Key) -> &mut KeyState {
        match key {
            Key::Item => &mut self.item,
            Key::List => &mut self.list,
        }
    }
}

/// A key of a write or read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Key {
    Item,
    List,
}

/// What an eviction removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Cell {
    Key(Key),
    Page(usize),
}

/// Where an operation's commands go: decided with its permit, not changed later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Target {
    pub(crate) epoch: u64,
    pub(crate) server: usize,
}

/// A command to a cache server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Command {
    pub(crate) operation: usize,
    pub(crate) target: Target,
    pub(crate) key: Key,
    pub(crate) verb: Verb,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Verb {
    Acquire(Token),
    Fill(Token, Version),
    FillPage(usize, Token, Version),
    Break(Token),
    Renew(Token),
    Begin(Token),
    End(Token, Option<Version>),
}

/// A database write that was sent and whose outcome its writer will never learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LateWrite {
    pub(crate) operation: usize,
    pub(crate) epoch: u64,
    /// The tick before which it commits or is lost (A3); `None` when nothing was announced.
    pub(crate) deadline: Option<u64>,
}

/// What a write does after its epoch was ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Then {
    Restart,
    Acknowledge(Version),
}

/// What a write does after its intents were ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Ending {
    /// The write was committed as this version.
    Committed(Version),
    /// The guard refused it: start again.
    Fenced,
    /// It had no effect and is reported as failed.
    Failed,
}

/// Where an operation stands: the step that it takes next.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum At {
    Idle,
    /// A read has its permit: `get`.
    Get(Target),
    /// The answer of the `get` is in hand; the lease has not been asked for since.
    Got(Target, KeyState, Option<Page>),
    Acquire(Target),
    /// The answer of `acquire_fill` is in hand.
    Answered(Target, Acquire),
    /// Load from the database, under a fill lease or a stamp.
    Load(Target, Token),
    /// Loaded this version: fill.
    Loaded(Target, Token, Version),
    /// Somebody else loads under this lease.
    Await(Target, Token),
    /// Loaded this version beside another's lease: fill nothing.
    LoadedBeside(Target, Token, Version),
    /// Read the database, fill nothing.
    Store,
    /// Mutant: read this version in the database, and not yet returned it.
    LoadedInBypass(Version),
    /// A write that has to start again.
    Again,
    Begin {
        target: Target,
        place: usize,
        announced: u64,
        again: bool,
    },
    Commit {
        epoch: u64,
        target: Option<Target>,
        announced: u64,
        again: bool,
    },
    End {
        target: Target,
        place: usize,
        announced: u64,
        again: bool,
        ending: Ending,
    },
    Propose(u64, Then),
    /// Wait until an epoch after this one is active.
    Observe(u64, Then),
    Done,
}

/// One operation under way: where it stands, and the version that it must not go behind.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Progress {
    pub(crate) floor: Version,
    /// It began when every lease from before the promotion had run out.
    pub(crate) after_promotion: bool,
    pub(crate) at: At,
}

/// One node: the crate's own state of it, and what the world around it knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) view: Node,
    /// The server at the other end of its connection.
    pub(crate) link: usize,
    /// Ticks that its clock has lost.
    pub(crate) lag: u64,
    /// A poll under way: what it read, and when it started.
    pub(crate) poll: Option<(Sighting, Monotonic)>,
}

/// What the database's standby has received so far.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Standby {
    pub(crate) row: EpochRow,
    pub(crate) row_timeline: u8,
    pub(crate) version: Version,
}

/// A stale read: the operation and the version it returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Stale {
    pub(crate) operation: usize,
    pub(crate) version: Version,
}

/// What may still go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Budget {
    pub(crate) faults: u8,
    pub(crate) moves: u8,
    pub(crate) evicted_intents: u8,
    pub(crate) drift: u64,
    pub(crate) promotions: u8,
    pub(crate) replacements: u8,
}

/// One state of the fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fleet {
    pub(crate) now: u64,
    /// The database: the epoch row and the number of writes committed.
    pub(crate) row: EpochRow,
    pub(crate) version: Version,
    /// The history that the database is in, and the one that the row was written in.
    pub(crate) timeline: u8,
    pub(crate) row_timeline: u8,
    /// The standby, while one may still be promoted.
    pub(crate) standby: Option<Standby>,
    /// The newest version ever committed, and those that a promotion has lost: above the first, up
    /// to the second.
    pub(crate) newest: Version,
    pub(crate) lost: (Version, Version),
    /// When the standby was promoted.
    pub(crate) promoted_at: Option<u64>,
    pub(crate) late_writes: Vec<LateWrite>,
    pub(crate) nodes: [Member; 2],
    /// By server, then by epoch number less one. Shared with the states before: most steps change
    /// none of them.
    pub(crate) caches: [Arc<Vec<Cells>>; 3],
    /// The first server has taken over the contents of the second: it is the third server now.
    pub(crate) replaced: bool,
    /// The server of each epoch so far; `None` for bypass.
    pub(crate) servers: Vec<Option<usize>>,
    pub(crate) late: Vec<Command>,
    pub(crate) operations: Vec<Progress>,
    /// The newest version known by an operation that has ended.
    pub(crate) floor: Version,
    pub(crate) budget: Budget,
    pub(crate) stale: Option<Stale>,
    /// Per node: whether a read is still to end there, so that its lease matters.
    pub(crate) reading: [bool; 2],
}

impl Fleet {
    /// The time on a node's own clock.
    pub(crate) fn clock(&self, node: usize) -> Monotonic {
        Monotonic(super::bounds::TICK * u32::try_from(self.now - self.nodes[node].lag).unwrap_or(0))
    }

    pub(crate) fn cells(&mut self, target: Target) -> &mut Cells {
        let place = usize::try_from(target.epoch - 1).unwrap_or(0);
        &mut Arc::make_mut(&mut self.caches[target.server])[place]
    }

    /// Whether the database has lost this version.
    pub(crate) fn is_lost(&self, version: Version) -> bool {
        self.lost.0 < version && version <= self.lost.1
    }
}

/// Two states that differ only in how they were reached hash alike: of a node only what decides
/// about its future counts, such as the end of its lease while it has not yet passed.
impl Hash for Fleet {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.now.hash(hasher);
        (self.row.number, self.row.settled, self.version).hash(hasher);
        (self.timeline, self.row_timeline, &self.standby).hash(hasher);
        (self.newest, self.lost, self.promoted_at, self.replaced).hash(hasher);
        self.late_writes.hash(hasher);
        for (place, node) in self.nodes.iter().enumerate() {
            let now = self.clock(place);
            let row = node.view.row();
            row.map(|row| (row.number, row.settled)).hash(hasher);
            node.view
                .lease_until()
                .filter(|until| self.reading[place] && *until > now)
                .hash(hasher);
            match node.view.write_permit(now) {
                writethrough_protocol::WritePermit::Wait(until) => until.hash(hasher),
                _ => true.hash(hasher),
            }
            (node.link, node.lag, node.view.astray()).hash(hasher);
            let poll = node.poll.as_ref();
            poll.map(|(sighting, at)| (&sighting.row, sighting.in_its_history, at))
                .hash(hasher);
        }
        self.caches.hash(hasher);
        self.servers.hash(hasher);
        self.late.hash(hasher);
        self.operations.hash(hasher);
        (self.floor, self.budget, self.stale).hash(hasher);
    }
}

/// The stored bytes of a version.
pub(crate) fn bytes(version: Version) -> Bytes {
    const DIGITS: [&[u8]; 4] = [b"0", b"1", b"2", b"3"];
    Bytes::from_static(DIGITS[usize::from(version)])
}

/// The version that stored bytes stand for.
pub(crate) fn version(bytes: &Bytes) -> Version {
    bytes[0] - b'0'
}
