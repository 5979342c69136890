//! A worker's end: it passes on what is asked to the slot's task, see [`super::slot`].

use async_trait::async_trait;
use hutch_proto::{JobId, JobResult};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::slot::Ask;
use crate::{Consumer, Finished, GiveBack, Lease, QueueError};

/// See the module.
pub(super) struct RabbitConsumer {
    asks: mpsc::Sender<Ask>,
    held: Option<(JobId, u64, CancellationToken)>,
    /// Dropped with the consumer, so that its slot gives up what it insists on.
    _gone: DropGuard,
}

impl RabbitConsumer {
    pub(super) fn new(asks: mpsc::Sender<Ask>, gone: CancellationToken) -> Self {
        Self { asks, held: None, _gone: gone.drop_guard() }
    }

    async fn ask<T>(
        &self,
        make: impl FnOnce(oneshot::Sender<Result<T, QueueError>>) -> Ask,
    ) -> Result<T, QueueError> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(make(reply)).await.map_err(|_| QueueError::Closed)?;
        answer.await.unwrap_or(Err(QueueError::Closed))
    }

    fn release(&mut self, token: u64) {
        self.held.take_if(|(_, held, _)| *held == token);
    }
}

#[async_trait]
impl Consumer for RabbitConsumer {
    async fn take(&mut self) -> Result<Lease, QueueError> {
        self.held = None;
        let (lease, wanted_off) = self.ask(|reply| Ask::Take { reply }).await?;
        self.held = Some((lease.job.id, lease.token.0, wanted_off));
        Ok(lease)
    }

    async fn finish(&mut self, lease: Lease, result: JobResult) -> Result<Finished, QueueError> {
        let token = lease.token.0;
        let (lease, result) = (Box::new(lease), Box::new(result));
        let outcome = self.ask(|reply| Ask::Finish { lease, result, reply }).await;
        self.release(token);
        outcome
    }

    async fn give_back(&mut self, lease: Lease, how: GiveBack) -> Result<(), QueueError> {
        let token = lease.token.0;
        let lease = Box::new(lease);
        let outcome = self.ask(|reply| Ask::GiveBack { lease, how, reply }).await;
        self.release(token);
        outcome
    }

    async fn cancelled(&mut self, id: JobId) {
        match &self.held {
            Some((held, _, wanted_off)) if *held == id => wanted_off.cancelled().await,
            _ => std::future::pending().await,
        }
    }
}
