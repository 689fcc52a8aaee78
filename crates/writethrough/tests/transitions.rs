//! Random walks: the Lua scripts, the in-process cache and the pure transitions agree on every
//! state and every answer.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and shows its seeds and figures"
)]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use writethrough::cache::{End, FillLease, Filled, Session};
use writethrough::{Cache, MemoryCache, RedisCache, RedisSettings};
use writethrough_protocol::page::{self, Page};
use writethrough_protocol::{Acquire, KeyState, Token};
use writethrough_testbed::{Redis, Testbed};

const HOUR: Duration = Duration::from_secs(3600);
/// The pure side's clock stands still: what lasts for any time at all never lapses.
const NOW: u64 = 1000;
const LONG: u64 = 1000;

/// A state without deadlines, which depend on the server's clock: of each writer only the token.
#[derive(Debug, PartialEq)]
enum Seen {
    Plain(KeyState),
    Intent(Vec<Token>, bool),
}

/// Writers announced for one millisecond have lapsed by the time anybody looks.
fn seen(state: KeyState, lapsed: impl Fn(Token) -> bool) -> Seen {
    match state {
        KeyState::Intent(intent) => {
            let writers: Vec<Token> = intent
                .writers()
                .iter()
                .map(|writer| writer.token)
                .filter(|t| !lapsed(*t))
                .collect();
            match writers.is_empty() {
                true => Seen::Plain(KeyState::Absent),
                false => Seen::Intent(writers, intent.contended()),
            }
        }
        state => Seen::Plain(state),
    }
}

struct Walk {
    session: Arc<dyn Session>,
    random: fastrand::Rng,
    states: HashMap<String, KeyState>,
    pages: HashMap<String, Page>,
    short_lived: Vec<Token>,
    /// Where others can write too.
    shared: Option<Arc<Redis>>,
    log: Vec<String>,
}

impl Walk {
    fn token(&mut self) -> Token {
        Token(self.random.u128(1..6))
    }

    fn payload(&mut self) -> Option<Bytes> {
        let text = format!("value {}", self.random.u32(0..1000));
        self.random.bool().then(|| Bytes::from(text))
    }

