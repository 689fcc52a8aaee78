//! The audit: when all is calm, does every target serve what the database holds, and does the database hold all that was
//! acknowledged?
//!
//! It is separate from the workload and from the judge: it looks at every item that the history or the table knows, and at
//! nothing else of the run. The table is read by the caller, who knows the database.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use hyper::{Method, StatusCode};
use serde::Serialize;
use tokio::task::JoinSet;

use crate::{
    client::{Client, Item, Reply, Target},
    history::{Action, History, Outcome},
};

/// Reads of one node at the same time.
const READERS: usize = 6;
/// How long one read may take.
const READ_BOUND: Duration = Duration::from_secs(10);
/// How often an item is looked at again that changed while it was looked at: a write of unknown outcome may still arrive.
const ROUNDS: usize = 5;
/// Differences that are told; all are counted.
const TOLD: usize = 20;

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Difference {
    /// The item.
    pub key: String,
    /// Index of the target that serves it differently; none when the database itself lacks something.
    pub node: Option<usize>,
    /// What should be.
    pub expected: String,
    /// What is.
    pub found: String,
}

/// What the audit found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Audit {
    /// Items looked at, deleted ones among them.
    pub items: u64,
    /// Reads of items, over all targets.
    pub reads: u64,
    /// Acknowledged writes looked for.
    pub acknowledged_writes: u64,
    /// Acknowledged writes that are neither there nor superseded.
    pub lost_writes: u64,
    /// All differences.
    pub difference_count: u64,
    /// The first of them.
    pub differences: Vec<Difference>,
}

impl Audit {
    /// Whether everything is as it should be.
    #[must_use]
    pub fn agrees(&self) -> bool {
        self.difference_count == 0
    }
}

/// One item, as the database holds it or a target serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its name, which is the value that was written.
    pub name: String,
    /// Its price, in cents.
    pub cents: i64,
    /// Its version.
    pub version: u64,
}

impl Row {
    fn describe(row: Option<&Self>) -> String {
        row.map_or_else(
            || "no such item".to_owned(),
            |row| {
                let (whole, part) = (row.cents / 100, row.cents % 100);
                format!(
                    "{:?} at {whole}.{part:02}, version {}",
                    row.name, row.version
                )
            },
        )
    }
}

/// All items that the database holds, by their keys.
pub type Table = HashMap<String, Row>;

/// Compares every item of the history and of the table, as served by each target, with the table, and the table with
/// every acknowledged write of the history.
///
/// # Errors
///
/// When the table cannot be read: those of `read_table`.
pub async fn audit<E>(
    history: &History,
    targets: &[Arc<Target>],
    read_table: impl AsyncFn() -> Result<Table, E>,
) -> Result<Audit, E> {
    let mut table = read_table().await?;
    let mut open: BTreeSet<String> = history
        .keys()
        .map(|key| history.key_name(key).to_owned())
        .chain(table.keys().cloned())
        .collect();
    let mut audit = Audit {
        items: open.len() as u64,
        ..Audit::default()
    };
    let mut differences = Vec::new();
    for _ in 0..ROUNDS {
        let served = serve_all(targets, &open).await;
        let again = read_table().await?;
        let changed: BTreeSet<String> = open
            .iter()
            .filter(|key| table.get(*key) != again.get(*key))
            .cloned()
            .collect();
        for (key, answers) in &served {
            if changed.contains(key) {
                continue;
            }
            audit.reads += answers.len() as u64;
            for (node, answer) in answers.iter().enumerate() {
                let expected = again.get(key);
                let found = match answer {
                    Ok(found) if found.as_ref() == expected => continue,
                    Ok(found) => Row::describe(found.as_ref()),
                    Err(reason) => reason.clone(),
                };
                differences.push(Difference {
                    key: key.clone(),
                    node: Some(node),
                    expected: Row::describe(expected),
                    found,
                });
            }
        }
        table = again;
        open = changed;
        if open.is_empty() {
            break;
        }
    }
    for key in open {
        differences.push(Difference {
            key,
            node: None,
            expected: "an item that stays as it is when nobody writes".to_owned(),
            found: "it changes all the time".to_owned(),
        });
    }
    let lost = lost_writes(history, &table, &mut audit);
    audit.lost_writes = lost.len() as u64;
    differences.extend(lost);
    audit.difference_count = differences.len() as u64;
    differences.truncate(TOLD);
    audit.differences = differences;
    Ok(audit)
}

type Answer = Result<Option<Row>, String>;

/// Reads every key through every target.
async fn serve_all(
    targets: &[Arc<Target>],
    keys: &BTreeSet<String>,
) -> BTreeMap<String, Vec<Answer>> {
    let keys: Arc<Vec<String>> = Arc::new(keys.iter().cloned().collect());
    let mut readers = JoinSet::new();
    for (node, target) in targets.iter().enumerate() {
        for reader in 0..READERS {
            let mut client = Client::new(Arc::clone(target), READ_BOUND);
            let keys = Arc::clone(&keys);
            readers.spawn(async move {
                let mut answers = Vec::new();
                for key in keys.iter().skip(reader).step_by(READERS) {
                    answers.push((key.clone(), node, serve(&mut client, key).await));
                }
                answers
            });
        }
    }
    let lost: Answer = Err("was not looked at".to_owned());
    let mut served: BTreeMap<String, Vec<Answer>> = keys
        .iter()
        .map(|key| (key.clone(), vec![lost.clone(); targets.len()]))
        .collect();
    while let Some(answers) = readers.join_next().await {
        for (key, node, answer) in answers.unwrap_or_default() {
            if let Some(place) = served.get_mut(&key) {
                place[node] = answer;
            }
        }
    }
    served
}

