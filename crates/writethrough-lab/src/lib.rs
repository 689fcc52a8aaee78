//! Everything that starts servers and breaks them: `writethrough lab`, and the clusters and faults of `writethrough check
//! --cluster`.
//!
//! The lab is one process that starts private Postgres and Redis servers, API nodes and, where it is installed,
//! Prometheus, waits, and ends all of them. The same command in another terminal reaches it through a
//! socket in its folder and does what `docker compose stop redis` and friends do for the containers.
//! Nothing is installed, nothing outlives the lab, and nothing here is used by `writethrough serve`: API nodes are
//! child processes of the same program.
//!
//! [`cluster`] is what both run on. [`check`] runs the workload and the judge of [`writethrough_check`] on a cluster, while the
//! [`nemesis`] causes faults.

#![forbid(unsafe_code)]

pub mod check;
pub mod cluster;
mod command;
mod control;
mod monitoring;
pub mod nemesis;
mod request;
mod stack;
mod tools;
mod traces;

pub use command::{LabArgs, run};
