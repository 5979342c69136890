//! What a worker is told once, at its start.

use std::path::PathBuf;
use std::time::Duration;

/// How a [`Worker`](crate::Worker) goes about its jobs.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Its name; in results and events.
    pub name: String,
    /// The queues that it takes from.
    pub queues: Vec<String>,
    /// How many jobs run at one time.
    pub slots: u32,
    /// How long running jobs may go on when the worker is told to stop.
    pub drain_grace: Duration,
    /// How long a lease lives without a sign of life (embedded queue).
    pub lease: Duration,
    /// Labels of jobs that become labels of `hutch_jobs_total`.
    pub metric_labels: Vec<String>,
    /// How many bytes the blobs of one job may have together; they are held in memory.
    pub max_input_bytes: u64,
    /// How long a blob store that cannot be reached is waited for, job in hand.
    pub store_patience: Duration,
    /// Whether jobs are taken only once attacks on a sandbox of its own were held.
    pub prove: bool,
    /// The directory whose file system must have room before a job is taken.
    pub data_dir: PathBuf,
}

impl WorkerConfig {
    /// The defaults, under this name and above this directory.
    #[must_use]
    pub fn new(name: String, data_dir: PathBuf) -> Self {
        Self {
            name,
            queues: vec!["default".to_owned()],
            slots: 1,
            drain_grace: Duration::from_secs(30),
            lease: Duration::from_secs(30),
            metric_labels: Vec::new(),
            max_input_bytes: 256 << 20,
            store_patience: Duration::from_secs(600),
            prove: true,
            data_dir,
        }
    }
}
