//! `hutch_jobs_total`: jobs by how they ended, whoever ended them.
//!
//! Those that a slot answered are counted then, with the labels that the config asks for. Those that
//! ended without a run are counted by the queue, without labels of their own; whenever the counter is
//! collected, it grows by what the queue has counted since.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use hutch_proto::{Reason, Status, is_name};
use hutch_queue::Unrun;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, Opts};

use crate::metrics::Measured;

/// The most different values of one label that comes from jobs; later ones become [`OTHER`].
const LABEL_VALUES: usize = 200;
/// What stands for the values beyond.
const OTHER: &str = "other";

/// Tells of all jobs that ended without a run.
pub(crate) type Unruns = Arc<dyn Fn() -> Vec<Unrun> + Send + Sync>;

/// See the module.
pub(crate) struct Jobs {
    rows: IntCounterVec,
    labels: Vec<JobLabel>,
    unrun: Unruns,
    /// What of them is in the rows.
    counted: Mutex<HashMap<(String, Status, Reason), u64>>,
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jobs").field("labels", &self.labels).finish_non_exhaustive()
    }
}

/// A label of jobs that the config makes a label of metrics, and the values it has had.
#[derive(Debug)]
struct JobLabel {
    name: String,
    seen: Mutex<BTreeSet<String>>,
}

impl JobLabel {
    fn value(&self, labels: &BTreeMap<String, String>) -> String {
        let value = labels.get(&self.name).map_or("", String::as_str);
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

impl Jobs {
    /// # Errors
    /// If a label cannot be a label of metrics.
    pub(crate) fn new(labels: &[String], unrun: Unruns) -> prometheus::Result<Self> {
        let names = metric_names(labels)?;
        let mut job_labels = vec!["queue", "status", "reason"];
        job_labels.extend(names.iter().map(String::as_str));
        let help = "Jobs that this worker answered, or its queue ended without a run, by how they ended.";
        Ok(Self {
            rows: IntCounterVec::new(Opts::new("hutch_jobs_total", help), &job_labels)?,
            labels: labels
                .iter()
                .map(|name| JobLabel { name: name.clone(), seen: Mutex::default() })
                .collect(),
            unrun,
            counted: Mutex::default(),
        })
    }

    /// Counts a job that was answered.
    pub(crate) fn count(&self, queue: &str, result: &Measured) {
        self.add(queue, result.status, result.reason, &result.labels, 1);
    }

    /// Counts what ended without a run since this was last asked.
    fn catch_up(&self) {
        // Asked under the lock: an older answer may not come after a newer one.
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        for Unrun { queue, status, reason, jobs } in (self.unrun)() {
            let before = counted.entry((queue.clone(), status, reason)).or_default();
            self.add(&queue, status, Some(reason), &BTreeMap::new(), jobs.saturating_sub(*before));
            *before = jobs;
        }
    }

    fn add(
        &self,
        queue: &str,
        status: Status,
        reason: Option<Reason>,
        labels: &BTreeMap<String, String>,
        jobs: u64,
    ) {
        let mut values =
            vec![queue.to_owned(), status.as_str().to_owned(), reason.map_or("", Reason::as_str).to_owned()];
        values.extend(self.labels.iter().map(|label| label.value(labels)));
        self.rows.with_label_values(&values).inc_by(jobs);
    }
}

/// A collector that a registry can own while others still see it.
#[derive(Debug, Clone)]
pub(crate) struct Shared(pub(crate) Arc<Jobs>);

impl Collector for Shared {
    fn desc(&self) -> Vec<&Desc> {
        self.0.rows.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.0.catch_up();
        self.0.rows.collect()
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use hutch_proto::{JobId, JobResult, Timestamp};
    use prometheus::{Registry, TextEncoder};

    use super::*;

    fn result(tenant: &str) -> Measured {
        let labels = BTreeMap::from([("tenant".to_owned(), tenant.to_owned())]);
        let now = Timestamp::now();
        Measured::from(&JobResult::without_run(JobId::generate(), labels, now, Reason::Requested, ""))
    }

    fn jobs(unrun: Unruns) -> (Registry, Arc<Jobs>) {
        let registry = Registry::new();
        let jobs = Arc::new(Jobs::new(&["tenant".to_owned()], unrun).expect("jobs"));
        registry.register(Box::new(Shared(Arc::clone(&jobs)))).expect("register");
        (registry, jobs)
    }

    /// Each is in the scrape that follows its end, and in every one once.
    #[test]
    fn what_ended_without_a_run_is_counted_once() {
        let ended: Arc<Mutex<Vec<Unrun>>> = Arc::default();
        let source = Arc::clone(&ended);
        let (registry, jobs) = jobs(Arc::new(move || source.lock().expect("lock").clone()));
        let rows = || -> Vec<String> {
            let text = TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
            text.lines().filter(|line| line.starts_with("hutch_jobs_total{")).map(str::to_owned).collect()
        };
        assert_eq!(rows(), Vec::<String>::new());
        let requested = |jobs| Unrun {
            queue: "default".to_owned(),
            status: Status::Cancelled,
            reason: Reason::Requested,
            jobs,
        };
        let row = |jobs: u64| {
            format!(
                r#"hutch_jobs_total{{queue="default",reason="requested",status="cancelled",tenant=""}} {jobs}"#
            )
        };
        *ended.lock().expect("lock") = vec![requested(2)];
        assert_eq!(rows(), [row(2)]);
        assert_eq!(rows(), [row(2)], "not twice");
        // One that a worker answered has the same labels.
        jobs.count("default", &result(""));
        *ended.lock().expect("lock") = vec![requested(3)];
        assert_eq!(rows(), [row(4)]);
    }

    #[test]
    fn a_label_of_jobs_has_a_bounded_number_of_values() {
        let (registry, jobs) = jobs(Arc::new(Vec::new));
        for n in 0..LABEL_VALUES + 50 {
            jobs.count("default", &result(&format!("t{n}")));
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
        let (registry, jobs) = jobs(Arc::new(Vec::new));
        jobs.count("default", &result("a\"} 1\nforged 2\n"));
        let text = TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
        assert!(!text.lines().any(|line| line.starts_with("forged")), "{text}");
    }

    #[test]
    fn labels_that_clash_are_refused() {
        for labels in [&["status"][..], &["a-b", "a.b"], &["1x"], &["with space"]] {
            let labels: Vec<String> = labels.iter().map(|&label| label.to_owned()).collect();
            let error = Jobs::new(&labels, Arc::new(Vec::new)).map(drop).expect_err("clash").to_string();
            assert!(error.contains("worker.metric_labels"), "{error}");
        }
    }
}
