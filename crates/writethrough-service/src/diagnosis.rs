//! Says in one line why the service is not well, from what this node knows itself. No I/O.

use writethrough::{Astray, Phase};

use crate::engine::{Consistency, State};

/// How the service is, and why when it is not well.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Diagnosis {
    /// Whether the cache, where there is one, is out of use.
    pub(crate) degraded: bool,
    /// What an operator should know, most urgent first.
    pub(crate) reason: Option<String>,
}

/// Diagnoses a node whose database answers, or not; `state` is `None` until it was reached once.
/// `shortage` says why there are fewer connections to it than were asked for.
pub(crate) fn diagnose(
    database: bool,
    state: Option<&State>,
    shortage: Option<String>,
) -> Diagnosis {
    let Some(state) = state else {
        return Diagnosis {
            degraded: true,
            reason: Some("the database has not been reached since the start; see the log".into()),
        };
    };
    let cause = (!database)
        .then(|| "the database does not answer".to_owned())
        .or_else(|| cache_trouble(state));
    let status = &state.status;
    let refused = || {
        let why = status.refused_change.as_ref()?;
        Some(format!("this node cannot change the epoch row: {why}"))
    };
    let slow = || {
        let slow = status.slow_loads?;
        Some(format!(
            "loads from the database are slow: the last slow one took {} ms and ended {} s ago; the \
             reads of one key share one load",
            slow.took.as_millis(),
            slow.ago.as_secs()
        ))
    };
    Diagnosis {
        degraded: cause.is_some() || status.refused_change.is_some(),
        reason: cause.or_else(refused).or(shortage).or_else(slow),
    }
}

/// Why the cache is out of use, where it should be in use.
fn cache_trouble(state: &State) -> Option<String> {
    let status = &state.status;
    if let Some(error) = &status.fence_error {
        return Some(format!("the epoch row cannot be used: {error}"));
    }
    match status.astray {
        Some(Astray::OtherHistory) => {
            return Some(
                "the database has another history than its epoch row: a standby was promoted, or a \
                 backup restored"
                    .into(),
            );
        }
        Some(Astray::WentBack { seen, found }) => {
            return Some(format!(
                "the epoch went back from {seen} to {found}: the database has lost a part of its \
                 history"
            ));
        }
        None => {}
    }
    let out_of_use = match state.consistency {
        Consistency::Off => false,
        Consistency::Textbook => !status.connected,
        Consistency::Strict => !status.connected || status.phase != Phase::Cached,
    };
    if !out_of_use {
        return None;
    }
    let proposed = status.proposed_bypass.as_ref().map(|proposed| {
        format!(
            "; this node ended epoch {} {} s ago: {}",
            proposed.epoch,
            proposed.ago.as_secs(),
            proposed.reason
        )
    });
    let now = if status.connected {
        "the cache is not in use yet: it is used again when every node has been well for 2.25 s"
    } else {
        "there is no verified connection to the cache; the log says why"
    };
    Some(format!("{now}{}", proposed.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use writethrough::{Epoch, ProposedBypass, SlowLoads, Status};

    use super::*;

    fn well() -> State {
        let mut status = Status::default();
        (status.phase, status.connected) = (Phase::Cached, true);
        State {
            consistency: Consistency::Strict,
            status,
        }
    }

    #[test]
    fn a_node_that_is_well_has_nothing_to_say() {
        let diagnosis = diagnose(true, Some(&well()), None);
        assert_eq!((diagnosis.degraded, diagnosis.reason), (false, None));
        let short = diagnose(true, Some(&well()), Some("3 of 16".into()));
        assert_eq!(
            (short.degraded, short.reason),
            (false, Some("3 of 16".into()))
        );
    }

    #[test]
    fn each_trouble_is_named() {
        let bypassed = ProposedBypass {
            epoch: Epoch(7),
            reason: "a write could not be announced".into(),
            ago: Duration::from_secs(3),
        };
        let slow = SlowLoads {
            took: Duration::from_millis(812),
            ago: Duration::from_secs(1),
        };
        for (change, degraded, words) in [
            (
                (|s| s.fence_error = Some("no locks".into())) as fn(&mut Status),
                true,
                "no locks",
            ),
            (|s| s.astray = Some(Astray::OtherHistory), true, "history"),
            (|s| s.connected = false, true, "no verified connection"),
            (|s| s.phase = Phase::Bypass, true, "not in use yet"),
            (
                |s| s.refused_change = Some("permission denied".into()),
                true,
                "permission denied",
            ),
        ] {
            let mut state = well();
            change(&mut state.status);
            state.status.proposed_bypass = Some(bypassed.clone());
            let diagnosis = diagnose(true, Some(&state), None);
            let reason = diagnosis.reason.unwrap();
            assert_eq!(diagnosis.degraded, degraded, "{reason}");
            assert!(reason.contains(words), "{reason}");
        }
        let mut state = well();
        state.status.connected = false;
        state.status.proposed_bypass = Some(bypassed);
        let reason = diagnose(true, Some(&state), None).reason.unwrap();
        assert!(reason.contains("ended epoch 7 3 s ago"), "{reason}");
        let mut state = well();
        state.status.slow_loads = Some(slow);
        let diagnosis = diagnose(true, Some(&state), None);
        assert!(!diagnosis.degraded, "the cache is in use");
        assert!(diagnosis.reason.unwrap().contains("812 ms"));
        assert!(diagnose(false, Some(&well()), None).degraded);
        assert!(diagnose(false, None, None).reason.is_some());
    }

    #[test]
    fn a_mode_without_epochs_is_judged_by_its_connection() {
        let mut state = well();
        (state.consistency, state.status.phase) = (Consistency::Textbook, Phase::Unknown);
        assert!(!diagnose(true, Some(&state), None).degraded);
        state.status.connected = false;
        assert!(diagnose(true, Some(&state), None).degraded);
        state.consistency = Consistency::Off;
        assert!(!diagnose(true, Some(&state), None).degraded);
    }
}
