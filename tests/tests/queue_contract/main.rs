//! The queue's contract, told once and held to on both homes.
//!
//! Every test takes a queue's name of its own, so that all can share one broker. Nothing here waits
//! for a fixed time: a wait is for a condition, with a limit that only a failure reaches.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod amqp;
mod embedded;
mod home;
mod rabbitmq;
mod rabbitmq_faults;
mod store;
mod suite;
mod told;
