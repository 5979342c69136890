//! The engine: one job, one fresh sandbox.

mod config;
mod observe;
mod report;

use std::sync::Arc;

use hutch_proto::{JobSpec, Outputs, Reason, Timestamp};
use tokio_util::sync::CancellationToken;

pub use config::EngineConfig;
pub use observe::{Observer, SlotGauges, Stream, Unobserved};
pub use report::{Durations, JobFacts, Report};

/// A process of its own, small and with one thread, from which sandboxes are forked.
#[derive(Debug)]
pub struct Launcher(());

impl Launcher {
    /// Forks the launcher. Call it first in `main`, while the process has one thread.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn fork() -> Result<Self, EngineError> {
        Ok(Self(()))
    }
}

/// Why there can be no engine on this host.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct EngineError(String);

/// Runs jobs; cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine(#[expect(dead_code, reason = "read by the stages to come")] Arc<EngineConfig>);

/// One job for the engine.
#[derive(Debug)]
pub struct Order {
    /// The job, its blobs already resolved to inline content.
    pub job: JobSpec,
    /// The slot it runs in; no two running jobs share one.
    pub slot: u32,
    /// Cancels it.
    pub cancel: CancellationToken,
}

impl Engine {
    /// An engine on this host: looks at what the kernel can do, removes what a killed predecessor left.
    ///
    /// # Errors
    /// If no job could be isolated here; the message names the remedy.
    pub fn new(launcher: Launcher, config: EngineConfig) -> Result<Self, EngineError> {
        let _ = launcher;
        Ok(Self(Arc::new(config)))
    }

    /// Runs one job to its verdict. Whatever goes wrong is in the report.
    pub async fn run(&self, order: Order, _observer: &dyn Observer) -> Report {
        let _ = order;
        Report {
            status: Reason::HostError.status(),
            reason: Some(Reason::HostError),
            message: "the engine is not there yet".to_owned(),
            limit: None,
            exit_code: None,
            signal: None,
            stdout: Default::default(),
            stderr: Default::default(),
            usage: Default::default(),
            outputs: Outputs::default(),
            archive: None,
            steps: Vec::new(),
            started_at: None,
            finished_at: Timestamp::now(),
            durations: Durations::default(),
        }
    }

    /// The cgroups of the jobs that run now.
    #[must_use]
    pub fn gauges(&self) -> Vec<SlotGauges> {
        Vec::new()
    }

    /// How many left-over sandboxes were removed at the start.
    #[must_use]
    pub fn reaped(&self) -> u64 {
        0
    }
}
