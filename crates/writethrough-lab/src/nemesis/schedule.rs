//! The schedule: which fault begins when, and for how long. It follows from its seed and knows nothing of servers.

use std::{fmt, ops::RangeInclusive, str::FromStr, time::Duration};

use super::fault::Fault;

/// How many faults are in force at the same time, at most.
pub const AT_ONCE: usize = 3;

/// The least time between two faults that take hold of the same thing.
const REST: Duration = Duration::from_millis(200);
/// [`Fault::PauseNode`] lasts no longer than this.
pub const LONGEST_PAUSE: Duration = Duration::from_millis(3_900);
/// One-way delays of [`Fault::SlowRedis`], in milliseconds.
const DELAYS_MS: RangeInclusive<u64> = 50..=400;

/// A shortest and a longest time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The shortest.
    pub least: Duration,
    /// The longest.
    pub most: Duration,
}

impl Span {
    /// A span of milliseconds.
    #[must_use]
    pub const fn from_millis(least: u64, most: u64) -> Self {
        Self {
            least: Duration::from_millis(least),
            most: Duration::from_millis(most),
        }
    }

    fn pick(self, random: &mut fastrand::Rng) -> Duration {
        let (least, most) = (nanos(self.least), nanos(self.most));
        Duration::from_nanos(random.i64(least..=most.max(least)).unsigned_abs())
    }
}

impl fmt::Display for Span {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (least, most) = (self.least.as_millis(), self.most.as_millis());
        write!(formatter, "{least}ms..{most}ms")
    }
}

impl FromStr for Span {
    type Err = String;

    /// Parses `500ms..3s`, or one time for both ends.
    fn from_str(text: &str) -> Result<Self, String> {
        let (least, most) = text.split_once("..").unwrap_or((text, text));
        let span = Self {
            least: writethrough_check::time::parse_duration(least)?,
            most: writethrough_check::time::parse_duration(most)?,
        };
        if span.most < span.least || span.most > Duration::from_secs(60) {
            return Err("the second time must be the longer one, and at most 60s".to_owned());
        }
        Ok(span)
    }
}

/// What a schedule is made from.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where the random choices start.
    pub seed: u64,
    /// The kinds to choose from.
    pub faults: Vec<Fault>,
    /// Number of nodes.
    pub nodes: usize,
    /// All faults end before this.
    pub duration: Duration,
    /// How long a fault lasts.
    pub length: Span,
    /// How long the cluster is left alone between one group of faults and the next.
    pub gap: Span,
}

/// Which nodes are told of a new primary at the start of [`Fault::SplitRedis`]; the others are told at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// One node alone.
    First,
    /// All nodes but one.
    Last,
}

impl fmt::Display for Told {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::First => "told first",
            Self::Last => "told last",
        })
    }
}

/// One fault of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// When it begins, in nanoseconds of the history's clock.
    pub at_ns: i64,
    /// What it is.
    pub fault: Fault,
    /// How long it lasts.
    pub length: Duration,
    /// The node that it concerns. [`Fault::SplitRedis`]: the one that is told apart from the others.
    pub node: usize,
    /// [`Fault::SplitRedis`]: when that node is told of the new primary.
    pub told: Told,
    /// [`Fault::SlowRedis`]: the delay of each direction.
    pub delay: Duration,
}

impl Planned {
    /// When it ends, in nanoseconds of the history's clock.
    #[must_use]
    pub fn end_ns(&self) -> i64 {
        self.at_ns + nanos(self.length)
    }

    /// Whether this fault and another one may not be in force at the same time, in a cluster of `nodes` nodes.
    #[must_use]
    pub fn conflicts_with(&self, other: &Self, nodes: usize) -> bool {
        let holds = other.fault.holds(other.node, nodes);
        let own = self.fault.holds(self.node, nodes);
        own.iter().any(|hold| holds.contains(hold))
    }
}

impl fmt::Display for Planned {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.at_ns as f64 / 1e9;
        let length = self.length.as_secs_f64();
        write!(formatter, "{at:8.3} s  {} for {length:.3} s", self.fault)?;
        if self.fault.concerns_one_node() || self.fault == Fault::SplitRedis {
            write!(formatter, ", node {}", self.node)?;
        }
        if self.fault == Fault::SplitRedis {
            write!(formatter, ", {}", self.told)?;
        }
        if self.fault == Fault::SlowRedis {
            write!(formatter, ", {} ms each way", self.delay.as_millis())?;
        }
        Ok(())
    }
}

