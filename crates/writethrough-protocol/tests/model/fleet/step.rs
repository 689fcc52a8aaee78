//! Every step of the fleet: which are possible in a state, and what each does. All decisions and
//! all changes of a key are the crate's own; a mutant is a call left out or given a wrong argument.

use std::sync::Arc;
use std::time::Duration;

use writethrough_protocol::page::{self, Page};
use writethrough_protocol::read::{self, Bypass, Next, PageNext};
use writethrough_protocol::write::{self, AfterBegin, AfterEnd, AfterWrite, Outcome};
use writethrough_protocol::{
    Acquire, Epoch, EpochRow, HistoryId, KeyState, Mode, Node, Proposal, ReadPermit, Sighting,
    Token, WritePermit,
};

use super::Search;
use super::bounds::{Kind, Mutant, TICK};
use super::schedule::Log;
use super::state::{
    At, Budget, Cell, Cells, Command, Ending, Fleet, Key, LateWrite, Member, Progress, Stale,
    Standby, Target, Then, Verb, Version, bytes, version,
};
use super::tally::Event;

/// A step of the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Time passes; the clock of one node may not notice.
    Tick {
        slow: Option<usize>,
    },
    /// A node polls the epoch row, in one step or in two.
    Poll(usize),
    PollSent(usize),
    PollAnswered(usize),
    /// A node marks the row settled.
    Settle(usize),
    /// A node proposes what the crate tells it to.
    Propose(usize),
    /// A node ends the epoch because a command about some other key failed.
    Trouble(usize),
    /// A node's connection is now to the other server.
    Move(usize),
    /// The replica copies the first server's contents.
    Copy,
    /// The first server becomes a replica of the second for a moment and takes over its contents:
    /// from then on it is another server, on the connections that led to the first one.
    Replace,
    /// A node learns that its connection leads to a replaced server.
    Notice(usize),
    /// Mutant: the same, and it passes for the server that it was.
    Demote,
    /// The database's standby receives what the primary has committed.
    Replicate,
    /// The standby takes over with what it has received; the rest is lost.
    Promote,
    /// A cell is gone: evicted, expired, cleared or flushed.
    Evict(Target, Cell),
    /// A command whose sender has given up executes.
    Late(usize),
    /// A database write whose sender has given up is executed.
    LateWrite(usize),
    /// A node dies with its operations and starts again knowing nothing.
    Crash(usize),
    /// An operation takes its next step.
    Operation(usize, Way),
}

/// How an operation's next step goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Way {
    /// As it should.
    Well,
    /// No answer; the operation gives up on it. The command may execute at any time from now on,
    /// or never.
    NoAnswer,
    /// No answer; the operation sends the same command again.
    NoAnswerAgain,
    /// A waiting read looks at the key again.
    LookAgain,
    /// A waiting read has waited long enough: it loads beside the lease that it saw.
    LoadBeside,
    /// A read is dropped while it loads under its lease: it breaks the lease, now or later.
    Drop,
    /// Mutant: a read that loads puts its lease back.
    Renew,
    /// A read shares what another one of its process has loaded.
    Share(usize),
    /// Mutant: a read that begins shares a load of the same key.
    Join(usize),
}

/// The token of an operation's intents, or of its fill lease.
pub(crate) fn token_of(operation: usize) -> Token {
    Token(operation as u128 + 1)
}

fn ticks(count: u64) -> Duration {
    TICK * u32::try_from(count).unwrap_or(0)
}

impl Search {
    fn mutant(&self, mutant: Mutant) -> bool {
        self.bounds.mutant == Some(mutant)
    }

    /// Whether reads oblige later reads, or acknowledged writes alone do.
    pub(crate) fn weak(&self) -> bool {
        self.bounds.evicted_intents > 0
    }

    pub(crate) fn first(&self) -> Fleet {
        let row = EpochRow {
            history: HistoryId::new("0"),
            number: Epoch(1),
            mode: Mode::Cached(self.ids[0].clone()),
            settled: true,
        };
        let mut view = Node::new(self.bounds.timing);
        view.connection_changed(Some(self.ids[0].clone()));
        let mut fleet = Fleet {
            now: 0,
            row: row.clone(),
            version: 0,
            timeline: 0,
            row_timeline: 0,
            standby: (self.bounds.promotions > 0).then(|| Standby {
                row: row.clone(),
                row_timeline: 0,
                version: 0,
            }),
            newest: 0,
            lost: (0, 0),
            promoted_at: None,
            late_writes: Vec::new(),
            nodes: std::array::from_fn(|_| Member {
                view: view.clone(),
                link: 0,
                lag: 0,
                poll: None,
            }),
            caches: std::array::from_fn(|_| {
                Arc::new(vec![Cells::EMPTY; self.bounds.epochs as usize])
            }),
            replaced: false,
            servers: vec![Some(0)],
            late: Vec::new(),
            operations: vec![
                Progress {
                    floor: 0,
                    after_promotion: false,
                    at: At::Idle
                };
                self.bounds.operations.len()
            ],
            floor: 0,
            budget: Budget {
                faults: self.bounds.faults,
                moves: self.bounds.moves,
                evicted_intents: self.bounds.evicted_intents,
                drift: self.bounds.drift,
                promotions: self.bounds.promotions,
                replacements: self.bounds.replacements,
            },
            stale: None,
            reading: [true; 2],
        };
        for node in 0..2 {
            let now = fleet.clock(node);
            let sighting = self.sighting(&fleet);
            fleet.nodes[node].view.saw(&sighting, Some(now), now);
        }
        fleet
    }

    /// The epoch row as a poll sees it now.
    fn sighting(&self, s: &Fleet) -> Sighting {
        Sighting {
            row: s.row.clone(),
            in_its_history: s.row_timeline == s.timeline || self.mutant(Mutant::History),
            trouble_age: None,
        }
    }

    // ---- what is possible ----------------------------------------------------------------------

