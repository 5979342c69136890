//! What a worker counts. Base units; no label has more values than is known beforehand.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};

use hutch_proto::{JobResult, Reason, is_name};
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

/// The most different values of one label that comes from jobs; later ones become [`OTHER`].
const LABEL_VALUES: usize = 200;
/// What stands for the values beyond.
const OTHER: &str = "other";

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
    jobs: IntCounterVec,
    labels: Vec<JobLabel>,
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

/// A label of jobs that the config makes a label of metrics, and the values it has had.
#[derive(Debug)]
struct JobLabel {
    name: String,
    seen: Mutex<BTreeSet<String>>,
}

impl JobLabel {
    fn value(&self, result: &JobResult) -> String {
        let value = result.labels.get(&self.name).map_or("", String::as_str);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.contains(value) {
            return value.to_owned();
        }
        if seen.len() >= LABEL_VALUES {
            return OTHER.to_owned();
        }
        seen.insert(value.to_owned());
        value.to_owned()
    }
}

impl Metrics {
    /// Registers everything.
    pub(crate) fn new(registry: &Registry, slots: u32, labels: &[String]) -> prometheus::Result<Self> {
        let names = metric_names(labels)?;
        let mut job_labels = vec!["queue", "status", "reason"];
        job_labels.extend(names.iter().map(String::as_str));
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        let metrics = Self {
            jobs: IntCounterVec::new(
                Opts::new("hutch_jobs_total", "Jobs that this worker answered, by how they ended."),
                &job_labels,
            )?,
            labels: labels
                .iter()
                .map(|name| JobLabel { name: name.clone(), seen: Mutex::default() })
                .collect(),
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
        registry.register(Box::new(metrics.jobs.clone()))?;
        registry.register(Box::new(metrics.faults.clone()))?;
        registry.register(Box::new(metrics.fenced.clone()))?;
        registry.register(Box::new(metrics.running.clone()))?;
        Ok(metrics)
    }

    /// A job has this result, made here.
    pub(crate) fn answered(&self, queue: &str, result: &JobResult) {
        self.count(queue, result.reason, result.status.as_str(), result);
        let Some(_) = result.timeline.started_at else { return };
        let usage = &result.usage;
        self.queue_seconds.observe(seconds(result.timeline.queue_ms, 1e3));
        self.wall_seconds.observe(seconds(usage.wall_time_ms, 1e3));
        self.cpu_seconds.observe(seconds(usage.cpu_user_ms + usage.cpu_system_ms, 1e3));
        self.memory_peak.observe(seconds(usage.memory_peak_bytes, 1.0));
        self.setup_seconds.observe(seconds(result.timeline.setup_us, 1e6));
        self.teardown_seconds.observe(seconds(result.timeline.teardown_us, 1e6));
    }

    /// An attempt ended in a fault of this host; `last` if it spent the job's last attempt.
    pub(crate) fn fault(&self, queue: &str, reason: Reason, last: Option<&JobResult>) {
        self.faults.with_label_values(&[reason.as_str()]).inc();
        if let Some(result) = last {
            self.count(queue, Some(reason), reason.status().as_str(), result);
        }
    }

    /// A result was not wanted.
    pub(crate) fn lease_lost(&self) {
        self.fenced.inc();
    }

    fn count(&self, queue: &str, reason: Option<Reason>, status: &str, result: &JobResult) {
        let mut values =
            vec![queue.to_owned(), status.to_owned(), reason.map_or("", Reason::as_str).to_owned()];
        values.extend(self.labels.iter().map(|label| label.value(result)));
        self.jobs.with_label_values(&values).inc();
    }
}

/// The names that jobs' labels have as labels of metrics.
fn metric_names(labels: &[String]) -> prometheus::Result<Vec<String>> {
    let mut taken = HashMap::from([("queue", ""), ("status", ""), ("reason", "")]);
    let names: Vec<String> = labels.iter().map(|label| metric_name(label)).collect();
    for (label, name) in labels.iter().zip(&names) {
        let fine = is_name(label) && !name.starts_with(|first: char| first.is_ascii_digit());
        if !fine || taken.insert(name, label).is_some() {
            return Err(prometheus::Error::Msg(format!(
                "worker.metric_labels: `{label}` cannot be a label of metrics: it must begin with a letter, \
                 and differ from the others and from queue, status and reason"
            )));
        }
    }
    Ok(names)
}

fn metric_name(label: &str) -> String {
    label.replace(['-', '.'], "_")
}

/// A count as a floating-point number of a larger unit.
#[expect(clippy::cast_precision_loss, reason = "what Prometheus keeps is a double")]
pub(crate) fn seconds(count: u64, per_unit: f64) -> f64 {
    count as f64 / per_unit
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use hutch_proto::{JobId, Timestamp};
    use prometheus::TextEncoder;

    use super::*;

    fn result(tenant: &str) -> JobResult {
        let labels = BTreeMap::from([("tenant".to_owned(), tenant.to_owned())]);
        JobResult::without_run(JobId::generate(), labels, Timestamp::now(), Reason::Requested, "")
    }

    #[test]
    fn a_label_of_jobs_has_a_bounded_number_of_values() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry, 2, &["tenant".to_owned()]).expect("metrics");
        for n in 0..LABEL_VALUES + 50 {
            metrics.answered("default", &result(&format!("t{n}")));
        }
        let text = TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
        let rows = text.lines().filter(|line| line.starts_with("hutch_jobs_total{")).count();
        assert_eq!(rows, LABEL_VALUES + 1);
        assert!(text.contains(
            r#"hutch_jobs_total{queue="default",reason="requested",status="cancelled",tenant="other"} 50"#
        ));
    }

    #[test]
    fn values_cannot_forge_a_metric() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry, 2, &["tenant".to_owned()]).expect("metrics");
        metrics.answered("default", &result("a\"} 1\nforged 2\n"));
        let text = TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
        assert!(!text.lines().any(|line| line.starts_with("forged")), "{text}");
    }

    #[test]
    fn labels_that_clash_are_refused() {
        for labels in [&["status"][..], &["a-b", "a.b"], &["1x"], &["with space"]] {
            let labels: Vec<String> = labels.iter().map(|&label| label.to_owned()).collect();
            let error = Metrics::new(&Registry::new(), 1, &labels).expect_err("clash").to_string();
            assert!(error.contains("worker.metric_labels"), "{error}");
        }
    }
}
