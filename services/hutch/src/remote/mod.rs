//! The commands that talk to a gateway.

mod client;
mod follow;
mod jobs;
mod outputs;
mod sse;
mod submit;

pub(crate) use jobs::{cancel, exec, logs, status};
pub(crate) use outputs::outputs;
pub(crate) use submit::submit;
