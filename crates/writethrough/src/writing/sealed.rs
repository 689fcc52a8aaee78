//! What users of the library cannot name.

/// Keeps the drivers to those of this library.
pub trait Sealed {}
