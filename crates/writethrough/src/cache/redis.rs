//! The Redis cache: two multiplexed, verified connections that are made anew when one fails.
//!
//! One carries what reads do, values and pages among it, the other the small commands and answers of
//! writes and checks. So a long reply, which may take longer than a command's deadline on a slow link,
//! delays reads alone, and those go to the store; it never costs a write its answer, or all nodes the
//! epoch.
//!
//! A connection is used only after the server has told who it is, that it is a master, that it is
//! not loading, and has accepted a write. It never reconnects under the hood: a lost connection ends
//! its [`Session`], and the next session is verified again.
//!
//! Who it is: the process (`run_id`), its data set (`master_replid`) and the database index. A server
//! that was another's replica for a moment has that one's data and goes on under the same `run_id`.
//! When a data set is replaced or flushed, Redis tells connections that track keys, before anything
//! that it answers later; so each connection tracks a prefix that nobody uses, and after such a
//! message no answer counts until the server has told once more who it is.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{
    Arg, AsyncConnectionConfig, Client, Cmd, ErrorKind, IntoConnectionInfo, Pipeline,
    ProtocolVersion, PushInfo, PushKind, RedisError, Script, ServerErrorKind, Value,
};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;
use writethrough_protocol::page::Page;
use writethrough_protocol::{Acquire, KeyState, Payload, ServerId, Token};

use super::{Cache, End, Fill, FillLease, Filled, Lease, Session, SessionWatch};
use crate::error::CacheError;
use crate::lateness::Lateness;
use crate::runtime;

mod settings;
#[cfg_attr(not(feature = "redis-tls"), path = "redis/no_tls.rs")]
mod tls;

pub use settings::{
    InvalidRedisCertificates, InvalidRedisUrl, RedisCertificates, RedisConnectError, RedisSettings,
};

/// Keys that one step of a walk asks for: about a tenth of a millisecond of the server's time.
const WALK_BATCH: usize = 128;
/// Keys, and bytes, of a write that are sent at once, so that each answer comes well within its bound.
const STEP_KEYS: usize = 256;
const STEP_BYTES: usize = 1 << 20;
/// Longest pause between two attempts to connect.
const MAX_BACKOFF: Duration = Duration::from_millis(500);
/// How often an idle connection is checked, which also finds a master that was demoted.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// The keys that are written only to see whether that is possible begin like this.
const PROBE_PREFIX: &str = "writethrough:probe:";
/// Prefixes of refused keys that are remembered; an application has a few entities and collections.
const MAX_PREFIXES: usize = 64;
/// How long what a probe has written lasts when the probe does not come to its end.
const PROBE_MS: u64 = 1000;
/// What is longer is no value of ours, whatever the settings of the node that stored it.
const LONGEST_VALUE: usize = crate::settings::MAX_BYTES + 64;
/// Keys that got no answer in time and are looked into at once.
const MAX_SLOW: usize = 16;
/// How often the log tells of lost connections.
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// No key begins like this: it is tracked only to be told when a data set is flushed or replaced.
const TRACKED_PREFIX: &str = "writethrough:nothing:";
/// How far this side's idea of the server's clock may be off before an intent is looked into.
const CLOCK_SLACK_MS: u64 = 1000;

/// A script and the hash by which a server that has it loaded is told to run it.
struct Lua {
    text: &'static str,
    hash: String,
}

struct Scripts {
    begin: Lua,
    end: Lua,
    fill: Lua,
    renew_fill: Lua,
    break_fill: Lua,
    fill_page: Lua,
    lapse: Lua,
    discard: Lua,
    drop_long: Lua,
    clear: Lua,
    count: Lua,
}

impl Scripts {
    fn new() -> Self {
        let lua = |text| Lua {
            text,
            hash: Script::new(text).get_hash().to_owned(),
        };
        Self {
            begin: lua(concat!(
                include_str!("lua/intent.lua"),
                include_str!("lua/begin.lua")
            )),
            end: lua(concat!(
                include_str!("lua/intent.lua"),
                include_str!("lua/end.lua")
            )),
            fill: lua(include_str!("lua/fill.lua")),
            renew_fill: lua(include_str!("lua/renew_fill.lua")),
            break_fill: lua(include_str!("lua/break_fill.lua")),
            fill_page: lua(include_str!("lua/fill_page.lua")),
            lapse: lua(concat!(
                include_str!("lua/intent.lua"),
                include_str!("lua/lapse.lua")
            )),
            discard: lua(include_str!("lua/discard.lua")),
            drop_long: lua(include_str!("lua/drop_long.lua")),
            clear: lua(include_str!("lua/clear.lua")),
            count: lua(include_str!("lua/count.lua")),
        }
    }

