//! This command's own terminal, handed on to a program that has one elsewhere.
//!
//! In order: the terminal is put into raw mode, so that every key goes to the program, Ctrl-C among them
//! (cfmakeraw(3)); its size is told, and told again when it changes (SIGWINCH); what is typed is sent on. When
//! this is dropped the terminal is as it was.

use std::io::{self, IsTerminal as _, Read as _};
use std::os::fd::AsFd as _;

use hutch_sandbox::{Stroke, Strokes, WindowSize, terminal_size};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// A terminal in raw mode, until it is dropped.
pub(crate) struct Console {
    before: Termios,
    resizing: JoinHandle<()>,
}

impl Console {
    /// Hands this command's terminal on; none if its stdin is no terminal.
    pub(crate) fn take() -> io::Result<Option<(Self, Strokes)>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let (sender, strokes) = Strokes::channel();
        let before = tcgetattr(stdin.as_fd())?;
        let resizing = tokio::spawn(tell_size(sender.clone()));
        let console = Self { before: before.clone(), resizing };
        let mut raw = before;
        cfmakeraw(&mut raw);
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        // It ends with the process: nothing wakes a read of a terminal.
        std::thread::spawn(move || read_keys(&sender));
        Ok(Some((console, strokes)))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.resizing.abort();
        // A terminal that went away needs no mode.
        let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &self.before);
    }
}

/// What this command reads, where it is no terminal that is handed on; it ends with it.
pub(crate) fn piped() -> Strokes {
    let (sender, strokes) = Strokes::channel();
    // As above.
    std::thread::spawn(move || read_keys(&sender));
    strokes
}

/// The size of this command's terminal.
fn size() -> Option<WindowSize> {
    terminal_size(io::stdin().as_fd())
}

async fn tell_size(sender: mpsc::Sender<Stroke>) {
    let Ok(mut changes) = signal(SignalKind::window_change()) else { return };
    loop {
        if let Some(size) = size()
            && sender.send(Stroke::Resized(size)).await.is_err()
        {
            return;
        }
        changes.recv().await;
    }
}

fn read_keys(sender: &mpsc::Sender<Stroke>) {
    let mut bytes = [0; 16 << 10];
    while let Ok(count @ 1..) = io::stdin().lock().read(&mut bytes) {
        if sender.blocking_send(Stroke::Typed(bytes[..count].to_vec())).is_err() {
            return;
        }
    }
}
