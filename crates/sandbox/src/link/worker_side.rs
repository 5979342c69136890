//! The worker's side of the link, in the process without privileges.
//!
//! A thread reads what the engine tells and hands it to the run that it is about. If the engine is gone, every run ends as
//! a fault of this host.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc as sync_mpsc};
use std::time::Duration;

use hutch_proto::Usage;
use hutch_sandbox_sys::PacketSocket;
use hutch_sandbox_sys::separate::Privileged;
use tokio::sync::{Notify, mpsc, oneshot};

use super::message::{Ask, TELL_FDS, Tell, TellLayers, job_parts, report_of};
use super::remote_exec::Exec;
use super::wire::{self, LinkError, MAX_PACKET, Message};
use crate::engine::Order;
use crate::observe::{Observer, SlotGauges, Stream};
use crate::proof::Proof;
use crate::refusal::Refusal;
use crate::report::{Remains, Report};

/// How many pieces of news of one run may wait to be heard.
const WAITING: usize = 1024;
/// How long the engine may take to read its gauges.
const GAUGES: Duration = Duration::from_secs(2);
/// The most bytes of a message of the engine's, whom this side trusts.
pub(super) const MOST_TOLD: u64 = 1 << 30;

/// A worker's end of the link to an engine in another process.
#[derive(Debug)]
pub(crate) struct RemoteEngine {
    socket: Arc<PacketSocket>,
    process: Privileged,
    reaped: u64,
    pub(super) state: Arc<State>,
}

/// What both the reading thread and those who ask see.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) gone: AtomicBool,
    unfit: AtomicBool,
    /// The next number of a run, a ticket or a program.
    pub(super) next: AtomicU64,
    execs: Mutex<HashMap<u64, Exec>>,
    runs: Mutex<HashMap<u64, Run>>,
    /// Somebody's run has ended.
    ended: Notify,
    tickets: Mutex<HashMap<u64, sync_mpsc::Sender<Answer>>>,
}

/// A run that has no report yet.
#[derive(Debug)]
struct Run {
    slot: u32,
    news: mpsc::Sender<News>,
    report: oneshot::Sender<Report>,
}

/// What is answered to a ticket.
#[derive(Debug)]
pub(super) enum Answer {
    Gauges(Vec<SlotGauges>),
    Layers(TellLayers),
    Proof(Proof),
}

/// What is heard of a run.
#[derive(Debug)]
enum News {
    Started,
    Output(String, Stream, Vec<u8>),
    Usage(Usage),
}

impl State {
    fn runs(&self) -> MutexGuard<'_, HashMap<u64, Run>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn execs(&self) -> MutexGuard<'_, HashMap<u64, Exec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tickets(&self) -> MutexGuard<'_, HashMap<u64, sync_mpsc::Sender<Answer>>> {
        self.tickets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads until the engine is gone.
    fn listen(&self, socket: &PacketSocket) {
        let mut packet = vec![0; MAX_PACKET];
        loop {
            match wire::receive::<Tell, TELL_FDS>(socket, &mut packet, MOST_TOLD) {
                Ok(Some(message)) => self.hear(message),
                Ok(None) => break,
                Err(error) => {
                    tracing::error!(%error, "the engine cannot be understood");
                    break;
                }
            }
        }
        // Nothing that is asked from now on is heard.
        socket.close();
        self.gone.store(true, Ordering::SeqCst);
        self.runs().clear();
        self.execs().clear();
        self.tickets().clear();
        self.ended.notify_waiters();
    }

    fn hear(&self, Message { what, mut parts, fds }: Message<Tell>) {
        match what {
            Tell::Ready { .. } | Tell::Refused => {}
            Tell::Started { run } => self.news(run, News::Started),
            Tell::Output { run, step, stderr } => {
                let stream = if stderr { Stream::Stderr } else { Stream::Stdout };
                self.news(run, News::Output(step, stream, parts.pop().unwrap_or_default()));
            }
            Tell::Usage { run } => {
                if let Ok(usage) = serde_json::from_slice(&parts.pop().unwrap_or_default()) {
                    self.news(run, News::Usage(usage));
                }
            }
            Tell::Report { run, alive } => {
                self.unfit.store(!alive, Ordering::SeqCst);
                let report = report_of(parts, fds);
                let report = report.unwrap_or_else(|error| fault(&error.to_string()));
                if let Some(run) = self.runs().remove(&run) {
                    // Whoever gave up on it does not want to know.
                    let _ = run.report.send(report);
                }
                self.ended.notify_waiters();
            }
            Tell::Gauges { ticket, slots } => {
                self.answer(ticket, Answer::Gauges(slots.into_iter().map(Into::into).collect()));
            }
            Tell::Proof { ticket } => {
                let proof = serde_json::from_slice(&parts.pop().unwrap_or_default());
                let proof = proof.unwrap_or_else(|_| Proof::failed("the engine's proof cannot be read"));
                self.answer(ticket, Answer::Proof(proof));
            }
            Tell::Layers { ticket, tell } => self.answer(ticket, Answer::Layers(tell)),
            Tell::Entered { exec, third } => self.entered(exec, third, fds),
            Tell::Ended { exec, end } => self.exec_ended(exec, end),
        }
    }

    fn answer(&self, ticket: u64, answer: Answer) {
        if let Some(asked) = self.tickets().remove(&ticket) {
            // Whoever asked may have waited long enough.
            let _ = asked.send(answer);
        }
    }

    /// Passes news on; they are lost if those before were not heard in time.
    fn news(&self, run: u64, news: News) {
        if let Some(run) = self.runs().get(&run) {
            let _ = run.news.try_send(news);
        }
    }
}

