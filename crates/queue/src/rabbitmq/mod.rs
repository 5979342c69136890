//! The queue on RabbitMQ, for more than one machine.
//!
//! What is on the broker is in [`topology`]; two connections are kept up by [`supervisor`]; what
//! becomes of a message is decided in [`admit`], and how a job ends in [`core`]; a worker's slot is
//! the task in [`slot`]; what others publish is put in order by [`sort`]; what is kept beside the broker in [`records`]; and a gateway, which must
//! answer what no broker can be asked, has an [`index`] that is kept up to date by [`feeds`].
//!
//! A message is acknowledged only after the job's terminal record is stored and the broker has
//! confirmed the result. So a job may be delivered twice, and run twice if a worker vanishes; but it
//! has one result, and whoever has it again answers with the same bytes.

mod admit;
mod bell;
mod calls;
mod consumer;
mod core;
mod feeds;
mod index;
mod message;
mod publisher;
mod records;
mod slot;
mod sort;
mod supervisor;
mod topology;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use hutch_proto::{Event, JobId, JobSpec, JobState, JobView, Timestamp};
use lapin::uri::{AMQPScheme, AMQPUri};
use object_store::ObjectStore;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::bell::Bell;
use self::consumer::RabbitConsumer;
use self::core::{Core, Known};
use self::feeds::Finishing;
use self::index::{Begun, Index};
use self::publisher::Publisher;
use self::records::Records;
use self::slot::Slot;
use self::supervisor::{Link, Prepare, STEP};
use self::topology::Source;
use crate::views::state;
use crate::{
    Call, CancelOutcome, Consumer, ConsumerConfig, Counters, Incoming, ListFilter, Queue, QueueDepth,
    QueueError, Submitted, Unrun,
};

/// Events on their way to the broker; more are lost.
const EVENTS_OUT: usize = 4096;

/// How a queue on RabbitMQ is reached.
#[derive(Debug, Clone)]
pub struct RabbitConfig {
    /// `amqp://user:password@host:port/vhost`. A heartbeat of 10 s is asked for, unless it says otherwise.
    pub url: String,
    /// Where terminal records are made: the same store for all workers and gateways of one broker.
    /// A local one should have `with_fsync` on.
    pub results: Arc<dyn ObjectStore>,
    /// For a gateway: the file of its index, made if it is not there. Without one, `get` finds only
    /// finished jobs, `list` none, and events are not received.
    pub index: Option<PathBuf>,
    /// Shown by the broker as the connections' name, such as the worker's.
    pub name: String,
    /// How long to try for the first connection.
    pub connect_timeout: Duration,
    /// How long the broker may take to confirm one message.
    pub confirm_timeout: Duration,
    /// How long a job whose last worker vanished is held before it is settled as `worker_lost`, in
    /// case the worker was only cut off and brings the result.
    pub lost_grace: Duration,
    /// How many events a slow subscriber may lag behind before it loses the oldest.
    pub event_buffer: usize,
    /// How long the index remembers a finished job; `None` for ever.
    pub keep_finished: Option<Duration>,
}

impl RabbitConfig {
    /// With an index: none; confirms in 10 s; the first connection in 30 s; a grace of 5 s.
    #[must_use]
    pub fn new(url: impl Into<String>, results: Arc<dyn ObjectStore>) -> Self {
        Self {
            url: url.into(),
            results,
            index: None,
            name: "hutch".to_owned(),
            connect_timeout: Duration::from_secs(30),
            confirm_timeout: Duration::from_secs(10),
            lost_grace: Duration::from_secs(5),
            event_buffer: 4096,
            keep_finished: Some(Duration::from_secs(7 * 24 * 3600)),
        }
    }
}

/// A queue on RabbitMQ.
#[derive(Debug)]
pub struct RabbitQueue {
    core: Arc<Core>,
    reconnects: Arc<AtomicU64>,
    /// All that works on the connections; ended before they are closed.
    tasks: TaskTracker,
    connections: TaskTracker,
    hang_up: CancellationToken,
    /// One lock for each id that is being submitted, so that a race publishes it once.
    submitting: Mutex<HashMap<JobId, Weak<tokio::sync::Mutex<()>>>>,
}

