//! What the parts of one RabbitMQ queue share, and how a job ends.
//!
//! The end of a job, in order, whoever brings it about: the terminal record is created in the store
//! (or the one that is there is taken); its bytes are published and confirmed; it is told as an
//! event; who asked for a reply gets one, confirmed; only then is the message acknowledged. A crash
//! between any two steps leaves the message on the broker, and whoever gets it next finds the record.
//!
//! Jobs in the hands of this process are registered by id. A second message of the same job, be it a
//! copy that somebody published or the broker's redelivery after a cut connection, is not run beside
//! the first: it joins it, and is acknowledged with it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use hutch_proto::{Event, JobId, JobResult, Reason};
use lapin::options::{BasicAckOptions, BasicNackOptions};
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::bell::Bell;
use super::index::{Entry, Index};
use super::message::{self, Message, Parcel, ReplyTo};
use super::publisher::{PublishError, Publisher};
use super::records::{Record, Records};
use super::supervisor::{Link, STEP, describe};
use super::topology::{self, Source};
use crate::calls::Switchboard;
use crate::sequence::Sequences;
use crate::unrun::Tally;
use crate::{Finished, QueueError};

/// How long a queue that was deleted stays so.
const DELETED_PAUSE: Duration = Duration::from_millis(500);

/// See the module.
pub(super) struct Core {
    pub(super) publish: Link,
    pub(super) consume: Link,
    pub(super) publisher: Publisher,
    pub(super) records: Records,
    pub(super) index: Option<Index>,
    pub(super) known: Known,
    /// Bands by queue, as far as this process has heard of them.
    pub(super) bands: watch::Sender<BTreeMap<String, BTreeSet<u8>>>,
    pub(super) bell: Bell,
    pub(super) events: broadcast::Sender<Event>,
    pub(super) events_out: mpsc::Sender<Message>,
    pub(super) sequences: Sequences,
    pub(super) calls: Switchboard,
    pub(super) redeliveries: AtomicU64,
    pub(super) unrun: Tally,
    /// A job that expires was submitted.
    pub(super) new_expiry: Notify,
    pub(super) lost_grace: Duration,
    pub(super) closing: CancellationToken,
    pub(super) held: Mutex<HashMap<JobId, Held>>,
    /// Held during a pass of [`super::sort`].
    pub(super) sorting: tokio::sync::Mutex<()>,
    pub(super) tokens: AtomicU64,
}

/// Queues that were declared, to be declared again on every new connection.
pub(super) type Known = Arc<Mutex<BTreeSet<Source>>>;

/// A job that is in the hands of this process.
pub(super) struct Held {
    pub(super) token: u64,
    pub(super) wanted_off: CancellationToken,
    /// The job's messages; the first one is what it is run for.
    pub(super) parcels: Vec<Parcel>,
    /// Whether the store has something of it to be removed at its end.
    pub(super) litter: bool,
}

/// What became of a message that names a job.
pub(super) enum Hold {
    /// The job is this caller's now.
    Taken { token: u64, wanted_off: CancellationToken },
    /// The job was in hand already; the message went to it.
    Joined,
}

impl Core {
    /// Registers a job as in hand, or joins the message to it.
    pub(super) fn hold(&self, id: JobId, parcel: Parcel) -> Hold {
        let mut held = self.lock_held();
        if let Some(there) = held.get_mut(&id) {
            there.parcels.push(parcel);
            return Hold::Joined;
        }
        let token = self.tokens.fetch_add(1, Ordering::Relaxed);
        let wanted_off = CancellationToken::new();
        let entry = Held { token, wanted_off: wanted_off.clone(), parcels: vec![parcel], litter: false };
        held.insert(id, entry);
        Hold::Taken { token, wanted_off }
    }

    /// Whether the job is in hand under this token.
    pub(super) fn holds(&self, id: JobId, token: u64) -> bool {
        self.lock_held().get(&id).is_some_and(|held| held.token == token)
    }

    pub(super) fn mark_litter(&self, id: JobId) {
        if let Some(held) = self.lock_held().get_mut(&id) {
            held.litter = true;
        }
    }

