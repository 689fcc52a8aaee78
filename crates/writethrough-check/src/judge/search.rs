//! The general test: search for a linearization, one operation after the other.
//!
//! This is the algorithm of Wing and Gong with Lowe's memory of visited (operations done, state)
//! pairs, for the one model that is judged here: a register that is created, updated and deleted,
//! with versions that grow. It is exponential at worst and therefore not used on whole histories,
//! but on the few operations that the fast test accuses, to confirm them and to find the smallest
//! set that is still impossible. Tests compare it with the fast test and with the porcupine-rs
//! crate. That crate is not used here itself because it makes its benchmark harness a dependency
//! (about 80 crates) of whoever uses it, and cannot express an operation that may never happen
//! other than as one that has no effect at the end.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::history::Value;

/// One operation on one item, with what it showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// The item begins to exist with this value and version.
    Create(Value, Option<u64>),
    /// The existing item's value is replaced; the version grows.
    Update(Value, Option<u64>),
    /// The existing item is deleted.
    Delete,
    /// The item exists and has this value.
    Read(Value),
    /// The item does not exist.
    ReadAbsent,
}

/// A [`Call`] and when it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Invocation.
    pub start: i64,
    /// Completion; `i64::MAX` when the outcome is unknown.
    pub end: i64,
    /// The call itself.
    pub call: Call,
    /// It may never have happened.
    pub optional: bool,
}

/// The result of the search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// There is a linearization.
    Linearizable,
    /// There is none.
    Impossible,
    /// The time limit came first.
    OutOfTime,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    /// Nobody among the events creates the item: it may have been created at any time, or never.
    Unknown,
    Before,
    Present(Value, Option<u64>),
    After,
}

impl State {
    fn step(self, call: Call) -> Option<Self> {
        match (self, call) {
            (Self::Before, Call::Create(value, version)) => Some(Self::Present(value, version)),
            (Self::Unknown, Call::Update(value, version)) => Some(Self::Present(value, version)),
            (Self::Present(_, current), Call::Update(value, version)) => {
                let grows = current
                    .zip(version)
                    .is_none_or(|(current, version)| version > current);
                grows.then_some(Self::Present(value, version.or(current)))
            }
            (Self::Unknown | Self::Present(..), Call::Delete) => Some(Self::After),
            (Self::Present(value, _), Call::Read(read)) => (value == read).then_some(self),
            (Self::Unknown | Self::Before | Self::After, Call::ReadAbsent) => Some(self),
            _ => None,
        }
    }
}

/// Searches for a linearization of the events of one item, for at most `limit`.
///
/// Without a create among the events the item was created at some unknown time, if ever, with a
/// value that none of them reads.
#[must_use]
pub fn search(events: &[Event], limit: Duration) -> Answer {
    let mut events = events.to_vec();
    events.sort_by_key(|event| (event.start, event.end));
    let creates = events
        .iter()
        .any(|event| matches!(event.call, Call::Create(..)));
    let initial = if creates {
        State::Before
    } else {
        State::Unknown
    };
    let deadline = Instant::now() + limit;

    let mut done = vec![0_u64; events.len().div_ceil(64)];
    let has = |done: &[u64], at: usize| done[at / 64] >> (at % 64) & 1 == 1;
    let mut seen: HashSet<(Box<[u64]>, State)> = HashSet::new();
    // Each frame: the state before it, and the operation that was chosen in it.
    let mut path: Vec<(State, usize)> = Vec::new();
    let mut state = initial;
    let mut from = 0;
    let mut steps = 0_u64;
    loop {
        steps += 1;
        if steps.is_multiple_of(1024) && Instant::now() > deadline {
            return Answer::OutOfTime;
        }
        let pending = || (0..events.len()).filter(|&at| !has(&done, at));
        let horizon = pending()
            .filter(|&at| !events[at].optional)
            .map(|at| events[at].end)
            .min();
        let Some(horizon) = horizon else {
            return Answer::Linearizable;
        };
        let mut chosen = None;
        for at in pending().skip_while(|&at| at < from) {
            if events[at].start > horizon {
                break;
            }
            let Some(next) = state.step(events[at].call) else {
                continue;
            };
            let mut with = done.clone();
            with[at / 64] |= 1 << (at % 64);
            if seen.insert((with.into_boxed_slice(), next)) {
                chosen = Some((at, next));
                break;
            }
        }
        if let Some((at, next)) = chosen {
            path.push((state, at));
            done[at / 64] |= 1 << (at % 64);
            state = next;
            from = 0;
        } else if let Some((before, at)) = path.pop() {
            done[at / 64] &= !(1 << (at % 64));
            state = before;
            from = at + 1;
        } else {
            return Answer::Impossible;
        }
    }
}