    pub(crate) fn possible(&self, s: &Fleet, out: &mut Vec<Action>) {
        if s.stale.is_some() || !self.still_matters(s) {
            return;
        }
        for place in 0..s.operations.len() {
            self.possible_of(s, place, out);
        }
        for node in 0..2 {
            self.possible_on(s, node, out);
        }
        out.extend((0..s.late.len()).map(Action::Late));
        out.extend((0..s.late_writes.len()).map(Action::LateWrite));
        for server in 0..3 {
            for (place, cells) in s.caches[server].iter().enumerate() {
                let target = Target {
                    epoch: place as u64 + 1,
                    server,
                };
                for (key, state) in [(Key::Item, &cells.item), (Key::List, &cells.list)] {
                    let evictable = match state {
                        KeyState::Absent => false,
                        KeyState::Value(_) | KeyState::FillLease(_) => true,
                        KeyState::Intent(_) => s.budget.evicted_intents > 0,
                    };
                    if evictable {
                        out.push(Action::Evict(target, Cell::Key(key)));
                    }
                }
                for (page, stored) in cells.pages.iter().enumerate() {
                    if stored.is_some() {
                        out.push(Action::Evict(target, Cell::Page(page)));
                    }
                }
            }
        }
        // With every rule in place nobody ever looks at what the replica has copied: it is under
        // the names of epochs that are another server's. So only their mutants need the step.
        let copied = [
            Mutant::ServerIdentity,
            Mutant::FixedTarget,
            Mutant::ServerContents,
        ];
        // So does a search where the first server takes over what the replica has copied.
        if (copied.into_iter().any(|mutant| self.mutant(mutant)) || s.budget.replacements > 0)
            && s.nodes.iter().all(|node| node.link == 0)
        {
            out.push(Action::Copy);
            if self.mutant(Mutant::ServerContents) {
                out.push(Action::Demote);
            }
        }
        if s.budget.replacements > 0 {
            out.push(Action::Replace);
        }
        if s.budget.promotions > 0 {
            out.push(Action::Replicate);
            out.push(Action::Promote);
        }
        if s.now < self.bounds.ticks {
            out.push(Action::Tick { slow: None });
            if s.budget.drift > 0 {
                out.extend((0..2).map(|node| Action::Tick { slow: Some(node) }));
            }
        }
    }

    /// Whether any read can still be stale: one that has not begun, or one that has something to
    /// be behind of.
    fn still_matters(&self, s: &Fleet) -> bool {
        let reads = s.operations.iter().zip(&self.bounds.operations);
        reads
            .filter(|(_, operation)| operation.kind != Kind::Write)
            .any(|(progress, _)| match progress.at {
                At::Idle => true,
                At::Done => false,
                _ => progress.floor > 0 || progress.after_promotion,
            })
    }

    fn possible_on(&self, s: &Fleet, node: usize, out: &mut Vec<Action>) {
        let member = &s.nodes[node];
        if !self.bounds.slow_polls {
            out.push(Action::Poll(node));
        } else if member.poll.is_none() {
            out.push(Action::PollSent(node));
        } else {
            out.push(Action::PollAnswered(node));
        }
        if s.replaced && member.link == 0 {
            out.push(Action::Notice(node));
        }
        let now = s.clock(node);
        if !s.row.settled && member.view.should_settle(now) == Some(s.row.number) {
            out.push(Action::Settle(node));
        }
        let seen = member.view.row().map(|row| row.number);
        let astray = member.view.astray().is_some();
        if (seen == Some(s.row.number) || astray) && self.epochs_left(s) {
            out.push(Action::Propose(node));
            if s.budget.faults > 0 && s.row.mode != Mode::Bypass && !astray {
                out.push(Action::Trouble(node));
            }
        }
        if s.budget.moves > 0 {
            out.push(Action::Move(node));
        }
        let busy = self.bounds.operations.iter().zip(&s.operations);
        if s.budget.faults > 0
            && busy.into_iter().any(|(operation, progress)| {
                operation.node == node && !matches!(progress.at, At::Idle | At::Done)
            })
        {
            out.push(Action::Crash(node));
        }
    }

    /// Whether another epoch is within the bounds.
    fn epochs_left(&self, s: &Fleet) -> bool {
        (s.servers.len() as u64) < self.bounds.epochs
    }

    fn possible_of(&self, s: &Fleet, place: usize, out: &mut Vec<Action>) {
        let progress = &s.operations[place];
        let operation = self.bounds.operations[place];
        let faults = s.budget.faults > 0;
        let mut push = |way| out.push(Action::Operation(place, way));
        match &progress.at {
            At::Done => {}
            At::Idle => {
                // Of two operations that differ in nothing, the first one listed begins first.
                let twin = self.bounds.operations[..place].iter().zip(&s.operations);
                if twin
                    .into_iter()
                    .any(|(other, progress)| *other == operation && progress.at == At::Idle)
                {
                    return;
                }
                push(Way::Well);
                if self.mutant(Mutant::JoinByKey) {
                    for other in self.loads_of(s, place, |token| token.is_some()) {
                        push(Way::Join(other));
                    }
                }
                if self.mutant(Mutant::JoinInBypass) {
                    for other in self.loads_of(s, place, |token| token.is_none()) {
                        push(Way::Join(other));
                    }
                }
            }
            At::Await(_, lease) => {
                push(Way::LookAgain);
                push(Way::LoadBeside);
                for other in self.loads_of(s, place, |token| token == Some(*lease)) {
                    push(Way::Share(other));
                }
            }
            At::Load(_, lease) => {
                push(Way::Well);
                if self.mutant(Mutant::RenewToken) {
                    push(Way::Renew);
                }
                if faults && *lease == token_of(place) && operation.kind == Kind::Read {
                    push(Way::Drop);
                }
                for other in self.loads_of(s, place, |token| token == Some(*lease)) {
                    push(Way::Share(other));
                }
            }
            At::Acquire(_) => {
                push(Way::Well);
                if faults {
                    push(Way::NoAnswer);
                    if self.mutant(Mutant::AcquireAgain) {
                        push(Way::NoAnswerAgain);
                    }
                }
            }
            At::Begin { .. } | At::End { .. } => {
                push(Way::Well);
                if faults {
                    push(Way::NoAnswer);
                    push(Way::NoAnswerAgain);
                }
            }
            At::Loaded(..) | At::Commit { .. } => {
                push(Way::Well);
                if self.mutant(Mutant::RenewToken) && operation.kind != Kind::Write {
                    push(Way::Renew);
                }
                if faults {
                    push(Way::NoAnswer);
                }
            }
            At::Propose(..) => {
                if self.epochs_left(s) {
                    push(Way::Well);
                }
            }
            _ => push(Way::Well),
        }
    }

