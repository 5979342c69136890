//! The command line, as people use it. Those tests that run sandboxes are skipped, and counted, where
//! `hutch doctor` finds that none can be made.

mod alone;
mod broker;
mod readme;
mod run;
mod up;
