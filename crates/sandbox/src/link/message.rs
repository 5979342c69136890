//! What is said over the link.
//!
//! To add a message: a variant here, with fields that postcard can read (no untagged enums, no skipped fields; what is not
//! so, and what is long, goes as a part, JSON or bare bytes); an arm in `engine_side` or `worker_side`; and if it brings
//! descriptors, its number in `ASK_FDS` or `TELL_FDS`. A stream of bytes is best a pipe or a terminal that is handed
//! over once: then neither end copies, and the kernel slows the writer down.

use std::fs::File;
use std::os::fd::OwnedFd;

use hutch_proto::{
    Captured, Content, Digest, JobId, JobSpec, LimitHit, Outputs, Reason, Status, StepResult, Timestamp,
    Usage,
};
use hutch_trees::LayerFacts;
use serde::{Deserialize, Serialize};

use super::wire::LinkError;
use crate::collect::CommittedLayer;
use crate::exec::{ExecEnd, ExecError, Streams};
use crate::observe::{SlotGauges, Stream};
use crate::report::{Durations, Report, concatenated};

/// Descriptors that a worker's message may bring: its body, and the bytes of a layer.
pub(super) const ASK_FDS: usize = 2;
/// Descriptors that an engine's message may bring: its body, and an archive and a committed layer, or three streams.
pub(super) const TELL_FDS: usize = 4;

/// What a worker asks of the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Ask {
    /// Run a job in this slot, which must be free. Parts: the spec as JSON, its contents left out; the contents.
    Run {
        /// A number of the worker's choice, by which the engine speaks of it.
        run: u64,
        slot: u32,
    },
    /// Cancel it; of no effect if it is over.
    Cancel { run: u64, slot: u32 },
    /// The answer has been given: take down what is left of the slot's last job.
    TakeDown { slot: u32 },
    /// Attack sandboxes of the engine's own, in slot 0, which must be free.
    Prove { ticket: u64 },
    /// Read the gauges.
    Gauges { ticket: u64 },
    /// Something about layers.
    Layers { ticket: u64, ask: AskLayers },
    /// Bring a program into the job of this id. Part: the [`ExecOrder`](crate::ExecOrder) as JSON.
    Exec {
        /// A number of the worker's choice, by which both speak of it.
        exec: u64,
        job: String,
    },
    /// Nobody waits for that program any more; of no effect if it has ended.
    Leave { exec: u64 },
}

/// What a worker asks about layers. Diff ids are their hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum AskLayers {
    /// What is known of one.
    Facts(String),
    /// Note that it is used.
    Touch(String),
    /// Unpack one from the descriptor that comes along, a file, from where it is; what it must be, if that is known.
    Add(Option<String>),
    /// All of them.
    List,
}

/// What the engine answers about layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum TellLayers {
    Facts(Option<WireFacts>),
    Added(String, WireFacts),
    /// Diff id, facts, and seconds since 1970 when it was last used.
    List(Vec<(String, WireFacts, u64)>),
    Noted,
    /// It was not done. Whether another try may do better, and why.
    Failed(bool, String),
}

/// [`LayerFacts`] without its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WireFacts(u64, u64, i64);

impl From<LayerFacts> for WireFacts {
    fn from(facts: LayerFacts) -> Self {
        Self(facts.bytes, facts.entries, facts.newest_s)
    }
}

impl From<WireFacts> for LayerFacts {
    fn from(WireFacts(bytes, entries, newest_s): WireFacts) -> Self {
        Self { bytes, entries, newest_s }
    }
}

/// What the engine tells.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Tell {
    /// Jobs can be run.
    Ready { reaped: u64 },
    /// No job can be run. Part: why.
    Refused,
    /// The first program is about to run.
    Started { run: u64 },
    /// A program wrote. Part: what.
    Output { run: u64, step: String, stderr: bool },
    /// What a job has used so far. Part: JSON.
    Usage { run: u64 },
    /// A job is over. Parts: the report as JSON, the outputs of its steps left out; the outputs. Descriptors: the archive
    /// and the layer that it committed, if there are any.
    Report {
        run: u64,
        /// Whether the engine can run others.
        alive: bool,
    },
    /// What came of the attacks. Part: the [`Proof`](crate::Proof) as JSON.
    Proof { ticket: u64 },
    /// The gauges of running slots.
    Gauges { ticket: u64, slots: Vec<WireGauges> },
    /// Something about layers.
    Layers { ticket: u64, tell: TellLayers },
    /// A program is in its job. Descriptors: our ends of its stdout and stderr; and of its stdin, or else its terminal.
    Entered { exec: u64, third: Third },
    /// A program has ended, or was not brought in.
    Ended { exec: u64, end: Result<ExecEnd, Refused> },
}

/// What comes along as the third stream of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Third {
    Stdin,
    Terminal,
    Nothing,
}

/// [`ExecError`], without the job that it is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Refused {
    NotRunning,
    Wrong(String),
    Host(String),
}

