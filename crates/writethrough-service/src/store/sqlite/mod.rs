//! Items in SQLite: one file of one process, for the embedded default.
//!
//! One thread writes, several read (write-ahead log), each with a connection of its own and a bounded
//! queue. Writes that wait together are committed together, and each is answered after the commit.
//! Prices are whole cents and times whole microseconds. A second process on the same file is refused.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::types::FromSql;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, params};
use tokio::sync::oneshot;
use uuid::Uuid;
use writethrough::{Guard, OpError};

use self::lock::FileLock;
use super::left_out::{self, LeftOut, unreadable};
use super::{Condition, ItemStore, PoolUse, Refusal, StoreError, StoreFailure, WriteResult};
use crate::item::{Item, ItemFields, ItemId, NewItem, Page, PageRequest, Price, Timestamp};

pub(crate) mod address;
mod error;
mod lock;

pub use error::OpenError;

/// Threads that read.
const READERS: usize = 2;
/// Requests that wait for one thread; more are refused.
const QUEUE: usize = 256;
/// Writes committed together at most.
const BATCH: usize = 64;
/// The longest wait for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Each migration brings `user_version` from its index to the next.
const MIGRATIONS: &[&str] = &["
    CREATE TABLE items (
        id          BLOB PRIMARY KEY,
        name        TEXT NOT NULL,
        description TEXT,
        price_cents INTEGER NOT NULL CHECK (price_cents BETWEEN 0 AND 9999999999),
        created_us  INTEGER NOT NULL,
        updated_us  INTEGER NOT NULL,
        version     INTEGER NOT NULL DEFAULT 1 CHECK (version > 0)
    ) STRICT, WITHOUT ROWID;

    -- The order of the list, newest first; the id makes it total.
    CREATE INDEX items_newest_first ON items (created_us DESC, id DESC);

    INSERT INTO items (id, name, description, price_cents, created_us, updated_us)
    SELECT column1, column2, column3, column4, now, now FROM (
        VALUES
        (x'550e8400e29b41d4a716446655440001', 'Sample item 1',
         'The first of three rows to try things on.', 1999),
        (x'550e8400e29b41d4a716446655440002', 'Sample item 2', 'The second one.', 2999),
        (x'550e8400e29b41d4a716446655440003', 'Sample item 3', NULL, 3999)
    ), (SELECT CAST(unixepoch('subsec') * 1000 AS INTEGER) * 1000 AS now);
", "
    -- An id is a UUID, and RFC 3339 can write the times. Rows that are there already are left alone,
    -- whatever they hold.
    CREATE TRIGGER items_can_be_read_when_inserted BEFORE INSERT ON items
    WHEN length(NEW.id) <> 16
        OR NEW.created_us NOT BETWEEN -62135596800000000 AND 253402300799999999
        OR NEW.updated_us NOT BETWEEN -62135596800000000 AND 253402300799999999
    BEGIN SELECT RAISE(ABORT, 'the id is not a UUID, or a time is not between the years 1 and 9999'); END;

    CREATE TRIGGER items_can_be_read_when_updated BEFORE UPDATE OF id, created_us, updated_us ON items
    WHEN length(NEW.id) <> 16
        OR NEW.created_us NOT BETWEEN -62135596800000000 AND 253402300799999999
        OR NEW.updated_us NOT BETWEEN -62135596800000000 AND 253402300799999999
    BEGIN SELECT RAISE(ABORT, 'the id is not a UUID, or a time is not between the years 1 and 9999'); END;
"];

macro_rules! columns {
    () => {
        "id, name, description, price_cents, created_us, updated_us, version"
    };
}

const SELECT: &str = concat!("SELECT ", columns!(), " FROM items WHERE id = ?1");

/// Read only as far as it is needed.
const SELECT_NEWEST: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM items ORDER BY created_us DESC, id DESC"
);

const SELECT_AFTER: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM items WHERE (created_us, id) <= (?1, ?2) ORDER BY created_us DESC, id DESC"
);

const INSERT: &str = concat!(
    "INSERT INTO items (id, name, description, price_cents, created_us, updated_us) \
     VALUES (?1, ?2, ?3, ?4, ?5, ?5) RETURNING ",
    columns!()
);

