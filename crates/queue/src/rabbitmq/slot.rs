//! The task behind one consumer: a channel of its own, and at most one job.
//!
//! It is a task, so that a worker may let go of a `take` at any moment: what was on its way by then
//! is kept for the next `take`, or put back without spending an attempt.
//!
//! With one queue and no bands the slot is subscribed, prefetch 1, and the broker brings the next
//! job as soon as the last is acknowledged. With several it asks them one by one, highest priority
//! first, whenever [`super::bell`] rings; before that, what others have published is put in order, see
//! [`super::sort`].
//!
//! A message that the broker sends just when a slot stops would go back untried, but count as
//! delivered; and a quorum queue may send one even after it has confirmed that a subscription ended.
//! So what is done with is acknowledged (or put back) only when the next job is asked for. If it is
//! not, the subscription is ended first: as long as a message is unacknowledged there is no room for
//! another, and nothing can be on its way. What remains is a slot that stops while it waits.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _};
use hutch_proto::{JobId, JobResult, Reason};
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicQosOptions};
use lapin::types::FieldTable;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::admit::{self, Admitted, Job};
use super::core::{Core, ack, nack};
use super::message::Parcel;
use super::records::{Failure, Record};
use super::sort;
use super::supervisor::{Live, STEP};
use super::topology::{self, Source};
use crate::{Finished, GiveBack, Lease, QueueError};

/// How long a slot that nobody asks stays subscribed, and how often it looks after a job in hand.
const LINGER: Duration = Duration::from_secs(1);

/// How long what is done with waits for the next job to be asked for.
const MOMENT: Duration = Duration::from_millis(20);

/// After how long a subscription that has brought nothing is made anew. RabbitMQ 3.10, for one, says
/// nothing where a queue was deleted and declared again at once, and keeps what it should bring.
const RENEW: Duration = Duration::from_secs(30);

type Reply<T> = oneshot::Sender<Result<T, QueueError>>;
type TakeReply = Reply<(Lease, CancellationToken)>;

/// What a consumer asks of its slot.
pub(super) enum Ask {
    Take { reply: TakeReply },
    Finish { lease: Box<Lease>, result: Box<JobResult>, reply: Reply<Finished> },
    GiveBack { lease: Box<Lease>, how: GiveBack, reply: Reply<()> },
}

/// A channel, and a subscription where the slot takes from one queue.
struct Open {
    generation: u64,
    channel: Channel,
    stream: Option<(Source, lapin::Consumer)>,
    /// To be made anew.
    stale: bool,
}

/// What becomes of a message.
enum Verdict {
    Done,
    Back,
}

/// A job that was taken.
struct InHand {
    id: JobId,
    token: u64,
    number: u32,
    /// As long as the worker has not come for it.
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
    /// Messages on this channel that are done with.
    over: Vec<(Parcel, Verdict)>,
    number: u64,
    failures: u32,
}

impl Slot {
    pub(super) fn new(core: Arc<Core>, worker: String, queues: Vec<String>, gone: CancellationToken) -> Self {
        let number = core.tokens.fetch_add(1, Ordering::Relaxed);
        Self { core, worker, queues, gone, open: None, in_hand: None, over: Vec::new(), number, failures: 0 }
    }