impl RabbitQueue {
    /// Connects, and declares what is needed.
    ///
    /// # Errors
    /// [`QueueError::Setup`] if the URL is wrong, the broker refuses the login, or has something under
    /// hutch's names that is set up otherwise; [`QueueError::Unavailable`] if it cannot be reached
    /// within `connect_timeout`.
    pub async fn connect(config: RabbitConfig) -> Result<Self, QueueError> {
        let uri = parse_url(&config.url)?;
        let index = config.index.as_deref().map(Index::open).transpose()?;
        let closing = CancellationToken::new();
        let (tasks, connections, hang_up) =
            (TaskTracker::new(), TaskTracker::new(), CancellationToken::new());
        let reconnects = Arc::new(AtomicU64::new(0));
        let known = Known::default();

        let link = |role: &str, prepare: Prepare| {
            let name = format!("{} ({role})", config.name);
            let (link, keeper) =
                Link::start(uri.clone(), name, prepare, Arc::clone(&reconnects), hang_up.clone());
            connections.spawn(keeper);
            link
        };
        let gateway = index.as_ref().map(|index| index.gateway().to_owned());
        let publish = link("publishes", declares(Arc::clone(&known), gateway));
        let consume = link("consumes", Arc::new(|_| Box::pin(async { Ok(()) })));

        let (events_out, outbox) = mpsc::channel(EVENTS_OUT);
        tasks.spawn(publisher::publish_events(publish.clone(), outbox, closing.clone()));
        let core = Arc::new(Core {
            publisher: Publisher::new(publish.clone(), config.confirm_timeout),
            publish,
            consume,
            records: Records::new(config.results),
            index,
            known,
            bands: watch::Sender::new(BTreeMap::new()),
            bell: Bell::new(),
            events: broadcast::Sender::new(config.event_buffer.max(1)),
            events_out,
            sequences: Default::default(),
            calls: Default::default(),
            redeliveries: AtomicU64::new(0),
            unrun: Default::default(),
            new_expiry: Default::default(),
            lost_grace: config.lost_grace,
            closing,
            held: Mutex::default(),
            sorting: Default::default(),
            tokens: AtomicU64::new(1),
        });
        let queue = Self { core, reconnects, tasks, connections, hang_up, submitting: Mutex::default() };
        // On an error the queue is dropped, and with it all that was started.
        queue.core.publish.first(config.connect_timeout).await?;
        queue.core.consume.first(config.connect_timeout).await?;
        queue.start_feeds(config.keep_finished);
        Ok(queue)
    }

    fn start_feeds(&self, keep_finished: Option<Duration>) {
        let core = || Arc::clone(&self.core);
        self.tasks.spawn(feeds::control(core()));
        self.tasks.spawn(bell::watch(core()));
        if self.core.index.is_some() {
            let finishing = Arc::new(Finishing::default());
            self.tasks.spawn(feeds::results(core(), Arc::clone(&finishing)));
            self.tasks.spawn(feeds::events(core(), Arc::clone(&finishing)));
            self.tasks.spawn(feeds::late_ends(core(), finishing));
            self.tasks.spawn(feeds::expiry(core(), keep_finished));
        }
    }

    /// The lock of an id that is being submitted.
    fn submission(&self, id: JobId) -> Arc<tokio::sync::Mutex<()>> {
        let mut all = self.submitting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = all.get(&id).and_then(Weak::upgrade) {
            return lock;
        }
        all.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        all.insert(id, Arc::downgrade(&lock));
        lock
    }

