//! A black-box consistency checker for services that speak the lab's items API.
//!
//! Client processes invoke reads, lists, creates, updates and deletes at random and record what they saw in a
//! [`history`]; the [`judge`] says whether every item behaved like a single, linearizable copy; the [`report`] explains
//! what could not have happened. `writethrough check` is [`CheckArgs`] and [`run`].
//!
//! With `--cluster` it brings the services along: [`nemesis`] starts nodes on a Postgres and a Redis of their own, causes
//! faults by a schedule while the processes are at work, and compares every item with Postgres afterwards.
//!
//! The checker speaks HTTP only and imports nothing of what it judges.

#![forbid(unsafe_code)]

pub mod client;
mod command;
pub mod history;
pub mod judge;
pub mod nemesis;
pub mod report;
pub mod workload;

pub use command::{CheckArgs, run, run_to};
