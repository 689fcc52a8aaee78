//! What other terminals ask a running lab for.

use serde::{Deserialize, Serialize};

/// One request, which the lab answers with a text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Answers when the lab runs.
    Ping,
    /// Says what runs, and where.
    Status,
    /// Ends the lab.
    Down,
    /// Returns the URL of a server.
    Url(String),
    /// Returns the address of a server for a client program.
    Address(Store),
    /// Returns the path of a server's log.
    Log(String),
    /// Returns a trace as a tree: the one with this id, or the last one of a request for items.
    Trace(Option<String>),
    /// Does something to one server, or to all API nodes.
    Change(Change, String),
    /// Does something to Redis.
    Redis(RedisChange),
}

/// A server that has a client program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Store {
    Postgres,
    Redis,
}

/// What can be done to any server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Change {
    Stop,
    Start,
    Kill,
    Pause,
    Resume,
}

/// What can be done to Redis alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum RedisChange {
    Snapshot,
    Restore,
    Lag,
    FailOver,
}
