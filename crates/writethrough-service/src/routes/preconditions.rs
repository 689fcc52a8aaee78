//! `If-Match` and `If-None-Match` (RFC 9110, section 13). A header that cannot be read is refused: a
//! write whose condition was ignored would overwrite what it was meant to spare.

use axum::http::{HeaderMap, HeaderName, header};

use crate::items::ItemsError;
use crate::problem::{Kind, Problem};
use crate::store::Condition;

const HEADERS: [(HeaderName, &str); 2] = [
    (header::IF_MATCH, "If-Match"),
    (header::IF_NONE_MATCH, "If-None-Match"),
];

/// The entity tags of one header.
#[derive(Debug, PartialEq, Eq)]
enum Tags {
    Any,
    These(Vec<Tag>),
}

#[derive(Debug, PartialEq, Eq)]
struct Tag {
    weak: bool,
    opaque: Vec<u8>,
}

impl Tags {
    /// Reads all lines of a header, which are one list; `None` when there is none.
    fn of(
        headers: &HeaderMap,
        (name, shown): &(HeaderName, &str),
    ) -> Result<Option<Self>, Problem> {
        let lines: Vec<_> = headers
            .get_all(name)
            .iter()
            .map(axum::http::HeaderValue::as_bytes)
            .collect();
        if lines.is_empty() {
            return Ok(None);
        }
        let malformed = || {
            Problem::new(Kind::InvalidParameter)
                .detail(format!(
                    "Send `{shown}` with the ETag of the item as it was read, quotes included."
                ))
                .error(
                    *shown,
                    "must be `*` or entity tags in quotes, such as \"3\"",
                )
        };
        Self::parse(&lines.join(&b","[..]))
            .map(Some)
            .ok_or_else(malformed)
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let is_space = |byte: &u8| matches!(byte, b' ' | b'\t');
        if text.trim_ascii() == b"*" {
            return Some(Self::Any);
        }
        let mut found = Vec::new();
        let mut rest = text;
        loop {
            let next = rest
                .iter()
                .position(|byte| !is_space(byte) && *byte != b',');
            let Some(next) = next else {
                // Empty elements of a list count as nothing (RFC 9110, 5.6.1), so it may be one of nothing.
                return Some(Self::These(found));
            };
            let (weak, quoted) = match rest[next..].strip_prefix(b"W/") {
                Some(quoted) => (true, quoted),
                None => (false, &rest[next..]),
            };
            let quoted = quoted.strip_prefix(b"\"")?;
            let end = quoted.iter().position(|byte| *byte == b'"')?;
            let (opaque, after) = (&quoted[..end], &quoted[end + 1..]);
            if !opaque
                .iter()
                .all(|byte| matches!(byte, 0x21 | 0x23..=0x7e | 0x80..))
            {
                return None;
            }
            found.push(Tag {
                weak,
                opaque: opaque.to_owned(),
            });
            rest = after.trim_ascii_start();
            if !rest.is_empty() && !rest.starts_with(b",") {
                return None;
            }
        }
    }

    /// Strong comparison: a weak tag never matches.
    fn match_strongly(&self, tag: &str) -> bool {
        match self {
            Self::Any => true,
            Self::These(tags) => tags
                .iter()
                .any(|known| !known.weak && known.opaque == tag.as_bytes()),
        }
    }

    /// Weak comparison: only the text counts.
    fn match_weakly(&self, tag: &str) -> bool {
        match self {
            Self::Any => true,
            Self::These(tags) => tags.iter().any(|known| known.opaque == tag.as_bytes()),
        }
    }
}

impl Tag {
    /// The version whose tag has this text. Tags are compared as text, so `"02"` is not version 2.
    fn version(&self) -> Option<i64> {
        let text = std::str::from_utf8(&self.opaque).ok()?;
        let version: i64 = text.parse().ok()?;
        (version.to_string() == text).then_some(version)
    }
}

/// Which version of an item or a part of the list a read wants.
pub(super) struct Wanted {
    only: Option<Tags>,
    known: Option<Tags>,
}

/// What a read sends.
pub(super) enum Send {
    /// The whole answer.
    Whole,
    /// 304: the client has it.
    NotModified,
    /// 412: it is not what the client wants.
    Nothing(Problem),
}

impl Wanted {
    /// Reads the headers of a read.
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let [only, known] = &HEADERS;
        Ok(Self {
            only: Tags::of(headers, only)?,
            known: Tags::of(headers, known)?,
        })
    }

    /// What to send when the current version has this tag.
    pub(super) fn of_version(&self, tag: &str) -> Send {
        if self
            .only
            .as_ref()
            .is_some_and(|only| !only.match_strongly(tag))
        {
            return Send::Nothing(
                Problem::new(Kind::PreconditionFailed)
                    .detail("Read again without `If-Match` to get what there is now.")
                    .error("If-Match", "does not name the current version"),
            );
        }
        match &self.known {
            Some(known) if known.match_weakly(tag) => Send::NotModified,
            _ => Send::Whole,
        }
    }
}

