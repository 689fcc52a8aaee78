//! What the dependencies are: their licenses, where they come from, and which are there twice. The rules are those
//! of `deny.toml`, which `cargo deny check` reads too; that tool takes minutes to compile, and its advisories need the
//! internet, so a run of everything cannot rest on it.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail};
use serde::Deserialize;
use spdx::{Expression, LicenseItem, ParseMode};

use crate::{command, root};

/// The rules, as far as they are looked at here.
#[derive(Deserialize)]
struct Rules {
    graph: Graph,
    licenses: Licenses,
    sources: Sources,
    bans: Bans,
}

#[derive(Deserialize)]
struct Graph {
    targets: Vec<String>,
}

#[derive(Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Named>,
    skip: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    /// `NAME` or `NAME@VERSION`.
    #[serde(rename = "crate")]
    name: String,
    reason: String,
}

/// What `cargo metadata` says.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    /// `None` for a crate of this workspace.
    source: Option<String>,
}

/// Checks the dependencies with the commands `cargo metadata` and `cargo tree`. Returns a note and the findings.
pub(crate) fn check(
    mut metadata: Command,
    mut tree: Command,
    deadline: Instant,
) -> anyhow::Result<(String, Vec<String>)> {
    let path = root().join("deny.toml");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("{} cannot be read", path.display()))?;
    let rules: Rules = toml::from_str(&text).context("deny.toml is not as it must be")?;
    metadata.args(["--format-version", "1", "--locked"]);
    for target in &rules.graph.targets {
        metadata.args(["--filter-platform", target]);
    }
    let text = said(metadata, deadline)?;
    // Beside it there may be words on what was downloaded.
    let line = text.lines().find(|line| line.starts_with('{'));
    let line = line.context("cargo metadata says nothing")?;
    let metadata: Metadata =
        serde_json::from_str(line).context("cargo metadata is not understood")?;
    // Of what the lock file knows some is never compiled: it belongs to features that are off.
    tree.args(["--workspace", "--locked", "--prefix", "none"]);
    tree.args(["--format", "{p}", "--edges", "normal,build,dev"]);
    let text = said(tree, deadline)?;
    let compiled: BTreeSet<_> = text.lines().filter_map(compiled).collect();
    let mut packages = metadata.packages;
    packages.retain(|package| compiled.contains(&(&package.name, &package.version)));
    if packages.len() < compiled.len() {
        bail!("cargo tree and cargo metadata do not name the same crates");
    }
    let note = format!("{} crates", packages.len());
    Ok((note, findings(&rules, &packages)))
}

fn said(command: Command, deadline: Instant) -> anyhow::Result<String> {
    let (end, text) = command::output(command, deadline)?;
    if end.ok() {
        Ok(text)
    } else {
        bail!("cargo says: {}\n{text}", end.describe())
    }
}

/// The crate of a line of `cargo tree`: `NAME vVERSION`, and where it is.
fn compiled(line: &str) -> Option<(&str, &str)> {
    let mut words = line.split(' ');
    let name = words.next()?;
    Some((name, words.next()?.strip_prefix('v')?))
}

