//! The workload: processes that invoke operations at random and record how they completed.
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

mod mix;
mod pool;
mod process;
mod progress;
mod settings;
mod value;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::sleep;

use self::process::{PAUSE, Process, Shared};
use crate::client::Target;
use crate::history::{History, Stall};
use crate::time::Clock;

pub use self::mix::Mix;
pub use self::progress::Progress;
pub use self::settings::Settings;

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
        /// The answer of the service, or why there was none.
        reason: String,
    },
}

/// Time from one look for a stall of this program to the next.
const TICK: Duration = Duration::from_millis(10);

/// Runs the workload to its end, then reads each item once more through each target.
///
/// # Errors
///
/// Fails when no service could be used at all. Everything that happens later is part of the
/// history.
///
/// # Cancellation
///
/// Dropping the future ends all processes; their operations may have been sent.
pub async fn run(settings: &Settings, progress: &Arc<Progress>) -> Result<History, WorkloadError> {
    run_then(settings, progress, async {}).await
}

/// Runs the workload like [`run`], but waits for `quiesced` before it reads each item once more.
///
/// # Errors
///
/// As for [`run`]; then `quiesced` is not waited for.
///
/// # Cancellation
///
/// As for [`run`].
pub async fn run_then(
    settings: &Settings,
    progress: &Arc<Progress>,
    quiesced: impl Future<Output = ()>,
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
    let shared = Arc::new(Shared::new(settings, targets, progress.clone()));

    set_up(&shared).await?;
    let begun = Instant::now();
    let mut watching = JoinSet::new();
    let watched = shared.clone();
    watching.spawn(watch_for_stalls(settings.clock, move |longest| {
        watched.history().header.held_up = Some(longest);
    }));
    let mut processes = JoinSet::new();
    for number in 0..settings.processes {
        let process = Process::new(&shared, number);
        processes.spawn(process.work(begun));
    }
    while processes.join_next().await.is_some() {}
    quiesced.await;
    for target in 0..shared.targets.len() {
        let number = settings.processes + target as u32;
        processes.spawn(Process::new(&shared, number).read_everything(target));
    }
    while processes.join_next().await.is_some() {}
    let history = std::mem::take(&mut *shared.history());
    Ok(history)
}

/// Measures by how much a short sleep is too long, and calls `longest` with each new longest time:
/// meanwhile this thread, or the whole program, did not run.
async fn watch_for_stalls(clock: Clock, longest: impl Fn(Stall)) {
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
    while shared.pool().living.len() < shared.settings.keys.max(1) {
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[tokio::test]
    async fn a_thread_that_is_held_up_is_noticed() {
        let noticed = Arc::new(Mutex::new(Stall::default()));
        let longest = noticed.clone();
        let mut watching = JoinSet::new();
        watching.spawn(watch_for_stalls(Clock::default(), move |new| {
            *longest.lock().unwrap() = new;
        }));
        sleep(TICK * 2).await;
        let (begun, held_up) = (Instant::now(), Duration::from_millis(200));
        while begun.elapsed() < held_up {
            std::hint::spin_loop();
        }
        sleep(TICK * 2).await;
        let noticed = Duration::from_nanos(noticed.lock().unwrap().length as u64);
        assert!(noticed >= held_up - TICK, "{noticed:?}");
    }
}
