//! One attempt at one job: fetch its blobs and layers, run it, keep its archive and the layer that it committed.
//!
//! A blob store that cannot be reached is waited for, job in hand. What is then still wrong is either
//! the job's own fault, and its result says so, or this host's, and no result is made.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hutch_layers::{BlobStore, LayerError, LayerRecord, Layers, StoreError};
use hutch_proto::{Digest, JobId, JobResult, JobSpec, Reason, Status, Timestamp};
use hutch_queue::Queue;
use hutch_sandbox::{EngineHandle, JobFacts, Order, Remains, Report};
use tokio_util::sync::CancellationToken;

use crate::WorkerConfig;
use crate::inputs::{self, InputError};
use crate::relay::{Relay, Speaker};

/// How an attempt ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// With a verdict on the job.
    Verdict(Box<JobResult>, Option<Box<Remains>>),
    /// With a fault of this host: nothing is said of the job.
    Fault {
        /// `host_error`, or what the engine called it.
        reason: Reason,
        /// What happened, in words.
        message: String,
    },
}

impl Outcome {
    pub(crate) fn fault(message: impl Into<String>) -> Self {
        Self::Fault { reason: Reason::HostError, message: message.into() }
    }
}

/// What every attempt of a worker shares.
#[derive(Clone)]
pub(crate) struct Means {
    pub(crate) engine: EngineHandle,
    pub(crate) queue: Arc<dyn Queue>,
    pub(crate) blobs: BlobStore,
    pub(crate) layers: Layers,
    pub(crate) config: Arc<WorkerConfig>,
}

/// One attempt, before it is made.
pub(crate) struct Attempt {
    pub(crate) means: Means,
    pub(crate) slot: u32,
    pub(crate) job: JobSpec,
    pub(crate) attempt: u32,
    pub(crate) submitted_at: Timestamp,
    /// Ends the program.
    pub(crate) cancel: CancellationToken,
    /// Ends the waiting for a store.
    pub(crate) hurry: CancellationToken,
}

impl Attempt {
    /// Makes the attempt.
    pub(crate) async fn run(self) -> Outcome {
        let facts = self.facts();
        let Self { means, slot, mut job, cancel, hurry, .. } = self;
        match fetch(&means, &mut job, &hurry).await {
            Ok(()) => {}
            Err(InputError::Wrong(problem)) => {
                return rejected(facts, Reason::SpecInvalid, problem.to_string());
            }
            Err(error) => return Outcome::fault(error.to_string()),
        }
        match stack(&means, &mut job, &hurry).await {
            Ok(()) => {}
            Err(error @ LayerError::Wrong { .. }) => {
                return rejected(facts, Reason::ImageError, error.to_string());
            }
            Err(error) => return Outcome::fault(error.to_string()),
        }
        let speaker = Speaker { id: facts.id, attempt: facts.attempt, worker: facts.worker.clone() };
        let relay = Relay::start(Arc::clone(&means.queue), speaker);
        let mut report = means.engine.run(Order { job, slot, cancel, strokes: None }, &relay).await;
        relay.close().await;
        if report.status == Status::InfraError {
            return Outcome::Fault {
                reason: report.reason.unwrap_or(Reason::HostError),
                message: report.message,
            };
        }
        let kept = match keep_archive(&means, &mut report, &hurry).await {
            Ok(()) => keep_layer(&means, facts.id, &mut report, &hurry).await,
            Err(error) => Err(error),
        };
        match kept {
            Ok(()) => {
                let remains = report.remains.take().map(Box::new);
                Outcome::Verdict(Box::new(report.into_result(facts)), remains)
            }
            Err(error) => Outcome::fault(format!("the outputs could not be kept: {}", error.full())),
        }
    }

    fn facts(&self) -> JobFacts {
        JobFacts {
            id: self.job.id,
            attempt: self.attempt,
            worker: self.means.config.name.clone(),
            submitted_at: self.submitted_at,
            labels: self.job.labels.clone(),
        }
    }
}