    pub(super) async fn run(mut self, mut asks: mpsc::Receiver<Ask>) {
        loop {
            let patience = match (self.over.is_empty(), self.in_hand.is_some() || self.open.is_some()) {
                (false, _) => MOMENT,
                (true, true) => LINGER,
                (true, false) => Duration::from_secs(3600),
            };
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
        self.leave().await;
    }

    async fn take(&mut self, mut reply: TakeReply) {
        if self.in_hand.as_ref().is_some_and(|job| job.lease.is_none()) {
            // A worker that asks for another has let go of the last one.
            self.leave().await;
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
    async fn next(&mut self, reply: &mut TakeReply) -> Result<Option<Box<Job>>, QueueError> {
        loop {
            let outcome = match self.fetch(reply).await {
                Ok(Some(parcel)) => {
                    self.failures = 0;
                    let alone = self.is_alone(&parcel).await;
                    self.core.admit(parcel, alone, &self.gone).await
                }
                Ok(None) if reply.is_closed() => return Ok(None),
                Ok(None) => continue,
                Err(e) => Err(e),
            };
            match outcome {
                Ok(Admitted::Run(job)) => return Ok(Some(job)),
                Ok(Admitted::Settled(done)) => self.dispose(done, || Verdict::Done).await,
                Err(QueueError::Closed) => return Err(QueueError::Closed),
                Err(e) => {
                    tracing::warn!(worker = self.worker, error = %e, "cannot take jobs now");
                    self.close_channel().await;
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
    async fn fetch(&mut self, reply: &mut TakeReply) -> Result<Option<Parcel>, QueueError> {
        // Before the queues are listed: a band that comes after that is noticed below.
        let mut bands = self.core.bands.subscribe();
        self.queues.rotate_left(1);
        let sources = self.sources();
        let live = tokio::select! {
            live = self.core.consume.live() => live?,
            () = reply.closed() => return Ok(None),
            () = self.gone.cancelled() => return Err(QueueError::Closed),
        };
        if sources.len() > 1 {
            // The subscription has to end: before there is room for another message.
            self.rest().await;
        }
        self.flush().await;
        self.make_ready(&live, &sources).await?;
        let Some(open) = &mut self.open else { return Ok(None) };
        let slot = self.number;
        if let Some((source, stream)) = &mut open.stream {
            return tokio::select! {
                come = stream.next() => come_from(source, come, slot).map(Some),
                _ = bands.changed() => Ok(None),
                () = reply.closed() => Ok(None),
                () = self.gone.cancelled() => Err(QueueError::Closed),
                () = tokio::time::sleep(RENEW) => {
                    open.stale = true;
                    Ok(None)
                }
            };
        }
        let channel = open.channel.clone();
        sort::pass(&self.core, &channel, &self.queues, slot, &self.gone).await?;
        // It may have brought bands.
        let sources = self.sources();
        let waiting = self.core.bell.wait(&sources);
        if let Some(parcel) = ask_each(&channel, &sources, slot).await? {
            drop(waiting);
            self.core.bell.ring_on();
            return Ok(Some(parcel));
        }
        tokio::select! {
            () = self.core.bell.rung() => Ok(None),
            _ = bands.changed() => Ok(None),
            () = reply.closed() => Ok(None),
            () = self.gone.cancelled() => Err(QueueError::Closed),
        }
    }

    /// Whether a message need not be compared to others: a gateway of ours has sorted it, or none waits.
    async fn is_alone(&self, parcel: &Parcel) -> bool {
        let Some(open) = self.open.as_ref().filter(|_| parcel.is_unsorted()) else { return true };
        // Where that cannot be told, the channel has failed, and the message comes again.
        step("count", topology::waiting(&open.channel, &parcel.source)).await.is_ok_and(|others| others == 0)
    }

    /// Sees to it that there is a channel, and a subscription where there is one queue alone.
    async fn make_ready(&mut self, live: &Live, sources: &[Source]) -> Result<(), QueueError> {
        let suits = self.open.as_ref().is_some_and(|open| {
            open.generation == live.generation
                && !open.stale
                && open.channel.status().connected()
                && (open.stream.is_none() || sources.len() == 1)
        });
        if !suits {
            self.close_channel().await;
            self.open = Some(Open::new(live, sources).await?);
        }
        match (&mut self.open, sources) {
            (Some(open), [only]) if open.stream.is_none() => open.subscribe(only).await,
            _ => Ok(()),
        }
    }

    /// Does with messages as decided: at once, or, on a channel with a subscription, when the next
    /// job is asked for.
    async fn dispose(&mut self, parcels: Vec<Parcel>, verdict: impl Fn() -> Verdict) {
        for parcel in parcels {
            if parcel.slot == self.number && self.open.as_ref().is_some_and(|open| open.stream.is_some()) {
                self.over.push((parcel, verdict()));
            } else {
                carry_out(&parcel, verdict()).await;
            }
        }
    }

    async fn flush(&mut self) {
        for (parcel, verdict) in std::mem::take(&mut self.over) {
            carry_out(&parcel, verdict).await;
        }
    }

    /// Ends the subscription, then does with messages as decided.
    async fn rest(&mut self) {
        if self.over.is_empty() {
            return;
        }
        if let Some(open) = &mut self.open
            && let Some((_, stream)) = open.stream.take()
            && open.channel.status().connected()
        {
            let cancel = open.channel.basic_cancel(stream.tag(), BasicCancelOptions::default());
            if let Err(e) = step("cancel", cancel).await {
                tracing::debug!(error = %e, "a subscription ended by itself");
            }
        }
        self.flush().await;
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

    /// Nobody asks: what waits here may not wait longer, and a job in hand is looked after.
    async fn idle(&mut self) {
        if !self.over.is_empty() {
            return self.rest().await;
        }
        let Some(job) = self.in_hand.as_mut().filter(|job| job.lease.is_none()) else {
            return self.leave().await;
        };
        let lost = self.core.lock_held().get(&job.id).is_some_and(|held| {
            held.token == job.token && held.parcels.iter().all(|parcel| parcel.delivery.acker.poisoned())
        });
        if lost && !job.forgiven {
            // The broker hands it to another, who may not count this as a lost worker.
            job.forgiven = self.core.records.note_unspent(job.id).await.is_ok();
            self.core.mark_litter(job.id);
        } else if !lost {
            // It came back, and joined the job: its next loss is another one.
            job.forgiven = false;
        }
    }

    async fn finish(&mut self, lease: &Lease, mut result: JobResult) -> Result<Finished, QueueError> {
        crate::cap::fit(&mut result);
        let record = Record::new(result)?;
        let outcome = self.core.conclude(record, &lease.job.queue, &self.gone).await;
        self.in_hand.take_if(|job| job.token == lease.token.0);
        match outcome {
            Ok((finished, done)) => {
                self.dispose(done, || Verdict::Done).await;
                Ok(finished)
            }
            Err(e) => {
                let parcels = self.core.take_out(lease.job.id, lease.token.0);
                self.dispose(parcels, || Verdict::Back).await;
                Err(e)
            }
        }
    }

    async fn give_back(&mut self, lease: &Lease, how: GiveBack) -> Result<(), QueueError> {
        let (id, token) = (lease.job.id, lease.token.0);
        let job = self.in_hand.take_if(|job| job.token == token);
        let Some(job) = job.filter(|_| self.core.holds(id, token)) else {
            return Err(QueueError::Fenced(id));
        };
        let outcome = self.give_back_job(lease, &job, how).await;
        // Where it was settled there is nothing left to put back.
        let parcels = self.core.take_out(id, token);
        self.dispose(parcels, || Verdict::Back).await;
        self.dispose(outcome?, || Verdict::Done).await;
        Ok(())
    }

    /// Notes what is to be known, or settles the job; then its messages are returned.
    async fn give_back_job(
        &self,
        lease: &Lease,
        job: &InHand,
        how: GiveBack,
    ) -> Result<Vec<Parcel>, QueueError> {
        let (id, core, gone) = (job.id, &self.core, &self.gone);
        let most = lease.job.max_attempts;
        let (reason, message) = match how {
            _ if job.wanted_off.is_cancelled() => (Reason::Requested, "cancelled as asked".to_owned()),
            GiveBack::Failed { reason, message } if lease.attempt >= most => {
                (reason, format!("attempt {} of {most}: {message}", lease.attempt))
            }
            GiveBack::Failed { reason, message } => {
                let why = Failure { reason, message, worker: self.worker.clone() };
                core.insist(gone, || core.records.note_failed(id, job.number, &why)).await?;
                return Ok(Vec::new());
            }
            GiveBack::Unspent if job.forgiven => return Ok(Vec::new()),
            GiveBack::Unspent => {
                core.insist(gone, || core.records.note_unspent(id)).await?;
                return Ok(Vec::new());
            }
        };
        let ending = admit::Ending { reason, message, attempt: lease.attempt, worker: &self.worker };
        core.settle(&lease.job, lease.submitted_at, ending, gone).await
    }

    /// Lets go of everything: a job that the worker has as lost, one that it has not come for as not
    /// tried, and the channel with whatever the broker has sent meanwhile.
    ///
    /// What is to be said of each is noted first. The messages themselves go back with the channel, and
    /// not one by one before it, since each would make room for another.
    async fn leave(&mut self) {
        let job = self.in_hand.take();
        if let Some(job) = &job {
            let noted = if job.lease.is_some() {
                self.core.records.note_unspent(job.id).await
            } else {
                let message = format!("{} let it go without a word", self.worker);
                let why = Failure { reason: Reason::WorkerLost, message, worker: self.worker.clone() };
                self.core.records.note_failed(job.id, job.number, &why).await
            };
            if let Err(e) = noted {
                tracing::warn!(job = %job.id, error = %e, "what became of an attempt could not be noted");
            }
        }
        // Taken out before the broker has them back: what comes again must not join a job that is over.
        let parcels = job.map(|job| self.core.take_out(job.id, job.token)).unwrap_or_default();
        self.rest().await;
        self.close_channel().await;
        for parcel in parcels.iter().filter(|parcel| parcel.slot != self.number) {
            carry_out(parcel, Verdict::Back).await;
        }
    }

    /// Closes the channel. Messages on it that nobody has looked at go back as not tried.
    async fn close_channel(&mut self) {
        let Some(mut open) = self.open.take() else { return };
        self.over.clear();
        self.note_untried(&mut open).await;
        if open.channel.status().connected()
            && let Err(e) = step("close a channel", open.channel.close(200, "done".into())).await
        {
            tracing::debug!(error = %e, "a channel ended by itself");
        }
        // What came between the two.
        self.note_untried(&mut open).await;
    }

    async fn note_untried(&self, open: &mut Open) {
        let Some((_, stream)) = &mut open.stream else { return };
        while let Some(Some(Ok(delivery))) = stream.next().now_or_never() {
            if let Some(id) = admit::id_of(&delivery)
                && let Err(e) = self.core.records.note_unspent(id).await
            {
                tracing::warn!(job = %id, error = %e, "a job that was not tried has lost an attempt");
            }
        }
    }
}

impl Open {
    /// A channel that is ready to take from these queues, which are declared first.
    async fn new(live: &Live, sources: &[Source]) -> Result<Self, QueueError> {
        let opening = async {
            let scratch = live.connection.create_channel().await?;
            for source in sources {
                topology::declare_source(&scratch, source).await?;
            }
            scratch.close(200, "declared".into()).await?;
            let channel = live.connection.create_channel().await?;
            channel.basic_qos(1, BasicQosOptions::default()).await?;
            Ok(Self { generation: live.generation, channel, stream: None, stale: false })
        };
        step("open a channel", opening).await
    }

    async fn subscribe(&mut self, source: &Source) -> Result<(), QueueError> {
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        let consuming = self.channel.basic_consume(source.name().into(), "".into(), options, arguments);
        self.stream = Some((source.clone(), step("consume", consuming).await?));
        Ok(())
    }
}

async fn carry_out(parcel: &Parcel, verdict: Verdict) {
    match verdict {
        Verdict::Done => ack(parcel).await,
        Verdict::Back => nack(parcel).await,
    }
}

/// The first message that the queues have now, in their order.
async fn ask_each(channel: &Channel, sources: &[Source], slot: u64) -> Result<Option<Parcel>, QueueError> {
    for source in sources {
        if let Some(parcel) = get(channel, source, slot).await? {
            return Ok(Some(parcel));
        }
    }
    Ok(None)
}

/// The first message that a queue has now.
pub(super) async fn get(channel: &Channel, source: &Source, slot: u64) -> Result<Option<Parcel>, QueueError> {
    let got = step("get", channel.basic_get(source.name().into(), BasicGetOptions::default())).await?;
    Ok(got.map(|message| Parcel { slot, source: source.clone(), delivery: message.delivery }))
}

fn come_from(
    source: &Source,
    come: Option<lapin::Result<Delivery>>,
    slot: u64,
) -> Result<Parcel, QueueError> {
    match come {
        Some(Ok(delivery)) => Ok(Parcel { slot, source: source.clone(), delivery }),
        Some(Err(e)) => Err(QueueError::Unavailable(format!("{}: {e}", source.name()))),
        // The stream ends, while the channel may live on, where the queue was deleted.
        None => Err(QueueError::Unavailable(format!(
            "{} was deleted, or the broker closed its channel",
            source.name()
        ))),
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