    fn all(&self) -> [(&'static str, &Lua); 11] {
        let Self {
            begin,
            end,
            fill,
            renew_fill,
            break_fill,
            fill_page,
            lapse,
            discard,
            drop_long,
            clear,
            count,
        } = self;
        [
            ("begin", begin),
            ("end", end),
            ("fill", fill),
            ("renew_fill", renew_fill),
            ("break_fill", break_fill),
            ("fill_page", fill_page),
            ("lapse", lapse),
            ("discard", discard),
            ("drop_long", drop_long),
            ("clear", clear),
            ("count", count),
        ]
    }

    fn load_all(&self) -> Pipeline {
        let mut pipeline = Pipeline::new();
        for (_, script) in self.all() {
            pipeline.cmd("SCRIPT").arg("LOAD").arg(script.text).ignore();
        }
        pipeline
    }

    /// Every command and every script on a key that begins like this, in an order in which each
    /// script runs all of its commands, and each with its name. The commands that scripts call come
    /// by themselves too, since a script's error does not say which of them was refused.
    fn probes(&self, prefix: &str) -> Vec<(String, Cmd)> {
        let id = Uuid::new_v4().simple();
        // As the engine's own keys: `item:<id>@...`, `{items}@...` and `{items}@...:<query>`.
        let key = if prefix.ends_with('}') {
            format!("{prefix}@probe-{id}.0")
        } else {
            format!("{prefix}{id}@probe.0")
        };
        let page = format!("{key}:probe");
        let (key, page) = (key.as_str(), page.as_str());
        let token = Token(1).encode();
        let lease = [b"L", &token[..]].concat();
        let mut probes = Vec::new();
        let mut plain = |words: &[&[u8]]| {
            let mut command = Cmd::new();
            command.arg(words);
            let name = String::from_utf8_lossy(words[0]).into_owned();
            probes.push((name, command));
        };
        let ms = PROBE_MS.to_string();
        let (name, ms) = (key.as_bytes(), ms.as_bytes());
        let take = [b"SET", name, &lease, b"NX", b"GET", b"PX", ms];
        plain(&[b"GET", name]);
        plain(&[b"MGET", name, page.as_bytes()]);
        plain(&take);
        plain(&[b"GETRANGE", name, b"0", b"0"]);
        plain(&[b"TYPE", name]);
        plain(&[b"PEXPIRE", name, ms]);
        plain(&[b"UNLINK", name]);
        plain(&[b"DEL", name]);
        plain(&[b"TIME"]);
        plain(&[b"SCAN", b"0", b"MATCH", name, b"COUNT", b"1"]);
        plain(&take);
        let mut script = |name: &str, script: &Lua, keys: &[&str], arguments: &[&[u8]]| {
            let mut command = evalsha(script, keys);
            command.arg(arguments);
            probes.push((format!("EVALSHA of {name}.lua"), command));
        };
        script("renew_fill", &self.renew_fill, &[key], &[&token, ms]);
        script("fill", &self.fill, &[key], &[&token, b"V", ms]);
        script("count", &self.count, &[key], &[]);
        script("discard", &self.discard, &[key], &[b""]);
        script("begin", &self.begin, &[key], &[&token, ms]);
        script("begin", &self.begin, &[key], &[&token, ms]);
        script("lapse", &self.lapse, &[key], &[]);
        script("end", &self.end, &[key], &[&token, &lease, ms]);
        script("break_fill", &self.break_fill, &[key], &[&token]);
        script("begin", &self.begin, &[key], &[&token, ms]);
        script("end", &self.end, &[key], &[&token, &lease, ms]);
        script(
            "fill_page",
            &self.fill_page,
            &[key, page],
            &[&token, b"P", ms],
        );
        script("drop_long", &self.drop_long, &[page], &[b"0"]);
        script("clear", &self.clear, &[key, page], &[]);
        probes
    }
}

/// Redis as the cache.
///
/// Needs Redis 7.0 or newer (or Valkey): `SET` with `NX` and `GET` together. One server, or a
/// primary with replicas behind a name; a proxy that spreads one connection over several servers
/// would defeat the verification and must not be used.
pub struct RedisCache {
    sessions: watch::Sender<Option<Arc<dyn Session>>>,
    trouble: Arc<Mutex<Option<CacheError>>>,
    stop: Arc<Notify>,
}

impl RedisCache {
    /// Starts connecting in the background and returns at once; [`Cache::sessions`] tells when
    /// there is a session. Must be called inside of a tokio runtime, in which the connection then
    /// lives: what that runtime must be is said in [`crate`].
    ///
    /// TLS uses the process's default provider of cryptography (`rustls::crypto::CryptoProvider`). When
    /// there is none yet, *ring* becomes it; install another one before, if you want another.
    ///
    /// # Errors
    ///
    /// [`RedisConnectError`] when the URL is malformed, the certificates cannot be used, or there is no
    /// runtime.
    pub fn connect(settings: RedisSettings) -> Result<Self, RedisConnectError> {
        if cfg!(not(feature = "redis-tls")) && settings.url.starts_with("rediss:") {
            return Err(RedisConnectError::BuiltWithoutTls);
        }
        let info = settings
            .url
            .as_str()
            .into_connection_info()
            .map_err(InvalidRedisUrl::because)?;
        let tcp = info.tcp_settings().clone().set_nodelay(true);
        // The server's messages about its data set need the third version of the protocol.
        let redis = info
            .redis_settings()
            .clone()
            .set_protocol(ProtocolVersion::RESP3);
        let database = redis.db();
        // Chosen later, since a server that is none to be used has no databases to choose from.
        let redis = redis.set_db(0);
        let info = info.set_tcp_settings(tcp).set_redis_settings(redis);
        let client = tls::client(info, &settings.certificates)?;
        let runtime = runtime::current()?;
        let (sessions, _) = watch::channel(None);
        let stop = Arc::new(Notify::new());
        let trouble = Arc::new(Mutex::new(None));
        let keeper = Keeper {
            trouble: trouble.clone(),
            client,
            database,
            prefixes: Arc::new(Mutex::new(
                [PROBE_PREFIX.to_owned()]
                    .into_iter()
                    .chain(settings.key_prefixes.iter().cloned())
                    .collect(),
            )),
            settings,
            sessions: sessions.clone(),
            scripts: Arc::new(Scripts::new()),
            lateness: Lateness::watch(),
        };
        let stopped = stop.clone();
        runtime.spawn(async move {
            tokio::select! {
                () = keeper.keep() => {}
                () = stopped.notified() => {}
            }
            keeper.sessions.send_replace(None);
        });
        Ok(Self {
            sessions,
            trouble,
            stop,
        })
    }
}

impl fmt::Debug for RedisCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisCache").finish_non_exhaustive()
    }
}

impl Cache for RedisCache {
    fn sessions(&self) -> SessionWatch {
        self.sessions.subscribe()
    }

    fn trouble(&self) -> Option<CacheError> {
        let trouble = self.trouble.lock();
        trouble.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn close(&self) {
        self.stop.notify_one();
    }
}

impl Drop for RedisCache {
    fn drop(&mut self) {
        self.close();
    }
}

/// What the keys begin with on which a new connection is verified.
type Prefixes = Arc<Mutex<BTreeSet<String>>>;

/// Makes, verifies, watches and replaces the connection.
struct Keeper {
    client: Client,
    /// The index of the database on the server.
    database: i64,
    settings: RedisSettings,
    prefixes: Prefixes,
    /// Why there is no session.
    trouble: Arc<Mutex<Option<CacheError>>>,
    sessions: watch::Sender<Option<Arc<dyn Session>>>,
    scripts: Arc<Scripts>,
    lateness: Arc<Lateness>,
}

impl Keeper {
    async fn keep(&self) {
        let mut backoff = Duration::from_millis(10);
        let mut told = None;
        // When a lost connection was told of last, and whether the last one was not.
        let (mut told_at, mut quiet): (Option<Instant>, bool) = (None, false);
        let in_trouble = |problem| {
            let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
            *trouble = problem;
        };
        loop {
            let attempt = timeout(self.settings.connect_timeout, self.connect()).await;
            let problem = match attempt {
                Ok(Ok(session)) => {
                    if quiet {
                        tracing::debug!(server = %session.server, "Redis is connected and verified");
                    } else {
                        tracing::info!(server = %session.server, "Redis is connected and verified");
                    }
                    backoff = Duration::from_millis(10);
                    in_trouble(None);
                    let problem = self.watch(&session).await;
                    in_trouble(Some(problem.clone()));
                    let lately = told_at.is_some_and(|at| at.elapsed() < TELL_AGAIN);
                    quiet = lately && told.as_ref() == Some(&problem);
                    if quiet {
                        tracing::debug!("Redis connection lost: {problem}");
                    } else {
                        tracing::warn!("Redis connection lost: {problem}");
                        told_at = Some(Instant::now());
                        told = Some(problem);
                    }
                    continue;
                }
                Ok(Err(problem)) => problem,
                Err(_) => CacheError::Timeout(self.settings.connect_timeout),
            };
            in_trouble(Some(problem.clone()));
            if told.as_ref() != Some(&problem) {
                tracing::warn!("Redis cannot be used, going on without it: {problem}");
                told = Some(problem);
                quiet = false;
            }
            tokio::time::sleep(backoff.mul_f64(0.75 + 0.5 * fastrand::f64())).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    /// Opens a connection that tells of the server's messages.
    async fn open(&self, signs: &Arc<Signs>) -> Result<MultiplexedConnection, CacheError> {
        let told = signs.clone();
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.settings.connect_timeout))
            .set_response_timeout(Some(self.settings.command_timeout))
            // Called by the connection's driver before it hands on any later answer.
            .set_push_sender(move |push: PushInfo| {
                if matches!(push.kind, PushKind::Invalidate | PushKind::Disconnection) {
                    told.messages.fetch_add(1, Ordering::AcqRel);
                    told.arrived.notify_one();
                }
                Ok::<(), ()>(())
            });
        self.client
            .get_multiplexed_async_connection_with_config(&config)
            .await
            .map_err(|error| failure(&error, self.settings.connect_timeout))
    }