pub(crate) fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// Makes the schedule of a plan, by start.
///
/// Faults come in groups of one to [`AT_ONCE`]; those of a group overlap, unless they take hold of the same thing: then
/// one follows the other. Kinds are dealt like cards, so each comes up once before any comes up again. The beginning
/// of a schedule does not depend on the duration.
#[must_use]
pub fn schedule(plan: &Plan) -> Vec<Planned> {
    let mut planned: Vec<Planned> = Vec::new();
    if plan.faults.is_empty() || plan.nodes == 0 {
        return planned;
    }
    let mut random = fastrand::Rng::with_seed(plan.seed);
    let mut deck: Vec<Fault> = Vec::new();
    let limit = nanos(plan.duration);
    // A span of zero would never reach the limit.
    let mut quiet_ns = nanos(plan.gap.pick(&mut random)).max(1_000_000);
    while quiet_ns < limit {
        let size = match random.u8(0..20) {
            0..10 => 1,
            10..16 => 2,
            _ => AT_ONCE,
        };
        let begin = quiet_ns;
        let group = planned.len();
        let mut window = 0;
        for place in 0..size {
            if deck.is_empty() {
                deck.clone_from(&plan.faults);
                random.shuffle(&mut deck);
            }
            let Some(fault) = deck.pop() else { break };
            let mut length = plan.length.pick(&mut random);
            if fault == Fault::PauseNode {
                length = length.min(LONGEST_PAUSE);
            }
            let node = random.usize(..plan.nodes);
            let delay = Duration::from_millis(random.u64(DELAYS_MS));
            // Not a number of its own: schedules of known seeds stay as they are.
            let told = match delay.as_millis().is_multiple_of(2) {
                true => Told::Last,
                false => Told::First,
            };
            let later = (window as f64 * random.f64() * 0.9) as i64;
            if place == 0 {
                window = nanos(length);
            }
            let mut one = Planned {
                at_ns: begin + later,
                fault,
                length,
                node,
                told,
                delay,
            };
            // Each round moves it behind one more fault, so this ends.
            while let Some(obstacle) = planned[group..].iter().find(|other| {
                other.conflicts_with(&one, plan.nodes)
                    && one.at_ns < other.end_ns() + nanos(REST)
                    && other.at_ns < one.end_ns() + nanos(REST)
            }) {
                one.at_ns = obstacle.end_ns() + nanos(REST);
            }
            planned.push(one);
            quiet_ns = quiet_ns.max(one.end_ns());
        }
        quiet_ns += nanos(plan.gap.pick(&mut random).max(REST));
    }
    planned.retain(|one| one.end_ns() <= limit);
    planned.sort_by_key(|one| one.at_ns);
    planned
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(seed: u64) -> Plan {
        Plan {
            seed,
            faults: Fault::ALL.to_vec(),
            nodes: 3,
            duration: Duration::from_secs(300),
            length: Span::from_millis(500, 5_000),
            gap: Span::from_millis(300, 2_000),
        }
    }

    #[test]
    fn a_schedule_follows_from_its_seed() {
        assert_eq!(schedule(&plan(1)), schedule(&plan(1)));
        assert_ne!(schedule(&plan(1)), schedule(&plan(2)));
        let short = Plan {
            duration: Duration::from_secs(60),
            ..plan(1)
        };
        let long = schedule(&plan(1));
        for one in schedule(&short) {
            assert!(long.contains(&one), "{one}");
        }
    }

    #[test]
    fn every_kind_appears_and_some_overlap_but_never_too_many() {
        let mut overlaps = 0;
        for seed in 0..50 {
            let planned = schedule(&plan(seed));
            for fault in Fault::ALL {
                assert!(
                    planned.iter().any(|one| one.fault == *fault),
                    "{fault}, seed {seed}"
                );
            }
            for one in &planned {
                let in_force = planned
                    .iter()
                    .filter(|other| other.at_ns <= one.at_ns && one.at_ns < other.end_ns())
                    .count();
                assert!((1..=AT_ONCE).contains(&in_force), "{one}, seed {seed}");
                overlaps += usize::from(in_force > 1);
                assert!(one.node < 3 && one.end_ns() <= 300_000_000_000);
                assert!(one.fault != Fault::PauseNode || one.length <= LONGEST_PAUSE);
            }
        }
        assert!(overlaps > 500, "{overlaps}");
    }

    #[test]
    fn faults_that_take_hold_of_the_same_thing_follow_one_another() {
        for seed in 0..200 {
            let planned = schedule(&plan(seed));
            for (at, one) in planned.iter().enumerate() {
                for other in &planned[at + 1..] {
                    assert!(
                        !one.conflicts_with(other, 3) || other.at_ns >= one.end_ns() + nanos(REST),
                        "seed {seed}: {one} and {other}"
                    );
                }
            }
        }
        // One kind, one node: all of them conflict.
        let same = Plan {
            faults: vec![Fault::KillNode],
            nodes: 1,
            ..plan(3)
        };
        assert!(schedule(&same).len() > 30);
    }

    #[test]
    fn nothing_is_planned_without_kinds_or_time() {
        let none = Plan {
            faults: Vec::new(),
            ..plan(1)
        };
        assert_eq!(schedule(&none), []);
        let short = Plan {
            duration: Duration::from_millis(100),
            ..plan(1)
        };
        assert_eq!(schedule(&short), []);
        let still = Plan {
            length: Span::from_millis(0, 0),
            gap: Span::from_millis(0, 0),
            duration: Duration::from_secs(5),
            ..plan(1)
        };
        assert!(!schedule(&still).is_empty());
    }

    #[test]
    fn spans_are_parsed_and_shown() {
        let span: Span = "500ms..3s".parse().unwrap();
        assert_eq!(span, Span::from_millis(500, 3_000));
        assert_eq!(span.to_string().parse(), Ok(span));
        assert_eq!("2s".parse(), Ok(Span::from_millis(2_000, 2_000)));
        for wrong in ["", "3s..1s", "1s..", "1s..2h"] {
            assert!(wrong.parse::<Span>().is_err(), "{wrong}");
        }
    }
}
