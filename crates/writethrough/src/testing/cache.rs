//! An in-memory cache that fails when its test says so. It decides nothing of the protocol: the commands
//! are those of [`MemoryCache`].

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::sleep;
use writethrough_protocol::page::Page;
use writethrough_protocol::{Acquire, KeyState, Payload, ServerId, Token};

use crate::cache::{
    Cache, End, Fill, FillLease, Filled, Lease, MemoryCache, Session, SessionWatch,
};
use crate::error::CacheError;

/// The room of one life of the cache: more than a test fills.
const CAPACITY_BYTES: u64 = 16 << 20;

/// A cache in memory whose failures a test commands.
///
/// A clone is another handle of the same cache: give one to [`crate::WriteThrough::builder`] and keep
/// one. Several engines that share a cache and a fence are several nodes of one service.
#[derive(Clone)]
pub struct TestCache {
    shared: Arc<Shared>,
}

struct Shared {
    /// The server's life that connections lead to now.
    life: Mutex<MemoryCache>,
    faults: watch::Sender<Faults>,
    /// How many answers are held back now.
    held: watch::Sender<usize>,
    sessions: watch::Sender<Option<Arc<dyn Session>>>,
}

/// What the test has commanded last.
#[derive(Debug, Clone, Copy, Default)]
struct Faults {
    /// The connection that is not lost, and no other.
    connection: u64,
    fail: bool,
    delay: Duration,
    hold: bool,
}

impl TestCache {
    /// The deadline of a command, as [`crate::RedisSettings`] has it by default: 250 ms.
    pub const COMMAND_TIMEOUT: Duration = Duration::from_millis(250);

    /// Makes an empty cache that is connected and well.
    #[must_use]
    pub fn new() -> Self {
        let shared = Shared {
            life: Mutex::new(MemoryCache::new(CAPACITY_BYTES)),
            faults: watch::Sender::default(),
            held: watch::Sender::default(),
            sessions: watch::Sender::default(),
        };
        shared.connect(&shared.life());
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Cuts the connection of all engines that share this cache. Commands under way fail; what they did
    /// is done. The contents stay.
    pub fn disconnect(&self) {
        let _life = self.shared.life();
        self.shared.disconnect();
    }

    /// Connects the engines again, to the contents that there are now. Does nothing while they are
    /// connected. It also opens a cache that the shutdown of an engine has closed, so that a test can
    /// start the next engine on it.
    pub fn reconnect(&self) {
        let life = self.shared.life();
        if self.shared.sessions.borrow().is_none() {
            self.shared.connect(&life);
        }
    }

    /// Makes every command from now on an error that has no effect, or, with `false`, ends that.
    pub fn fail(&self, fail: bool) {
        self.shared.faults.send_modify(|faults| faults.fail = fail);
    }

    /// Makes the answer of every command from now on late; [`Duration::ZERO`] ends that. The command
    /// itself is done at once. An answer that is later than [`TestCache::COMMAND_TIMEOUT`] is given up
    /// then: the command was done, and its caller gets an error.
    pub fn delay(&self, delay: Duration) {
        self.shared
            .faults
            .send_modify(|faults| faults.delay = delay);
    }

    /// Replaces the cache by an empty one in another life of the server, as a restart without persistence
    /// does. Engines that were connected are connected to the new life at once.
    pub fn lose_everything(&self) {
        let mut life = self.shared.life();
        *life = MemoryCache::new(CAPACITY_BYTES);
        if self.shared.sessions.borrow().is_some() {
            self.shared.disconnect();
            self.shared.connect(&life);
        }
    }

    /// Holds every answer from now on back until [`TestCache::release`]. The command itself is done at
    /// once. No answer that is held is given up, however long that takes, so that a test can put events
    /// in order.
    pub fn hold(&self) {
        self.shared.faults.send_modify(|faults| faults.hold = true);
    }

    /// Lets the answers through that [`TestCache::hold`] holds back.
    pub fn release(&self) {
        self.shared.faults.send_modify(|faults| faults.hold = false);
    }

    /// Waits until an answer is held back.
    ///
    /// # Cancellation
    ///
    /// Harmless.
    pub async fn until_held(&self) {
        // The sender is this cache's own, so it is not gone.
        let _ = self
            .shared
            .held
            .subscribe()
            .wait_for(|held| *held > 0)
            .await;
    }
}

impl Default for TestCache {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for TestCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Faults {
            fail, delay, hold, ..
        } = *self.shared.faults.borrow();
        f.debug_struct("TestCache")
            .field("connected", &self.shared.sessions.borrow().is_some())
            .field("fail", &fail)
            .field("delay", &delay)
            .field("hold", &hold)
            .finish_non_exhaustive()
    }
}

