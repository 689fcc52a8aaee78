//! The Redis cache on a real server: what is verified, what is noticed, what it costs.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and shows its seeds and figures"
)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use support::{Ground, Node, Pair, ROW, Store, until};
use writethrough::cache::{Session, SessionWatch};
use writethrough::writing::Guarded;
use writethrough::{
    Bypass, Cache, CacheError, MAX_KEYS, Phase, ReadOutcome, RedisCache, RedisSettings, Settings,
    Unavailable, WriteError,
};
use writethrough_protocol::{KeyState, Token};
use writethrough_testbed::{ChildSpec, Redis, Testbed};

fn connect(url: &str) -> (RedisCache, SessionWatch) {
    let cache = RedisCache::connect(RedisSettings::new(url)).unwrap();
    let sessions = cache.sessions();
    (cache, sessions)
}

async fn session_of(sessions: &mut SessionWatch) -> Arc<dyn Session> {
    let session = sessions.wait_for(Option::is_some).await.unwrap();
    session.clone().unwrap()
}

async fn server_of(sessions: &mut SessionWatch) -> String {
    session_of(sessions).await.server().to_string()
}

#[tokio::test]
async fn a_restarted_server_is_another_server() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let (_cache, mut sessions) = connect(&redis.url());
    let first = server_of(&mut sessions).await;
    assert!(first.starts_with(&redis.run_id().await.unwrap()));
    redis.restart_empty().await.unwrap();
    let second = redis.run_id().await.unwrap();
    until("the new server is verified", async || {
        sessions
            .borrow()
            .as_ref()
            .is_some_and(|session| session.server().as_str().starts_with(&second))
    })
    .await;
    assert!(!first.starts_with(&second));
}

#[tokio::test]
async fn a_replica_is_not_used_until_it_is_promoted() {
    let testbed = Testbed::new().await.unwrap();
    let primary = testbed.redis().await.unwrap();
    let replica = testbed.redis_replica_of(&primary).await.unwrap();
    let (_cache, mut sessions) = connect(&replica.url());
    // Time for several attempts to connect: each must refuse.
    let refused = tokio::time::timeout(Duration::from_millis(500), server_of(&mut sessions)).await;
    refused.expect_err("a read only replica was taken for a cache");
    replica.promote().await.unwrap();
    let promoted = replica.run_id().await.unwrap();
    assert!(server_of(&mut sessions).await.starts_with(&promoted));
}

#[tokio::test]
async fn a_demoted_master_is_left() {
    let testbed = Testbed::new().await.unwrap();
    let (redis, other) = (
        testbed.redis().await.unwrap(),
        testbed.redis().await.unwrap(),
    );
    let (_cache, mut sessions) = connect(&redis.url());
    server_of(&mut sessions).await;
    redis.replicate(&other).await.unwrap();
    // No command is sent: the heartbeat finds it.
    tokio::time::timeout(support::PATIENCE, sessions.wait_for(Option::is_none))
        .await
        .expect("the demotion was not noticed")
        .unwrap();
}

#[tokio::test]
async fn a_server_that_takes_no_writes_is_no_cache() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let (_cache, mut sessions) = connect(&redis.url());
    let session = session_of(&mut sessions).await;
    redis.set_maxmemory(1, "noeviction").await.unwrap();
    let refused = session
        .begin(&["k".into()], Token(1), Duration::from_secs(1))
        .await;
    assert!(
        matches!(refused, Err(CacheError::Connection(_))),
        "{refused:?}"
    );
    sessions.wait_for(Option::is_none).await.unwrap();
    redis.set_maxmemory(0, "noeviction").await.unwrap();
    server_of(&mut sessions).await;
}

#[tokio::test]
async fn a_paused_server_costs_one_deadline_and_is_then_left_alone() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let (_cache, mut sessions) = connect(&redis.url());
    let session = session_of(&mut sessions).await;
    redis.pause().await.unwrap();
    let started = Instant::now();
    let answer = session.get("k").await;
    assert!(matches!(answer, Err(CacheError::Timeout(_))), "{answer:?}");
    assert!(
        started.elapsed() < Duration::from_millis(600),
        "{:?}",
        started.elapsed()
    );
    sessions.wait_for(Option::is_none).await.unwrap();
    redis.resume().await.unwrap();
    let resumed = redis.run_id().await.unwrap();
    assert!(server_of(&mut sessions).await.starts_with(&resumed));
}

#[tokio::test]
async fn scripts_are_loaded_again_when_the_server_forgot_them() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let (_cache, mut sessions) = connect(&redis.url());
    let session = session_of(&mut sessions).await;
    redis.command(&["SCRIPT", "FLUSH"]).await.unwrap();
    session
        .begin(&["a".into(), "b".into()], Token(1), Duration::from_secs(9))
        .await
        .unwrap();
    for key in ["a", "b"] {
        assert!(matches!(
            session.get(key).await.unwrap(),
            KeyState::Intent(_)
        ));
    }
}

