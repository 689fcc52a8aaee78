//! What stands around every request: who may send it, whether there is room for it, what is wrong with
//! its form, its trace, its metrics, and what becomes of its body and of an answer that is not read.

pub mod access;
pub mod body_watch;
pub mod load_shed;
pub mod malformed;
mod serve;
pub mod trace_context;

pub use serve::serve;