impl Cache for TestCache {
    fn sessions(&self) -> SessionWatch {
        self.shared.sessions.subscribe()
    }

    fn trouble(&self) -> Option<CacheError> {
        self.shared.sessions.borrow().is_none().then(lost)
    }

    fn close(&self) {
        self.disconnect();
    }
}

impl Shared {
    /// Whoever connects or disconnects holds it meanwhile.
    fn life(&self) -> MutexGuard<'_, MemoryCache> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disconnect(&self) {
        self.sessions.send_replace(None);
        self.faults.send_modify(|faults| faults.connection += 1);
    }

    fn connect(&self, life: &MemoryCache) {
        let memory = life.sessions().borrow().clone();
        let session = memory.map(|memory| -> Arc<dyn Session> {
            // Not the id of an in-process cache, which an engine gives up when it meets epochs with others:
            // those of this cache's earlier lives would count as such.
            let server = ServerId::new(format!("test-{}", memory.server()));
            Arc::new(TestSession {
                memory,
                server,
                connection: self.faults.borrow().connection,
                faults: self.faults.clone(),
                held: self.held.clone(),
            })
        });
        self.sessions.send_replace(session);
    }
}

fn lost() -> CacheError {
    CacheError::Connection("the test has disconnected the cache".to_owned())
}

/// One connection to one life of the cache.
struct TestSession {
    memory: Arc<dyn Session>,
    server: ServerId,
    connection: u64,
    faults: watch::Sender<Faults>,
    held: watch::Sender<usize>,
}

/// Counts an answer that is held back.
struct Held<'a>(&'a watch::Sender<usize>);

impl<'a> Held<'a> {
    fn new(held: &'a watch::Sender<usize>) -> Self {
        held.send_modify(|held| *held += 1);
        Self(held)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|held| *held -= 1);
    }
}

impl TestSession {
    /// Runs a command as the faults allow.
    async fn run<T>(
        &self,
        command: impl Future<Output = Result<T, CacheError>>,
    ) -> Result<T, CacheError> {
        let mut faults = self.faults.subscribe();
        let Faults {
            connection, fail, ..
        } = *faults.borrow_and_update();
        if connection != self.connection {
            return Err(lost());
        }
        if fail {
            return Err(CacheError::Command(
                "the test lets every command fail".to_owned(),
            ));
        }
        let answer = command.await?;
        tokio::select! {
            biased;
            _ = faults.wait_for(|faults| faults.connection != self.connection) => Err(lost()),
            on_its_way = self.on_its_way() => on_its_way.map(|()| answer),
        }
    }

    /// Waits for as long as an answer takes.
    async fn on_its_way(&self) -> Result<(), CacheError> {
        let Faults { delay, hold, .. } = *self.faults.borrow();
        let limit = TestCache::COMMAND_TIMEOUT;
        if !delay.is_zero() {
            sleep(delay.min(limit)).await;
        }
        if delay > limit {
            return Err(CacheError::Timeout(limit));
        }
        if hold {
            let _held = Held::new(&self.held);
            // The sender is this session's own, so it is not gone.
            let _ = self
                .faults
                .subscribe()
                .wait_for(|faults| !faults.hold)
                .await;
        }
        Ok(())
    }
}

