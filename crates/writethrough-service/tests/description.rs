//! The description of the API, as the tools of others read it. `cargo xtask clients` runs those tools; what
//! each has stumbled over is a rule here.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;

use serde_json::{Value, json};
use support::description::Validator;
use support::{Service, config};
use writethrough_service::config::{CacheBackend, Database};
use writethrough_service::item::Price;

async fn descriptions() -> [Value; 2] {
    let service = Service::start(config(Database::Temporary, CacheBackend::InProcess)).await;
    let mut documents = Vec::new();
    for path in ["/openapi.json", "/openapi-3.1.json"] {
        let answer = service.get(path).await;
        assert_eq!(
            (answer.status.as_u16(), answer.header("content-type")),
            (200, "application/json")
        );
        documents.push(answer.json());
    }
    service.running.shutdown().await;
    documents.try_into().unwrap()
}

/// Each object and array in a document, with its place.
fn walk<'a>(value: &'a Value, place: &str, visit: &mut impl FnMut(&str, &'a Value)) {
    visit(place, value);
    match value {
        Value::Object(members) => members
            .iter()
            .for_each(|(name, value)| walk(value, &format!("{place}/{name}"), visit)),
        Value::Array(values) => values
            .iter()
            .enumerate()
            .for_each(|(index, value)| walk(value, &format!("{place}/{index}"), visit)),
        _ => {}
    }
}