const UPDATE: &str = concat!(
    "UPDATE items SET name = ?2, description = ?3, price_cents = ?4, \
     updated_us = max(?5, updated_us), version = version + 1 WHERE id = ?1 RETURNING ",
    columns!()
);

/// Does a write and says how to answer once it is known whether it was committed.
type WriteJob = Box<dyn FnOnce(&Connection) -> Answer + Send>;
type Answer = Box<dyn FnOnce(Commit) + Send>;
type ReadJob = Box<dyn FnOnce(&Connection) + Send>;

/// What became of the transaction that a write was in.
#[derive(Clone)]
enum Commit {
    Done,
    /// Nothing of it is in the file.
    RolledBack(String),
    /// The commit itself failed.
    Unknown(String),
}

/// Items in SQLite.
pub struct SqliteStore {
    writer: Mutex<Option<SyncSender<WriteJob>>>,
    readers: Mutex<Vec<SyncSender<ReadJob>>>,
    next_reader: AtomicUsize,
    waiting: Arc<AtomicUsize>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    left_out: LeftOut,
}

/// A connection and the right to its file. The order of the fields is the order in which they are
/// dropped: the file is let go by the last thread that had it open.
struct Owned {
    connection: Connection,
    _lock: Option<Arc<FileLock>>,
}

impl SqliteStore {
    /// Opens or makes the file, migrates it and starts the threads.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let lock = Arc::new(FileLock::take(path)?);
        let unusable = |why: String| OpenError::Unusable(path.to_owned(), why);
        let connect = |access: OpenFlags| {
            // A whole path, and no SQLITE_OPEN_URI: SQLite opens what was locked.
            let flags = access | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            Connection::open_with_flags(lock.path(), flags)
                .map_err(|error| unusable(crate::causes::chain(&error)))
        };
        let mut writer = connect(OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        migrate(&mut writer, path)?;
        let mut readers = Vec::new();
        for _ in 0..READERS {
            let reader = connect(OpenFlags::SQLITE_OPEN_READ_ONLY)?;
            sees_items(&reader).map_err(unusable)?;
            readers.push(reader);
        }
        lock.verify()?;
        Self::start(writer, readers, Some(lock))
            .map_err(|error| OpenError::Io(path.to_owned(), error.to_string()))
    }