    /// Jobs that wait, by queue, in all queues that were declared here.
    async fn waiting(&self) -> Result<BTreeMap<String, u64>, QueueError> {
        let mut sources: BTreeSet<Source> =
            self.core.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (queue, bands) in &*self.core.bands.borrow() {
            sources.insert(Source::plain(queue));
            sources.extend(bands.iter().map(|band| Source { queue: queue.clone(), band: Some(*band) }));
        }
        let live = self.core.publish.now()?;
        let counted = async {
            let mut waiting = BTreeMap::new();
            let mut channel = live.connection.create_channel().await?;
            for source in sources {
                match topology::waiting(&channel, &source).await {
                    Ok(count) => *waiting.entry(source.queue).or_default() += count,
                    // It is not there (any more), which ended the channel.
                    Err(e) if e.is_amqp_soft_error() => channel = live.connection.create_channel().await?,
                    Err(e) => return Err(e),
                }
            }
            channel.close(200, "counted".into()).await?;
            Ok::<_, lapin::Error>(waiting)
        };
        match timeout(STEP, counted).await {
            Ok(Ok(waiting)) => Ok(waiting),
            Ok(Err(e)) => Err(QueueError::Unavailable(format!("count jobs: {e}"))),
            Err(_) => Err(QueueError::Unavailable(format!("count jobs: no answer in {STEP:?}"))),
        }
    }
}

/// What the publishing connection needs, each time.
fn declares(known: Known, gateway: Option<String>) -> Prepare {
    Arc::new(move |connection| {
        let known: Vec<_> = known.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
        let gateway = gateway.clone();
        Box::pin(async move {
            let channel = connection.create_channel().await?;
            topology::declare_base(&channel).await?;
            for source in known {
                topology::declare_source(&channel, &source).await?;
            }
            if let Some(gateway) = gateway {
                topology::declare_gateway(&channel, &gateway).await?;
            }
            channel.close(200, "declared".into()).await
        })
    })
}

fn parse_url(url: &str) -> Result<AMQPUri, QueueError> {
    let uri: AMQPUri = url.parse().map_err(|e| {
        QueueError::Setup(format!(
            "the broker's URL is wrong ({e}): amqp://user:password@host:5672/%2f is expected"
        ))
    })?;
    if uri.scheme == AMQPScheme::AMQPS {
        return Err(QueueError::Setup(
            "amqps:// is not built in: use amqp:// through a TLS proxy on this host".to_owned(),
        ));
    }
    Ok(uri)
}

#[async_trait]
impl Queue for RabbitQueue {
    async fn submit(&self, job: &JobSpec) -> Result<Submitted, QueueError> {
        let json = serde_json::to_vec(job)
            .map_err(|e| QueueError::Setup(format!("job {} is no JSON: {e}", job.id)))?;
        let lock = self.submission(job.id);
        let _alone = lock.lock().await;
        let mut submitted_at = Timestamp::now();
        match &self.core.index {
            Some(index) => match index.begin(job).await? {
                Begun::Unconfirmed(at) => submitted_at = at,
                Begun::Known => return Ok(Submitted::Known),
            },
            None => {
                if self.core.records.get(job.id).await?.is_some() {
                    return Ok(Submitted::Known);
                }
            }
        }
        let source = Source::of(&job.queue, job.priority);
        self.core.publish_job(&message::job(job, json, &source, submitted_at), &source).await?;
        self.core.tell_loosely(message::bell(&job.queue));
        if let Some(index) = &self.core.index {
            index.confirm(job.id).await?;
            if job.expires_in_ms.is_some() {
                self.core.new_expiry.notify_one();
            }
        }
        Ok(Submitted::New)
    }

    async fn cancel(&self, id: JobId) -> Result<CancelOutcome, QueueError> {
        if self.core.records.get(id).await?.is_some() {
            return Ok(CancelOutcome::AlreadyFinished);
        }
        let entry = match &self.core.index {
            Some(index) => match index.entry(id).await? {
                Some(entry) => Some(entry),
                None => return Ok(CancelOutcome::Unknown),
            },
            None => None,
        };
        self.core.records.mark_cancelled(id).await?;
        if let Some(entry) = entry.filter(|entry| entry.state == state::QUEUED) {
            // Should a worker have begun with it this moment, the record below stands all the same.
            self.core
                .pronounce_without_run(&entry, hutch_proto::Reason::Requested, "cancelled as asked")
                .await?;
        }
        self.core.publisher.broadcast(&message::cancel(id)).await?;
        Ok(CancelOutcome::Accepted)
    }