    /// The reads of the same key on the same node that have loaded: under a token that fits, or past
    /// the cache.
    fn loads_of(
        &self,
        s: &Fleet,
        place: usize,
        fits: impl Fn(Option<Token>) -> bool,
    ) -> Vec<usize> {
        (0..s.operations.len())
            .filter(|other| *other != place)
            .filter(|other| self.bounds.operations[*other] == self.bounds.operations[place])
            .filter(|other| match s.operations[*other].at {
                At::Loaded(_, token, _) | At::LoadedBeside(_, token, _) => fits(Some(token)),
                At::LoadedInBypass(_) => fits(None),
                _ => false,
            })
            .collect()
    }

    // ---- what it does --------------------------------------------------------------------------

    /// Takes one step. `false` when it would change nothing.
    pub(crate) fn step(&self, s: &mut Fleet, action: Action, log: &mut Log) -> bool {
        let changed = match action {
            Action::Tick { slow } => self.tick(s, slow, log),
            Action::Poll(node) => {
                let now = s.clock(node);
                let sighting = self.sighting(s);
                self.saw(s, node, sighting, Some(now), log)
            }
            Action::PollSent(node) => {
                s.nodes[node].poll = Some((self.sighting(s), s.clock(node)));
                log.on(node, || format!("polls: the row says {}", log_row(&s.row)));
                true
            }
            Action::PollAnswered(node) => match s.nodes[node].poll.take() {
                Some((sighting, started)) => {
                    let started = match self.mutant(Mutant::LeaseFromAnswer) {
                        true => s.clock(node),
                        false => started,
                    };
                    self.saw(s, node, sighting, Some(started), log);
                    true
                }
                None => false,
            },
            Action::Settle(node) => {
                let number = s.row.number;
                s.row = s.row.clone().settle(number);
                log.on(node, || format!("marks epoch {number} settled"));
                true
            }
            Action::Propose(node) => {
                let sighting = self.sighting(s);
                match s.nodes[node].view.proposal(&sighting, s.clock(node)) {
                    Some(proposal) => self.propose(s, node, proposal, log),
                    None => false,
                }
            }
            Action::Trouble(node) => {
                s.budget.faults -= 1;
                log.on(node, || "has trouble with the cache".to_owned());
                let proposal = Node::bypass_from(s.row.number);
                self.propose(s, node, proposal, log)
            }
            Action::Move(node) => {
                s.budget.moves -= 1;
                let first = if s.replaced { 2 } else { 0 };
                let member = &mut s.nodes[node];
                member.link = if member.link == 1 { first } else { 1 };
                let reported = match self.mutant(Mutant::ServerIdentity) {
                    true => 0,
                    false => member.link,
                };
                member
                    .view
                    .connection_changed(Some(self.ids[reported].clone()));
                let link = member.link;
                log.on(node, || format!("is now connected to {}", server(link)));
                true
            }
            Action::Copy => {
                let copy = s.caches[0].clone();
                let changed = copy != s.caches[1];
                s.caches[1] = copy;
                log.line(|| format!("{}: copies the contents of {}", server(1), server(0)));
                changed
            }
            Action::Replace => {
                s.budget.replacements -= 1;
                s.replaced = true;
                s.caches[2] = s.caches[1].clone();
                log.line(|| format!("{}: takes over the contents of {}", server(0), server(1)));
                true
            }
            Action::Notice(node) => {
                let member = &mut s.nodes[node];
                member.link = 2;
                member.view.connection_changed(Some(self.ids[2].clone()));
                log.on(node, || {
                    format!("notices that it is connected to {}", server(2))
                });
                true
            }
            Action::Replicate => {
                let standby = Standby {
                    row: s.row.clone(),
                    row_timeline: s.row_timeline,
                    version: s.version,
                };
                let changed = s.standby.as_ref() != Some(&standby);
                s.standby = Some(standby);
                log.line(|| format!("standby: has everything up to v{}", s.version));
                changed
            }
            Action::Promote => self.promote(s, log),
            Action::Demote => {
                let changed = s.caches[0] != s.caches[1];
                s.caches[0] = s.caches[1].clone();
                log.line(|| format!("{}: takes over the contents of {}", server(0), server(1)));
                changed
            }
            Action::Evict(target, cell) => {
                let cells = s.cells(target);
                let was = match cell {
                    Cell::Page(page) => {
                        cells.pages[page] = None;
                        page_name(page)
                    }
                    Cell::Key(key) => {
                        let state = cells.key(key);
                        let intent = matches!(state, KeyState::Intent(_));
                        *state = KeyState::Absent;
                        if intent {
                            s.budget.evicted_intents -= 1;
                        }
                        name(key)
                    }
                };
                log.line(|| {
                    format!(
                        "{}: {was}@{} is evicted or expires",
                        server(target.server),
                        target.epoch
                    )
                });
                true
            }
            Action::Late(index) => {
                let command = s.late.remove(index);
                let words = self.execute(s, command, None, log);
                log.line(|| format!("{}: executes late: {words}", server(command.target.server)));
                true
            }
            Action::LateWrite(index) => {
                let write = s.late_writes.remove(index);
                let late = write.deadline.is_some_and(|deadline| s.now >= deadline);
                let fenced = self.refuses(s, write.epoch);
                if !late && !fenced {
                    s.newest += 1;
                    s.version = s.newest;
                    self.tally.count(Event::LateWrite);
                    log.line(|| {
                        format!(
                            "database: {} commits late, as v{}",
                            self.label(write.operation),
                            s.version
                        )
                    });
                }
                !late && !fenced
            }
            Action::Crash(node) => self.crash(s, node, log),
            Action::Operation(place, way) => self.advance(s, place, way, log),
        };
        if changed {
            self.tidy(s);
        }
        changed
    }

    /// The standby becomes the primary: a new timeline, without what it had not received.
    fn promote(&self, s: &mut Fleet, log: &mut Log) -> bool {
        s.budget.promotions -= 1;
        let Some(standby) = s.standby.take() else {
            return false;
        };
        log.line(|| {
            let lost = match standby.version < s.version {
                true => format!(", v{} is lost", s.version),
                false => String::new(),
            };
            format!(
                "database: the standby is promoted with v{}{lost}",
                standby.version
            )
        });
        s.lost = (standby.version, s.version);
        s.version = standby.version;
        s.row = standby.row;
        s.row_timeline = standby.row_timeline;
        s.timeline += 1;
        s.promoted_at = Some(s.now);
        // What was sent to the old primary is not executed by the new one.
        s.late_writes.clear();
        // Nobody is obliged by what the database itself has lost.
        s.floor = s.floor.min(s.version);
        for progress in &mut s.operations {
            progress.floor = progress.floor.min(s.version);
        }
        true
    }

