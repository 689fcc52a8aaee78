//! The Redis cache: one multiplexed, verified connection that is made anew when it fails.
//!
//! A connection is used only after the server has told its `run_id`, that it is a master, that it
//! is not loading, and has accepted a write. It never reconnects under the hood: a lost connection
//! ends its [`Session`], and the next session is verified again.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ErrorKind, IntoConnectionInfo, Pipeline, RedisError,
    Script, ServerErrorKind, Value,
};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use uuid::Uuid;
use writethrough_protocol::page::Page;
use writethrough_protocol::{Acquire, KeyState, Payload, ServerId, Token};

use super::{Cache, End, Session, SessionWatch};
use crate::error::CacheError;

/// Keys that one step of a walk asks for: about a tenth of a millisecond of the server's time.
const WALK_BATCH: usize = 128;
/// Longest pause between two attempts to connect.
const MAX_BACKOFF: Duration = Duration::from_millis(500);
/// How often an idle connection is checked, which also finds a master that was demoted.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Settings of the Redis connection.
#[derive(Clone)]
pub struct RedisSettings {
    /// `redis://[user:password@]host[:port][/db]`, or `rediss://` for TLS.
    pub url: String,
    /// The bound of every command, 250 ms by default.
    pub command_timeout: Duration,
    /// The bound of connecting and verifying, 1 s by default.
    pub connect_timeout: Duration,
}

impl RedisSettings {
    /// The defaults for this server.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            command_timeout: Duration::from_millis(250),
            connect_timeout: Duration::from_secs(1),
        }
    }
}

impl fmt::Debug for RedisSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisSettings")
            .field("command_timeout", &self.command_timeout)
            .field("connect_timeout", &self.connect_timeout)
            .finish_non_exhaustive()
    }
}

/// The Redis URL cannot be used. The message does not repeat the URL, which may hold a password.
#[derive(Debug, thiserror::Error)]
#[error(
    "not a Redis URL ({0}); allowed: redis://[user:password@]host[:port][/db] or rediss:// for TLS"
)]
pub struct InvalidRedisUrl(String);

/// A script and the hash by which a server that has it loaded is told to run it.
struct Lua {
    text: &'static str,
    hash: String,
}

struct Scripts {
    begin: Lua,
    end: Lua,
    fill: Lua,
    break_fill: Lua,
    fill_page: Lua,
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
            begin: lua(include_str!("lua/begin.lua")),
            end: lua(include_str!("lua/end.lua")),
            fill: lua(include_str!("lua/fill.lua")),
            break_fill: lua(include_str!("lua/break_fill.lua")),
            fill_page: lua(include_str!("lua/fill_page.lua")),
            clear: lua(include_str!("lua/clear.lua")),
            count: lua(include_str!("lua/count.lua")),
        }
    }

    fn load_all(&self) -> Pipeline {
        let Self {
            begin,
            end,
            fill,
            break_fill,
            fill_page,
            clear,
            count,
        } = self;
        let mut pipeline = Pipeline::new();
        for script in [begin, end, fill, break_fill, fill_page, clear, count] {
            pipeline.cmd("SCRIPT").arg("LOAD").arg(script.text).ignore();
        }
        pipeline
    }
}

/// Redis as the cache.
///
/// Needs Redis 7.0 or newer (or Valkey): `SET` with `NX` and `GET` together. One server, or a
/// primary with replicas behind a name; a proxy that spreads one connection over several servers
/// would defeat the verification and must not be used.
pub struct RedisCache {
    sessions: watch::Sender<Option<Arc<dyn Session>>>,
    stop: Arc<Notify>,
}

