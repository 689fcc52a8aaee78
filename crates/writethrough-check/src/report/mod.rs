//! What a person, or a program, is told: the summary of a run, as text, as JSON and as a page.
//!
//! Reports decide nothing; they show what the judge found and what the history says about service
//! times.

mod availability;
mod faults;
mod html;
mod summary;
mod text;

pub use self::availability::{Availability, Service, measure};
pub use self::faults::{
    Circumstances, FaultKindSummary, FaultSummary, LONGEST_WRITE, Promises, UnderFaults,
    under_faults,
};
pub use self::html::page;
pub use self::summary::{
    ActionSummary, AnomalySummary, Bucket, KindCount, MemberSummary, Summary, Verdict,
};
pub use self::text::text;
