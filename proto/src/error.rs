//! What is wrong with a spec, said so that its author can mend it.

use std::fmt;

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field, such as `limits.memory_bytes` or `files[2].path`; empty for the whole.
    pub path: String,
    /// What is wrong and what would be right; lowercase, no full stop.
    pub message: String,
}

impl Problem {
    /// A problem at `path`.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            f.write_str(&self.message)
        } else {
            write!(f, "{}: {}", self.path, self.message)
        }
    }
}

/// Why a spec was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The bytes are not JSON at all (over HTTP: status 400).
    #[error("not JSON: {0}")]
    NotJson(String),
    /// JSON, but not a job; every problem that was found, at least one (over HTTP: status 422).
    #[error("{}", join(.0))]
    Invalid(Vec<Problem>),
}

impl From<std::str::Utf8Error> for SpecError {
    fn from(error: std::str::Utf8Error) -> Self {
        Self::NotJson(format!("the bytes are not UTF-8 from byte {} on", error.valid_up_to()))
    }
}

fn join(problems: &[Problem]) -> String {
    let lines: Vec<String> = problems.iter().map(Problem::to_string).collect();
    lines.join("; ")
}
