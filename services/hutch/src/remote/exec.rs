//! `hutch exec`: one more program in a running job, as `docker exec` runs it.
//!
//! In order: the connection becomes a WebSocket; the program is asked for; what this command reads goes to it, what it
//! writes comes from it; this command exits as it did. On a terminal every key goes to the program, Ctrl-C among them;
//! without one Ctrl-C ends this command, and with it the program.

use std::io::{self, IsTerminal as _, Write};
use std::process::ExitCode;

use anyhow::{Context as _, anyhow, bail};
use futures::stream::SplitSink;
use futures::{SinkExt as _, StreamExt as _};
use hutch_proto::{ExecMessage, ExecSpec, ExecWord, TtySize};
use hutch_sandbox::{Stroke, Strokes, WindowSize, terminal_size};
use reqwest::Upgraded;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use super::client::Client;
use crate::cli::ExecArgs;
use crate::console::{self, Console};
use crate::order::variables;
use crate::term::safe_line;

/// The size of a terminal that nobody sees: that of the VT100.
const DEFAULT_SIZE: TtySize = TtySize { rows: 24, columns: 80 };
/// What a terminal in its usual mode takes for the end of the input: VEOF of termios(3).
const END_KEY: u8 = 4;

/// What is said to the gateway.
type Sink = SplitSink<WebSocketStream<Upgraded>, Message>;

/// Runs a program in a job.
pub(crate) async fn exec(args: ExecArgs) -> anyhow::Result<ExitCode> {
    let on_terminal = args.tty || !args.no_tty && io::stdin().is_terminal() && io::stdout().is_terminal();
    let size = terminal_size(std::os::fd::AsFd::as_fd(&io::stdin())).map_or(DEFAULT_SIZE, tty_size);
    let spec = ExecSpec {
        env: variables(&args.env)?.into_iter().collect(),
        command: args.command,
        cwd: args.cwd,
        tty: on_terminal.then_some(size),
    };
    let socket = Client::new(&args.client)?.web_socket(&format!("/v1/jobs/{}/exec", args.id)).await?;
    let (mut sink, mut stream) = socket.split();
    send(&mut sink, &ExecMessage::Word(ExecWord::Start(spec))).await?;
    let console =
        if on_terminal { Console::take().context("the terminal cannot be handed on")? } else { None };
    let (console, strokes) = console.unzip();
    let strokes = strokes.unwrap_or_else(console::piped);
    // A terminal has no end, but a key for it.
    let end =
        if on_terminal { ExecMessage::Stdin(vec![END_KEY]) } else { ExecMessage::Word(ExecWord::StdinEnd) };
    let hears = async {
        loop {
            match stream.next().await.context("the connection was cut: the program has been ended")?? {
                Message::Binary(bytes) => {
                    if let Some(code) = hear(&bytes)? {
                        return Ok(code);
                    }
                }
                Message::Close(_) => bail!("the gateway hung up: the program has been ended"),
                _ => {}
            }
        }
    };
    let code: anyhow::Result<i32> = tokio::select! {
        code = hears => code,
        error = speak(&mut sink, &strokes, &end) => Err(error),
    };
    drop(console);
    // What a shell can pass on.
    Ok(ExitCode::from(u8::try_from(code? & 0xff).unwrap_or(u8::MAX)))
}

/// Does what a message says; the exit code, if it is the last.
fn hear(bytes: &[u8]) -> anyhow::Result<Option<i32>> {
    match ExecMessage::decode(bytes).map_err(|error| anyhow!("the gateway is not understood: {error}"))? {
        ExecMessage::Stdout(bytes) => show(io::stdout(), &bytes)?,
        ExecMessage::Stderr(bytes) => show(io::stderr(), &bytes)?,
        ExecMessage::Word(ExecWord::Ended { exit_code }) => return Ok(Some(exit_code)),
        ExecMessage::Word(ExecWord::Refused { message, .. }) => bail!(safe_line(&message)),
        ExecMessage::Word(_) | ExecMessage::Stdin(_) => {}
    }
    Ok(None)
}

fn show(mut to: impl Write, bytes: &[u8]) -> anyhow::Result<()> {
    to.write_all(bytes).and_then(|()| to.flush()).context("its output cannot be written")
}

/// Says what is typed, or read from stdin; returns what went wrong, and never else.
async fn speak(sink: &mut Sink, strokes: &Strokes, end: &ExecMessage) -> anyhow::Error {
    let said = async {
        while let Some(stroke) = strokes.next().await {
            let message = match stroke {
                Stroke::Typed(bytes) => ExecMessage::Stdin(bytes),
                Stroke::Resized(size) => ExecMessage::Word(ExecWord::Resize(tty_size(size))),
            };
            send(sink, &message).await?;
        }
        send(sink, end).await
    };
    match said.await {
        Ok(()) => std::future::pending().await,
        Err(error) => error,
    }
}

async fn send(sink: &mut Sink, message: &ExecMessage) -> anyhow::Result<()> {
    sink.send(Message::Binary(message.encode().into())).await.context("the connection was cut")
}

fn tty_size(size: WindowSize) -> TtySize {
    TtySize { rows: size.rows, columns: size.columns }
}
