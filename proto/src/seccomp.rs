//! Which system calls a job may make, and what becomes of one that is refused.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A policy of system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SeccompProfile {
    /// What ordinary programs use.
    #[default]
    Default,
    /// A judge's: besides, no sockets, and no program but the one that is named.
    Strict,
}

/// What becomes of a system call that is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SeccompRefused {
    /// The program is answered EPERM, and goes on.
    #[default]
    Errno,
    /// The same, and the result names the call in `refused_syscalls`.
    Report,
    /// The job is killed: `limit_exceeded`, reason `syscall`, and the message names the call.
    Kill,
}

/// How a job's system calls are treated; what is left out takes the worker's default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SeccompSpec {
    /// Which calls are let through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<SeccompProfile>,
    /// What becomes of the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<SeccompRefused>,
}

impl SeccompSpec {
    /// This; what is left out is taken from `base`.
    #[must_use]
    pub fn over(self, base: Self) -> Self {
        Self { profile: self.profile.or(base.profile), refused: self.refused.or(base.refused) }
    }
}