    pub(super) fn lock_held(&self) -> MutexGuard<'_, HashMap<JobId, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a job that is in hand, with `record` or the one that there is already. Its messages are
    /// returned: they may now be acknowledged.
    pub(super) async fn conclude(
        &self,
        record: Record,
        queue: &str,
        gone: &CancellationToken,
    ) -> Result<(Finished, Vec<Parcel>), QueueError> {
        let there = self.insist(gone, || self.records.create(&record)).await?;
        let (record, finished) = match there {
            None => (record, Finished::Recorded),
            Some(there) => (there, Finished::AlreadyFinished),
        };
        self.pronounce(&record, queue, gone).await?;
        Ok((finished, self.let_go(&record, gone).await?))
    }

    /// The same, for a job that no program decided over.
    pub(super) async fn conclude_without_run(
        &self,
        result: JobResult,
        queue: &str,
        gone: &CancellationToken,
    ) -> Result<Vec<Parcel>, QueueError> {
        let record = Record::new(result)?;
        let (finished, done) = self.conclude(record.clone(), queue, gone).await?;
        if finished == Finished::Recorded {
            self.unrun.count(queue, &record.result);
        }
        Ok(done)
    }

    /// Publishes a record, and tells of it.
    pub(super) async fn pronounce(
        &self,
        record: &Record,
        queue: &str,
        gone: &CancellationToken,
    ) -> Result<(), QueueError> {
        let event = self.sequences.finished(&record.result);
        let message = message::result(record, queue, Some(event.seq));
        self.insist(gone, || async { Ok(self.publisher.publish(&message).await?) }).await?;
        self.tell(&event);
        Ok(())
    }

    /// Ends a job that waits on the broker: its message is settled by the record when it is taken.
    pub(super) async fn pronounce_without_run(
        &self,
        entry: &Entry,
        reason: Reason,
        message: &str,
    ) -> Result<(), QueueError> {
        let (id, labels) = (entry.id, entry.labels.clone());
        let record = Record::new(JobResult::without_run(id, labels, entry.submitted_at, reason, message))?;
        let there = self.records.create(&record).await?;
        if there.is_none() {
            self.unrun.count(&entry.queue, &record.result);
        }
        self.pronounce(&there.unwrap_or(record), &entry.queue, &self.closing).await
    }

    /// Answers who asked for a job that has ended; its messages.
    async fn let_go(&self, record: &Record, gone: &CancellationToken) -> Result<Vec<Parcel>, QueueError> {
        let Some(held) = self.lock_held().remove(&record.result.id) else { return Ok(Vec::new()) };
        let mut answered: Vec<ReplyTo> = Vec::new();
        for parcel in &held.parcels {
            if let Some(to) = parcel.reply_to().filter(|to| !answered.contains(to)) {
                self.reply(record, &to, gone).await?;
                answered.push(to);
            }
        }
        if held.litter {
            self.records.clean(record.result.id).await;
        }
        Ok(held.parcels)
    }

    async fn reply(&self, record: &Record, to: &ReplyTo, gone: &CancellationToken) -> Result<(), QueueError> {
        let message = message::reply(record, to);
        self.insist(gone, || async {
            match self.publisher.publish(&message).await {
                Err(e @ PublishError::Unroutable { .. }) => {
                    tracing::info!(job = %record.result.id, error = %e, "nobody waits for the reply any more");
                    Ok(())
                }
                outcome => Ok(outcome?),
            }
        })
        .await
    }

    /// Forgets that a job is in hand; its messages.
    pub(super) fn take_out(&self, id: JobId, token: u64) -> Vec<Parcel> {
        let mut all = self.lock_held();
        if all.get(&id).is_none_or(|held| held.token != token) {
            return Vec::new();
        }
        self.sequences.forget(id);
        all.remove(&id).map(|held| held.parcels).unwrap_or_default()
    }

    /// Publishes to a job queue, which is declared if it has gone.
    pub(super) async fn publish_job(&self, message: &Message, source: &Source) -> Result<(), QueueError> {
        self.ensure(source).await?;
        match self.publisher.publish(message).await {
            Err(PublishError::Unroutable { .. }) => {
                // Somebody deleted the queue. Were it there again at once, RabbitMQ 3.10 would not tell
                // its subscribers, and bring them nothing more.
                tokio::time::sleep(DELETED_PAUSE).await;
                self.declare(source).await?;
                Ok(self.publisher.publish(message).await?)
            }
            outcome => Ok(outcome?),
        }
    }

