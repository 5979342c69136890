//! The embedded queue: the contract, and what is its own.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hutch_proto::{JobId, JobState, Reason, Status};
use hutch_queue::embedded::{EmbeddedOptions, EmbeddedQueue};
use hutch_queue::{Queue, QueueError, Submitted};

use crate::home::{Home, consumer_of, job, success, take, unique, until};

struct Embedded {
    queue: Arc<EmbeddedQueue>,
    _directory: tempfile::TempDir,
    path: PathBuf,
}

impl Home for Embedded {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("queue.db");
        let queue = Arc::new(EmbeddedQueue::open(&path, EmbeddedOptions::default()).unwrap());
        Self { queue, path, _directory: directory }
    }

    fn queue(&self) -> Arc<dyn Queue> {
        self.queue.clone()
    }

    async fn dead_letters(&self) -> Vec<(JobId, String)> {
        let letters = self.queue.dead_letters(1000).await.unwrap();
        letters
            .into_iter()
            .map(|letter| (letter.id, format!("{}: {}", letter.reason, letter.message)))
            .collect()
    }
}

crate::suite::every_scenario!(Embedded);

#[tokio::test]
async fn a_second_owner_is_refused() {
    let home = Embedded::start().await;
    let error = EmbeddedQueue::open(&home.path, EmbeddedOptions::default()).unwrap_err();
    let QueueError::Setup(message) = error else { panic!("{error}") };
    assert!(message.contains("in use by another process"), "{message}");
    assert!(message.contains("queue.db"), "{message}");
    home.queue.close().await;
    EmbeddedQueue::open(&home.path, EmbeddedOptions::default()).unwrap();
}

/// The runtime of the first holder is frozen, as a process that is stopped would be.
#[test]
fn a_stale_lease_is_fenced() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (frozen, lively) = (runtime(), runtime());
    let home = frozen.block_on(Embedded::start());
    let (queue, name) = (home.queue(), unique("stale"));
    let spec = job(&name);
    let (mut first, lease) = frozen.block_on(async {
        queue.submit(&spec).await.unwrap();
        let mut consumer = consumer_of(&queue, &[&name], Duration::from_millis(100)).await;
        let lease = take(&mut consumer).await;
        (consumer, lease)
    });
    let (mut second, newer) = lively.block_on(async {
        let mut consumer = consumer_of(&queue, &[&name], Duration::from_secs(30)).await;
        let lease = take(&mut consumer).await;
        (consumer, lease)
    });
    assert_eq!(newer.job.id, spec.id);
    assert_eq!((lease.attempt, newer.attempt), (1, 2));
    assert!(newer.token.0 > lease.token.0);
    frozen.block_on(async {
        // The holder is told to stop, and its result is not wanted.
        first.cancelled(spec.id).await;
        let stale = success(&lease, "stale");
        assert!(matches!(first.finish(lease, stale).await, Err(QueueError::Fenced(id)) if id == spec.id));
    });
    lively.block_on(async {
        let fresh = success(&newer, "fresh");
        second.finish(newer, fresh.clone()).await.unwrap();
        assert_eq!(queue.get(spec.id).await.unwrap().unwrap().result, Some(fresh));
    });
}

/// A holder that lives keeps its lease for longer than the lease's length.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_kept_while_its_holder_lives() {
    let home = Embedded::start().await;
    let (queue, name) = (home.queue(), unique("kept"));
    queue.submit(&job(&name)).await.unwrap();
    let mut first = consumer_of(&queue, &[&name], Duration::from_millis(200)).await;
    let mut second = consumer_of(&queue, &[&name], Duration::from_millis(200)).await;
    let lease = take(&mut first).await;
    let taken = tokio::time::timeout(Duration::from_secs(1), second.take()).await;
    assert!(taken.is_err(), "the job was handed out twice");
    let answer = success(&lease, "");
    first.finish(lease, answer).await.unwrap();
}

/// Not a test: the process that [`what_was_accepted_survives_kill_9`] kills. It submits jobs without
/// end, and writes down each id only once it was accepted; one job it takes and never finishes.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "only run by another test, as a child"]
async fn crash_child() {
    let Ok(path) = std::env::var("HUTCH_TEST_CRASH_DB") else { return };
    let queue: Arc<dyn Queue> =
        Arc::new(EmbeddedQueue::open(path.as_ref(), EmbeddedOptions::default()).unwrap());
    let mut ledger = std::fs::File::create(format!("{path}.ledger")).unwrap();
    let mut consumer = consumer_of(&queue, &["crash"], Duration::from_secs(30)).await;
    let finished = job("crash");
    queue.submit(&finished).await.unwrap();
    let lease = take(&mut consumer).await;
    let answer = success(&lease, "done");
    consumer.finish(lease, answer).await.unwrap();
    writeln!(ledger, "finished {}", finished.id).unwrap();
    let held = job("crash");
    queue.submit(&held).await.unwrap();
    let _lease = take(&mut consumer).await;
    writeln!(ledger, "held {}", held.id).unwrap();
    loop {
        let spec = job("crash");
        queue.submit(&spec).await.unwrap();
        writeln!(ledger, "queued {}", spec.id).unwrap();
    }
}

