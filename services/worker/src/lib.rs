//! The worker: takes jobs from a queue, has them run, and answers.
//!
//! A [`Worker`] has as many slots as its config says; each is a task of its own with its own end of
//! the queue, and goes round: take a job, fetch the blobs that it names, run it, put its archive in
//! the store, finish. What the engine says of the program becomes the job's result; a fault of this
//! host never does: the job is given back, an attempt is spent, and the queue decides what becomes
//! of it. A panic is such a fault too, and ends only the job it happened in.
//!
//! [`Drain`] ends a worker: first no more jobs are taken, and after a grace the rest are given back.

mod attempt;
mod config;
mod drain;
mod exec;
mod health;
mod http;
mod inputs;
mod jobs;
mod live;
mod metrics;
mod relay;
mod slot;
mod worker;

pub use config::WorkerConfig;
pub use drain::Drain;
pub use http::router;
pub use inputs::{InputError, resolve as resolve_inputs};
pub use worker::{Worker, WorkerError};
