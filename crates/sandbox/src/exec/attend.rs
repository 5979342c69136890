//! Attending to a program in a running job: what is typed goes to it, what it writes comes from it, until it ends.
//!
//! It needs nothing of the engine's: our ends of the program's streams, and word of its end. Whoever takes its output
//! slowly has it wait: nothing is dropped, and nothing piles up.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use super::{ExecEnd, ExecError};
use crate::observe::Stream;
use crate::supervise::{Flow, attended, read, settle, shown_at, taken_at, typed, watched};
use crate::terminal::{Stroke, Strokes, Terminal};

/// What a pipe or a terminal holds at most.
const LEFT: usize = 64 << 10;
/// The most bytes that are told at one time.
const PIECE: usize = 16 << 10;

/// Our ends of a program's streams. It has a pipe for its input, or a terminal.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) terminal: Option<OwnedFd>,
}

/// Where a program's output goes.
type Output = mpsc::Sender<(Stream, Vec<u8>)>;

/// Attends to a program until `end` says how it ended. The end of `strokes` ends a pipe's input, and leaves a terminal
/// open; that nobody takes the output any more ends nothing: whoever does not care drops the future.
pub(crate) async fn attend(
    streams: Streams,
    strokes: &Strokes,
    output: &Output,
    end: impl Future<Output = Result<ExecEnd, ExecError>>,
) -> Result<ExecEnd, ExecError> {
    let [stdout, stderr] = [watched(streams.stdout)?, watched(streams.stderr)?];
    // A pipe to it is fed as a terminal is, and closed at the end.
    let mut input = streams.stdin.map(attended).transpose()?.map(|fd| Terminal::new(fd, &[], false));
    let mut terminal = streams.terminal.map(attended).transpose()?.map(|fd| Terminal::new(fd, &[], false));
    let on_terminal = terminal.is_some();
    let (mut shows, mut types, mut open) = (true, true, [true; 2]);
    tokio::pin!(end);
    let end = loop {
        let sink = terminal.as_ref().or(input.as_ref());
        tokio::select! {
            end = &mut end => break end?,
            ready = stdout.readable(), if open[0] => {
                open[0] = settle(ready?, tell(&stdout, Stream::Stdout, output).await?.flow());
            }
            ready = stderr.readable(), if open[1] => {
                open[1] = settle(ready?, tell(&stderr, Stream::Stderr, output).await?.flow());
            }
            shown = shown_at(terminal.as_ref()), if on_terminal && shows => {
                let (ready, fd) = shown?;
                shows = settle(ready, tell(fd, Stream::Stdout, output).await?.flow());
            }
            ready = taken_at(sink), if sink.is_some_and(Terminal::has_waiting) => {
                ready?;
                if let Some(sink) = terminal.as_mut().or(input.as_mut()) {
                    sink.type_waiting().await?;
                }
            }
            stroke = typed(Some(strokes)), if types && sink.is_some_and(Terminal::takes_strokes) => {
                match (stroke, terminal.as_mut().or(input.as_mut())) {
                    (Some(Stroke::Resized(_)), Some(_)) if !on_terminal => {}
                    (Some(stroke), Some(sink)) => sink.stroke(stroke),
                    _ => types = false,
                }
            }
        }
        if !types && input.as_ref().is_some_and(|input| !input.has_waiting()) {
            input = None;
        }
    };
    // Another process of the job may hold its streams still, and write for ever: what is there now is told.
    tell_rest(&stdout, Stream::Stdout, output).await?;
    tell_rest(&stderr, Stream::Stderr, output).await?;
    if let Some(terminal) = terminal.filter(|_| shows) {
        tell_rest(&terminal.fd, Stream::Stdout, output).await?;
    }
    Ok(end)
}

/// What was told.
enum Told {
    /// So many bytes.
    Bytes(usize),
    /// Nothing, and this is why.
    Nothing(Flow),
}

impl Told {
    fn flow(self) -> Flow {
        match self {
            Self::Bytes(_) => Flow::More,
            Self::Nothing(flow) => flow,
        }
    }
}

/// Tells a piece of what a program wrote.
async fn tell(from: &AsyncFd<OwnedFd>, stream: Stream, output: &Output) -> io::Result<Told> {
    let mut bytes = vec![0; PIECE];
    match read(from, &mut bytes)? {
        Err(flow) => Ok(Told::Nothing(flow)),
        Ok(count) => {
            bytes.truncate(count);
            // Nobody may be there who takes it.
            let _ = output.send((stream, bytes)).await;
            Ok(Told::Bytes(count))
        }
    }
}

async fn tell_rest(from: &AsyncFd<OwnedFd>, stream: Stream, output: &Output) -> io::Result<()> {
    let mut told = 0;
    while told < LEFT
        && let Told::Bytes(count) = tell(from, stream, output).await?
    {
        told += count;
    }
    Ok(())
}