#[tokio::test]
async fn foreign_keys_are_neither_believed_nor_cleared() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let (_cache, mut sessions) = connect(&redis.url());
    let session = session_of(&mut sessions).await;
    redis
        .command(&["SET", "item:1@7", "{\"id\":1}"])
        .await
        .unwrap();
    redis.command(&["LPUSH", "item:2@7", "V"]).await.unwrap();
    assert!(matches!(
        session.get("item:1@7").await,
        Err(CacheError::Command(_))
    ));
    assert!(matches!(
        session.get("item:2@7").await,
        Err(CacheError::Command(_))
    ));
    assert_eq!(session.clear("item:*@*").await.unwrap(), 0);
    assert_eq!(session.count("item:*@*").await.unwrap(), 0);
    let left = redis.query::<u64>(&["EXISTS", "item:1@7", "item:2@7"]);
    assert_eq!(left.await.unwrap(), 2);
}

#[test]
fn a_malformed_url_is_refused_without_repeating_it() {
    let settings = RedisSettings::new("http://user:hunter2@host");
    assert!(!format!("{settings:?}").contains("hunter2"));
    let error = RedisCache::connect(settings).err().unwrap().to_string();
    assert!(
        error.contains("redis://") && !error.contains("hunter2"),
        "{error}"
    );
}

/// What the cache says of a server that it does not use, verified on keys as the service has them.
async fn refused(url: &str) -> String {
    let mut settings = RedisSettings::new(url);
    settings.key_prefixes = vec!["item:".into(), "{items}".into()];
    // A busy machine is no refusal.
    settings.connect_timeout = support::PATIENCE;
    settings.command_timeout = support::PATIENCE;
    let cache = RedisCache::connect(settings).unwrap();
    let mut reason = None;
    until("the server is refused", async || {
        assert!(
            cache.sessions().borrow().is_none(),
            "the server is taken for a cache"
        );
        reason = cache.trouble();
        reason.is_some()
    })
    .await;
    let reason = reason.unwrap().to_string();
    println!("{reason}");
    assert!(
        !reason.contains('\n') && !reason.contains("KEYS[") && reason.len() < 400,
        "more than one short line: {reason}"
    );
    reason
}

/// The commands that the documentation lists for an ACL.
const LISTED: &str = "+hello +client|tracking +info +time +get +mget +set +del +select +script|load \
                      +evalsha +scan +getrange +type +pexpire +unlink";

async fn user(redis: &Redis, rules: &str) -> String {
    let rules = rules.split_whitespace();
    let rule: Vec<&str> = ["ACL", "SETUSER", "plain", "reset", "on", ">pw"]
        .into_iter()
        .chain(rules)
        .collect();
    redis.command(&rule).await.unwrap();
    format!("redis://plain:pw@{}", redis.addr())
}

#[tokio::test]
async fn a_user_with_what_the_documentation_lists_is_enough() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let rules = format!("~item:* ~{{items}}* ~writethrough:* {LISTED}");
    let mut settings = RedisSettings::new(user(&redis, &rules).await + "/3");
    settings.key_prefixes = vec!["item:".into(), "{items}".into()];
    let cache = RedisCache::connect(settings).unwrap();
    server_of(&mut cache.sessions()).await;
    let left: u64 = redis.query(&["DBSIZE"]).await.unwrap();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn a_user_that_lacks_any_command_is_refused_with_its_name() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    for command in [
        "info",
        "time",
        "get",
        "mget",
        "set",
        "del",
        "script|load",
        "evalsha",
        "scan",
        "getrange",
        "type",
        "pexpire",
        "unlink",
    ] {
        let rules = format!("~* +@all -{command}");
        let reason = refused(&user(&redis, &rules).await).await;
        let named = reason.to_lowercase().replace(' ', "|");
        assert!(
            named.contains(command) && reason.contains("ACL SETUSER"),
            "{command}: {reason}"
        );
    }
}

#[tokio::test]
async fn a_user_that_lacks_a_key_pattern_is_refused_with_the_pattern() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    for (patterns, missing) in [
        ("~item:* ~writethrough:*", "~{items}*"),
        ("~{items}* ~writethrough:*", "~item:*"),
        ("~item:* ~{items}*", "~writethrough:probe:*"),
        ("~item:* %R~{items}* ~writethrough:*", "~{items}*"),
    ] {
        let rules = format!("{patterns} +@all");
        let reason = refused(&user(&redis, &rules).await).await;
        assert!(reason.contains(missing), "{patterns}: {reason}");
    }
}

#[tokio::test]
async fn a_renamed_command_is_refused_with_its_name() {
    let testbed = Testbed::new().await.unwrap();
    for command in ["EVALSHA", "GETRANGE", "SCAN", "SCRIPT"] {
        let renamed = ["--rename-command", command, ""];
        let redis = testbed.redis_with(&renamed).await.unwrap();
        let reason = refused(&redis.url()).await;
        assert!(
            reason.contains(command) && reason.contains("rename-command"),
            "{reason}"
        );
    }
}