    async fn connect(&self) -> Result<Arc<RedisSession>, CacheError> {
        let failed = |error: RedisError| failure(&error, self.settings.command_timeout);
        let signs = Arc::new(Signs::default());
        // Side by side: each round may cost a node that is late itself a good part of the bound.
        let opened = tokio::try_join!(self.open(&signs), self.open(&signs));
        let (mut control, mut values) = opened?;
        self.require_fit(&mut control).await?;
        let tracked = tokio::try_join!(self.track(&mut control), self.track(&mut values));
        if let (Some(refused), _) = tracked.map_err(failed)? {
            tracing::warn!(
                "the Redis server refuses CLIENT TRACKING ({refused}): a data set that is replaced under \
                 a living connection is noticed within {HEARTBEAT:?}, not at once"
            );
        }
        self.try_everything(&mut control).await?;
        if self.database != 0 {
            let mut select = redis::cmd("SELECT");
            select.arg(self.database);
            select
                .query_async::<()>(&mut values)
                .await
                .map_err(failed)?;
        }
        let messages = signs.messages.load(Ordering::Acquire);
        let checked = tokio::try_join!(
            check(&mut control, self.database),
            check(&mut values, self.database)
        );
        let (Checked { server, clock }, of_values) = checked.map_err(failed)?;
        if of_values.server != server {
            return Err(CacheError::Connection(format!(
                "two connections led to two servers; {ONE_SERVER}"
            )));
        }
        let session = RedisSession {
            control,
            values,
            slow: Mutex::default(),
            slowed: Notify::new(),
            server,
            scripts: self.scripts.clone(),
            command_timeout: self.settings.command_timeout,
            trouble: Notify::new(),
            signs,
            prefixes: self.prefixes.clone(),
            refused: Mutex::new(None),
            checked: watch::Sender::new(None),
            checked_messages: AtomicU64::new(0),
            clock_offset_ms: AtomicI64::new(0),
        };
        session.passed(messages, clock);
        Ok(Arc::new(session))
    }

    /// Asks to be told when the data set is flushed or replaced. Returns why that is refused, if it is.
    async fn track(
        &self,
        connection: &mut MultiplexedConnection,
    ) -> Result<Option<String>, RedisError> {
        let mut track = redis::cmd("CLIENT");
        track
            .arg("TRACKING")
            .arg("ON")
            .arg("BCAST")
            .arg("PREFIX")
            .arg(TRACKED_PREFIX);
        match track.query_async::<()>(connection).await {
            Ok(()) => Ok(None),
            // Without the permission, or behind a proxy that does not know the command.
            Err(error) if matches!(error.kind(), ErrorKind::Server(_)) => {
                Ok(Some(one_line(&error)))
            }
            Err(error) => Err(error),
        }
    }

    /// Refuses what the server itself says it is: no single server, too old, loading, a replica.
    async fn require_fit(&self, connection: &mut MultiplexedConnection) -> Result<(), CacheError> {
        let timeout = self.settings.command_timeout;
        let mut pipeline = Pipeline::new();
        for section in ["server", "persistence", "replication"] {
            pipeline.cmd("INFO").arg(section);
        }
        let sections: Vec<String> = pipeline.query_async(connection).await.map_err(|error| {
            refusal("INFO", None, &error).unwrap_or_else(|| failure(&error, timeout))
        })?;
        let info = sections.concat();
        let unfit = |what: String| Err(CacheError::Connection(what));
        // Valkey calls it `server_mode`.
        let mode = info_field(&info, "redis_mode").or_else(|| info_field(&info, "server_mode"));
        match mode {
            Some("cluster") => {
                return unfit(format!(
                    "the server is a node of a Redis Cluster; {ONE_SERVER}"
                ));
            }
            Some("sentinel") => {
                return unfit(format!("the server is a Redis Sentinel; {ONE_SERVER}"));
            }
            _ => {}
        }
        if let Some(version) = info_field(&info, "redis_version")
            && version
                .split('.')
                .next()
                .and_then(|major| major.parse().ok())
                .unwrap_or(0)
                < 7
        {
            return unfit(format!(
                "Redis {version} is too old, 7.0 or newer is needed"
            ));
        }
        if info_field(&info, "loading") == Some("1") {
            return unfit("the server is loading its data".into());
        }
        require_master(&info).map_err(|error| failure(&error, timeout))
    }

