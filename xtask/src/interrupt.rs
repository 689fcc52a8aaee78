//! Ctrl-C, SIGTERM and SIGHUP: noted here, acted upon by whoever waits.

use std::sync::atomic::{AtomicUsize, Ordering};

static NOTED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn note(_: libc::c_int) {
    NOTED.fetch_add(1, Ordering::Relaxed);
}

/// From here on the signals are noted and no longer end this process.
#[allow(unsafe_code, reason = "a handler that only adds to an atomic")]
pub(crate) fn listen() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only adds to an atomic, which is async-signal-safe.
        unsafe { libc::signal(signal, note as *const () as libc::sighandler_t) };
    }
}

/// How many signals have come: one asks for an orderly end, two for an immediate one.
pub(crate) fn count() -> usize {
    NOTED.load(Ordering::Relaxed)
}
