//! Calls: a gateway talks with whoever runs a job, while it runs.
//!
//! A call is whole messages in order, both ways, each at the pace of who takes them. Nothing of it is durable: it ends
//! when one side lets go of both its ends, when the job's holder vanishes, or the way between them.

use std::sync::{Mutex, PoisonError};

use hutch_proto::JobId;
use tokio::sync::mpsc;

/// How many messages may be on their way in one direction.
pub(crate) const WINDOW: usize = 32;
/// How many calls may wait for a worker to look at them.
const WAITING: usize = 16;

/// One side's ends of a call.
#[derive(Debug)]
pub struct Call {
    /// What is said; it waits while the other side is slow, and fails when that is gone.
    pub to: mpsc::Sender<Vec<u8>>,
    /// What is heard; none when the other side will say no more.
    pub from: mpsc::Receiver<Vec<u8>>,
}

/// A call about a job that this process holds.
#[derive(Debug)]
pub struct Incoming {
    /// Which job.
    pub job: JobId,
    /// The answering side.
    pub call: Call,
}

/// The two sides of a call.
pub(crate) fn pair() -> (Call, Call) {
    let (to_there, from_here) = mpsc::channel(WINDOW);
    let (to_here, from_there) = mpsc::channel(WINDOW);
    (Call { to: to_there, from: from_there }, Call { to: to_here, from: from_here })
}

/// Where calls wait for who answers them, if anybody does.
#[derive(Debug)]
pub(crate) struct Switchboard {
    sender: mpsc::Sender<Incoming>,
    receiver: Mutex<Option<mpsc::Receiver<Incoming>>>,
}

impl Default for Switchboard {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        Self { sender, receiver: Mutex::new(Some(receiver)) }
    }
}

impl Switchboard {
    /// The calls, for whoever asks first.
    pub(crate) fn answered(&self) -> Option<mpsc::Receiver<Incoming>> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Puts a call through; none if nobody answers calls here.
    pub(crate) fn put_through(&self, job: JobId) -> Option<Call> {
        if self.receiver.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return None;
        }
        let (ours, call) = pair();
        self.sender.try_send(Incoming { job, call }).ok()?;
        Some(ours)
    }
}
