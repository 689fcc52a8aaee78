//! The settings of a workload.

use std::time::Duration;

use super::mix::Mix;
use crate::time::Clock;

/// The settings of a workload: what to invoke, where, and for how long.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Base addresses of the services.
    pub targets: Vec<String>,
    /// Processes that run at the same time.
    pub processes: u32,
    /// Items that exist at any time, about.
    pub keys: usize,
    /// Stop after this time.
    pub duration: Option<Duration>,
    /// Stop after this many operations.
    pub operations: Option<u64>,
    /// How often each kind of operation is invoked.
    pub mix: Mix,
    /// Operations per second of all processes together; as many as they can when not set.
    pub rate: Option<f64>,
    /// Where the random choices start.
    pub seed: u64,
    /// An operation without an answer after this time has an unknown outcome.
    pub request_timeout: Duration,
    /// The first items must have been created after this time.
    pub wait: Duration,
    /// Types of problems (RFC 9457), by their last part, with which a 503 says that a write was not
    /// made.
    pub not_made: Vec<String>,
    /// Each process uses one target only, in turn, so that a target that does not answer holds up
    /// its own processes and no others. Otherwise every process uses all of them.
    pub pinned: bool,
    /// The clock of the history.
    pub clock: Clock,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            targets: Vec::new(),
            processes: 16,
            keys: 8,
            duration: Some(Duration::from_secs(30)),
            operations: None,
            mix: Mix::default(),
            rate: None,
            seed: 0,
            request_timeout: Duration::from_secs(10),
            wait: Duration::from_secs(10),
            not_made: vec!["unavailable".to_owned(), "overloaded".to_owned()],
            pinned: false,
            clock: Clock::default(),
        }
    }
}