impl RedisCache {
    /// Starts connecting in the background and returns at once; [`Cache::sessions`] tells when
    /// there is a session. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`InvalidRedisUrl`] when the URL is malformed.
    pub fn connect(settings: RedisSettings) -> Result<Self, InvalidRedisUrl> {
        let reason = |error: RedisError| {
            // Only the fixed description: a detail could repeat a part of the URL.
            InvalidRedisUrl(format!("{:?}", error.kind()))
        };
        let info = settings
            .url
            .as_str()
            .into_connection_info()
            .map_err(reason)?;
        let tcp = info.tcp_settings().clone().set_nodelay(true);
        let client = Client::open(info.set_tcp_settings(tcp)).map_err(reason)?;
        let (sessions, _) = watch::channel(None);
        let stop = Arc::new(Notify::new());
        let keeper = Keeper {
            client,
            settings,
            sessions: sessions.clone(),
            scripts: Arc::new(Scripts::new()),
        };
        let stopped = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = keeper.keep() => {}
                () = stopped.notified() => {}
            }
            keeper.sessions.send_replace(None);
        });
        Ok(Self { sessions, stop })
    }
}

impl Cache for RedisCache {
    fn sessions(&self) -> SessionWatch {
        self.sessions.subscribe()
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

/// Makes, verifies, watches and replaces the connection.
struct Keeper {
    client: Client,
    settings: RedisSettings,
    sessions: watch::Sender<Option<Arc<dyn Session>>>,
    scripts: Arc<Scripts>,
}

impl Keeper {
    async fn keep(&self) {
        let mut backoff = Duration::from_millis(10);
        let mut told = None;
        loop {
            let attempt = timeout(self.settings.connect_timeout, self.connect()).await;
            let problem = match attempt {
                Ok(Ok(session)) => {
                    tracing::info!(run_id = %session.server, "Redis is connected and verified");
                    backoff = Duration::from_millis(10);
                    let problem = self.watch(&session).await;
                    told = Some(problem.clone());
                    tracing::warn!("Redis connection lost: {problem}");
                    continue;
                }
                Ok(Err(problem)) => problem,
                Err(_) => CacheError::Timeout(self.settings.connect_timeout),
            };
            if told.as_ref() != Some(&problem) {
                tracing::warn!("Redis cannot be used, going on without it: {problem}");
                told = Some(problem);
            }
            tokio::time::sleep(backoff.mul_f64(0.75 + 0.5 * fastrand::f64())).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    async fn connect(&self) -> Result<Arc<RedisSession>, CacheError> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.settings.connect_timeout))
            .set_response_timeout(Some(self.settings.command_timeout));
        let mut connection = self
            .client
            .get_multiplexed_async_connection_with_config(&config)
            .await
            .map_err(|error| failure(&error, self.settings.connect_timeout))?;
        let server = self.verify(&mut connection).await?;
        Ok(Arc::new(RedisSession {
            connection,
            server,
            scripts: self.scripts.clone(),
            command_timeout: self.settings.command_timeout,
            trouble: Notify::new(),
        }))
    }

    /// Reads who the server is, and makes sure that it can serve as the cache.
    async fn verify(&self, connection: &mut MultiplexedConnection) -> Result<ServerId, CacheError> {
        let failed = |error: RedisError| failure(&error, self.settings.command_timeout);
        let mut pipeline = Pipeline::new();
        for section in ["server", "replication", "persistence"] {
            pipeline.cmd("INFO").arg(section);
        }
        let sections: Vec<String> = pipeline.query_async(connection).await.map_err(failed)?;
        let info = sections.concat();
        let field = |name: &str| {
            info.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
        };
        let unfit = |what: String| CacheError::Connection(what);
        if let Some(version) = field("redis_version")
            && version
                .split('.')
                .next()
                .and_then(|major| major.parse().ok())
                .unwrap_or(0)
                < 7
        {
            return Err(unfit(format!(
                "Redis {version} is too old, 7.0 or newer is needed"
            )));
        }
        if field("loading") == Some("1") {
            return Err(unfit("the server is loading its data".into()));
        }
        let run_id = field("run_id")
            .filter(|id| !id.is_empty())
            .ok_or_else(|| unfit("the server tells no run_id".into()))?;
        self.scripts
            .load_all()
            .query_async::<()>(connection)
            .await
            .map_err(failed)?;
        check(connection).await.map_err(failed)?;
        Ok(ServerId::new(run_id))
    }

    /// Publishes the session and watches it until it fails. After a command that got no answer
    /// the session is withdrawn while the connection is checked, so that requests stop waiting.
    async fn watch(&self, session: &Arc<RedisSession>) -> CacheError {
        let published: Arc<dyn Session> = session.clone();
        loop {
            self.sessions.send_replace(Some(published.clone()));
            tokio::select! {
                () = session.trouble.notified() => {
                    self.sessions.send_replace(None);
                }
                () = tokio::time::sleep(HEARTBEAT) => {}
            }
            if let Err(error) = check(&mut session.connection.clone()).await {
                self.sessions.send_replace(None);
                return failure(&error, self.settings.command_timeout);
            }
        }
    }
}

struct RedisSession {
    connection: MultiplexedConnection,
    server: ServerId,
    scripts: Arc<Scripts>,
    command_timeout: Duration,
    /// A command got no answer, or one that says that the server is not fit to be the cache.
    trouble: Notify,
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
        CacheError::Connection(error.to_string())
    } else {
        CacheError::Command(error.to_string())
    }
}

