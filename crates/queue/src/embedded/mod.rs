//! A durable queue in one file, for one machine: SQLite in WAL mode.
//!
//! The process that opens the file owns it (a lock beside it says so). All writing is done by one
//! thread ([`writer`]), which syncs once for all that came in meanwhile; reading has connections of
//! its own. The states of a job and their changes are in [`schema`], a slot's end in [`consumer`].
//!
//! What holds after a power cut: every job that [`EmbeddedQueue::submit`] accepted is there, and
//! every result that [`Consumer::finish`] recorded. Jobs that were running are tried again, with an
//! attempt spent.

mod consumer;
mod schema;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use hutch_proto::{Event, JobId, JobResult, JobSpec, JobView, Reason, Timestamp};
use tokio::sync::{Semaphore, broadcast, oneshot};

use self::consumer::EmbeddedConsumer;
use self::schema::NewJob;
use self::writer::{Command, Writer};
use crate::calls::Switchboard;
use crate::sequence::Sequences;
use crate::sqlite::{self, Readers};
use crate::unrun::Tally;
use crate::{
    Call, CancelOutcome, Consumer, ConsumerConfig, Counters, Incoming, ListFilter, Queue, QueueDepth,
    QueueError, Submitted, Unrun, views,
};

/// KiB of specs that may wait for the writer; more wait outside.
const ROOM_KIB: usize = 64 * 1024;

/// What may be chosen about an embedded queue.
#[derive(Debug, Clone)]
pub struct EmbeddedOptions {
    /// How many events a slow subscriber may lag behind before it loses the oldest. Default 4096.
    pub event_buffer: usize,
    /// How long a finished job is remembered, with its result; `None` for ever. Default 7 days.
    /// An id that is forgotten is new again.
    pub keep_finished: Option<Duration>,
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        Self { event_buffer: 4096, keep_finished: Some(Duration::from_secs(7 * 24 * 3600)) }
    }
}

/// A job that was given up, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// The job's id.
    pub id: JobId,
    /// The queue in which it was.
    pub queue: String,
    /// When it was given up.
    pub at: Timestamp,
    /// Why.
    pub reason: Reason,
    /// The same in words.
    pub message: String,
}

/// A queue in a file.
#[derive(Debug)]
pub struct EmbeddedQueue {
    inner: Arc<Inner>,
    readers: Readers,
}

/// What the queue and its consumers share; the writer ends when the last of them is gone.
#[derive(Debug)]
struct Inner {
    commands: Sender<Command>,
    shared: Arc<Shared>,
    room: Arc<Semaphore>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// What the writer's thread shares with the rest.
#[derive(Debug)]
struct Shared {
    events: broadcast::Sender<Event>,
    sequences: Sequences,
    calls: Switchboard,
    open: AtomicBool,
    redeliveries: AtomicU64,
    unrun: Tally,
    /// Queues that a consumer takes jobs of: they are there, also while they are empty.
    consumed: Mutex<BTreeSet<String>>,
}

impl EmbeddedQueue {
    /// Opens the queue in the file at `path`, which is made if it is not there (its directory must be).
    /// Blocks for some milliseconds. Jobs that the file's last owner left running wait again.
    ///
    /// # Errors
    /// [`QueueError::Setup`] if another process owns the file, or if it cannot be opened or read.
    pub fn open(path: &Path, options: EmbeddedOptions) -> Result<Self, QueueError> {
        let db = sqlite::open(path, schema::SCHEMA, schema::VERSION)?;
        let setup = |e: &dyn std::fmt::Display| QueueError::Setup(format!("open {}: {e}", path.display()));
        let shared = Arc::new(Shared {
            events: broadcast::Sender::new(options.event_buffer.max(1)),
            sequences: Sequences::default(),
            calls: Switchboard::default(),
            open: AtomicBool::new(true),
            redeliveries: AtomicU64::new(0),
            unrun: Tally::default(),
            consumed: Mutex::default(),
        });
        let (commands, inbox) = mpsc::channel();
        let writer = Writer::new(db, Arc::clone(&shared), commands.clone(), options.keep_finished)
            .map_err(|e| setup(&e))?;
        let watch = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("hutch-queue".to_owned())
            .spawn(move || {
                writer.run(&inbox);
                watch.close();
            })
            .map_err(|e| setup(&e))?;
        let inner = Inner {
            commands,
            shared,
            room: Arc::new(Semaphore::new(ROOM_KIB)),
            writer: Mutex::new(Some(thread)),
        };
        Ok(Self { inner: Arc::new(inner), readers: Readers::new(path) })
    }

    /// The jobs that were given up, oldest first, at most `limit`.
    ///
    /// # Errors
    /// [`QueueError::Unavailable`] if they cannot be read now.
    pub async fn dead_letters(&self, limit: usize) -> Result<Vec<DeadLetter>, QueueError> {
        self.readers.read(move |db| schema::dead_letters(db, limit)).await
    }
}

impl Inner {
    fn send(&self, command: Command) -> Result<(), QueueError> {
        self.commands.send(command).map_err(|_| QueueError::Closed)
    }

