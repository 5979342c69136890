//! The course of one job: what is known of it so far, step by step, and at the end the report.

use std::collections::BTreeSet;
use std::time::Instant;

use hutch_proto::{Captured, Reason, StepResult, Timeline, Timestamp, Usage};
use hutch_sandbox_sys::process::monotonic_ns;

use crate::cgroup::Readings;
use crate::collect::Collected;
use crate::engine::Remains;
use crate::failure;
use crate::observe::Stream;
use crate::plan::{JobPlan, StepPlan};
use crate::refusal::Refusal;
use crate::report::{self, Durations, Report, concatenated};
use crate::scratch::DiskUse;
use crate::supervise::Exited;
use crate::verdict::{End, Observed, Verdict, decide};

/// A job's usage as the contract shows it.
pub(crate) fn usage(readings: &Readings, wall_time_ms: u64, disk: DiskUse) -> Usage {
    // The two parts add up to what limits are held against: the whole is rounded, not each part.
    let cpu_system_ms = readings.cpu_system_us / 1000;
    Usage {
        wall_time_ms,
        cpu_user_ms: readings.cpu_us() / 1000 - cpu_system_ms,
        cpu_system_ms,
        cpu_throttled_ms: readings.throttled_us / 1000,
        memory_peak_bytes: readings.memory_peak_bytes,
        oom_kills: readings.oom_kills,
        pids_peak: readings.pids_peak,
        pids_denied: readings.pids_denied,
        io_read_bytes: readings.io_read_bytes,
        io_write_bytes: readings.io_write_bytes,
        disk_bytes: disk.bytes,
        disk_inodes: disk.inodes,
    }
}

/// What is known of a job so far.
pub(crate) struct Course {
    begun: Instant,
    started_at: Timestamp,
    begun_ns: u64,
    step_begun_ns: u64,
    step_begun_at: Timestamp,
    durations: Durations,
    steps: Vec<StepResult>,
    decided: Option<Verdict>,
    usage: Usage,
    pub(crate) remains: Remains,
}

impl Course {
    pub(crate) fn begin(remains: Remains) -> Self {
        let (now, at) = (monotonic_ns(), Timestamp::now());
        Self {
            begun: Instant::now(),
            started_at: at,
            begun_ns: now,
            step_begun_ns: now,
            step_begun_at: at,
            durations: Durations::default(),
            steps: Vec::new(),
            decided: None,
            usage: Usage::default(),
            remains,
        }
    }

    /// Bytes of stdout and stderr that are kept of the steps so far.
    pub(crate) fn kept(&self) -> (u64, u64) {
        let sum = |of: fn(&StepResult) -> &Captured| {
            self.steps.iter().map(|step| of(step).data.len() as u64).sum::<u64>()
        };
        (sum(|step| &step.stdout), sum(|step| &step.stderr))
    }