    /// Whether the guard refuses a commit announced in this epoch.
    fn refuses(&self, s: &Fleet, epoch: u64) -> bool {
        let other_history = s.row_timeline != s.timeline && !self.mutant(Mutant::History);
        (s.row.number.0 != epoch || other_history) && !self.mutant(Mutant::Guard)
    }

    fn tick(&self, s: &mut Fleet, slow: Option<usize>, log: &mut Log) -> bool {
        s.now += 1;
        if let Some(node) = slow {
            s.nodes[node].lag += 1;
            s.budget.drift -= 1;
        }
        let now = s.now;
        for cells in s.caches.iter_mut().flat_map(Arc::make_mut) {
            for key in [Key::Item, Key::List] {
                let state = cells.key(key);
                *state = std::mem::replace(state, KeyState::Absent).expire(now);
            }
        }
        log.line(|| match slow {
            None => format!("time passes: tick {now}"),
            Some(node) => format!(
                "time passes: tick {now}, but node {}'s clock does not notice",
                node_name(node)
            ),
        });
        true
    }

    fn saw(
        &self,
        s: &mut Fleet,
        node: usize,
        mut sighting: Sighting,
        poll_started: Option<writethrough_protocol::Monotonic>,
        log: &mut Log,
    ) -> bool {
        let now = s.clock(node);
        if self.mutant(Mutant::Observing) {
            sighting.row.settled = true;
        }
        let view = &mut s.nodes[node].view;
        let before = view.clone();
        view.saw(&sighting, poll_started, now);
        log.on(node, || {
            let number = view.row().map_or(0, |row| row.number.0);
            if view.astray().is_some() {
                return format!("believes no row of another history; knew epoch {number}");
            }
            match (view.is_active(now), view.lease_until()) {
                (false, _) => format!("sees epoch {number} and observes it"),
                (true, Some(until)) if until > now => format!(
                    "sees epoch {number}, active; read lease until its tick {}",
                    until.0.as_secs()
                ),
                (true, _) => format!("sees epoch {number}, active; no read lease"),
            }
        });
        *view != before
    }

    /// Applies a proposal in the database and shows the proposer what came of it.
    fn propose(&self, s: &mut Fleet, node: usize, mut proposal: Proposal, log: &mut Log) -> bool {
        if let (Proposal::Next { settled, .. }, true) =
            (&mut proposal, self.mutant(Mutant::SettledProposals))
        {
            *settled = true;
        }
        if !self.epochs_left(s) {
            return false;
        }
        let history = || HistoryId::new(s.timeline.to_string());
        if let Some(mut next) = proposal.apply(&s.row, history) {
            if let Proposal::NewHistory { .. } = proposal {
                // The leap puts it above every number that was ever used.
                next.number = Epoch(s.servers.len() as u64 + 1);
                s.row_timeline = s.timeline;
            }
            s.servers.push(match &next.mode {
                Mode::Bypass => None,
                Mode::Cached(id) => self.ids.iter().position(|known| known == id),
            });
            s.row = next;
            log.on(node, || format!("proposes {}", log_row(&s.row)));
        }
        let sighting = self.sighting(s);
        self.saw(s, node, sighting, None, log);
        true
    }

    fn crash(&self, s: &mut Fleet, node: usize, log: &mut Log) -> bool {
        s.budget.faults -= 1;
        for place in 0..s.operations.len() {
            if self.bounds.operations[place].node != node
                || matches!(s.operations[place].at, At::Idle | At::Done)
            {
                continue;
            }
            // Whatever it was about to send may have been sent.
            if let Some(command) = self.command(s, place) {
                s.late.push(command);
            }
            if let At::Commit { .. } = s.operations[place].at {
                self.send_write(s, place);
            }
            s.operations[place].at = At::Done;
        }
        let link = s.nodes[node].link;
        let mut view = Node::new(self.bounds.timing);
        view.connection_changed(s.nodes[node].view.connection().cloned());
        s.nodes[node] = Member {
            view,
            link,
            lag: s.nodes[node].lag,
            poll: None,
        };
        log.on(node, || {
            "crashes with its operations and starts again".to_owned()
        });
        true
    }

    fn send_write(&self, s: &mut Fleet, place: usize) {
        if let At::Commit {
            epoch,
            target,
            announced,
            ..
        } = s.operations[place].at
        {
            s.late_writes.push(LateWrite {
                operation: place,
                epoch,
                deadline: target.map(|_| announced + self.bounds.intent_lifetime),
            });
        }
    }

    /// Forgets what nobody can see any more, and puts the commands under way in one order.
    fn tidy(&self, s: &mut Fleet) {
        s.late.sort_unstable();
        s.late_writes.sort_unstable();
        s.reading = std::array::from_fn(|node| {
            let mut operations = self.bounds.operations.iter().zip(&s.operations);
            operations.any(|(operation, progress)| {
                operation.node == node && operation.kind != Kind::Write && progress.at != At::Done
            })
        });
        if self.bounds.mutant.is_some() {
            return;
        }
        let now = s.now;
        let row = s.row.number.0;
        s.late_writes.retain(|write| {
            write.epoch == row && write.deadline.is_none_or(|deadline| now < deadline)
        });
        for epoch in 1..row {
            let seen = |row: Option<&EpochRow>| row.is_some_and(|row| row.number.0 == epoch);
            let live = seen(s.standby.as_ref().map(|standby| &standby.row))
                || s.nodes.iter().any(|node| {
                    let poll = node.poll.as_ref().map(|(sighting, _)| &sighting.row);
                    seen(node.view.row()) || seen(poll)
                })
                || s.operations.iter().any(|progress| {
                    target(&progress.at).is_some_and(|target| target.epoch == epoch)
                });
            if !live {
                s.late.retain(|command| command.target.epoch != epoch);
                let place = usize::try_from(epoch - 1).unwrap_or(0);
                for cache in &mut s.caches {
                    if cache[place] != Cells::EMPTY {
                        Arc::make_mut(cache)[place] = Cells::EMPTY;
                    }
                }
            }
        }
    }

    // ---- operations ----------------------------------------------------------------------------

    /// Where a command for this target goes.
    fn reached(&self, s: &Fleet, place: usize, mut target: Target) -> Target {
        if self.mutant(Mutant::FixedTarget) {
            target.server = s.nodes[self.bounds.operations[place].node].link;
        }
        if s.replaced && target.server == 0 {
            target.server = 2;
        }
        target
    }

