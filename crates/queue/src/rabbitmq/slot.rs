//! The task behind one consumer: a channel of its own, and at most one job.
//!
//! It is a task, so that a worker may let go of a `take` at any moment: what was on its way by then
//! is kept for the next `take`, or put back without spending an attempt.
//!
//! With one queue and no bands the slot stays subscribed, prefetch 1, and the broker brings the next
//! job as soon as the last is acknowledged. With several, a subscription to each would collect a job
//! from each and let them wait behind the one that runs. So the slot first asks the queues one by
//! one, highest priority first (`basic.get`); only when all are empty it subscribes to all of them,
//! until the first job comes; if two come at once, the lesser goes back.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::select_all;
use hutch_proto::{JobId, JobResult, Reason};
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicQosOptions};
use lapin::types::FieldTable;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::admit::{Admitted, Job};
use super::core::{Core, nack};
use super::message::Parcel;
use super::records::{Failure, Record};
use super::supervisor::STEP;
use super::topology::{self, Source};
use crate::{Finished, GiveBack, Lease, QueueError};

/// How long a slot that nobody asks stays subscribed, and how often it looks after a job in hand.
const LINGER: Duration = Duration::from_secs(1);

type Reply<T> = oneshot::Sender<Result<T, QueueError>>;

/// What a consumer asks of its slot.
pub(super) enum Ask {
    Take { reply: Reply<(Lease, CancellationToken)> },
    Finish { lease: Box<Lease>, result: Box<JobResult>, reply: Reply<Finished> },
    GiveBack { lease: Box<Lease>, how: GiveBack, reply: Reply<()> },
}

/// A channel and what it is subscribed to.
struct Open {
    generation: u64,
    channel: Channel,
    sources: Vec<Source>,
    streams: Vec<(Source, lapin::Consumer)>,
}

/// A job that the worker has.
struct InHand {
    id: JobId,
    token: u64,
    number: u32,
    lease: Option<Lease>,
    /// Its message went back to the broker by itself, and that was noted as no attempt.
    forgiven: bool,
    wanted_off: CancellationToken,
}

pub(super) struct Slot {
    core: Arc<Core>,
    worker: String,
    queues: Vec<String>,
    /// The consumer was dropped, or the queue is closing.
    gone: CancellationToken,
    open: Option<Open>,
    in_hand: Option<InHand>,
    failures: u32,
}

impl Slot {
    pub(super) fn new(core: Arc<Core>, worker: String, queues: Vec<String>, gone: CancellationToken) -> Self {
        Self { core, worker, queues, gone, open: None, in_hand: None, failures: 0 }
    }

    pub(super) async fn run(mut self, mut asks: mpsc::Receiver<Ask>) {
        loop {
            let busy = self.in_hand.is_some() || self.is_subscribed();
            let patience = if busy { LINGER } else { Duration::from_secs(3600) };
            let ask = tokio::select! {
                ask = asks.recv() => ask,
                () = self.core.closing.cancelled() => None,
                () = tokio::time::sleep(patience) => {
                    self.idle().await;
                    continue;
                }
            };
            match ask {
                None => break,
                Some(Ask::Take { reply }) => self.take(reply).await,
                Some(Ask::Finish { lease, result, reply }) => {
                    let outcome = self.finish(&lease, *result).await;
                    // Whoever let go of the answer asked for it to be done all the same.
                    let _ = reply.send(outcome);
                }
                Some(Ask::GiveBack { lease, how, reply }) => {
                    let outcome = self.give_back(&lease, how).await;
                    let _ = reply.send(outcome);
                }
            }
        }
        self.shut_down().await;
    }

    async fn take(&mut self, mut reply: Reply<(Lease, CancellationToken)>) {
        if self.in_hand.as_ref().is_some_and(|job| job.lease.is_none()) {
            self.lose().await;
        }
        if self.in_hand.is_none() {
            match self.next(&mut reply).await {
                Ok(Some(job)) => {
                    self.in_hand = Some(InHand {
                        id: job.lease.job.id,
                        token: job.lease.token.0,
                        number: job.number,
                        lease: Some(job.lease),
                        forgiven: false,
                        wanted_off: job.wanted_off,
                    });
                }
                Ok(None) => return,
                Err(e) => {
                    let _ = reply.send(Err(e));
                    return;
                }
            }
        }
        let Some(job) = &mut self.in_hand else { return };
        let Some(lease) = job.lease.take() else { return };
        if let Err(Ok((lease, _))) = reply.send(Ok((lease, job.wanted_off.clone()))) {
            // Nobody took it: it is kept for the next who asks.
            job.lease = Some(lease);
        }
    }