impl Refused {
    pub(super) fn about(self, id: JobId) -> ExecError {
        match self {
            Self::NotRunning => ExecError::NotRunning(id),
            Self::Wrong(why) => ExecError::Wrong(why),
            Self::Host(why) => ExecError::Host(why),
        }
    }
}

impl From<ExecError> for Refused {
    fn from(error: ExecError) -> Self {
        match error {
            ExecError::NotRunning(_) => Self::NotRunning,
            ExecError::Wrong(why) => Self::Wrong(why),
            ExecError::Host(why) => Self::Host(why),
        }
    }
}

/// The descriptors of a program's streams, as they travel.
pub(super) fn stream_fds(streams: Streams) -> (Third, Vec<OwnedFd>) {
    let third = match (&streams.stdin, &streams.terminal) {
        (Some(_), _) => Third::Stdin,
        (None, Some(_)) => Third::Terminal,
        (None, None) => Third::Nothing,
    };
    let others = streams.stdin.into_iter().chain(streams.terminal);
    (third, [streams.stdout, streams.stderr].into_iter().chain(others).collect())
}

/// The streams of these descriptors.
pub(super) fn streams_of(third: Third, fds: Vec<OwnedFd>) -> Result<Streams, LinkError> {
    let mut fds = fds.into_iter();
    match (fds.next(), fds.next(), fds.next(), fds.next(), third) {
        (Some(stdout), Some(stderr), None, _, Third::Nothing) => {
            Ok(Streams { stdout, stderr, stdin: None, terminal: None })
        }
        (Some(stdout), Some(stderr), stdin @ Some(_), None, Third::Stdin) => {
            Ok(Streams { stdout, stderr, stdin, terminal: None })
        }
        (Some(stdout), Some(stderr), terminal @ Some(_), None, Third::Terminal) => {
            Ok(Streams { stdout, stderr, stdin: None, terminal })
        }
        _ => Err(LinkError::Wrong("a program's streams")),
    }
}

/// [`SlotGauges`] without the names of what is always the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WireGauges {
    slot: u32,
    values: [u64; 9],
    pressure_us: [Option<u64>; 6],
}

/// Resource and kind of each place of `pressure_us`.
const PRESSURES: [(&str, &str); 6] = [
    ("cpu", "some"),
    ("cpu", "full"),
    ("memory", "some"),
    ("memory", "full"),
    ("io", "some"),
    ("io", "full"),
];

impl From<SlotGauges> for WireGauges {
    fn from(gauges: SlotGauges) -> Self {
        let SlotGauges { slot, memory_bytes, memory_limit_bytes, cpu_us, cpu_throttled_us, .. } = gauges;
        let SlotGauges { memory_anonymous_bytes, memory_file_bytes, pids, .. } = gauges;
        let SlotGauges { io_read_bytes, io_write_bytes, pressure_us, .. } = gauges;
        Self {
            slot,
            values: [
                memory_bytes,
                memory_limit_bytes,
                cpu_us,
                cpu_throttled_us,
                pids,
                io_read_bytes,
                io_write_bytes,
                memory_anonymous_bytes,
                memory_file_bytes,
            ],
            pressure_us: PRESSURES.map(|(resource, kind)| {
                let known = pressure_us.iter().flatten().find(|of| (of.0, of.1) == (resource, kind));
                known.map(|(_, _, total)| *total)
            }),
        }
    }
}

impl From<WireGauges> for SlotGauges {
    fn from(wire: WireGauges) -> Self {
        let [
            memory_bytes,
            memory_limit_bytes,
            cpu_us,
            cpu_throttled_us,
            pids,
            io_read_bytes,
            io_write_bytes,
            memory_anonymous_bytes,
            memory_file_bytes,
        ] = wire.values;
        let mut pressure_us = [None; 6];
        for (place, ((resource, kind), total)) in PRESSURES.into_iter().zip(wire.pressure_us).enumerate() {
            pressure_us[place] = total.map(|total| (resource, kind, total));
        }
        Self {
            slot: wire.slot,
            memory_bytes,
            memory_anonymous_bytes,
            memory_file_bytes,
            memory_limit_bytes,
            cpu_us,
            cpu_throttled_us,
            pids,
            io_read_bytes,
            io_write_bytes,
            pressure_us,
        }
    }
}

/// Whether a stream is stderr.
pub(super) fn is_stderr(stream: Stream) -> bool {
    stream == Stream::Stderr
}

/// The parts of a job.
pub(super) fn job_parts(mut job: JobSpec) -> Result<Vec<Vec<u8>>, LinkError> {
    let mut contents: Vec<Vec<u8>> = contents(&mut job)
        .map(|content| match content {
            Content::Inline(bytes) => std::mem::take(bytes),
            Content::Blob(_) => Vec::new(),
        })
        .collect();
    let json = serde_json::to_vec(&job).map_err(|_| LinkError::Wrong("a job that is no JSON"))?;
    contents.insert(0, json);
    Ok(contents)
}