/// The smallest part of impossible events, found by leaving out one after the other, that is still
/// impossible.
///
/// Returns indexes into `events`. A write stays while a read of its value stays, and deletes stay
/// while a read of absence does, because without them the rest would mean something else.
#[must_use]
pub(crate) fn shrink(events: &[Event], limit: Duration) -> Vec<usize> {
    let mut kept: Vec<usize> = (0..events.len()).collect();
    loop {
        let smaller = (0..kept.len()).find_map(|leave| {
            let mut rest = kept.clone();
            let left_out = events[rest.remove(leave)].call;
            let needed = rest.iter().any(|&at| match (left_out, events[at].call) {
                (Call::Create(value, _), Call::Read(read)) => value == read,
                (Call::Update(value, _), Call::Read(read)) => value == read,
                (Call::Delete, Call::ReadAbsent) => true,
                _ => false,
            });
            if needed {
                return None;
            }
            let part: Vec<Event> = rest.iter().map(|&at| events[at]).collect();
            (search(&part, limit) == Answer::Impossible).then_some(rest)
        });
        match smaller {
            Some(smaller) => kept = smaller,
            None => return kept,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    fn event(start: i64, end: i64, call: Call) -> Event {
        Event {
            start,
            end,
            call,
            optional: false,
        }
    }

    #[test]
    fn a_stale_read_is_impossible_and_shrinks_to_three_operations() {
        let (a, b) = (Value(0), Value(1));
        let mut events = vec![
            event(0, 1, Call::Create(a, Some(1))),
            event(2, 3, Call::Read(a)),
            event(4, 5, Call::Update(b, Some(2))),
            event(6, 7, Call::Read(a)),
            event(8, 9, Call::Read(b)),
        ];
        assert_eq!(search(&events, LIMIT), Answer::Impossible);
        assert_eq!(shrink(&events, LIMIT), [0, 2, 3]);
        events.remove(3);
        assert_eq!(search(&events, LIMIT), Answer::Linearizable);
    }

    #[test]
    fn an_optional_write_may_happen_late_or_never() {
        let (a, b) = (Value(0), Value(1));
        let unknown = Event {
            start: 2,
            end: i64::MAX,
            call: Call::Update(b, None),
            optional: true,
        };
        let reads = |values: &[Value]| {
            let mut events = vec![event(0, 1, Call::Create(a, None)), unknown];
            for (at, &value) in (10..).step_by(10).zip(values) {
                events.push(event(at, at + 1, Call::Read(value)));
            }
            search(&events, LIMIT)
        };
        assert_eq!(reads(&[a, a]), Answer::Linearizable);
        assert_eq!(reads(&[a, b]), Answer::Linearizable);
        assert_eq!(reads(&[b, a]), Answer::Impossible);
    }

    #[test]
    fn the_time_limit_is_kept() {
        // Many concurrent writes, and a read of something never written: every subset is visited.
        let mut events: Vec<Event> = (0..40)
            .map(|value| event(0, 100, Call::Update(Value(value), None)))
            .collect();
        events.push(event(0, 100, Call::Read(Value(99))));
        assert_eq!(
            search(&events, Duration::from_millis(50)),
            Answer::OutOfTime
        );
    }
}
