//! A black-box consistency checker for services that speak the lab's items API.
//!
//! Client processes invoke reads, lists, creates, updates and deletes at random and record what
//! they saw in a [`history`]; the [`judge`] says whether every item behaved like a single,
//! linearizable copy; the [`report`] explains what could not have happened. `writethrough check` is
//! [`CheckArgs`] and [`run`]; [`command`] has the steps, for those who run the workload under faults
//! of their own.
//!
//! The checker speaks HTTP only and imports nothing of what it judges.

#![forbid(unsafe_code)]

pub mod audit;
pub mod client;
pub mod command;
pub mod history;
pub mod judge;
pub mod report;
pub mod time;
pub mod workload;

pub use command::{CheckArgs, run, run_to};
