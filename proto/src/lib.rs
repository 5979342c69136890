//! The words on the wire: what a job is, what its result is, and what may be said in between.
//!
//! A job arrives as JSON and becomes a [`JobSpec`] by [`JobSpec::parse`], which caps, parses and
//! validates it; nothing downstream looks at the raw bytes again. A worker answers with a
//! [`JobResult`], and tells what happens meanwhile as [`Event`]s. There is no I/O in this crate.
//!
//! JSON is snake_case; numbers are integers with the unit in the name (`_ms`, `_bytes`,
//! `_millis`). Human forms such as `256MiB` are for flags and config files: see [`units`].

mod content;
mod error;
mod event;
mod exec;
mod id;
mod layer_ref;
mod limits;
mod object;
mod parse;
mod path;
mod result;
pub mod schema;
mod seccomp;
mod spec;
mod time;
pub mod units;
mod user;
mod validate;

pub use content::Content;
pub use error::{Problem, SpecError};
pub use event::{Event, EventKind, OutputChunk};
pub use exec::{ExecMessage, ExecRefusal, ExecSpec, ExecWord, MAX_EXEC_BYTES, MAX_EXEC_START_BYTES, TtySize};
pub use id::{Digest, IdError, JobId};
pub use layer_ref::LayerRef;
pub use limits::{LimitPolicy, Limits, LimitsSpec, OutputOverflow};
pub use path::{JobPath, Mode};
pub use result::{
    Archive, Captured, JobResult, JobState, JobView, LimitHit, OutputFile, OutputKind, Outputs, Reason,
    Status, StepResult, Timeline, Usage,
};
pub use seccomp::{SeccompProfile, SeccompRefused, SeccompSpec};
pub use spec::{
    FileSpec, JobSpec, MAX_SPEC_BYTES, Network, OutputsSpec, StepSpec, VolumeMount, VolumeSource,
};
pub use time::Timestamp;
pub use user::{MAX_ID, UserSpec};
pub use validate::{MAX_LAYERS, is_name};

/// AMQP `type` of a message that carries a [`JobSpec`].
pub const JOB_TYPE: &str = "hutch.job.v1";
/// AMQP `type` of a message that carries a [`JobResult`].
pub const RESULT_TYPE: &str = "hutch.result.v1";
/// AMQP `type` of a message that carries an [`Event`].
pub const EVENT_TYPE: &str = "hutch.event.v1";
