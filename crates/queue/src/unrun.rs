//! Counts the jobs that ended without a run.
//!
//! A worker counts what it has answered. A job that is cancelled or expires while it waits, or that
//! comes back with no attempt left, ends in the queue, and no worker hears of it; so the queue counts.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use hutch_proto::{JobResult, Reason, Status};

/// The most queues that are told apart; those beyond are [`OTHER`]. Whoever submits chooses the names.
const QUEUES: usize = 200;
/// Stands for the queues beyond. No queue has this name: it has a character that names may not have.
const OTHER: &str = "(other)";

/// How many jobs of one queue this process has ended in one way, without a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unrun {
    /// The queue's name, such as `default`.
    pub queue: String,
    /// How they ended.
    pub status: Status,
    /// Why.
    pub reason: Reason,
    /// How many, since the queue was opened.
    pub jobs: u64,
}

/// The counts of one queue's process.
#[derive(Debug, Default)]
pub(crate) struct Tally(Mutex<BTreeMap<String, Vec<Unrun>>>);

impl Tally {
    /// Counts a job that ends now.
    pub(crate) fn count(&self, queue: &str, result: &JobResult) {
        let Some(reason) = result.reason else { return };
        let mut queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = if queues.len() < QUEUES || queues.contains_key(queue) { queue } else { OTHER };
        let ends = queues.entry(queue.to_owned()).or_default();
        match ends.iter_mut().find(|end| (end.status, end.reason) == (result.status, reason)) {
            Some(end) => end.jobs += 1,
            None => ends.push(Unrun { queue: queue.to_owned(), status: result.status, reason, jobs: 1 }),
        }
    }

    /// All counts.
    pub(crate) fn all(&self) -> Vec<Unrun> {
        let queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        queues.values().flatten().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use hutch_proto::{JobId, Timestamp};

    use super::*;

    #[test]
    fn the_number_of_queues_is_bounded() {
        let tally = Tally::default();
        let labels = BTreeMap::new();
        let result = JobResult::without_run(JobId::generate(), labels, Timestamp::now(), Reason::Expired, "");
        for number in 0..QUEUES + 50 {
            tally.count(&format!("q{number}"), &result);
        }
        tally.count("q0", &result);
        let all = tally.all();
        assert_eq!(all.len(), QUEUES + 1);
        let jobs = |queue: &str| all.iter().find(|end| end.queue == queue).map(|end| end.jobs);
        assert_eq!((jobs("q0"), jobs("q1"), jobs(OTHER)), (Some(2), Some(1), Some(50)));
    }
}
