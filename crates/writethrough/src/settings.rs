//! Settings: plain values with documented defaults. Caches and fences are components, not settings.

use std::time::Duration;

use writethrough_protocol::Timing;

/// The engine's settings.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long a value stays cached, 300 s by default; each entry varies by up to 10 % below it,
    /// so that entries filled together do not expire together.
    pub ttl: Duration,
    /// How long "not found" stays cached, 10 s by default.
    pub negative_ttl: Duration,
    /// How often the epoch row is polled, 200 ms by default; must be well under the lease.
    pub poll: Duration,
    /// The bound of one poll, 500 ms by default; must be under the lease.
    pub poll_timeout: Duration,
    /// Lease, settle and hold-off of the protocol.
    pub timing: Timing,
    /// How long a fill lease lasts when its holder dies, 3 s by default. While its load runs the
    /// holder renews it.
    pub fill_lease: Duration,
    /// How long a process waits for the load of another process before one of its own reads loads
    /// beside it, for all of them, 250 ms by default. A load that takes longer counts as slow.
    pub fill_wait: Duration,
    /// The longest value that is cached, in bytes as its format gives them; 1 MiB by default. A longer one is loaded and served, and not cached ([`crate::Stats::oversized`]). It must
    /// pass between this node and the cache well within the cache's deadline.
    pub max_value_bytes: usize,
    /// The same for a page of a collection, 256 KiB by default.
    pub max_page_bytes: usize,
    /// The bound of one load, and of all waits of one read for loads of others, 6 s by default: the
    /// time for a connection and the database's `statement_timeout`.
    pub load_timeout: Duration,
    /// How many loads may be under way at once in this process, 1024 by default; a read that needs
    /// one more is refused at once ([`crate::ReadError::Overloaded`]).
    pub max_loads: usize,
    /// How many writes of one collection are under way at once in this process, 64 by default, and a
    /// sixteenth as many of one value; others wait for their turn, for 1 s at most
    /// ([`crate::Unavailable::Busy`]). All of them are named in one entry of the cache. Four times the
    /// connections to the store are enough to keep it busy.
    pub max_writers: usize,
    /// How long a write's intent lasts when its writer dies, 15 s by default.
    pub intent: Duration,
    /// The bound of the database write, 5 s by default; the database must enforce the same bound
    /// (`statement_timeout`), and it must be under `intent`.
    pub write_timeout: Duration,
    /// The bound of a whole write with all its waits, 10 s by default.
    pub write_deadline: Duration,
    /// How long a lost cache connection may take to be verified again before the epoch is ended,
    /// 250 ms by default.
    pub reconnect_grace: Duration,
}

impl Settings {
    /// The default of [`Settings::write_timeout`]: what `statement_timeout` of the database must not
    /// exceed.
    pub const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
    /// The default of [`Settings::write_deadline`].
    pub const WRITE_DEADLINE: Duration = Duration::from_secs(10);
}

impl Default for Settings {
    fn default() -> Self {
        let ms = Duration::from_millis;
        Self {
            ttl: ms(300_000),
            negative_ttl: ms(10_000),
            poll: ms(200),
            poll_timeout: ms(500),
            timing: Timing::default(),
            fill_lease: ms(3000),
            fill_wait: ms(250),
            max_value_bytes: 1 << 20,
            max_page_bytes: 256 << 10,
            load_timeout: ms(6000),
            max_loads: 1024,
            max_writers: 64,
            intent: ms(15_000),
            write_timeout: Self::WRITE_TIMEOUT,
            write_deadline: Self::WRITE_DEADLINE,
            reconnect_grace: ms(250),
        }
    }
}

/// The longest value or page that may be allowed: all of them share a connection.
pub(crate) const MAX_BYTES: usize = 16 << 20;

/// The most loads at once: more than any database takes.
const MAX_LOADS: usize = 1_000_000;

/// The most writers of one collection: their intent must be rewritten well within a command's deadline.
const MAX_WRITERS: usize = 1024;

/// A setting that would break the protocol's bounds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("setting `{field}` is wrong: {remedy}")]
#[non_exhaustive]
pub struct InvalidSettings {
    /// The field of [`Settings`].
    pub field: &'static str,
    /// What is allowed.
    pub remedy: String,
}

