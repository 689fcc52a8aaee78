//! `If-Match` and `If-None-Match` (RFC 9110, section 13).

use axum::http::{HeaderMap, HeaderName, header};

use crate::problem::{Kind, Problem};
use crate::store::Condition;

/// The entity tags of one header.
enum Tags {
    Any,
    These(Vec<Tag>),
}

struct Tag {
    weak: bool,
    opaque: String,
}

/// Reads all lines of a header; `None` when there is none, an error when one is malformed.
fn tags(headers: &HeaderMap, name: &HeaderName) -> Option<Result<Tags, ()>> {
    let mut found = Vec::new();
    let mut present = false;
    for value in headers.get_all(name) {
        present = true;
        let Ok(text) = value.to_str() else {
            return Some(Err(()));
        };
        if text.trim() == "*" {
            return Some(Ok(Tags::Any));
        }
        // No tag of ours contains a comma, so splitting at one cannot cut a tag that matches.
        for part in text
            .split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty())
        {
            let (weak, quoted) = match part.strip_prefix("W/") {
                Some(quoted) => (true, quoted),
                None => (false, part),
            };
            let opaque = quoted
                .strip_prefix('"')
                .and_then(|rest| rest.strip_suffix('"'));
            let Some(opaque) = opaque else {
                return Some(Err(()));
            };
            found.push(Tag {
                weak,
                opaque: opaque.to_owned(),
            });
        }
    }
    present.then_some(Ok(Tags::These(found)))
}

/// Whether the client has this version already. A header that cannot be read is as if it were absent:
/// the client gets the whole answer.
pub(super) fn has_already(headers: &HeaderMap, tag: &str) -> bool {
    match tags(headers, &header::IF_NONE_MATCH) {
        Some(Ok(Tags::Any)) => true,
        Some(Ok(Tags::These(tags))) => tags.iter().any(|known| known.opaque == tag),
        Some(Err(())) | None => false,
    }
}

/// The versions that a write accepts. A weak tag never matches here, and neither does one that this
/// service has never given out.
pub(super) fn condition(headers: &HeaderMap) -> Result<Condition, Problem> {
    match tags(headers, &header::IF_MATCH) {
        None | Some(Ok(Tags::Any)) => Ok(Condition::None),
        Some(Ok(Tags::These(tags))) => Ok(Condition::VersionIn(
            tags.iter()
                .filter(|tag| !tag.weak)
                .filter_map(|tag| tag.opaque.parse().ok())
                .collect(),
        )),
        Some(Err(())) => Err(Problem::new(Kind::InvalidParameter)
            .detail("Send `If-Match` with the ETag of the item as it was read, quotes included.")
            .error(
                "If-Match",
                "must be `*` or entity tags in quotes, such as \"3\"",
            )),
    }
}

/// The condition, and the version that the body names: both must hold.
pub(super) fn and_version(condition: Condition, version: Option<i64>) -> Condition {
    match (condition, version) {
        (condition, None) => condition,
        (Condition::None, Some(version)) => Condition::VersionIn(vec![version]),
        (Condition::VersionIn(mut accepted), Some(version)) => {
            accepted.retain(|known| *known == version);
            Condition::VersionIn(accepted)
        }
    }
}

/// The item's version is not the one that the body names, or not one that `If-Match` names.
pub(super) fn not_version(version: i64) -> Problem {
    Problem::new(Kind::PreconditionFailed).error(
        "version",
        format!(
            "is {version}, which is not the item's current version, or not one of `If-Match`; leave it \
             out to replace whatever version there is"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: HeaderName, values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(name.clone(), value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn if_match_compares_strongly_and_takes_lists() {
        let of = |values: &[&str]| condition(&headers(header::IF_MATCH, values));
        assert_eq!(of(&[]).unwrap(), Condition::None);
        assert_eq!(of(&["*"]).unwrap(), Condition::None);
        assert_eq!(of(&["\"3\""]).unwrap(), Condition::VersionIn(vec![3]));
        assert_eq!(
            of(&["\"3\", W/\"4\"", "\"5\""]).unwrap(),
            Condition::VersionIn(vec![3, 5])
        );
        assert_eq!(of(&["\"abc\""]).unwrap(), Condition::VersionIn(vec![]));
        assert!(of(&["3"]).is_err());
    }

    #[test]
    fn a_version_in_the_body_narrows_if_match() {
        let of = |accepted: &[i64]| Condition::VersionIn(accepted.to_vec());
        assert_eq!(and_version(Condition::None, None), Condition::None);
        assert_eq!(and_version(Condition::None, Some(3)), of(&[3]));
        assert_eq!(and_version(of(&[3, 4]), None), of(&[3, 4]));
        assert_eq!(and_version(of(&[3, 4]), Some(3)), of(&[3]));
        assert_eq!(and_version(of(&[4]), Some(3)), of(&[]));
    }

    #[test]
    fn if_none_match_compares_weakly() {
        let has = |values: &[&str]| has_already(&headers(header::IF_NONE_MATCH, values), "3");
        assert!(has(&["\"3\""]) && has(&["W/\"3\""]) && has(&["\"2\", \"3\""]) && has(&["*"]));
        assert!(!has(&[]) && !has(&["\"4\""]) && !has(&["3"]));
    }
}
