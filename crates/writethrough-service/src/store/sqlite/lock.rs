//! The right of one process to a database file, whatever the file is called.
//!
//! The lock is `flock` on the database file itself, so paths, links and renamed files make no
//! difference. SQLite's own locks on the file are of another kind (`fcntl`), and neither sees the
//! other. But `fcntl` locks have a trap: a process loses all that it has on a file when it closes *any*
//! descriptor of that file. So the descriptor of the lock is opened before SQLite opens the file and
//! closed after SQLite has closed it, and a second attempt inside this process is refused by the
//! file's number, without opening it.
//!
//! A lock file beside the database would have none of this, but its name is made of the database's.

use std::collections::BTreeSet;
use std::fs::{File, Metadata, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::OpenError;

/// Device and number of a file.
type FileId = (u64, u64);

/// The files that this process has locked.
static LOCKED: Mutex<BTreeSet<FileId>> = Mutex::new(BTreeSet::new());

fn locked() -> MutexGuard<'static, BTreeSet<FileId>> {
    LOCKED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn id(metadata: &Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}

/// A locked file. The lock goes with the value, or with the process, whatever ends it.
pub(super) struct FileLock {
    given: PathBuf,
    path: PathBuf,
    id: FileId,
    _file: File,
}

impl FileLock {
    /// Locks the file, which is made if there is none.
    pub(super) fn take(given: &Path) -> Result<Self, OpenError> {
        let in_use = || OpenError::InUse(given.to_owned());
        let failed = |why: String| OpenError::Io(given.to_owned(), why);
        let io = |error: std::io::Error| failed(error.to_string());
        let mut locked = locked();
        match given.metadata() {
            Ok(metadata) if !metadata.is_file() => return Err(failed("it is not a file".into())),
            Ok(metadata) if locked.contains(&id(&metadata)) => return Err(in_use()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
        }
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(given)
            .map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(in_use()),
            Err(TryLockError::Error(error)) => return Err(io(error)),
        }
        let path = given.canonicalize().map_err(io)?;
        if metadata.nlink() > 1 {
            tracing::warn!(
                "{} has more than one name (hard links): always start with the same one, because \
                 SQLite finds what a crash has left by the name",
                given.display()
            );
        }
        let id = id(&metadata);
        locked.insert(id);
        Ok(Self {
            given: given.to_owned(),
            path,
            id,
            _file: file,
        })
    }

    /// The file's path without links.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Checks that the path still leads to the locked file: what SQLite has opened by it is locked.
    pub(super) fn verify(&self) -> Result<(), OpenError> {
        match self.path.metadata() {
            Ok(metadata) if id(&metadata) == self.id => Ok(()),
            _ => Err(OpenError::Io(
                self.given.clone(),
                "it was replaced meanwhile".to_owned(),
            )),
        }
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        locked().remove(&self.id);
    }
}
