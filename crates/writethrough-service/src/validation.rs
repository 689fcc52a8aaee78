//! Reads a client's JSON into [`ItemFields`], and says of every wrong field what is wrong with it.
//!
//! The service's own fields (`id`, `created_at`, `updated_at`, `version`) may come back in a `PUT`, so
//! that a client can read an item, change it, and send it as it is. `id` must be that of the path and
//! `version` the current one. The times are only looked at, because clients cannot be trusted to keep
//! them: JavaScript's dates have milliseconds, ours have microseconds.
//!
//! Numbers are read from their text, so that no binary float is ever between the client and the
//! price.

use std::fmt;

use serde::Deserializer;
use serde::de::{MapAccess, Visitor};
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::item::{ItemFields, ItemId, Price};
use crate::problem::{FieldError, Kind, Problem};

/// The longest name, in characters.
const NAME_CHARACTERS: usize = 255;

/// The fields that the service sets.
const OWN_FIELDS: [&str; 4] = ["id", "created_at", "updated_at", "version"];

/// What `PUT /items/{id}` takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement {
    /// What the item is to contain.
    pub fields: ItemFields,
    /// The version to replace, if the client names one.
    pub version: Option<i64>,
}

/// Reads the body of `POST /items`.
///
/// # Errors
///
/// A [`Problem`]: malformed JSON, or every field that is wrong.
pub fn item_fields(body: &[u8]) -> Result<ItemFields, Problem> {
    let mut fields = Fields::read(body)?;
    let read = fields.item();
    fields.refuse_the_rest();
    fields.done(read)
}

/// Reads the body of `PUT /items/{id}` for the item `id`.
///
/// # Errors
///
/// A [`Problem`]: malformed JSON, or every field that is wrong.
pub fn replacement(body: &[u8], id: ItemId) -> Result<Replacement, Problem> {
    let mut fields = Fields::read(body)?;
    let read = fields.item();
    fields.given("id", |raw| read_id(raw, id));
    fields.given("created_at", read_time);
    fields.given("updated_at", read_time);
    let version = fields.given("version", read_version);
    fields.refuse_the_rest();
    fields
        .done(read)
        .map(|fields| Replacement { fields, version })
}

fn members(body: &[u8]) -> Result<Vec<(String, &RawValue)>, Problem> {
    let not_json = |detail: String| {
        Problem::new(Kind::MalformedJson).detail(detail).error(
            "body",
            "must be a JSON object with `name`, `price` and, if wanted, `description`",
        )
    };
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(not_json(
            "The body is empty; send a JSON object.".to_owned(),
        ));
    }
    let text = std::str::from_utf8(body)
        .map_err(|_| not_json("The body is not UTF-8; send JSON as UTF-8.".to_owned()))?;
    // Syntax first: a broken document is not blamed on a field.
    let document: &RawValue = serde_json::from_str(text).map_err(|error| {
        not_json(format!(
            "The body is not valid JSON: see line {}, column {}.",
            error.line(),
            error.column()
        ))
    })?;
    if !document.get().starts_with('{') {
        return Err(Problem::new(Kind::Validation)
            .detail("Send one JSON object.")
            .error("body", "must be a JSON object"));
    }
    serde_json::Deserializer::from_str(document.get())
        .deserialize_map(Members)
        .map_err(|_| {
            not_json("The name of a field is not valid text (a lone surrogate).".to_owned())
        })
}

struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Vec<(String, &'de RawValue)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(members)
    }
}

struct Fields<'a> {
    members: Vec<(String, &'a RawValue)>,
    errors: Vec<FieldError>,
}

impl<'a> Fields<'a> {
    fn read(body: &'a [u8]) -> Result<Self, Problem> {
        Ok(Self {
            members: members(body)?,
            errors: Vec::new(),
        })
    }

    /// The fields that the client sets.
    fn item(&mut self) -> Option<ItemFields> {
        let name = self.required("name", read_name);
        let description = self.optional("description", read_description);
        let price = self.required("price", read_price);
        Some(ItemFields {
            name: name?,
            description,
            price: price?,
        })
    }

    fn done(self, read: Option<ItemFields>) -> Result<ItemFields, Problem> {
        match read {
            Some(fields) if self.errors.is_empty() => Ok(fields),
            _ => Err(Problem::new(Kind::Validation)
                .detail("Correct the fields listed under `errors` and send the request again.")
                .errors(self.errors)),
        }
    }

    fn required<T>(&mut self, name: &str, read: fn(&str) -> Result<T, String>) -> Option<T> {
        match self.take(name) {
            Some(raw) if raw == "null" => self.fail(name, "must not be null"),
            Some(raw) => match read(&raw) {
                Ok(value) => Some(value),
                Err(message) => self.fail(name, message),
            },
            None => self.fail(name, "is required"),
        }
    }

    fn optional<T>(&mut self, name: &str, read: fn(&str) -> Result<T, String>) -> Option<T> {
        let raw = self.take(name).filter(|raw| raw != "null")?;
        match read(&raw) {
            Ok(value) => Some(value),
            Err(message) => self.fail(name, message),
        }
    }

    /// A field that may be left out, and may not be null.
    fn given<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let raw = self.take(name)?;
        match read(&raw) {
            Ok(value) => Some(value),
            Err(message) => self.fail(name, message),
        }
    }

    fn take(&mut self, name: &str) -> Option<String> {
        let found: Vec<_> = self
            .members
            .extract_if(.., |(member, _)| member == name)
            .map(|(_, raw)| raw)
            .collect();
        if found.len() > 1 {
            self.errors
                .push(FieldError::new(name, "is given more than once"));
        }
        found.last().map(|raw| raw.get().to_owned())
    }

    fn fail<T>(&mut self, name: &str, message: impl Into<String>) -> Option<T> {
        self.errors.push(FieldError::new(name, message));
        None
    }

    fn refuse_the_rest(&mut self) {
        // A body of 64 KiB can hold thousands of unknown fields; the first few are enough to go on.
        for (name, _) in self.members.drain(..).take(20) {
            let shown: String = name.chars().take(100).collect();
            let message = if OWN_FIELDS.contains(&name.as_str()) {
                "is set by the service; leave it out"
            } else {
                "is not a field of an item"
            };
            self.errors.push(FieldError::new(shown, message));
        }
    }
}

