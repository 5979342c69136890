//! The engine's side of the link, in the process that keeps the privileges.
//!
//! One thread reads what the worker asks, one writes what it is told, and jobs run on the runtime: none of them waits for
//! the worker. What is told of a running job is lost if the worker does not take it in time; its report, of which there
//! is at most one for each slot, never is. A message that is not as it should be ends the link, and with it every
//! sandbox: nothing is lost by it, since jobs that have no result are given to somebody else.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use hutch_proto::Usage;
use hutch_sandbox_sys::PacketSocket;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::exec_side::ExecSide;
use super::layers_side::LayersSide;
use super::message::{ASK_FDS, Ask, Tell, is_stderr, job_of, report_parts};
use super::wire::{self, LinkError, MAX_PACKET, Message};
use crate::engine::{Engine, Order};
use crate::observe::{Observer, Stream};
use crate::proof::Proof;
use crate::refusal::Refusal;
use crate::report::{Remains, Report};

/// The most bytes and messages that wait for the worker, reports apart.
const MOST_WAITING: usize = 8 << 20;
/// What a message costs beside the bytes that it carries.
const MESSAGE: usize = 256;

/// One slot, as the worker sees it.
#[derive(Debug, Default)]
struct Slot {
    /// The job in it, until its report is on its way.
    running: Mutex<Option<(u64, CancellationToken)>>,
    /// What is left of its last job. Locked while there is a job: a slot's jobs and their remains come one after another.
    remains: tokio::sync::Mutex<Option<Remains>>,
}

impl Slot {
    fn running(&self) -> MutexGuard<'_, Option<(u64, CancellationToken)>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something for the worker.
enum Outgoing {
    /// It may be lost; this is what it weighs.
    Event(Message<Tell>, usize),
    /// A slot's report, or the proof that was made in it: the slot is free from then on.
    Report(Message<Tell>, Arc<Slot>),
    /// An answer of which only so many are under way.
    Answer(Message<Tell>, Arc<AtomicUsize>),
}

/// Where messages for the worker wait.
#[derive(Clone)]
pub(super) struct Outbox {
    sender: mpsc::Sender<Outgoing>,
    waiting: Arc<AtomicUsize>,
}

impl Outbox {
    /// Tells, whatever waits already; it is under way until then.
    pub(super) fn answer(&self, message: Message<Tell>, underway: Arc<AtomicUsize>) {
        // As below.
        let _ = self.sender.send(Outgoing::Answer(message, underway));
    }

    /// Tells, unless the worker is too far behind.
    pub(super) fn event(&self, message: Message<Tell>) {
        let weight = MESSAGE + message.bytes();
        if self.waiting.fetch_add(weight, Ordering::Relaxed) + weight > MOST_WAITING {
            self.waiting.fetch_sub(weight, Ordering::Relaxed);
            return;
        }
        // A writer that is gone means that the worker is.
        let _ = self.sender.send(Outgoing::Event(message, weight));
    }

    fn write(&self, socket: &PacketSocket, receiver: &mpsc::Receiver<Outgoing>) {
        for outgoing in receiver {
            let message = match outgoing {
                Outgoing::Event(message, weight) => {
                    self.waiting.fetch_sub(weight, Ordering::Relaxed);
                    message
                }
                Outgoing::Answer(message, underway) => {
                    underway.fetch_sub(1, Ordering::Relaxed);
                    message
                }
                Outgoing::Report(message, slot) => {
                    // Before the worker can know of it, and ask for the next.
                    *slot.running() = None;
                    message
                }
            };
            if let Err(error) = wire::send(socket, &message) {
                tracing::debug!(%error, "the worker is gone");
                break;
            }
        }
        socket.close();
    }
}

/// Hears of one run.
struct Ear {
    run: u64,
    outbox: Outbox,
}

impl Observer for Ear {
    fn started(&self) {
        self.outbox.event(Message::of(Tell::Started { run: self.run }));
    }

    fn output(&self, step: &str, stream: Stream, bytes: &[u8]) {
        let what = Tell::Output { run: self.run, step: step.to_owned(), stderr: is_stderr(stream) };
        self.outbox.event(Message { parts: vec![bytes.to_vec()], ..Message::of(what) });
    }

    fn usage(&self, usage: &Usage) {
        if let Ok(json) = serde_json::to_vec(usage) {
            let what = Tell::Usage { run: self.run };
            self.outbox.event(Message { parts: vec![json], ..Message::of(what) });
        }
    }
}

/// Serves a worker until it is gone, or says what it should not; then every sandbox ends. `most` is how many bytes a
/// message of the worker's may have.
pub(super) fn serve(socket: PacketSocket, engine: Engine, runtime: &Runtime, most: u64) {
    let socket = Arc::new(socket);
    let (sender, receiver) = mpsc::channel();
    let outbox = Outbox { sender, waiting: Arc::default() };
    let side = EngineSide {
        slots: (0..engine.slots()).map(|_| Arc::default()).collect(),
        engine: engine.clone(),
        layers: LayersSide::new(engine.trees(), outbox.clone()),
        execs: ExecSide::new(engine.clone(), outbox.clone()),
        outbox: outbox.clone(),
        runtime,
    };
    let writer = Arc::clone(&socket);
    std::thread::spawn(move || outbox.write(&writer, &receiver));
    let mut packet = vec![0; MAX_PACKET];
    loop {
        match wire::receive::<Ask, ASK_FDS>(&socket, &mut packet, most) {
            Ok(Some(message)) => {
                if let Err(error) = side.perform(message) {
                    tracing::error!(%error, "the worker asks what it may not; every job ends");
                    break;
                }
            }
            Ok(None) => break,
            Err(error) => {
                tracing::error!(%error, "the worker says what cannot be read; every job ends");
                break;
            }
        }
    }
    engine.end();
}

struct EngineSide<'a> {
    engine: Engine,
    slots: Vec<Arc<Slot>>,
    layers: LayersSide,
    execs: ExecSide,
    outbox: Outbox,
    runtime: &'a Runtime,
}

