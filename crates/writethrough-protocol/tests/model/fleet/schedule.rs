//! A schedule in words: one line a step.

use stateright::{Checker, HasDiscoveries, Model};
use writethrough_protocol::page::{self, Page};
use writethrough_protocol::{KeyState, Token};

use super::bounds::{Kind, Mutant};
use super::state::{Command, Fleet, Key, Verb, version};
use super::step::{Action, name, node_name, page_name, server, token_of};
use super::{NEVER_STALE, Search};

/// The lines of a schedule, when they are wanted.
#[derive(Debug, Default)]
pub(crate) struct Log(Option<Vec<String>>);

impl Log {
    pub(crate) fn wanted(&self) -> bool {
        self.0.is_some()
    }

    pub(crate) fn line(&mut self, words: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.0 {
            lines.push(words());
        }
    }

    pub(crate) fn on(&mut self, node: usize, words: impl FnOnce() -> String) {
        self.line(|| format!("node {}: {}", node_name(node), words()));
    }

    pub(crate) fn on_operation(
        &mut self,
        search: &Search,
        place: usize,
        words: impl FnOnce() -> String,
    ) {
        let node = node_name(search.bounds.operations[place].node);
        self.line(|| format!("node {node}, {}: {}", search.label(place), words()));
    }
}

impl Mutant {
    /// The shortest schedule to a stale read without this rule, if its search finds one.
    pub(crate) fn schedule(self) -> Option<Vec<String>> {
        let checker = Search::new(self.search())
            .checker()
            .finish_when(HasDiscoveries::AnyFailures)
            .spawn_bfs()
            .join();
        let path = checker.discovery(NEVER_STALE)?;
        Some(checker.model().schedule(&path.into_actions()))
    }
}

impl Search {
    /// The steps of a schedule from the first state on, in words.
    pub(crate) fn schedule(&self, actions: &[Action]) -> Vec<String> {
        let mut fleet: Fleet = self.first();
        let mut log = Log(Some(Vec::new()));
        for action in actions {
            self.step(&mut fleet, *action, &mut log);
        }
        log.0.unwrap_or_default()
    }

    /// The name of an operation: `write 1`, `read 2`, `list 3`.
    pub(crate) fn label(&self, place: usize) -> String {
        let kind = match self.bounds.operations[place].kind {
            Kind::Read => "read",
            Kind::List(_) => "list",
            Kind::Write => "write",
        };
        format!("{kind} {}", place + 1)
    }

    fn token_words(&self, token: Token) -> String {
        self.label(usize::try_from(token.0 - 1).unwrap_or(0))
    }

    pub(crate) fn state_words(&self, key: Key, state: &KeyState) -> String {
        match state {
            KeyState::Absent => "Absent".to_owned(),
            KeyState::FillLease(token) => format!("FillLease({})", self.token_words(*token)),
            KeyState::Intent(intent) => {
                let writers: Vec<_> = intent
                    .writers()
                    .iter()
                    .map(|writer| self.token_words(writer.token))
                    .collect();
                let contended = if intent.contended() {
                    ", contended"
                } else {
                    ""
                };
                format!("Intent{{{}{contended}}}", writers.join(", "))
            }
            KeyState::Value(payload) => match (key, payload) {
                (Key::List, _) => match page::stamp(state) {
                    Some(stamp) => format!("Stamp({})", self.token_words(stamp)),
                    None => "no stamp".to_owned(),
                },
                (Key::Item, Some(bytes)) => format!("Value(v{})", version(bytes)),
                (Key::Item, None) => "Value(none)".to_owned(),
            },
        }
    }

    pub(crate) fn page_words(&self, page: Option<&Page>) -> String {
        match page {
            None => "no page".to_owned(),
            Some(page) => format!(
                "Page(stamp of {}, v{})",
                self.token_words(page.stamp),
                version(&page.bytes)
            ),
        }
    }

    /// A command in words: sent by the operation `by`, or executed long after.
    pub(crate) fn words(&self, command: Command, by: Option<usize>) -> String {
        let mut key = format!("{}@{}", name(command.key), command.target.epoch);
        if self.bounds.moves > 0 || self.bounds.replacements > 0 {
            key = format!("{key} on {}", server(command.target.server));
        }
        let of = match by {
            Some(_) => String::new(),
            None => format!(" of {}", self.label(command.operation)),
        };
        let under = |token: Token| match token == token_of(command.operation) {
            true => String::new(),
            false => format!(" under {}", self.token_words(token)),
        };
        match command.verb {
            Verb::Acquire(_) => format!("acquire_fill {key}{of}"),
            Verb::Fill(token, version) => {
                format!("fill {key} with v{version}{}{of}", under(token))
            }
            Verb::FillPage(page, token, version) => format!(
                "fill {} of {key} with v{version}{}{of}",
                page_name(page),
                under(token)
            ),
            Verb::Break(token) => format!("break_fill {key}{}{of}", under(token)),
            Verb::Renew(token) => format!("renew_fill {key}{}{of}", under(token)),
            Verb::Begin(_) => format!("begin {key}{of}"),
            Verb::End(_, Some(version)) => format!("end {key} with v{version}{of}"),
            Verb::End(_, None) => format!("end {key} with no value{of}"),
        }
    }
}