    /// Whether the answer to a command on this target says that the server was replaced: the server
    /// tells it before any later answer on the connection.
    fn disowned(&self, s: &Fleet, target: Target) -> bool {
        s.replaced && target.server == 0
    }

    /// The command that an operation is about to send.
    fn command(&self, s: &Fleet, place: usize) -> Option<Command> {
        let kind = self.bounds.operations[place].kind;
        let read_key = key(kind);
        let (target, key, verb) = match s.operations[place].at {
            At::Acquire(target) => (target, read_key, Verb::Acquire(token_of(place))),
            At::Loaded(target, token, version) => match kind {
                Kind::List(page) => (target, read_key, Verb::FillPage(page, token, version)),
                _ => (target, read_key, Verb::Fill(token, version)),
            },
            At::Load(target, token) => (target, read_key, Verb::Break(token)),
            At::Begin {
                target, place: key, ..
            } => (target, self.keys[key], Verb::Begin(token_of(place))),
            At::End {
                target,
                place: key,
                again,
                ending,
                ..
            } => {
                let keeps = write::keeps_value(again) || self.mutant(Mutant::BeginAgainKeepsValue);
                let value = match (ending, self.keys[key]) {
                    (Ending::Committed(version), Key::Item) if keeps => Some(version),
                    _ => None,
                };
                (target, self.keys[key], Verb::End(token_of(place), value))
            }
            _ => return None,
        };
        let target = self.reached(s, place, target);
        Some(Command {
            operation: place,
            target,
            key,
            verb,
        })
    }

    /// Executes a command in its server, atomically, and tells in words what came of it.
    fn execute(&self, s: &mut Fleet, command: Command, by: Option<usize>, log: &Log) -> String {
        let now = s.now;
        let lifetime = self.bounds.intent_lifetime;
        let cells = s.cells(command.target);
        let state = std::mem::replace(cells.key(command.key), KeyState::Absent);
        let mut refused = false;
        let next = match command.verb {
            Verb::Acquire(token) => state.acquire_fill(token).0,
            Verb::Fill(token, version) => {
                if self.mutant(Mutant::FillToken) {
                    KeyState::Value(Some(bytes(version)))
                } else {
                    let (next, filled) = state.fill(token, Some(bytes(version)));
                    refused = !filled;
                    next
                }
            }
            Verb::FillPage(place, token, version) => {
                let state = match self.mutant(Mutant::StampToken) {
                    true => KeyState::FillLease(token),
                    false => state,
                };
                let (next, stored) = page::fill(state, token);
                let stamp = match self.mutant(Mutant::StampAtFill) {
                    true => page::stamp(&next),
                    false => stored.then_some(token),
                };
                match stamp {
                    Some(stamp) => {
                        cells.pages[place] = Some(Page {
                            stamp,
                            bytes: bytes(version),
                        });
                    }
                    None => refused = true,
                }
                next
            }
            Verb::Break(token) => match self.mutant(Mutant::BreakToken) {
                true => KeyState::Absent,
                false => state.break_fill(token).0,
            },
            Verb::Renew(token) => match self.mutant(Mutant::RenewToken) {
                true => KeyState::FillLease(token),
                false => state.renew_fill(token).0,
            },
            Verb::Begin(token) => match self.mutant(Mutant::Intent) {
                true => state,
                false => state.begin(token, lifetime, now),
            },
            Verb::End(token, value) => {
                let last = matches!(&state, KeyState::Intent(intent)
                    if intent.writers().iter().all(|writer| writer.token == token));
                match value {
                    Some(version) if last && self.mutant(Mutant::ContendedEnd) => {
                        KeyState::Value(Some(bytes(version)))
                    }
                    _ => state.end(token, value.map(|version| Some(bytes(version))), now),
                }
            }
        };
        if let Verb::Fill(..) | Verb::FillPage(..) = command.verb {
            self.tally.count(match refused {
                true => Event::FillRefused,
                false => Event::Filled,
            });
        }
        let words = match log.wanted() {
            false => String::new(),
            true => format!(
                "{} -> {}{}",
                self.words(command, by),
                if refused { "refused, " } else { "" },
                self.state_words(command.key, &next),
            ),
        };
        *s.cells(command.target).key(command.key) = next;
        words
    }

