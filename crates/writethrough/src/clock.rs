//! The engine's monotonic clock.

use std::time::Duration;

use writethrough_protocol::Monotonic;

/// The time now. On Linux it goes on while the machine is suspended (`CLOCK_BOOTTIME`): a lease
/// must not look fresh after a night's sleep.
#[cfg(target_os = "linux")]
pub(crate) fn now() -> Monotonic {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Monotonic(Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    ))
}

/// The time now, since the first call.
#[cfg(not(target_os = "linux"))]
pub(crate) fn now() -> Monotonic {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    Monotonic(START.get_or_init(std::time::Instant::now).elapsed())
}

/// The instant at which tokio should wake for `at`; in the past when `at` is.
pub(crate) fn wake_at(at: Monotonic) -> tokio::time::Instant {
    tokio::time::Instant::now() + at.since(now()) + Duration::from_millis(1)
}
