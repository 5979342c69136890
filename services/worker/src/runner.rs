//! What a worker asks of an engine.

use async_trait::async_trait;
use hutch_sandbox::{Engine, Observer, Order, Report, SlotGauges};

/// Runs jobs: the engine, or in tests something that only pretends to.
#[async_trait]
pub trait Runner: Send + Sync + 'static {
    /// Runs one job to its verdict.
    async fn run(&self, order: Order, observer: &dyn Observer) -> Report;

    /// The cgroups of the jobs that run now.
    fn gauges(&self) -> Vec<SlotGauges> {
        Vec::new()
    }

    /// How many left-over sandboxes were removed at the start.
    fn reaped(&self) -> u64 {
        0
    }
}

#[async_trait]
impl Runner for Engine {
    async fn run(&self, order: Order, observer: &dyn Observer) -> Report {
        Engine::run(self, order, observer).await
    }

    fn gauges(&self) -> Vec<SlotGauges> {
        Engine::gauges(self)
    }

    fn reaped(&self) -> u64 {
        Engine::reaped(self)
    }
}
