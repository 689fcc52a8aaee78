//! Holds answers against the service's own description, with a validator of JSON Schema.

use std::collections::BTreeSet;

use boon::{Compiler, SchemaIndex, Schemas};
use reqwest::Method;
use serde_json::Value;

use super::{Answer, ApiClient};

const ADDRESS: &str = "http://description.test/openapi.json";

/// The schemas of a description.
pub(crate) struct Validator {
    compiler: Compiler,
    schemas: Schemas,
}

impl Validator {
    pub(crate) fn new(description: &Value) -> Self {
        let mut compiler = Compiler::new();
        compiler.enable_format_assertions();
        compiler.add_resource(ADDRESS, description.clone()).unwrap();
        Self {
            compiler,
            schemas: Schemas::new(),
        }
    }

    /// The schema that a reference such as `#/components/schemas/Item` leads to.
    pub(crate) fn schema(&mut self, reference: &str) -> SchemaIndex {
        let address = format!("{ADDRESS}{reference}");
        self.compiler
            .compile(&address, &mut self.schemas)
            .unwrap_or_else(|error| panic!("{reference}: {error:#}"))
    }

    pub(crate) fn validate(&self, value: &Value, schema: SchemaIndex) -> Result<(), String> {
        self.schemas
            .validate(value, schema)
            .map_err(|error| format!("{error:#}"))
    }
}

/// Checks all answers that the client has got: each is one that the description promises, with its
/// headers and in its form. Returns the operations that have succeeded, and all that are described.
pub(crate) async fn check_answers(client: &ApiClient) -> (BTreeSet<String>, BTreeSet<String>) {
    let description = client.get("/openapi-3.1.json").await.json();
    let mut validator = Validator::new(&description);
    let paths = description["paths"].as_object().unwrap();
    let mut succeeded = BTreeSet::new();
    for (method, target, answer) in client.seen.lock().unwrap().iter() {
        let path = target.split('?').next().unwrap();
        let Some((pattern, item)) = paths.iter().find(|(pattern, _)| leads_to(pattern, path))
        else {
            continue;
        };
        // A method that is not described is refused, and HEAD has no body.
        let operation = &item[method.as_str().to_lowercase()];
        if operation.is_null() || *method == Method::HEAD {
            continue;
        }
        let shown = format!("{method} {pattern}: {}", answer.status);
        let response = &operation["responses"][answer.status.as_str()];
        assert!(response.is_object(), "{shown} is not described");
        for name in response["headers"].as_object().into_iter().flatten() {
            assert!(
                answer.headers.contains_key(name.0),
                "{shown} has no {}",
                name.0
            );
        }
        check_body(&mut validator, &response["content"], answer, &shown);
        if answer.status.is_success() {
            succeeded.insert(operation["operationId"].as_str().unwrap().to_owned());
        }
    }
    let described = paths
        .values()
        .flat_map(|item| item.as_object().unwrap().values())
        .map(|operation| operation["operationId"].as_str().unwrap().to_owned())
        .collect();
    (succeeded, described)
}

fn check_body(validator: &mut Validator, content: &Value, answer: &Answer, shown: &str) {
    let Some(content) = content.as_object() else {
        assert!(answer.body.is_empty(), "{shown} has a body");
        return;
    };
    let media_type = answer.header("content-type").split(';').next().unwrap();
    let described = content.get(media_type);
    let described = described.unwrap_or_else(|| panic!("{shown} is {media_type}"));
    if let Some(reference) = described["schema"]["$ref"].as_str() {
        let schema = validator.schema(reference);
        validator
            .validate(&answer.json(), schema)
            .unwrap_or_else(|error| panic!("{shown}: {error}\n{}", answer.text()));
    }
}

fn leads_to(pattern: &str, path: &str) -> bool {
    let (pattern, path): (Vec<_>, Vec<_>) =
        (pattern.split('/').collect(), path.split('/').collect());
    let fits = |(pattern, part): (&&str, &&str)| pattern == part || pattern.starts_with('{');
    pattern.len() == path.len() && pattern.iter().zip(&path).all(fits)
}