fn fault(why: &str) -> Report {
    Report::without_run(Refusal::host(why))
}

impl RemoteEngine {
    /// The link to an engine that is ready. From now on there is a thread that reads.
    pub(super) fn start(socket: PacketSocket, process: Privileged, reaped: u64) -> std::io::Result<Self> {
        let engine = Self { socket: Arc::new(socket), process, reaped, state: Arc::new(State::default()) };
        let (socket, state) = (Arc::clone(&engine.socket), Arc::clone(&engine.state));
        std::thread::Builder::new().name("link".to_owned()).spawn(move || state.listen(&socket))?;
        Ok(engine)
    }

    pub(super) fn ask(&self, message: &Message<Ask>) -> Result<(), LinkError> {
        wire::send(&self.socket, message)
    }

    /// Runs one job to its verdict. Whatever goes wrong is in the report.
    pub(super) async fn run(self: &Arc<Self>, order: Order, observer: &dyn Observer) -> Report {
        // Nobody types at a worker's jobs yet.
        let Order { job, slot, cancel, strokes: _ } = order;
        self.slot_is_free(slot).await;
        let run = self.state.next.fetch_add(1, Ordering::Relaxed);
        let (news, mut heard) = mpsc::channel(WAITING);
        let (report, mut reported) = oneshot::channel();
        self.state.runs().insert(run, Run { slot, news, report });
        if self.state.gone.load(Ordering::SeqCst) {
            self.state.runs().remove(&run);
        }
        let mut call = Call { engine: self, run, slot, over: false };
        let asked = job_parts(job)
            .and_then(|parts| self.ask(&Message { parts, ..Message::of(Ask::Run { run, slot }) }));
        if let Err(error) = asked {
            call.over = true;
            self.state.runs().remove(&run);
            return fault(&format!("the engine cannot be asked: {error}"));
        }
        let mut called_off = false;
        let report = loop {
            tokio::select! {
                biased;
                Some(news) = heard.recv() => tell(observer, &news),
                report = &mut reported => break report,
                () = cancel.cancelled(), if !called_off => {
                    called_off = true;
                    let _ = self.ask(&Message::of(Ask::Cancel { run, slot }));
                }
            }
        };
        call.over = true;
        while let Ok(news) = heard.try_recv() {
            tell(observer, &news);
        }
        match report {
            Ok(mut report) => {
                report.remains = Some(Remains::There(TakeDown { engine: Arc::clone(self), slot }));
                report
            }
            Err(_) => fault("the engine process is gone"),
        }
    }

    /// Waits until no run that was given up on is left in a slot.
    async fn slot_is_free(&self, slot: u32) {
        loop {
            let ended = self.state.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if !self.state.runs().values().any(|run| run.slot == slot) {
                return;
            }
            ended.await;
        }
    }

    /// Asks, and waits for the answer, for so long at most; none if it does not come.
    pub(super) fn answer_to(
        &self,
        ask: impl FnOnce(u64) -> Message<Ask>,
        patience: Option<Duration>,
    ) -> Option<Answer> {
        let ticket = self.state.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = sync_mpsc::channel();
        self.state.tickets().insert(ticket, sender);
        let gone = self.state.gone.load(Ordering::SeqCst);
        let asked = !gone && self.ask(&ask(ticket)).is_ok();
        let answer = match patience {
            _ if !asked => None,
            Some(patience) => answer.recv_timeout(patience).ok(),
            None => answer.recv().ok(),
        };
        self.state.tickets().remove(&ticket);
        answer
    }

    /// Waits until the engine has made its attacks, or is gone.
    pub(super) fn prove(&self) -> Proof {
        match self.answer_to(|ticket| Message::of(Ask::Prove { ticket }), None) {
            Some(Answer::Proof(proof)) => proof,
            _ => Proof::failed("the engine process is gone"),
        }
    }

    pub(super) fn gauges(&self) -> Vec<SlotGauges> {
        match self.answer_to(|ticket| Message::of(Ask::Gauges { ticket }), Some(GAUGES)) {
            Some(Answer::Gauges(gauges)) => gauges,
            _ => Vec::new(),
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        let lost = self.state.gone.load(Ordering::SeqCst) || self.state.unfit.load(Ordering::SeqCst);
        !lost && self.process.is_alive()
    }

    pub(super) fn reaped(&self) -> u64 {
        self.reaped
    }
}

impl Drop for RemoteEngine {
    fn drop(&mut self) {
        // The end of the link is the word to end.
        self.socket.close();
        self.process.wait();
    }
}

fn tell(observer: &dyn Observer, news: &News) {
    match news {
        News::Started => observer.started(),
        News::Output(step, stream, bytes) => observer.output(step, *stream, bytes),
        News::Usage(usage) => observer.usage(usage),
    }
}

/// A run that is waited for; whoever stops waiting calls it off.
struct Call<'a> {
    engine: &'a RemoteEngine,
    run: u64,
    slot: u32,
    over: bool,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if !self.over {
            let _ = self.engine.ask(&Message::of(Ask::Cancel { run: self.run, slot: self.slot }));
        }
    }
}

/// Has what is left of a slot's last job taken down when it is dropped.
#[derive(Debug)]
pub struct TakeDown {
    engine: Arc<RemoteEngine>,
    slot: u32,
}

impl Drop for TakeDown {
    fn drop(&mut self) {
        // An engine that is gone has nothing left.
        let _ = self.engine.ask(&Message::of(Ask::TakeDown { slot: self.slot }));
    }
}
