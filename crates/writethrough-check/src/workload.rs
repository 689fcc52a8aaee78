//! The workload: processes that invoke operations at random, and write down what came of them.
//!
//! The items form a small set with a hot end, so that operations meet. Reads also go to items that
//! were deleted a moment ago. Which operation a process invokes next follows from the seed; how the
//! operations of several processes fall together does not.
//!
//! A value is put into an item three times: as its name, in its description and as its price. An
//! answer whose three parts do not belong together is recorded as a value of its own, which nobody
//! wrote.
//!
//! Nothing is judged here.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::{Method, StatusCode};
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::client::{Client, Item, ItemsPage, Reply, Target, problem_type};
use crate::history::{Action, Header, History, Outcome, Record, RecordedItem, Stall};
use crate::time::Clock;

/// How often each kind of operation is invoked, as weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Weight of reads.
    pub read: u32,
    /// Weight of lists.
    pub list: u32,
    /// Weight of updates.
    pub update: u32,
    /// Weight of creates.
    pub create: u32,
    /// Weight of deletes.
    pub delete: u32,
}

impl Default for Mix {
    fn default() -> Self {
        Self {
            read: 60,
            list: 10,
            update: 22,
            create: 4,
            delete: 4,
        }
    }
}

impl Mix {
    fn weights(self) -> [(Action, u32); 5] {
        [
            (Action::Read, self.read),
            (Action::List, self.list),
            (Action::Update, self.update),
            (Action::Create, self.create),
            (Action::Delete, self.delete),
        ]
    }

    fn pick(self, random: &mut fastrand::Rng) -> Action {
        let total: u32 = self.weights().iter().map(|(_, weight)| weight).sum();
        let mut at = random.u32(0..total.max(1));
        for (action, weight) in self.weights() {
            if at < weight {
                return action;
            }
            at -= weight;
        }
        Action::Read
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self
            .weights()
            .iter()
            .map(|(action, weight)| format!("{}={weight}", action.name()))
            .collect();
        f.write_str(&parts.join(","))
    }
}

impl FromStr for Mix {
    type Err = String;

    /// Parses `read=60,list=10,update=22,create=4,delete=4`; what is left out is never invoked.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut mix = Self {
            read: 0,
            list: 0,
            update: 0,
            create: 0,
            delete: 0,
        };
        for part in text.split(',') {
            let (name, weight) = part
                .split_once('=')
                .ok_or_else(|| format!("{part:?} is not NAME=WEIGHT"))?;
            let place = match name.trim() {
                "read" => &mut mix.read,
                "list" => &mut mix.list,
                "update" => &mut mix.update,
                "create" => &mut mix.create,
                "delete" => &mut mix.delete,
                _ => {
                    return Err(format!(
                        "{name:?} is none of read, list, update, create and delete"
                    ));
                }
            };
            *place = weight
                .trim()
                .parse()
                .ok()
                .filter(|weight| *weight <= 1_000_000)
                .ok_or_else(|| format!("{weight:?} is not a number from 0 to 1000000"))?;
        }
        if mix.weights().iter().all(|(_, weight)| *weight == 0) {
            return Err("all weights are 0".to_owned());
        }
        Ok(mix)
    }
}

/// What to do to which services.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Base addresses of the services.
    pub targets: Vec<String>,
    /// Processes that run at the same time.
    pub processes: u32,
    /// Items that exist at any time, about.
    pub keys: usize,
    /// Stop after this time.
    pub duration: Option<Duration>,
    /// Stop after this many operations.
    pub operations: Option<u64>,
    /// How often each kind of operation is invoked.
    pub mix: Mix,
    /// Operations per second of all processes together; as many as they can when not set.
    pub rate: Option<f64>,
    /// Where the random choices start.
    pub seed: u64,
    /// An operation without an answer after this time has an unknown outcome.
    pub request_timeout: Duration,
    /// The first items must have been created after this time.
    pub wait: Duration,
    /// Types of problems (RFC 9457), by their last part, with which a 503 says that a write was not
    /// made.
    pub not_made: Vec<String>,
    /// Each process uses one target only, in turn, so that a target that does not answer holds up
    /// its own processes and no others. Otherwise every process uses all of them.
    pub pinned: bool,
    /// The clock of the history.
    pub clock: Clock,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            targets: Vec::new(),
            processes: 16,
            keys: 8,
            duration: Some(Duration::from_secs(30)),
            operations: None,
            mix: Mix::default(),
            rate: None,
            seed: 0,
            request_timeout: Duration::from_secs(10),
            wait: Duration::from_secs(10),
            not_made: vec!["unavailable".to_owned(), "overloaded".to_owned()],
            pinned: false,
            clock: Clock::default(),
        }
    }
}

