//! The audit: when all is calm, does every node serve what Postgres holds, and does Postgres hold all that was
//! acknowledged?
//!
//! It is separate from the workload and from the judge: it looks at every item that the history or the table knows, and at
//! nothing else of the run.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use hyper::{Method, StatusCode};
use serde::Serialize;
use tokio::task::JoinSet;
use writethrough_testbed::Postgres;

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

const SELECT: &str =
    "SELECT id, encode(convert_to(name, 'UTF8'), 'hex'), price, version FROM items";

/// Why an audit was not done.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The table could not be read.
    #[error("the table of items could not be read: {0}")]
    Table(writethrough_testbed::Error),
    /// The table says something that it cannot say.
    #[error("the table of items holds {0:?}")]
    Row(String),
    /// An address cannot be used.
    #[error("{0}")]
    Target(String),
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Difference {
    /// The item.
    pub key: String,
    /// Index of the node that serves it differently; none when Postgres itself lacks something.
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
    /// Reads of items, over all nodes.
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

/// One item, as Postgres holds it or a node serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    name: String,
    cents: i64,
    version: u64,
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

type Table = HashMap<String, Row>;

/// Compares every item of the history and of the table, as served by each target, with the table, and the table with
/// every acknowledged write of the history.
///
/// # Errors
///
/// When the table cannot be read.
pub async fn audit(
    history: &History,
    targets: &[String],
    postgres: &Postgres,
) -> Result<Audit, AuditError> {
    let targets: Vec<Arc<Target>> = targets
        .iter()
        .map(|url| Target::parse(url).map(Arc::new))
        .collect::<Result<_, _>>()
        .map_err(AuditError::Target)?;
    let mut table = read_table(postgres).await?;
    let mut open: BTreeSet<String> = (0..history.key_count() as u32)
        .map(|key| history.key_name(crate::history::Key(key)).to_owned())
        .chain(table.keys().cloned())
        .collect();
    let mut audit = Audit {
        items: open.len() as u64,
        ..Audit::default()
    };
    let mut differences = Vec::new();
    for _ in 0..ROUNDS {
        let served = serve_all(&targets, &open).await;
        let again = read_table(postgres).await?;
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

async fn read_table(postgres: &Postgres) -> Result<Table, AuditError> {
    let text = postgres.run(SELECT).await.map_err(AuditError::Table)?;
    text.lines()
        .map(|line| row_of(line).ok_or_else(|| AuditError::Row(line.to_owned())))
        .collect()
}

fn row_of(line: &str) -> Option<(String, Row)> {
    let mut columns = line.split('|');
    let key = columns.next()?.to_owned();
    let hex = columns.next()?;
    let bytes: Option<Vec<u8>> = (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok())
        .collect();
    let row = Row {
        name: String::from_utf8(bytes?).ok()?,
        cents: columns.next()?.replace('.', "").parse().ok()?,
        version: columns.next()?.parse().ok()?,
    };
    Some((key, row))
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
            found: format!("Postgres holds {}", Row::describe(row)),
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
    fn rows_are_read() {
        let (key, read) = row_of("k1|6e7c31|12.05|3").unwrap();
        assert_eq!((key.as_str(), read), ("k1", row("n|1", 3)));
        for wrong in ["", "k|6|1.00|1", "k|6e|x|1", "k|6e|1.00|-1", "k|zz|1.00|1"] {
            assert!(row_of(wrong).is_none(), "{wrong}");
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