impl Settings {
    /// Checks that each field is within its bounds, and the relations that the protocol's safety rests
    /// on.
    ///
    /// # Errors
    ///
    /// [`InvalidSettings`] names the first field that is out of bounds.
    pub fn validate(&self) -> Result<(), InvalidSettings> {
        let timing = &self.timing;
        let ms = Duration::from_millis;
        let (minute, day, year) = (ms(60_000), ms(86_400_000), ms(31_536_000_000));
        // What each field may be by itself. The shortest are what timers and servers can keep to; the
        // longest keep every sum of times within what they can count.
        let bounds = [
            ("ttl", self.ttl, ms(100), year),
            ("negative_ttl", self.negative_ttl, ms(100), year),
            ("timing.lease", timing.lease, ms(30), minute),
            ("timing.settle", timing.settle, ms(30), minute * 10),
            ("timing.hold_off", timing.hold_off, ms(0), minute * 10),
            ("poll", self.poll, ms(10), minute),
            ("poll_timeout", self.poll_timeout, ms(10), minute),
            ("fill_lease", self.fill_lease, ms(10), day),
            ("fill_wait", self.fill_wait, ms(0), day),
            ("load_timeout", self.load_timeout, ms(1), day),
            // The stored form of an announcement counts up to a little more than a day.
            ("intent", self.intent, ms(100), day),
            ("write_timeout", self.write_timeout, ms(1), day),
            ("write_deadline", self.write_deadline, ms(1), day),
            ("reconnect_grace", self.reconnect_grace, ms(1), minute),
        ];
        for (field, value, least, most) in bounds {
            if value < least || value > most {
                return Err(InvalidSettings {
                    field,
                    remedy: format!("it must be from {least:?} to {most:?}"),
                });
            }
        }
        let rules = [
            (
                self.poll <= timing.lease / 3,
                "poll",
                "it must be at most a third of the lease",
            ),
            (
                self.poll_timeout < timing.lease,
                "poll_timeout",
                "it must be shorter than the lease",
            ),
            (
                timing.settle >= timing.lease.mul_f64(1.2),
                "timing.settle",
                "it must be at least 1.2 times the lease, for clocks that drift",
            ),
            (
                self.write_timeout <= self.intent / 2,
                "write_timeout",
                "it must be at most half of `intent`",
            ),
            (
                self.write_deadline > self.write_timeout,
                "write_deadline",
                "it must be longer than `write_timeout`",
            ),
            (
                self.fill_lease >= self.fill_wait,
                "fill_lease",
                "it must not be below `fill_wait`",
            ),
            (
                self.load_timeout > self.fill_wait,
                "load_timeout",
                "it must be longer than `fill_wait`",
            ),
            (
                (1..=MAX_BYTES).contains(&self.max_value_bytes),
                "max_value_bytes",
                "it must be from 1 to 16777216",
            ),
            (
                (1..=MAX_BYTES).contains(&self.max_page_bytes),
                "max_page_bytes",
                "it must be from 1 to 16777216",
            ),
            (
                (1..=MAX_LOADS).contains(&self.max_loads),
                "max_loads",
                "it must be from 1 to 1000000",
            ),
            (
                (1..=MAX_WRITERS).contains(&self.max_writers),
                "max_writers",
                "it must be from 1 to 1024",
            ),
        ];
        match rules.into_iter().find(|(holds, ..)| !holds) {
            Some((_, field, remedy)) => Err(InvalidSettings {
                field,
                remedy: remedy.to_owned(),
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_a_short_settle_is_not() {
        assert_eq!(Settings::default().validate(), Ok(()));
        let mut settings = Settings::default();
        settings.timing.settle = settings.timing.lease;
        assert_eq!(settings.validate().unwrap_err().field, "timing.settle");
    }

    type Edit = fn(&mut Settings, Duration);
    type EditNumber = fn(&mut Settings, usize);

    #[test]
    fn every_field_has_bounds() {
        let edits: [(&str, Edit); 14] = [
            ("ttl", |s, d| s.ttl = d),
            ("negative_ttl", |s, d| s.negative_ttl = d),
            ("timing.lease", |s, d| s.timing.lease = d),
            ("timing.settle", |s, d| s.timing.settle = d),
            ("timing.hold_off", |s, d| s.timing.hold_off = d),
            ("poll", |s, d| s.poll = d),
            ("poll_timeout", |s, d| s.poll_timeout = d),
            ("fill_lease", |s, d| s.fill_lease = d),
            ("fill_wait", |s, d| s.fill_wait = d),
            ("load_timeout", |s, d| s.load_timeout = d),
            ("intent", |s, d| s.intent = d),
            ("write_timeout", |s, d| s.write_timeout = d),
            ("write_deadline", |s, d| s.write_deadline = d),
            ("reconnect_grace", |s, d| s.reconnect_grace = d),
        ];
        for (field, edit) in edits {
            for wrong in [Duration::ZERO, Duration::MAX] {
                let may_be_zero = matches!(field, "timing.hold_off" | "fill_wait");
                let mut settings = Settings::default();
                edit(&mut settings, wrong);
                let validated = settings.validate();
                if wrong.is_zero() && may_be_zero {
                    assert_eq!(validated, Ok(()), "{field}");
                } else {
                    let error = validated.unwrap_err();
                    assert_eq!(error.field, field, "{wrong:?}: {error}");
                }
            }
        }
        let edits: [(&str, EditNumber); 4] = [
            ("max_value_bytes", |s, n| s.max_value_bytes = n),
            ("max_page_bytes", |s, n| s.max_page_bytes = n),
            ("max_loads", |s, n| s.max_loads = n),
            ("max_writers", |s, n| s.max_writers = n),
        ];
        for (field, edit) in edits {
            for wrong in [0, usize::MAX] {
                let mut settings = Settings::default();
                edit(&mut settings, wrong);
                assert_eq!(settings.validate().unwrap_err().field, field);
            }
        }
    }
}