    /// Makes sure that a queue is there, and that workers know of it.
    pub(super) async fn ensure(&self, source: &Source) -> Result<(), QueueError> {
        if self.known.lock().unwrap_or_else(PoisonError::into_inner).contains(source) {
            return Ok(());
        }
        if let Some(band) = source.band {
            // Noted first: a worker that looks after this finds it, one that looked before is told.
            self.records.add_band(&source.queue, band).await?;
        }
        self.declare(source).await?;
        if let Some(band) = source.band {
            self.add_bands(&source.queue, BTreeSet::from([band]));
            self.publisher.broadcast(&message::new_band(&source.queue)).await?;
        }
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(source.clone());
        Ok(())
    }

    /// Declares a job queue.
    pub(super) async fn declare(&self, source: &Source) -> Result<(), QueueError> {
        let live = self.publish.now()?;
        let declared = async {
            let channel = live.connection.create_channel().await?;
            topology::declare_source(&channel, source).await?;
            channel.close(200, "declared".into()).await
        };
        match timeout(STEP, declared).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) if e.is_amqp_soft_error() => Err(QueueError::Setup(describe(&e))),
            Ok(Err(e)) => Err(QueueError::Unavailable(describe(&e))),
            Err(_) => Err(QueueError::Unavailable(format!("declare a queue: no answer in {STEP:?}"))),
        }
    }

    /// Reads the bands of a queue anew.
    pub(super) async fn refresh_bands(&self, queue: &str) -> Result<(), QueueError> {
        let bands = self.records.bands(queue).await?;
        self.add_bands(queue, bands);
        Ok(())
    }

    /// Bands never go away, so what is known only grows.
    fn add_bands(&self, queue: &str, fresh: BTreeSet<u8>) {
        self.bands.send_if_modified(|bands| {
            let known = bands.entry(queue.to_owned()).or_default();
            let before = known.len();
            known.extend(fresh);
            known.len() > before
        });
    }

    /// Sends an event on its way; lost if it cannot go now.
    pub(super) fn tell(&self, event: &Event) {
        if let Ok(message) = message::event(event) {
            self.tell_loosely(message);
        }
    }

    /// Sends a message on its way that may be lost.
    pub(super) fn tell_loosely(&self, message: Message) {
        if self.events_out.try_send(message).is_err() {
            tracing::debug!("a message that may be lost was lost");
        }
    }

    /// Does `work` until it is done, or until nobody is left who wants it.
    ///
    /// # Errors
    /// [`QueueError::Closed`] if `gone`; what trying again does not help.
    pub(super) async fn insist<T, F>(
        &self,
        gone: &CancellationToken,
        mut work: impl FnMut() -> F,
    ) -> Result<T, QueueError>
    where
        F: Future<Output = Result<T, QueueError>>,
    {
        let pauses = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(3))
            .without_max_times()
            .with_jitter();
        let mut pauses = pauses.build();
        loop {
            let outcome = gone.run_until_cancelled(work()).await.unwrap_or(Err(QueueError::Closed));
            let Err(QueueError::Unavailable(why)) = outcome else { return outcome };
            tracing::warn!(why, "trying again");
            let pause = tokio::time::sleep(pauses.next().unwrap_or(STEP));
            if gone.run_until_cancelled(pause).await.is_none() {
                return Err(QueueError::Closed);
            }
        }
    }
}

/// Acknowledges a message. Where its channel has gone it comes again, and is settled by the record.
pub(super) async fn ack(parcel: &Parcel) {
    let acked = timeout(STEP, parcel.delivery.acker.ack(BasicAckOptions::default())).await;
    // lapin answers `Ok(false)`, not an error, where the channel has gone.
    if !matches!(acked, Ok(Ok(true))) {
        tracing::info!(
            queue = parcel.source.key(),
            "a message could not be acknowledged and will come again"
        );
    }
}

/// Puts a message back. Where its channel has gone, the broker has done so already.
pub(super) async fn nack(parcel: &Parcel) {
    let options = BasicNackOptions { requeue: true, multiple: false };
    let put_back = timeout(STEP, parcel.delivery.acker.nack(options)).await;
    if !matches!(put_back, Ok(Ok(true))) {
        tracing::debug!(queue = parcel.source.key(), "a message went back by itself");
    }
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("held", &self.lock_held().len()).finish_non_exhaustive()
    }
}
