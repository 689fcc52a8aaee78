//! The write path that users see: what a write changes, and who may make its commit.

pub mod set;