    async fn get(&self, id: JobId) -> Result<Option<JobView>, QueueError> {
        if let Some(index) = &self.core.index
            && let Some(view) = index.get(id).await?
        {
            return Ok(Some(view));
        }
        let record = self.core.records.get(id).await?;
        Ok(record.map(|record| JobView {
            id,
            state: JobState::Finished,
            submitted_at: record.result.timeline.submitted_at,
            labels: record.result.labels.clone(),
            result: Some(record.result),
        }))
    }

    async fn list(&self, filter: &ListFilter) -> Result<Vec<JobView>, QueueError> {
        match &self.core.index {
            Some(index) => index.list(filter).await,
            None => Ok(Vec::new()),
        }
    }

    async fn depths(&self) -> Result<Vec<QueueDepth>, QueueError> {
        let mut running = BTreeMap::new();
        if let Some(index) = &self.core.index {
            running = index.depths().await?.into_iter().map(|depth| (depth.queue, depth.running)).collect();
        }
        let mut depths: Vec<QueueDepth> = Vec::new();
        for (queue, queued) in self.waiting().await? {
            let running = running.remove(&queue).unwrap_or(0);
            depths.push(QueueDepth { queue, queued, running });
        }
        // Queues of which only the index knows, because their jobs came from elsewhere.
        depths.extend(
            running
                .into_iter()
                .filter(|(queue, running)| !queue.is_empty() && *running > 0)
                .map(|(queue, running)| QueueDepth { queue, queued: 0, running }),
        );
        Ok(depths)
    }

    async fn publish(&self, event: Event) {
        self.core.sequences.note(&event);
        self.core.tell(&event);
    }

    fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.core.events.subscribe()
    }

    async fn consumer(&self, config: &ConsumerConfig) -> Result<Box<dyn Consumer>, QueueError> {
        for queue in &config.queues {
            self.core.ensure(&Source::plain(queue)).await?;
            self.core.refresh_bands(queue).await?;
        }
        let (asks, inbox) = mpsc::channel(1);
        let gone = self.core.closing.child_token();
        let slot =
            Slot::new(Arc::clone(&self.core), config.worker.clone(), config.queues.clone(), gone.clone());
        self.tasks.spawn(slot.run(inbox));
        Ok(Box::new(RabbitConsumer::new(asks, gone)))
    }

    async fn call(&self, id: JobId) -> Result<Option<Call>, QueueError> {
        calls::call(&self.core, id).await
    }

    fn calls(&self) -> Option<mpsc::Receiver<Incoming>> {
        self.core.calls.answered()
    }

    fn connected(&self) -> bool {
        self.core.publish.now().is_ok() && self.core.consume.now().is_ok()
    }

    fn counters(&self) -> Counters {
        Counters {
            reconnects: self.reconnects.load(Ordering::Relaxed),
            redeliveries: self.core.redeliveries.load(Ordering::Relaxed),
        }
    }

    fn unrun(&self) -> Vec<Unrun> {
        self.core.unrun.all()
    }

    async fn close(&self) {
        self.core.closing.cancel();
        end(&self.tasks, &self.connections, &self.hang_up).await;
        if let Some(index) = &self.core.index {
            index.close();
        }
    }
}

/// Waits for what works on the connections, then for these.
async fn end(tasks: &TaskTracker, connections: &TaskTracker, hang_up: &CancellationToken) {
    for tracker in [tasks, connections] {
        tracker.close();
        if timeout(STEP, tracker.wait()).await.is_err() {
            tracing::warn!("the queue did not end in {STEP:?}");
        }
        hang_up.cancel();
    }
}

impl Drop for RabbitQueue {
    fn drop(&mut self) {
        self.core.closing.cancel();
        let (tasks, connections, hang_up) =
            (self.tasks.clone(), self.connections.clone(), self.hang_up.clone());
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(async move { end(&tasks, &connections, &hang_up).await })),
            Err(_) => hang_up.cancel(),
        }
    }
}
