//! End-to-end tests of hutch; see the `tests` folder of this crate. What they share is here.

pub mod broker;
pub mod hutch;
pub mod processes;
pub mod programs;
pub mod proxy;
