//! One slot: takes a job, has it run, answers, and again.
//!
//! ```text
//!   connect -> take -> attempt -> finish      a verdict
//!      ^        |         |   `-> give back   a fault of the host (an attempt is spent), a drain (none)
//!      |        v         |
//!      +-- lost, closed   +-- meanwhile: a wish to cancel, a wish to end
//! ```
//!
//! The attempt is a task of its own, so that a panic in it ends it alone.

use std::sync::Arc;
use std::time::Duration;

use hutch_proto::{JobResult, Reason, Status};
use hutch_queue::{Consumer, ConsumerConfig, Finished, GiveBack, Lease, QueueError};
use hutch_sandbox::Remains;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::Drain;
use crate::attempt::{Attempt, Means, Outcome};
use crate::health::Health;
use crate::live::Live;
use crate::metrics::{Measured, Metrics};

/// How long to wait before a queue that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often a host that cannot take jobs is looked at again.
const UNFIT: Duration = Duration::from_secs(2);
/// How long an attempt that was told to end at once may still take.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// One slot of a worker.
pub(crate) struct Slot {
    pub(crate) number: u32,
    pub(crate) means: Means,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) live: Arc<Live>,
    pub(crate) health: Arc<Health>,
    pub(crate) drain: Drain,
}

/// An attempt that is over.
struct Ended {
    outcome: Outcome,
    /// It was cut short because the worker ends, and by nobody's wish.
    cut_short: bool,
}

impl Slot {
    /// Serves until the worker is told to end.
    pub(crate) async fn run(self) -> Result<(), QueueError> {
        while let Some(mut consumer) = self.connect().await? {
            match self.serve(consumer.as_mut()).await {
                Ok(()) => return Ok(()),
                Err(error @ QueueError::Setup(_)) => return Err(error),
                Err(QueueError::Closed) if self.drain.stop.is_cancelled() => return Ok(()),
                Err(error) => {
                    tracing::warn!(slot = self.number, %error, "the queue failed, connecting again")
                }
            }
            self.pause(RETRY).await;
        }
        Ok(())
    }

    /// An end of the queue; none if the worker is to end.
    async fn connect(&self) -> Result<Option<Box<dyn Consumer>>, QueueError> {
        let config = ConsumerConfig {
            worker: self.means.config.name.clone(),
            queues: self.means.config.queues.clone(),
            lease: self.means.config.lease,
        };
        loop {
            let consumer = tokio::select! {
                () = self.drain.stop.cancelled() => return Ok(None),
                consumer = self.means.queue.consumer(&config) => consumer,
            };
            match consumer {
                Ok(consumer) => return Ok(Some(consumer)),
                Err(error @ QueueError::Setup(_)) => return Err(error),
                Err(error) => tracing::debug!(slot = self.number, %error, "the queue cannot be reached yet"),
            }
            self.pause(RETRY).await;
        }
    }

    /// Takes and runs jobs; returns when the worker is to end.
    async fn serve(&self, consumer: &mut dyn Consumer) -> Result<(), QueueError> {
        let mut unfit = None;
        loop {
            if let Some(reason) = self.health.unfit() {
                if unfit.as_ref() != Some(&reason) {
                    tracing::warn!(slot = self.number, %reason, "no job is taken until this is mended");
                }
                unfit = Some(reason);
                self.pause(UNFIT).await;
                if self.drain.stop.is_cancelled() {
                    return Ok(());
                }
                continue;
            }
            unfit = None;
            let lease = tokio::select! {
                biased;
                () = self.drain.stop.cancelled() => return Ok(()),
                lease = consumer.take() => lease?,
            };
            self.job(consumer, lease).await?;
        }
    }

    /// Sees one job through.
    async fn job(&self, consumer: &mut dyn Consumer, lease: Lease) -> Result<(), QueueError> {
        let id = lease.job.id;
        tracing::info!(slot = self.number, %id, attempt = lease.attempt, queue = lease.job.queue, "a job begins");
        self.live.begin(self.number);
        self.metrics.running.inc();
        let ended = self.attempt(consumer, &lease).await;
        self.metrics.running.dec();
        let told = match ended {
            Ended { cut_short: true, .. } => {
                tracing::info!(slot = self.number, %id, "the worker ends, the job is given back");
                self.answer(consumer.give_back(lease, GiveBack::Unspent)).await
            }
            Ended { outcome: Outcome::Verdict(result, remains), .. } => {
                self.health.succeeded();
                let told = self.finish(consumer, lease, *result).await;
                take_down(remains).await;
                told
            }
            Ended { outcome: Outcome::Fault { .. }, .. } if !self.means.engine.is_alive() => {
                tracing::error!(slot = self.number, %id, "the launcher is gone, the job is given back");
                self.health
                    .breaks("the launcher is gone: no sandbox can be made any more; start the worker again");
                self.drain.stop.cancel();
                consumer.give_back(lease, GiveBack::Unspent).await
            }
            Ended { outcome: Outcome::Fault { reason, message }, .. } => {
                return self.fault(consumer, lease, reason, message).await;
            }
        };
        self.heard(told)
    }