    /// The next job; none if nobody waits for it any more.
    async fn next(
        &mut self,
        reply: &mut Reply<(Lease, CancellationToken)>,
    ) -> Result<Option<Box<Job>>, QueueError> {
        loop {
            if self.core.closing.is_cancelled() {
                return Err(QueueError::Closed);
            }
            let outcome = match self.fetch(reply).await {
                Ok(Some(parcel)) => {
                    self.failures = 0;
                    self.core.admit(parcel, &self.gone).await
                }
                Ok(None) if reply.is_closed() => return Ok(None),
                Ok(None) => continue,
                Err(e) => Err(e),
            };
            match outcome {
                Ok(Admitted::Run(job)) => return Ok(Some(job)),
                Ok(Admitted::Settled) => {}
                Err(QueueError::Closed) => return Err(QueueError::Closed),
                Err(e) => {
                    tracing::warn!(worker = self.worker, error = %e, "cannot take jobs now");
                    self.drop_channel();
                    self.failures = (self.failures + 1).min(5);
                    let pause = tokio::time::sleep(Duration::from_millis(100) * 2_u32.pow(self.failures));
                    tokio::select! {
                        () = pause => {}
                        () = reply.closed() => return Ok(None),
                        () = self.gone.cancelled() => return Err(QueueError::Closed),
                    }
                }
            }
        }
    }

    /// The next message. None if something changed, and one must look again.
    async fn fetch(
        &mut self,
        reply: &mut Reply<(Lease, CancellationToken)>,
    ) -> Result<Option<Parcel>, QueueError> {
        // Before the queues are listed: a band that comes after that is noticed below.
        let mut bands = self.core.bands.subscribe();
        let gone = self.gone.clone();
        let Some(opened) = self.ensure_open(reply).await? else { return Ok(None) };
        let single = opened.sources.len() == 1;
        if !single && !opened.streams.is_empty() {
            // Left over from a `take` that was let go, or from before there were several queues.
            return self.collect(None).await;
        }
        if !single && let Some(parcel) = opened.get_first().await? {
            return Ok(Some(parcel));
        }
        opened.subscribe().await?;
        let come = tokio::select! {
            come = opened.next() => come,
            _ = bands.changed() => return self.collect(None).await,
            () = reply.closed() => return Ok(None),
            () = gone.cancelled() => return Err(QueueError::Closed),
        };
        match come? {
            parcel if single => Ok(Some(parcel)),
            parcel => self.collect(Some(parcel)).await,
        }
    }

    /// Ends all subscriptions. Of what had come by then, the best is returned, the rest put back.
    async fn collect(&mut self, first: Option<Parcel>) -> Result<Option<Parcel>, QueueError> {
        let Some(opened) = &mut self.open else { return Ok(first) };
        let mut come = opened.unsubscribe().await?;
        come.extend(first);
        // The oldest of the highest priority: what came first stands last.
        let best = come.iter().enumerate().max_by_key(|(at, parcel)| (parcel.source.priority(), *at));
        let best = best.map(|(at, _)| at).map(|at| come.swap_remove(at));
        for parcel in come {
            self.return_untouched(&parcel).await;
        }
        Ok(best)
    }

    /// Puts back a message that nobody has looked at.
    async fn return_untouched(&self, parcel: &Parcel) {
        if let Some(id) = super::admit::id_of(parcel)
            && let Err(e) = self.core.records.note_unspent(id).await
        {
            tracing::warn!(job = %id, error = %e, "a job that was only looked at has lost an attempt");
        }
        nack(parcel).await;
    }

    /// A channel on the connection of now, with the queues of now; none if nobody waits any more.
    async fn ensure_open(
        &mut self,
        reply: &mut Reply<(Lease, CancellationToken)>,
    ) -> Result<Option<&mut Open>, QueueError> {
        let live = tokio::select! {
            live = self.core.consume.live() => live?,
            () = reply.closed() => return Ok(None),
            () = self.gone.cancelled() => return Err(QueueError::Closed),
        };
        let sources = self.sources();
        let usable = self
            .open
            .as_ref()
            .is_some_and(|open| open.generation == live.generation && open.channel.status().connected());
        if !usable {
            self.drop_channel();
            let opening = async {
                let scratch = live.connection.create_channel().await?;
                for source in &sources {
                    topology::declare_source(&scratch, source).await?;
                }
                scratch.close(200, "declared".into()).await?;
                let channel = live.connection.create_channel().await?;
                channel.basic_qos(1, BasicQosOptions::default()).await?;
                Ok(channel)
            };
            let channel = step("open a channel", opening).await?;
            self.open = Some(Open {
                generation: live.generation,
                channel,
                sources: sources.clone(),
                streams: Vec::new(),
            });
        }
        let Some(open) = &mut self.open else { return Ok(None) };
        open.sources = sources;
        Ok(Some(open))
    }

