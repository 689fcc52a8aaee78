//! What one search covers: the operations, the budgets, and the rule that is left out, if any.

use std::fmt;
use std::time::Duration;

use writethrough_protocol::Timing;

use super::tally::Event;

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// Reads the item.
    Read,
    /// Reads one page of the collection, `0` or `1`.
    List(usize),
    /// Writes the item, which changes both pages too.
    Write,
}

/// One of the concurrent operations, on the node that executes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Operation {
    pub(crate) kind: Kind,
    pub(crate) node: usize,
}

/// Shorthand for operations, separated by spaces: `W` for a write, `R` for a read, `L` or `M` for a
/// list of one page or the other, then the node, `A` or `B`.
pub(crate) fn operations(text: &str) -> Vec<Operation> {
    text.split_whitespace()
        .map(|word| Operation {
            kind: match word.as_bytes()[0] {
                b'W' => Kind::Write,
                b'L' => Kind::List(0),
                b'M' => Kind::List(1),
                _ => Kind::Read,
            },
            node: usize::from(word.ends_with('B')),
        })
        .collect()
}

/// The bounds of one search. Every count is a budget for the whole schedule.
#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    pub(crate) operations: Vec<Operation>,
    /// The highest epoch number; the first is 1.
    pub(crate) epochs: u64,
    /// Ticks of the clock.
    pub(crate) ticks: u64,
    /// Commands and database writes without an answer, crashes, and epochs ended for some other
    /// key's sake.
    pub(crate) faults: u8,
    /// Connections that change to the other server.
    pub(crate) moves: u8,
    /// Intents that are evicted. Assumption A4 excludes it, so a search that allows it asks only
    /// that acknowledged writes are never hidden.
    pub(crate) evicted_intents: u8,
    /// Ticks that one node's clock may lose against the others.
    pub(crate) drift: u64,
    /// Promotions of the database's standby, which may lack the last commits.
    pub(crate) promotions: u8,
    /// Times that the first server takes over the second's contents under living connections.
    pub(crate) replacements: u8,
    /// Whether a poll and its answer are two steps.
    pub(crate) slow_polls: bool,
    /// Ticks that an intent lasts.
    pub(crate) intent_lifetime: u64,
    /// How long leases last, and how long a new epoch is observed, in ticks.
    pub(crate) timing: Timing,
    /// The rule that is left out.
    pub(crate) mutant: Option<Mutant>,
    /// What the search must come across, or it has shown nothing.
    pub(crate) must_meet: &'static [Event],
}

/// One tick of the clock as the crate's types see it.
pub(crate) const TICK: Duration = Duration::from_secs(1);

impl Bounds {
    /// One epoch, no time and no faults: what the operations can do to each other alone.
    pub(crate) fn calm(text: &str) -> Self {
        Self {
            operations: operations(text),
            epochs: 1,
            ticks: 0,
            faults: 0,
            moves: 0,
            evicted_intents: 0,
            drift: 0,
            promotions: 0,
            replacements: 0,
            slow_polls: false,
            intent_lifetime: 2,
            timing: Timing {
                lease: TICK,
                settle: TICK,
                hold_off: Duration::ZERO,
            },
            mutant: None,
            must_meet: &[],
        }
    }

    /// Three epochs and two ticks: an outage and a return.
    pub(crate) fn outage(text: &str) -> Self {
        Self::calm(text).epochs(3).ticks(2)
    }

    pub(crate) fn epochs(self, epochs: u64) -> Self {
        Self { epochs, ..self }
    }

    pub(crate) fn ticks(self, ticks: u64) -> Self {
        Self { ticks, ..self }
    }

    pub(crate) fn faults(self, faults: u8) -> Self {
        Self { faults, ..self }
    }

    pub(crate) fn moves(self, moves: u8) -> Self {
        Self { moves, ..self }
    }

    /// Lets one intent be evicted, and asks for the weaker guarantee.
    pub(crate) fn evicting(self) -> Self {
        Self {
            evicted_intents: 1,
            ..self
        }
    }

    /// Lets the database fail over to a standby that may lag.
    pub(crate) fn promoting(self) -> Self {
        Self {
            promotions: 1,
            ..self
        }
    }

    /// Lets the first server take over the second's contents.
    pub(crate) fn replacing(self) -> Self {
        Self {
            replacements: 1,
            ..self
        }
    }

