//! Programs in running jobs, on the engine's side: the engine brings them in and waits for their end; their streams go
//! over the link once, and are the worker's from then on.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::engine_side::Outbox;
use super::message::{Refused, Tell, stream_fds};
use super::wire::{LinkError, Message};
use crate::engine::Engine;
use crate::exec::{Entered, ExecEnd, ExecOrder};

/// The most programs at one time.
const MOST: usize = 256;

/// Brings programs into jobs.
#[derive(Clone)]
pub(super) struct ExecSide {
    engine: Engine,
    outbox: Outbox,
    here: Arc<Mutex<HashMap<u64, CancellationToken>>>,
    /// Messages that the worker has not taken.
    underway: Arc<AtomicUsize>,
}

impl ExecSide {
    pub(super) fn new(engine: Engine, outbox: Outbox) -> Self {
        Self { engine, outbox, here: Arc::default(), underway: Arc::default() }
    }

    fn here(&self) -> MutexGuard<'_, HashMap<u64, CancellationToken>> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings a program into a job, and tells how it ended.
    pub(super) fn enter(
        &self,
        exec: u64,
        job: &str,
        parts: &[Vec<u8>],
        runtime: &Runtime,
    ) -> Result<(), LinkError> {
        let job = job.parse().map_err(|_| LinkError::Wrong("a job's id"))?;
        let [order] = parts else { return Err(LinkError::Wrong("an order's parts")) };
        let order: ExecOrder = serde_json::from_slice(order).map_err(|_| LinkError::Wrong("an order"))?;
        if self.underway.load(Ordering::Relaxed) > 2 * MOST {
            return Err(LinkError::Wrong("it asks for programs and does not listen"));
        }
        let left = CancellationToken::new();
        {
            let mut here = self.here();
            if here.len() >= MOST {
                let why = format!("{MOST} programs are in running jobs already");
                self.tell(Message::of(Tell::Ended { exec, end: Err(Refused::Host(why)) }));
                return Ok(());
            }
            if here.insert(exec, left.clone()).is_some() {
                return Err(LinkError::Wrong("a number is of two programs"));
            }
        }
        let side = self.clone();
        runtime.spawn(async move {
            // Whoever drops it kills the program.
            let ended = left.run_until_cancelled(side.run(exec, job, &order)).await;
            side.here().remove(&exec);
            if let Some(end) = ended {
                side.tell(Message::of(Tell::Ended { exec, end }));
            }
        });
        Ok(())
    }

    /// Ends a program that nobody waits for.
    pub(super) fn leave(&self, exec: u64) {
        if let Some(left) = self.here().get(&exec) {
            left.cancel();
        }
    }

    async fn run(&self, exec: u64, job: hutch_proto::JobId, order: &ExecOrder) -> Result<ExecEnd, Refused> {
        let Entered { streams, program } = self.engine.enter(job, order).await?;
        let (third, fds) = stream_fds(streams);
        self.tell(Message { what: Tell::Entered { exec, third }, parts: Vec::new(), fds });
        Ok(program.end().await?)
    }

    fn tell(&self, message: Message<Tell>) {
        self.underway.fetch_add(1, Ordering::Relaxed);
        self.outbox.answer(message, Arc::clone(&self.underway));
    }
}