    /// One operation on one key, on both sides.
    async fn step(&mut self, key: String) {
        let pure = self.states.remove(&key).unwrap_or(KeyState::Absent);
        let session = self.session.clone();
        let token = self.token();
        let kind = self.random.u32(0..1000);
        self.log.push(format!("{kind} {key} {token:?} on {pure:?}"));
        let next = match kind {
            0..200 => {
                let answer = session.acquire_fill(&key, token, HOUR).await.unwrap();
                // A lapsed intent is an absent key to the caches, which expire it.
                let (next, expected) = pure.expire(NOW).acquire_fill(token);
                let lapsed = |token| self.short_lived.contains(&token);
                let plain = |answer| match answer {
                    Acquire::Acquired => None,
                    Acquire::Held(state) => Some(seen(state, lapsed)),
                };
                assert_eq!(plain(answer), plain(expected), "{:?}", self.log);
                next
            }
            200..400 => {
                let payload = self.payload();
                let filled = session
                    .fill(&key, token, payload.clone(), HOUR)
                    .await
                    .unwrap();
                let (next, expected) = pure.fill(token, payload);
                assert_eq!(filled == Filled::Stored, expected, "{:?}", self.log);
                next
            }
            400..425 => {
                let held = session.renew_fill(&key, token, HOUR).await.unwrap();
                let (next, expected) = pure.renew_fill(token);
                assert_eq!(held == FillLease::Held, expected, "{:?}", self.log);
                next
            }
            425..450 => {
                let broken = session.break_fill(&key, token).await.unwrap();
                let (next, expected) = pure.break_fill(token);
                assert_eq!(broken == FillLease::Held, expected, "{:?}", self.log);
                next
            }
            450..650 => {
                session
                    .begin(std::slice::from_ref(&key), token, HOUR)
                    .await
                    .unwrap();
                pure.begin(token, LONG, NOW)
            }
            650..655 => {
                // A writer that dies: only its deadline takes its intent away.
                let token = Token(self.random.u128(100..));
                self.short_lived.push(token);
                let instant = Duration::from_millis(1);
                session
                    .begin(std::slice::from_ref(&key), token, instant)
                    .await
                    .unwrap();
                let lapse = std::time::Instant::now();
                while lapse.elapsed() < Duration::from_millis(3) {
                    tokio::task::yield_now().await;
                }
                pure.begin(token, 0, NOW)
            }
            655..880 => {
                let value = if self.random.bool() {
                    Some(self.payload())
                } else {
                    None
                };
                let end = End {
                    key: key.clone(),
                    value: value.clone(),
                    ttl: HOUR,
                };
                session.end(&[end], token).await.unwrap();
                pure.end(token, value, NOW)
            }
            880..900 => {
                session.delete(&key).await.unwrap();
                KeyState::Absent
            }
            901..911 if let Some(redis) = self.shared.clone() => {
                // Not an intent, of whatever type: as if nothing were there.
                let intent = format!("I-{}{:013}{:08}", Token(9), 9_000_000_000_000_u64, 15_000);
                let (cut, long) = (&intent[..54], format!("{intent}x"));
                let junk = ["", "junk", "I", "I?", cut, long.as_str()];
                match self.random.usize(0..8) {
                    6 => redis.command(&["DEL", &key]).await.unwrap(),
                    7 => {
                        redis.command(&["DEL", &key]).await.unwrap();
                        redis.command(&["LPUSH", &key, "V"]).await.unwrap();
                    }
                    kind => redis.command(&["SET", &key, junk[kind]]).await.unwrap(),
                }
                if self.random.bool() {
                    let key = std::slice::from_ref(&key);
                    session.begin(key, token, HOUR).await.unwrap();
                    KeyState::Absent.begin(token, LONG, NOW)
                } else {
                    let end = End {
                        key: key.clone(),
                        value: Some(self.payload()),
                        ttl: HOUR,
                    };
                    session.end(&[end], token).await.unwrap();
                    KeyState::Absent
                }
            }
            900..901 => {
                session.clear(&key).await.unwrap();
                pure.clear()
            }
            _ => {
                let page = format!("{key}:page");
                let bytes = Bytes::from(format!("page {}", self.random.u32(0..1000)));
                let answer = session
                    .fill_page(&key, &page, token, bytes.clone(), HOUR)
                    .await
                    .unwrap();
                let (next, expected) = page::fill(pure, token);
                assert_eq!(answer == Filled::Stored, expected, "{:?}", self.log);
                if expected {
                    self.pages.insert(
                        page,
                        Page {
                            stamp: token,
                            bytes,
                        },
                    );
                }
                next
            }
        };
        let page = format!("{key}:page");
        let (state, stored) = session.get_page(&key, &page).await.unwrap();
        let lapsed = |token| self.short_lived.contains(&token);
        let expected = seen(next.clone(), lapsed);
        assert_eq!(seen(state, lapsed), expected, "{:?}", self.log);
        assert_eq!(stored.as_ref(), self.pages.get(&page), "{:?}", self.log);
        self.states.insert(key, next);
        if self.log.len() > 30 {
            self.log.remove(0);
        }
    }
}

async fn walk(
    session: Arc<dyn Session>,
    shared: Option<Arc<Redis>>,
    name: usize,
    seed: u64,
    operations: usize,
) {
    println!("walk {name}: seed {seed}");
    let mut walk = Walk {
        session,
        random: fastrand::Rng::with_seed(seed),
        states: HashMap::new(),
        pages: HashMap::new(),
        short_lived: Vec::new(),
        shared,
        log: Vec::new(),
    };
    for _ in 0..operations {
        let key = format!("{{walk{name}}}:{}", walk.random.u32(0..3));
        walk.step(key).await;
    }
}

async fn walks(session: Arc<dyn Session>, shared: Option<Arc<Redis>>) {
    let walks = (0..8).map(|name| {
        let session = session.clone();
        tokio::spawn(walk(
            session,
            shared.clone(),
            name,
            fastrand::u64(..),
            12_500,
        ))
    });
    for walk in walks.collect::<Vec<_>>() {
        walk.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_in_process_cache_follows_the_pure_transitions() {
    let cache = MemoryCache::new(64 << 20);
    let session = cache.sessions().borrow().clone().unwrap();
    walks(session, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lua_scripts_follow_the_pure_transitions() {
    let testbed = Testbed::new().await.unwrap();
    let redis = Arc::new(testbed.redis().await.unwrap());
    let mut settings = RedisSettings::new(redis.url());
    // The walk is about states, not about time: a busy machine must not end it.
    settings.command_timeout = Duration::from_secs(10);
    let cache = RedisCache::connect(settings).unwrap();
    let mut sessions = cache.sessions();
    let session = sessions
        .wait_for(Option::is_some)
        .await
        .unwrap()
        .clone()
        .unwrap();
    walks(session, Some(redis)).await;
}