    /// Chooses the database, loads the scripts, and runs every command and every script once on keys
    /// like those of the engine: what the server refuses is found here, and not by a write.
    async fn try_everything(
        &self,
        connection: &mut MultiplexedConnection,
    ) -> Result<(), CacheError> {
        let timeout = self.settings.command_timeout;
        let mut probes: Vec<(String, Option<String>, Cmd)> = Vec::new();
        if self.database != 0 {
            let mut select = redis::cmd("SELECT");
            select.arg(self.database);
            probes.push((format!("SELECT {}", self.database), None, select));
        }
        for (name, script) in self.scripts.all() {
            let mut load = redis::cmd("SCRIPT");
            load.arg("LOAD").arg(script.text);
            probes.push((format!("SCRIPT LOAD of {name}.lua"), None, load));
        }
        let prefixes = self.prefixes.lock();
        let prefixes = prefixes.unwrap_or_else(PoisonError::into_inner).clone();
        for prefix in prefixes {
            for (name, command) in self.scripts.probes(&prefix) {
                probes.push((name, Some(prefix.clone()), command));
            }
        }
        let mut pipeline = Pipeline::with_capacity(probes.len());
        for (_, _, command) in &probes {
            pipeline.add_command(command.clone());
        }
        let replies = connection
            .send_packed_commands(&pipeline, 0, probes.len())
            .await
            .map_err(|error| failure(&error, timeout))?;
        for ((name, prefix, _), reply) in probes.iter().zip(replies) {
            if let Err(error) = reply.extract_error() {
                return Err(refusal(name, prefix.as_deref(), &error).unwrap_or_else(|| {
                    CacheError::Connection(format!(
                        "the server answers {name}: {}",
                        one_line(&error)
                    ))
                }));
            }
        }
        Ok(())
    }

    /// Checks the session. No answer in time while this process was late itself is no answer at all.
    async fn check(&self, session: &RedisSession) -> Result<(), CacheError> {
        let mut late = 0;
        loop {
            let started = Instant::now();
            let (checked, lane) = match session.check(self.database).await {
                Ok(()) => (session.check_values().await, Lane::Values),
                failed => (failed, Lane::Control),
            };
            match (checked, lane) {
                (Err(CacheError::Timeout(_)), _)
                    if late < MAX_LATE_CHECKS && self.lateness.since(started) =>
                {
                    late += 1;
                }
                // What it still carries comes too late for whoever has asked: it is made anew.
                (Err(CacheError::Timeout(bound)), Lane::Values) => {
                    return Err(CacheError::Connection(format!(
                        "the server answers, but not within {bound:?} on the connection for values: they \
                         are too long for its speed"
                    )));
                }
                (checked, _) => return checked,
            }
        }
    }

    /// Publishes the session and watches it until it fails. After a command that got no answer
    /// the session is withdrawn while the connections are checked, so that requests stop waiting; not
    /// after a read, which may have waited for a long reply.
    async fn watch(&self, session: &Arc<RedisSession>) -> CacheError {
        let published: Arc<dyn Session> = session.clone();
        self.sessions.send_replace(Some(published.clone()));
        loop {
            let withdrawn = tokio::select! {
                () = session.trouble.notified() => true,
                () = session.slowed.notified() => false,
                () = session.signs.arrived.notified() => false,
                () = tokio::time::sleep(HEARTBEAT) => false,
            };
            if withdrawn {
                self.sessions.send_replace(None);
            }
            if let Err(error) = self.check(session).await {
                self.sessions.send_replace(None);
                session.checked.send_replace(Some(Err(error.clone())));
                return error;
            }
            if withdrawn {
                self.sessions.send_replace(Some(published.clone()));
            }
        }
    }
}

/// How often a check is made anew because this process was late itself.
const MAX_LATE_CHECKS: u32 = 4;

/// What a server has told on its own.
#[derive(Default)]
struct Signs {
    /// How often the server has said that data are gone or replaced, or has gone itself.
    messages: AtomicU64,
    arrived: Notify,
}

/// Which of its two connections a command takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    /// What writes wait for, checks, and walks: small commands with small answers.
    Control,
    /// What reads do: values and pages in either direction, and the leases to fill them. The answers
    /// come in the order in which the server has carried the commands out, so whoever was told of a
    /// lease hears of it before its holder hears that its fill was taken, and shares that load.
    Values,
}

struct RedisSession {
    control: MultiplexedConnection,
    values: MultiplexedConnection,
    /// Keys whose values did not arrive in time, until they have been looked into.
    slow: Mutex<Vec<String>>,
    slowed: Notify,
    server: ServerId,
    scripts: Arc<Scripts>,
    command_timeout: Duration,
    /// A command got no answer, or one that says that the server is not fit to be the cache.
    trouble: Notify,
    signs: Arc<Signs>,
    prefixes: Prefixes,
    /// The first command that this connection may not send, or not on that key.
    refused: Mutex<Option<CacheError>>,
    /// Up to which message the server has been checked since, or why the session is over.
    checked: watch::Sender<Option<Result<u64, CacheError>>>,
    /// The same number, for the hot path.
    checked_messages: AtomicU64,
    /// The server's wall clock less the time since the engine's start, in milliseconds.
    clock_offset_ms: AtomicI64,
}

impl RedisSession {
    /// Checks that the server is still the one that was verified.
    async fn check(&self, database: i64) -> Result<(), CacheError> {
        let refused = self.refused.lock();
        if let Some(refused) = refused.unwrap_or_else(PoisonError::into_inner).clone() {
            return Err(refused);
        }
        let messages = self.signs.messages.load(Ordering::Acquire);
        let failed = |error: RedisError| failure(&error, self.command_timeout);
        let Checked { server, clock } = check(&mut self.control.clone(), database)
            .await
            .map_err(failed)?;
        if server != self.server {
            return Err(CacheError::Connection(format!(
                "the server has another data set now ({server}, not {})",
                self.server
            )));
        }
        self.passed(messages, clock);
        self.drop_long().await.map_err(failed)
    }

    /// Checks that the connection for values still answers.
    async fn check_values(&self) -> Result<(), CacheError> {
        redis::cmd("TIME")
            .query_async::<(i64, i64)>(&mut self.values.clone())
            .await
            .map(drop)
            .map_err(|error| failure(&error, self.command_timeout))
    }

