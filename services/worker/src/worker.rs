//! The worker as a whole: its slots, its end, and what it says of itself.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hutch_layers::{BlobStore, Layers};
use hutch_queue::{Queue, QueueError};
use hutch_sandbox::EngineHandle;
use prometheus::Registry;
use tokio::task::JoinSet;

use crate::attempt::Means;
use crate::exec::answer_calls;
use crate::health::{Health, Isolation};
use crate::live::{Live, Shared};
use crate::metrics::Metrics;
use crate::slot::Slot;
use crate::{Drain, WorkerConfig};

/// How long after attacks that were not held they are tried again.
const PROVE_AGAIN: Duration = Duration::from_secs(30);

/// Why there can be no worker, or why it ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Its metrics cannot be as the config wants them.
    #[error("{0}")]
    Metrics(#[from] prometheus::Error),
    /// The queue cannot work as it is set up.
    #[error("{0}")]
    Queue(#[from] QueueError),
    /// No sandbox can be made any more; a new worker may do better.
    #[error("{0}")]
    Broken(String),
    /// A slot ended in a way that it never should.
    #[error("slot ended: {0}")]
    Slot(String),
}

/// Takes jobs from a queue and has them run.
pub struct Worker {
    means: Means,
    metrics: Arc<Metrics>,
    live: Arc<Live>,
    health: Arc<Health>,
    registry: Registry,
    drain: Drain,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("config", &self.means.config).finish_non_exhaustive()
    }
}

impl Worker {
    /// A worker that has not begun yet.
    ///
    /// # Errors
    /// [`WorkerError::Metrics`] if a label of `metric_labels` cannot be a label of metrics.
    pub fn new(
        engine: EngineHandle,
        queue: Arc<dyn Queue>,
        blobs: BlobStore,
        layers: Layers,
        config: WorkerConfig,
    ) -> Result<Self, WorkerError> {
        let registry = Registry::new();
        let ended = Arc::clone(&queue);
        let unrun = Arc::new(move || ended.unrun());
        let metrics = Metrics::new(&registry, config.slots, &config.metric_labels, unrun)?;
        let live = Arc::new(Live::new(engine.clone(), Arc::clone(&queue), layers.clone())?);
        registry.register(Box::new(Shared(Arc::clone(&live))))?;
        let health = Health::new(config.data_dir.clone());
        health.proved(if config.prove { Isolation::Untried } else { Isolation::Held });
        Ok(Self {
            health: Arc::new(health),
            means: Means { engine, queue, blobs, layers, config: Arc::new(config) },
            metrics: Arc::new(metrics),
            live,
            registry,
            drain: Drain::new(),
        })
    }

    /// Tells this worker to end; see [`Drain`].
    #[must_use]
    pub fn drain(&self) -> Drain {
        self.drain.clone()
    }

    /// All metrics of this worker.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Why this worker takes no jobs now; none if it does.
    #[must_use]
    pub fn not_ready(&self) -> Option<String> {
        if self.drain.stop.is_cancelled() {
            return Some("the worker is draining".to_owned());
        }
        if !self.means.queue.connected() {
            return Some("the queue is not connected".to_owned());
        }
        if !self.means.engine.is_alive() {
            return Some("the engine is gone: no sandbox can be made any more".to_owned());
        }
        self.health.not_ready()
    }

    /// Takes and runs jobs until it is told to end.
    ///
    /// # Errors
    /// [`WorkerError::Queue`] if the queue cannot work as it is set up; what can be mended is waited for.
    pub async fn run(&self) -> Result<(), WorkerError> {
        if !self.proven().await? {
            return Ok(());
        }
        let mut slots = JoinSet::new();
        for number in 0..self.means.config.slots {
            let slot = Slot {
                number,
                means: self.means.clone(),
                metrics: Arc::clone(&self.metrics),
                live: Arc::clone(&self.live),
                health: Arc::clone(&self.health),
                drain: self.drain.clone(),
            };
            slots.spawn(slot.run());
        }
        let (engine, calls) = (self.means.engine.clone(), self.means.queue.calls());
        let calls = tokio::spawn(async move {
            if let Some(calls) = calls {
                answer_calls(engine, calls).await;
            }
        });
        let grace = tokio::spawn(end_grace(self.drain.clone(), self.means.config.drain_grace));
        let mut end = Ok(());
        while let Some(slot) = slots.join_next().await {
            let slot = slot.map_err(|error| WorkerError::Slot(error.to_string()));
            if let Err(error) = slot.and_then(|ended| ended.map_err(WorkerError::from)) {
                // The others cannot do better; let them end what they have.
                self.drain.stop.cancel();
                end = Err(error);
            }
        }
        grace.abort();
        calls.abort();
        match self.health.broken() {
            Some(why) => Err(WorkerError::Broken(why)),
            None => end,
        }
    }

    /// Has the engine attack a sandbox of its own, unless the config says not to: why no job is taken, if one got through.
    /// [`Worker::run`] tries again; call it before that to know the answer first.
    pub async fn prove(&self) -> Option<String> {
        if !self.means.config.prove {
            return None;
        }
        let begun = Instant::now();
        let shortfall = tokio::select! {
            () = self.drain.stop.cancelled() => return self.health.unproven(),
            proof = self.means.engine.prove() => proof.shortfall(),
        };
        match &shortfall {
            None => tracing::info!(took_ms = begun.elapsed().as_millis(), "attacks on a sandbox were held"),
            Some(why) => {
                tracing::error!(why, "no job is taken: jobs would not be isolated; see `hutch doctor`")
            }
        }
        self.health.proved(shortfall.map_or(Isolation::Held, Isolation::Not));
        self.health.unproven()
    }

    /// Waits until attacks on a sandbox are held here; false if the worker is to end before that.
    async fn proven(&self) -> Result<bool, WorkerError> {
        if self.health.is_untried() {
            self.prove().await;
        }
        while let Some(why) = self.health.unproven() {
            if !self.means.engine.is_alive() {
                return Err(WorkerError::Broken(format!("no sandbox can be made here: {why}")));
            }
            tokio::select! {
                () = self.drain.stop.cancelled() => return Ok(false),
                () = tokio::time::sleep(PROVE_AGAIN) => {}
            }
            self.prove().await;
        }
        Ok(true)
    }
}

/// Hurries once the grace of a stopped worker is over.
async fn end_grace(drain: Drain, grace: Duration) {
    drain.stop.cancelled().await;
    tokio::time::sleep(grace).await;
    drain.hurry.cancel();
}
