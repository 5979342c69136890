//! An engine, wherever it is.

use std::sync::Arc;

use hutch_proto::JobId;
use hutch_trees::Trees;
use tokio::sync::mpsc;

use super::remote_trees::RemoteTrees;
use super::worker_side::RemoteEngine;
use crate::engine::{Engine, Order};
use crate::exec::{Entered, ExecEnd, ExecError, ExecOrder, attend};
use crate::observe::{Observer, SlotGauges, Stream};
use crate::proof::Proof;
use crate::report::Report;
use crate::terminal::Strokes;

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

    /// Runs one more program in a job that runs here, with every restriction of the job's own: see [`ExecOrder`]. Strokes
    /// go to it, its output comes from it, both at the pace of who is slower; the end of the strokes ends a pipe's input,
    /// and leaves a terminal open. When the future is dropped, the program is killed.
    ///
    /// # Errors
    /// If no such job runs here now, or the program could not be brought in.
    pub async fn exec(
        &self,
        id: JobId,
        order: &ExecOrder,
        strokes: &Strokes,
        output: &mpsc::Sender<(Stream, Vec<u8>)>,
    ) -> Result<ExecEnd, ExecError> {
        match &self.0 {
            Place::Here(engine) => {
                let Entered { streams, program } = engine.enter(id, order).await?;
                attend(streams, strokes, output, program.end()).await
            }
            Place::There(engine) => engine.exec(id, order, strokes, output).await,
        }
    }

    /// Attacks sandboxes of the engine's own, in slot 0, in which no job may run meanwhile: see [`Engine::prove`].
    pub async fn prove(&self) -> Proof {
        match &self.0 {
            Place::Here(engine) => engine.prove().await,
            Place::There(engine) => {
                let engine = Arc::clone(engine);
                let asked = tokio::task::spawn_blocking(move || engine.prove()).await;
                asked.unwrap_or_else(|error| Proof::failed(format!("the engine cannot be asked: {error}")))
            }
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
