//! The testbed: makes the folder, and starts everything that runs in it.

use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::child::{Child, ChildSpec};
use crate::error::{Error, Result};
use crate::ground::{Ground, temporary_folder};
use crate::link::Link;
use crate::postgres::Postgres;
use crate::redis::Redis;
use crate::wait::until;

/// When set and not empty, folders outlive their testbeds.
const KEEP: &str = "WRITETHROUGH_TESTBED_KEEP";

/// How long a new testbed waits for the reaper of an earlier one to remove the same folder.
const REMOVAL_BOUND: Duration = Duration::from_secs(2);

/// A folder and all servers, links and processes that run in it.
///
/// Dropping it ends all of them, even those whose handles still live, and removes the folder; this
/// blocks the thread for a few tens of milliseconds. A testbed kept in a `static` is never dropped, but
/// ends with its process all the same.
#[derive(Debug)]
pub struct Testbed {
    ground: Arc<Ground>,
    links: Mutex<Vec<Link>>,
}

impl Testbed {
    /// Makes a testbed in a new folder below the system's folder for temporary files.
    ///
    /// # Errors
    ///
    /// When the folder cannot be made or the reaper cannot be started.
    pub async fn new() -> Result<Self> {
        let base = temporary_folder()?;
        loop {
            let folder = base.join(format!("writethrough-testbed-{:08x}", fastrand::u32(..)));
            match std::fs::DirBuilder::new().mode(0o711).create(&folder) {
                Ok(()) => return Self::on(&folder),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(Error::io(format!("make the folder {}", folder.display()))(
                        error,
                    ));
                }
            }
        }
    }

    /// Makes a testbed in a folder of the caller's choice, which is removed at the end like any other.
    ///
    /// # Errors
    ///
    /// When something is in the folder already: nobody's files are ever removed.
    pub async fn in_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let action = || format!("make the folder {}", folder.display());
        // The reaper of a testbed that has just ended may still be removing it.
        let empty = until("", REMOVAL_BOUND, || {
            let entries = match std::fs::read_dir(folder) {
                Ok(mut entries) => Ok(entries.next().is_none()),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
                Err(error) => Err(error),
            };
            async move { (!matches!(entries, Ok(false))).then_some(entries) }
        })
        .await;
        match empty {
            Ok(entries) => entries.map_err(Error::io(action()))?,
            Err(_) => {
                return Err(Error::Misuse(format!(
                    "the folder {} is not empty: remove it, or choose another",
                    folder.display()
                )));
            }
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(folder)
            .map_err(Error::io(action()))?;
        Self::on(folder)
    }

    fn on(folder: &Path) -> Result<Self> {
        let action = || format!("use the folder {}", folder.display());
        // Another user may have to pass through it; it cannot list it.
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o711))
            .map_err(Error::io(action()))?;
        let folder = folder.canonicalize().map_err(Error::io(action()))?;
        let keep = std::env::var_os(KEEP).is_some_and(|value| !value.is_empty());
        Ok(Self {
            ground: Arc::new(Ground::new(folder, keep)?),
            links: Mutex::default(),
        })
    }

    /// The folder in which everything runs.
    pub fn folder(&self) -> &Path {
        &self.ground.folder
    }

    /// Starts a Postgres server with an empty database `items_db` and a superuser `labuser`.
    ///
    /// The first call on a machine runs `initdb` and keeps the outcome as a template in the system's
    /// folder for temporary files, one for each user and version; later calls copy it.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`] when Postgres is not installed.
    pub async fn postgres(&self) -> Result<Postgres> {
        Postgres::launch(&self.ground).await
    }

    /// Starts an empty Redis server, which saves its data only when told to.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`] when Redis is not installed.
    pub async fn redis(&self) -> Result<Redis> {
        self.redis_with(&[]).await
    }

    /// Starts an empty Redis server with these options on its command line.
    ///
    /// # Errors
    ///
    /// As [`Testbed::redis`], and when the server refuses an option.
    pub async fn redis_with(&self, options: &[&str]) -> Result<Redis> {
        Redis::launch(&self.ground, options).await
    }

    /// Starts a standby of `primary`, asynchronous, through a link of its own
    /// ([`Postgres::replication_link`]); it may still lag when this returns.
    ///
    /// # Errors
    ///
    /// As [`Testbed::postgres`], and when the primary cannot be copied.
    pub async fn postgres_standby_of(&self, primary: &Postgres) -> Result<Postgres> {
        Postgres::launch_from(&self.ground, Some(primary)).await
    }

    /// Starts a Redis server that follows `primary` through a link of its own; it has caught up when
    /// this returns.
    ///
    /// # Errors
    ///
    /// As [`Testbed::redis`], and when the replica does not catch up.
    pub async fn redis_replica_of(&self, primary: &Redis) -> Result<Redis> {
        let replica = self.redis().await?;
        replica.replicate(primary).await?;
        Ok(replica)
    }

    /// Opens a link: a free port of 127.0.0.1 whose connections lead to `to`.
    ///
    /// # Errors
    ///
    /// When no port can be opened.
    pub async fn link(&self, to: SocketAddr) -> Result<Link> {
        let link = Link::open(to).await?;
        self.links.lock().push(link.clone());
        Ok(link)
    }

    /// Starts a program, for example an API node.
    ///
    /// It is up when the caller's own check says so; this returns as soon as it runs.
    ///
    /// # Errors
    ///
    /// When the program cannot be started.
    pub async fn child(&self, spec: ChildSpec) -> Result<Child> {
        Child::launch(&self.ground, spec).await
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        for link in self.links.lock().drain(..) {
            link.close();
        }
        self.ground.close();
    }
}