/// Seen from outside while a workload runs: how far it is, and a way to stop it.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    hits: AtomicU64,
    stopped: AtomicBool,
}

impl Progress {
    /// Operations completed.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Reads of one item of which the service said that it answered them from its cache.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }

    /// Lets the processes finish the operations they are at, and no more.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}

/// Why a workload did not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkloadError {
    /// An address cannot be used.
    #[error("{0}")]
    Target(String),
    /// No item could be created to begin with.
    #[error("no item could be created at {target}: {reason}")]
    Unreachable {
        /// The last service that was tried.
        target: String,
        /// What it said, or why it said nothing.
        reason: String,
    },
}

/// Wait after an operation that was not answered, so that a dead service is not hammered.
const PAUSE: Duration = Duration::from_millis(20);
/// How often it is looked whether this program is held up.
const TICK: Duration = Duration::from_millis(10);
/// Items on a page that is read for itself.
const PAGE: usize = 10;
/// Items on each page of a whole list.
const LONG_PAGE: usize = 50;
/// Pages of a whole list, at most.
const PAGES: usize = 20;

/// Runs the workload to its end, then reads each item once more through each target.
///
/// # Errors
///
/// When no service could be used at all. Everything that happens later is part of the history.
///
/// # Cancellation
///
/// Dropping the future ends all processes; their operations may have been sent.
pub async fn run(settings: &Settings, progress: &Arc<Progress>) -> Result<History, WorkloadError> {
    run_then(settings, progress, async {}).await
}

/// The same as [`run`], and waits for `calm` before it reads each item once more.
///
/// # Errors
///
/// As for [`run`]; then `calm` is not waited for.
///
/// # Cancellation
///
/// As for [`run`].
pub async fn run_then(
    settings: &Settings,
    progress: &Arc<Progress>,
    calm: impl Future<Output = ()>,
) -> Result<History, WorkloadError> {
    let targets: Vec<Arc<Target>> = settings
        .targets
        .iter()
        .map(|url| Target::parse(url).map(Arc::new))
        .collect::<Result<_, _>>()
        .map_err(WorkloadError::Target)?;
    if targets.is_empty() {
        return Err(WorkloadError::Target("no target was given".to_owned()));
    }
    // Items of an earlier run with the same seed must not be taken for those of this one.
    let nonce = fastrand::Rng::new().u32(..);
    let shared = Arc::new(Shared {
        settings: settings.clone(),
        targets,
        prefix: format!("{nonce:08x}-"),
        pool: Mutex::default(),
        history: Mutex::new(History::new(Header {
            seed: Some(settings.seed),
            targets: settings.targets.clone(),
            ..Header::default()
        })),
        progress: Arc::clone(progress),
        invoked: AtomicU64::new(0),
    });

    set_up(&shared).await?;
    let begun = Instant::now();
    let mut watching = JoinSet::new();
    let watched = shared.clone();
    watching.spawn(watch_for_hold_ups(settings.clock, move |longest| {
        lock(&watched.history).header.held_up = Some(longest);
    }));
    let mut processes = JoinSet::new();
    for number in 0..settings.processes {
        let process = Process::new(&shared, number);
        processes.spawn(process.work(begun));
    }
    while processes.join_next().await.is_some() {}
    calm.await;
    for target in 0..shared.targets.len() {
        let number = settings.processes + target as u32;
        processes.spawn(Process::new(&shared, number).look_again(target));
    }
    while processes.join_next().await.is_some() {}
    let history = std::mem::take(&mut *lock(&shared.history));
    Ok(history)
}

/// Measures by how much a short sleep is too long, and hands over each new longest time: for so
/// long nothing ran on this thread, or none at all.
async fn watch_for_hold_ups(clock: Clock, longest: impl Fn(Stall)) {
    let mut longest_ns = 0;
    loop {
        let due = clock.now() + TICK.as_nanos() as i64;
        sleep(TICK).await;
        let length = clock.now() - due;
        if length > longest_ns {
            longest_ns = length;
            longest(Stall { from: due, length });
        }
    }
}