/// Everything that the rules do not allow, and every rule that nothing needs.
fn findings(rules: &Rules, packages: &[Package]) -> Vec<String> {
    let mut findings = Vec::new();
    let mut used_licenses = BTreeSet::new();
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in packages {
        let Package { name, version, .. } = package;
        let shown = format!("{name} {version}");
        versions.entry(name).or_default().insert(version);
        if let Some(source) = &package.source {
            let allowed = rules.sources.allow_registry.iter();
            let mut allowed = allowed.map(|registry| format!("registry+{registry}"));
            if !allowed.any(|registry| registry == *source) {
                findings.push(format!("{shown} comes from {source}"));
            }
        }
        let license = package.license.as_deref().unwrap_or_default();
        match Expression::parse_mode(license, ParseMode::LAX) {
            Err(_) => findings.push(format!("{shown} has the license {license:?}")),
            Ok(expression) => {
                let allowed = expression.evaluate(|license| {
                    let LicenseItem::Spdx { id, .. } = &license.license else {
                        return false;
                    };
                    // With an exception a license asks for less, never for more.
                    let allowed = rules.licenses.allow.contains(id.name);
                    if allowed {
                        used_licenses.insert(id.name);
                    }
                    allowed
                });
                if !allowed {
                    findings.push(format!("{shown} has the license {license}"));
                }
            }
        }
        if let Some(ban) = rules.bans.deny.iter().find(|ban| ban.name == *name) {
            findings.push(format!("{shown} is banned: {}", ban.reason));
        }
    }
    for license in &rules.licenses.allow {
        if !used_licenses.contains(license.as_str()) {
            findings.push(format!(
                "no dependency has the license {license}: take it out"
            ));
        }
    }
    let mut skipped: BTreeSet<&str> = BTreeSet::new();
    for (name, versions) in versions.iter().filter(|(_, versions)| versions.len() > 1) {
        let left = versions.iter().filter(|version| {
            let named = format!("{name}@{version}");
            let skip = rules.bans.skip.iter().find(|skip| skip.name == named);
            skip.is_none_or(|skip| !skipped.insert(&skip.name))
        });
        if left.count() > 1 {
            let versions: Vec<_> = versions.iter().copied().collect();
            findings.push(format!("{name} is there as {}", versions.join(", ")));
        }
    }
    for skip in &rules.bans.skip {
        if !skipped.contains(skip.name.as_str()) {
            findings.push(format!(
                "{} is not there beside another version ({}): take it out",
                skip.name, skip.reason
            ));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = r#"
        graph.targets = []
        licenses.allow = ["MIT", "Apache-2.0"]
        sources.allow-registry = ["https://r"]
        bans.deny = [{ crate = "bad", reason = "because" }]
        bans.skip = [{ crate = "twice@1.0.0", reason = "old" }]
    "#;

    fn found(change: impl FnOnce(&mut Vec<Package>)) -> Vec<String> {
        let package = |name: &str, version: &str, license: &str| Package {
            name: name.to_owned(),
            version: version.to_owned(),
            license: Some(license.to_owned()),
            source: Some("registry+https://r".to_owned()),
        };
        let mut packages = vec![
            package("one", "1.0.0", "MIT/Apache-2.0"),
            package(
                "twice",
                "1.0.0",
                "Apache-2.0 WITH LLVM-exception OR GPL-3.0",
            ),
            package("twice", "2.0.0", "(MIT AND Apache-2.0)"),
        ];
        packages[0].source = None;
        change(&mut packages);
        findings(&toml::from_str(RULES).unwrap(), &packages)
    }

    #[test]
    fn what_the_rules_allow_is_no_finding() {
        assert_eq!(found(|_| ()), [""; 0]);
    }

    #[test]
    fn each_rule_finds_what_breaks_it() {
        type Change = fn(&mut Vec<Package>);
        let cases: &[(Change, &str)] = &[
            (|p| p[0].license = None, "one 1.0.0 has the license \"\""),
            (
                |p| p[0].license = Some("MIT AND GPL-3.0-only".into()),
                "one 1.0.0 has the license MIT AND GPL-3.0-only",
            ),
            (
                |p| p[0].license = Some("see LICENSE".into()),
                "one 1.0.0 has the license \"see LICENSE\"",
            ),
            (
                |p| p[0].source = Some("git+https://r".into()),
                "one 1.0.0 comes from git+https://r",
            ),
            (
                |p| p[0].source = Some("registry+https://other".into()),
                "one 1.0.0 comes from registry+https://other",
            ),
            (|p| p[0].name = "bad".into(), "bad 1.0.0 is banned: because"),
            (
                |p| p[0].name = "twice".into(),
                // The same version again is the same crate.
                "",
            ),
            (
                |p| {
                    p[0].name = "twice".into();
                    p[0].version = "3.0.0".into();
                },
                "twice is there as 1.0.0, 2.0.0, 3.0.0",
            ),
            (
                |p| p[2].name = "other".into(),
                "twice@1.0.0 is not there beside another version (old): take it out",
            ),
        ];
        for (change, expected) in cases {
            let expected: Vec<_> = [*expected].into_iter().filter(|e| !e.is_empty()).collect();
            assert_eq!(found(*change), expected);
        }
        let unused = found(|packages| {
            for package in packages {
                package.license = Some("MIT".to_owned());
            }
        });
        assert_eq!(
            unused,
            ["no dependency has the license Apache-2.0: take it out"]
        );
    }
}
