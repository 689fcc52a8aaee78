//! How each fault is caused in a cluster, and undone.
//!
//! Nothing is decided here about when a fault happens, and nothing is judged.

use std::time::Duration;

use writethrough_testbed::{Error, Redis, until};

use super::{
    fault::Fault,
    schedule::{Planned, Told},
    stop::Stop,
};
use crate::cluster::{Cluster, READY_BOUND};

/// Pause between two flushes.
const FLUSH_PAUSE: Duration = Duration::from_millis(300);
/// Pause between two rounds of ending all connections to Postgres.
const TERMINATE_PAUSE: Duration = Duration::from_millis(700);

/// Other people's keys in a Redis that evicts: this many of 1 kB are there when the limit is set.
///
/// Several seconds' worth of what is written, because Redis counts idle time in whole seconds: with less, the least
/// recently used key could be one that is a few milliseconds old.
const BALLAST: usize = 4_000;
/// And this many are written in each [`BALLAST_PAUSE`].
const BALLAST_STEP: usize = 25;
const BALLAST_PAUSE: Duration = Duration::from_millis(50);
const BALLAST_AGE: Duration = Duration::from_millis(2_100);
/// So much less than it uses is Redis given.
const SHORTAGE_BYTES: u64 = 64 * 1024;

/// Writes ballast, from key number `ARGV[1]` to `ARGV[2]`.
const WRITE_BALLAST: &str = "for i = tonumber(ARGV[1]), tonumber(ARGV[2]) do \
    redis.call('SET', 'ballast:' .. i, string.rep('x', 1000)) end return 1";
/// Removes it.
const REMOVE_BALLAST: &str = "for i = tonumber(ARGV[1]), tonumber(ARGV[2]) do \
    redis.call('UNLINK', 'ballast:' .. i) end return 1";

/// Causes a fault, lets its time pass, or less when the end comes first, and undoes it.
///
/// # Errors
///
/// When a server did not do what it was told. The cluster is of no more use then.
pub(super) async fn inject(
    cluster: &Cluster,
    planned: &Planned,
    stop: &mut Stop,
) -> Result<(), Error> {
    let node = &cluster.nodes()[planned.node];
    let redis = cluster.redis();
    let no_replica = || Error::Misuse("the cluster has no replica of Redis".to_owned());
    let replica = cluster.other_redis().ok_or_else(no_replica)?;
    let length = planned.length;
    match planned.fault {
        Fault::KillRedis => {
            redis.kill().await?;
            stop.comes_within(length).await;
            redis.start().await
        }
        Fault::PauseRedis => {
            redis.pause().await?;
            stop.comes_within(length).await;
            redis.resume().await
        }
        Fault::SlowRedis => {
            for node in cluster.nodes() {
                node.redis()?.delay(planned.delay);
            }
            stop.comes_within(length).await;
            for node in cluster.nodes() {
                node.redis()?.heal();
            }
            Ok(())
        }
        Fault::FlushRedis => {
            let flush = || redis.flush();
            repeat(length, FLUSH_PAUSE, stop, flush).await
        }
        Fault::EvictRedis => evict(redis, length, stop).await,
        Fault::RestartRedisEmpty => {
            redis.restart_empty().await?;
            stop.comes_within(length).await;
            Ok(())
        }
        Fault::RestartRedisOldSnapshot => {
            // It cannot save while it feeds a replica.
            let snapshot = until("a snapshot of Redis", READY_BOUND, || async {
                redis.snapshot().await.ok()
            });
            let snapshot = snapshot.await?;
            stop.comes_within(length).await;
            redis.restart_from(&snapshot).await
        }
        Fault::LaggingFailover => {
            replica.wait_caught_up_with(redis).await?;
            replica.freeze_replication()?;
            stop.comes_within(length).await;
            redis.kill().await?;
            replica.promote().await?;
            cluster.lead_to_other_redis()?;
            follow(redis, replica).await
        }
        Fault::TakeOverRedis => {
            replica.wait_caught_up_with(redis).await?;
            replica.promote().await?;
            stop.comes_within(length).await;
            redis.replicate(replica).await?;
            redis.promote().await?;
            replica.restart_empty().await?;
            replica.replicate(redis).await
        }
        Fault::SplitRedis => {
            replica.promote().await?;
            for (number, node) in cluster.nodes().iter().enumerate() {
                if (number == planned.node) == (planned.told == Told::First) {
                    node.redis()?.retarget(replica.addr());
                }
            }
            stop.comes_within(length).await;
            cluster.lead_to_other_redis()?;
            follow(redis, replica).await
        }
        Fault::NodeCutFromRedis => {
            node.redis()?.cut();
            stop.comes_within(length).await;
            node.redis()?.heal();
            Ok(())
        }
        Fault::NodeStalledFromRedis => {
            node.redis()?.stall();
            stop.comes_within(length).await;
            node.redis()?.heal();
            Ok(())
        }
        Fault::NodeCutFromPostgres => {
            node.postgres()?.cut();
            stop.comes_within(length).await;
            node.postgres()?.heal();
            Ok(())
        }
        Fault::KillNode => {
            node.process().kill().await?;
            stop.comes_within(length).await;
            node.process().start().await?;
            node.wait_for("/readyz").await
        }
        Fault::PauseNode => {
            node.process().pause().await?;
            stop.comes_within(length).await;
            node.process().resume().await
        }
        Fault::RestartPostgres => {
            cluster.postgres().stop().await?;
            stop.comes_within(length).await;
            cluster.postgres().start().await
        }
        Fault::KillPostgresConnections => {
            let terminate = || async { cluster.postgres().terminate_connections().await.map(drop) };
            repeat(length, TERMINATE_PAUSE, stop, terminate).await
        }
    }
}