async fn set_up(shared: &Arc<Shared>) -> Result<(), WorkloadError> {
    let begun = Instant::now();
    let number = shared.settings.processes + shared.targets.len() as u32;
    let mut process = Process::new(shared, number);
    let mut target = 0;
    while lock(&shared.pool).living.len() < shared.settings.keys.max(1) {
        if let Err(reason) = process.create(target).await {
            if begun.elapsed() >= shared.settings.wait || shared.progress.stopped() {
                let target = shared.settings.targets[target].clone();
                return Err(WorkloadError::Unreachable { target, reason });
            }
            sleep(PAUSE * 5).await;
        }
        target = (target + 1) % shared.targets.len();
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    targets: Vec<Arc<Target>>,
    prefix: String,
    pool: Mutex<Pool>,
    history: Mutex<History>,
    progress: Arc<Progress>,
    invoked: AtomicU64,
}

/// The items that the processes know of.
#[derive(Debug, Default)]
struct Pool {
    living: Vec<Arc<str>>,
    /// Deleted a moment ago, or meant to be.
    graves: VecDeque<Arc<str>>,
}

impl Pool {
    /// Mostly one of the first items, and with probability `grave` a deleted one.
    fn pick(&self, random: &mut fastrand::Rng, grave: f64) -> Option<Arc<str>> {
        if !self.graves.is_empty() && random.f64() < grave {
            return Some(Arc::clone(&self.graves[random.usize(..self.graves.len())]));
        }
        let skewed = random.f64().powi(2);
        let at = (skewed * self.living.len() as f64) as usize;
        self.living.get(at).cloned()
    }

    fn bury(&mut self, random: &mut fastrand::Rng, keep: usize) -> Option<Arc<str>> {
        if self.living.is_empty() {
            return None;
        }
        let key = self.living.swap_remove(random.usize(..self.living.len()));
        self.graves.push_back(key.clone());
        if self.graves.len() > keep {
            self.graves.pop_front();
        }
        Some(key)
    }
}

/// One client process.
#[derive(Debug)]
struct Process {
    shared: Arc<Shared>,
    number: u32,
    clients: Vec<Client>,
    random: fastrand::Rng,
    written: u64,
}

/// What an operation came to, before it is recorded.
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
    fn new(shared: &Arc<Shared>, number: u32) -> Self {
        let clients = shared
            .targets
            .iter()
            .map(|target| Client::new(Arc::clone(target), shared.settings.request_timeout))
            .collect();
        let seed = shared.settings.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(number);
        Self {
            shared: Arc::clone(shared),
            number,
            clients,
            random: fastrand::Rng::with_seed(seed),
            written: 0,
        }
    }

    /// Invokes operations until time, or their number, runs out.
    async fn work(mut self, begun: Instant) {
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
    async fn look_again(mut self, target: usize) {
        let keys: Vec<Arc<str>> = {
            let pool = lock(&self.shared.pool);
            pool.living.iter().chain(&pool.graves).cloned().collect()
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
        let pushed = lock(&self.shared.history).push(record);
        debug_assert_eq!(pushed, Ok(()));
        self.shared.progress.done.fetch_add(1, Ordering::Relaxed);
    }

    /// The number of items stays near the number asked for.
    async fn create_or_delete(&mut self, target: usize, create: bool) -> bool {
        let keys = self.shared.settings.keys.max(1);
        let living = lock(&self.shared.pool).living.len();
        if living * 2 <= keys || (create && living < keys * 2) {
            self.create(target).await.is_ok()
        } else {
            self.delete(target).await
        }
    }

    async fn create(&mut self, target: usize) -> Result<(), String> {
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
                lock(&self.shared.pool).living.push(item.id.into());
                Ok(())
            }
            None => Err(reason),
        }
    }

    async fn update(&mut self, target: usize) -> bool {
        let Some(key) = lock(&self.shared.pool).pick(&mut self.random, 0.03) else {
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
        let Some(key) = lock(&self.shared.pool).bury(&mut self.random, keep) else {
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
        let key = key.or_else(|| lock(&self.shared.pool).pick(&mut self.random, 0.08));
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
                let hits = &self.shared.progress.hits;
                hits.fetch_add(u64::from(hit), Ordering::Relaxed);
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
            value: item.as_ref().map(|item| self.value_of(item)),
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
                    value: self.value_of(item),
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

    /// The value that an item holds, if its parts belong together.
    fn value_of<'i>(&self, item: &'i Item) -> Cow<'i, str> {
        let name = item.name.as_str();
        let whole = !name.starts_with(&self.shared.prefix)
            || (item.description.as_deref() == Some(description_of(name).as_str())
                && item.price.cents() == Some(cents_of(name)));
        if whole {
            return name.into();
        }
        let description = item.description.as_deref().unwrap_or_default();
        format!("{name} mixed with {description:?} and {:?}", item.price).into()
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

/// The creation times strictly between which the page shows all items, see the history format.
fn window_of(page: &ItemsPage, newer: Option<i64>) -> Option<(Option<i64>, Option<i64>)> {
    let times: Vec<i64> = page.items.iter().map(created_of).collect::<Option<_>>()?;
    if !times.is_sorted_by(|newer, older| newer >= older) {
        return None;
    }
    match (&page.next_cursor, times.last()) {
        (None, _) => Some((newer, None)),
        (Some(_), Some(&last)) => Some((newer, Some(last))),
        (Some(_), None) => None,
    }
}

fn created_of(item: &Item) -> Option<i64> {
    let time = OffsetDateTime::parse(item.created_at.as_deref()?, &Rfc3339).ok()?;
    i64::try_from(time.unix_timestamp_nanos()).ok()
}

fn description_of(value: &str) -> String {
    format!("value {value}")
}

/// A price that depends on all of the value (FNV-1a).
fn cents_of(value: &str) -> i64 {
    let hash = value.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash % 10_000_000) as i64
}

fn body_of(value: &str) -> Vec<u8> {
    let cents = cents_of(value);
    let price = cents as f64 / 100.0;
    json!({ "name": value, "description": description_of(value), "price": price })
        .to_string()
        .into_bytes()
}

/// Percent-encodes a cursor for a query.
fn escape(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_is_parsed_and_shown() {
        assert_eq!(
            "read=3, update=1".parse::<Mix>().unwrap().to_string(),
            "read=3,list=0,update=1,create=0,delete=0"
        );
        for wrong in ["", "read", "read=x", "reed=1", "read=0"] {
            assert!(wrong.parse::<Mix>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_mix_is_kept_to() {
        let mix: Mix = "read=3,delete=1".parse().unwrap();
        let mut random = fastrand::Rng::with_seed(1);
        let reads = (0..4_000)
            .filter(|_| mix.pick(&mut random) == Action::Read)
            .count();
        assert!((2_800..3_200).contains(&reads), "{reads}");
    }

    #[tokio::test]
    async fn a_thread_that_is_held_up_is_noticed() {
        let noticed = Arc::new(Mutex::new(Stall::default()));
        let longest = noticed.clone();
        let mut watching = JoinSet::new();
        watching.spawn(watch_for_hold_ups(Clock::default(), move |new| {
            *lock(&longest) = new;
        }));
        sleep(TICK * 2).await;
        let (begun, held_up) = (Instant::now(), Duration::from_millis(200));
        while begun.elapsed() < held_up {
            std::hint::spin_loop();
        }
        sleep(TICK * 2).await;
        let noticed = Duration::from_nanos(lock(&noticed).length as u64);
        assert!(noticed >= held_up - TICK, "{noticed:?}");
    }

    #[test]
    fn a_page_promises_what_lies_between_its_edges() {
        let item = |second: u32| -> Item {
            serde_json::from_value(json!({
                "id": "x", "name": "n", "price": 1, "created_at": format!("1970-01-01T00:00:{second:02}Z"),
            }))
            .unwrap()
        };
        let page = |seconds: &[u32], more: bool| ItemsPage {
            items: seconds.iter().copied().map(item).collect(),
            next_cursor: more.then(|| "c".to_owned()),
        };
        const S: i64 = 1_000_000_000;
        assert_eq!(
            window_of(&page(&[9, 5], true), None),
            Some((None, Some(5 * S)))
        );
        assert_eq!(
            window_of(&page(&[4], false), Some(5 * S)),
            Some((Some(5 * S), None))
        );
        assert_eq!(window_of(&page(&[], false), None), Some((None, None)));
        assert_eq!(window_of(&page(&[], true), None), None);
        assert_eq!(window_of(&page(&[5, 9], true), None), None);
    }

    #[test]
    fn cursors_are_escaped() {
        assert_eq!(escape("a+b/c=~"), "a%2Bb%2Fc%3D~");
    }
}