fn operations(document: &Value) -> impl Iterator<Item = (String, &Value)> {
    let paths = document["paths"].as_object().unwrap().iter();
    paths.flat_map(|(path, item)| {
        let item = item.as_object().unwrap().iter();
        item.map(move |(method, operation)| (format!("{method} {path}"), operation))
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn every_price_that_the_service_takes_is_one_by_the_published_schema() {
    for document in descriptions().await {
        let mut validator = Validator::new(&document);
        let schemas = ["ItemFields", "ItemReplacement"]
            .map(|name| validator.schema(&format!("#/components/schemas/{name}")));
        let by_schema = |price: &str| {
            let body = format!(r#"{{"name": "x", "price": {price}}}"#);
            let body: Value = serde_json::from_str(&body).unwrap();
            let answers = schemas.map(|schema| validator.validate(&body, schema).is_ok());
            assert_eq!(answers[0], answers[1], "{price}");
            answers[0]
        };
        // All below 100, and some of each size up to the highest.
        let steps = (0..10_000).chain((10_000..9_999_999_999).step_by(99_999_787));
        for cents in steps.chain(9_999_999_900..=9_999_999_999) {
            let price = Price::from_cents(cents).unwrap().to_string();
            assert_eq!(Price::from_number(&price).map(Price::cents), Ok(cents));
            assert!(by_schema(&price), "{price}");
        }
        for price in ["0", "1e2", "12.5e-1", "4.350000"] {
            assert!(
                Price::from_number(price).is_ok() && by_schema(price),
                "{price}"
            );
        }
        for price in ["-0.01", "100000000", "1e400", "\"1\"", "null", "true"] {
            // A number that JSON's reader cannot hold is no price for anybody.
            let readable = serde_json::from_str::<Value>(price).is_ok();
            assert!(Price::from_number(price).is_err(), "{price}");
            assert!(!readable || !by_schema(price), "{price}");
        }
        let price = &document["components"]["schemas"]["Item"]["properties"]["price"];
        assert_eq!(price["type"], "number");
        // `double` would make clients read the exact decimal into a binary float.
        assert_eq!(
            (&price["format"], &price["multipleOf"]),
            (&Value::Null, &Value::Null)
        );
    }
}

/// Texts that a description without patterns let pass and the service refused.
#[tokio::test(flavor = "multi_thread")]
async fn texts_fit_the_published_patterns_when_the_service_takes_them() {
    let service = Service::start(config(Database::Temporary, CacheBackend::InProcess))
        .await
        .cached()
        .await;
    let cursor = |start: &str| start.to_owned() + &"0123456789abcdef".repeat(4)[..48 - start.len()];
    let cursors = [
        "0",
        "02ff",
        "037f",
        "0383ffffffffffff",
        "ff24",
        "ff7f",
        "ffff",
        "04",
        "0390",
        "1",
        "7fff",
        "8000",
        "fe",
        "ff22",
        "00000000F",
        "-",
        "g",
    ];
    let mut cursors: Vec<_> = cursors.map(cursor).to_vec();
    let list = service.get("/items?limit=1").await.json();
    cursors.push(list["next_cursor"].as_str().unwrap().to_owned());
    cursors.extend([
        String::new(),
        cursor("0")[1..].to_owned(),
        cursor("0") + "0",
    ]);
    let names = [
        "a", "", " ", "\t", "a\n", "\n", "a\0b", "\u{1f}", "\u{7e}", "\u{7f}", "\u{80}", "\u{9f}",
        "\u{a0}", "\u{2028}", "\u{feff}", "😀", "a\u{301}",
    ];
    let free_texts = ["", "a\n", "\0", "a\0b", "\u{1}", "\u{7f}", "😀"];
    let tags = [
        "*",
        "\"3\"",
        "W/\"3\"",
        "\"\"",
        "\"a,b\", W/\"c\"",
        "\"3\",\"4\"",
        "\"~\"",
        "\"\u{ff}\"",
        "",
        "3",
        "\"3",
        "3\"",
        "w/\"3\"",
        "\"3\" \"4\"",
        "*, \"3\"",
        "\"a b\"",
        "**",
        "'3'",
        "W/",
    ];
    for document in descriptions().await {
        let list = &document["paths"]["/items"]["get"]["parameters"];
        let list = list.as_array().unwrap();
        let parameter = |name: &str| {
            let index = list.iter().position(|parameter| parameter["name"] == name);
            format!("#/paths/~1items/get/parameters/{}/schema", index.unwrap())
        };
        let mut validator = Validator::new(&document);
        let places = [parameter("cursor"), parameter("If-None-Match")];
        let [cursor, tag] = places.map(|place| validator.schema(&place));
        let item = validator.schema("#/components/schemas/ItemFields");
        let replacement = validator.schema("#/components/schemas/ItemReplacement");
        for text in &cursors {
            let taken = service.get(&format!("/items?cursor={text}")).await.status == 200;
            let fits = validator.validate(&json!(text), cursor).is_ok();
            assert_eq!(taken, fits, "{text}");
        }
        let named = names.map(|name| json!({"name": name, "price": 1}));
        let described = descriptions_of(&free_texts);
        for body in named.into_iter().chain(described) {
            let taken = service.post("/items", &body.to_string()).await.status == 201;
            for schema in [item, replacement] {
                assert_eq!(taken, validator.validate(&body, schema).is_ok(), "{body}");
            }
        }
        for text in tags {
            // One byte each, as they are in a header.
            let bytes: Vec<u8> = text
                .chars()
                .map(|letter| u8::try_from(letter).unwrap())
                .collect();
            let value = reqwest::header::HeaderValue::from_bytes(&bytes).unwrap();
            let answer = reqwest::Client::new()
                .get(service.url("/items"))
                .header("if-none-match", value)
                .send();
            let taken = answer.await.unwrap().status() != 400;
            assert_eq!(
                taken,
                validator.validate(&json!(text), tag).is_ok(),
                "{text}"
            );
        }
    }
    service.running.shutdown().await;
}

fn descriptions_of(texts: &[&str]) -> Vec<Value> {
    let item = |text: &&str| json!({"name": "a", "price": 1, "description": text});
    texts.iter().map(item).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_common_form_keeps_to_openapi_3_0() {
    let [document, newest] = descriptions().await;
    assert_eq!(
        (&document["openapi"], &newest["openapi"]),
        (&json!("3.0.3"), &json!("3.1.0"))
    );
    // All keywords that schemas here use; a new one is looked up in the standard before it joins them.
    let known = [
        "type",
        "format",
        "description",
        "properties",
        "required",
        "items",
        "additionalProperties",
        "enum",
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "pattern",
        "default",
        "nullable",
        "example",
    ];
    fn check(schema: &Value, place: &str, known: &[&str]) {
        let keywords = schema
            .as_object()
            .unwrap_or_else(|| panic!("{place}: {schema}"));
        if keywords.contains_key("$ref") {
            assert_eq!(
                keywords.len(),
                1,
                "beside a reference nothing counts: {place}"
            );
            return;
        }
        assert!(keywords["type"].is_string(), "{place}: {schema}");
        for keyword in keywords.keys() {
            assert!(
                keyword.starts_with("x-") || known.contains(&keyword.as_str()),
                "{place}: {keyword}"
            );
        }
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            check(property, &format!("{place}/{name}"), known);
        }
        for keyword in ["items", "additionalProperties"] {
            if let Some(schema) = keywords
                .get(keyword)
                .filter(|schema| **schema != json!(false))
            {
                check(schema, &format!("{place}/{keyword}"), known);
            }
        }
    }
    let mut checked = 0;
    walk(&document, "", &mut |place, value| {
        if let Some(schema) = value.get("schema") {
            check(schema, place, &known);
            checked += 1;
        }
    });
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        check(schema, name, &known);
    }
    assert!(checked > 30, "{checked}");
    assert!(document["info"]["license"].get("identifier").is_none());
    let description = &document["components"]["schemas"]["Item"]["properties"]["description"];
    assert_eq!(
        (&description["type"], &description["nullable"]),
        (&json!("string"), &json!(true))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_have_the_names_that_clients_call_and_say_what_they_need() {
    for document in descriptions().await {
        let names: Vec<_> = operations(&document)
            .map(|(_, operation)| operation["operationId"].as_str().unwrap())
            .collect();
        let expected = [
            "listItems",
            "createItem",
            "getItem",
            "replaceItem",
            "deleteItem",
            "clearCache",
            "getCacheStats",
            "getHealth",
            "getLiveness",
            "getReadiness",
            "getMetrics",
        ];
        assert_eq!(names.len(), expected.len());
        assert_eq!(names.into_iter().collect::<BTreeSet<_>>(), expected.into());
        for (place, operation) in operations(&document) {
            for text in ["summary", "description"] {
                assert!(
                    operation[text]
                        .as_str()
                        .is_some_and(|text| !text.is_empty()),
                    "{place}"
                );
            }
            let parameters = operation["parameters"].as_array().into_iter().flatten();
            let headers: Vec<_> = parameters
                .filter(|parameter| parameter["in"] == "header")
                .map(|parameter| parameter["name"].as_str().unwrap())
                .collect();
            let expected: &[&str] = match place.as_str() {
                "get /items" | "get /items/{id}" => &["If-None-Match"],
                "put /items/{id}" | "delete /items/{id}" => &["If-Match", "If-None-Match"],
                _ => &[],
            };
            assert_eq!(headers, expected, "{place}");
            for (status, response) in operation["responses"].as_object().unwrap() {
                let headers = response["headers"].as_object().unwrap();
                assert!(headers.contains_key("x-trace-id"), "{place} {status}");
                assert_eq!(
                    headers.contains_key("Retry-After"),
                    status == "503",
                    "{place} {status}"
                );
            }
        }
        let created = &document["paths"]["/items"]["post"]["responses"]["201"]["headers"];
        assert!(created["Location"].is_object() && created["ETag"].is_object());
        let read = &document["paths"]["/items/{id}"]["get"]["responses"]["200"]["headers"];
        assert!(read["ETag"].is_object() && read["Cache-Status"].is_object());
        assert_eq!(document["servers"][0]["url"], "/");
        // Without it the linters ask at each operation whether it needs a credential.
        assert_eq!(document["security"], json!([]));
        let scheme = &document["components"]["securitySchemes"]["adminToken"];
        assert_eq!(
            (&scheme["type"], &scheme["scheme"]),
            (&json!("http"), &json!("bearer"))
        );
        for (place, operation) in operations(&document) {
            let for_operators = ["post /cache/clear", "get /cache/stats", "get /metrics"];
            let (security, refused) = if for_operators.contains(&place.as_str()) {
                (json!([{}, {"adminToken": []}]), true)
            } else {
                (Value::Null, false)
            };
            assert_eq!(operation["security"], security, "{place}");
            for status in ["401", "403"] {
                let described = operation["responses"].get(status).is_some();
                assert_eq!(described, refused, "{place} {status}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_always_sent_is_required_and_answers_are_open_to_new_fields() {
    for document in descriptions().await {
        let requests = ["ItemFields", "ItemReplacement"];
        for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
            let request = requests.contains(&name.as_str());
            let closed = schema["additionalProperties"] == json!(false);
            assert_eq!(closed, request, "{name}");
            let required = |schema: &Value| -> BTreeSet<String> {
                let names = schema["required"].as_array().into_iter().flatten();
                names
                    .map(|name| name.as_str().unwrap().to_owned())
                    .collect()
            };
            if request {
                assert_eq!(
                    required(schema),
                    ["name", "price"].map(str::to_owned).into(),
                    "{name}"
                );
            } else if let Some(properties) = schema["properties"].as_object() {
                let mut sent: BTreeSet<String> = properties.keys().cloned().collect();
                if name == "Problem" {
                    sent.remove("errors");
                }
                assert_eq!(required(schema), sent, "{name}");
            }
        }
        let schemas = &document["components"]["schemas"];
        for (name, words) in [
            ("HealthStatus", &["ok", "degraded", "down"][..]),
            ("DependencyStatus", &["ok", "down"]),
            ("ProbeStatus", &["ok", "starting", "draining"]),
            ("Consistency", &["strict", "textbook", "off"]),
            (
                "CacheMode",
                &[
                    "cached",
                    "bypass",
                    "observing",
                    "unknown",
                    "textbook",
                    "off",
                ],
            ),
            ("CacheBackend", &["redis", "in-process", "none"]),
            ("DatabaseBackend", &["postgres", "embedded"]),
        ] {
            assert_eq!(schemas[name]["enum"], json!(words), "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_reference_leads_somewhere_and_no_text_speaks_of_the_source() {
    for document in descriptions().await {
        let (mut references, mut texts) = (0, 0);
        walk(&document, "", &mut |place, value| {
            if let Some(reference) = value.get("$ref").and_then(Value::as_str) {
                references += 1;
                let target = document.pointer(reference.trim_start_matches('#'));
                assert!(target.is_some(), "{place}: {reference} leads nowhere");
            }
            if let Some(text) = value.as_str() {
                texts += 1;
                for trace in ["::", "[`", "crate", "describes; "] {
                    assert!(!text.contains(trace), "{place}: {text}");
                }
            }
        });
        assert!(references > 50 && texts > 200, "{references} {texts}");
    }
}