    /// A database that vanishes with the store.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn temporary() -> Result<Self, OpenError> {
        let path = PathBuf::from(":memory:");
        let unusable = |error: rusqlite::Error| {
            OpenError::Unusable(path.clone(), crate::causes::chain(&error))
        };
        let mut writer = Connection::open_in_memory().map_err(unusable)?;
        migrate(&mut writer, &path)?;
        // A database in memory belongs to one connection, which then reads as well.
        let store = Self::start(writer, Vec::new(), None);
        store.map_err(|error| OpenError::Io(path.clone(), error.to_string()))
    }

    fn start(
        writer: Connection,
        readers: Vec<Connection>,
        lock: Option<Arc<FileLock>>,
    ) -> std::io::Result<Self> {
        let own = |connection| Owned {
            connection,
            _lock: lock.clone(),
        };
        let waiting = Arc::new(AtomicUsize::new(0));
        let mut threads = Vec::new();
        let (write, jobs) = sync_channel(QUEUE);
        threads.push(thread("sqlite-write", {
            let (waiting, writer) = (waiting.clone(), own(writer));
            move || {
                // The whole of it goes into the thread, not the connection alone.
                let writer = writer;
                run_writer(&writer.connection, &jobs, &waiting);
            }
        })?);
        let mut senders = Vec::new();
        for reader in readers {
            let (read, jobs) = sync_channel::<ReadJob>(QUEUE);
            let (waiting, reader) = (waiting.clone(), own(reader));
            threads.push(thread("sqlite-read", move || {
                let reader = reader;
                while let Ok(job) = jobs.recv() {
                    waiting.fetch_sub(1, Ordering::Relaxed);
                    job(&reader.connection);
                }
            })?);
            senders.push(read);
        }
        Ok(Self {
            writer: Mutex::new(Some(write)),
            readers: Mutex::new(senders),
            next_reader: AtomicUsize::new(0),
            waiting,
            threads: Mutex::new(threads),
            left_out: LeftOut::default(),
        })
    }

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let job = move |connection: &Connection| {
            // Whoever asked may have gone.
            let _ = answer.send(work(connection));
        };
        self.send_read(Box::new(job))?;
        match tokio::time::timeout(ANSWER_TIMEOUT, answered).await {
            Ok(Ok(result)) => result.map_err(|error| failed(&error)),
            Ok(Err(_)) => Err(closed()),
            Err(_) => Err(StoreError::new(
                StoreFailure::Overloaded,
                "no answer from SQLite in time",
            )),
        }
    }

    fn send_read(&self, mut job: ReadJob) -> Result<(), StoreError> {
        let readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        if readers.is_empty() {
            drop(readers);
            return self.send_write(Box::new(move |connection| {
                job(connection);
                Box::new(|_| ())
            }));
        }
        let first = self.next_reader.fetch_add(1, Ordering::Relaxed);
        self.waiting.fetch_add(1, Ordering::Relaxed);
        for offset in 0..readers.len() {
            match readers[(first + offset) % readers.len()].try_send(job) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Full(refused) | TrySendError::Disconnected(refused)) => {
                    job = refused;
                }
            }
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        Err(full())
    }

    fn send_write(&self, job: WriteJob) -> Result<(), StoreError> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let writer = writer.as_ref().ok_or_else(closed)?;
        self.waiting.fetch_add(1, Ordering::Relaxed);
        writer.try_send(job).map_err(|refused| {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            match refused {
                TrySendError::Full(_) => full(),
                TrySendError::Disconnected(_) => closed(),
            }
        })
    }

    /// Runs one writing statement. The guard goes along to the writer and is held until the commit.
    async fn write<T: Send + 'static>(
        &self,
        guard: Option<Guard>,
        work: impl FnOnce(&Connection) -> WriteResult<T> + Send + 'static,
    ) -> WriteResult<T> {
        let (answer, answered) = oneshot::channel();
        self.send_write(Box::new(move |connection| {
            let result = work(connection);
            Box::new(move |commit| {
                let result = match (result, commit) {
                    (result, Commit::Done) => result,
                    (Ok(_), Commit::Unknown(why)) => Err(OpError::Unknown(unavailable(why))),
                    // What it found may have been a change of the same commit that failed.
                    (
                        Ok(_) | Err(OpError::Rejected(Refusal::Missing | Refusal::Mismatch)),
                        Commit::RolledBack(why) | Commit::Unknown(why),
                    ) => Err(OpError::Rejected(unavailable(why))),
                    (Err(error), _) => Err(error),
                };
                let _ = answer.send(result);
                drop(guard);
            })
        }))
        .map_err(|error| OpError::Rejected(error.into()))?;
        match tokio::time::timeout(ANSWER_TIMEOUT, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(OpError::Unknown(closed().into())),
            Err(_) => Err(OpError::Unknown(unavailable(
                "no answer from SQLite in time",
            ))),
        }
    }
}

fn unavailable(why: impl Into<String>) -> Refusal {
    StoreError::new(StoreFailure::Unavailable, why).into()
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
}

