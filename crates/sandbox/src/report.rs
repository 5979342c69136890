//! What the engine says of a job that it ran, before the worker adds who asked and who answered.

use std::collections::BTreeMap;
use std::fs::File;

use hutch_proto::{
    Captured, JobId, JobResult, LimitHit, Outputs, Reason, Status, StepResult, Timeline, Timestamp, Usage,
};
use serde::{Deserialize, Serialize};

use crate::collect::CommittedLayer;
use crate::engine;
use crate::link::TakeDown;
use crate::observe::Stream;
use crate::refusal::Refusal;

/// How one job ended.
#[derive(Debug)]
pub struct Report {
    /// How it ended.
    pub status: Status,
    /// Why; none on success.
    pub reason: Option<Reason>,
    /// The same in words.
    pub message: String,
    /// The limit that was hit.
    pub limit: Option<LimitHit>,
    /// The deciding program's exit code.
    pub exit_code: Option<i32>,
    /// The signal that ended the deciding program.
    pub signal: Option<String>,
    /// Names of the system calls that were refused, where the job asked for them.
    pub refused_syscalls: Vec<String>,
    /// What the steps wrote to stdout, one after another.
    pub stdout: Captured,
    /// What the steps wrote to stderr.
    pub stderr: Captured,
    /// What the whole job used.
    pub usage: Usage,
    /// What was kept of what it wrote.
    pub outputs: Outputs,
    /// The archive that `outputs` names: an unlinked file with its compressed bytes.
    pub archive: Option<File>,
    /// The layer that `outputs` names.
    pub layer: Option<CommittedLayer>,
    /// Every step that ran.
    pub steps: Vec<StepResult>,
    /// When the engine began; none if the job was refused before.
    pub started_at: Option<Timestamp>,
    /// When the verdict was there.
    pub finished_at: Timestamp,
    /// Microseconds of each part.
    pub durations: Durations,
    /// The dead sandboxes. Take them out, and drop them after the answer.
    pub remains: Option<Remains>,
}

/// What is left of a job's sandboxes when its answer is there. Dropping it takes them down, or has the engine do so; it
/// may block: drop it after answering, and before the slot runs its next job.
#[derive(Debug)]
pub enum Remains {
    /// Of an engine in this process.
    Here(Box<engine::Remains>),
    /// Of an engine in another.
    There(TakeDown),
}

/// How long each part of a job took, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Durations {
    /// From the engine's start to the first program's.
    pub setup_us: u64,
    /// The programs.
    pub run_us: u64,
    /// Reading what they wrote.
    pub collect_us: u64,
    /// Taking the sandbox down, as far as it delayed the answer.
    pub teardown_us: u64,
}

/// Whose job it was and who answers.
#[derive(Debug, Clone)]
pub struct JobFacts {
    /// The job.
    pub id: JobId,
    /// Which attempt this was, from 1.
    pub attempt: u32,
    /// The worker's name.
    pub worker: String,
    /// When the queue accepted the job.
    pub submitted_at: Timestamp,
    /// The job's labels.
    pub labels: BTreeMap<String, String>,
}

impl Report {
    /// The report on a job that never came to a sandbox.
    pub(crate) fn without_run(refusal: Refusal) -> Self {
        Self {
            status: refusal.reason.status(),
            reason: Some(refusal.reason),
            message: refusal.message,
            limit: refusal.limit,
            exit_code: None,
            signal: None,
            refused_syscalls: Vec::new(),
            stdout: Captured::default(),
            stderr: Captured::default(),
            usage: Usage::default(),
            outputs: Outputs::default(),
            archive: None,
            layer: None,
            steps: Vec::new(),
            started_at: None,
            finished_at: Timestamp::now(),
            durations: Durations::default(),
            remains: None,
        }
    }

    /// The job's result.
    #[must_use]
    pub fn into_result(self, facts: JobFacts) -> JobResult {
        let begun = self.started_at.unwrap_or(self.finished_at);
        let queued = begun.since(facts.submitted_at);
        let mut steps = self.steps;
        for step in &mut steps {
            step.timeline.submitted_at = facts.submitted_at;
        }
        JobResult {
            id: facts.id,
            attempt: facts.attempt,
            worker: facts.worker,
            status: self.status,
            reason: self.reason,
            message: self.message,
            limit: self.limit,
            exit_code: self.exit_code,
            signal: self.signal,
            refused_syscalls: self.refused_syscalls,
            stdout: self.stdout,
            stderr: self.stderr,
            usage: self.usage,
            outputs: self.outputs,
            steps,
            timeline: Timeline {
                submitted_at: facts.submitted_at,
                started_at: self.started_at,
                finished_at: self.finished_at,
                queue_ms: u64::try_from(queued.as_millis()).unwrap_or(u64::MAX),
                setup_us: self.durations.setup_us,
                run_us: self.durations.run_us,
                collect_us: self.durations.collect_us,
                teardown_us: self.durations.teardown_us,
            },
            labels: facts.labels,
        }
    }
}

/// What all steps wrote to one stream, one after another.
pub(crate) fn concatenated(steps: &[StepResult], stream: Stream) -> Captured {
    let mut all = Captured::default();
    for step in steps {
        let one = match stream {
            Stream::Stdout => &step.stdout,
            Stream::Stderr => &step.stderr,
        };
        all.data.extend_from_slice(&one.data);
        all.bytes += one.bytes;
        all.truncated |= one.truncated;
    }
    all
}