#[tokio::test]
async fn what_was_accepted_survives_kill_9() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("queue.db");
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "embedded::crash_child", "--ignored", "--nocapture"])
        .env("HUTCH_TEST_CRASH_DB", &path)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let ledger = directory.path().join("queue.db.ledger");
    let read = || std::fs::read_to_string(&ledger).unwrap_or_default();
    until("the child to accept jobs", || async { (read().lines().count() > 20).then_some(()) }).await;
    child.kill().unwrap();
    child.wait().unwrap();

    let queue: Arc<dyn Queue> = Arc::new(EmbeddedQueue::open(&path, EmbeddedOptions::default()).unwrap());
    let mut accepted = Vec::new();
    for line in read().lines() {
        // The last line may be torn.
        let Some((what, id)) = line.split_once(' ') else { continue };
        let Ok(id) = id.parse::<JobId>() else { continue };
        let view = queue.get(id).await.unwrap().unwrap_or_else(|| panic!("{id} was accepted and is lost"));
        let expected = if what == "finished" { JobState::Finished } else { JobState::Queued };
        assert_eq!(view.state, expected, "{what}");
        accepted.push((what.to_owned(), id));
    }
    let mut consumer = consumer_of(&queue, &["crash"], Duration::from_secs(30)).await;
    let lease = take(&mut consumer).await;
    let held = accepted.iter().find(|(what, _)| what == "held").unwrap();
    assert_eq!((lease.job.id, lease.attempt), (held.1, 2), "its attempt was spent, and it comes first");
}

/// As above, with a job that had only one attempt.
#[tokio::test]
async fn a_crash_with_the_last_attempt_settles_the_job() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("queue.db");
    let mut spec = job("last");
    spec.max_attempts = 1;
    let open = || Arc::new(EmbeddedQueue::open(&path, EmbeddedOptions::default()).unwrap());
    let first = open();
    let queue: Arc<dyn Queue> = first.clone();
    queue.submit(&spec).await.unwrap();
    let mut consumer = consumer_of(&queue, &["last"], Duration::from_secs(30)).await;
    let _lease = take(&mut consumer).await;
    // The file is let go while the lease is held: for it, the same as a crash.
    first.close().await;
    let second = open();
    let result = second.get(spec.id).await.unwrap().unwrap().result.unwrap();
    assert_eq!((result.status, result.reason), (Status::InfraError, Some(Reason::WorkerLost)));
    assert_eq!(result.worker, "w-test");
    assert_eq!(second.dead_letters(10).await.unwrap()[0].id, spec.id);
    assert!(matches!(consumer.take().await, Err(QueueError::Closed)));
    assert!(!first.connected());
}

#[tokio::test]
async fn the_wish_to_cancel_survives_a_crash() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("queue.db");
    let spec = job("wish");
    let open = || Arc::new(EmbeddedQueue::open(&path, EmbeddedOptions::default()).unwrap());
    let first = open();
    let queue: Arc<dyn Queue> = first.clone();
    queue.submit(&spec).await.unwrap();
    let mut consumer = consumer_of(&queue, &["wish"], Duration::from_secs(30)).await;
    let _lease = take(&mut consumer).await;
    queue.cancel(spec.id).await.unwrap();
    first.close().await;
    let result = open().get(spec.id).await.unwrap().unwrap().result.unwrap();
    assert_eq!((result.status, result.reason), (Status::Cancelled, Some(Reason::Requested)));
}

#[tokio::test]
async fn old_jobs_are_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("queue.db");
    let spec = job("old");
    {
        let queue = EmbeddedQueue::open(&path, EmbeddedOptions::default()).unwrap();
        queue.submit(&spec).await.unwrap();
        queue.cancel(spec.id).await.unwrap();
        queue.close().await;
    }
    let options = EmbeddedOptions { keep_finished: Some(Duration::ZERO), ..EmbeddedOptions::default() };
    let queue = EmbeddedQueue::open(&path, options).unwrap();
    until("the job to be forgotten", || async { queue.get(spec.id).await.unwrap().is_none().then_some(()) })
        .await;
    assert_eq!(queue.submit(&spec).await.unwrap(), Submitted::New);
}
