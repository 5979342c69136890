//! The terminal of a running program, as who runs it has it: what is typed goes in, what is shown comes out.
//!
//! Its side is a pseudo-terminal's master, which the sandbox hands back when the program is about to start: pty(7). What
//! is typed waits here until the terminal takes it, within a bound; who types more is not read on.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use hutch_sandbox_sys::WindowSize;
use hutch_sandbox_sys::terminal::set_size;
use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, mpsc};

/// How much of what is typed may wait.
const MOST_WAITING: usize = 64 << 10;
/// The size of a terminal, unless somebody says otherwise: that of the VT100.
pub(crate) const DEFAULT_SIZE: WindowSize = WindowSize { rows: 24, columns: 80 };
/// What a terminal in its usual mode takes for the end of the input, at the beginning of a line: VEOF of termios(3).
const END_OF_INPUT: u8 = 4;

/// What somebody at a terminal does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stroke {
    /// Types these bytes.
    Typed(Vec<u8>),
    /// Makes the window this large.
    Resized(WindowSize),
}

/// Strokes as they come, for one job.
#[derive(Debug)]
pub struct Strokes(Mutex<mpsc::Receiver<Stroke>>);

impl Strokes {
    /// A channel for strokes: who types waits where the program does not read.
    #[must_use]
    pub fn channel() -> (mpsc::Sender<Stroke>, Self) {
        let (sender, receiver) = mpsc::channel(64);
        (sender, Self(Mutex::new(receiver)))
    }

    /// The next one; none when there will be no more.
    pub async fn next(&self) -> Option<Stroke> {
        self.0.lock().await.recv().await
    }
}

/// The terminal of a running program.
#[derive(Debug)]
pub(crate) struct Terminal {
    pub(crate) fd: AsyncFd<OwnedFd>,
    waiting: VecDeque<u8>,
}

impl Terminal {
    /// A terminal on which `typed` is typed, and then, if `ends`, the end of the input.
    pub(crate) fn new(fd: AsyncFd<OwnedFd>, typed: &[u8], ends: bool) -> Self {
        let mut waiting: VecDeque<u8> = typed.iter().copied().collect();
        if ends {
            // Within a line it only hands the line over.
            let times = if typed.last().is_none_or(|last| *last == b'\n') { 1 } else { 2 };
            waiting.extend(std::iter::repeat_n(END_OF_INPUT, times));
        }
        Self { fd, waiting }
    }

    /// Whether there is room for more strokes.
    pub(crate) fn takes_strokes(&self) -> bool {
        self.waiting.len() < MOST_WAITING
    }

    /// Whether something waits to be typed.
    pub(crate) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(crate) fn stroke(&mut self, stroke: Stroke) {
        match stroke {
            Stroke::Typed(bytes) => self.waiting.extend(bytes),
            Stroke::Resized(size) => {
                if let Err(error) = set_size(self.fd.get_ref().as_fd(), size) {
                    tracing::debug!(%error, "a terminal did not take its size");
                }
            }
        }
    }

    /// Waits until the terminal takes more.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        self.fd.ready(Interest::WRITABLE).await.map(|mut ready| ready.retain_ready())
    }

    /// Types what waits, as far as the terminal takes it.
    pub(crate) async fn type_waiting(&mut self) -> io::Result<()> {
        let mut ready = self.fd.ready(Interest::WRITABLE).await?;
        let (first, _) = self.waiting.as_slices();
        // A line at a time: what a terminal has no room for within a line it drops.
        let line = first.iter().position(|byte| *byte == b'\n').map_or(first.len(), |at| at + 1).min(1024);
        match nix::unistd::write(self.fd.get_ref(), &first[..line]) {
            Ok(count) => drop(self.waiting.drain(..count)),
            Err(Errno::EAGAIN | Errno::EINTR) => ready.clear_ready(),
            // The program's side is closed: nobody reads any more.
            Err(Errno::EIO | Errno::EPIPE) => self.waiting.clear(),
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }
}