#[async_trait]
impl Session for TestSession {
    fn server(&self) -> &ServerId {
        &self.server
    }

    fn system(&self) -> &'static str {
        self.memory.system()
    }

    async fn get(&self, key: &str) -> Result<KeyState, CacheError> {
        self.run(self.memory.get(key)).await
    }

    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<KeyState>>, CacheError> {
        self.run(self.memory.get_many(keys)).await
    }

    async fn acquire_fill(
        &self,
        key: &str,
        token: Token,
        lease: Duration,
    ) -> Result<Acquire, CacheError> {
        self.run(self.memory.acquire_fill(key, token, lease)).await
    }

    async fn acquire_fill_many(
        &self,
        leases: &[Lease],
        lasting: Duration,
    ) -> Result<Vec<Option<Acquire>>, CacheError> {
        self.run(self.memory.acquire_fill_many(leases, lasting))
            .await
    }

    async fn fill(
        &self,
        key: &str,
        token: Token,
        payload: Payload,
        ttl: Duration,
    ) -> Result<Filled, CacheError> {
        self.run(self.memory.fill(key, token, payload, ttl)).await
    }

    async fn fill_many(&self, fills: Vec<Fill>) -> Result<Vec<bool>, CacheError> {
        self.run(self.memory.fill_many(fills)).await
    }

    async fn renew_fill(
        &self,
        key: &str,
        token: Token,
        lease: Duration,
    ) -> Result<FillLease, CacheError> {
        self.run(self.memory.renew_fill(key, token, lease)).await
    }

    async fn renew_fill_many(
        &self,
        leases: &[Lease],
        lasting: Duration,
    ) -> Result<Vec<bool>, CacheError> {
        self.run(self.memory.renew_fill_many(leases, lasting)).await
    }

    async fn break_fill(&self, key: &str, token: Token) -> Result<FillLease, CacheError> {
        self.run(self.memory.break_fill(key, token)).await
    }

    async fn break_fill_many(&self, leases: &[Lease]) -> Result<(), CacheError> {
        self.run(self.memory.break_fill_many(leases)).await
    }

    async fn begin(
        &self,
        keys: &[String],
        token: Token,
        lifetime: Duration,
    ) -> Result<(), CacheError> {
        self.run(self.memory.begin(keys, token, lifetime)).await
    }

    async fn end(&self, ends: &[End], token: Token) -> Result<(), CacheError> {
        self.run(self.memory.end(ends, token)).await
    }

    async fn get_page(
        &self,
        collection: &str,
        page: &str,
    ) -> Result<(KeyState, Option<Page>), CacheError> {
        self.run(self.memory.get_page(collection, page)).await
    }

    async fn fill_page(
        &self,
        collection: &str,
        page: &str,
        token: Token,
        bytes: Bytes,
        ttl: Duration,
    ) -> Result<Filled, CacheError> {
        self.run(self.memory.fill_page(collection, page, token, bytes, ttl))
            .await
    }

    async fn discard(&self, key: &str, bytes: &Bytes) -> Result<(), CacheError> {
        self.run(self.memory.discard(key, bytes)).await
    }

    async fn discard_many(&self, entries: &[(String, Bytes)]) -> Result<(), CacheError> {
        self.run(self.memory.discard_many(entries)).await
    }

    async fn set(&self, key: &str, payload: Payload, ttl: Duration) -> Result<(), CacheError> {
        self.run(self.memory.set(key, payload, ttl)).await
    }

    async fn delete(&self, key: &str) -> Result<(), CacheError> {
        self.run(self.memory.delete(key)).await
    }

    async fn count(&self, pattern: &str) -> Result<u64, CacheError> {
        self.run(self.memory.count(pattern)).await
    }

    async fn clear(&self, pattern: &str) -> Result<u64, CacheError> {
        self.run(self.memory.clear(pattern)).await
    }
}
