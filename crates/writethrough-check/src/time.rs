//! Time spans in and out, and the clock of a history.
//!
//! Nothing here reads a wall clock.

use std::time::{Duration, Instant};

/// The longest time span that [`parse_duration`] accepts.
const LONGEST_MS: u64 = 366 * 24 * 3_600_000;

/// A clock that counts nanoseconds since it was made; it never goes back.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock {
    /// Returns the nanoseconds since the clock was made.
    #[must_use]
    pub fn now(self) -> i64 {
        i64::try_from(self.0.elapsed().as_nanos()).unwrap_or(i64::MAX)
    }
}

/// Parses a whole number with one of the units ms, s, m and h.
///
/// # Errors
///
/// Says what to write instead.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let ms_per_unit = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("use a whole number and ms, s, m or h, as in 90s".to_owned()),
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(ms_per_unit))
        .filter(|ms| *ms <= LONGEST_MS)
        .map(Duration::from_millis)
        .ok_or_else(|| format!("{number:?} is not a number of a sensible size"))
}

/// Formats a time span for people, with three digits and a unit.
pub(crate) fn duration(ns: i64) -> String {
    let ns = ns.max(0) as f64;
    let (number, unit) = match ns {
        _ if ns < 1e3 => (ns, "ns"),
        _ if ns < 1e6 => (ns / 1e3, "us"),
        _ if ns < 1e9 => (ns / 1e6, "ms"),
        _ => (ns / 1e9, "s"),
    };
    let decimals = match number {
        _ if unit == "ns" || number >= 99.95 => 0,
        _ if number >= 9.995 => 1,
        _ => 2,
    };
    format!("{number:.decimals$} {unit}")
}

/// Converts nanoseconds to milliseconds, rounded to microseconds.
pub(crate) fn millis(ns: i64) -> f64 {
    (ns as f64 / 1_000.0).round() / 1_000.0
}

/// Converts nanoseconds to seconds; a negative span is none.
pub(crate) fn seconds(ns: i64) -> f64 {
    Duration::from_nanos(u64::try_from(ns).unwrap_or(0)).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_parsed() {
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        for wrong in ["", "5", "s", "5 s", "-5s", "99999999999999999999s", "1d"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn durations_have_three_digits() {
        for (ns, text) in [
            (0, "0 ns"),
            (999, "999 ns"),
            (1_500, "1.50 us"),
            (12_345_678, "12.3 ms"),
            (450_000_000, "450 ms"),
            (61_000_000_000, "61.0 s"),
        ] {
            assert_eq!(duration(ns), text);
        }
    }
}
