//! A client process: it invokes one operation after the other and records what came of each.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::{Method, StatusCode};
use tokio::time::sleep;

use super::pool::Pool;
use super::progress::Progress;
use super::settings::Settings;
use super::value::{body_of, created_of, escape, value_of, window_of};
use crate::client::{Client, Item, ItemsPage, Reply, Target, problem_type};
use crate::history::{Action, Header, History, Outcome, Record, RecordedItem};

/// A process waits this long after an operation that was not answered.
pub(crate) const PAUSE: Duration = Duration::from_millis(20);
/// Items on a page that is read for itself.
const PAGE: usize = 10;
/// Items on each page of a whole list.
const LONG_PAGE: usize = 50;
/// Pages of a whole list, at most.
const PAGES: usize = 20;

/// The state that all processes of a workload share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) settings: Settings,
    pub(crate) targets: Vec<Arc<Target>>,
    pub(crate) prefix: String,
    pool: Mutex<Pool>,
    history: Mutex<History>,
    pub(crate) progress: Arc<Progress>,
    invoked: AtomicU64,
}

impl Shared {
    pub(crate) fn new(
        settings: &Settings,
        targets: Vec<Arc<Target>>,
        progress: Arc<Progress>,
    ) -> Self {
        // Items of an earlier run with the same seed must not be taken for those of this one.
        let nonce = fastrand::Rng::new().u32(..);
        Self {
            settings: settings.clone(),
            targets,
            prefix: format!("{nonce:08x}-"),
            pool: Mutex::default(),
            history: Mutex::new(History::new(Header {
                seed: Some(settings.seed),
                targets: settings.targets.clone(),
                ..Header::default()
            })),
            progress,
            invoked: AtomicU64::new(0),
        }
    }

    pub(crate) fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One client process.
#[derive(Debug)]
pub(crate) struct Process {
    shared: Arc<Shared>,
    number: u32,
    clients: Vec<Client>,
    random: fastrand::Rng,
    written: u64,
}

/// A completed operation, before it is recorded.
struct Completion<'a> {
    action: Action,
    target: usize,
    key: Option<&'a str>,
    value: Option<Cow<'a, str>>,
    start: i64,
    end: i64,
    outcome: Outcome,
    status: u16,
    item: Option<(Option<u64>, Option<i64>)>,
}

impl Process {
    pub(crate) fn new(shared: &Arc<Shared>, number: u32) -> Self {
        let clients = shared
            .targets
            .iter()
            .map(|target| Client::new(target.clone(), shared.settings.request_timeout))
            .collect();
        let seed = shared.settings.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(number);
        Self {
            shared: shared.clone(),
            number,
            clients,
            random: fastrand::Rng::with_seed(seed),
            written: 0,
        }
    }

    /// Invokes operations until time, or their number, runs out.
    pub(crate) async fn work(mut self, begun: Instant) {
        let settings = self.shared.settings.clone();
        let interval = settings
            .rate
            .map(|rate| Duration::from_secs_f64(f64::from(settings.processes) / rate.max(1e-3)));
        let mut next = Instant::now();
        if let Some(interval) = interval {
            next += interval.mul_f64(self.random.f64());
        }
        loop {
            if interval.is_some() {
                tokio::time::sleep_until(next.into()).await;
            }
            if let Some(interval) = interval {
                next = (next + interval).max(Instant::now());
            }
            let time_is_up = settings
                .duration
                .is_some_and(|limit| begun.elapsed() >= limit);
            if time_is_up || self.shared.progress.stopped() {
                return;
            }
            let invoked = self.shared.invoked.fetch_add(1, Ordering::Relaxed);
            if settings.operations.is_some_and(|limit| invoked >= limit) {
                return;
            }
            let target = if settings.pinned {
                self.number as usize % self.clients.len()
            } else {
                self.random.usize(..self.clients.len())
            };
            let answered = match settings.mix.pick(&mut self.random) {
                Action::Read => self.read(target, None).await,
                Action::List => self.list(target).await,
                Action::Update => self.update(target).await,
                Action::Create => self.create_or_delete(target, true).await,
                Action::Delete => self.create_or_delete(target, false).await,
            };
            if !answered {
                sleep(PAUSE).await;
            }
        }
    }

    /// Reads everything once through one target when the others have finished, so that what was
    /// left behind is seen.
    pub(crate) async fn read_everything(mut self, target: usize) {
        let keys: Vec<Arc<str>> = {
            let pool = self.shared.pool();
            pool.living.iter().chain(&pool.deleted).cloned().collect()
        };
        for key in keys {
            self.read(target, Some(key)).await;
        }
        self.pages(target, LONG_PAGE, PAGES).await;
    }

