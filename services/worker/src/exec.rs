//! More programs in jobs that run here, for who calls: see [`hutch_proto::ExecMessage`].
//!
//! A call is answered beside the job itself. The caller says what to run; from then on what it types goes to the program and
//! what the program writes goes to it, each as fast as the other takes it, until the program ends. A caller that hangs up
//! ends it.

use std::time::Duration;

use hutch_proto::{ExecMessage, ExecRefusal, ExecSpec, ExecWord, JobId};
use hutch_queue::{Call, Incoming};
use hutch_sandbox::{EngineHandle, ExecEnd, ExecError, ExecOrder, Stream, Stroke, Strokes, WindowSize};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

/// How long a caller may take to say what it wants.
const START: Duration = Duration::from_secs(10);
/// How long a job that is held may take until its sandbox can be entered.
const BEGIN: Duration = Duration::from_secs(10);
/// How often that is tried.
const TRY: Duration = Duration::from_millis(50);
/// Pieces of output that wait for the caller.
const PIECES: usize = 4;

/// Answers calls until there will be no more.
pub(crate) async fn answer_calls(engine: EngineHandle, mut calls: mpsc::Receiver<Incoming>) {
    while let Some(Incoming { job, call }) = calls.recv().await {
        let engine = engine.clone();
        // It ends with its call, or with its job.
        tokio::spawn(async move { answer(&engine, job, call).await });
    }
}

async fn answer(engine: &EngineHandle, job: JobId, Call { to, mut from }: Call) {
    let spec = match timeout(START, from.recv()).await {
        Ok(Some(first)) => start(&first),
        // It hung up, or said nothing.
        _ => return,
    };
    let last = match spec {
        Ok(spec) => {
            tracing::info!(%job, program = ?spec.command.first(), "a program is brought into a job");
            match run(engine, job, &order(spec), &to, from).await {
                Some(end) => end.map_or_else(|error| refusal(&error), ended),
                None => return,
            }
        }
        Err(message) => ExecWord::Refused { why: ExecRefusal::Invalid, message },
    };
    // A caller that is gone does not want to know.
    let _ = to.send(ExecMessage::Word(last).encode()).await;
}

fn start(first: &[u8]) -> Result<ExecSpec, String> {
    match ExecMessage::decode(first) {
        Ok(ExecMessage::Word(ExecWord::Start(spec))) => Ok(spec),
        Ok(_) => Err("the first message must be `start`".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn order(spec: ExecSpec) -> ExecOrder {
    let terminal = spec.tty.map(|size| WindowSize { rows: size.rows, columns: size.columns });
    ExecOrder { command: spec.command, env: spec.env, cwd: spec.cwd, terminal }
}

fn ended(end: ExecEnd) -> ExecWord {
    ExecWord::Ended { exit_code: end.code() }
}

fn refusal(error: &ExecError) -> ExecWord {
    let why = match error {
        ExecError::NotRunning(_) => ExecRefusal::NotRunning,
        ExecError::Wrong(_) => ExecRefusal::Invalid,
        ExecError::Host(_) => ExecRefusal::HostError,
    };
    ExecWord::Refused { why, message: error.to_string() }
}

/// Runs the program; none if the caller hung up.
async fn run(
    engine: &EngineHandle,
    job: JobId,
    order: &ExecOrder,
    to: &mpsc::Sender<Vec<u8>>,
    mut from: mpsc::Receiver<Vec<u8>>,
) -> Option<Result<ExecEnd, ExecError>> {
    let (sender, strokes) = Strokes::channel();
    let (output, written) = mpsc::channel(PIECES);
    let runs = async {
        let end = enter(engine, job, order, &strokes, &output).await;
        // What it wrote is all said before its end is.
        drop(output);
        end
    };
    let both = async { tokio::join!(runs, say(written, to)).0 };
    tokio::select! {
        end = both => Some(end),
        () = listen(&mut from, sender) => None,
        () = to.closed() => None,
    }
}

/// Brings it in, as soon as the job's own program runs.
async fn enter(
    engine: &EngineHandle,
    job: JobId,
    order: &ExecOrder,
    strokes: &Strokes,
    output: &mpsc::Sender<(Stream, Vec<u8>)>,
) -> Result<ExecEnd, ExecError> {
    let begun = Instant::now();
    loop {
        match engine.exec(job, order, strokes, output).await {
            Err(ExecError::NotRunning(_)) if begun.elapsed() < BEGIN => sleep(TRY).await,
            end => return end,
        }
    }
}

/// Says what a program writes, until it writes no more.
async fn say(mut written: mpsc::Receiver<(Stream, Vec<u8>)>, to: &mpsc::Sender<Vec<u8>>) {
    while let Some((stream, bytes)) = written.recv().await {
        let message = match stream {
            Stream::Stdout => ExecMessage::Stdout(bytes),
            Stream::Stderr => ExecMessage::Stderr(bytes),
        };
        if to.send(message.encode()).await.is_err() {
            // The select above ends all.
            return;
        }
    }
}

/// Passes on what a caller types; returns when it has hung up, or says what cannot be understood.
async fn listen(from: &mut mpsc::Receiver<Vec<u8>>, sender: mpsc::Sender<Stroke>) {
    let mut sender = Some(sender);
    while let Some(message) = from.recv().await {
        let stroke = match ExecMessage::decode(&message) {
            Ok(ExecMessage::Stdin(bytes)) => Stroke::Typed(bytes),
            Ok(ExecMessage::Word(ExecWord::Resize(size))) => {
                Stroke::Resized(WindowSize { rows: size.rows, columns: size.columns })
            }
            Ok(ExecMessage::Word(ExecWord::StdinEnd)) => {
                sender = None;
                continue;
            }
            _ => return,
        };
        if let Some(sender) = &sender {
            // A program that has closed its stdin takes nothing.
            let _ = sender.send(stroke).await;
        }
    }
}
