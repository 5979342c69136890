//! Programs in running jobs, on the worker's side: the engine brings them in, this side attends to their streams.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hutch_proto::JobId;
use tokio::sync::{mpsc, oneshot};

use super::message::{Ask, Refused, Third, streams_of};
use super::wire::Message;
use super::worker_side::{RemoteEngine, State};
use crate::exec::{ExecEnd, ExecError, ExecOrder, Streams, attend};
use crate::observe::Stream;
use crate::terminal::Strokes;

/// A program that has not ended yet, where the engine's words about it go.
#[derive(Debug)]
pub(super) struct Exec {
    entered: Option<oneshot::Sender<Streams>>,
    ended: oneshot::Sender<Result<ExecEnd, Refused>>,
}

impl State {
    pub(super) fn entered(&self, exec: u64, third: Third, fds: Vec<OwnedFd>) {
        let mut execs = self.execs();
        let Some(entered) = execs.get_mut(&exec).and_then(|one| one.entered.take()) else { return };
        match streams_of(third, fds) {
            // Whoever gave up on it does not want them.
            Ok(streams) => drop(entered.send(streams)),
            Err(error) => {
                tracing::error!(%error, "the engine cannot be understood");
                execs.remove(&exec);
            }
        }
    }

    pub(super) fn exec_ended(&self, exec: u64, end: Result<ExecEnd, Refused>) {
        if let Some(one) = self.execs().remove(&exec) {
            // As above.
            let _ = one.ended.send(end);
        }
    }
}

/// Tells the engine that nobody waits for a program, unless it has ended.
struct Waiting<'a> {
    engine: &'a RemoteEngine,
    exec: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.engine.state.execs().remove(&self.exec).is_some() {
            let _ = self.engine.ask(&Message::of(Ask::Leave { exec: self.exec }));
        }
    }
}

impl RemoteEngine {
    /// Runs one more program in a job that runs here.
    pub(super) async fn exec(
        self: &Arc<Self>,
        id: JobId,
        order: &ExecOrder,
        strokes: &Strokes,
        output: &mpsc::Sender<(Stream, Vec<u8>)>,
    ) -> Result<ExecEnd, ExecError> {
        let gone = || ExecError::Host("the engine process is gone".to_owned());
        let order = serde_json::to_vec(order).map_err(|e| ExecError::Host(e.to_string()))?;
        let exec = self.state.next.fetch_add(1, Ordering::Relaxed);
        let (entered, streams) = oneshot::channel();
        let (ended, end) = oneshot::channel();
        self.state.execs().insert(exec, Exec { entered: Some(entered), ended });
        let _waiting = Waiting { engine: self, exec };
        if self.state.gone.load(Ordering::SeqCst) {
            return Err(gone());
        }
        let ask = Message { parts: vec![order], ..Message::of(Ask::Exec { exec, job: id.to_string() }) };
        self.ask(&ask).map_err(|e| ExecError::Host(e.to_string()))?;
        let end = async { end.await.map_err(|_| gone())?.map_err(|refused| refused.about(id)) };
        match streams.await {
            Ok(streams) => attend(streams, strokes, output, end).await,
            // It was not brought in.
            Err(_) => end.await,
        }
    }
}
