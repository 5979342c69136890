//! One slot's end of the embedded queue.
//!
//! While a lease is held, a keeper tells the writer that its holder lives, three times in the
//! lease's length. A holder that is frozen with its runtime stops telling, and the lease runs out.
//! A consumer that is dropped with a lease gives the job back as lost, at once.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hutch_proto::{JobId, JobResult, Reason};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::Inner;
use super::schema::Record;
use super::writer::{Command, Granted, Reply, Waiter};
use crate::{Consumer, ConsumerConfig, Finished, GiveBack, Lease, QueueError};

/// The shortest lease: below it, a busy machine would end leases of those who live.
const SHORTEST_LEASE: Duration = Duration::from_millis(100);
/// The longest pause before a result that could not be written is tried again.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// See the module.
pub(super) struct EmbeddedConsumer {
    inner: Arc<Inner>,
    worker: String,
    queues: Vec<String>,
    lease: Duration,
    held: Option<Held>,
}

struct Held {
    id: JobId,
    token: u64,
    wanted_off: CancellationToken,
    _keeper: AbortOnDropHandle<()>,
}

impl EmbeddedConsumer {
    pub(super) fn new(inner: Arc<Inner>, config: &ConsumerConfig) -> Self {
        Self {
            inner,
            worker: config.worker.clone(),
            queues: config.queues.clone(),
            lease: config.lease.max(SHORTEST_LEASE),
            held: None,
        }
    }

    fn hold(&mut self, granted: Granted) -> Option<Lease> {
        let (lease, wanted_off) = granted.accept()?;
        let token = lease.token.0;
        let keeper = tokio::spawn(keep(Arc::clone(&self.inner), token, self.lease / 3));
        let keeper = AbortOnDropHandle::new(keeper);
        self.held = Some(Held { id: lease.job.id, token, wanted_off, _keeper: keeper });
        Some(lease)
    }

    /// Gives back what is held, as lost.
    fn drop_held(&mut self) {
        if let Some(held) = self.held.take() {
            let how = GiveBack::Failed {
                reason: Reason::WorkerLost,
                message: format!("{} let it go without a word", self.worker),
            };
            let lost = Command::GiveBack { token: held.token, how, id: held.id, reply: None };
            // Where the writer has ended, the next start does the same.
            let _ = self.inner.send(lost);
        }
    }

    /// Sends the command that `make` makes until it is done, one way or the other.
    async fn insist<T>(&self, mut make: impl FnMut(Reply<T>) -> Command) -> Result<T, QueueError> {
        let mut pause = Duration::from_millis(50);
        loop {
            let (reply, answer) = oneshot::channel();
            match self.inner.ask(make(reply), answer).await {
                Err(QueueError::Unavailable(why)) => {
                    tracing::warn!(worker = %self.worker, why, "trying again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                outcome => return outcome,
            }
        }
    }

    fn release(&mut self, token: u64) {
        self.held.take_if(|held| held.token == token);
    }
}

async fn keep(inner: Arc<Inner>, token: u64, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        if inner.send(Command::Keep { token }).is_err() {
            return;
        }
    }
}

#[async_trait]
impl Consumer for EmbeddedConsumer {
    async fn take(&mut self) -> Result<Lease, QueueError> {
        self.drop_held();
        loop {
            let (reply, answer) = oneshot::channel();
            let (queues, worker) = (self.queues.clone(), self.worker.clone());
            let waiter = Waiter { queues, worker, lease: self.lease, reply };
            let granted = self.inner.ask(Command::Take(waiter), answer).await?;
            if let Some(lease) = self.hold(granted) {
                return Ok(lease);
            }
        }
    }

    async fn finish(&mut self, lease: Lease, mut result: JobResult) -> Result<Finished, QueueError> {
        let token = lease.token.0;
        crate::cap::fit(&mut result);
        let record = Record::new(result)
            .map_err(|e| QueueError::Setup(format!("the result of {} is no JSON: {e}", lease.job.id)))?;
        let record = Arc::new(record);
        let outcome = self
            .insist(|reply| Command::Finish { token, id: lease.job.id, record: Arc::clone(&record), reply })
            .await;
        if let Err(QueueError::Setup(why)) = &outcome {
            let how = GiveBack::Failed { reason: Reason::HostError, message: why.clone() };
            self.give_back(lease, how).await?;
        }
        self.release(token);
        outcome
    }

    async fn give_back(&mut self, lease: Lease, how: GiveBack) -> Result<(), QueueError> {
        let (token, id) = (lease.token.0, lease.job.id);
        let outcome =
            self.insist(|reply| Command::GiveBack { token, id, how: how.clone(), reply: Some(reply) }).await;
        self.release(token);
        outcome
    }

    async fn cancelled(&mut self, id: JobId) {
        match &self.held {
            Some(held) if held.id == id => held.wanted_off.cancelled().await,
            _ => std::future::pending().await,
        }
    }
}

impl Drop for EmbeddedConsumer {
    fn drop(&mut self) {
        self.drop_held();
    }
}