/// Whether the server answers in time and is a master that takes writes: it is no cache for writers
/// while it is a replica, is loading, is out of memory or misses its own replicas.
async fn check(connection: &mut MultiplexedConnection) -> Result<(), RedisError> {
    let probe = format!("writethrough:probe:{}", Uuid::new_v4().simple());
    let mut pipeline = Pipeline::new();
    pipeline
        .cmd("ROLE")
        .cmd("SET")
        .arg(probe)
        .arg("1")
        .arg("PX")
        .arg(1)
        .ignore();
    let (role,): (Value,) = pipeline.query_async(connection).await?;
    match role {
        Value::Array(fields) if fields.first() == Some(&Value::BulkString(b"master".into())) => {
            Ok(())
        }
        _ => Err(RedisError::from((
            ErrorKind::Server(ServerErrorKind::ReadOnly),
            "the server is a read only replica",
        ))),
    }
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

impl RedisSession {
    fn failed(&self, error: RedisError) -> CacheError {
        let failure = failure(&error, self.command_timeout);
        if !matches!(failure, CacheError::Command(_)) {
            self.trouble.notify_one();
        }
        failure
    }

    async fn command(&self, command: &Cmd) -> Result<Value, CacheError> {
        let mut connection = self.connection.clone();
        let reply = connection.send_packed_command(command).await;
        reply
            .and_then(Value::extract_error)
            .map_err(|error| self.failed(error))
    }

    /// Runs script commands in one round trip. The scripts were loaded when the connection was
    /// verified; after a `SCRIPT FLUSH` they are loaded again, once.
    async fn scripts(&self, commands: Vec<Cmd>) -> Result<Vec<Value>, CacheError> {
        let mut pipeline = Pipeline::with_capacity(commands.len());
        for command in commands {
            pipeline.add_command(command);
        }
        let count = pipeline.len();
        let mut reloaded = false;
        loop {
            let mut connection = self.connection.clone();
            let replies = connection
                .send_packed_commands(&pipeline, 0, count)
                .await
                .and_then(|replies| replies.into_iter().map(Value::extract_error).collect());
            match replies {
                Ok(replies) => return Ok(replies),
                Err(error)
                    if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
                        && !reloaded =>
                {
                    reloaded = true;
                    let load = self.scripts.load_all();
                    load.query_async::<()>(&mut connection)
                        .await
                        .map_err(|error| self.failed(error))?;
                }
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    async fn script(&self, command: Cmd) -> Result<i64, CacheError> {
        match self.scripts(vec![command]).await?.as_slice() {
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
            let reply = self.command(&scan).await?;
            let (next, mut keys): (String, Vec<String>) = redis::from_redis_value(reply)
                .map_err(|error| CacheError::Command(error.to_string()))?;
            // SCAN may name a key twice.
            keys.sort_unstable();
            keys.dedup();
            for batch in keys.chunks(WALK_BATCH) {
                let names: Vec<&str> = batch.iter().map(String::as_str).collect();
                total += self.script(evalsha(script, &names)).await?.unsigned_abs();
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

#[async_trait]
impl Session for RedisSession {
    fn server(&self) -> &ServerId {
        &self.server
    }

    fn system(&self) -> &'static str {
        "redis"
    }

    async fn get(&self, key: &str) -> Result<KeyState, CacheError> {
        state_of(self.command(redis::cmd("GET").arg(key)).await?)
    }

    async fn acquire_fill(
        &self,
        key: &str,
        token: Token,
        lease: Duration,
    ) -> Result<Acquire, CacheError> {
        let lease_state = KeyState::FillLease(token).encode().unwrap_or_default();
        let mut set = redis::cmd("SET");
        set.arg(key)
            .arg(&lease_state[..])
            .arg("NX")
            .arg("GET")
            .arg("PX")
            .arg(millis(lease));
        Ok(match state_of(self.command(&set).await?)? {
            KeyState::Absent => Acquire::Acquired,
            KeyState::FillLease(holder) if holder == token => Acquire::Acquired,
            state => Acquire::Held(state),
        })
    }

    async fn fill(
        &self,
        key: &str,
        token: Token,
        payload: Payload,
        ttl: Duration,
    ) -> Result<bool, CacheError> {
        let mut fill = evalsha(&self.scripts.fill, &[key]);
        let value = KeyState::encode_value(&payload);
        fill.arg(&token.encode()).arg(&value[..]).arg(millis(ttl));
        Ok(self.script(fill).await? == 1)
    }

    async fn break_fill(&self, key: &str, token: Token) -> Result<bool, CacheError> {
        let mut break_fill = evalsha(&self.scripts.break_fill, &[key]);
        break_fill.arg(&token.encode());
        Ok(self.script(break_fill).await? == 1)
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
        self.scripts(keys.iter().map(begin).collect())
            .await
            .map(drop)
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
        self.scripts(ends.iter().map(end).collect()).await.map(drop)
    }

    async fn get_page(
        &self,
        collection: &str,
        page: &str,
    ) -> Result<(KeyState, Option<Page>), CacheError> {
        let reply = self
            .command(redis::cmd("MGET").arg(collection).arg(page))
            .await?;
        let Value::Array(values) = reply else {
            return Err(CacheError::Command("unexpected reply to MGET".into()));
        };
        let [state, page] = <[Value; 2]>::try_from(values)
            .map_err(|_| CacheError::Command("unexpected reply to MGET".into()))?;
        let page = bytes_of(page)?
            .map(Page::decode)
            .transpose()
            .map_err(|error| CacheError::Command(error.to_string()))?;
        Ok((state_of(state)?, page))
    }

    async fn fill_page(
        &self,
        collection: &str,
        page: &str,
        token: Token,
        bytes: Bytes,
        ttl: Duration,
    ) -> Result<bool, CacheError> {
        let mut fill = evalsha(&self.scripts.fill_page, &[collection, page]);
        let encoded = Page {
            stamp: token,
            bytes,
        }
        .encode();
        fill.arg(&token.encode()).arg(&encoded[..]).arg(millis(ttl));
        Ok(self.script(fill).await? == 1)
    }

    async fn set(&self, key: &str, payload: Payload, ttl: Duration) -> Result<(), CacheError> {
        let value = KeyState::encode_value(&payload);
        let mut set = redis::cmd("SET");
        set.arg(key).arg(&value[..]).arg("PX").arg(millis(ttl));
        self.command(&set).await.map(drop)
    }

    async fn delete(&self, key: &str) -> Result<(), CacheError> {
        self.command(redis::cmd("DEL").arg(key)).await.map(drop)
    }

    async fn count(&self, pattern: &str) -> Result<u64, CacheError> {
        self.walk(pattern, &self.scripts.count).await
    }

    async fn clear(&self, pattern: &str) -> Result<u64, CacheError> {
        self.walk(pattern, &self.scripts.clear).await
    }
}
