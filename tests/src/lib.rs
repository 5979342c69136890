//! End-to-end tests of hutch; see the `tests` folder of this crate.

pub mod hutch;
pub mod processes;
pub mod programs;
