//! An engine, wherever it is.

use std::sync::Arc;

use hutch_trees::Trees;

use super::remote_trees::RemoteTrees;
use super::worker_side::RemoteEngine;
use crate::engine::{Engine, Order};
use crate::observe::{Observer, SlotGauges};
use crate::report::Report;

/// An engine in this process or in one of its own; cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle(Place);

#[derive(Debug, Clone)]
enum Place {
    Here(Engine),
    There(Arc<RemoteEngine>),
}

impl From<Engine> for EngineHandle {
    fn from(engine: Engine) -> Self {
        Self(Place::Here(engine))
    }
}

impl EngineHandle {
    pub(super) fn remote(engine: RemoteEngine) -> Self {
        Self(Place::There(Arc::new(engine)))
    }

    /// Runs one job to its verdict. Whatever goes wrong is in the report.
    pub async fn run(&self, order: Order, observer: &dyn Observer) -> Report {
        match &self.0 {
            Place::Here(engine) => engine.run(order, observer).await,
            Place::There(engine) => engine.run(order, observer).await,
        }
    }

    /// The stored layers of the engine's host; none if its jobs can stack none.
    #[must_use]
    pub fn trees(&self) -> Option<Arc<dyn Trees>> {
        match &self.0 {
            Place::Here(engine) => engine.trees().cloned().map(|trees| Arc::new(trees) as Arc<dyn Trees>),
            Place::There(engine) => Some(Arc::new(RemoteTrees(Arc::clone(engine)))),
        }
    }

    /// The cgroups of the jobs that run now. It asks the engine, and waits for the answer.
    #[must_use]
    pub fn gauges(&self) -> Vec<SlotGauges> {
        match &self.0 {
            Place::Here(engine) => engine.gauges(),
            Place::There(engine) => engine.gauges(),
        }
    }

    /// Whether sandboxes can be made still: engine and launcher live.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        match &self.0 {
            Place::Here(engine) => engine.is_alive(),
            Place::There(engine) => engine.is_alive(),
        }
    }

    /// How many left-over sandboxes were removed at the start.
    #[must_use]
    pub fn reaped(&self) -> u64 {
        match &self.0 {
            Place::Here(engine) => engine.reaped(),
            Place::There(engine) => engine.reaped(),
        }
    }
}