    fn advance(&self, s: &mut Fleet, place: usize, way: Way, log: &mut Log) -> bool {
        let operation = self.bounds.operations[place];
        let node = operation.node;
        let faults_used = matches!(way, Way::NoAnswer | Way::NoAnswerAgain);
        if faults_used {
            s.budget.faults -= 1;
        }
        match way {
            Way::Share(other) | Way::Join(other) => {
                let at = s.operations[other].at.clone();
                if let At::Loaded(_, _, version)
                | At::LoadedBeside(_, _, version)
                | At::LoadedInBypass(version) = at
                {
                    if let Way::Join(_) = way {
                        self.begin_operation(s, place);
                    }
                    self.tally.count(match at {
                        At::LoadedBeside(..) => Event::SharedBeside,
                        _ => Event::Shared,
                    });
                    log.on_operation(self, place, || {
                        format!("shares the load of {}: v{version}", self.label(other))
                    });
                    self.finish_read(s, place, version, log);
                }
                return true;
            }
            Way::LookAgain => {
                return match s.operations[place].at {
                    At::Await(target, _) => self.get(s, place, target, log),
                    _ => false,
                };
            }
            Way::LoadBeside => {
                if let At::Await(target, lease) = s.operations[place].at {
                    let version = s.version;
                    s.operations[place].at = At::LoadedBeside(target, lease, version);
                    log.on_operation(self, place, || {
                        format!("loads v{version} from the database, beside the lease it saw")
                    });
                }
                return true;
            }
            Way::Drop => {
                s.budget.faults -= 1;
                s.late.extend(self.command(s, place));
                s.operations[place].at = At::Done;
                log.on_operation(self, place, || "is dropped".to_owned());
                return true;
            }
            Way::Renew => {
                if let At::Load(target, token) | At::Loaded(target, token, _) =
                    s.operations[place].at
                {
                    let renewal = Command {
                        operation: place,
                        target,
                        key: key(operation.kind),
                        verb: Verb::Renew(token),
                    };
                    let words = self.execute(s, renewal, Some(place), log);
                    log.on_operation(self, place, || words);
                }
                return true;
            }
            Way::NoAnswer | Way::NoAnswerAgain => {
                return self.unanswered(s, place, way == Way::NoAnswerAgain, log);
            }
            Way::Well => {}
        }
        match s.operations[place].at.clone() {
            At::Idle => self.start(s, place, log),
            At::Again => self.start_write(s, place, log),
            At::Get(target) => self.get(s, place, target, log),
            At::Got(target, state, page) => {
                let lease_valid = self.holds_lease(s, node, target);
                match operation.kind {
                    Kind::List(_) => {
                        let believed = match (self.mutant(Mutant::PageStamp), page::stamp(&state)) {
                            (true, Some(stamp)) => page.map(|page| Page { stamp, ..page }),
                            _ => page,
                        };
                        let next = read::after_get_page(state, believed, lease_valid);
                        self.decide_page(s, place, target, next, log)
                    }
                    _ => {
                        let next = read::after_get(state, lease_valid);
                        self.decide(s, place, target, next, log)
                    }
                }
            }
            At::Acquire(target) => {
                let state = s
                    .cells(self.reached(s, place, target))
                    .key(key(operation.kind))
                    .clone();
                let (_, answer) = state.acquire_fill(token_of(place));
                if let Some(command) = self.command(s, place) {
                    let words = self.execute(s, command, Some(place), log);
                    log.on_operation(self, place, || words);
                }
                if self.disowned(s, target) {
                    s.operations[place].at = At::Store;
                    return true;
                }
                if answer == Acquire::Acquired {
                    // The decision is the same whether the lease holds or not.
                    return self.decide_acquired(s, place, target, answer, true, log);
                }
                s.operations[place].at = At::Answered(target, answer);
                true
            }
            At::Answered(target, answer) => {
                let lease_valid = self.holds_lease(s, node, target);
                self.decide_acquired(s, place, target, answer, lease_valid, log)
            }
            At::Load(target, token) => {
                let version = s.version;
                s.operations[place].at = At::Loaded(target, token, version);
                log.on_operation(self, place, || {
                    format!("loads v{version} from the database")
                });
                true
            }
            At::Loaded(_, _, version) => {
                self.send(s, place, log);
                self.finish_read(s, place, version, log);
                true
            }
            At::Await(..) => false,
            At::LoadedBeside(_, _, version) | At::LoadedInBypass(version) => {
                self.finish_read(s, place, version, log);
                true
            }
            At::Store if self.mutant(Mutant::JoinInBypass) => {
                let version = s.version;
                s.operations[place].at = At::LoadedInBypass(version);
                log.on_operation(self, place, || format!("reads v{version} in the database"));
                true
            }
            At::Store => {
                let version = s.version;
                self.tally.count(Event::Bypassed);
                log.on_operation(self, place, || format!("reads v{version} in the database"));
                self.finish_read(s, place, version, log);
                true
            }
            At::Begin {
                target,
                place: key,
                announced,
                again,
            } => {
                self.send(s, place, log);
                let placed = !self.disowned(s, target);
                s.operations[place].at = if key + 1 < self.keys.len() {
                    At::Begin {
                        target,
                        place: key + 1,
                        announced,
                        again,
                    }
                } else {
                    match write::after_begin(placed) {
                        AfterBegin::Write => At::Commit {
                            epoch: target.epoch,
                            target: Some(target),
                            announced,
                            again,
                        },
                        AfterBegin::ProposeBypass => At::Propose(target.epoch, Then::Restart),
                    }
                };
                true
            }
            At::Commit {
                epoch,
                target,
                announced,
                again,
            } => {
                let outcome = self.commit(s, epoch, target.map(|_| announced));
                let version = s.version;
                log.on_operation(self, place, || match outcome {
                    Outcome::Committed => format!("commits v{version} under epoch {epoch}"),
                    Outcome::Fenced => format!("is refused by the guard: not epoch {epoch}"),
                    _ => "is too late: the write is lost".to_owned(),
                });
                let ending = match write::after_write(outcome) {
                    AfterWrite::End => Ending::Committed(version),
                    AfterWrite::Restart => {
                        self.tally.count(Event::Fenced);
                        Ending::Fenced
                    }
                    AfterWrite::Withdraw | AfterWrite::LeaveIntents => Ending::Failed,
                };
                match target {
                    Some(target) => {
                        s.operations[place].at = At::End {
                            target,
                            place: 0,
                            announced,
                            again,
                            ending,
                        };
                    }
                    None => self.finish_write(s, place, ending, log),
                }
                true
            }
            At::End {
                target,
                place: key,
                announced,
                again,
                ending,
            } => {
                self.send(s, place, log);
                if key + 1 < self.keys.len() {
                    s.operations[place].at = At::End {
                        target,
                        place: key + 1,
                        announced,
                        again,
                        ending,
                    };
                } else {
                    let answered = !self.disowned(s, target);
                    self.ended(s, place, target.epoch, announced, ending, answered, log);
                }
                true
            }
            At::Propose(epoch, then) => {
                self.propose(s, node, Node::bypass_from(Epoch(epoch)), log);
                s.operations[place].at = At::Observe(epoch, then);
                if let (true, Then::Acknowledge(version)) =
                    (self.mutant(Mutant::WaitAfterFailedEnd), then)
                {
                    self.finish_write(s, place, Ending::Committed(version), log);
                }
                true
            }
            At::Observe(epoch, then) => {
                let view = &s.nodes[node].view;
                let newer = view.row().is_some_and(|row| row.number.0 > epoch);
                if !newer || !view.is_active(s.clock(node)) {
                    return false;
                }
                match then {
                    Then::Restart => self.start_write(s, place, log),
                    Then::Acknowledge(version) => {
                        self.tally.count(Event::AcknowledgedLate);
                        self.finish_write(s, place, Ending::Committed(version), log);
                        true
                    }
                }
            }
            At::Done => false,
        }
    }

    fn get(&self, s: &mut Fleet, place: usize, target: Target, log: &mut Log) -> bool {
        let kind = self.bounds.operations[place].kind;
        let cells = s.cells(self.reached(s, place, target));
        let (state, page) = match kind {
            Kind::List(page) => (cells.list.clone(), cells.pages[page].clone()),
            _ => (cells.item.clone(), None),
        };
        log.on_operation(self, place, || match kind {
            Kind::List(place) => format!(
                "get list@{0} and {1}@{0} -> {2}, {3}",
                target.epoch,
                page_name(place),
                self.state_words(Key::List, &state),
                self.page_words(page.as_ref()),
            ),
            _ => format!(
                "get item@{} -> {}",
                target.epoch,
                self.state_words(Key::Item, &state)
            ),
        });
        if self.disowned(s, target) || matches!(state, KeyState::Intent(_)) {
            // The decision is the same whether the lease holds or not: no step of its own.
            s.operations[place].at = At::Store;
            log.on_operation(self, place, || "goes past the cache".to_owned());
            return true;
        }
        s.operations[place].at = At::Got(target, state, page);
        true
    }

