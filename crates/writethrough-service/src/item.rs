//! Items: the values of the domain. No wire format, no SQL, no cache.

use std::fmt;

use rust_decimal::Decimal;
use time::OffsetDateTime;
use uuid::Uuid;

/// Names an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ItemId(Uuid);

impl ItemId {
    /// A new id. Ids grow with time, so that new rows lie together in the index.
    #[must_use]
    pub fn generate() -> Self {
        Self(Uuid::now_v7())
    }

    /// Reads the hyphenated form, in either case.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        // The other forms that `Uuid` reads (braced, URN, without hyphens) would give one item many
        // addresses.
        if text.len() != 36 {
            None
        } else {
            Uuid::try_parse(text).ok().map(Self)
        }
    }

    /// The id as a UUID.
    #[must_use]
    pub fn uuid(self) -> Uuid {
        self.0
    }
}

impl From<Uuid> for ItemId {
    fn from(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

impl fmt::Display for ItemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A price: an exact decimal with two places, 0 to 99999999.99. Never a binary float.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Price(i64);

/// Why a number is not a price.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PriceError {
    /// It has a third decimal that is not zero.
    #[error("must have at most two decimals")]
    TooPrecise,
    /// It is below 0 or above 99999999.99.
    #[error("must be from 0 to 99999999.99")]
    OutOfRange,
    /// It is not a number as JSON writes one.
    #[error("must be a number")]
    NotANumber,
}

impl Price {
    /// The highest price in cents.
    const MOST: i64 = 9_999_999_999;

    /// The price of so many cents.
    ///
    /// # Errors
    ///
    /// [`PriceError::OutOfRange`].
    pub fn from_cents(cents: i64) -> Result<Self, PriceError> {
        if (0..=Self::MOST).contains(&cents) {
            Ok(Self(cents))
        } else {
            Err(PriceError::OutOfRange)
        }
    }

    /// The price in cents.
    #[must_use]
    pub fn cents(self) -> i64 {
        self.0
    }

    /// The price as a decimal with two places.
    #[must_use]
    pub fn decimal(self) -> Decimal {
        Decimal::new(self.0, 2)
    }

    /// The price of a decimal.
    ///
    /// # Errors
    ///
    /// [`PriceError`] when it is not one.
    pub fn from_decimal(decimal: Decimal) -> Result<Self, PriceError> {
        Self::from_number(&decimal.normalize().to_string())
    }

    /// Reads the text of a JSON number, exactly, with whatever exponent: `12.5`, `1.25e1`, `1250E-2`.
    /// Zeros at the end do not count as decimals.
    ///
    /// # Errors
    ///
    /// [`PriceError`] when it is not a price.
    pub fn from_number(text: &str) -> Result<Self, PriceError> {
        let (negative, text) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (mantissa, exponent) = match text.split_once(['e', 'E']) {
            Some((mantissa, exponent)) => (mantissa, parse_exponent(exponent)?),
            None => (text, 0),
        };
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let is_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || !is_digits(whole) || !is_digits(fraction) {
            return Err(PriceError::NotANumber);
        }
        // The number is `digits` times ten to the power of `power`, without zeros at either end.
        let digits = format!("{whole}{fraction}");
        let significant = digits.trim_end_matches('0');
        let dropped = digits.len() - significant.len();
        let power = exponent
            .saturating_sub(fraction.len() as i64)
            .saturating_add(dropped as i64)
            .saturating_add(2);
        let significant = significant.trim_start_matches('0');
        if significant.is_empty() {
            return Ok(Self(0));
        }
        if negative {
            return Err(PriceError::OutOfRange);
        }
        if (significant.len() as i64).saturating_add(power) > 10 {
            return Err(PriceError::OutOfRange);
        }
        if power < 0 {
            return Err(PriceError::TooPrecise);
        }
        let value: i64 = significant.parse().map_err(|_| PriceError::OutOfRange)?;
        let scale = u32::try_from(power).map_err(|_| PriceError::OutOfRange)?;
        Self::from_cents(value.saturating_mul(10_i64.saturating_pow(scale)))
    }
}

/// Reads an exponent; one too long for a number saturates.
fn parse_exponent(text: &str) -> Result<i64, PriceError> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(PriceError::NotANumber);
    }
    Ok(sign
        * digits
            .parse::<i64>()
            .unwrap_or(i64::MAX / 4)
            .min(i64::MAX / 4))
}

