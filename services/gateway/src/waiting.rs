//! Waits for a job's result.

use std::time::Duration;

use hutch_proto::{JobId, JobResult};
use tokio::time::{Instant, sleep};

use crate::Gateway;
use crate::hub::Listener;
use crate::problem::Problem;

/// How often the queue is asked, since events may be lost.
const ASK: Duration = Duration::from_secs(2);
/// How long to wait at first for a result that was told of and cannot be looked up yet.
const SOON: Duration = Duration::from_millis(2);

/// The result of a job, if it comes by the deadline.
pub(crate) async fn result(
    gateway: &Gateway,
    id: JobId,
    deadline: Instant,
) -> Result<Option<JobResult>, Problem> {
    let mut listener = gateway.hub.listener(id);
    let mut soon = SOON;
    loop {
        let view = gateway.ask(gateway.queue.get(id)).await?;
        if let Some(result) = view.and_then(|view| view.result) {
            return Ok(Some(result));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || gateway.closing.is_cancelled() {
            return Ok(None);
        }
        if gateway.hub.has_finished(id) {
            sleep(soon.min(left)).await;
            soon = (soon * 2).min(ASK);
            continue;
        }
        tokio::select! {
            () = gateway.closing.cancelled() => {}
            () = sleep(ASK.min(left)) => {}
            () = told_of_end(gateway, id, &mut listener) => {}
        }
    }
}

/// Completes when it is told that the job has ended.
async fn told_of_end(gateway: &Gateway, id: JobId, listener: &mut Listener) {
    while !gateway.hub.has_finished(id) {
        listener.changed().await;
    }
}