    /// Sends the next command, which executes and is answered.
    fn send(&self, s: &mut Fleet, place: usize, log: &mut Log) {
        if let Some(command) = self.command(s, place) {
            let words = self.execute(s, command, Some(place), log);
            log.on_operation(self, place, || words);
        }
    }

    /// The next command, or the database write, gets no answer.
    fn unanswered(&self, s: &mut Fleet, place: usize, again: bool, log: &mut Log) -> bool {
        if let Some(command) = self.command(s, place) {
            log.on_operation(self, place, || {
                format!(
                    "{}: no answer{}",
                    self.words(command, Some(place)),
                    if again { ", sends it again" } else { "" }
                )
            });
            s.late.push(command);
        }
        // All keys of a write go out together: the rest was sent too, and is sent again too.
        while let At::Begin { place: key, .. } | At::End { place: key, .. } =
            &mut s.operations[place].at
            && *key + 1 < self.keys.len()
        {
            *key += 1;
            s.late.extend(self.command(s, place));
        }
        let progress = &mut s.operations[place];
        match (&mut progress.at, again) {
            (
                At::Begin {
                    again, place: key, ..
                },
                true,
            ) => {
                *again = true;
                *key = 0;
            }
            (At::End { place: key, .. }, true) => *key = 0,
            (_, true) => {}
            (At::Acquire(_), false) => progress.at = At::Store,
            (At::Loaded(_, _, version), false) => {
                let version = *version;
                self.finish_read(s, place, version, log);
            }
            (At::Begin { target, .. }, false) => {
                progress.at = match write::after_begin(false) {
                    AfterBegin::ProposeBypass => At::Propose(target.epoch, Then::Restart),
                    AfterBegin::Write => At::Done,
                };
            }
            (At::Commit { .. }, false) => {
                log.on_operation(self, place, || {
                    "sends its database write: no answer, outcome unknown".to_owned()
                });
                self.send_write(s, place);
                s.operations[place].at = match write::after_write(Outcome::Unknown) {
                    AfterWrite::LeaveIntents => At::Done,
                    _ => At::Again,
                };
            }
            (
                At::End {
                    target,
                    announced,
                    ending,
                    ..
                },
                false,
            ) => {
                let (epoch, announced, ending) = (target.epoch, *announced, *ending);
                self.ended(s, place, epoch, announced, ending, false, log);
            }
            _ => {}
        }
        true
    }

    fn begin_operation(&self, s: &mut Fleet, place: usize) {
        s.operations[place].floor = s.floor;
        // A lease lasts a tick.
        s.operations[place].after_promotion = s.promoted_at.is_some_and(|at| s.now > at);
    }

    fn start(&self, s: &mut Fleet, place: usize, log: &mut Log) -> bool {
        let operation = self.bounds.operations[place];
        if operation.kind == Kind::Write {
            return self.start_write(s, place, log);
        }
        self.begin_operation(s, place);
        let floor = s.floor;
        let member = &s.nodes[operation.node];
        let mut permit = member.view.read_permit(s.clock(operation.node));
        if permit == ReadPermit::Bypass(Bypass::NoLease)
            && (self.mutant(Mutant::LeaseChecks) || self.mutant(Mutant::LeaseCheckBefore))
            && let Some(row) = member.view.row()
            && row.mode == Mode::Cached(self.ids[member.link].clone())
        {
            permit = ReadPermit::Cached(row.number);
        }
        let (at, words) = match permit {
            ReadPermit::Cached(Epoch(epoch)) => (
                At::Get(Target {
                    epoch,
                    server: member.link,
                }),
                format!("begins under epoch {epoch}"),
            ),
            ReadPermit::Bypass(reason) => (
                At::Store,
                format!("begins, past the cache ({})", reason.as_str()),
            ),
        };
        s.operations[place].at = at;
        log.on_operation(self, place, || {
            format!("{words}; must not see less than v{floor}")
        });
        true
    }

    fn start_write(&self, s: &mut Fleet, place: usize, log: &mut Log) -> bool {
        let node = self.bounds.operations[place].node;
        let member = &s.nodes[node];
        let (at, words) = match member.view.write_permit(s.clock(node)) {
            WritePermit::Wait(_) => return false,
            WritePermit::Cached(Epoch(epoch)) => (
                At::Begin {
                    target: Target {
                        epoch,
                        server: member.link,
                    },
                    place: 0,
                    announced: s.now,
                    again: false,
                },
                "in the cache",
            ),
            WritePermit::Bypass(Epoch(epoch)) => (
                At::Commit {
                    epoch,
                    target: None,
                    announced: s.now,
                    again: false,
                },
                "past the cache",
            ),
            WritePermit::Unreachable(Epoch(epoch)) => {
                (At::Propose(epoch, Then::Restart), "without its cache")
            }
        };
        s.operations[place].at = at;
        let number = member_epoch(s, node);
        log.on_operation(self, place, || format!("begins {words}, epoch {number}"));
        true
    }

    /// Asked after an answer came: is the lease on the answer's epoch still valid?
    fn holds_lease(&self, s: &Fleet, node: usize, target: Target) -> bool {
        let now = s.clock(node);
        self.mutant(Mutant::LeaseChecks)
            || self.mutant(Mutant::LeaseCheckAfterGet)
            || s.nodes[node].view.holds_lease(Epoch(target.epoch), now)
    }

    fn decide_acquired(
        &self,
        s: &mut Fleet,
        place: usize,
        target: Target,
        answer: Acquire,
        lease_valid: bool,
        log: &mut Log,
    ) -> bool {
        match self.bounds.operations[place].kind {
            Kind::List(_) => {
                let next = read::after_acquire_page(token_of(place), answer, lease_valid);
                self.decide_page(s, place, target, next, log)
            }
            _ => {
                let next = read::after_acquire(answer, lease_valid);
                self.decide(s, place, target, next, log)
            }
        }
    }