    /// All queues to take from, highest priority first. Messages that were given an id wait in a band
    /// even at the plain priority, and go before those that wait to be given one.
    fn sources(&self) -> Vec<Source> {
        let bands = self.core.bands.borrow();
        let mut sources: Vec<Source> = Vec::new();
        for queue in &self.queues {
            let bands = bands.get(queue).into_iter().flatten();
            sources.extend(bands.map(|band| Source { queue: queue.clone(), band: Some(*band) }));
            sources.push(Source::plain(queue));
        }
        sources.sort_by_key(|source| (u8::MAX - source.priority(), source.band.is_none()));
        sources
    }

    fn is_subscribed(&self) -> bool {
        self.open.as_ref().is_some_and(|open| !open.streams.is_empty())
    }

    /// Nobody asks: a job that waits here may wait elsewhere, and one in hand is looked after.
    async fn idle(&mut self) {
        match &mut self.in_hand {
            Some(job) if job.lease.is_some() => {
                let (id, token) = (job.id, job.token);
                self.in_hand = None;
                self.return_unspent(id, token).await;
            }
            Some(job) => {
                let lost =
                    self.core.lock_held().get(&job.id).is_some_and(|held| {
                        held.parcels.iter().all(|parcel| parcel.delivery.acker.poisoned())
                    });
                if lost && !job.forgiven {
                    // The broker hands it to another, who may not count this as a lost worker.
                    job.forgiven = self.core.records.note_unspent(job.id).await.is_ok();
                    self.core.mark_litter(job.id);
                } else if !lost {
                    job.forgiven = false;
                }
            }
            None => {
                if let Ok(Some(parcel)) = self.collect(None).await {
                    self.return_untouched(&parcel).await;
                }
            }
        }
    }

    async fn return_unspent(&self, id: JobId, token: u64) {
        if let Err(e) = self.core.records.note_unspent(id).await {
            tracing::warn!(job = %id, error = %e, "a job that was not tried has lost an attempt");
        }
        self.core.put_back(id, token).await;
    }

    async fn finish(&mut self, lease: &Lease, mut result: JobResult) -> Result<Finished, QueueError> {
        super::cap::fit(&mut result);
        let record = Record::new(result)?;
        let outcome = self.core.conclude(record, &lease.job.queue, &self.gone).await;
        if outcome.is_err() {
            self.core.put_back(lease.job.id, lease.token.0).await;
        }
        self.release(lease);
        outcome
    }

    async fn give_back(&mut self, lease: &Lease, how: GiveBack) -> Result<(), QueueError> {
        let (id, token) = (lease.job.id, lease.token.0);
        let job = self.in_hand.take_if(|job| job.token == token);
        if !self.core.holds(id, token) {
            return Err(QueueError::Fenced(id));
        }
        let (number, forgiven, wanted_off) = match job {
            Some(job) => (job.number, job.forgiven, job.wanted_off.is_cancelled()),
            None => (lease.attempt, false, false),
        };
        let gone = self.core.closing.clone();
        let settled = match how {
            _ if wanted_off => Some((Reason::Requested, "cancelled as asked".to_owned())),
            GiveBack::Failed { reason, message } if lease.attempt >= lease.job.max_attempts => {
                let (attempt, most) = (lease.attempt, lease.job.max_attempts);
                Some((reason, format!("attempt {attempt} of {most}: {message}")))
            }
            GiveBack::Failed { reason, message } => {
                let why = Failure { reason, message, worker: self.worker.clone() };
                self.core.insist(&gone, || self.core.records.note_failed(id, number, &why)).await?;
                None
            }
            GiveBack::Unspent if forgiven => None,
            GiveBack::Unspent => {
                self.core.insist(&gone, || self.core.records.note_unspent(id)).await?;
                None
            }
        };
        match settled {
            Some((reason, message)) => {
                let (spec, at, attempt) = (&lease.job, lease.submitted_at, lease.attempt);
                self.core.settle(spec, at, attempt, reason, message, &self.worker, &gone).await
            }
            None => {
                self.core.put_back(id, token).await;
                Ok(())
            }
        }
    }

    fn release(&mut self, lease: &Lease) {
        self.in_hand.take_if(|job| job.token == lease.token.0);
    }

