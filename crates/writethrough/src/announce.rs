//! The intents of one write: placed on its keys before the store is written to, and replaced by its
//! values, or taken away, after that. Decides nothing about the epoch.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use writethrough_protocol::write::keeps_value;
use writethrough_protocol::{Epoch, Mode, Token};

use crate::cache::End;
use crate::cache::observed::Observed;
use crate::engine::{Engine, NewValue, new_token};
use crate::error::CacheError;
use crate::key::{Frame, Key, WriteSet};

/// How often a command of a write is tried in all: a quarter of a second each, and the write has
/// a deadline.
const MAX_TRIES: usize = 8;

/// The intents of one write on all of its keys, in one epoch.
pub(crate) struct Announced {
    /// The cache keys, with the names of those that are values.
    keys: Vec<(String, Option<Key>)>,
    token: Token,
    epoch: Epoch,
    session: Observed,
    begun: Instant,
    /// The announcement was sent a second time on another connection.
    begun_again: bool,
}

/// A cache command of a write.
enum Step<'a> {
    Begin(&'a [String]),
    End(&'a [End]),
}

impl Step<'_> {
    async fn run(
        &self,
        engine: &Engine,
        session: &Observed,
        token: Token,
    ) -> Result<(), CacheError> {
        let result = match self {
            Self::Begin(keys) => session.begin(keys, token, engine.settings.intent).await,
            Self::End(ends) => session.end(ends, token).await,
        };
        if let Err(error) = &result {
            let what = match self {
                Self::Begin(_) => "announcing a write",
                Self::End(_) => "ending a write",
            };
            engine.cache_failed(what, error);
        }
        result
    }
}

impl Announced {
    /// Places the intent on every key; an error when it could not be placed on all of them.
    pub(crate) async fn place(
        engine: &Engine,
        set: &WriteSet,
        epoch: Epoch,
        frame: &Frame,
        session: Observed,
    ) -> Result<Self, CacheError> {
        let values = set
            .keys
            .iter()
            .map(|key| (key.in_epoch(frame), Some(key.clone())));
        let stamps = set
            .collections
            .iter()
            .map(|collection| (collection.in_epoch(frame), None));
        let mut announced = Self {
            keys: values.chain(stamps).collect(),
            token: new_token(),
            epoch,
            session,
            begun: Instant::now(),
            begun_again: false,
        };
        let names: Vec<String> = announced
            .keys
            .iter()
            .map(|(name, _)| name.clone())
            .collect();
        let session = announced.retry_once(engine, Step::Begin(&names)).await?;
        engine.counters.intents.add(names.len() as u64);
        announced.begun_again = !session.is_same(&announced.session);
        announced.session = session;
        Ok(announced)
    }

    /// How long ago the intents were first sent.
    pub(crate) fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Replaces the intents of a committed write by its values; a key without one is left empty.
    pub(crate) async fn end(
        &self,
        engine: &Engine,
        mut values: HashMap<Key, NewValue>,
    ) -> Result<(), CacheError> {
        let ends: Vec<End> = self
            .keys
            .iter()
            .map(|(name, key)| {
                let kept = key
                    .as_ref()
                    .filter(|_| keeps_value(self.begun_again))
                    .and_then(|key| engine.kept(key.as_str(), values.remove(key)?));
                let (value, ttl) = kept.map_or((None, Duration::ZERO), |(payload, ttl)| {
                    (Some(payload), ttl)
                });
                End {
                    key: name.clone(),
                    value,
                    ttl,
                }
            })
            .collect();
        self.retry_once(engine, Step::End(&ends)).await.map(drop)
    }

    /// Takes the intents of a write without effect away. If that fails they lapse.
    pub(crate) async fn withdraw(self, engine: &Engine) {
        let ends: Vec<End> = self
            .keys
            .iter()
            .map(|(name, _)| End {
                key: name.clone(),
                value: None,
                ttl: Duration::ZERO,
            })
            .collect();
        if let Err(error) = self.session.end(&ends, self.token).await {
            engine.cache_failed("withdrawing a write", &error);
        }
    }

    /// Tries a command of a write, and once more with the same token when it failed: on the same
    /// connection, or on its successor if that is to the same server. A try that got no answer while
    /// this process was late itself says nothing about the cache and does not count. Returns the
    /// session on which it succeeded.
    async fn retry_once(&self, engine: &Engine, step: Step<'_>) -> Result<Observed, CacheError> {
        let mut session = self.session.clone();
        let mut failed = 0;
        for _ in 0..MAX_TRIES {
            let started = Instant::now();
            let error = match step.run(engine, &session, self.token).await {
                Ok(()) => return Ok(session),
                Err(error) => error,
            };
            let timed_out = matches!(error, CacheError::Timeout(_));
            if timed_out && engine.lateness.since(started) {
                engine.counters.late_timeouts.add(1);
                continue;
            }
            failed += 1;
            if failed == 2 {
                return Err(error);
            }
            match error {
                CacheError::Timeout(_) => {}
                CacheError::Command(_) => return Err(error),
                CacheError::Connection(_) => {
                    session = self.reconnected(engine).await.ok_or(error)?;
                }
            }
        }
        Err(CacheError::Connection(
            "this node was too late itself to hear the answers".into(),
        ))
    }

    /// A new session to the server of the write's epoch, if there is one within the grace.
    async fn reconnected(&self, engine: &Engine) -> Option<Observed> {
        let grace = engine.settings.reconnect_grace;
        let give_up = Instant::now() + grace;
        let mut changed = engine.changed.subscribe();
        loop {
            changed.borrow_and_update();
            {
                let view = engine.view();
                let same_epoch = view.node.row().is_some_and(|row| {
                    row.number == self.epoch
                        && row.mode == Mode::Cached(self.session.server().clone())
                });
                match &view.session {
                    _ if !same_epoch => return None,
                    Some(session)
                        if session.server() == self.session.server()
                            && !self.session.is(session) =>
                    {
                        return Some(Observed::new(session.clone(), Some(self.epoch)));
                    }
                    _ => {}
                }
            }
            let look_again = give_up.max(Instant::now() + grace / 4);
            if timeout_at(look_again, changed.changed()).await.is_err()
                && engine.waited_in_vain(give_up)
            {
                return None;
            }
        }
    }
}
