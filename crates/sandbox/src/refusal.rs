//! Why a job's program does not run at all.

use hutch_proto::{LimitHit, Problem, Reason};

/// A verdict reached before the program ran.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: Reason,
    pub(crate) message: String,
    pub(crate) limit: Option<LimitHit>,
}

impl Refusal {
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), limit: None }
    }

    /// The spec asks for what cannot be given.
    pub(crate) fn spec(path: &str, message: impl Into<String>) -> Self {
        Self::new(Reason::SpecInvalid, Problem::new(path, message).to_string())
    }

    /// The host or this program failed.
    pub(crate) fn host(message: impl Into<String>) -> Self {
        Self::new(Reason::HostError, message)
    }
}

impl From<Vec<Problem>> for Refusal {
    fn from(problems: Vec<Problem>) -> Self {
        let all: Vec<_> = problems.iter().map(Problem::to_string).collect();
        Self::new(Reason::SpecInvalid, all.join("; "))
    }
}
