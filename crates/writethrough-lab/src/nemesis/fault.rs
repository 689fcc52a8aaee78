//! The kinds of fault: their names, and what each of them takes hold of.
//!
//! Nothing is broken here.

use std::{fmt, str::FromStr};

macro_rules! faults {
    ($($(#[$doc:meta])* $kind:ident = $name:literal,)*) => {
        /// A kind of fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Fault {
            $($(#[$doc])* $kind,)*
        }

        impl Fault {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$kind,)*];

            /// The name, as in the option `--faults`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }
        }
    };
}

faults! {
    /// Redis is killed, and started again at the end with what it saved last, which may be nothing.
    KillRedis = "kill-redis",
    /// Redis is stopped (SIGSTOP) and goes on at the end with all that was sent to it meanwhile.
    PauseRedis = "pause-redis",
    /// Whatever passes between any node and Redis is late.
    SlowRedis = "slow-redis",
    /// All keys of Redis are removed, over and over.
    FlushRedis = "flush-redis",
    /// Redis is full of other people's keys, more of them are written, and it evicts the least recently used ones.
    EvictRedis = "evict-redis",
    /// Redis is killed and starts without data at once.
    RestartRedisEmpty = "restart-redis-empty",
    /// A snapshot is taken at the start; at the end Redis is killed and starts with it.
    RestartRedisOldSnapshot = "restart-redis-old-snapshot",
    /// The replica stops following at the start; at the end the primary is killed and the replica takes its place.
    LaggingFailover = "lagging-failover",
    /// The replica is let go at the start; at the end the primary takes over its data, by being its replica for a moment, and
    /// goes on as the same process with the same connections.
    TakeOverRedis = "take-over-redis",
    /// The replica takes the primary's place, and some nodes are told at the start, the others at the end.
    SplitRedis = "split-redis",
    /// One node's connections to Redis are reset, and no new one is made.
    NodeCutFromRedis = "node-cut-from-redis",
    /// One node's connections to Redis stay open and carry nothing; what was sent arrives at the end.
    NodeStalledFromRedis = "node-stalled-from-redis",
    /// One node's connections to Postgres are reset, and no new one is made.
    NodeCutFromPostgres = "node-cut-from-postgres",
    /// One node is killed (SIGKILL) and started again at the end.
    KillNode = "kill-node",
    /// One node is stopped (SIGSTOP) and goes on at the end. At most 4 s, since a write is assumed to reach the database
    /// within 5 s of its announcement.
    PauseNode = "pause-node",
    /// Postgres is stopped, and started again at the end.
    RestartPostgres = "restart-postgres",
    /// Postgres ends all connections of clients, over and over.
    KillPostgresConnections = "kill-postgres-connections",
}

/// What a fault takes hold of. Two faults that take hold of the same thing are not in force at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hold {
    /// The Redis servers, and which of them is the primary.
    Redis,
    /// How long an intent can be trusted to stay in Redis: not while a node is stopped half-way through a write *and* Redis
    /// evicts the least recently used keys. The promise excludes that (an intent is not evicted between its placing and
    /// the commit), so it is not tried.
    Intents,
    /// The Postgres server.
    Postgres,
    /// The link of a node to Redis.
    RedisLink(usize),
    /// The link of a node to Postgres.
    PostgresLink(usize),
    /// The process of a node.
    Node(usize),
}

impl Fault {
    /// Whether the fault concerns one node.
    #[must_use]
    pub fn concerns_one_node(self) -> bool {
        matches!(
            self,
            Self::NodeCutFromRedis
                | Self::NodeStalledFromRedis
                | Self::NodeCutFromPostgres
                | Self::KillNode
                | Self::PauseNode
        )
    }

    /// What the fault takes hold of, in order, in a cluster of `nodes` nodes, when it concerns `node`.
    #[must_use]
    pub fn holds(self, node: usize, nodes: usize) -> Vec<Hold> {
        match self {
            Self::KillRedis
            | Self::PauseRedis
            | Self::FlushRedis
            | Self::RestartRedisEmpty
            | Self::RestartRedisOldSnapshot
            | Self::LaggingFailover
            | Self::TakeOverRedis
            | Self::SplitRedis => vec![Hold::Redis],
            Self::EvictRedis => vec![Hold::Redis, Hold::Intents],
            Self::SlowRedis => (0..nodes).map(Hold::RedisLink).collect(),
            Self::NodeCutFromRedis | Self::NodeStalledFromRedis => vec![Hold::RedisLink(node)],
            Self::NodeCutFromPostgres => vec![Hold::PostgresLink(node)],
            Self::KillNode => vec![Hold::Node(node)],
            Self::PauseNode => vec![Hold::Intents, Hold::Node(node)],
            Self::RestartPostgres | Self::KillPostgresConnections => vec![Hold::Postgres],
        }
    }

    /// The nodes that cannot be expected to answer meanwhile: down themselves, or out of reach of Postgres.
    #[must_use]
    pub fn takes_down(self, node: usize, nodes: usize) -> Vec<usize> {
        match self {
            Self::RestartPostgres => (0..nodes).collect(),
            Self::NodeCutFromPostgres | Self::KillNode | Self::PauseNode => vec![node],
            _ => Vec::new(),
        }
    }

    /// Whether a write under way may be left without an answer, because its connection to Postgres is reset.
    #[must_use]
    pub fn resets_writes(self) -> bool {
        matches!(self, Self::RestartPostgres | Self::KillPostgresConnections)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.iter().find(|fault| fault.name() == text.trim());
        known.copied().ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|fault| fault.name()).collect();
            format!("{text:?} is none of {}", names.join(", "))
        })
    }
}

/// The kinds of fault to choose from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults(pub Vec<Fault>);

impl FromStr for Faults {
    type Err = String;

    /// Parses `all`, `none`, or names with commas between them.
    fn from_str(text: &str) -> Result<Self, String> {
        let faults = match text.trim() {
            "all" => Ok(Fault::ALL.to_vec()),
            "none" => Ok(Vec::new()),
            names => names.split(',').map(str::parse).collect(),
        };
        let mut faults: Vec<Fault> = faults?;
        faults.sort_unstable();
        faults.dedup();
        Ok(Self(faults))
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return formatter.write_str("none");
        }
        if self.0.len() == Fault::ALL.len() {
            return formatter.write_str("all");
        }
        let names: Vec<&str> = self.0.iter().map(|fault| fault.name()).collect();
        formatter.write_str(&names.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_shown() {
        for fault in Fault::ALL {
            assert_eq!(fault.to_string().parse::<Fault>(), Ok(*fault));
        }
        assert!(
            "kill-redis2"
                .parse::<Fault>()
                .unwrap_err()
                .contains("kill-node")
        );
        for text in ["all", "none", "kill-redis,kill-node"] {
            assert_eq!(text.parse::<Faults>().unwrap().to_string(), text);
        }
        assert_eq!("kill-node, kill-node".parse::<Faults>().unwrap().0.len(), 1);
        for wrong in ["", "kill-redis,", "everything"] {
            assert!(wrong.parse::<Faults>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn holds_are_in_order_so_that_faults_cannot_wait_for_each_other() {
        for fault in Fault::ALL {
            let holds = fault.holds(1, 3);
            assert!(!holds.is_empty() && holds.is_sorted(), "{fault}");
        }
    }
}