/// Which versions of an item a write accepts: what both headers and the body say must hold.
pub(super) struct Accepted {
    condition: Condition,
    /// Who named a version, and what is wrong when the item has another one.
    named: Vec<(&'static str, String)>,
}

impl Accepted {
    /// Reads the headers of a write.
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let [only, not] = &HEADERS;
        let mut accepted = Self {
            condition: Condition::None,
            named: Vec::new(),
        };
        if let Some(tags) = Tags::of(headers, only)? {
            let condition = match tags {
                Tags::Any => Condition::None,
                Tags::These(tags) => Condition::VersionIn(
                    tags.iter()
                        .filter(|tag| !tag.weak)
                        .filter_map(Tag::version)
                        .collect(),
                ),
            };
            let wrong = "does not name the item's current version";
            accepted.add(condition, "If-Match", wrong.to_owned());
        }
        if let Some(tags) = Tags::of(headers, not)? {
            let condition = match tags {
                // Only an item that is not there would do, and such a write makes none.
                Tags::Any => Condition::VersionIn(Vec::new()),
                Tags::These(tags) => match tags.iter().filter_map(Tag::version).collect() {
                    // Tags that no version has.
                    versions if Vec::is_empty(&versions) => Condition::None,
                    versions => Condition::VersionNotIn(versions),
                },
            };
            let wrong = "is `*`, or names the item's current version; the item is there";
            accepted.add(condition, "If-None-Match", wrong.to_owned());
        }
        Ok(accepted)
    }

    /// The body names the version.
    pub(super) fn only(&mut self, version: i64) {
        let wrong = format!(
            "is {version}, which is not the item's current version; leave it out to replace whatever \
             version there is"
        );
        self.add(Condition::VersionIn(vec![version]), "version", wrong);
    }

    fn add(&mut self, condition: Condition, name: &'static str, wrong: String) {
        let before = std::mem::replace(&mut self.condition, Condition::None);
        self.condition = before.and(condition);
        self.named.push((name, wrong));
    }

    /// The condition for the store.
    pub(super) fn condition(&self) -> Condition {
        self.condition.clone()
    }

    /// The problem of a write that failed.
    pub(super) fn problem(&self, error: ItemsError) -> Problem {
        if !matches!(error, ItemsError::Mismatch) {
            return error.into();
        }
        let problem = Problem::new(Kind::PreconditionFailed);
        match self.named.as_slice() {
            [(name, wrong)] => problem.error(*name, wrong),
            // The store does not say which of them it was.
            several => several.iter().fold(problem, |problem, (name, wrong)| {
                problem.error(*name, format!("this, or another one listed here: {wrong}"))
            }),
        }
    }
}

