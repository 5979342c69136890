//! `hutch run`: one job, here, without a queue.
//!
//! Flags and spec become a job; an engine with one slot runs it, and what it writes goes straight to
//! this command's own stdout and stderr. Ctrl-C, or a reader that has gone away, calls the job off.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use anyhow::{Context, bail};
use hutch_layers::{BlobStore, LayerError, LayerRecord, Layers};
use hutch_proto::{JobId, JobResult, JobSpec, Reason, Timestamp};
use hutch_sandbox::{Engine, JobFacts, Launcher, Observer, Order, Report, Stream, Unobserved};
use hutch_worker::InputError;
use tokio_util::sync::CancellationToken;

use crate::cli::RunArgs;
use crate::console::Console;
use crate::privileges::Homes;
use crate::settings::{self, Flags, Settings};
use crate::{engine, exit, order, queue, signals, term, unpack, verdict};

/// What a job is run with, made while there is one thread.
pub(crate) struct Bench {
    settings: Settings,
    homes: Homes,
    launcher: Launcher,
}

/// Makes it ready.
pub(crate) fn ready(args: &RunArgs, config: Option<&Path>) -> anyhow::Result<Bench> {
    let launcher = Launcher::fork();
    let data_dir = args.data_dir.as_ref().map(|path| path.display().to_string());
    let settings = settings::load(config, &Flags::default().set("data_dir", "--data", data_dir))?.settings;
    let homes = Homes::of_command(&settings.data_dir, settings.store_directory())?;
    Ok(Bench { settings, homes, launcher: launcher? })
}

/// Runs the job that these arguments describe.
pub(crate) async fn run(args: RunArgs, bench: anyhow::Result<Bench>) -> anyhow::Result<ExitCode> {
    let Bench { settings, homes, launcher } = bench?;
    let job = order::job(&args)?;
    let blobs = queue::store(&settings, &homes)?;
    let trees = queue::trees(&settings)?;
    let registries = queue::registries_for_jobs(&settings)?;
    let layers = queue::layers(&blobs, Arc::new(trees.clone()), registries);
    let engine = Engine::new(launcher, engine::alone(&settings, trees)?)?;
    let result = Run { settings: &settings, args: &args, blobs, layers }.job(&engine, job).await;
    homes.give_back();
    let result = result?;
    conclude(&args, &result)
}

/// Says how it went, and exits so.
fn conclude(args: &RunArgs, result: &JobResult) -> anyhow::Result<ExitCode> {
    if args.json {
        term::line(serde_json::to_string_pretty(result).context("the result cannot be shown")?);
        return Ok(ExitCode::SUCCESS);
    }
    for cut in verdict::cuts(result) {
        term::note(format!("{cut}; --max-output SIZE keeps more"));
    }
    if !args.quiet {
        if !verdict::is_success(result) {
            term::note(verdict::sentence(result));
            if result.timeline.started_at.is_some() {
                term::note(verdict::usage(&result.usage));
            }
        }
        if args.output_dir.is_none() && !result.outputs.files.is_empty() {
            term::note(format!("{} outputs; --output-dir DIR unpacks them", result.outputs.files.len()));
        }
    }
    Ok(exit::of(result))
}

struct Run<'a> {
    settings: &'a Settings,
    args: &'a RunArgs,
    blobs: BlobStore,
    layers: Layers,
}