    /// Removes those of the slow keys whose contents are longer than any value of ours: each read of
    /// them would be slow.
    async fn drop_long(&self) -> Result<(), RedisError> {
        let keys = std::mem::take(&mut *self.slow());
        if keys.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = keys.iter().map(String::as_str).collect();
        let mut drop_long = evalsha(&self.scripts.drop_long, &names);
        drop_long.arg(LONGEST_VALUE);
        let removed = drop_long
            .query_async::<u64>(&mut self.control.clone())
            .await;
        match removed {
            Ok(0) => Ok(()),
            Ok(removed) => {
                let first = prefix_of(names[0]).unwrap_or_default();
                tracing::warn!(
                    "removed {removed} keys `{first}*` of more than {LONGEST_VALUE} bytes, which no node \
                     stores: look who writes to Redis"
                );
                Ok(())
            }
            // The scripts are loaded again by the next command that needs one.
            Err(error) if matches!(error.kind(), ErrorKind::Server(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn slow(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.slow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lane(&self, lane: Lane) -> MultiplexedConnection {
        match lane {
            Lane::Control => self.control.clone(),
            Lane::Values => self.values.clone(),
        }
    }

    fn passed(&self, messages: u64, clock: i64) {
        self.clock_offset_ms.store(clock, Ordering::Relaxed);
        self.checked_messages.store(messages, Ordering::Release);
        self.checked.send_replace(Some(Ok(messages)));
    }

    /// Called after each answer: whether it came from the data set that was verified. While a message
    /// of the server has not been looked into, waits for that.
    async fn vouched(&self) -> Result<(), CacheError> {
        let messages = self.signs.messages.load(Ordering::Acquire);
        if self.checked_messages.load(Ordering::Acquire) >= messages {
            return Ok(());
        }
        let mut checked = self.checked.subscribe();
        let looked_into = checked.wait_for(|checked| match checked {
            Some(Ok(upto)) => *upto >= messages,
            Some(Err(_)) => true,
            None => false,
        });
        let give_up = Instant::now() + self.command_timeout;
        match timeout_at(give_up, looked_into).await {
            Ok(Ok(checked)) => match &*checked {
                Some(Err(error)) => Err(error.clone()),
                _ => Ok(()),
            },
            _ => Err(CacheError::Timeout(self.command_timeout)),
        }
    }

    /// The state as it is by the server's clock, when its announcements are further away than any
    /// writer could mean: the clock was set back after they were made.
    async fn without_misdated(&self, key: &str, state: KeyState) -> Result<KeyState, CacheError> {
        let KeyState::Intent(intent) = &state else {
            return Ok(state);
        };
        let now = clock_ms().saturating_add(self.clock_offset_ms.load(Ordering::Relaxed));
        let latest = u64::try_from(now)
            .unwrap_or(0)
            .saturating_add(CLOCK_SLACK_MS);
        let misdated = |writer: &writethrough_protocol::Writer| {
            writer.deadline_ms.saturating_sub(writer.lifetime_ms) > latest
        };
        if !intent.writers().iter().any(misdated) {
            return Ok(state);
        }
        let lapse = evalsha(&self.scripts.lapse, &[key]);
        match self.scripts(Lane::Control, vec![lapse]).await?.pop() {
            Some(value) => state_of(value),
            None => Ok(state),
        }
    }
}

/// Milliseconds on this side's monotonic clock.
fn clock_ms() -> i64 {
    i64::try_from(crate::clock::now().0.as_millis()).unwrap_or(i64::MAX)
}

/// What to do about a server that is more than one.
const ONE_SERVER: &str =
    "Cluster and Sentinel are not supported: name the address of one primary in the URL";

/// The first line of an error, without the arguments of the command, which may be a whole script.
fn one_line(error: &RedisError) -> String {
    let text = error.to_string();
    let mut line = text.lines().next().unwrap_or_default();
    for tail in [", with args beginning with", " script: "] {
        line = line.split(tail).next().unwrap_or_default();
    }
    let mut line: String = line.chars().take(200).collect();
    if let Some((_, remedy)) = REMEDIES.iter().find(|(sign, _)| text.contains(sign)) {
        line = format!("{line}; {remedy}");
    }
    line
}

const AUTHORITY: &str =
    "name a file with the certificate of the authority that signed the server's: SSL_CERT_FILE";

/// What to do about a certificate that was refused, by what the error says of it.
const REMEDIES: [(&str, &str); 3] = [
    (
        "CaUsedAsEndEntity",
        "the server shows the certificate of an authority as its own: give it one that is made for a \
         server (`basicConstraints=CA:FALSE`), signed by itself or by that authority",
    ),
    ("UnknownIssuer", AUTHORITY),
    // Another authority of the same name.
    ("BadSignature", AUTHORITY),
];

/// What a server says that does not let this connection send a command, now or later, and the remedy;
/// none for any other error. `prefix` is what the command's keys begin with.
fn refusal(command: &str, prefix: Option<&str>, error: &RedisError) -> Option<CacheError> {
    let line = one_line(error);
    let says = |what| line.to_lowercase().contains(what);
    let keys = prefix.map(|prefix| format!(" on keys `{prefix}*`"));
    let keys = keys.unwrap_or_default();
    let remedy = match error.code() {
        Some("MOVED" | "ASK" | "CROSSSLOT" | "CLUSTERDOWN") => ONE_SERVER.to_owned(),
        // The texts of scripts that call a command are all that tells them apart.
        _ if says("access") && says("key") => format!(
            "allow these keys to the user (`ACL SETUSER ... ~{}*`)",
            prefix.unwrap_or_default()
        ),
        Some("NOPERM") => "allow the command to the user (`ACL SETUSER`)".to_owned(),
        _ if says("can't run this command") || says("acl failure") => {
            "allow the commands that it calls to the user (`ACL SETUSER`)".to_owned()
        }
        _ if says("unknown command") || says("unknown redis command") => {
            "undo its `rename-command`".to_owned()
        }
        _ => return None,
    };
    Some(CacheError::Connection(format!(
        "the server refuses {command}{keys} ({line}); {remedy}"
    )))
}

/// The command's name and its first key.
fn described(command: &Cmd) -> (String, Option<String>) {
    let words: Vec<_> = command
        .args_iter()
        .take(4)
        .map(|word| match word {
            Arg::Simple(word) => String::from_utf8_lossy(word).into_owned(),
            _ => String::new(),
        })
        .collect();
    let name = words.first().cloned().unwrap_or_default();
    let key = match name.as_str() {
        "EVALSHA" => words.get(3),
        "GET" | "MGET" | "SET" | "DEL" => words.get(1),
        _ => None,
    };
    (name, key.cloned())
}

/// The keys whose values a command reads.
fn read_keys(command: &Cmd) -> Vec<String> {
    let mut words = command.args_iter().map(|word| match word {
        Arg::Simple(word) => String::from_utf8_lossy(word).into_owned(),
        _ => String::new(),
    });
    match words.next().as_deref() {
        Some("GET" | "MGET") => words.collect(),
        _ => Vec::new(),
    }
}

/// What the keys of the same entity or collection begin with: `item:`, `{items}`, `shop/item:`.
fn prefix_of(key: &str) -> Option<&str> {
    let first = key.find([':', '{'])?;
    let end = match key.as_bytes()[first] {
        b':' => first,
        _ => first + key[first..].find('}')?,
    };
    Some(&key[..=end])
}

/// Sorts an error by what it says of the connection.
fn failure(error: &RedisError, command_timeout: Duration) -> CacheError {
    if error.is_timeout() {
        return CacheError::Timeout(command_timeout);
    }
    // A server that takes no writes now is as bad as none: the probe tells when it is well again.
    let refuses_writes = matches!(error.code(), Some("OOM" | "MISCONF" | "NOREPLICAS"));
    let unfit = matches!(
        error.kind(),
        ErrorKind::Server(
            ServerErrorKind::ReadOnly
                | ServerErrorKind::BusyLoading
                | ServerErrorKind::MasterDown
                | ServerErrorKind::TryAgain
        ) | ErrorKind::AuthenticationFailed
    );
    if unfit || refuses_writes || error.is_io_error() || error.is_connection_dropped() {
        CacheError::Connection(one_line(error))
    } else {
        CacheError::Command(one_line(error))
    }
}

/// One field of the answer to `INFO`.
fn info_field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
        .filter(|value| !value.is_empty())
}

fn require_master(info: &str) -> Result<(), RedisError> {
    match info_field(info, "role") {
        None | Some("master") => Ok(()),
        Some(_) => Err(RedisError::from((
            ErrorKind::Server(ServerErrorKind::ReadOnly),
            "the server is a read only replica",
        ))),
    }
}

/// Who answered a check, and its wall clock less this side's monotonic one, in milliseconds.
struct Checked {
    server: ServerId,
    clock: i64,
}

/// Whether the server answers in time and is a master that takes writes: it is no cache for writers
/// while it is a replica, is loading, is out of memory or misses its own replicas. Answers who it is.
async fn check(
    connection: &mut MultiplexedConnection,
    database: i64,
) -> Result<Checked, RedisError> {
    let probe = format!("{PROBE_PREFIX}{}", Uuid::new_v4().simple());
    let mut pipeline = Pipeline::new();
    pipeline
        .cmd("INFO")
        .arg("server")
        .cmd("INFO")
        .arg("replication")
        .cmd("TIME")
        .cmd("SET")
        .arg(probe)
        .arg("1")
        .arg("PX")
        .arg(1)
        .ignore();
    let (server, replication, (seconds, micros)): (String, String, (i64, i64)) =
        pipeline.query_async(connection).await?;
    require_master(&replication)?;
    let Some(run_id) = info_field(&server, "run_id") else {
        let silent = "the server tells no run_id";
        return Err(RedisError::from((ErrorKind::UnexpectedReturnType, silent)));
    };
    let data_set = info_field(&replication, "master_replid").unwrap_or("unknown");
    let clock = (seconds * 1000 + micros / 1000).saturating_sub(clock_ms());
    Ok(Checked {
        server: ServerId::new(format!("{run_id}:{data_set}/{database}")),
        clock,
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis())
        .unwrap_or(u64::MAX)
        .max(1)
}

fn bytes_of(value: Value) -> Result<Option<Bytes>, CacheError> {
    match value {
        Value::Nil => Ok(None),
        Value::BulkString(bytes) => Ok(Some(bytes.into())),
        other => Err(CacheError::Command(format!(
            "unexpected reply of type {other:?}"
        ))),
    }
}

fn state_of(value: Value) -> Result<KeyState, CacheError> {
    KeyState::decode(bytes_of(value)?).map_err(|error| CacheError::Command(error.to_string()))
}

fn evalsha(script: &Lua, keys: &[&str]) -> Cmd {
    let mut command = redis::cmd("EVALSHA");
    command.arg(&script.hash).arg(keys.len()).arg(keys);
    command
}

/// Divides commands into those that are sent together: so many, and so long, that the answers come well
/// within their bound.
fn steps(commands: impl Iterator<Item = Cmd>) -> impl Iterator<Item = Vec<Cmd>> {
    let mut commands = commands.peekable();
    std::iter::from_fn(move || {
        let (mut step, mut bytes) = (Vec::new(), 0);
        while let Some(command) = commands.next_if(|next| {
            step.is_empty() || (step.len() < STEP_KEYS && bytes + length(next) <= STEP_BYTES)
        }) {
            bytes += length(&command);
            step.push(command);
        }
        (!step.is_empty()).then_some(step)
    })
}

fn length(command: &Cmd) -> usize {
    let words = command.args_iter().map(|word| match word {
        Arg::Simple(word) => word.len(),
        _ => 0,
    });
    words.sum()
}

/// Whether the script of a command answered 1.
fn is_one(answer: &Option<Value>) -> bool {
    matches!(answer, Some(Value::Int(1)))
}

impl RedisSession {
    fn failed(&self, lane: Lane, command: Option<&Cmd>, error: RedisError) -> CacheError {
        let failure = match command.and_then(|command| self.refused(command, &error)) {
            Some(refused) => refused,
            None => failure(&error, self.command_timeout),
        };
        match (&failure, lane) {
            (CacheError::Command(_), _) => {}
            (CacheError::Timeout(_), Lane::Values) => {
                let mut slow = self.slow();
                let room = MAX_SLOW.saturating_sub(slow.len());
                slow.extend(command.into_iter().flat_map(read_keys).take(room));
                self.slowed.notify_one();
            }
            _ => self.trouble.notify_one(),
        }
        failure
    }

    /// What this connection may not do it may not do on its next try either: it is over, and the next
    /// one is verified on keys like the refused one.
    fn refused(&self, command: &Cmd, error: &RedisError) -> Option<CacheError> {
        let (name, key) = described(command);
        let prefix = key.as_deref().and_then(prefix_of);
        let refused = refusal(&name, prefix.or(key.as_deref()), error)?;
        if let Some(prefix) = prefix {
            let mut prefixes = self.prefixes.lock().unwrap_or_else(PoisonError::into_inner);
            if prefixes.len() < MAX_PREFIXES {
                prefixes.insert(prefix.to_owned());
            }
        }
        let mut first = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        Some(first.get_or_insert(refused).clone())
    }

    async fn command(&self, lane: Lane, command: &Cmd) -> Result<Value, CacheError> {
        let reply = self.lane(lane).send_packed_command(command).await;
        let reply = reply
            .and_then(Value::extract_error)
            .map_err(|error| self.failed(lane, Some(command), error))?;
        self.vouched().await?;
        Ok(reply)
    }

    /// Runs commands in one round trip, until the first that fails.
    async fn scripts(&self, lane: Lane, commands: Vec<Cmd>) -> Result<Vec<Value>, CacheError> {
        self.together(lane, commands).await?.into_iter().collect()
    }

    /// Runs commands in one round trip; an error when one of them says that the connection is no good. The
    /// scripts were loaded when the connection was verified; after a `SCRIPT FLUSH` they are loaded again,
    /// once, and all commands sent again.
    async fn together(
        &self,
        lane: Lane,
        commands: Vec<Cmd>,
    ) -> Result<Vec<Result<Value, CacheError>>, CacheError> {
        let mut pipeline = Pipeline::with_capacity(commands.len());
        for command in commands {
            pipeline.add_command(command);
        }
        let count = pipeline.len();
        let mut reloaded = false;
        loop {
            let mut connection = self.lane(lane);
            let replies = connection
                .send_packed_commands(&pipeline, 0, count)
                .await
                .map_err(|error| self.failed(lane, None, error))?;
            let replies: Vec<_> = replies.into_iter().map(Value::extract_error).collect();
            let not_loaded = |reply: &Result<Value, RedisError>| {
                matches!(reply, Err(error)
                    if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript))
            };
            if !reloaded && replies.iter().any(not_loaded) {
                reloaded = true;
                let load = self.scripts.load_all();
                load.query_async::<()>(&mut connection)
                    .await
                    .map_err(|error| self.failed(lane, None, error))?;
                continue;
            }
            let mut answers = Vec::with_capacity(count);
            for (command, reply) in pipeline.cmd_iter().zip(replies) {
                let answer = reply.map_err(|error| self.failed(lane, Some(command), error));
                match answer {
                    Err(error @ (CacheError::Connection(_) | CacheError::Timeout(_))) => {
                        return Err(error);
                    }
                    answer => answers.push(answer),
                }
            }
            self.vouched().await?;
            return Ok(answers);
        }
    }

    /// Runs any number of script commands, a bounded number in each round trip, until the first that fails.
    async fn in_steps(&self, commands: impl Iterator<Item = Cmd>) -> Result<(), CacheError> {
        for step in steps(commands) {
            self.scripts(Lane::Control, step).await?;
        }
        Ok(())
    }

    /// Runs any number of commands of reads, a bounded number in each round trip. Of each its answer, or
    /// none when it failed by itself.
    async fn many(&self, commands: Vec<Cmd>) -> Result<Vec<Option<Value>>, CacheError> {
        let mut answers = Vec::with_capacity(commands.len());
        for step in steps(commands.into_iter()) {
            let step = self.together(Lane::Values, step).await?;
            answers.extend(step.into_iter().map(Result::ok));
        }
        Ok(answers)
    }

    async fn script(&self, lane: Lane, command: Cmd) -> Result<i64, CacheError> {
        match self.scripts(lane, vec![command]).await?.as_slice() {
            [Value::Int(answer)] => Ok(*answer),
            other => Err(CacheError::Command(format!(
                "unexpected script reply {other:?}"
            ))),
        }
    }

    /// Visits every key that matches, a bounded batch at a time, and sums what `script` returns.
    async fn walk(&self, pattern: &str, script: &Lua) -> Result<u64, CacheError> {
        let mut total = 0;
        let mut cursor = String::from("0");
        let started = Instant::now();
        loop {
            let mut scan = redis::cmd("SCAN");
            scan.arg(&cursor)
                .arg("MATCH")
                .arg(pattern)
                .arg("COUNT")
                .arg(WALK_BATCH);
            let reply = self.command(Lane::Control, &scan).await?;
            let (next, mut keys): (String, Vec<String>) = redis::from_redis_value(reply)
                .map_err(|error| CacheError::Command(error.to_string()))?;
            // SCAN may name a key twice.
            keys.sort_unstable();
            keys.dedup();
            for batch in keys.chunks(WALK_BATCH) {
                let names: Vec<&str> = batch.iter().map(String::as_str).collect();
                total += self
                    .script(Lane::Control, evalsha(script, &names))
                    .await?
                    .unsigned_abs();
            }
            if next == "0" {
                return Ok(total);
            }
            cursor = next;
            if started.elapsed() > Duration::from_secs(60) {
                return Err(CacheError::Timeout(Duration::from_secs(60)));
            }
        }
    }
}

/// Takes a fill lease.
fn take(key: &str, token: Token, lasting: Duration) -> Cmd {
    let lease = KeyState::FillLease(token).encode().unwrap_or_default();
    let mut set = redis::cmd("SET");
    set.arg(key)
        .arg(&lease[..])
        .arg("NX")
        .arg("GET")
        .arg("PX")
        .arg(millis(lasting));
    set
}

/// What was there when a fill lease was to be taken.
fn taken(token: Token, reply: Value) -> Result<Acquire, CacheError> {
    Ok(match state_of(reply)? {
        KeyState::Absent => Acquire::Acquired,
        KeyState::FillLease(holder) if holder == token => Acquire::Acquired,
        state => Acquire::Held(state),
    })
}

/// The commands of reads that are sent for one key or for many.
impl RedisSession {
    fn fill_of(&self, key: &str, token: Token, payload: &Payload, ttl: Duration) -> Cmd {
        let mut fill = evalsha(&self.scripts.fill, &[key]);
        let value = KeyState::encode_value(payload);
        fill.arg(&token.encode()).arg(&value[..]).arg(millis(ttl));
        fill
    }

    fn renewal_of(&self, key: &str, token: Token, lasting: Duration) -> Cmd {
        let mut renewal = evalsha(&self.scripts.renew_fill, &[key]);
        renewal.arg(&token.encode()).arg(millis(lasting));
        renewal
    }

    fn break_of(&self, key: &str, token: Token) -> Cmd {
        let mut break_fill = evalsha(&self.scripts.break_fill, &[key]);
        break_fill.arg(&token.encode());
        break_fill
    }

    fn discard_of(&self, key: &str, bytes: &Bytes) -> Cmd {
        let mut discard = evalsha(&self.scripts.discard, &[key]);
        discard.arg(&bytes[..]);
        discard
    }
}

#[async_trait]
impl Session for RedisSession {
    fn server(&self) -> &ServerId {
        &self.server
    }

    fn system(&self) -> &'static str {
        "redis"
    }

    async fn get(&self, key: &str) -> Result<KeyState, CacheError> {
        let state = state_of(
            self.command(Lane::Values, redis::cmd("GET").arg(key))
                .await?,
        )?;
        self.without_misdated(key, state).await
    }

    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<KeyState>>, CacheError> {
        let mut states: Vec<Option<KeyState>> = Vec::with_capacity(keys.len());
        let mut most = STEP_KEYS;
        while states.len() < keys.len() {
            let left = &keys[states.len()..];
            let asked = &left[..left.len().min(most)];
            let reply = self
                .command(Lane::Values, redis::cmd("MGET").arg(asked))
                .await?;
            let Value::Array(values) = reply else {
                return Err(CacheError::Command("unexpected reply to MGET".into()));
            };
            let mut bytes = 0;
            for (key, value) in asked.iter().zip(values) {
                if let Value::BulkString(stored) = &value {
                    bytes += stored.len();
                }
                states.push(match state_of(value) {
                    Ok(state) => Some(self.without_misdated(key, state).await?),
                    Err(_) => None,
                });
            }
            // The values of one entity are mostly of one size.
            let mean = bytes / asked.len() + 1;
            most = (STEP_BYTES / mean).clamp(1, STEP_KEYS);
        }
        Ok(states)
    }

    async fn acquire_fill(
        &self,
        key: &str,
        token: Token,
        lease: Duration,
    ) -> Result<Acquire, CacheError> {
        let reply = self.command(Lane::Values, &take(key, token, lease)).await?;
        taken(token, reply)
    }

    async fn acquire_fill_many(
        &self,
        leases: &[Lease],
        lasting: Duration,
    ) -> Result<Vec<Option<Acquire>>, CacheError> {
        let take = |Lease { key, token }: &Lease| take(key, *token, lasting);
        let replies = self.many(leases.iter().map(take).collect()).await?;
        let answers = leases.iter().zip(replies);
        Ok(answers
            .map(|(lease, reply)| taken(lease.token, reply?).ok())
            .collect())
    }

    async fn fill(
        &self,
        key: &str,
        token: Token,
        payload: Payload,
        ttl: Duration,
    ) -> Result<Filled, CacheError> {
        let fill = self.fill_of(key, token, &payload, ttl);
        Ok(Filled::new(self.script(Lane::Values, fill).await? == 1))
    }

    async fn fill_many(&self, fills: Vec<Fill>) -> Result<Vec<bool>, CacheError> {
        let fills = fills
            .iter()
            .map(|fill| self.fill_of(&fill.lease.key, fill.lease.token, &fill.payload, fill.ttl));
        Ok(self
            .many(fills.collect())
            .await?
            .iter()
            .map(is_one)
            .collect())
    }

    async fn renew_fill(
        &self,
        key: &str,
        token: Token,
        lease: Duration,
    ) -> Result<FillLease, CacheError> {
        let renewal = self.renewal_of(key, token, lease);
        let held = self.script(Lane::Control, renewal).await? == 1;
        Ok(FillLease::new(held))
    }

    async fn renew_fill_many(
        &self,
        leases: &[Lease],
        lasting: Duration,
    ) -> Result<Vec<bool>, CacheError> {
        let renewals = leases
            .iter()
            .map(|Lease { key, token }| self.renewal_of(key, *token, lasting));
        Ok(self
            .many(renewals.collect())
            .await?
            .iter()
            .map(is_one)
            .collect())
    }

    async fn break_fill(&self, key: &str, token: Token) -> Result<FillLease, CacheError> {
        let broken = self.script(Lane::Values, self.break_of(key, token)).await?;
        Ok(FillLease::new(broken == 1))
    }

    async fn break_fill_many(&self, leases: &[Lease]) -> Result<(), CacheError> {
        let breaks = leases
            .iter()
            .map(|Lease { key, token }| self.break_of(key, *token));
        self.many(breaks.collect()).await.map(drop)
    }

    async fn begin(
        &self,
        keys: &[String],
        token: Token,
        lifetime: Duration,
    ) -> Result<(), CacheError> {
        let begin = |key: &String| {
            let mut begin = evalsha(&self.scripts.begin, &[key]);
            begin.arg(&token.encode()).arg(millis(lifetime));
            begin
        };
        self.in_steps(keys.iter().map(begin)).await
    }

    async fn end(&self, ends: &[End], token: Token) -> Result<(), CacheError> {
        let end = |end: &End| {
            let value = end
                .value
                .as_ref()
                .map(KeyState::encode_value)
                .unwrap_or_default();
            let mut command = evalsha(&self.scripts.end, &[&end.key]);
            command
                .arg(&token.encode())
                .arg(&value[..])
                .arg(millis(end.ttl));
            command
        };
        self.in_steps(ends.iter().map(end)).await
    }

    async fn get_page(
        &self,
        collection: &str,
        page: &str,
    ) -> Result<(KeyState, Option<Page>), CacheError> {
        let reply = self
            .command(Lane::Values, redis::cmd("MGET").arg(collection).arg(page))
            .await?;
        let Value::Array(values) = reply else {
            return Err(CacheError::Command("unexpected reply to MGET".into()));
        };
        let [state, page] = <[Value; 2]>::try_from(values)
            .map_err(|_| CacheError::Command("unexpected reply to MGET".into()))?;
        // What is no page is replaced by the next fill.
        let page = bytes_of(page)?.and_then(|stored| Page::decode(stored).ok());
        let state = self.without_misdated(collection, state_of(state)?).await?;
        Ok((state, page))
    }

    async fn fill_page(
        &self,
        collection: &str,
        page: &str,
        token: Token,
        bytes: Bytes,
        ttl: Duration,
    ) -> Result<Filled, CacheError> {
        let mut fill = evalsha(&self.scripts.fill_page, &[collection, page]);
        let encoded = Page {
            stamp: token,
            bytes,
        }
        .encode();
        fill.arg(&token.encode()).arg(&encoded[..]).arg(millis(ttl));
        Ok(Filled::new(self.script(Lane::Values, fill).await? == 1))
    }

    async fn discard(&self, key: &str, bytes: &Bytes) -> Result<(), CacheError> {
        let discard = self.discard_of(key, bytes);
        self.script(Lane::Values, discard).await.map(drop)
    }

    async fn discard_many(&self, entries: &[(String, Bytes)]) -> Result<(), CacheError> {
        let discards = entries
            .iter()
            .map(|(key, bytes)| self.discard_of(key, bytes));
        self.many(discards.collect()).await.map(drop)
    }

    async fn set(&self, key: &str, payload: Payload, ttl: Duration) -> Result<(), CacheError> {
        let value = KeyState::encode_value(&payload);
        let mut set = redis::cmd("SET");
        set.arg(key).arg(&value[..]).arg("PX").arg(millis(ttl));
        self.command(Lane::Values, &set).await.map(drop)
    }

    async fn delete(&self, key: &str) -> Result<(), CacheError> {
        self.command(Lane::Control, redis::cmd("DEL").arg(key))
            .await
            .map(drop)
    }

    async fn count(&self, pattern: &str) -> Result<u64, CacheError> {
        self.walk(pattern, &self.scripts.count).await
    }

    async fn clear(&self, pattern: &str) -> Result<u64, CacheError> {
        self.walk(pattern, &self.scripts.clear).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_one_entity_or_collection_have_one_prefix() {
        for (key, prefix) in [
            ("item:1@h.7", Some("item:")),
            ("{items}@h.7:limit=3", Some("{items}")),
            ("{orders_of:7}@h.7", Some("{orders_of:7}")),
            ("shop/item:a{b}@h.7", Some("shop/item:")),
            ("shop/{items}@h.7:q", Some("shop/{items}")),
            ("{broken", None),
            ("other", None),
        ] {
            assert_eq!(prefix_of(key), prefix, "{key}");
        }
    }
}
