//! The system calls that a job was refused, where it asked to be told of them or killed for them.
//!
//! The program's process sends its filter's listener over a socket; then each refused call of any process of the job
//! waits here until it is answered. Nothing that the job does can skip that: a call that nobody answers is not made.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use hutch_proto::SeccompRefused;
use hutch_sandbox_sys::notify::{self, Asked};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How many are answered at one time, so that a flood does not hold up the clock.
const AT_ONCE: usize = 64;
/// From this many on a job that is refused again and again waits between answers: it costs the worker as much as itself.
const FREELY: u64 = 1024;
const PAUSE: Duration = Duration::from_millis(5);

/// Where refusals come from.
enum Source {
    Nowhere,
    /// The listener comes here.
    Socket(AsyncFd<OwnedFd>),
    Listener(AsyncFd<OwnedFd>),
}

/// The refusals of one step.
pub(crate) struct Refusals {
    source: Source,
    mode: SeccompRefused,
    count: u64,
    seen: BTreeSet<i32>,
}

impl Refusals {
    /// Waits for the listener at this socket, if there is to be one.
    pub(crate) fn new(socket: Option<OwnedFd>, mode: SeccompRefused) -> io::Result<Self> {
        let source = socket.map(watched).transpose()?.map_or(Source::Nowhere, Source::Socket);
        Ok(Self { source, mode, count: 0, seen: BTreeSet::new() })
    }

    /// Waits until there is something to take; for ever where nothing will come.
    pub(crate) async fn ready(&self) {
        if self.count > FREELY {
            tokio::time::sleep(PAUSE).await;
        }
        match &self.source {
            Source::Nowhere => std::future::pending().await,
            // An error shows when it is taken.
            Source::Socket(fd) | Source::Listener(fd) => {
                drop(fd.readable().await.map(|mut r| r.retain_ready()))
            }
        }
    }

    /// Takes what has come: the call for which the job is to be killed, if there is one.
    ///
    /// # Errors
    /// If the listener does not work as seccomp_unotify(2) says.
    pub(crate) fn take(&mut self) -> io::Result<Option<i32>> {
        match std::mem::replace(&mut self.source, Source::Nowhere) {
            Source::Nowhere => Ok(None),
            Source::Socket(socket) => {
                // None came: the program's process ended before, and has said why.
                if let Some(listener) = notify::receive_listener(socket.into_inner())? {
                    self.source = Source::Listener(watched(listener)?);
                }
                Ok(None)
            }
            Source::Listener(listener) => self.answer(listener),
        }
    }

    fn answer(&mut self, listener: AsyncFd<OwnedFd>) -> io::Result<Option<i32>> {
        for _ in 0..AT_ONCE {
            match notify::receive(listener.get_ref().as_fd())? {
                Asked::Nobody => return Ok(None),
                Asked::Nothing => {
                    // A call that came since makes it ready again: what is cleared is what was seen before.
                    self.source = Source::Listener(watched(listener.into_inner())?);
                    return Ok(None);
                }
                Asked::Call(call) => {
                    self.count += 1;
                    self.seen.insert(call.number);
                    if self.mode == SeccompRefused::Kill {
                        // Without an answer it is never made. The listener stays open until the tree is dead.
                        self.source = Source::Listener(listener);
                        return Ok(Some(call.number));
                    }
                    notify::refuse(listener.get_ref().as_fd(), call)?;
                }
            }
        }
        self.source = Source::Listener(listener);
        Ok(None)
    }

    /// The names of the calls that were refused.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.seen.iter().map(|number| crate::seccomp::name(*number)).collect();
        names.sort();
        names
    }
}

#[expect(
    deprecated,
    reason = "an OwnedFd keeps its descriptor open, which is all that the new name asks for"
)]
fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}