    /// Takes a poll and its answer apart.
    pub(crate) fn slow_polls(self) -> Self {
        Self {
            slow_polls: true,
            ..self
        }
    }

    /// Lets one node's clock lose a tick, with a settle time that allows for it.
    pub(crate) fn drifting(mut self) -> Self {
        self.drift = 1;
        self.timing.settle = self.timing.lease + TICK;
        self
    }

    /// The same bounds without one rule.
    pub(crate) fn without(mut self, mutant: Mutant) -> Self {
        self.mutant = Some(mutant);
        match mutant {
            Mutant::Observing => self.timing.settle = Duration::ZERO,
            Mutant::DriftMargin => self.timing.settle = self.timing.lease,
            _ => {}
        }
        self
    }

    /// What the search must come across.
    pub(crate) fn meets(self, must_meet: &'static [Event]) -> Self {
        Self { must_meet, ..self }
    }
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for operation in &self.operations {
            let kind = match operation.kind {
                Kind::Read => "R",
                Kind::List(0) => "L",
                Kind::List(_) => "M",
                Kind::Write => "W",
            };
            write!(f, "{kind}{} ", ["A", "B"][operation.node])?;
        }
        write!(
            f,
            "faults {}, moves {}, epochs {}, ticks {}",
            self.faults, self.moves, self.epochs, self.ticks
        )?;
        for (set, word) in [
            (self.evicted_intents > 0, "an intent is evicted"),
            (self.drift > 0, "a clock drifts"),
            (self.slow_polls, "slow polls"),
            (self.promotions > 0, "a lagging standby is promoted"),
            (
                self.replacements > 0,
                "a server takes over another's contents",
            ),
        ] {
            if set {
                write!(f, ", {word}")?;
            }
        }
        Ok(())
    }
}

/// A rule left out by the driver; the crate itself is never changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Mutant {
    /// A fill stores its value whatever the key holds.
    FillToken,
    /// The read lease is not asked for, neither when a read begins nor after its get.
    LeaseChecks,
    /// The read lease is asked for when a read begins, not after its get.
    LeaseCheckAfterGet,
    /// The read lease is asked for after the get, not when a read begins.
    LeaseCheckBefore,
    /// A new epoch is active at first sight.
    Observing,
    /// The commit does not check the epoch.
    Guard,
    /// Every server passes for the epoch's.
    ServerIdentity,
    /// The commands of an operation go to whatever server its node is connected to by then.
    FixedTarget,
    /// A server's contents are replaced by those of its lagging replica under a living connection.
    ServerContents,
    /// A write whose end failed proposes the next epoch but acknowledges before it is active.
    WaitAfterFailedEnd,
    /// Every proposal is marked settled.
    SettledProposals,
    /// No margin for clock drift in the settle time.
    DriftMargin,
    /// The lease counts from the poll's answer.
    LeaseFromAnswer,
    /// A write is not announced.
    Intent,
    /// The last end of a contended intent keeps its value.
    ContendedEnd,
    /// A break removes whatever the key holds.
    BreakToken,
    /// A read shares a load of its key that it has not seen the lease of.
    JoinByKey,
    /// A collection's stamp is set whatever the collection key holds.
    StampToken,
    /// A page is believed whatever its stamp.
    PageStamp,
    /// A page carries the stamp found when it is stored, not the one it was loaded under.
    StampAtFill,
    /// A begin without an answer is sent again, and the end keeps its value all the same.
    BeginAgainKeepsValue,
    /// An acquire without an answer is sent again under the same token.
    AcquireAgain,
    /// A renewal puts the lease back whatever the key holds.
    RenewToken,
    /// In bypass a read shares a load that began before it did.
    JoinInBypass,
    /// Neither the poll nor the guard compares the history of the database with the row's.
    History,
}

impl Mutant {
    /// Every rule whose loss must show, the ones of the protocol's own table first.
    pub(crate) const NEEDED: [Self; 23] = [
        Self::FillToken,
        Self::LeaseChecks,
        Self::Observing,
        Self::Guard,
        Self::ServerIdentity,
        Self::WaitAfterFailedEnd,
        Self::FixedTarget,
        Self::ServerContents,
        Self::SettledProposals,
        Self::DriftMargin,
        Self::LeaseFromAnswer,
        Self::Intent,
        Self::ContendedEnd,
        Self::BreakToken,
        Self::JoinByKey,
        Self::StampToken,
        Self::PageStamp,
        Self::StampAtFill,
        Self::BeginAgainKeepsValue,
        Self::AcquireAgain,
        Self::RenewToken,
        Self::JoinInBypass,
        Self::History,
    ];

