//! What a worker counts. Base units; no label has more values than is known beforehand.

use std::collections::BTreeMap;
use std::sync::Arc;

use hutch_proto::{JobId, JobResult, Reason, Status, Timeline, Usage};
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::jobs::{Jobs, Shared, Unruns};

const QUEUE_BUCKETS: &[f64] =
    &[0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0];
const RUN_BUCKETS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0];
const SANDBOX_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
const MIB: f64 = 1_048_576.0;
const MEMORY_BUCKETS: &[f64] = &[
    MIB,
    4.0 * MIB,
    16.0 * MIB,
    32.0 * MIB,
    64.0 * MIB,
    128.0 * MIB,
    256.0 * MIB,
    512.0 * MIB,
    1024.0 * MIB,
    2048.0 * MIB,
    4096.0 * MIB,
    8192.0 * MIB,
    16384.0 * MIB,
];

/// The counters and histograms of one worker.
#[derive(Debug)]
pub(crate) struct Metrics {
    jobs: Arc<Jobs>,
    faults: IntCounterVec,
    fenced: IntCounter,
    pub(crate) running: IntGauge,
    queue_seconds: Histogram,
    wall_seconds: Histogram,
    cpu_seconds: Histogram,
    memory_peak: Histogram,
    setup_seconds: Histogram,
    teardown_seconds: Histogram,
}

/// What of a result is counted: all but what it carries.
#[derive(Debug, Clone)]
pub(crate) struct Measured {
    pub(crate) id: JobId,
    pub(crate) status: Status,
    pub(crate) reason: Option<Reason>,
    pub(crate) labels: BTreeMap<String, String>,
    /// Whether there was a sandbox: none for what was rejected before.
    sandboxed: bool,
    usage: Usage,
    timeline: Timeline,
}

impl From<&JobResult> for Measured {
    fn from(result: &JobResult) -> Self {
        Self {
            id: result.id,
            status: result.status,
            reason: result.reason,
            labels: result.labels.clone(),
            sandboxed: !result.steps.is_empty() || result.timeline.setup_us > 0,
            usage: result.usage,
            timeline: result.timeline.clone(),
        }
    }
}

impl Metrics {
    /// Registers everything. `unrun` tells of jobs that ended without a run.
    pub(crate) fn new(
        registry: &Registry,
        slots: u32,
        labels: &[String],
        unrun: Unruns,
    ) -> prometheus::Result<Self> {
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        let metrics = Self {
            jobs: Arc::new(Jobs::new(labels, unrun)?),
            faults: IntCounterVec::new(
                Opts::new("hutch_faults_total", "Attempts that ended in a fault of this worker or its host."),
                &["reason"],
            )?,
            fenced: IntCounter::new(
                "hutch_leases_lost_total",
                "Results that were not wanted: the job had gone to another worker.",
            )?,
            running: IntGauge::new("hutch_jobs_running", "Jobs that run now.")?,
            queue_seconds: histogram(
                "hutch_job_queue_seconds",
                "Time between a job's submission and its start.",
                QUEUE_BUCKETS,
            )?,
            wall_seconds: histogram(
                "hutch_job_wall_seconds",
                "Time that a job's programs ran.",
                RUN_BUCKETS,
            )?,
            cpu_seconds: histogram(
                "hutch_job_cpu_seconds",
                "User and system time of a job's whole process tree.",
                RUN_BUCKETS,
            )?,
            memory_peak: histogram(
                "hutch_job_memory_peak_bytes",
                "The most memory that a job had at one time.",
                MEMORY_BUCKETS,
            )?,
            setup_seconds: histogram(
                "hutch_sandbox_setup_seconds",
                "Time to prepare a sandbox, until its program starts.",
                SANDBOX_BUCKETS,
            )?,
            teardown_seconds: histogram(
                "hutch_sandbox_teardown_seconds",
                "Time to take a sandbox down, as far as it delays the answer.",
                SANDBOX_BUCKETS,
            )?,
        };
        let all_slots = IntGauge::new("hutch_slots", "Jobs that may run at one time.")?;
        all_slots.set(i64::from(slots));
        registry.register(Box::new(all_slots))?;
        registry.register(Box::new(Shared(Arc::clone(&metrics.jobs))))?;
        registry.register(Box::new(metrics.faults.clone()))?;
        registry.register(Box::new(metrics.fenced.clone()))?;
        registry.register(Box::new(metrics.running.clone()))?;
        Ok(metrics)
    }

    /// A job has this result, made here.
    pub(crate) fn answered(&self, queue: &str, result: &Measured) {
        self.jobs.count(queue, result);
        if !result.sandboxed {
            return;
        }
        let Measured { usage, timeline, .. } = result;
        self.queue_seconds.observe(seconds(timeline.queue_ms, 1e3));
        self.wall_seconds.observe(seconds(usage.wall_time_ms, 1e3));
        self.cpu_seconds.observe(seconds(usage.cpu_user_ms + usage.cpu_system_ms, 1e3));
        self.memory_peak.observe(seconds(usage.memory_peak_bytes, 1.0));
        self.setup_seconds.observe(seconds(timeline.setup_us, 1e6));
        self.teardown_seconds.observe(seconds(timeline.teardown_us, 1e6));
    }

    /// An attempt ended in a fault of this host. Where it was the last, the queue counts the job.
    pub(crate) fn fault(&self, reason: Reason) {
        self.faults.with_label_values(&[reason.as_str()]).inc();
    }

    /// A result was not wanted.
    pub(crate) fn lease_lost(&self) {
        self.fenced.inc();
    }
}

/// A count as a floating-point number of a larger unit.
#[expect(clippy::cast_precision_loss, reason = "what Prometheus keeps is a double")]
pub(crate) fn seconds(count: u64, per_unit: f64) -> f64 {
    count as f64 / per_unit
}

#[cfg(test)]
mod tests {
    use hutch_proto::Timestamp;
    use prometheus::TextEncoder;

    use super::*;

    /// A job that was rejected says nothing of sandboxes.
    #[test]
    fn only_what_had_a_sandbox_is_measured() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry, 2, &[], Arc::new(Vec::new)).expect("metrics");
        let result = |reason| {
            let mut result =
                JobResult::without_run(JobId::generate(), BTreeMap::new(), Timestamp::now(), reason, "");
            result.timeline.started_at = Some(Timestamp::now());
            result
        };
        metrics.answered("default", &Measured::from(&result(Reason::ImageError)));
        let mut run = result(Reason::NonzeroExit);
        run.timeline.setup_us = 900;
        metrics.answered("default", &Measured::from(&run));
        let text = TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
        for histogram in ["sandbox_setup", "sandbox_teardown", "job_queue", "job_wall", "job_cpu"] {
            let row = format!("hutch_{histogram}_seconds_count 1");
            assert!(text.lines().any(|line| line == row), "{row}\n{text}");
        }
        assert!(text.contains("hutch_job_memory_peak_bytes_count 1"), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("hutch_jobs_total{")).count(), 2, "{text}");
    }
}
