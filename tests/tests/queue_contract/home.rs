//! What the suite needs of a home, and the little helpers that its tests share.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use hutch_proto::{Captured, JobId, JobResult, JobSpec, JobState, JobView, Reason, Status, Timestamp};
use hutch_queue::{Consumer, ConsumerConfig, Lease, Queue};

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// One home of the queue, set up for one test.
pub(crate) trait Home {
    /// A fresh home.
    async fn start() -> Self;

    /// The gateway's and the worker's end.
    fn queue(&self) -> Arc<dyn Queue>;

    /// The ids and reasons of dead letters.
    async fn dead_letters(&self) -> Vec<(JobId, String)>;
}

/// A name that no other test uses.
pub(crate) fn unique(name: &str) -> String {
    format!("{name}-{}", &JobId::generate().uuid().simple().to_string()[20..])
}

pub(crate) fn job(queue: &str) -> JobSpec {
    let json = serde_json::json!({"layers": ["host"], "command": ["true"], "queue": queue});
    JobSpec::parse(json.to_string().as_bytes()).unwrap()
}

pub(crate) fn success(lease: &Lease, stdout: &str) -> JobResult {
    let mut result = JobResult::without_run(
        lease.job.id,
        lease.job.labels.clone(),
        lease.submitted_at,
        Reason::NonzeroExit,
        "",
    );
    result.status = Status::Succeeded;
    result.reason = None;
    result.attempt = lease.attempt;
    result.worker = "w-test".to_owned();
    result.exit_code = Some(0);
    result.stdout =
        Captured { data: stdout.as_bytes().to_vec(), bytes: stdout.len() as u64, truncated: false };
    result.timeline.started_at = Some(Timestamp::now());
    result
}

pub(crate) async fn consumer(queue: &Arc<dyn Queue>, name: &str) -> Box<dyn Consumer> {
    consumer_of(queue, &[name], Duration::from_secs(30)).await
}

pub(crate) async fn consumer_of(
    queue: &Arc<dyn Queue>,
    names: &[&str],
    lease: Duration,
) -> Box<dyn Consumer> {
    let config = ConsumerConfig {
        worker: "w-test".to_owned(),
        queues: names.iter().map(|&name| name.to_owned()).collect(),
        lease,
    };
    queue.consumer(&config).await.unwrap()
}

/// The next job, which must come.
pub(crate) async fn take(consumer: &mut Box<dyn Consumer>) -> Lease {
    soon("a job to take", consumer.take()).await.unwrap()
}

/// Waits for a future that must complete.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited {PATIENCE:?} in vain for {what}"),
    }
}

/// Looks again and again until `probe` gives something.
pub(crate) async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut probe: impl FnMut() -> F) -> T {
    soon(what, async {
        loop {
            if let Some(found) = probe().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
}

/// The job once it is in this state.
pub(crate) async fn view(queue: &Arc<dyn Queue>, id: JobId, state: JobState) -> JobView {
    until("the job's state", || async { queue.get(id).await.unwrap().filter(|view| view.state == state) })
        .await
}

/// The job's result once it is there.
pub(crate) async fn result(queue: &Arc<dyn Queue>, id: JobId) -> JobResult {
    view(queue, id, JobState::Finished).await.result.unwrap()
}