    /// Rules that stand in for each other: the loss of one alone must not show.
    pub(crate) const DOUBLED: [Self; 2] = [Self::LeaseCheckAfterGet, Self::LeaseCheckBefore];

    /// The smallest search that shows what the rule prevents.
    pub(crate) fn search(self) -> Bounds {
        let bounds = match self {
            Self::FillToken | Self::JoinByKey => Bounds::calm("WA RB RB"),
            Self::LeaseChecks
            | Self::LeaseCheckAfterGet
            | Self::LeaseCheckBefore
            | Self::Observing => Bounds::calm("WA RB RB").faults(1).epochs(2).ticks(1),
            Self::SettledProposals => Bounds::calm("WA RB RB").moves(1).epochs(2),
            Self::DriftMargin => Bounds::calm("WA RB RB")
                .faults(1)
                .epochs(2)
                .ticks(1)
                .drifting(),
            Self::LeaseFromAnswer => Bounds::calm("WA RB RB")
                .faults(1)
                .epochs(2)
                .ticks(1)
                .slow_polls(),
            Self::Guard => Bounds::calm("WA RB RB").faults(1).epochs(3).ticks(1),
            Self::ServerIdentity | Self::FixedTarget => Bounds::calm("WA RB RB").moves(1),
            Self::ServerContents => Bounds::calm("WA RB RB"),
            Self::WaitAfterFailedEnd => Bounds::calm("WA RB RB").faults(1).epochs(2).evicting(),
            Self::Intent => Bounds::calm("WA RA RB RB").ticks(1),
            Self::ContendedEnd => Bounds::calm("WA WB RB"),
            Self::BreakToken => Bounds::calm("WA RB RB RB RB").faults(1),
            Self::RenewToken => Bounds::calm("WA RB RB"),
            Self::JoinInBypass => Bounds::calm("WA RB RB"),
            Self::History => Bounds::calm("WA RB").ticks(1).promoting(),
            Self::StampToken => Bounds::calm("WA LB LB"),
            Self::PageStamp => Bounds::calm("WA LB LB MB"),
            Self::StampAtFill => Bounds::calm("WA LB LB LB"),
            Self::BeginAgainKeepsValue => Bounds::calm("WA WB RB").faults(2),
            Self::AcquireAgain => Bounds::calm("WA LB LB LB").faults(1),
        };
        bounds.without(self)
    }

    /// What is left out, in words.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::FillToken => "a fill does not ask for its token",
            Self::LeaseChecks => "nobody asks for the read lease",
            Self::LeaseCheckAfterGet => "nobody asks for the read lease after the get",
            Self::LeaseCheckBefore => "nobody asks for the read lease when a read begins",
            Self::Observing => "a new epoch is not observed",
            Self::Guard => "the commit does not check the epoch",
            Self::ServerIdentity => "every server passes for the epoch's",
            Self::FixedTarget => "commands follow the connection to another server",
            Self::ServerContents => "a server takes over older contents under a living connection",
            Self::WaitAfterFailedEnd => "a failed end does not wait for the next epoch",
            Self::SettledProposals => "every new epoch passes for settled",
            Self::DriftMargin => "the settle time has no margin for drift",
            Self::LeaseFromAnswer => "the lease counts from the poll's answer",
            Self::Intent => "a write is not announced",
            Self::ContendedEnd => "the last end of a contended intent keeps its value",
            Self::BreakToken => "a break does not ask for its token",
            Self::JoinByKey => "a read joins a load because the key is the same",
            Self::StampToken => "a stamp is set without asking for the fill lease",
            Self::PageStamp => "a page is believed whatever its stamp",
            Self::StampAtFill => "a page carries the stamp found when it is stored",
            Self::BeginAgainKeepsValue => "a write begun again keeps its value",
            Self::AcquireAgain => "a fill lease is asked for again under the same token",
            Self::RenewToken => "a fill lease is renewed without asking for its token",
            Self::JoinInBypass => "past the cache, a read shares a load that began before it",
            Self::History => "nobody compares the history of the database with the row's",
        }
    }
}
