//! The gateway: jobs over HTTP, and a page to look at them.
//!
//! A request goes through the same doors in this order: it is counted ([`metrics`]), its sender is
//! known or local ([`auth`]), its body is capped, its spec is parsed whole, and only then is the queue
//! asked. Whatever is refused is refused as `application/problem+json`, with the path of each field.
//!
//! What the queue tells of running jobs is kept for a while in a [`hub`], from which every reader of
//! events is served and every request that waits is woken.

mod archive;
mod auth;
mod blobs;
mod events;
mod exec;
mod extract;
mod gateway;
mod hub;
mod jobs;
mod listing;
mod metrics;
mod openapi;
mod outputs;
mod page;
mod problem;
mod routes;
mod serve;
mod waiting;

pub use auth::{Tokens, TokensError};
pub use gateway::{Gateway, GatewayConfig, GatewayError, NotReady};
pub use routes::router;
pub use serve::serve;