/// A right that is taken away later, or a key that no one has named before: the first refusal ends
/// the connection, and the next one is not verified until the right is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_right_that_is_missed_later_is_named_and_the_cache_does_not_flap() {
    let ground = Ground::with_own_redis(Pair::RedisLocal).await;
    let redis = ground.redis.as_ref().unwrap();
    let url = user(redis, &format!("~writethrough:* {LISTED}")).await;
    let cache = Arc::new(RedisCache::connect(RedisSettings::new(url)).unwrap());
    let node = ground.start(Settings::default(), cache.clone(), ground.fence());
    until("the cache is in use", async || node.cached.uses_cache()).await;
    node.write("a", Some("one")).await.unwrap();
    let proposed = node.cached.status().proposed_bypass.unwrap();
    assert!(proposed.reason.contains("~row:*"), "{proposed:?}");
    let reason = cache.trouble().unwrap().to_string();
    assert!(reason.contains("~row:*"), "{reason}");
    let epoch = node.cached.status().epoch;
    // Many heartbeats and polls.
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(3) {
        node.write("a", Some("two")).await.unwrap();
        assert_eq!(node.cached.status().epoch, epoch, "the epoch flaps");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    user(redis, &format!("~writethrough:* ~row:* {LISTED}")).await;
    until("the cache is in use", async || node.cached.uses_cache()).await;
    node.write("a", Some("three")).await.unwrap();
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
}

#[tokio::test]
async fn a_redis_cluster_and_a_sentinel_are_refused_as_what_they_are() {
    let testbed = Testbed::new().await.unwrap();
    let cluster = testbed
        .redis_with(&["--cluster-enabled", "yes"])
        .await
        .unwrap();
    for database in ["", "/0", "/3"] {
        let reason = refused(&format!("{}{database}", cluster.url())).await;
        assert!(reason.contains("node of a Redis Cluster"), "{reason}");
    }
    let port = writethrough_testbed::free_port();
    let folder = std::env::temp_dir().join(format!("writethrough-sentinel-{port}"));
    std::fs::create_dir(&folder).unwrap();
    let file = folder.join("sentinel.conf");
    std::fs::write(&file, format!("port {port}\nbind 127.0.0.1\n")).unwrap();
    let sentinel = ChildSpec::new("sentinel", "redis-server")
        .arg(&file)
        .arg("--sentinel")
        .folder(&folder);
    let sentinel = testbed.child(sentinel).await.unwrap();
    until("the sentinel listens", async || {
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    })
    .await;
    for database in ["", "/3"] {
        let reason = refused(&format!("redis://127.0.0.1:{port}{database}")).await;
        assert!(reason.contains("Redis Sentinel"), "{reason}");
    }
    drop(sentinel);
    std::fs::remove_dir_all(folder).unwrap();
}

/// The commands that clients sent while `work` ran, with their arguments, from MONITOR; what scripts
/// do is left out.
async fn monitored(redis: &Redis, work: impl Future<Output = ()>) -> Vec<Vec<String>> {
    let mut monitor = TcpStream::connect(redis.addr()).unwrap();
    monitor.set_read_timeout(Some(support::PATIENCE)).unwrap();
    monitor.write_all(b"MONITOR\r\n").unwrap();
    let mut lines = BufReader::new(monitor);
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    work.await;
    redis.command(&["ECHO", "the end"]).await.unwrap();
    let mut seen = Vec::new();
    loop {
        line.clear();
        lines.read_line(&mut line).unwrap();
        if line.contains("the end") {
            return seen;
        }
        let housekeeping = ["\"INFO\"", "\"TIME\"", "writethrough:probe:"]
            .iter()
            .any(|own| line.contains(own));
        if !line.contains("lua]") && !housekeeping {
            let words = line.split('"').skip(1).step_by(2);
            seen.push(words.map(str::to_owned).collect());
        }
    }
}

/// The names of those commands.
async fn commands(redis: &Redis, work: impl Future<Output = ()>) -> Vec<String> {
    let seen = monitored(redis, work).await;
    seen.into_iter()
        .map(|mut words| words.swap_remove(0))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hit_is_one_command_a_miss_three_a_write_two_rounds() {
    let ground = Ground::with_own_redis(Pair::RedisPostgres).await;
    let node = ground.node().await;
    let redis = ground.redis.as_ref().unwrap();
    let miss = commands(redis, async {
        assert_eq!(node.read("a").await.outcome, ReadOutcome::Filled);
    })
    .await;
    assert_eq!(miss, ["GET", "SET", "EVALSHA"]);
    let hit = commands(redis, async {
        assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
    })
    .await;
    assert_eq!(hit, ["GET"]);
    let write = commands(redis, async {
        node.write("a", Some("one")).await.unwrap();
    })
    .await;
    assert_eq!(write, ["EVALSHA", "EVALSHA"]);
}

/// With a link that takes 100 ms for a round trip, the time tells the number of rounds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_of_one_step_share_a_round_trip() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let link = testbed.link(redis.addr()).await.unwrap();
    let mut settings = RedisSettings::new(link.url_for(&redis.url()));
    settings.command_timeout = Duration::from_secs(5);
    settings.connect_timeout = Duration::from_secs(5);
    let cache = RedisCache::connect(settings).unwrap();
    let mut sessions = cache.sessions();
    let session = session_of(&mut sessions).await;
    link.delay(Duration::from_millis(100));
    let round = async |work: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
        let started = Instant::now();
        work.await;
        started.elapsed()
    };
    let one = round(Box::pin({
        let session = session.clone();
        async move { drop(session.get("k").await.unwrap()) }
    }))
    .await;
    let many = round(Box::pin(async move {
        let keys: Vec<String> = (0..20).map(|number| format!("k{number}")).collect();
        session
            .begin(&keys, Token(1), Duration::from_secs(9))
            .await
            .unwrap();
    }))
    .await;
    assert!(
        many < one.mul_f64(1.5),
        "20 intents took {many:?}, one command {one:?}"
    );
}

