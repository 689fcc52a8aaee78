//! What a write does next, given what it has just learned.

use std::time::Duration;

/// How the database write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Committed.
    Committed,
    /// It had no effect: refused, rolled back or never sent.
    NoEffect,
    /// The guard refused it: the epoch has changed. No effect.
    Fenced,
    /// Unknown: the connection was lost, or the time ran out, after it was sent.
    Unknown,
}

/// The next step once the write was announced, or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterBegin {
    /// Run the guarded database write.
    Write,
    /// Propose the next epoch as bypass, wait until it is active, begin again under it.
    ProposeBypass,
}

/// Decides after `begin`; `placed` tells whether every key of the write has the intent.
#[must_use]
pub fn after_begin(placed: bool) -> AfterBegin {
    if placed {
        AfterBegin::Write
    } else {
        AfterBegin::ProposeBypass
    }
}

/// Whether the end of a committed write may leave its value in the cache. `begun_again` tells that
/// a `begin` of the write got no answer and was sent again on another connection: the first one
/// may then execute after everything else, put the intent back, and let an `end` that was also sent
/// twice take a write long superseded for one that was alone from beginning to end.
#[must_use]
pub fn keeps_value(begun_again: bool) -> bool {
    !begun_again
}

/// The next step once the database write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterWrite {
    /// End the intents with the new values, then acknowledge.
    End,
    /// End the intents without values; what the caller is told does not depend on the cache.
    Withdraw,
    /// End the intents without values and start again under the new epoch.
    Restart,
    /// Leave the intents to lapse and say that the outcome is unknown.
    LeaveIntents,
}

/// Decides after the database write.
#[must_use]
pub fn after_write(outcome: Outcome) -> AfterWrite {
    match outcome {
        Outcome::Committed => AfterWrite::End,
        Outcome::NoEffect => AfterWrite::Withdraw,
        Outcome::Fenced => AfterWrite::Restart,
        Outcome::Unknown => AfterWrite::LeaveIntents,
    }
}

/// The next step once a committed write was ended in the cache, or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterEnd {
    /// Tell the caller that the write is done.
    Acknowledge,
    /// Propose the next epoch as bypass, wait until it is active, then acknowledge.
    ProposeBypass,
}

/// Decides after `end` of a committed write. `announced_for` is the time since the first `begin`
/// was sent: a write that outlived its intents (`intent_lifetime`) was for a while protected by
/// nothing, so its epoch must end too.
#[must_use]
pub fn after_end(ended: bool, announced_for: Duration, intent_lifetime: Duration) -> AfterEnd {
    if ended && announced_for < intent_lifetime {
        AfterEnd::Acknowledge
    } else {
        AfterEnd::ProposeBypass
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_end_or_an_outlived_intent_ends_the_epoch() {
        let ms = Duration::from_millis;
        assert_eq!(after_end(true, ms(10), ms(15)), AfterEnd::Acknowledge);
        assert_eq!(after_end(true, ms(15), ms(15)), AfterEnd::ProposeBypass);
        assert_eq!(after_end(false, ms(10), ms(15)), AfterEnd::ProposeBypass);
    }

    #[test]
    fn an_unknown_outcome_leaves_the_intents() {
        assert_eq!(after_write(Outcome::Unknown), AfterWrite::LeaveIntents);
        assert_eq!(after_write(Outcome::Fenced), AfterWrite::Restart);
        assert_eq!(after_write(Outcome::NoEffect), AfterWrite::Withdraw);
        assert_eq!(after_write(Outcome::Committed), AfterWrite::End);
        assert_eq!(after_begin(false), AfterBegin::ProposeBypass);
        assert_eq!(after_begin(true), AfterBegin::Write);
    }

    #[test]
    fn a_write_begun_again_leaves_no_value() {
        assert!(keeps_value(false));
        assert!(!keeps_value(true));
    }
}
