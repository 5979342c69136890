//! The queue: one contract, two homes.
//!
//! A job goes `submit -> take -> finish`; on the way it may be given back or cancelled. What holds,
//! on every home:
//!
//! - `submit` is idempotent by id and returns once the job is durable.
//! - `take` hands a job to one consumer at a time, under a lease with a fencing token.
//! - The terminal record of a job is made once, by a conditional create, before anyone hears of it.
//!   Whoever gets the job again finds the record and answers with the same bytes.
//! - A job leaves the queue only after its result is durable.
//! - A job that need not run any more (cancelled, expired, finished before, out of attempts) is
//!   settled inside `take` and never seen by a worker.
//!
//! [`embedded`] is SQLite, for one machine; [`rabbitmq`] is for more than one.

mod calls;
mod cap;
pub mod embedded;
pub mod rabbitmq;
mod sequence;
mod sqlite;
mod unrun;
mod views;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use hutch_proto::{Event, JobId, JobResult, JobSpec, JobState, JobView, Timestamp};

pub use self::calls::{Call, Incoming};
pub use self::unrun::Unrun;

/// A queue, as a gateway or a worker sees it.
#[async_trait]
pub trait Queue: Send + Sync + fmt::Debug {
    /// Accepts a job, durably; the same id again changes nothing.
    ///
    /// # Errors
    /// [`QueueError::Unavailable`] if it cannot be said that the job is durable.
    async fn submit(&self, job: &JobSpec) -> Result<Submitted, QueueError>;

    /// Asks for a job to be cancelled, wherever it is. Returns whether the job was known and not finished.
    ///
    /// # Errors
    /// [`QueueError::Unavailable`] if the wish could not be passed on.
    async fn cancel(&self, id: JobId) -> Result<CancelOutcome, QueueError>;

    /// What is known of a job.
    ///
    /// # Errors
    /// [`QueueError::Unavailable`] if it cannot be looked up now.
    async fn get(&self, id: JobId) -> Result<Option<JobView>, QueueError>;

    /// Jobs, newest first.
    ///
    /// # Errors
    /// [`QueueError::Unavailable`] if they cannot be looked up now.
    async fn list(&self, filter: &ListFilter) -> Result<Vec<JobView>, QueueError>;

    /// How many jobs wait and run, by queue.
    ///
    /// # Errors
    /// [`QueueError::Unavailable`] if it cannot be told now.
    async fn depths(&self) -> Result<Vec<QueueDepth>, QueueError>;

    /// Tells of something that happened to a job. Best effort: events may be lost.
    async fn publish(&self, event: Event);

    /// Events of all jobs from now on; a receiver that is too slow loses the oldest.
    fn subscribe(&self) -> tokio::sync::broadcast::Receiver<Event>;

    /// The end that takes jobs, for one slot of a worker.
    ///
    /// # Errors
    /// [`QueueError::Unavailable`] if the queue cannot be reached now.
    async fn consumer(&self, config: &ConsumerConfig) -> Result<Box<dyn Consumer>, QueueError>;

    /// Calls whoever runs a job now, to talk with him; none if nobody says that he does.
    ///
    /// # Errors
    /// [`QueueError::Unavailable`] if nobody can be called now.
    async fn call(&self, id: JobId) -> Result<Option<Call>, QueueError>;

    /// The calls about jobs whose leases are held here, for whoever asks first: he answers them.
    fn calls(&self) -> Option<tokio::sync::mpsc::Receiver<Incoming>>;

    /// Whether the queue can be reached now.
    fn connected(&self) -> bool;

    /// What has happened to the connection so far.
    fn counters(&self) -> Counters {
        Counters::default()
    }

    /// Jobs that ended here without a run: cancelled or expired while they waited, out of attempts,
    /// or unreadable. What a consumer has finished is not among them.
    fn unrun(&self) -> Vec<Unrun> {
        Vec::new()
    }

    /// Lets what is under way end and closes.
    async fn close(&self);
}

/// One slot's end of a queue. It holds at most one lease at a time.
#[async_trait]
pub trait Consumer: Send {
    /// Waits for the next job. Cancel-safe: dropping the future loses no job.
    ///
    /// # Errors
    /// [`QueueError::Closed`] after the queue was closed; whatever can be mended (a lost connection, a
    /// deleted queue) is mended inside.
    async fn take(&mut self) -> Result<Lease, QueueError>;