    /// Has the attempt made, passing on what is wished meanwhile.
    async fn attempt(&self, consumer: &mut dyn Consumer, lease: &Lease) -> Ended {
        let cancel = CancellationToken::new();
        let attempt = Attempt {
            means: self.means.clone(),
            slot: self.number,
            job: lease.job.clone(),
            attempt: lease.attempt,
            submitted_at: lease.submitted_at,
            cancel: cancel.clone(),
            hurry: self.drain.hurry.clone(),
        };
        let mut attempt = tokio::spawn(attempt.run());
        let mut asked = false;
        loop {
            tokio::select! {
                ended = &mut attempt => return Ended { outcome: outcome_of(ended), cut_short: false },
                () = consumer.cancelled(lease.job.id), if !asked => {
                    tracing::info!(slot = self.number, id = %lease.job.id, "the job is cancelled");
                    asked = true;
                    cancel.cancel();
                }
                () = self.drain.hurry.cancelled() => {
                    cancel.cancel();
                    return last_words(attempt, asked).await;
                }
            }
        }
    }

    async fn finish(
        &self,
        consumer: &mut dyn Consumer,
        lease: Lease,
        result: JobResult,
    ) -> Result<(), QueueError> {
        let queue = lease.job.queue.clone();
        tracing::info!(
            slot = self.number, id = %result.id, status = %result.status,
            reason = result.reason.map_or("", Reason::as_str), "a job ends"
        );
        // The queue needs the result whole; what the metrics need of it is small.
        let measured = Measured::from(&result);
        match self.answer(consumer.finish(lease, result)).await {
            Ok(Finished::Recorded) => self.metrics.answered(&queue, &measured),
            Ok(Finished::AlreadyFinished) => {}
            Err(error @ QueueError::Setup(_)) => {
                // This result alone cannot be kept, and the queue has taken the job back.
                tracing::error!(slot = self.number, id = %measured.id, %error);
                self.metrics.fault(Reason::HostError);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Gives a job back that this host failed, and lets the host rest.
    async fn fault(
        &self,
        consumer: &mut dyn Consumer,
        lease: Lease,
        reason: Reason,
        message: String,
    ) -> Result<(), QueueError> {
        tracing::warn!(slot = self.number, id = %lease.job.id, attempt = lease.attempt, %reason, cause = message, "this host failed a job");
        let pause = self.health.failed(lease.job.id, &message);
        let told = self.answer(consumer.give_back(lease, GiveBack::Failed { reason, message })).await;
        if told.is_ok() {
            self.metrics.fault(reason);
        }
        self.heard(told)?;
        self.pause(pause).await;
        Ok(())
    }

    /// The queue's answer; a worker that must end at once waits for it only a little longer.
    async fn answer<T>(&self, answer: impl Future<Output = Result<T, QueueError>>) -> Result<T, QueueError> {
        let too_late = async {
            self.drain.hurry.cancelled().await;
            tokio::time::sleep(LAST_WORDS).await;
        };
        tokio::select! {
            answer = answer => answer,
            () = too_late => Err(QueueError::Unavailable("the worker ends before it answers".to_owned())),
        }
    }

    /// A lease that was lost is no reason to stop.
    fn heard(&self, told: Result<(), QueueError>) -> Result<(), QueueError> {
        match told {
            Err(error @ QueueError::Fenced(_)) => {
                tracing::warn!(slot = self.number, %error);
                self.metrics.lease_lost();
                Ok(())
            }
            told => told,
        }
    }

    /// Waits, but not beyond the worker's end.
    async fn pause(&self, how_long: Duration) {
        tokio::select! {
            () = self.drain.stop.cancelled() => {}
            () = tokio::time::sleep(how_long) => {}
        }
    }
}

/// Takes a job's dead sandboxes down; the slot takes no other job before.
async fn take_down(remains: Option<Box<Remains>>) {
    if tokio::task::spawn_blocking(move || drop(remains)).await.is_err() {
        tracing::error!("a sandbox could not be taken down, it is left for the reaper");
    }
}

/// What an attempt says after it was told to end at once. A verdict that it had reached by itself
/// stands; all else was cut short, unless somebody had asked for it.
async fn last_words(mut attempt: JoinHandle<Outcome>, asked: bool) -> Ended {
    let Ok(ended) = tokio::time::timeout(LAST_WORDS, &mut attempt).await else {
        attempt.abort();
        return Ended { outcome: Outcome::fault("it did not end when it was told to"), cut_short: true };
    };
    let outcome = outcome_of(ended);
    let cut_short = match &outcome {
        Outcome::Verdict(result, _) => result.status == Status::Cancelled && !asked,
        Outcome::Fault { .. } => true,
    };
    Ended { outcome, cut_short }
}

/// What a task says, or what its panic said.
fn outcome_of(ended: Result<Outcome, JoinError>) -> Outcome {
    ended.unwrap_or_else(|error| {
        let message = match error.try_into_panic() {
            Ok(panic) => panic
                .downcast_ref::<&str>()
                .map(|&text| text.to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default(),
            Err(error) => error.to_string(),
        };
        Outcome::fault(format!("the worker's own code failed: {message}"))
    })
}
