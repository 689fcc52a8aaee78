//! The audit of a cluster: what every node serves, and what Postgres holds.

use std::sync::Arc;

use writethrough_check::{
    audit::{self, Audit, Row, Table},
    client::Target,
    history::History,
};
use writethrough_testbed::Postgres;

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
    audit::audit(history, &targets, async || read_table(postgres).await).await
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read() {
        let (key, read) = row_of("k1|6e7c31|12.05|3").unwrap();
        let row = Row {
            name: "n|1".to_owned(),
            cents: 1_205,
            version: 3,
        };
        assert_eq!((key.as_str(), read), ("k1", row));
        for wrong in ["", "k|6|1.00|1", "k|6e|x|1", "k|6e|1.00|-1", "k|zz|1.00|1"] {
            assert!(row_of(wrong).is_none(), "{wrong}");
        }
    }
}
