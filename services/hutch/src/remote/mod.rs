//! The commands that talk to a gateway.

mod client;
mod exec;
mod follow;
mod jobs;
mod outputs;
mod sse;
mod submit;

pub(crate) use exec::exec;
pub(crate) use jobs::{cancel, logs, status};
pub(crate) use outputs::outputs;
pub(crate) use submit::submit;
