//! Private Postgres and Redis servers, and TCP links that can be cut, for tests.
//!
//! A [`Testbed`] is a folder and everything that runs in it: [`Postgres`] servers, [`Redis`] servers,
//! [`Link`]s between a client and a server, and [`Child`] processes such as API nodes. Each server has
//! a free port on 127.0.0.1 and a folder of its own, so tests run in parallel. Every fault that this
//! crate offers (kill, pause, restart empty, restart from an old snapshot, a lagging replica, a cut,
//! stalled or slow link) is in force when the call that causes it returns, unless its documentation
//! says otherwise.
//!
//! **Nothing survives.** Dropping a server ends it; dropping the testbed ends everything and removes
//! the folder. When the process that owns a testbed is killed, even by SIGKILL, the kernel kills the
//! servers (parent-death signal) and a small shell process, the reaper, kills whatever is left and
//! removes the folder. Set `WRITETHROUGH_TESTBED_KEEP=1` to keep the folder, with its logs, for a look.
//!
//! **Every wait has a bound.** A wait polls a fact (see [`until`]); when the bound is reached, the error
//! carries the last lines of the server's log.
//!
//! Run as root, Postgres runs as the user `postgres`, or else `nobody`, because it refuses root.
//!
//! This crate works on Linux only: it uses `/proc` and the parent-death signal. It depends on nothing
//! else of this workspace and knows nothing of caches; it only runs programs and moves bytes. Its types
//! need a tokio runtime with time and I/O, whose clock is not paused.
//!
//! ```no_run
//! # async fn example() -> Result<(), writethrough_testbed::Error> {
//! use writethrough_testbed::Testbed;
//!
//! let testbed = Testbed::new().await?;
//! let postgres = testbed.postgres().await?;
//! let redis = testbed.redis().await?;
//! let link = testbed.link(redis.addr()).await?;
//! // A service would now use `postgres.url()` and `link.url_for(&redis.url())`.
//! postgres.run("CREATE TABLE t (id int)").await?;
//! redis.command(&["SET", "k", "old"]).await?;
//! let snapshot = redis.snapshot().await?;
//! redis.command(&["SET", "k", "new"]).await?;
//! link.stall();
//! redis.restart_from(&snapshot).await?;
//! link.heal();
//! assert_eq!(redis.query::<String>(&["GET", "k"]).await?, "old");
//! # Ok(())
//! # }
//! ```

mod child;
mod error;
mod ground;
mod link;
mod port;
mod postgres;
mod process;
mod program;
mod reaper;
mod redis;
mod server;
mod testbed;
mod wait;

pub use self::redis::{Redis, Snapshot};
pub use child::{Child, ChildSpec};
pub use error::{Error, Missing, Result};
pub use link::{Link, LinkCounts};
pub use port::free_port;
pub use postgres::Postgres;
pub use program::{find_program, own_environment};
pub use testbed::Testbed;
pub use wait::until;