/// Puts bytes in place of the blobs that the job names.
async fn fetch(means: &Means, job: &mut JobSpec, hurry: &CancellationToken) -> Result<(), InputError> {
    let mut patience = Patience::new(&means.config, hurry);
    loop {
        match inputs::resolve(job, &means.blobs, means.config.max_input_bytes).await {
            Err(InputError::Store { source, .. })
                if source.is_transient() && patience.wait(&source).await => {}
            done => return done,
        }
    }
}

/// Expands the job's layers, and has them here.
async fn stack(means: &Means, job: &mut JobSpec, hurry: &CancellationToken) -> Result<(), LayerError> {
    let mut patience = Patience::new(&means.config, hurry);
    loop {
        let mut expanded = job.clone();
        match means.layers.resolve(&mut expanded).await {
            Err(LayerError::Store { source, .. }) if patience.wait(&source).await => {}
            Ok(()) => {
                *job = expanded;
                return Ok(());
            }
            failed => return failed,
        }
    }
}

/// Keeps the layer that the job committed, where any worker finds it.
async fn keep_layer(
    means: &Means,
    id: JobId,
    report: &mut Report,
    hurry: &CancellationToken,
) -> Result<(), StoreError> {
    let Some(layer) = report.layer.take() else { return Ok(()) };
    let record = LayerRecord { diff_id: layer.diff_id, blob: layer.blob, bytes: layer.bytes };
    let mut patience = Patience::new(&means.config, hurry);
    loop {
        let reopened = layer.file.try_clone();
        let again = reopened
            .map_err(|source| StoreError::Transfer { operation: "cannot reopen the layer", source })?;
        match means.layers.commit(id, &record, again).await {
            Err(error) if error.is_transient() && patience.wait(&error).await => {}
            done => return done,
        }
    }
}

/// Puts the archive into the store under the digest that the report names.
async fn keep_archive(
    means: &Means,
    report: &mut Report,
    hurry: &CancellationToken,
) -> Result<(), StoreError> {
    let Some((archive, file)) = report.outputs.archive.as_ref().zip(report.archive.take()) else {
        return Ok(());
    };
    let mut patience = Patience::new(&means.config, hurry);
    loop {
        match put(means, &file, &archive.blob).await {
            Err(error) if error.is_transient() && patience.wait(&error).await => {}
            done => return done,
        }
    }
}

async fn put(means: &Means, file: &File, digest: &Digest) -> Result<(), StoreError> {
    let again = file
        .try_clone()
        .map_err(|source| StoreError::Transfer { operation: "cannot reopen the archive", source })?;
    means.blobs.put_file(again, digest).await.map(drop)
}

/// The result of a job that asks for what cannot be given.
fn rejected(facts: JobFacts, reason: Reason, message: String) -> Outcome {
    let mut result = JobResult::without_run(facts.id, facts.labels, facts.submitted_at, reason, message);
    result.attempt = facts.attempt;
    result.worker = facts.worker;
    Outcome::Verdict(Box::new(result), None)
}

/// Waits between tries, longer each time, until it has waited enough.
struct Patience<'a> {
    until: Instant,
    next: Duration,
    hurry: &'a CancellationToken,
}

impl<'a> Patience<'a> {
    fn new(config: &WorkerConfig, hurry: &'a CancellationToken) -> Self {
        Self { until: Instant::now() + config.store_patience, next: Duration::from_millis(100), hurry }
    }

    /// Whether to try again, after a pause.
    async fn wait(&mut self, error: &StoreError) -> bool {
        if Instant::now() >= self.until {
            return false;
        }
        let pause = self.next;
        self.next = (pause * 2).min(Duration::from_secs(5));
        tracing::warn!(error = %error.full(), "the blob store failed, trying again in {pause:?}");
        tokio::select! {
            () = self.hurry.cancelled() => false,
            () = tokio::time::sleep(pause) => true,
        }
    }
}