/// The requests of a hung Redis: each pays at most one deadline, later ones none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_redis_is_paid_for_once() {
    let ground = Ground::with_own_redis(Pair::RedisPostgres).await;
    let node = ground.node().await;
    let redis = ground.redis.as_ref().unwrap();
    node.write("a", Some("one")).await.unwrap();
    redis.pause().await.unwrap();
    let first = timed_read(&node).await;
    assert!(first < Duration::from_millis(750), "{first:?}");
    until("requests stop touching Redis", async || {
        node.read("a").await.outcome == ReadOutcome::Bypassed(Bypass::NotConnected)
            || node.cached.status().phase == Phase::Bypass
    })
    .await;
    let calls = node.cached.stats().cache_errors;
    for _ in 0..20 {
        node.read("a").await;
    }
    assert_eq!(
        node.cached.stats().cache_errors,
        calls,
        "a request waited for the hung Redis"
    );
    let started = Instant::now();
    node.write("a", Some("two")).await.unwrap();
    assert!(
        started.elapsed() < Duration::from_millis(2500),
        "{:?}",
        started.elapsed()
    );
    redis.resume().await.unwrap();
    let back = Instant::now();
    until("hits resume", async || {
        node.read("a").await.outcome == ReadOutcome::Hit
    })
    .await;
    assert!(
        back.elapsed() < Duration::from_secs(5),
        "{:?}",
        back.elapsed()
    );
    assert_eq!(node.value("a").await.as_deref(), Some("two"));
}

async fn timed_read(node: &Node) -> Duration {
    let started = Instant::now();
    assert_eq!(node.value("a").await.as_deref(), Some("one"));
    started.elapsed()
}

/// A clearing and a count of 100 000 keys never hold Redis up: no command asks for more than a small
/// batch, and by Redis' own account a batch takes it well under a millisecond. How long the slowest
/// PING took beside them is printed, not asserted: that is as much a matter of the machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn walking_100_000_keys_never_holds_redis_up() {
    const LARGEST_BATCH: usize = 128;
    let ground = Ground::with_own_redis(Pair::RedisLocal).await;
    let redis = ground.redis.as_ref().unwrap();
    let mut settings = RedisSettings::new(redis.url());
    // A busy machine must not end the walk.
    settings.command_timeout = support::PATIENCE;
    let cache = Arc::new(RedisCache::connect(settings).unwrap());
    let node = ground.start(Settings::default(), cache, ground.fence());
    until("the cache is in use", async || node.cached.uses_cache()).await;
    let key = node.cache_key("' .. i .. '");
    let fill = format!("for i = 1, 100000 do redis.call('SET', '{key}', 'V' .. i) end return 1");
    redis.command(&["EVAL", &fill, "0"]).await.unwrap();
    redis.command(&["CONFIG", "RESETSTAT"]).await.unwrap();

    let idle = pings(redis, tokio::time::sleep(Duration::from_millis(300))).await;
    let counting = pings(redis, async {
        assert_eq!(node.cached.cached_values(&ROW).await, Some(100_000));
    })
    .await;
    let mut clearing = Duration::ZERO;
    let seen = monitored(redis, async {
        clearing = pings(redis, async {
            assert_eq!(node.cached.clear(&ROW).await.unwrap(), 100_000);
        })
        .await;
    })
    .await;
    println!("slowest PING: idle {idle:?}, counting {counting:?}, clearing {clearing:?}");

    let mut batches = 0;
    for words in seen.iter().filter(|words| words[0] != "PING") {
        match words[0].as_str() {
            "SCAN" => assert_eq!(words[5], LARGEST_BATCH.to_string(), "{words:?}"),
            "EVALSHA" => {
                batches += 1;
                let keys = words.len() - 3;
                assert!(keys <= LARGEST_BATCH, "a command of {keys} keys");
            }
            // The heartbeat of the connection.
            "INFO" | "TIME" | "SET" => {}
            other => panic!("a walk sent {other}"),
        }
    }
    assert!(batches >= 100_000 / LARGEST_BATCH, "{batches} batches");
    let stats = redis.info("commandstats").await.unwrap();
    for command in ["cmdstat_evalsha", "cmdstat_scan"] {
        let mean = stats[command]
            .split(',')
            .find_map(|part| part.strip_prefix("usec_per_call="));
        let mean: f64 = mean.unwrap().parse().unwrap();
        println!("{command}: {mean} us a call");
        assert!(mean < 2500.0, "{command} takes Redis {mean} us on average");
    }
}

