//! Whether the workspace is built as ARCHITECTURE.md draws it: which crate depends on which, and that no two files of a
//! crate need each other.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod imports;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

/// Where the crates are: their files do not import each other in circles, and all of their modules are on the page.
const CRATES: &[&str] = &[
    "crates/writethrough",
    "crates/writethrough-check",
    "crates/writethrough-cli",
    "crates/writethrough-lab",
    "crates/writethrough-protocol",
    "crates/writethrough-service",
    "crates/writethrough-testbed",
    "xtask",
];

/// What one crate depends on, of this workspace.
#[derive(Debug, Default, PartialEq, Eq)]
struct Needs {
    program: BTreeSet<String>,
    tests: BTreeSet<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The rows of the first table after the heading `## Dependencies`.
fn drawn(page: &str) -> BTreeMap<String, Needs> {
    let (_, section) = page.split_once("\n## Dependencies\n").unwrap();
    let rows = section.lines().skip_while(|line| !line.starts_with('|'));
    let rows = rows.take_while(|line| line.starts_with('|')).skip(2);
    // Names of crates stand in backquotes.
    let names = |cell: &str| {
        let quoted = cell.split('`').skip(1).step_by(2);
        quoted.map(str::to_owned).collect::<BTreeSet<_>>()
    };
    rows.map(|row| {
        let cells: Vec<_> = row.trim_matches('|').split('|').collect();
        let [name, program, tests] = cells[..] else {
            panic!("a row has three cells: {row}");
        };
        let needs = Needs {
            program: names(program),
            tests: names(tests),
        };
        (names(name).pop_first().unwrap(), needs)
    })
    .collect()
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// `dev`, `build` or, for what the crate itself is made of, nothing.
    kind: Option<String>,
    /// Whether it comes with a feature only.
    #[serde(default)]
    optional: bool,
}

/// The crates of this workspace, as `cargo metadata` tells them.
fn packages() -> Vec<Package> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let metadata: Metadata = serde_json::from_slice(&output.stdout).unwrap();
    metadata.packages
}

fn needs(packages: &[Package]) -> BTreeMap<String, Needs> {
    let ours: BTreeSet<_> = packages.iter().map(|package| &package.name).collect();
    let needs = |package: &Package| {
        let mut needs = Needs::default();
        for dependency in &package.dependencies {
            // A crate's tests may ask for features of the crate itself.
            if ours.contains(&dependency.name) && dependency.name != package.name {
                let tests = dependency.kind.as_deref() == Some("dev");
                let kind = if tests {
                    &mut needs.tests
                } else {
                    &mut needs.program
                };
                kind.insert(dependency.name.clone());
            }
        }
        (package.name.clone(), needs)
    };
    packages.iter().map(needs).collect()
}

#[test]
fn the_crates_depend_on_each_other_as_the_architecture_page_says() {
    let page = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let (mut built, mut drawn) = (needs(&packages()), drawn(&page));
    // Only those that differ are shown.
    built.retain(|name, needs| drawn.get(name) != Some(needs) || drawn.remove(name).is_none());
    assert_eq!(built, drawn, "left: the manifests, right: ARCHITECTURE.md");
}

#[test]
fn a_dependency_that_is_not_drawn_is_noticed() {
    let page = "# A\n\n## Dependencies\n\nWords.\n\n| crate | depends on | tests |\n|---|---|---|\n\
                | `top` | `base`, by feature `side` | |\n| `base` | | `side` |\n| `side` | | |\n\nMore.\n";
    let package = |name: &str, needs: &[(&str, Option<&str>)]| Package {
        name: name.to_owned(),
        dependencies: needs
            .iter()
            .map(|(name, kind)| Dependency {
                name: (*name).to_owned(),
                kind: kind.map(str::to_owned),
                optional: false,
            })
            .collect(),
    };
    let with = |base: &[(&str, Option<&str>)]| {
        needs(&[
            package("top", &[("base", None), ("side", None), ("serde", None)]),
            package("base", base),
            package("side", &[]),
        ])
    };
    assert_eq!(with(&[("side", Some("dev"))]), drawn(page));
    for other in [&[("side", None)][..], &[("side", Some("build"))], &[]] {
        assert_ne!(with(other), drawn(page), "{other:?}");
    }
}

/// The crates of this workspace that `name` is linked from when all features are off.
fn linked(packages: &[Package], name: &str) -> BTreeSet<String> {
    let mut linked = BTreeSet::from([name.to_owned()]);
    let package = packages.iter().find(|package| package.name == name);
    for dependency in package
        .into_iter()
        .flat_map(|package| &package.dependencies)
    {
        let ours = packages
            .iter()
            .any(|package| package.name == dependency.name);
        if ours && dependency.kind.is_none() && !dependency.optional {
            linked.append(&mut self::linked(packages, &dependency.name));
        }
    }
    linked
}

#[test]
fn a_program_that_only_serves_links_neither_the_judge_nor_a_test_server() {
    let expected = [
        "writethrough",
        "writethrough-cli",
        "writethrough-protocol",
        "writethrough-service",
    ];
    let linked = linked(&packages(), "writethrough-cli");
    assert_eq!(linked, expected.map(str::to_owned).into());
}

#[test]
fn no_two_files_of_a_crate_need_each_other() {
    let mut found = Vec::new();
    for name in CRATES {
        let files = imports::files(&root().join(name).join("src"));
        assert!(!files.is_empty(), "{name} has no files");
        for circle in imports::circles(&files) {
            found.push(format!("{name}: {}", circle.join(" -> ")));
        }
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn every_module_is_on_the_architecture_page() {
    let page = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let mut missing = Vec::new();
    for name in CRATES {
        let heading = format!("\n### `{name}`");
        let (_, section) = page.split_once(&heading).unwrap();
        let section = section.split("\n##").next().unwrap();
        let files = imports::files(&root().join(name).join("src"));
        for module in files.keys().filter_map(|module| module.first()) {
            let named = [format!("`{module}`"), format!("`{module}/")];
            if !named.iter().any(|name| section.contains(name)) {
                missing.push(format!("{name}: {module}"));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}
