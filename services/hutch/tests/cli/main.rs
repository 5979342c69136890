//! The command line, as people use it. Those tests that run sandboxes are skipped, and say so, where
//! `hutch doctor` finds that none can be made.

mod alone;
mod broker;
mod house;
mod run;
mod up;