impl Run<'_> {
    async fn job(&self, engine: &Engine, mut job: JobSpec) -> anyhow::Result<JobResult> {
        let most = self.settings.worker.max_input_bytes.0;
        if names_blobs(&job) {
            match hutch_worker::resolve_inputs(&mut job, &self.blobs, most).await {
                Err(InputError::Wrong(problem)) => {
                    return Ok(without_run(&job, Reason::SpecInvalid, problem));
                }
                fetched => fetched?,
            }
        }
        match self.layers.resolve(&mut job).await {
            Err(error @ LayerError::Wrong { .. }) => return Ok(without_run(&job, Reason::ImageError, error)),
            stacked => stacked?,
        }
        let facts = JobFacts {
            id: job.id,
            attempt: 1,
            worker: self.settings.worker.name.clone(),
            submitted_at: Timestamp::now(),
            labels: job.labels.clone(),
        };
        let cancel = CancellationToken::new();
        let mut signals = signals::cancel_on_end(cancel.clone());
        let (printer, printing) = Printer::start(cancel.clone());
        let mut strokes = None;
        let mut console = None;
        if job.tty && job.stdin.is_none() && !self.args.json {
            (console, strokes) = Console::take().context("the terminal cannot be handed on")?.unzip();
        }
        let order = Order { job, slot: 0, cancel, strokes };
        let observer: &dyn Observer = if self.args.json { &Unobserved } else { &printer };
        let mut report = tokio::select! {
            report = engine.run(order, observer) => report,
            _ = &mut signals => bail!("the job did not end when it was told to; it is killed"),
        };
        signals.abort();
        drop(console);
        drop(printer);
        if printing.join().is_err() {
            bail!("what the program wrote could not be shown");
        }
        self.keep_outputs(&mut report).await?;
        self.keep_layer(facts.id, &mut report).await?;
        Ok(report.into_result(facts))
    }

    /// Unpacks the archive where the caller wants it, or keeps it under the name that the result says.
    async fn keep_outputs(&self, report: &mut Report) -> anyhow::Result<()> {
        let Some((archive, mut file)) = report.outputs.archive.as_ref().zip(report.archive.take()) else {
            return Ok(());
        };
        if let Some(directory) = &self.args.output_dir {
            io::Seek::rewind(&mut file).context("the archive cannot be read")?;
            let unpacked = unpack::unpack(&file, directory)?;
            for skipped in &unpacked.skipped {
                term::note(format!("left out: {}", term::safe_line(skipped)));
            }
        }
        if self.args.json {
            self.blobs.put_file(file, &archive.blob).await.map_err(|error| anyhow::anyhow!(error.full()))?;
        }
        Ok(())
    }

    /// Keeps the layer that the job committed, for later jobs.
    async fn keep_layer(&self, id: JobId, report: &mut Report) -> anyhow::Result<()> {
        let Some(layer) = report.layer.take() else { return Ok(()) };
        let record = LayerRecord { diff_id: layer.diff_id, blob: layer.blob, bytes: layer.bytes };
        self.layers.commit(id, &record, layer.file).await.map_err(|error| anyhow::anyhow!(error.full()))
    }
}

/// The answer to a job that names what is not there.
fn without_run(job: &JobSpec, reason: Reason, message: impl ToString) -> JobResult {
    JobResult::without_run(job.id, job.labels.clone(), Timestamp::now(), reason, message.to_string())
}

fn names_blobs(job: &JobSpec) -> bool {
    use hutch_proto::Content::Blob;
    let named = |content: Option<&hutch_proto::Content>| matches!(content, Some(Blob(_)));
    named(job.stdin.as_ref())
        || job.files.iter().any(|file| named(Some(&file.content)))
        || job.steps.iter().any(|step| named(step.stdin.as_ref()))
}

/// Shows what the program writes, on a thread of its own: the engine never waits for a reader.
/// What waits is bounded by what is kept of a job's output.
struct Printer(mpsc::Sender<(Stream, Vec<u8>)>);

impl Printer {
    fn start(cancel: CancellationToken) -> (Self, JoinHandle<()>) {
        let (sender, receiver) = mpsc::channel::<(Stream, Vec<u8>)>();
        let thread = std::thread::spawn(move || {
            for (stream, bytes) in receiver {
                let written = match stream {
                    Stream::Stdout => print(io::stdout().lock(), &bytes),
                    Stream::Stderr => print(io::stderr().lock(), &bytes),
                };
                if written.is_err() {
                    // The reader has gone away: what comes now is for nobody.
                    cancel.cancel();
                }
            }
        });
        (Self(sender), thread)
    }
}

fn print(mut out: impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    out.flush()
}

impl Observer for Printer {
    fn output(&self, _step: &str, stream: Stream, bytes: &[u8]) {
        // A printer that is gone has said why already.
        let _ = self.0.send((stream, bytes.to_vec()));
    }
}