fn read_string(raw: &str) -> Result<String, String> {
    if !raw.starts_with('"') {
        return Err("must be a string".to_owned());
    }
    serde_json::from_str(raw).map_err(|_| "must be valid text (it has a lone surrogate)".to_owned())
}

fn read_name(raw: &str) -> Result<String, String> {
    let name = read_string(raw)?;
    let characters = name.chars().count();
    if characters == 0 || characters > NAME_CHARACTERS {
        return Err(format!(
            "must have 1 to {NAME_CHARACTERS} characters, but has {characters}"
        ));
    }
    if name.contains(char::is_control) {
        return Err("must not contain control characters".to_owned());
    }
    Ok(name)
}

fn read_description(raw: &str) -> Result<String, String> {
    let description = read_string(raw)?;
    if description.contains('\0') {
        return Err("must not contain the NUL character".to_owned());
    }
    Ok(description)
}

fn read_id(raw: &str, id: ItemId) -> Result<(), String> {
    let text = read_string(raw)?;
    if ItemId::parse(&text) == Some(id) {
        Ok(())
    } else {
        Err(format!("must be {id}, as in the path, or left out"))
    }
}

fn read_time(raw: &str) -> Result<(), String> {
    let text = read_string(raw)?;
    OffsetDateTime::parse(&text, &Rfc3339)
        .map(drop)
        .map_err(|_| "must be a time as the service sent it (RFC 3339), or left out".to_owned())
}

fn read_version(raw: &str) -> Result<i64, String> {
    raw.parse()
        .ok()
        .filter(|version| *version >= 1)
        .ok_or_else(|| "must be a whole number from 1, or left out".to_owned())
}

fn read_price(raw: &str) -> Result<Price, String> {
    if !raw.starts_with(|first: char| first == '-' || first.is_ascii_digit()) {
        return Err("must be a number".to_owned());
    }
    Price::from_number(raw).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(body: &str) -> Vec<(String, String)> {
        let problem = item_fields(body.as_bytes()).unwrap_err();
        problem
            .errors_for_tests()
            .iter()
            .map(|e| (e.field.clone(), e.message.clone()))
            .collect()
    }

    #[test]
    fn a_good_body_is_read_as_it_was_sent() {
        let fields = item_fields(
            br#" {"price": 1.25e1, "name": "N\u00e4gel \ud83d\ude00", "description": "a\nb"} "#,
        )
        .unwrap();
        assert_eq!(fields.name, "Nägel 😀");
        assert_eq!(fields.description.as_deref(), Some("a\nb"));
        assert_eq!(fields.price.to_string(), "12.50");
        assert_eq!(
            item_fields(br#"{"name":"a","description":null,"price":0}"#)
                .unwrap()
                .description,
            None
        );
    }

    #[test]
    fn every_wrong_field_is_named_at_once() {
        assert_eq!(
            errors(r#"{"name": 5, "colour": "red", "price": "12"}"#),
            [
                ("name".to_owned(), "must be a string".to_owned()),
                ("price".to_owned(), "must be a number".to_owned()),
                ("colour".to_owned(), "is not a field of an item".to_owned()),
            ]
        );
    }

    #[test]
    fn a_replacement_may_carry_what_the_service_set() {
        let id = ItemId::generate();
        let read = |own: &str| {
            let body = format!(r#"{{"name": "a", "price": 1, {own}}}"#);
            replacement(body.as_bytes(), id).map(|read| read.version)
        };
        let same = format!(r#""id": "{}""#, id.to_string().to_uppercase());
        assert_eq!(read(&same).unwrap(), None);
        assert_eq!(read(r#""version": 7"#).unwrap(), Some(7));
        assert!(read(r#""created_at": "2025-01-02T03:04:05.678+01:00""#).is_ok());
        let other = format!(r#""id": "{}""#, ItemId::generate());
        for wrong in [
            other.as_str(),
            r#""id": 5"#,
            r#""id": null"#,
            r#""version": "7""#,
            r#""version": 7.5"#,
            r#""version": 0"#,
            r#""version": null"#,
            r#""version": 99999999999999999999"#,
            r#""version": 7, "version": 7"#,
            r#""created_at": 5"#,
            r#""created_at": "today""#,
            r#""updated_at": null"#,
        ] {
            let problem = read(wrong).unwrap_err();
            let errors = problem.errors_for_tests();
            assert_eq!(errors.len(), 1, "{wrong}");
            assert!(wrong.contains(&errors[0].field), "{wrong}");
        }
    }

    #[test]
    fn length_is_counted_in_characters() {
        let body = |name: &str| format!(r#"{{"name": "{name}", "price": 1}}"#);
        assert!(item_fields(body(&"ä".repeat(255)).as_bytes()).is_ok());
        assert_eq!(errors(&body(&"a".repeat(256)))[0].0, "name");
        assert_eq!(errors(&body(""))[0].0, "name");
    }

    #[test]
    fn a_field_given_twice_is_refused() {
        let found = errors(r#"{"name": "a", "name": "b", "price": 1}"#);
        assert_eq!(
            found,
            [("name".to_owned(), "is given more than once".to_owned())]
        );
    }
}
