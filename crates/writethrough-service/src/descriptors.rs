//! The files that this process may have open, sockets included, and how many of them are for client
//! connections.

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::connections::SPARE;

/// Descriptors for everything but the connections of clients and of the pool: Redis, the epoch,
/// traces, logs, files, the runtime's own.
const OTHERS: u64 = 64;
/// With fewer client connections than this there is no sense in a start.
const LEAST: u64 = 16;

/// Too few files may be open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this process may have {limit} files open, and needs {needed} at least with \
     --database-pool-size (DATABASE_POOL_SIZE) {pool}; raise the limit (`ulimit -n`, systemd's \
     `LimitNOFILE=`, Docker's `--ulimit nofile=`)"
)]
pub struct TooFew {
    limit: u64,
    needed: u64,
    pool: usize,
}

/// Raises the limit of open files as far as it may go without privileges. The lower one is there for
/// programs that use `select`, and a connection is a file.
pub fn raise() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // The old limit is as good as it was: what it means for connections is said at start.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// How many client connections there is room for, of the `wanted`, beside a pool of this size and the
/// connections of operators.
///
/// # Errors
///
/// [`TooFew`].
pub fn room_for(wanted: usize, pool: usize, operators: usize) -> Result<usize, TooFew> {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    room_within(limit, wanted, pool, operators)
}

fn room_within(limit: u64, wanted: usize, pool: usize, operators: usize) -> Result<usize, TooFew> {
    let reserve = OTHERS + (pool + operators + SPARE) as u64;
    let needed = reserve + LEAST.min(wanted as u64);
    if limit < needed {
        return Err(TooFew {
            limit,
            needed,
            pool,
        });
    }
    Ok(usize::try_from(limit - reserve).map_or(wanted, |room| room.min(wanted)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_a_reserve() {
        assert_eq!(room_within(u64::MAX, 4096, 16, 0), Ok(4096));
        assert_eq!(room_within(1 << 20, 4096, 16, 0), Ok(4096));
        let room = room_within(1024, 4096, 16, 0).unwrap();
        assert!((800..1000).contains(&room), "{room}");
        assert_eq!(room_within(1024, 3, 16, 0), Ok(3));
        let pool = room_within(1024, 4096, 200, 0).unwrap();
        assert_eq!(room - pool, 184);
        let operators = room_within(1024, 4096, 16, 96).unwrap();
        assert_eq!(room - operators, 96);
    }

    #[test]
    fn a_limit_that_leaves_no_room_is_an_error_with_its_remedy() {
        let error = room_within(100, 4096, 16, 0).unwrap_err();
        assert_eq!(room_within(error.needed, 4096, 16, 0), Ok(16));
        let line = error.to_string();
        assert!(
            line.contains("may have 100") && line.contains("LimitNOFILE="),
            "{line}"
        );
    }
}