/// The job of these parts, parsed and validated as if it came from outside.
///
/// # Errors
/// Why it is no job, in words.
pub(super) fn job_of(parts: Vec<Vec<u8>>) -> Result<JobSpec, String> {
    let mut parts = parts.into_iter();
    let json = parts.next().ok_or("it is not there")?;
    let mut job = JobSpec::parse(&json).map_err(|error| error.to_string())?;
    for content in contents(&mut job) {
        let bytes = parts.next().ok_or("a content is missing")?;
        if let Content::Inline(inline) = content {
            *inline = bytes;
        }
    }
    if parts.next().is_some() { Err("there are more contents than it names".to_owned()) } else { Ok(job) }
}

/// Every content of a job, in the order in which they travel.
fn contents(job: &mut JobSpec) -> impl Iterator<Item = &mut Content> {
    let files = job.files.iter_mut().map(|file| &mut file.content);
    job.stdin.iter_mut().chain(files).chain(job.steps.iter_mut().filter_map(|step| step.stdin.as_mut()))
}

/// A report as it travels: what its steps wrote goes beside it, and the job's own is made of theirs again.
#[derive(Debug, Serialize, Deserialize)]
struct WireReport {
    status: Status,
    reason: Option<Reason>,
    message: String,
    limit: Option<LimitHit>,
    exit_code: Option<i32>,
    signal: Option<String>,
    refused_syscalls: Vec<String>,
    usage: Usage,
    outputs: Outputs,
    /// Whether an archive comes along.
    archive: bool,
    /// Diff id, digest and size of a layer that comes along.
    layer: Option<(Digest, Digest, u64)>,
    steps: Vec<StepResult>,
    started_at: Option<Timestamp>,
    finished_at: Timestamp,
    durations: Durations,
}

/// The parts and descriptors of a report; what remains stays behind.
pub(super) fn report_parts(report: Report) -> Result<(Vec<Vec<u8>>, Vec<OwnedFd>), LinkError> {
    let layer = report.layer.as_ref().map(|layer| (layer.diff_id.clone(), layer.blob.clone(), layer.bytes));
    let mut wire = WireReport {
        status: report.status,
        reason: report.reason,
        message: report.message,
        limit: report.limit,
        exit_code: report.exit_code,
        signal: report.signal,
        refused_syscalls: report.refused_syscalls,
        usage: report.usage,
        outputs: report.outputs,
        archive: report.archive.is_some(),
        layer,
        steps: report.steps,
        started_at: report.started_at,
        finished_at: report.finished_at,
        durations: report.durations,
    };
    let mut parts: Vec<Vec<u8>> =
        captured(&mut wire.steps).map(|captured| std::mem::take(&mut captured.data)).collect();
    let json = serde_json::to_vec(&wire).map_err(|_| LinkError::Wrong("a report that is no JSON"))?;
    parts.insert(0, json);
    let files = report.archive.into_iter().chain(report.layer.map(|layer| layer.file));
    Ok((parts, files.map(Into::into).collect()))
}

/// The report of these parts and descriptors.
pub(super) fn report_of(parts: Vec<Vec<u8>>, fds: Vec<OwnedFd>) -> Result<Report, LinkError> {
    let wrong = || LinkError::Wrong("a report");
    let mut files = fds.into_iter().map(File::from);
    let mut parts = parts.into_iter();
    let json = parts.next().ok_or_else(wrong)?;
    let mut wire: WireReport = serde_json::from_slice(&json).map_err(|_| wrong())?;
    for captured in captured(&mut wire.steps) {
        captured.data = parts.next().ok_or_else(wrong)?;
    }
    let archive = if wire.archive { Some(files.next().ok_or_else(wrong)?) } else { None };
    let layer = match wire.layer {
        Some((diff_id, blob, bytes)) => {
            Some(CommittedLayer { diff_id, blob, bytes, file: files.next().ok_or_else(wrong)? })
        }
        None => None,
    };
    Ok(Report {
        status: wire.status,
        reason: wire.reason,
        message: wire.message,
        limit: wire.limit,
        exit_code: wire.exit_code,
        signal: wire.signal,
        refused_syscalls: wire.refused_syscalls,
        stdout: concatenated(&wire.steps, Stream::Stdout),
        stderr: concatenated(&wire.steps, Stream::Stderr),
        usage: wire.usage,
        outputs: wire.outputs,
        archive,
        layer,
        steps: wire.steps,
        started_at: wire.started_at,
        finished_at: wire.finished_at,
        durations: wire.durations,
        remains: None,
    })
}

/// What each step wrote, in the order in which it travels.
fn captured(steps: &mut [StepResult]) -> impl Iterator<Item = &mut Captured> {
    steps.iter_mut().flat_map(|step| [&mut step.stdout, &mut step.stderr])
}
