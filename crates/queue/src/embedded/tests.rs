//! Faults of the database that no client can bring about from outside.

use std::time::Duration;

use hutch_proto::{Captured, JobState};
use rusqlite::Connection;
use tokio::time::timeout;

use super::*;
use crate::{Finished, Lease};

/// Refuses results of more than 100 kB, as SQLite does those of more than a gigabyte.
const REFUSES: &str = "CREATE TRIGGER refuse BEFORE INSERT ON results WHEN length(NEW.result) > 100000
    BEGIN SELECT zeroblob(2000000000); END;";

fn success(lease: &Lease, stdout: usize) -> JobResult {
    let labels = lease.job.labels.clone();
    let mut result =
        JobResult::without_run(lease.job.id, labels, lease.submitted_at, Reason::NonzeroExit, "");
    result.stdout = Captured { data: vec![b'x'; stdout], bytes: stdout as u64, truncated: false };
    result
}

#[tokio::test]
async fn a_result_that_is_too_big_is_not_tried_for_ever() {
    let directory = std::env::temp_dir().join(format!("hutch-queue-{}", JobId::generate()));
    std::fs::create_dir(&directory).unwrap();
    let path = directory.join("queue.db");
    let queue = EmbeddedQueue::open(&path, EmbeddedOptions::default()).unwrap();
    Connection::open(&path).unwrap().execute_batch(REFUSES).unwrap();
    let job = JobSpec::parse(br#"{"layers": ["host"], "command": ["true"], "max_attempts": 2}"#).unwrap();
    queue.submit(&job).await.unwrap();
    let config = ConsumerConfig {
        worker: "w".to_owned(),
        queues: vec![job.queue.clone()],
        lease: Duration::from_secs(30),
    };
    let mut consumer = queue.consumer(&config).await.unwrap();
    for attempt in 1..=2 {
        let lease = timeout(Duration::from_secs(10), consumer.take()).await.unwrap().unwrap();
        assert_eq!(lease.attempt, attempt);
        let big = success(&lease, 200_000);
        let told = timeout(Duration::from_secs(10), consumer.finish(lease, big)).await.unwrap();
        assert!(matches!(&told, Err(QueueError::Setup(why)) if why.contains("too big")), "{told:?}");
    }
    let view = queue.get(job.id).await.unwrap().unwrap();
    assert_eq!(view.state, JobState::Finished);
    let result = view.result.unwrap();
    assert_eq!(result.reason, Some(Reason::HostError));
    assert!(result.message.contains("too big"), "{}", result.message);

    // The slot is free, and the disk needs no rest.
    let next = JobSpec::parse(br#"{"layers": ["host"], "command": ["true"]}"#).unwrap();
    queue.submit(&next).await.unwrap();
    let lease = timeout(Duration::from_secs(10), consumer.take()).await.unwrap().unwrap();
    let small = success(&lease, 5);
    assert_eq!(consumer.finish(lease, small).await.unwrap(), Finished::Recorded);
    queue.close().await;
    std::fs::remove_dir_all(&directory).unwrap();
}