    fn next_value(&mut self) -> String {
        self.written += 1;
        format!("{}{}-{}", self.shared.prefix, self.number, self.written)
    }

    fn now(&self) -> i64 {
        self.shared.settings.clock.now()
    }

    fn record(&self, completion: Completion<'_>) {
        let (version, created) = completion.item.unwrap_or_default();
        self.push(&Record {
            process: self.number,
            action: completion.action,
            key: completion.key.map(Cow::from),
            value: completion.value,
            version,
            created,
            start: completion.start,
            end: completion.end,
            outcome: completion.outcome,
            status: completion.status,
            target: completion.target as u16,
            window: None,
            items: Vec::new(),
        });
    }

    fn push(&self, record: &Record<'_>) {
        // A record is refused only if it contradicts the format, which those made here do not.
        let pushed = self.shared.history().push(record);
        debug_assert_eq!(pushed, Ok(()));
        self.shared.progress.count_operation();
    }

    /// The number of items stays near the number asked for.
    async fn create_or_delete(&mut self, target: usize, create: bool) -> bool {
        let keys = self.shared.settings.keys.max(1);
        let living = self.shared.pool().living.len();
        if living * 2 <= keys || (create && living < keys * 2) {
            self.create(target).await.is_ok()
        } else {
            self.delete(target).await
        }
    }

    pub(crate) async fn create(&mut self, target: usize) -> Result<(), String> {
        let value = self.next_value();
        let body = body_of(&value);
        let start = self.now();
        let reply = self.clients[target]
            .send(Method::POST, "/items", Some(body))
            .await;
        let end = self.now();
        let (mut outcome, status, reason) = self.write_outcome(&reply);
        let item = match &reply {
            Reply::Answer { body, .. } if outcome == Outcome::Ok => {
                serde_json::from_slice::<Item>(body).ok()
            }
            _ => None,
        };
        match outcome {
            // Something was made, and nobody knows what.
            Outcome::Ok if item.is_none() => outcome = Outcome::Unknown,
            // A service without this route creates nothing.
            Outcome::Absent => outcome = Outcome::Failed,
            _ => {}
        }
        self.record(Completion {
            action: Action::Create,
            target,
            key: item.as_ref().map(|item| item.id.as_str()),
            value: Some(value.as_str().into()),
            start,
            end,
            outcome,
            status,
            item: item.as_ref().map(|item| (item.version, created_of(item))),
        });
        match item {
            Some(item) => {
                self.shared.pool().living.push(item.id.into());
                Ok(())
            }
            None => Err(reason),
        }
    }

    async fn update(&mut self, target: usize) -> bool {
        let Some(key) = self.shared.pool().pick(&mut self.random, 0.03) else {
            return self.create(target).await.is_ok();
        };
        let value = self.next_value();
        let body = body_of(&value);
        let start = self.now();
        let path = format!("/items/{key}");
        let reply = self.clients[target]
            .send(Method::PUT, &path, Some(body))
            .await;
        let end = self.now();
        let (outcome, status, _) = self.write_outcome(&reply);
        let item = match &reply {
            Reply::Answer { body, .. } if outcome == Outcome::Ok => {
                serde_json::from_slice::<Item>(body).ok()
            }
            _ => None,
        };
        // An answer that shows another value says nothing about the version of this one.
        let version = item
            .filter(|item| item.name == value)
            .and_then(|item| item.version);
        self.record(Completion {
            action: Action::Update,
            target,
            key: Some(&key),
            value: Some(value.into()),
            start,
            end,
            outcome,
            status,
            item: Some((version, None)),
        });
        matches!(outcome, Outcome::Ok | Outcome::Absent)
    }

    async fn delete(&mut self, target: usize) -> bool {
        let keep = self.shared.settings.keys.max(4);
        let Some(key) = self.shared.pool().delete(&mut self.random, keep) else {
            return self.create(target).await.is_ok();
        };
        let start = self.now();
        let path = format!("/items/{key}");
        let reply = self.clients[target].send(Method::DELETE, &path, None).await;
        let end = self.now();
        let (outcome, status, _) = self.write_outcome(&reply);
        self.record(Completion {
            action: Action::Delete,
            target,
            key: Some(&key),
            value: None,
            start,
            end,
            outcome,
            status,
            item: None,
        });
        matches!(outcome, Outcome::Ok | Outcome::Absent)
    }