/// Refuses conditions where none can be kept: what a `POST` makes has no version yet.
pub(super) fn refuse(headers: &HeaderMap) -> Result<(), Problem> {
    match HEADERS.iter().find(|(name, _)| headers.contains_key(name)) {
        None => Ok(()),
        Some((_, shown)) => Err(Problem::new(Kind::InvalidParameter)
            .detail(
                "Nothing was written. A POST always makes a new item, so it takes no condition.",
            )
            .error(*shown, "is not a header of this route; leave it out")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &HeaderName, values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            let value = axum::http::HeaderValue::from_bytes(value.as_bytes()).unwrap();
            headers.append(name.clone(), value);
        }
        headers
    }

    /// Splitting at commas, as it was once done, cuts a tag with a comma in it; trimming takes what is no
    /// white space in HTTP; and a number is not its text.
    #[test]
    fn entity_tags_are_read_by_their_grammar() {
        let read = |text: &str| {
            Tags::parse(text.as_bytes()).map(|tags| match tags {
                Tags::Any => "*".to_owned(),
                Tags::These(tags) => tags
                    .iter()
                    .map(|tag| {
                        let weak = if tag.weak { "W/" } else { "" };
                        format!("{weak}<{}>", String::from_utf8_lossy(&tag.opaque))
                    })
                    .collect(),
            })
        };
        for (text, expected) in [
            ("*", "*"),
            (" *\t", "*"),
            ("\"3\"", "<3>"),
            ("\"\"", "<>"),
            ("W/\"3\"", "W/<3>"),
            ("\"a,b\", W/\"c\"", "<a,b>W/<c>"),
            (",\"3\",,\t\"4\" ,", "<3><4>"),
            ("\"3\",\"4\"", "<3><4>"),
            ("\"W/\"", "<W/>"),
            ("\"ä\"", "<ä>"),
            ("", ""),
            (" ,", ""),
        ] {
            assert_eq!(read(text).as_deref(), Some(expected), "{text}");
        }
        for text in [
            "3",
            "\"3",
            "3\"",
            "'3'",
            "w/\"3\"",
            "W/3",
            "W/ \"3\"",
            "W/*",
            "\"3\" \"4\"",
            "\"3\"\"4\"",
            "\"3\";\"4\"",
            "\"a b\"",
            "\"a\tb\"",
            "*, \"3\"",
            "\"3\", *",
            "**",
            "*,*",
            "\"3\",4",
            "\\\"3\\\"",
            "\"3\"x",
            "\u{a0}\"3\"",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn if_match_compares_strongly_and_takes_lists() {
        let of = |values: &[&str]| {
            Accepted::of(&headers(&header::IF_MATCH, values)).map(|accepted| accepted.condition)
        };
        assert_eq!(of(&[]).unwrap(), Condition::None);
        assert_eq!(of(&["*"]).unwrap(), Condition::None);
        assert_eq!(of(&["\"3\""]).unwrap(), Condition::VersionIn(vec![3]));
        assert_eq!(
            of(&["\"3\", W/\"4\"", "\"5\""]).unwrap(),
            Condition::VersionIn(vec![3, 5])
        );
        for other in [
            "\"abc\"", "\"03\"", "\"+3\"", "\"3.0\"", "\" 3\"", "W/\"3\"",
        ] {
            let accepts = of(&[other]).is_ok_and(|condition| condition.accepts(3));
            assert!(!accepts, "{other}");
        }
        assert!(of(&["3"]).is_err() && of(&["*", "\"3\""]).is_err());
        // A list of nothing has nothing that matches.
        assert!(!of(&[""]).unwrap().accepts(3));
    }

    #[test]
    fn if_none_match_of_a_write_compares_weakly_and_spares_whatever_is_there() {
        let accepts = |values: &[&str]| {
            let accepted = Accepted::of(&headers(&header::IF_NONE_MATCH, values)).unwrap();
            accepted.condition.accepts(3)
        };
        assert!(!accepts(&["*"]) && !accepts(&["\"3\""]) && !accepts(&["W/\"3\""]));
        assert!(!accepts(&["\"2\"", "\"3\""]));
        assert!(accepts(&["\"2\""]) && accepts(&["\"03\""]) && accepts(&[]) && accepts(&[""]));
    }

    #[test]
    fn all_that_is_said_of_versions_must_hold() {
        let of = |only: &str, not: &str, version: Option<i64>| {
            let mut headers = headers(&header::IF_MATCH, &[only]);
            headers.append(header::IF_NONE_MATCH, not.parse().unwrap());
            let mut accepted = Accepted::of(&headers).unwrap();
            version
                .into_iter()
                .for_each(|version| accepted.only(version));
            let errors = accepted.problem(ItemsError::Mismatch);
            let errors = errors.errors_for_tests().len();
            assert_eq!(errors, 2 + usize::from(version.is_some()));
            accepted.condition
        };
        let only = |accepted: &[i64]| Condition::VersionIn(accepted.to_vec());
        assert_eq!(of("\"3\", \"4\"", "\"4\"", None), only(&[3]));
        assert_eq!(of("\"3\", \"4\"", "\"5\"", Some(4)), only(&[4]));
        assert_eq!(of("\"4\"", "\"5\"", Some(3)), only(&[]));
        assert_eq!(of("*", "*", None), only(&[]));
        assert_eq!(of("*", "\"4\"", None), Condition::VersionNotIn(vec![4]));
        assert_eq!(of("*", "\"4\"", Some(4)), only(&[]));
    }

    #[test]
    fn a_read_compares_if_none_match_weakly_and_if_match_strongly() {
        let sends = |name: &HeaderName, values: &[&str]| {
            let wanted = Wanted::of(&headers(name, values)).unwrap();
            match wanted.of_version("3") {
                Send::Whole => 200,
                Send::NotModified => 304,
                Send::Nothing(problem) => problem.kind().status().as_u16(),
            }
        };
        for tags in [&["\"3\""][..], &["W/\"3\""], &["\"2\", \"3\""], &["*"]] {
            assert_eq!(sends(&header::IF_NONE_MATCH, tags), 304, "{tags:?}");
        }
        for tags in [&[][..], &["\"4\""], &["\"03\""]] {
            assert_eq!(sends(&header::IF_NONE_MATCH, tags), 200, "{tags:?}");
        }
        for tags in [&["\"3\""][..], &["\"2\", \"3\""], &["*"], &[]] {
            assert_eq!(sends(&header::IF_MATCH, tags), 200, "{tags:?}");
        }
        for tags in [&["W/\"3\""][..], &["\"4\""], &["\"03\""]] {
            assert_eq!(sends(&header::IF_MATCH, tags), 412, "{tags:?}");
        }
        assert!(Wanted::of(&headers(&header::IF_NONE_MATCH, &["3"])).is_err());
    }
}