/// Makes the old primary the replica of the new one, without its old data.
async fn follow(old: &Redis, new: &Redis) -> Result<(), Error> {
    old.restart_empty().await?;
    old.replicate(new).await
}

/// Does something over and over, at least once.
async fn repeat<F: Future<Output = Result<(), Error>>>(
    length: Duration,
    pause: Duration,
    stop: &mut Stop,
    mut act: impl FnMut() -> F,
) -> Result<(), Error> {
    let end = tokio::time::Instant::now() + length;
    loop {
        act().await?;
        let left = end.saturating_duration_since(tokio::time::Instant::now());
        if stop.comes_within(pause.min(left)).await || left <= pause {
            return Ok(());
        }
    }
}

/// Fills Redis with ballast, limits its memory to what it uses then, and goes on writing.
async fn evict(redis: &Redis, length: Duration, stop: &mut Stop) -> Result<(), Error> {
    let mut last = 0;
    ballast(redis, WRITE_BALLAST, 1, BALLAST).await?;
    // Two ticks of the clock by which Redis counts idle time: now the ballast is older than any intent.
    stop.comes_within(BALLAST_AGE).await;
    let before = number(redis, "stats", "evicted_keys").await?;
    let used = number(redis, "memory", "used_memory").await?;
    let not_counted = number(redis, "memory", "mem_not_counted_for_evict").await?;
    let limit = used.saturating_sub(not_counted + SHORTAGE_BYTES);
    redis.set_maxmemory(limit, "allkeys-lru").await?;
    let end = tokio::time::Instant::now() + length;
    loop {
        let first = BALLAST + last + 1;
        last += BALLAST_STEP;
        ballast(redis, WRITE_BALLAST, first, BALLAST + last).await?;
        if stop.comes_within(BALLAST_PAUSE).await || tokio::time::Instant::now() >= end {
            break;
        }
    }
    let evicted = number(redis, "stats", "evicted_keys").await? - before;
    redis.set_maxmemory(0, "noeviction").await?;
    ballast(redis, REMOVE_BALLAST, 1, BALLAST + last).await?;
    if evicted == 0 {
        return Err(Error::Misuse("Redis evicted nothing".to_owned()));
    }
    Ok(())
}

/// Runs a script on the ballast from number `from` to number `to`, in steps that do not hold up others.
async fn ballast(redis: &Redis, script: &str, from: usize, to: usize) -> Result<(), Error> {
    for first in (from..=to).step_by(200) {
        let last = to.min(first + 199);
        let (first, last) = (first.to_string(), last.to_string());
        redis.command(&["EVAL", script, "0", &first, &last]).await?;
    }
    Ok(())
}

/// A number that Redis tells about itself.
async fn number(redis: &Redis, section: &str, field: &str) -> Result<u64, Error> {
    let told = redis.info(section).await?.remove(field);
    told.and_then(|text| text.parse().ok())
        .ok_or_else(|| Error::Misuse(format!("{} tells no {field}", redis.name())))
}