    async fn read(&mut self, target: usize, key: Option<Arc<str>>) -> bool {
        let key = key.or_else(|| self.shared.pool().pick(&mut self.random, 0.08));
        let Some(key) = key else {
            return self.create(target).await.is_ok();
        };
        let start = self.now();
        let path = format!("/items/{key}");
        let reply = self.clients[target].send(Method::GET, &path, None).await;
        let end = self.now();
        let (outcome, status, item) = match reply {
            Reply::Answer {
                status: StatusCode::OK,
                body,
                hit,
            } => {
                if hit {
                    self.shared.progress.count_hit();
                }
                let item = serde_json::from_slice::<Item>(&body).ok();
                let outcome = if item.is_some() {
                    Outcome::Ok
                } else {
                    Outcome::Failed
                };
                (outcome, 200, item)
            }
            Reply::Answer {
                status: StatusCode::NOT_FOUND,
                ..
            } => (Outcome::Absent, 404, None),
            Reply::Answer { status, .. } => (Outcome::Failed, status.as_u16(), None),
            Reply::NotSent(_) | Reply::Lost(_) => (Outcome::Failed, 0, None),
        };
        self.record(Completion {
            action: Action::Read,
            target,
            key: Some(&key),
            value: item
                .as_ref()
                .map(|item| value_of(&self.shared.prefix, item)),
            start,
            end,
            outcome,
            status,
            item: item.as_ref().map(|item| (item.version, None)),
        });
        outcome != Outcome::Failed
    }

    async fn list(&mut self, target: usize) -> bool {
        if self.random.u8(0..4) > 0 {
            self.pages(target, PAGE, 1).await
        } else {
            self.pages(target, LONG_PAGE, PAGES).await
        }
    }

    /// Reads up to `count` pages, each an operation of its own.
    async fn pages(&mut self, target: usize, limit: usize, count: usize) -> bool {
        let mut cursor: Option<String> = None;
        let mut newer = None;
        for _ in 0..count {
            let path = match &cursor {
                None => format!("/items?limit={limit}"),
                Some(cursor) => format!("/items?limit={limit}&cursor={}", escape(cursor)),
            };
            let start = self.now();
            let reply = self.clients[target].send(Method::GET, &path, None).await;
            let end = self.now();
            let (status, page) = match reply {
                Reply::Answer {
                    status: StatusCode::OK,
                    body,
                    ..
                } => (200, serde_json::from_slice::<ItemsPage>(&body).ok()),
                Reply::Answer { status, .. } => (status.as_u16(), None),
                Reply::NotSent(_) | Reply::Lost(_) => (0, None),
            };
            let answered = page.is_some();
            let page = page.unwrap_or(ItemsPage {
                items: Vec::new(),
                next_cursor: None,
            });
            let window = window_of(&page, newer);
            let items = page
                .items
                .iter()
                .map(|item| RecordedItem {
                    key: item.id.as_str().into(),
                    value: value_of(&self.shared.prefix, item),
                    version: item.version,
                    created: created_of(item),
                })
                .collect();
            self.push(&Record {
                process: self.number,
                action: Action::List,
                key: None,
                value: None,
                version: None,
                created: None,
                start,
                end,
                outcome: if answered {
                    Outcome::Ok
                } else {
                    Outcome::Failed
                },
                status,
                target: target as u16,
                window: window.filter(|_| answered),
                items,
            });
            if !answered {
                return false;
            }
            newer = window.and_then(|window| window.1);
            cursor = page.next_cursor;
            if cursor.is_none() || newer.is_none() {
                break;
            }
        }
        true
    }

    fn write_outcome(&self, reply: &Reply) -> (Outcome, u16, String) {
        match reply {
            Reply::Answer { status, body, .. } => {
                let outcome = match status.as_u16() {
                    200..=299 => Outcome::Ok,
                    404 => Outcome::Absent,
                    // The request may have been taken up all the same.
                    408 => Outcome::Unknown,
                    400..=499 => Outcome::Failed,
                    503 if problem_type(body)
                        .is_some_and(|kind| self.shared.settings.not_made.contains(&kind)) =>
                    {
                        Outcome::Failed
                    }
                    _ => Outcome::Unknown,
                };
                (outcome, status.as_u16(), format!("status {status}"))
            }
            Reply::NotSent(reason) => (Outcome::Failed, 0, reason.clone()),
            Reply::Lost(reason) => (Outcome::Unknown, 0, reason.clone()),
        }
    }
}
