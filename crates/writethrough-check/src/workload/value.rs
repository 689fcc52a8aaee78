//! Values in the service's items, and what its answers say about them.
//!
//! A value is put into an item three times: as its name, in its description and as its price.

use std::borrow::Cow;

use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::client::{Item, ItemsPage};
use crate::history::Window;

/// Returns the value that an item holds, if its three parts belong together; else a text that
/// nobody wrote. Items without `prefix` are not this run's and are taken as they are.
pub(crate) fn value_of<'i>(prefix: &str, item: &'i Item) -> Cow<'i, str> {
    let name = item.name.as_str();
    let whole = !name.starts_with(prefix)
        || (item.description.as_deref() == Some(description_of(name).as_str())
            && item.price.cents() == Some(cents_of(name)));
    if whole {
        return name.into();
    }
    let description = item.description.as_deref().unwrap_or_default();
    format!("{name} mixed with {description:?} and {:?}", item.price).into()
}

/// Returns the creation times strictly between which the page shows all items, see the history
/// format.
pub(crate) fn window_of(page: &ItemsPage, newer: Option<i64>) -> Option<Window> {
    let times: Vec<i64> = page.items.iter().map(created_of).collect::<Option<_>>()?;
    if !times.is_sorted_by(|newer, older| newer >= older) {
        return None;
    }
    match (&page.next_cursor, times.last()) {
        (None, _) => Some((newer, None)),
        (Some(_), Some(&last)) => Some((newer, Some(last))),
        (Some(_), None) => None,
    }
}

/// Returns the item's creation time as the service states it, in nanoseconds.
pub(crate) fn created_of(item: &Item) -> Option<i64> {
    let time = OffsetDateTime::parse(item.created_at.as_deref()?, &Rfc3339).ok()?;
    i64::try_from(time.unix_timestamp_nanos()).ok()
}

fn description_of(value: &str) -> String {
    format!("value {value}")
}

/// Computes a price that depends on all of the value (FNV-1a).
fn cents_of(value: &str) -> i64 {
    let hash = value.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash % 10_000_000) as i64
}

/// Writes the body of a request that puts a value into an item.
pub(crate) fn body_of(value: &str) -> Vec<u8> {
    let cents = cents_of(value);
    let price = cents as f64 / 100.0;
    json!({ "name": value, "description": description_of(value), "price": price })
        .to_string()
        .into_bytes()
}

/// Percent-encodes a cursor for a query.
pub(crate) fn escape(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_promises_what_lies_between_its_edges() {
        let item = |second: u32| -> Item {
            serde_json::from_value(json!({
                "id": "x", "name": "n", "price": 1, "created_at": format!("1970-01-01T00:00:{second:02}Z"),
            }))
            .unwrap()
        };
        let page = |seconds: &[u32], more: bool| ItemsPage {
            items: seconds.iter().copied().map(item).collect(),
            next_cursor: more.then(|| "c".to_owned()),
        };
        const S: i64 = 1_000_000_000;
        assert_eq!(
            window_of(&page(&[9, 5], true), None),
            Some((None, Some(5 * S)))
        );
        assert_eq!(
            window_of(&page(&[4], false), Some(5 * S)),
            Some((Some(5 * S), None))
        );
        assert_eq!(window_of(&page(&[], false), None), Some((None, None)));
        assert_eq!(window_of(&page(&[], true), None), None);
        assert_eq!(window_of(&page(&[5, 9], true), None), None);
    }

    #[test]
    fn cursors_are_escaped() {
        assert_eq!(escape("a+b/c=~"), "a%2Bb%2Fc%3D~");
    }
}