impl EngineSide<'_> {
    fn perform(&self, message: Message<Ask>) -> Result<(), LinkError> {
        match message.what {
            Ask::Run { run, slot } => return self.run(run, slot, message.parts),
            Ask::Cancel { run, slot } => {
                if let Some((_, cancel)) =
                    self.slot(slot)?.running().as_ref().filter(|(running, _)| *running == run)
                {
                    cancel.cancel();
                }
            }
            Ask::Prove { ticket } => return self.prove(ticket),
            Ask::TakeDown { slot } => {
                let slot = Arc::clone(self.slot(slot)?);
                self.runtime.spawn(async move {
                    take_down(slot.remains.lock().await.take()).await;
                });
            }
            Ask::Layers { ticket, ask } => self.layers.perform(ticket, ask, message.fds, self.runtime),
            Ask::Exec { exec, job } => self.execs.enter(exec, &job, &message.parts, self.runtime)?,
            Ask::Leave { exec } => self.execs.leave(exec),
            Ask::Gauges { ticket } => {
                let slots = self.engine.gauges().into_iter().map(Into::into).collect();
                self.outbox.event(Message::of(Tell::Gauges { ticket, slots }));
            }
        }
        Ok(())
    }

    fn slot(&self, slot: u32) -> Result<&Arc<Slot>, LinkError> {
        self.slots.get(slot as usize).ok_or(LinkError::Wrong("there is no such slot"))
    }

    fn prove(&self, ticket: u64) -> Result<(), LinkError> {
        let slot = Arc::clone(self.slot(0)?);
        if slot.running().replace((ticket, CancellationToken::new())).is_some() {
            return Err(LinkError::Wrong("the slot has a job already"));
        }
        let (engine, sender) = (self.engine.clone(), self.outbox.sender.clone());
        self.runtime.spawn(async move {
            let proving = tokio::spawn({
                let slot = Arc::clone(&slot);
                async move {
                    let mut remains = slot.remains.lock().await;
                    take_down(remains.take()).await;
                    engine.prove().await
                }
            });
            let proof = proving
                .await
                .unwrap_or_else(|error| Proof::failed(format!("the engine's own code failed: {error}")));
            let parts = vec![serde_json::to_vec(&proof).unwrap_or_default()];
            let told = Message { parts, ..Message::of(Tell::Proof { ticket }) };
            let _ = sender.send(Outgoing::Report(told, slot));
        });
        Ok(())
    }

    fn run(&self, run: u64, number: u32, parts: Vec<Vec<u8>>) -> Result<(), LinkError> {
        let slot = Arc::clone(self.slot(number)?);
        let cancel = CancellationToken::new();
        if slot.running().replace((run, cancel.clone())).is_some() {
            return Err(LinkError::Wrong("the slot has a job already"));
        }
        let ear = Ear { run, outbox: self.outbox.clone() };
        let engine = self.engine.clone();
        self.runtime.spawn(async move {
            let job = tokio::spawn({
                let (engine, slot) = (engine.clone(), Arc::clone(&slot));
                let Ear { run, outbox } = &ear;
                let ear = Ear { run: *run, outbox: outbox.clone() };
                async move {
                    let mut remains = slot.remains.lock().await;
                    take_down(remains.take()).await;
                    let mut report = match job_of(parts) {
                        Ok(job) => engine.run(Order { job, slot: number, cancel, strokes: None }, &ear).await,
                        Err(why) => {
                            Report::without_run(Refusal::host(format!("the engine got no job: {why}")))
                        }
                    };
                    *remains = report.remains.take();
                    report
                }
            });
            let report = job.await.unwrap_or_else(|error| {
                Report::without_run(Refusal::host(format!("the engine's own code failed: {error}")))
            });
            let alive = engine.is_alive();
            let _ = ear.outbox.sender.send(Outgoing::Report(told(run, alive, report), slot));
        });
        Ok(())
    }
}

fn told(run: u64, alive: bool, report: Report) -> Message<Tell> {
    // What cannot be read is a fault to the worker.
    let (parts, fds) = report_parts(report).unwrap_or_default();
    Message { what: Tell::Report { run, alive }, parts, fds }
}

/// Takes down what is left of a job, where nothing waits for it.
async fn take_down(remains: Option<Remains>) {
    let Some(remains) = remains else { return };
    if tokio::task::spawn_blocking(move || drop(remains)).await.is_err() {
        tracing::error!("a sandbox could not be taken down, it is left for the reaper");
    }
}