    /// Takes in a step that is over; true if the next one is to run.
    pub(crate) fn step_done(
        &mut self,
        step: &StepPlan,
        plan: &JobPlan,
        exited: Exited,
    ) -> Result<bool, Refusal> {
        let now = monotonic_ns();
        let started_ns = exited.records.started_ns.unwrap_or(exited.dead_ns);
        let ended_ns = exited.records.ended.map_or(exited.dead_ns, |(_, at)| at).max(started_ns);
        let run_us = (ended_ns - started_ns) / 1000;
        let seen = Observed {
            cause: exited.cause,
            end: exited.records.ended.map(|(status, _)| End::of(status)),
            readings: exited.readings,
            wall_ms: run_us / 1000,
            idle_ms: u64::try_from(exited.idle.as_millis()).unwrap_or(u64::MAX),
            stdout_bytes: exited.stdout.bytes,
            stderr_bytes: exited.stderr.bytes,
            disk_full: (exited.disk.bytes_full, exited.disk.inodes_full),
            disk_bytes: exited.disk.bytes,
            disk_inodes: exited.disk.inodes,
        };
        self.remains.add(exited.remains);
        let out_of_memory = exited.readings.oom_kills > 0;
        let verdict = match exited.records.failed {
            Some(record) if !out_of_memory && exited.cause.is_none() => failure::explain(record, plan, step)?,
            _ => decide(&step.limits, &seen),
        };
        let usage = usage(&exited.readings, seen.wall_ms, exited.disk);
        self.usage = self.usage.then(usage);
        let setup_us = started_ns.saturating_sub(self.step_begun_ns) / 1000;
        let teardown_us = now.saturating_sub(ended_ns) / 1000;
        self.durations.setup_us += setup_us;
        self.durations.run_us += run_us;
        self.durations.teardown_us += teardown_us;
        let finished_at = Timestamp::now();
        let goes_on = verdict.reason.is_none()
            || (step.allow_failure && !matches!(verdict.reason, Some(Reason::Requested | Reason::HostError)));
        self.steps.push(StepResult {
            name: step.name.clone(),
            status: verdict.status,
            reason: verdict.reason,
            message: verdict.message.clone(),
            limit: verdict.limit.clone(),
            exit_code: verdict.exit_code,
            signal: verdict.signal.clone(),
            refused_syscalls: exited.refused_syscalls,
            stdout: exited.stdout,
            stderr: exited.stderr,
            usage,
            timeline: Timeline {
                submitted_at: self.started_at,
                started_at: Some(self.step_begun_at),
                finished_at,
                queue_ms: 0,
                setup_us,
                run_us,
                collect_us: 0,
                teardown_us,
            },
        });
        self.step_begun_ns = now;
        self.step_begun_at = finished_at;
        // A failure that is allowed does not decide, unless nothing else does.
        if !(goes_on && verdict.reason.is_some()) {
            self.decided = Some(verdict);
        }
        Ok(goes_on)
    }

    /// The report on a job whose program did not run, or whose sandbox failed.
    pub(crate) fn refused(self, refusal: Refusal) -> Report {
        let Refusal { reason, message, limit } = refusal;
        let verdict = Verdict {
            status: reason.status(),
            reason: Some(reason),
            message,
            limit,
            exit_code: None,
            signal: None,
        };
        self.report(verdict, Collected::default())
    }

    pub(crate) fn collected(mut self, collected: Result<Collected, Refusal>) -> Report {
        let collected = match collected {
            Ok(collected) => collected,
            Err(refusal) => return self.refused(refusal),
        };
        let all_ns = monotonic_ns().saturating_sub(self.begun_ns);
        let known = self.durations.setup_us + self.durations.run_us + self.durations.teardown_us;
        self.durations.collect_us = (all_ns / 1000).saturating_sub(known);
        let verdict = self.decided.take().unwrap_or(Verdict {
            status: hutch_proto::Status::Succeeded,
            reason: None,
            message: String::new(),
            limit: None,
            exit_code: Some(0),
            signal: None,
        });
        self.report(verdict, collected)
    }

    fn report(self, verdict: Verdict, collected: Collected) -> Report {
        tracing::debug!(status = %verdict.status, elapsed = ?self.begun.elapsed(), "job done");
        let stdout = concatenated(&self.steps, Stream::Stdout);
        let stderr = concatenated(&self.steps, Stream::Stderr);
        Report {
            status: verdict.status,
            reason: verdict.reason,
            message: verdict.message,
            limit: verdict.limit,
            exit_code: verdict.exit_code,
            signal: verdict.signal,
            refused_syscalls: refused_syscalls(&self.steps),
            stdout,
            stderr,
            usage: self.usage,
            outputs: collected.outputs,
            archive: collected.archive,
            layer: collected.layer,
            steps: self.steps,
            started_at: Some(self.started_at),
            finished_at: Timestamp::now(),
            durations: self.durations,
            remains: Some(report::Remains::Here(Box::new(self.remains))),
        }
    }
}

/// The names of all calls that were refused to any step.
fn refused_syscalls(steps: &[StepResult]) -> Vec<String> {
    let names: BTreeSet<_> = steps.iter().flat_map(|step| &step.refused_syscalls).cloned().collect();
    names.into_iter().collect()
}