impl fmt::Display for Price {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:02}", self.0 / 100, self.0 % 100)
    }
}

/// A point in time to the microsecond, as both stores keep it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The earliest and the latest time that can be written as RFC 3339.
    const RANGE: std::ops::RangeInclusive<i64> = -62_135_596_800_000_000..=253_402_300_799_999_999;

    /// The time so many microseconds after the beginning of 1970, if it can be written.
    #[must_use]
    pub fn from_micros(micros: i64) -> Option<Self> {
        Self::RANGE.contains(&micros).then_some(Self(micros))
    }

    /// Microseconds since the beginning of 1970.
    #[must_use]
    pub fn micros(self) -> i64 {
        self.0
    }

    /// The time as a date and time in UTC.
    #[must_use]
    pub fn date_time(self) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0) * 1000)
            .unwrap_or(OffsetDateTime::UNIX_EPOCH)
    }
}

impl From<OffsetDateTime> for Timestamp {
    fn from(time: OffsetDateTime) -> Self {
        let micros = i64::try_from(time.unix_timestamp_nanos().div_euclid(1000));
        Self(
            micros
                .unwrap_or(0)
                .clamp(*Self::RANGE.start(), *Self::RANGE.end()),
        )
    }
}

impl fmt::Display for Timestamp {
    /// RFC 3339 in UTC, always with six digits, so that the text sorts like the time.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = self.date_time();
        write!(
            f,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
            time.year(),
            u8::from(time.month()),
            time.day(),
            time.hour(),
            time.minute(),
            time.second(),
            time.microsecond()
        )
    }
}

/// What a client writes into an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ItemFields {
    /// 1 to 255 characters, no control characters.
    pub name: String,
    /// Free text, without NUL.
    pub description: Option<String>,
    /// The price.
    pub price: Price,
}

/// An item that is to be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewItem {
    /// The id that it will have.
    pub id: ItemId,
    /// What it contains.
    pub fields: ItemFields,
}

/// An item as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its id.
    pub id: ItemId,
    /// What it contains.
    pub fields: ItemFields,
    /// When it was created, by the store's clock.
    pub created_at: Timestamp,
    /// When it was last written, by the store's clock; never before `created_at`.
    pub updated_at: Timestamp,
    /// 1 at first; one more with every update.
    pub version: i64,
}

/// A place in the list of items, newest first: right after the item of this time and id. The order is
/// total, because ids differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// The item's creation.
    pub created_at: Timestamp,
    /// The item's id.
    pub id: ItemId,
}

impl Cursor {
    /// The place right after this item.
    #[must_use]
    pub fn after(item: &Item) -> Self {
        Self {
            created_at: item.created_at,
            id: item.id,
        }
    }

    /// Reads the text that a list handed out; `None` for any other.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let is_ours = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() != 48 || !text.bytes().all(is_ours) {
            return None;
        }
        let (time, id) = text.split_at(16);
        let micros = u64::from_str_radix(time, 16).ok()?;
        Some(Self {
            created_at: Timestamp::from_micros(micros.cast_signed())?,
            id: ItemId(Uuid::from_u128(u128::from_str_radix(id, 16).ok()?)),
        })
    }
}

impl fmt::Display for Cursor {
    /// Opaque to clients, and safe in a query string.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:016x}{:032x}",
            self.created_at.0.cast_unsigned(),
            self.id.0.as_u128()
        )
    }
}

/// Which part of the list is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRequest {
    /// How many items at most, 1 to 100.
    pub limit: u8,
    /// Where to start; at the newest when there is none.
    pub after: Option<Cursor>,
}