/// Runs waiting writes in one transaction, commits it, answers them.
fn run_writer(connection: &Connection, jobs: &Receiver<WriteJob>, waiting: &AtomicUsize) {
    while let Ok(first) = jobs.recv() {
        waiting.fetch_sub(1, Ordering::Relaxed);
        let begun = connection.execute_batch("BEGIN IMMEDIATE");
        let mut answers = vec![first(connection)];
        // Outside of a transaction (it could not begin, or an error such as a full disk ended it) a
        // further write would stand on its own.
        while answers.len() < BATCH && !connection.is_autocommit() {
            match jobs.try_recv() {
                Ok(job) => {
                    waiting.fetch_sub(1, Ordering::Relaxed);
                    answers.push(job(connection));
                }
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
        }
        let commit = match begun {
            Err(error) => Commit::Unknown(error.to_string()),
            Ok(()) if connection.is_autocommit() => {
                Commit::RolledBack("SQLite ended the transaction".to_owned())
            }
            Ok(()) => match connection.execute_batch("COMMIT") {
                Ok(()) => Commit::Done,
                Err(error) => {
                    let _ = connection.execute_batch("ROLLBACK");
                    Commit::Unknown(error.to_string())
                }
            },
        };
        for answer in answers {
            answer(commit.clone());
        }
    }
}

/// Checks that a second connection finds the table that the first has made: a database of the
/// connection's own (in memory, or of another name) would take writes that no read finds.
fn sees_items(reader: &Connection) -> Result<(), String> {
    match reader.prepare(SELECT_NEWEST) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!(
            "a second connection does not find the table in it ({error}); name a file on a local disk"
        )),
    }
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), OpenError> {
    let unusable = |why: String| OpenError::Unusable(path.to_owned(), why);
    let run = |connection: &mut Connection| -> rusqlite::Result<Option<i64>> {
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // What was acknowledged survives a loss of power; commits are shared, so it costs little.
        connection.pragma_update(None, "synchronous", "FULL")?;
        let transaction =
            connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let version: i64 =
            transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let known = i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX);
        if version > known {
            return Ok(Some(version));
        }
        for (index, migration) in (0..).zip(MIGRATIONS) {
            if index >= version {
                transaction.execute_batch(migration)?;
            }
        }
        transaction.pragma_update(None, "user_version", known)?;
        transaction.commit()?;
        Ok(None)
    };
    match run(connection) {
        Ok(None) => Ok(()),
        Ok(Some(version)) => Err(unusable(format!(
            "it was written by a newer version of this program (schema {version}, known up to {})",
            MIGRATIONS.len()
        ))),
        Err(error) => Err(unusable(crate::causes::chain(&error))),
    }
}

/// The time now, in microseconds. Shown to people and used to order the list; no decision about what
/// is current rests on it.
#[allow(clippy::disallowed_methods)]
fn now_us() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_micros()).ok())
        .unwrap_or(0)
}

fn failed(error: &rusqlite::Error) -> StoreError {
    use rusqlite::ErrorCode;
    let failure = match error.sqlite_error_code() {
        Some(
            ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::DiskFull
            | ErrorCode::OutOfMemory
            | ErrorCode::CannotOpen
            | ErrorCode::SystemIoFailure
            | ErrorCode::ReadOnly,
        ) => StoreFailure::Unavailable,
        _ => StoreFailure::Internal,
    };
    StoreError::from_source(failure, error)
}

fn full() -> StoreError {
    StoreError::new(
        StoreFailure::Overloaded,
        "too many requests wait for SQLite",
    )
}

fn closed() -> StoreError {
    StoreError::new(StoreFailure::Unavailable, "the store is closed")
}

fn rejected(error: rusqlite::Error) -> OpError<Refusal> {
    OpError::Rejected(failed(&error).into())
}

fn item(row: &Row<'_>) -> Result<Item, StoreError> {
    let id: Vec<u8> = row.get(0).map_err(unreadable)?;
    let id = Uuid::from_slice(&id)
        .map_err(|error| unreadable(format!("column id of {} bytes: {error}", id.len())))?;
    let wrong = |index: usize, error: &dyn std::fmt::Display| {
        let column = row.as_ref().column_name(index).unwrap_or("?");
        unreadable(format!("item {id}, column {column}: {error}"))
    };
    fn column<T: FromSql>(
        row: &Row<'_>,
        index: usize,
        wrong: impl Fn(usize, &dyn std::fmt::Display) -> StoreError,
    ) -> Result<T, StoreError> {
        row.get(index)
            .map_err(|error| wrong(index, &crate::causes::chain(&error)))
    }
    let time = |index| {
        Timestamp::from_micros(column(row, index, wrong)?)
            .ok_or_else(|| wrong(index, &"the time is not between the years 1 and 9999"))
    };
    Ok(Item {
        id: id.into(),
        fields: ItemFields {
            name: column(row, 1, wrong)?,
            description: column(row, 2, wrong)?,
            price: Price::from_cents(column(row, 3, wrong)?).map_err(|error| wrong(3, &error))?,
        },
        created_at: time(4)?,
        updated_at: time(5)?,
        version: column(row, 6, wrong)?,
    })
}

fn key(id: ItemId) -> [u8; 16] {
    *id.uuid().as_bytes()
}

/// The item, or why its row cannot be read.
fn stored(
    connection: &Connection,
    id: ItemId,
) -> rusqlite::Result<Option<Result<Item, StoreError>>> {
    connection
        .prepare_cached(SELECT)?
        .query_row([key(id)], |row| Ok(item(row)))
        .optional()
}