async fn serve(client: &mut Client, key: &str) -> Answer {
    let path = format!("/items/{key}");
    match client.send(Method::GET, &path, None).await {
        Reply::Answer {
            status: StatusCode::OK,
            body,
            ..
        } => {
            let item: Item = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
            let row = item.price.cents().zip(item.version);
            let (cents, version) = row.ok_or("an item without price or version")?;
            Ok(Some(Row {
                name: item.name,
                cents,
                version,
            }))
        }
        Reply::Answer {
            status: StatusCode::NOT_FOUND,
            ..
        } => Ok(None),
        Reply::Answer { status, .. } => Err(format!("status {status}")),
        Reply::NotSent(reason) | Reply::Lost(reason) => Err(reason),
    }
}

/// Every acknowledged write that the table neither holds nor can have forgotten.
fn lost_writes(history: &History, table: &Table, audit: &mut Audit) -> Vec<Difference> {
    // Items that somebody deleted, or may have deleted.
    let mut deletable: BTreeSet<&str> = BTreeSet::new();
    for operation in history.operations() {
        if operation.action == Action::Delete
            && matches!(operation.outcome, Outcome::Ok | Outcome::Unknown)
            && let Some(key) = operation.key
        {
            deletable.insert(history.key_name(key));
        }
    }
    let mut lost = Vec::new();
    for operation in history.operations() {
        if !operation.action.is_write() || operation.outcome != Outcome::Ok {
            continue;
        }
        audit.acknowledged_writes += 1;
        let Some(key) = operation.key.map(|key| history.key_name(key)) else {
            continue;
        };
        let row = table.get(key);
        let value = operation.value.map(|value| history.value_name(value));
        let what = operation.action.name();
        let expected = match (operation.action, row) {
            (Action::Delete, Some(_)) => "an acknowledged delete".to_owned(),
            (Action::Delete, None) => continue,
            (_, None) if deletable.contains(key) => continue,
            (_, None) => format!("an acknowledged {what} of {value:?}, and nobody deleted it"),
            (_, Some(row)) => match operation.version {
                Some(version) if version > row.version => {
                    format!("an acknowledged {what} of {value:?} as version {version}")
                }
                Some(version) if version == row.version && value != Some(&row.name) => {
                    format!("an acknowledged {what} of {value:?} as version {version}")
                }
                _ => continue,
            },
        };
        lost.push(Difference {
            key: key.to_owned(),
            node: None,
            expected,
            found: format!("the database holds {}", Row::describe(row)),
        });
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Header, Record};

    fn row(name: &str, version: u64) -> Row {
        Row {
            name: name.to_owned(),
            cents: 1_205,
            version,
        }
    }

    #[test]
    fn lost_writes_are_found_and_superseded_ones_are_not_lost() {
        let mut history = History::new(Header::default());
        let mut push = |action, key: &str, value: &str, version, outcome| {
            let record = Record {
                process: 0,
                action,
                key: Some(key.to_owned().into()),
                value: (action != Action::Delete).then(|| value.to_owned().into()),
                version,
                created: None,
                start: 0,
                end: 1,
                outcome,
                status: 200,
                target: 0,
                window: None,
                items: Vec::new(),
            };
            history.push(&record).unwrap();
        };
        use Action::{Create, Delete, Update};
        use Outcome::{Failed, Ok, Unknown};
        push(Create, "kept", "a", Some(1), Ok);
        push(Update, "kept", "b", Some(2), Ok);
        push(Update, "kept", "never", None, Unknown);
        push(Create, "newer", "c", Some(1), Ok);
        push(Create, "deleted", "d", Some(1), Ok);
        push(Delete, "deleted", "", None, Unknown);
        push(Create, "gone", "e", Some(1), Ok);
        push(Delete, "gone", "", None, Failed);
        push(Create, "back", "f", Some(1), Ok);
        push(Delete, "back", "", None, Ok);
        push(Create, "older", "g", Some(1), Ok);
        push(Update, "older", "h", Some(2), Ok);
        push(Create, "other", "i", Some(1), Ok);
        let table: Table = [
            ("kept", row("b", 2)),
            ("newer", row("z", 2)),
            ("back", row("f", 1)),
            ("older", row("g", 1)),
            ("other", row("x", 1)),
        ]
        .map(|(key, row)| (key.to_owned(), row))
        .into();
        let mut audit = Audit::default();
        let lost = lost_writes(&history, &table, &mut audit);
        let keys: Vec<&str> = lost.iter().map(|lost| lost.key.as_str()).collect();
        assert_eq!(keys, ["gone", "back", "older", "other"], "{lost:#?}");
        assert_eq!(audit.acknowledged_writes, 10);
    }
}