/// The slowest of the PINGs sent one after the other while `work` runs.
async fn pings(redis: &Redis, work: impl Future<Output = ()>) -> Duration {
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (stopped, addr) = (stop.clone(), redis.addr());
    let pinging = std::thread::spawn(move || {
        let mut connection = TcpStream::connect(addr).unwrap();
        connection.set_nodelay(true).unwrap();
        connection
            .set_read_timeout(Some(support::PATIENCE))
            .unwrap();
        let mut replies = BufReader::new(connection.try_clone().unwrap());
        let (mut slowest, mut reply) = (Duration::ZERO, String::new());
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            let started = Instant::now();
            connection.write_all(b"PING\r\n").unwrap();
            reply.clear();
            replies.read_line(&mut reply).unwrap();
            slowest = slowest.max(started.elapsed());
        }
        slowest
    });
    work.await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    pinging.join().unwrap()
}

/// `begin` is carried out, its reply and the connection are lost, and it is sent again on the next
/// connection. The first copy may still be on its way, as far as the writer can know; were it to
/// arrive after the write had ended, and an `end` sent twice likewise, the value would come back
/// over a newer one. So such a write leaves nothing in the cache (the model's mutant "begin sent
/// again keeps its value" has the schedule).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_announced_on_two_connections_leaves_no_value() {
    let ground = Ground::with_own_redis(Pair::RedisLocal).await;
    let redis = ground.redis.as_ref().unwrap();
    let testbed = Testbed::new().await.unwrap();
    let link = testbed.link(redis.addr()).await.unwrap();
    let mut settings = RedisSettings::new(link.url_for(&redis.url()));
    // The reply must be lost with the connection, not given up on before.
    settings.command_timeout = support::PATIENCE;
    let cache = Arc::new(RedisCache::connect(settings).unwrap());
    let patient = Settings {
        reconnect_grace: support::PATIENCE,
        ..Settings::default()
    };
    let node = ground.start(patient, cache, ground.fence());
    until("the cache is in use", async || node.cached.uses_cache()).await;
    let epoch = node.cached.status().epoch.unwrap();

    link.stall_replies();
    let writer = node.spawn(async |node| node.write("a", Some("one")).await);
    let key = node.cache_key("a");
    until("the intent is placed", async || {
        let state: Option<String> = redis.query(&["GET", &key]).await.unwrap();
        state.is_some_and(|state| state.starts_with('I'))
    })
    .await;
    link.reset();
    link.heal();
    let written = writer.await.unwrap().unwrap();
    assert_eq!(
        written.epoch, epoch,
        "the connection was replaced, the epoch was not"
    );
    let read = node.read("a").await;
    assert_eq!(read.outcome, ReadOutcome::Filled);
    assert_eq!(node.value("a").await.as_deref(), Some("one"));
    node.write("a", Some("two")).await.unwrap();
    assert_eq!(
        node.read("a").await.outcome,
        ReadOutcome::Hit,
        "the next write keeps its value"
    );
}

/// B was A's replica and was let go; A takes a write; then A is B's replica for a moment and a master
/// again. Its process and its connections are the same, its data are B's: under a `run_id` alone the
/// old value would be a hit until the TTL. A reader that never pauses sees no old value at any time:
/// A tells its connections that its data are going before it answers from the new ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_set_taken_over_from_another_server_is_never_believed() {
    let ground = Ground::with_own_redis(Pair::RedisPostgres).await;
    let a = ground.redis.as_ref().unwrap();
    let testbed = Testbed::new().await.unwrap();
    for key in ["repl-diskless-sync", "repl-diskless-sync-delay"] {
        let value = if key.ends_with("delay") { "0" } else { "yes" };
        a.command(&["CONFIG", "SET", key, value]).await.unwrap();
    }
    let nodes = [ground.node().await, ground.node().await];
    nodes[0].write("a", Some("old")).await.unwrap();
    assert_eq!(nodes[1].read("a").await.outcome, ReadOutcome::Hit);
    let b = testbed.redis_replica_of(a).await.unwrap();
    b.wait_caught_up_with(a).await.unwrap();
    b.promote().await.unwrap();
    for key in ["repl-diskless-sync", "repl-diskless-sync-delay"] {
        let value = if key.ends_with("delay") { "0" } else { "yes" };
        b.command(&["CONFIG", "SET", key, value]).await.unwrap();
    }
    nodes[0].write("a", Some("new")).await.unwrap();
    let epoch = nodes[0].cached.status().epoch;
    // Now, for the nodes may be in the next epoch before they are asked.
    let key = nodes[0].cache_key("a");

    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let readers: Vec<_> = nodes
        .iter()
        .map(|node| {
            let (node, stop) = (node.clone(), stop.clone());
            tokio::spawn(async move {
                let mut reads = 0_u64;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    assert_eq!(node.value("a").await.as_deref(), Some("new"));
                    reads += 1;
                }
                reads
            })
        })
        .collect();
    a.replicate(&b).await.unwrap();
    a.wait_caught_up_with(&b).await.unwrap();
    a.promote().await.unwrap();
    // The old value is there, under the key of the epoch.
    let stored: Option<String> = a.query(&["GET", &key]).await.unwrap();
    assert_eq!(
        stored.as_deref(),
        Some("V\u{1}\"old\""),
        "the test shows nothing"
    );
    until("a new epoch uses the cache again", async || {
        nodes
            .iter()
            .all(|node| node.cached.status().epoch > epoch && node.cached.uses_cache())
    })
    .await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for reader in readers {
        println!("{} reads, none of them stale", reader.await.unwrap());
    }
    for node in &nodes {
        assert_eq!(node.value("a").await.as_deref(), Some("new"));
        assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
    }
}