    /// The worker let go of its job without a word.
    async fn lose(&mut self) {
        let Some(job) = self.in_hand.take() else { return };
        // The messages are still registered: they go back as a failed attempt, or not at all if the
        // broker cannot be reached; then it puts them back itself.
        let why = Failure {
            reason: Reason::WorkerLost,
            message: format!("{} let it go without a word", self.worker),
            worker: self.worker.clone(),
        };
        if let Err(e) = self.core.records.note_failed(job.id, job.number, &why).await {
            tracing::warn!(job = %job.id, error = %e, "the reason of a failure is lost");
        }
        self.core.put_back(job.id, job.token).await;
    }

    async fn shut_down(mut self) {
        match self.in_hand.take() {
            Some(job) if job.lease.is_some() => self.return_unspent(job.id, job.token).await,
            Some(job) => {
                self.in_hand = Some(job);
                self.lose().await;
            }
            None => {}
        }
        match self.collect(None).await {
            Ok(Some(parcel)) => {eprintln!("collected"); self.return_untouched(&parcel).await},
            Ok(None) => eprintln!("none collected"),
            Err(e) => eprintln!("err {e}"),
        }
        if let Some(open) = self.open.take() {
            let _ = step("close a channel", open.channel.close(200, "done".into())).await;
        }
    }

    /// Lets go of the channel; what was unacknowledged on it goes back.
    fn drop_channel(&mut self) {
        if let Some(open) = self.open.take() {
            tokio::spawn(async move {
                let _ = step("close a channel", open.channel.close(200, "done".into())).await;
            });
        }
    }
}

impl Open {
    /// The first message that the queues have now, in their order.
    async fn get_first(&self) -> Result<Option<Parcel>, QueueError> {
        for source in &self.sources {
            if let Some(parcel) = self.get(source).await? {
                return Ok(Some(parcel));
            }
        }
        Ok(None)
    }

    /// Waits for the next message of any subscription. Cancel-safe.
    async fn next(&mut self) -> Result<Parcel, QueueError> {
        let each = self
            .streams
            .iter_mut()
            .map(|(source, stream)| Box::pin(async move { (source.clone(), stream.next().await) }));
        let ((source, come), ..) = select_all(each).await;
        match come {
            Some(Ok(delivery)) => Ok(Parcel { source, delivery }),
            Some(Err(e)) => Err(QueueError::Unavailable(format!("{}: {e}", source.name()))),
            None => Err(QueueError::Unavailable(format!(
                "{} was deleted, or the broker closed its channel",
                source.name()
            ))),
        }
    }

    async fn get(&self, source: &Source) -> Result<Option<Parcel>, QueueError> {
        let got = self.channel.basic_get(source.name().into(), BasicGetOptions::default());
        let got = step("get", got).await?;
        Ok(got.map(|message| Parcel { source: source.clone(), delivery: message.delivery }))
    }

    async fn subscribe(&mut self) -> Result<(), QueueError> {
        for source in &self.sources {
            if self.streams.iter().any(|(subscribed, _)| subscribed == source) {
                continue;
            }
            let options = BasicConsumeOptions::default();
            let name = source.name();
            let consume = self.channel.basic_consume(name.into(), "".into(), options, FieldTable::default());
            self.streams.push((source.clone(), step("consume", consume).await?));
        }
        Ok(())
    }

    /// Ends every subscription; what had come is returned, the latest first.
    async fn unsubscribe(&mut self) -> Result<Vec<Parcel>, QueueError> {
        let mut come = Vec::new();
        for (source, mut stream) in std::mem::take(&mut self.streams) {
            step("cancel", self.channel.basic_cancel(stream.tag(), BasicCancelOptions::default())).await?;
            // The stream ends where the broker confirmed; before that stands what it sent until then.
            while let Some(delivery) = step("drain", async { Ok(stream.next().await) }).await? {
                let delivery: Delivery =
                    delivery.map_err(|e| QueueError::Unavailable(format!("{}: {e}", source.name())))?;
                come.push(Parcel { source: source.clone(), delivery });
            }
        }
        come.reverse();
        Ok(come)
    }
}

/// One round trip to the broker, within its time.
async fn step<T>(what: &str, work: impl Future<Output = lapin::Result<T>>) -> Result<T, QueueError> {
    match timeout(STEP, work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(e)) => Err(QueueError::Unavailable(format!("{what}: {e}"))),
        Err(_) => Err(QueueError::Unavailable(format!("{what}: no answer in {STEP:?}"))),
    }
}