    fn decide_page(
        &self,
        s: &mut Fleet,
        place: usize,
        target: Target,
        next: PageNext,
        log: &mut Log,
    ) -> bool {
        s.operations[place].at = match next {
            PageNext::Hit(bytes) => {
                self.tally.count(Event::PageHit);
                let version = version(&bytes);
                log.on_operation(self, place, || format!("hits the page: v{version}"));
                self.finish_read(s, place, version, log);
                return true;
            }
            PageNext::AcquireFill => At::Acquire(target),
            PageNext::LoadUnder(token) => At::Load(target, token),
            PageNext::Bypass(reason) => self.past_the_cache(place, reason, log),
        };
        true
    }

    fn past_the_cache(&self, place: usize, reason: Bypass, log: &mut Log) -> At {
        log.on_operation(self, place, || {
            format!("goes past the cache ({})", reason.as_str())
        });
        At::Store
    }

    fn decide(
        &self,
        s: &mut Fleet,
        place: usize,
        target: Target,
        next: Next,
        log: &mut Log,
    ) -> bool {
        s.operations[place].at = match next {
            Next::Hit(payload) => {
                let version = payload.map_or(0, |payload| version(&payload));
                self.tally.count(Event::Hit);
                if target.epoch > 1 {
                    self.tally.count(Event::HitAfterBypass);
                }
                if s.promoted_at.is_some() && target.epoch > 1 {
                    self.tally.count(Event::HitAfterPromotion);
                }
                if target.server == 2 {
                    self.tally.count(Event::HitAfterReplacement);
                }
                log.on_operation(self, place, || format!("hits v{version}"));
                self.finish_read(s, place, version, log);
                return true;
            }
            Next::AcquireFill => At::Acquire(target),
            Next::Load => At::Load(target, token_of(place)),
            Next::Await(token) => At::Await(target, token),
            Next::Bypass(reason) => self.past_the_cache(place, reason, log),
        };
        true
    }

    fn finish_read(&self, s: &mut Fleet, place: usize, version: Version, log: &mut Log) {
        let Progress {
            floor,
            after_promotion,
            ..
        } = s.operations[place];
        s.operations[place].at = At::Done;
        s.operations[place].floor = 0;
        if after_promotion && s.is_lost(version) {
            s.stale = Some(Stale {
                operation: place,
                version,
            });
            log.on_operation(self, place, || {
                format!("returns v{version}: LOST by the database more than a lease ago")
            });
        } else if version < floor {
            s.stale = Some(Stale {
                operation: place,
                version,
            });
            log.on_operation(self, place, || {
                format!("returns v{version}: STALE, v{floor} was known before it began")
            });
        } else {
            log.on_operation(self, place, || format!("returns v{version}"));
        }
        if !self.weak() && !s.is_lost(version) {
            s.floor = s.floor.max(version);
        }
    }

    /// The guarded commit: the check and the effect are one step.
    fn commit(&self, s: &mut Fleet, epoch: u64, announced: Option<u64>) -> Outcome {
        let late = announced.is_some_and(|at| s.now - at >= self.bounds.intent_lifetime);
        if late {
            return Outcome::NoEffect;
        }
        if self.refuses(s, epoch) {
            return Outcome::Fenced;
        }
        s.newest += 1;
        s.version = s.newest;
        Outcome::Committed
    }

    /// The intents were ended, or not.
    #[allow(
        clippy::too_many_arguments,
        reason = "the pieces of one step of a write"
    )]
    fn ended(
        &self,
        s: &mut Fleet,
        place: usize,
        epoch: u64,
        announced: u64,
        ending: Ending,
        answered: bool,
        log: &mut Log,
    ) {
        let Ending::Committed(version) = ending else {
            return self.finish_write(s, place, ending, log);
        };
        let announced_for = ticks(s.now - announced);
        match write::after_end(answered, announced_for, ticks(self.bounds.intent_lifetime)) {
            AfterEnd::Acknowledge => self.finish_write(s, place, ending, log),
            AfterEnd::ProposeBypass => {
                s.operations[place].at = At::Propose(epoch, Then::Acknowledge(version));
            }
        }
    }

    fn finish_write(&self, s: &mut Fleet, place: usize, ending: Ending, log: &mut Log) {
        match ending {
            Ending::Committed(version) => {
                s.operations[place].at = At::Done;
                if !s.is_lost(version) {
                    s.floor = s.floor.max(version);
                }
                log.on_operation(self, place, || format!("is acknowledged: v{version}"));
            }
            Ending::Fenced => s.operations[place].at = At::Again,
            Ending::Failed => {
                s.operations[place].at = At::Done;
                log.on_operation(self, place, || "failed without effect".to_owned());
            }
        }
    }
}

fn key(kind: Kind) -> Key {
    match kind {
        Kind::List(_) => Key::List,
        Kind::Read | Kind::Write => Key::Item,
    }
}

fn target(at: &At) -> Option<Target> {
    match at {
        At::Get(target)
        | At::Got(target, ..)
        | At::Acquire(target)
        | At::Answered(target, _)
        | At::Load(target, _)
        | At::Loaded(target, ..)
        | At::LoadedBeside(target, ..)
        | At::Await(target, _)
        | At::Begin { target, .. }
        | At::End { target, .. } => Some(*target),
        At::Commit { target, .. } => *target,
        At::Idle
        | At::Store
        | At::LoadedInBypass(_)
        | At::Again
        | At::Propose(..)
        | At::Observe(..)
        | At::Done => None,
    }
}

fn member_epoch(s: &Fleet, node: usize) -> u64 {
    s.nodes[node].view.row().map_or(0, |row| row.number.0)
}

pub(crate) fn name(key: Key) -> &'static str {
    match key {
        Key::Item => "item",
        Key::List => "list",
    }
}

pub(crate) fn page_name(page: usize) -> &'static str {
    ["page1", "page2"][page]
}

pub(crate) fn server(server: usize) -> &'static str {
    ["redis a", "redis b", "redis a with the contents of redis b"][server]
}

pub(crate) fn node_name(node: usize) -> &'static str {
    ["A", "B"][node]
}

fn log_row(row: &EpochRow) -> String {
    let mode = match &row.mode {
        Mode::Bypass => "bypass".to_owned(),
        Mode::Cached(id) => format!("cached on redis {id}"),
    };
    let settled = if row.settled { ", settled" } else { "" };
    format!("epoch {}: {mode}{settled}", row.number)
}