/// A part of the list, newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The items.
    pub items: Vec<Item>,
    /// Where the next part starts, when there is one.
    pub next: Option<Cursor>,
    /// Whether the list can have given out the cursor that it was asked for: it names an item that is
    /// there, or there was none. Anybody can make up others, without end.
    pub cursor_is_known: bool,
}

impl Page {
    /// How many items are to be read for a request: from the cursor's own item on, to know whether it is
    /// there, and one further, to know whether there is more.
    #[must_use]
    pub fn wanted(request: &PageRequest) -> usize {
        usize::from(request.limit) + 1 + usize::from(request.after.is_some())
    }

    /// The page out of so many items.
    #[must_use]
    pub fn from_rows(mut items: Vec<Item>, request: &PageRequest) -> Self {
        let at_first = items.first().map(Cursor::after);
        let named = request.after.is_some() && at_first == request.after;
        if named {
            items.remove(0);
        }
        let limit = usize::from(request.limit);
        let more = items.len() > limit;
        items.truncate(limit);
        let next = if more {
            items.last().map(Cursor::after)
        } else {
            None
        };
        Self {
            items,
            next,
            cursor_is_known: named || request.after.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_exactly_whatever_their_form() {
        for (text, cents) in [
            ("0", 0),
            ("-0", 0),
            ("-0.00e5", 0),
            ("0e999999999999999999999", 0),
            ("12.5", 1250),
            ("12.50000", 1250),
            ("1.25e1", 1250),
            ("1250E-2", 1250),
            ("1e7", 1_000_000_000),
            ("0.01", 1),
            ("1e-2", 1),
            ("0.29", 29),
            ("99999999.99", 9_999_999_999),
            ("9999999999e-2", 9_999_999_999),
            ("0.000001e+6", 100),
        ] {
            assert_eq!(Price::from_number(text), Ok(Price(cents)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_price_says_why() {
        use PriceError::{NotANumber, OutOfRange, TooPrecise};
        for (text, error) in [
            ("100000000", OutOfRange),
            ("99999999.991", TooPrecise),
            ("1e8", OutOfRange),
            ("1e400", OutOfRange),
            ("1e99999999999999999999", OutOfRange),
            ("-0.01", OutOfRange),
            ("0.001", TooPrecise),
            ("1e-3", TooPrecise),
            ("1e-99999999999999999999", TooPrecise),
            ("", NotANumber),
            (".5", NotANumber),
            ("1e", NotANumber),
            ("NaN", NotANumber),
        ] {
            assert_eq!(Price::from_number(text), Err(error), "{text}");
        }
    }

    #[test]
    fn a_price_is_always_written_with_two_places() {
        for (cents, text) in [
            (0, "0.00"),
            (5, "0.05"),
            (1250, "12.50"),
            (9_999_999_999, "99999999.99"),
        ] {
            assert_eq!(Price(cents).to_string(), text);
            assert_eq!(
                Price::from_decimal(Price(cents).decimal()),
                Ok(Price(cents))
            );
        }
    }

    #[test]
    fn cursors_come_back_as_they_were_and_nothing_else_is_one() {
        let cursor = Cursor {
            created_at: Timestamp(1_700_000_000_123_456),
            id: ItemId::generate(),
        };
        assert_eq!(Cursor::parse(&cursor.to_string()), Some(cursor));
        let wrong = "f".repeat(47) + "g";
        let late = "7".repeat(48);
        for text in [
            "",
            "abc",
            &wrong,
            &late,
            &cursor.to_string().to_uppercase(),
            &"é".repeat(24),
        ] {
            assert_eq!(Cursor::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_timestamp_is_written_in_utc_with_six_digits() {
        assert_eq!(Timestamp(0).to_string(), "1970-01-01T00:00:00.000000Z");
        assert_eq!(
            Timestamp(1_700_000_000_100_000).to_string(),
            "2023-11-14T22:13:20.100000Z"
        );
    }
}
