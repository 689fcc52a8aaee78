//! `writethrough lab`: the lab without containers.
//!
//! One process starts private Postgres and Redis servers, API nodes and, where it is installed,
//! Prometheus, waits, and ends all of them. The same command in another terminal reaches it through a
//! socket in its folder and does what `docker compose stop redis` and friends do for the containers.
//! Nothing is installed, nothing outlives the lab, and nothing here is used by `serve`.

mod command;
mod control;
mod monitoring;
mod stack;
mod tools;
mod traces;

pub use command::{LabArgs, run};
