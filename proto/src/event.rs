//! What is told of a job while it runs.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{JobId, Reason, Status, Timestamp, Usage};

/// One thing that happened to a job. Events may be lost; the result never is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// The job.
    pub id: JobId,
    /// The attempt it belongs to, from 1.
    pub attempt: u32,
    /// Counts the events of one attempt, from 1.
    pub seq: u64,
    /// When it happened.
    pub at: Timestamp,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EventKind {
    /// A worker began with the job.
    Started {
        /// Which worker.
        worker: String,
    },
    /// The program wrote to stdout.
    Stdout(OutputChunk),
    /// The program wrote to stderr.
    Stderr(OutputChunk),
    /// What it has used so far.
    Usage {
        /// As the kernel counts it.
        usage: Usage,
    },
    /// The result is there.
    Finished {
        /// How it ended.
        status: Status,
        /// Why; null on success.
        reason: Option<Reason>,
    },
}

impl EventKind {
    /// The kind's name, as in the routing key.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Started { .. } => "started",
            Self::Stdout(_) => "stdout",
            Self::Stderr(_) => "stderr",
            Self::Usage { .. } => "usage",
            Self::Finished { .. } => "finished",
        }
    }
}

/// A piece of output: `text`, or `base64` where it is not UTF-8.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OutputChunk {
    /// The name of the step that wrote it.
    pub step: String,
    /// The bytes as UTF-8 text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The bytes in base64, where they are not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
}

impl OutputChunk {
    /// A piece with these bytes.
    #[must_use]
    pub fn new(step: &str, bytes: &[u8]) -> Self {
        let text = str::from_utf8(bytes).ok().map(str::to_owned);
        let base64 = if text.is_some() { None } else { Some(STANDARD.encode(bytes)) };
        Self { step: step.to_owned(), text, base64 }
    }

    /// The bytes; empty where the base64 is damaged.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        match (&self.text, &self.base64) {
            (Some(text), _) => text.clone().into_bytes(),
            (None, Some(encoded)) => STANDARD.decode(encoded).unwrap_or_default(),
            (None, None) => Vec::new(),
        }
    }
}