    /// Sends a command and waits for its answer.
    async fn ask<T>(
        &self,
        command: Command,
        answer: oneshot::Receiver<Result<T, QueueError>>,
    ) -> Result<T, QueueError> {
        self.send(command)?;
        answer.await.unwrap_or(Err(QueueError::Closed))
    }

    fn join(&self) {
        let thread = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the queue's writer panicked");
        }
    }
}

impl Drop for Inner {
    /// Waits for the writer's last turn, so that the file is free when this returns.
    fn drop(&mut self) {
        let (reply, _) = oneshot::channel();
        let _ = self.commands.send(Command::Close { reply });
        self.join();
    }
}

impl Shared {
    fn close(&self) {
        self.open.store(false, Ordering::Release);
    }

    fn begin(&self, id: JobId, attempt: u32) {
        if attempt > 1 {
            self.redeliveries.fetch_add(1, Ordering::Relaxed);
        }
        self.sequences.begin(id, attempt);
    }

    fn tell_finished(&self, result: &JobResult) {
        // Without subscribers there is nobody to tell.
        let _ = self.events.send(self.sequences.finished(result));
    }
}

#[async_trait]
impl Queue for EmbeddedQueue {
    async fn submit(&self, job: &JobSpec) -> Result<Submitted, QueueError> {
        let spec = serde_json::to_vec(job)
            .map_err(|e| QueueError::Setup(format!("job {} is no JSON: {e}", job.id)))?;
        let size = u32::try_from((spec.len() / 1024 + 1).min(ROOM_KIB)).unwrap_or(1);
        let room =
            Arc::clone(&self.inner.room).acquire_many_owned(size).await.map_err(|_| QueueError::Closed)?;
        let job = Box::new(NewJob {
            id: job.id,
            queue: job.queue.clone(),
            priority: job.priority,
            max_attempts: job.max_attempts,
            expires_in_ms: job.expires_in_ms,
            labels: job.labels.clone(),
            spec,
        });
        let (reply, answer) = oneshot::channel();
        self.inner.ask(Command::Submit { job, _room: room, reply }, answer).await
    }

    async fn cancel(&self, id: JobId) -> Result<CancelOutcome, QueueError> {
        let (reply, answer) = oneshot::channel();
        self.inner.ask(Command::Cancel { id, reply }, answer).await
    }

    async fn get(&self, id: JobId) -> Result<Option<JobView>, QueueError> {
        self.readers.read(move |db| views::get(db, id)).await
    }

    async fn list(&self, filter: &ListFilter) -> Result<Vec<JobView>, QueueError> {
        let filter = filter.clone();
        self.readers.read(move |db| views::list(db, &filter)).await
    }

    async fn depths(&self) -> Result<Vec<QueueDepth>, QueueError> {
        let mut depths = self.readers.read(views::depths).await?;
        let consumed = self.inner.shared.consumed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for queue in consumed {
            if let Err(place) = depths.binary_search_by(|depth| depth.queue.cmp(&queue)) {
                depths.insert(place, QueueDepth { queue, queued: 0, running: 0 });
            }
        }
        Ok(depths)
    }

    async fn publish(&self, event: Event) {
        self.inner.shared.sequences.note(&event);
        // Without subscribers there is nobody to tell.
        let _ = self.inner.shared.events.send(event);
    }

    fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.inner.shared.events.subscribe()
    }

    async fn consumer(&self, config: &ConsumerConfig) -> Result<Box<dyn Consumer>, QueueError> {
        if !self.connected() {
            return Err(QueueError::Closed);
        }
        let mut consumed = self.inner.shared.consumed.lock().unwrap_or_else(PoisonError::into_inner);
        consumed.extend(config.queues.iter().cloned());
        drop(consumed);
        Ok(Box::new(EmbeddedConsumer::new(Arc::clone(&self.inner), config)))
    }

    async fn call(&self, id: JobId) -> Result<Option<Call>, QueueError> {
        Ok(self.inner.shared.calls.put_through(id))
    }

    fn calls(&self) -> Option<tokio::sync::mpsc::Receiver<Incoming>> {
        self.inner.shared.calls.answered()
    }

    fn connected(&self) -> bool {
        self.inner.shared.open.load(Ordering::Acquire)
    }

    fn counters(&self) -> Counters {
        Counters { reconnects: 0, redeliveries: self.inner.shared.redeliveries.load(Ordering::Relaxed) }
    }

    fn unrun(&self) -> Vec<Unrun> {
        self.inner.shared.unrun.all()
    }

    async fn close(&self) {
        let (reply, answer) = oneshot::channel();
        if self.inner.send(Command::Close { reply }).is_ok() {
            // An error means that the writer has ended without a word, which is as good here.
            let _ = answer.await;
        }
    }
}