/// Without `CLIENT TRACKING` (an ACL, a proxy) the heartbeat finds it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_tracking_another_data_set_is_found_by_the_heartbeat() {
    let testbed = Testbed::new().await.unwrap();
    let (a, b) = (
        testbed.redis().await.unwrap(),
        testbed.redis().await.unwrap(),
    );
    let acl = [
        "ACL",
        "SETUSER",
        "plain",
        "on",
        ">pw",
        "~*",
        "+@all",
        "-client|tracking",
    ];
    a.command(&acl).await.unwrap();
    let url = format!("redis://plain:pw@{}", a.addr());
    let (_cache, mut sessions) = connect(&url);
    let first = server_of(&mut sessions).await;
    a.replicate(&b).await.unwrap();
    a.promote().await.unwrap();
    tokio::time::timeout(support::PATIENCE, async {
        while server_of(&mut sessions).await == first {
            sessions.changed().await.unwrap();
        }
    })
    .await
    .expect("the new data set was not noticed");
    let (process, _) = first.split_once(':').unwrap();
    assert!(server_of(&mut sessions).await.starts_with(process));
}

/// Two nodes on two databases of one server would each fill what the other does not see.
#[tokio::test]
async fn another_database_index_is_another_server() {
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let url = |index| format!("redis://{}/{index}", redis.addr());
    let (_first, mut first) = connect(&url(0));
    let (_second, mut second) = connect(&url(1));
    assert_ne!(server_of(&mut first).await, server_of(&mut second).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_ends_neither_the_session_nor_the_epoch() {
    let ground = Ground::with_own_redis(Pair::RedisLocal).await;
    let redis = ground.redis.as_ref().unwrap();
    let node = ground.node().await;
    let epoch = node.cached.status().epoch;
    for round in 0..20 {
        node.write("a", Some("one")).await.unwrap();
        redis.flush().await.unwrap();
        let outcome = node.read("a").await.outcome;
        assert_eq!(outcome, ReadOutcome::Filled, "round {round}");
        redis.flush().await.unwrap();
        node.write("a", Some("two")).await.unwrap();
        assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
    }
    assert_eq!(node.cached.status().epoch, epoch);
    assert_eq!(node.cached.stats().cache_errors, 0);
}

/// An intent is abandoned while the server's clock is an hour ahead; then the clock is set right. By
/// the deadline in it, it lasts for an hour, which its writer could not mean.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_intent_from_a_clock_that_was_set_back_is_over() {
    let ground = Ground::with_own_redis(Pair::RedisLocal).await;
    let redis = ground.redis.as_ref().unwrap();
    let node = ground.node().await;
    let time = redis.query(&["EVAL", "return redis.call('TIME')[1]", "0"]);
    let seconds: u64 = time.await.unwrap();
    let abandon = async |contended: &str| {
        let deadline = (seconds + 3600 + 15) * 1000;
        let intent = format!("I{contended}{}{deadline:013}{:08}", Token(9), 15_000);
        let set = ["SET", &node.cache_key("a"), &intent, "EX", "3615"];
        redis.command(&set).await.unwrap();
    };
    abandon("-").await;
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Filled);
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
    // A writer that meets it is alone, and keeps its value.
    abandon("+").await;
    node.write("a", Some("new")).await.unwrap();
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
}