/// Runs the statement that writes these fields, and returns the item as it is then.
fn store(
    connection: &Connection,
    statement: &str,
    id: ItemId,
    fields: &ItemFields,
) -> WriteResult<Item> {
    let written = connection
        .prepare_cached(statement)
        .and_then(|mut prepared| {
            prepared.query_row(
                params![
                    key(id),
                    fields.name,
                    fields.description,
                    fields.price.cents(),
                    now_us()
                ],
                |row| Ok(item(row)),
            )
        });
    written
        .map_err(rejected)?
        .map_err(|error| OpError::Unknown(error.into()))
}

fn version_of(connection: &Connection, id: ItemId) -> rusqlite::Result<Option<i64>> {
    connection
        .prepare_cached("SELECT version FROM items WHERE id = ?1")?
        .query_row([key(id)], |row| row.get(0))
        .optional()
}

#[async_trait]
impl ItemStore for SqliteStore {
    fn system(&self) -> &'static str {
        "sqlite"
    }

    async fn select(&self, id: ItemId) -> Result<Option<Item>, StoreError> {
        self.read(move |connection| stored(connection, id))
            .await?
            .transpose()
    }

    async fn select_page(&self, request: PageRequest) -> Result<Page, StoreError> {
        let wanted = Page::wanted(&request);
        let (items, unreadable) = self
            .read(move |connection| {
                let mut statement = connection.prepare_cached(match request.after {
                    None => SELECT_NEWEST,
                    Some(_) => SELECT_AFTER,
                })?;
                let mut rows = match request.after {
                    None => statement.query([])?,
                    Some(cursor) => {
                        statement.query(params![cursor.created_at.micros(), key(cursor.id)])?
                    }
                };
                let (mut items, mut unreadable) = (Vec::with_capacity(wanted), Vec::new());
                while items.len() < wanted
                    && unreadable.len() <= left_out::MOST
                    && let Some(row) = rows.next()?
                {
                    match item(row) {
                        Ok(item) => items.push(item),
                        Err(error) => unreadable.push(error),
                    }
                }
                Ok((items, unreadable))
            })
            .await?;
        for error in &unreadable {
            self.left_out.name(error);
        }
        Ok(Page::from_rows(items, &request))
    }

    async fn insert(&self, guard: Option<Guard>, new: NewItem) -> WriteResult<Item> {
        self.write(guard, move |connection| {
            let NewItem { id, fields } = new;
            store(connection, INSERT, id, &fields)
        })
        .await
    }

    async fn update(
        &self,
        guard: Option<Guard>,
        id: ItemId,
        fields: ItemFields,
        condition: Condition,
    ) -> WriteResult<Item> {
        self.write(guard, move |connection| {
            // Only this thread writes, so nothing changes between the two statements. What cannot be
            // read could not be answered afterwards either, and is not written.
            match stored(connection, id).map_err(rejected)? {
                None => return Err(OpError::Rejected(Refusal::Missing)),
                Some(Err(error)) => return Err(OpError::Rejected(error.into())),
                Some(Ok(item)) if !condition.accepts(item.version) => {
                    return Err(OpError::Rejected(Refusal::Mismatch));
                }
                Some(Ok(_)) => {}
            }
            store(connection, UPDATE, id, &fields)
        })
        .await
    }

    async fn delete(
        &self,
        guard: Option<Guard>,
        id: ItemId,
        condition: Condition,
    ) -> WriteResult<()> {
        self.write(guard, move |connection| {
            match version_of(connection, id).map_err(rejected)? {
                None => return Err(OpError::Rejected(Refusal::Missing)),
                Some(version) if !condition.accepts(version) => {
                    return Err(OpError::Rejected(Refusal::Mismatch));
                }
                Some(_) => {}
            }
            connection
                .prepare_cached("DELETE FROM items WHERE id = ?1")
                .and_then(|mut statement| statement.execute([key(id)]))
                .map_err(rejected)?;
            Ok(())
        })
        .await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.read(|connection| connection.query_row("SELECT 1", [], |_| Ok(())))
            .await
    }

    fn pool_use(&self) -> PoolUse {
        let open = self
            .threads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len();
        let waiting = self.waiting.load(Ordering::Relaxed);
        PoolUse {
            limit: open,
            open,
            used: waiting.min(open),
            waiting,
            ..PoolUse::default()
        }
    }

    async fn close(&self) {
        let writer =
            std::mem::take(&mut *self.writer.lock().unwrap_or_else(PoisonError::into_inner));
        self.readers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        let mut threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        // The threads finish what they have and end; nothing is left to do if they do not in time.
        let joined = tokio::task::spawn_blocking(move || {
            // The writer, which is the first, ends last: only a connection that writes can move the
            // log into the file, and only the last one does.
            for thread in threads.drain(1.min(threads.len())..) {
                let _ = thread.join();
            }
            drop(writer);
            for thread in threads {
                let _ = thread.join();
            }
        });
        let _ = tokio::time::timeout(ANSWER_TIMEOUT, joined).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use writethrough::{Fence, LocalFence};

    async fn guard(fence: &LocalFence) -> Option<Guard> {
        let epoch = fence.poll().await.unwrap().row.number;
        Some(fence.enter(epoch).await.unwrap())
    }

    fn fields(name: &str) -> ItemFields {
        ItemFields {
            name: name.to_owned(),
            description: None,
            price: Price::from_cents(150).unwrap(),
        }
    }

    #[tokio::test]
    async fn a_file_keeps_its_items_and_is_refused_to_a_second_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items.db");
        let fence = LocalFence::new();
        let store = SqliteStore::open(&path).unwrap();
        let second = SqliteStore::open(&path).err().unwrap().to_string();
        assert!(second.contains("in use by another process"), "{second}");
        let new = NewItem {
            id: ItemId::generate(),
            fields: fields("kept"),
        };
        let id = new.id;
        let stored = store.insert(guard(&fence).await, new).await.unwrap();
        store.close().await;
        drop(store);
        let store = SqliteStore::open(&path).unwrap();
        assert_eq!(store.select(id).await.unwrap(), Some(stored));
        let page = store
            .select_page(PageRequest {
                limit: 100,
                after: None,
            })
            .await
            .unwrap();
        assert_eq!(page.items.len(), 4);
    }

    /// A process that closes any descriptor of a file loses all its `fcntl` locks on it, SQLite's
    /// too: the refusal of a second attempt in this process must not open the file.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn refusing_a_second_attempt_in_the_same_process_leaves_sqlite_its_own_locks() {
        use std::os::unix::fs::MetadataExt;

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items.db");
        let store = SqliteStore::open(&path).unwrap();
        store.ping().await.unwrap();
        let number = path.metadata().unwrap().ino();
        let held = |kind: &str| {
            let locks = std::fs::read_to_string("/proc/locks").unwrap();
            locks
                .lines()
                .filter(|line| line.contains(kind) && line.contains(&format!(":{number} ")))
                .count()
        };
        assert_eq!((held("FLOCK"), held("POSIX")), (1, 1));
        let link = folder.path().join("link.db");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for name in [&path, &link] {
            let second = SqliteStore::open(name).err().unwrap().to_string();
            assert!(second.contains("in use by another process"), "{second}");
        }
        assert_eq!((held("FLOCK"), held("POSIX")), (1, 1));
        store.close().await;
        assert_eq!((held("FLOCK"), held("POSIX")), (0, 0));
    }

    #[test]
    fn a_second_connection_without_the_table_is_noticed() {
        let mut first = Connection::open_in_memory().unwrap();
        migrate(&mut first, Path::new("m")).unwrap();
        assert_eq!(sees_items(&first), Ok(()));
        let second = Connection::open_in_memory().unwrap();
        assert!(
            sees_items(&second)
                .unwrap_err()
                .contains("does not find the table")
        );
    }

    /// Rows as an older file may hold them: the triggers came later.
    #[tokio::test]
    async fn a_row_that_cannot_be_read_is_named_and_nothing_else_fails() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items.db");
        SqliteStore::open(&path).unwrap().close().await;
        let other = Connection::open(&path).unwrap();
        let insert = |values: &str| {
            other.execute_batch(&format!(
                "INSERT INTO items (id, name, price_cents, created_us, updated_us) VALUES ({values})"
            ))
        };
        let id = "x'550e8400e29b41d4a71644665544ffff'";
        let (future, past) = (i64::MAX, i64::MIN);
        let unreadable = [
            format!("{id}, 'a', 1, {future}, 1"),
            format!("{id}, 'a', 1, 1, {past}"),
            format!("{id}, 'a', 1, 1, 253402300800000000"),
            "x'00', 'a', 1, 1, 1".to_owned(),
        ];
        for values in &unreadable {
            let refused = insert(values).unwrap_err().to_string();
            assert!(refused.contains("not a UUID, or a time"), "{refused}");
        }
        insert(&format!("{id}, 'a', 1, 1, 253402300799999999")).unwrap();
        other
            .execute_batch(&format!("UPDATE items SET updated_us = 5 WHERE id = {id}"))
            .unwrap();
        let moved = format!("UPDATE items SET created_us = {future} WHERE id = {id}");
        other.execute_batch(&moved).unwrap_err();
        other
            .execute_batch(
                "DROP TRIGGER items_can_be_read_when_inserted;
                 DROP TRIGGER items_can_be_read_when_updated;",
            )
            .unwrap();
        let broken = [
            ("created_us", format!("{id}, 'a', 1, {future}, 1")),
            ("updated_us", format!("{id}, 'a', 1, 1, {past}")),
            ("name", format!("{id}, CAST(x'ff' AS TEXT), 1, 1, 1")),
        ];
        for (column, values) in &broken {
            other
                .execute_batch(&format!("DELETE FROM items WHERE id = {id}"))
                .unwrap();
            insert(values).unwrap();
            let store = SqliteStore::open(&path).unwrap();
            let fence = LocalFence::new();
            let item = ItemId::parse("550e8400-e29b-41d4-a716-44665544ffff").unwrap();
            let named = |error: &StoreError| {
                let text = error.to_string();
                assert!(text.contains(&format!("{item}, column {column}")), "{text}");
            };
            named(&store.select(item).await.unwrap_err());
            let page = PageRequest {
                limit: 100,
                after: None,
            };
            assert_eq!(store.select_page(page).await.unwrap().items.len(), 3);
            let before: i64 = other
                .query_row("SELECT sum(version) FROM items", [], |row| row.get(0))
                .unwrap();
            let written = store
                .update(guard(&fence).await, item, fields("b"), Condition::None)
                .await;
            let Err(OpError::Rejected(Refusal::Store(error))) = written else {
                panic!("{written:?}")
            };
            named(&error);
            let after: i64 = other
                .query_row("SELECT sum(version) FROM items", [], |row| row.get(0))
                .unwrap();
            assert_eq!(before, after);
            let deleted = store.delete(guard(&fence).await, item, Condition::None);
            deleted.await.unwrap();
            store.close().await;
        }
        insert("x'00', 'a', 1, 1, 1").unwrap();
        let store = SqliteStore::open(&path).unwrap();
        let page = PageRequest {
            limit: 2,
            after: None,
        };
        assert_eq!(store.select_page(page).await.unwrap().items.len(), 2);
    }

    #[tokio::test]
    async fn conditions_and_missing_items_are_told_apart() {
        let store = SqliteStore::temporary().unwrap();
        let fence = LocalFence::new();
        let id = ItemId::parse("550e8400-e29b-41d4-a716-446655440001").unwrap();
        let missing = |error| matches!(error, OpError::Rejected(Refusal::Missing));
        let mismatch = |error| matches!(error, OpError::Rejected(Refusal::Mismatch));
        let update = |condition| async {
            let guard = guard(&fence).await;
            store.update(guard, id, fields("new"), condition).await
        };
        let item = update(Condition::None).await.unwrap();
        assert_eq!(item.version, 2);
        assert!(item.updated_at >= item.created_at);
        let one = Condition::VersionIn(vec![1]);
        assert!(update(one.clone()).await.is_err_and(mismatch));
        let delete = |condition| async {
            let guard = guard(&fence).await;
            store.delete(guard, id, condition).await
        };
        assert!(delete(one).await.is_err_and(mismatch));
        delete(Condition::VersionIn(vec![2])).await.unwrap();
        assert!(delete(Condition::None).await.is_err_and(missing));
        assert!(update(Condition::None).await.is_err_and(missing));
    }
}