    /// Makes the result the job's terminal record, tells of it, and lets the job go.
    ///
    /// # Errors
    /// [`QueueError::Fenced`] if the lease was lost to another consumer meanwhile; [`QueueError::Setup`] if
    /// this result cannot be kept, now or later: the job was given back as failed. Waits out a queue that
    /// cannot be reached. Output beyond what the queue carries is cut, and the result says so.
    async fn finish(&mut self, lease: Lease, result: JobResult) -> Result<Finished, QueueError>;

    /// Puts the job back so that another may take it.
    ///
    /// # Errors
    /// As for [`Consumer::finish`].
    async fn give_back(&mut self, lease: Lease, how: GiveBack) -> Result<(), QueueError>;

    /// Completes when somebody asks for this job to be cancelled, or when its lease was lost, so that
    /// its result is not wanted any more. For a job that this consumer does not hold it never does.
    async fn cancelled(&mut self, id: JobId);
}

/// A job in the hands of a consumer.
#[derive(Debug)]
pub struct Lease {
    /// The job.
    pub job: JobSpec,
    /// Which attempt this is, from 1.
    pub attempt: u32,
    /// When the queue accepted it.
    pub submitted_at: Timestamp,
    /// Names this lease; a stale one is refused.
    pub token: Token,
}

/// Names a lease at its home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token(pub u64);

/// Why a job is put back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GiveBack {
    /// The worker or its host failed: an attempt is spent. When none is left, the job is settled as
    /// `infra_error` with this reason and message, and a dead letter is kept.
    Failed {
        /// `worker_lost` or `host_error`.
        reason: hutch_proto::Reason,
        /// What happened, in words.
        message: String,
    },
    /// It was not tried, or not to its end, for no fault of its own (a drain): no attempt is spent.
    Unspent,
}

/// What became of a submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Submitted {
    /// The job is new.
    New,
    /// A job of this id was there before; nothing changed.
    Known,
}

/// What became of a wish to cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelOutcome {
    /// It is, or will be, cancelled, unless it ends by itself first.
    Accepted,
    /// It had ended already.
    AlreadyFinished,
    /// Nothing is known of it.
    Unknown,
}

/// What became of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finished {
    /// This is the job's result.
    Recorded,
    /// The job had another result before; that one stands and was told again.
    AlreadyFinished,
}

/// Which jobs to list.
#[derive(Debug, Clone, Default)]
pub struct ListFilter {
    /// Only those in this state.
    pub state: Option<JobState>,
    /// Only those whose result has this status.
    pub status: Option<hutch_proto::Status>,
    /// Only those with this label and value.
    pub label: Option<(String, String)>,
    /// Only those submitted before this one.
    pub after: Option<JobId>,
    /// At most this many.
    pub limit: usize,
}

/// How many jobs wait and run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueDepth {
    /// The queue's name, such as `default`.
    pub queue: String,
    /// Jobs that wait.
    pub queued: u64,
    /// Jobs that a worker has.
    pub running: u64,
}

/// Who takes jobs, and of which queues.
#[derive(Debug, Clone)]
pub struct ConsumerConfig {
    /// The worker's name; in results.
    pub worker: String,
    /// Names of the queues, such as `default`.
    pub queues: Vec<String>,
    /// How long a lease lives without a sign of life from its holder (embedded queue).
    pub lease: Duration,
}

/// What has happened to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// How often it was made anew.
    pub reconnects: u64,
    /// How many jobs came a second time.
    pub redeliveries: u64,
}

/// Why a queue did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// It cannot be reached, or does not answer in time; try again.
    #[error("the queue is not available: {0}")]
    Unavailable(String),
    /// The lease is another consumer's now; its result is not wanted.
    #[error("the lease on job {0} was lost to another worker")]
    Fenced(JobId),
    /// The queue was closed by its owner.
    #[error("the queue is closed")]
    Closed,
    /// It is set up in a way that cannot work; trying again does not help.
    #[error("{0}")]
    Setup(String),
}
