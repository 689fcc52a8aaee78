//! Whether this process is late itself: its timers fire, and its tasks run, when it gets round to them. A
//! node that is late learns nothing of the cache from a command that got no answer in time, so it must
//! not end the epoch of the whole fleet for it.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};

/// How often the watch looks at the clock.
const TICK: Duration = Duration::from_millis(25);
/// A tick later than this is late: an idle machine is on time to a millisecond or two.
const LATE: Duration = Duration::from_millis(25);

/// How often the watch waits for its turn at each tick. A connection that has many answers to hand on
/// takes several.
const TURNS: u32 = 2;

/// Watches the timers and the queue of the runtime it was started in, for as long as it is kept.
pub(crate) struct Lateness {
    started: Instant,
    /// When the last tick was, in microseconds since the start.
    ticked_us: AtomicU64,
    /// When the last late tick was; zero for never.
    late_us: AtomicU64,
}

impl Lateness {
    /// Starts to watch. Must be called within a tokio runtime.
    pub(crate) fn watch() -> Arc<Self> {
        let lateness = Arc::new(Self {
            started: Instant::now(),
            ticked_us: AtomicU64::new(0),
            late_us: AtomicU64::new(0),
        });
        tokio::spawn(tick(Arc::downgrade(&lateness)));
        lateness
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Whether this process was late at any time since `start`, or is now.
    pub(crate) fn since(&self, start: Instant) -> bool {
        let ticked = Duration::from_micros(self.ticked_us.load(Ordering::Relaxed));
        if self.started.elapsed() > ticked + TICK + LATE {
            return true;
        }
        let late = self.late_us.load(Ordering::Relaxed);
        late > 0 && self.started + Duration::from_micros(late) >= start
    }

    /// Whether this process was late within the last `period`.
    pub(crate) fn within(&self, period: Duration) -> bool {
        let now = Instant::now();
        self.since(now.checked_sub(period).unwrap_or(now))
    }
}

/// Waits for one turn behind all tasks that are ready.
async fn turn() {
    let mut waited = false;
    poll_fn(|context| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        // Woken while it runs, a task goes to the end of the queue.
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

async fn tick(lateness: Weak<Lateness>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let due = ticks.tick().await;
        let Some(lateness) = lateness.upgrade() else {
            return;
        };
        // The runtime runs what a timer wakes ahead of the tasks that are ready already, such as those
        // that the cache has answered: whether it keeps up shows in how long they wait for their turn.
        for _ in 0..TURNS {
            turn().await;
        }
        let now = lateness.now_us();
        if due.elapsed() > LATE {
            lateness.late_us.store(now.max(1), Ordering::Relaxed);
        }
        lateness.ticked_us.store(now, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy(period: Duration) {
        let started = std::time::Instant::now();
        while started.elapsed() < period {
            std::hint::spin_loop();
        }
    }

    #[tokio::test]
    async fn a_blocked_runtime_is_late_and_says_so_also_before_the_watch_gets_its_turn() {
        let lateness = Lateness::watch();
        while lateness.ticked_us.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let start = Instant::now();
        busy(Duration::from_millis(200));
        assert!(lateness.since(start), "nobody else has run since");
        tokio::time::sleep(TICK * 2).await;
        assert!(lateness.since(start), "the watch has noted it");
    }

    /// With more tasks that are ready than it can run, a runtime still runs first what a timer wakes. The
    /// watch was on time, while the answers of the cache waited for their turn until they were too late.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_runtime_with_more_tasks_than_it_can_run_is_late() {
        let lateness = Lateness::watch();
        let (stop, stopped) = tokio::sync::watch::channel(false);
        for _ in 0..4000 {
            let stopped = stopped.clone();
            tokio::spawn(async move {
                while !*stopped.borrow() {
                    busy(Duration::from_micros(50));
                    turn().await;
                }
            });
        }
        // A busy machine makes any watch late now and then, so most of its ticks have to be.
        let read = || {
            let relaxed = Ordering::Relaxed;
            (
                lateness.ticked_us.load(relaxed),
                lateness.late_us.load(relaxed),
            )
        };
        let (mut last, mut ticks, mut late) = (read(), 0, 0);
        while ticks < 4 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let now = read();
            ticks += u32::from(now.0 != last.0);
            late += u32::from(now.1 != last.1);
            last = now;
        }
        stop.send_replace(true);
        assert!(late >= 3, "{late} of {ticks}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_runtime_on_time_is_not_late() {
        let lateness = Lateness::watch();
        let start = Instant::now();
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            assert!(!lateness.since(start));
        }
    }
}