/// What other programs, other versions and hands on a keyboard leave under a key of ours.
fn foreign(key: &str) -> Vec<Vec<String>> {
    let writer = format!("{}{:013}{:08}", Token(9), 9_000_000_000_000_u64, 15_000);
    let strings = [
        String::new(),
        "{\"id\":1}".into(),
        "I".into(),
        "I-".into(),
        format!("I?{writer}"),
        format!("I-{writer}x"),
        format!("I-{writer}{}", &writer[1..]),
        format!("I-{}", writer.replace('9', "z")),
        format!("I-{}{:>13}{:>8}", Token(9), "9e12345", "9e30"),
        format!("I-{}{:>13}{:>8}", Token(9), "4000000000.5", "9e30"),
        "Lshort".into(),
        "NN".into(),
    ];
    let set = strings.map(|text| vec!["SET".to_owned(), key.to_owned(), text]);
    let others = [
        &["LPUSH", key, "V"][..],
        &["SADD", key, "V"],
        &["ZADD", key, "1", "V"],
        &["HSET", key, "I", "V"],
        &["XADD", key, "*", "I", "V"],
    ];
    let others = others.map(|words| words.iter().map(|word| (*word).to_owned()).collect());
    set.into_iter().chain(others).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_overwrites_what_is_not_an_intent_and_ends_no_epoch() {
    let ground = Ground::with_own_redis(Pair::RedisLocal).await;
    let redis = ground.redis.as_ref().unwrap();
    let node = ground.node().await;
    let epoch = node.cached.status().epoch;
    for words in foreign(&node.cache_key("a")) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        redis.command(&["DEL", words[1]]).await.unwrap();
        redis.command(&words).await.unwrap();
        node.write("a", Some("one")).await.unwrap();
        let status = node.cached.status();
        assert_eq!(status.epoch, epoch, "{words:?}: {status:?}");
        assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit, "{words:?}");
        // It comes between the announcement and the end.
        let (gate, writer) = node.held_write("a", Some("two")).await;
        redis.command(&["DEL", words[1]]).await.unwrap();
        redis.command(&words).await.unwrap();
        gate.let_through();
        writer.await.unwrap().unwrap();
        assert_eq!(node.value("a").await.as_deref(), Some("two"));
        assert_eq!(node.cached.status().epoch, epoch, "{words:?}");
    }
    assert_eq!(node.cached.stats().cache_errors, 0);
}

/// A write of these keys, each with a value.
async fn write_all(node: &Node, ids: Vec<String>) -> support::Outcome<()> {
    let keys: Vec<_> = ids.iter().map(|id| ROW.key(id.as_str())).collect();
    let write = node.cached.write(keys);
    let write = write.with((node.store.clone(), ids));
    write
        .guarded(
            |mut guarded: Guarded, slots, (store, ids): (Store, Vec<String>)| async move {
                for (slot, id) in slots.iter().zip(&ids) {
                    store.put(&guarded, id, Some("one")).await?;
                    guarded.cache(slot, &"one".to_owned());
                }
                Ok(guarded.commit(()))
            },
        )
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_of_no_key_of_a_key_twice_and_of_50_000_keys_keep_the_epoch() {
    let ground = Ground::with_own_redis(Pair::RedisLocal).await;
    let node = ground.node().await;
    let epoch = node.cached.status().epoch;
    write_all(&node, Vec::new()).await.unwrap();
    assert_eq!(node.cached.status().epoch, epoch, "no key");
    write_all(&node, vec!["a".into(), "a".into()])
        .await
        .unwrap();
    assert_eq!(node.cached.status().epoch, epoch, "a key twice");
    assert_eq!(node.read("a").await.outcome, ReadOutcome::Hit);
    let many = |count: usize| (0..count).map(|number| format!("k{number}")).collect();
    let started = Instant::now();
    write_all(&node, many(50_000)).await.unwrap();
    println!("50 000 keys in {:?}", started.elapsed());
    let status = node.cached.status();
    assert_eq!(status.epoch, epoch, "{:?}", status.proposed_bypass);
    for id in ["k0", "k25000", "k49999"] {
        assert_eq!(node.read(id).await.outcome, ReadOutcome::Hit, "{id}");
    }
    let refused = write_all(&node, many(MAX_KEYS + 1)).await;
    assert!(
        matches!(
            refused,
            Err(WriteError::Unavailable(Unavailable::TooManyKeys))
        ),
        "{refused:?}"
    );
}

/// A string of so many bytes that begins like a value, as another program may leave it.
async fn put_long(redis: &Redis, key: &str, bytes: usize) {
    let last = (bytes - 1).to_string();
    redis.command(&["SETRANGE", key, &last, "x"]).await.unwrap();
    redis.command(&["SETRANGE", key, "0", "V"]).await.unwrap();
}

/// A reply of 4 or of 20 MB over a link of 2 MB a second takes far longer than a command may. On the
/// connection of the writes it held their answers up, twice 250 ms, and each cost all nodes the epoch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_reply_over_a_slow_link_costs_neither_a_write_nor_the_epoch() {
    let ground = Ground::with_own_redis(Pair::RedisLocal).await;
    let redis = ground.redis.as_ref().unwrap();
    let link = ground.link_to_redis().await;
    let settings = RedisSettings::new(link.url_for(&redis.url()));
    let cache = Arc::new(RedisCache::connect(settings).unwrap());
    let node = ground.start(Settings::default(), cache, ground.fence());
    until("the cache is in use", async || node.cached.uses_cache()).await;
    let epoch = node.cached.status().epoch;
    node.write("a", Some("one")).await.unwrap();
    link.slow_down(2_000_000);
    for bytes in [4_000_000, 20_000_000] {
        put_long(redis, &node.cache_key("a"), bytes).await;
        let reader = tokio::spawn({
            let node = node.clone();
            async move {
                loop {
                    assert_eq!(node.value("a").await.as_deref(), Some("one"));
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        });
        let (started, mut slowest) = (Instant::now(), Duration::ZERO);
        while started.elapsed() < Duration::from_secs(3) {
            let began = Instant::now();
            node.write("b", Some("two")).await.unwrap();
            slowest = slowest.max(began.elapsed());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        println!("{bytes} bytes: the slowest write took {slowest:?}");
        reader.abort();
        assert!(reader.await.unwrap_err().is_cancelled(), "a read failed");
        assert_eq!(node.cached.status().epoch, epoch, "{bytes} bytes");
    }
    // No node stores so much: it is gone, and the key has its value again.
    until("the long value is replaced", async || {
        node.read("a").await.outcome == ReadOutcome::Hit
    })
    .await;
    assert_eq!(node.value("a").await.as_deref(), Some("one"));
}

/// The server's end of a connection, or the server, goes away. The heartbeat would find it within a
/// second, in which `/health` says that all is well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_closes_is_noticed_at_once() {
    let at_once = Duration::from_millis(500);
    let testbed = Testbed::new().await.unwrap();
    let redis = testbed.redis().await.unwrap();
    let (_cache, mut sessions) = connect(&redis.url());
    for connection in [Some(0), Some(1), None] {
        // The heartbeat comes a second after the session, so it is not what notices.
        let verified = session_of(&mut sessions);
        drop(
            tokio::time::timeout(support::PATIENCE, verified)
                .await
                .unwrap(),
        );
        match connection {
            None => redis.kill().await.unwrap(),
            Some(number) => {
                let list: String = redis.query(&["CLIENT", "LIST"]).await.unwrap();
                let mut ids: Vec<u64> = list
                    .lines()
                    .filter(|line| line.contains("resp=3"))
                    .filter_map(|line| line.split([' ', '=']).nth(1)?.parse().ok())
                    .collect();
                ids.sort_unstable();
                assert_eq!(ids.len(), 2, "{list}");
                let id = ids[number].to_string();
                redis.command(&["CLIENT", "KILL", "ID", &id]).await.unwrap();
            }
        }
        tokio::time::timeout(at_once, sessions.changed())
            .await
            .expect("nobody noticed")
            .unwrap();
    }
}

/// The library's user forgets `shutdown`, or an error takes another way out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_is_dropped_closes_its_connections_and_proposes_nothing() {
    let ground = Ground::with_own_redis(Pair::RedisPostgres).await;
    let redis = ground.redis.as_ref().unwrap();
    let staying = ground.node().await;
    let epoch = staying.cached.status().epoch;
    let clients = async || {
        let list: String = redis.query(&["CLIENT", "LIST"]).await.unwrap();
        list.lines().filter(|line| line.contains("resp=3")).count()
    };
    let before = clients().await;
    let dropped = ground.node().await;
    let fence = Arc::downgrade(&dropped.fence);
    assert_eq!(clients().await, before + 2);
    let (gate, writer) = dropped.held_write("a", Some("one")).await;
    // Its caller gives up, and with it goes the last handle; the write itself goes on.
    drop(dropped);
    writer.abort();
    gate.let_through();
    until("the connections to Redis are closed", async || {
        clients().await == before
    })
    .await;
    until("nothing holds the fence any more", async || {
        fence.upgrade().is_none()
    })
    .await;
    assert_eq!(staying.value("a").await.as_deref(), Some("one"));
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(2) {
        staying.write("a", Some("two")).await.unwrap();
        assert_eq!(staying.cached.status().epoch, epoch);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(staying.read("a").await.outcome, ReadOutcome::Hit);
}

/// A node without processor time: its runtime is held up for 300 ms again and again, so that its
/// commands miss their 250 ms although Redis has answered at once. That says nothing about Redis, and
/// must not take the cache from every other node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_late_itself_does_not_end_the_epoch() {
    let ground = Ground::with_own_redis(Pair::RedisLocal).await;
    let node = ground.node().await;
    node.write("a", Some("one")).await.unwrap();
    let epoch = node.cached.status().epoch;
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let hogs: Vec<_> = (0..3)
        .map(|_| {
            let stop = stop.clone();
            tokio::spawn(async move {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let held_up = Instant::now();
                    while held_up.elapsed() < Duration::from_millis(300) {
                        std::hint::spin_loop();
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
        })
        .collect();
    let writers: Vec<_> = (0..50)
        .map(|writer| {
            let node = node.clone();
            tokio::spawn(async move {
                let (id, started) = (format!("k{writer}"), Instant::now());
                for number in 0.. {
                    node.write(&id, Some(&number.to_string())).await.unwrap();
                    let late = node.cached.stats().late_timeouts > 0;
                    if number >= 10 && (late || started.elapsed() > support::PATIENCE) {
                        break;
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for hog in hogs {
        hog.await.unwrap();
    }
    let status = node.cached.status();
    let late = node.cached.stats().late_timeouts;
    assert!(late > 0, "nothing was late, so nothing was shown");
    println!("{late} commands were late");
    assert_eq!(status.epoch, epoch, "{:?}", status.proposed_bypass);
    assert_eq!(status.proposed_bypass, None);
}
