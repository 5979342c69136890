//! The answer to a job: its verdict, what it used and what it wrote.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Digest, JobId, Mode, Timestamp};

/// How a job or a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Every program ended with exit code 0, within its limits.
    Succeeded,
    /// The program ended by itself, but not well.
    Failed,
    /// A limit ended it.
    LimitExceeded,
    /// It was called off.
    Cancelled,
    /// It cannot be run as it is written.
    Rejected,
    /// A worker or its host failed; nothing is said of the program.
    InfraError,
}

/// Why a job or a step ended as it did; see [`Reason::status`] for which goes with which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The program's exit code was not 0.
    NonzeroExit,
    /// A signal that was not ours ended the program.
    Signal,
    /// `cpu_time_ms` was used up.
    CpuTime,
    /// `wall_time_ms` ran out.
    WallTime,
    /// `idle_time_ms` passed without output and without use of a processor.
    IdleTime,
    /// `memory_bytes` was reached.
    Memory,
    /// More output than is kept, where that is not allowed.
    Output,
    /// `disk_bytes` or `disk_inodes` was reached, and the program failed; or `io_read_bytes` or `io_write_bytes` was passed.
    Disk,
    /// `file_size_bytes` was reached (SIGXFSZ).
    FileSize,
    /// A system call that the profile kills for.
    Syscall,
    /// Somebody asked for it to be cancelled.
    Requested,
    /// It was not started within `expires_in_ms`.
    Expired,
    /// The spec is wrong, or asks for more than this worker gives.
    SpecInvalid,
    /// A layer or image cannot be had.
    ImageError,
    /// A volume cannot be had.
    VolumeError,
    /// There is no such program, or nothing that can be run.
    CommandNotFound,
    /// The worker that ran it was lost, too often.
    WorkerLost,
    /// The host or the sandbox failed.
    HostError,
}

/// The name of a serde unit variant; used for labels, routing keys and display.
macro_rules! wire_name {
    ($type:ident { $($variant:ident => $name:literal),+ $(,)? }) => {
        impl $type {
            /// Every value, in the order of the contract.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name on the wire.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

wire_name!(Status {
    Succeeded => "succeeded", Failed => "failed", LimitExceeded => "limit_exceeded",
    Cancelled => "cancelled", Rejected => "rejected", InfraError => "infra_error",
});

wire_name!(Reason {
    NonzeroExit => "nonzero_exit", Signal => "signal", CpuTime => "cpu_time",
    WallTime => "wall_time", IdleTime => "idle_time", Memory => "memory", Output => "output",
    Disk => "disk", FileSize => "file_size", Syscall => "syscall", Requested => "requested",
    Expired => "expired", SpecInvalid => "spec_invalid", ImageError => "image_error",
    VolumeError => "volume_error", CommandNotFound => "command_not_found",
    WorkerLost => "worker_lost", HostError => "host_error",
});

impl Reason {
    /// The one status that this reason goes with.
    #[must_use]
    pub fn status(self) -> Status {
        match self {
            Self::NonzeroExit | Self::Signal | Self::CommandNotFound => Status::Failed,
            Self::CpuTime
            | Self::WallTime
            | Self::IdleTime
            | Self::Memory
            | Self::Output
            | Self::Disk
            | Self::FileSize
            | Self::Syscall => Status::LimitExceeded,
            Self::Requested | Self::Expired => Status::Cancelled,
            Self::SpecInvalid | Self::ImageError | Self::VolumeError => Status::Rejected,
            Self::WorkerLost | Self::HostError => Status::InfraError,
        }
    }
}

/// Which limit was hit, in the unit of its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitHit {
    /// Name of the limit, such as `memory_bytes`.
    pub name: String,
    /// What was allowed.
    pub allowed: u64,
    /// What the kernel measured.
    pub measured: u64,
}

/// What a program wrote to stdout or stderr, up to what is kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Captured {
    /// The bytes that were kept.
    pub data: Vec<u8>,
    /// How many bytes were written in all.
    pub bytes: u64,
    /// Whether more was written than was kept.
    pub truncated: bool,
}

/// The wire form of [`Captured`]: `text`, or `base64` where the bytes are not UTF-8, or long and control characters for
/// the most part.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Captured")]
struct RawCaptured {
    /// The bytes as UTF-8 text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    /// The bytes in base64, where they are not UTF-8, or long and control characters for the most part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
    /// How many bytes were written in all.
    bytes: u64,
    /// Whether more was written than was kept.
    truncated: bool,
}

impl Serialize for Captured {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = self.wire_text().map(str::to_owned);
        let base64 = if text.is_some() { None } else { Some(STANDARD.encode(&self.data)) };
        RawCaptured { text, base64, bytes: self.bytes, truncated: self.truncated }.serialize(serializer)
    }
}

impl Captured {
    /// Bytes of text from which on base64 is sent in its place where the text would take more than twice its bytes in
    /// JSON: a line feed takes two, most control characters take six.
    pub const LARGE_TEXT: usize = 64 << 10;

    /// How many bytes the output takes in JSON, without the quotes around it.
    #[must_use]
    pub fn wire_bytes(&self) -> usize {
        self.wire_text().map_or_else(|| base64_bytes(self.data.len()), escaped_bytes)
    }

    /// The output as text, as far as it is UTF-8: all of it, or all but a character that the cap cut in two.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        str::from_utf8(&self.data).ok().or_else(|| self.cut_text())
    }

    /// Keeps as many whole characters, or bytes, from the start as take at most `most` bytes in JSON.
    pub fn cut_to(&mut self, most: usize) {
        while self.wire_bytes() > most {
            self.truncated = true;
            // More than once where the start of what is no text is text.
            let end = self.text().map_or(most / 4 * 3, |text| text_end(text, most));
            self.data.truncate(end);
        }
    }

    /// What is sent as text; none where base64 is sent.
    fn wire_text(&self) -> Option<&str> {
        self.text().filter(|text| goes_as_text(text))
    }

    /// The text before a character that was cut in two by the cap, where that is all that is wrong.
    fn cut_text(&self) -> Option<&str> {
        let error = str::from_utf8(&self.data).err()?;
        (self.truncated && error.error_len().is_none())
            .then(|| str::from_utf8(&self.data[..error.valid_up_to()]).ok())
            .flatten()
    }
}

fn goes_as_text(text: &str) -> bool {
    text.len() <= Captured::LARGE_TEXT || escaped_bytes(text) <= 2 * text.len()
}

fn base64_bytes(bytes: usize) -> usize {
    bytes.div_ceil(3) * 4
}

/// Where a text is to be cut so that it takes at most `most` bytes in JSON, in the form in which it then goes.
fn text_end(text: &str, most: usize) -> usize {
    let mut left = most;
    let mut fits = |byte: u8| left.checked_sub(escaped_byte(byte)).map(|less| left = less).is_some();
    let boundary =
        |at: usize| (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    let as_text = boundary(text.bytes().position(|byte| !fits(byte)).unwrap_or(text.len()));
    let as_base64 = boundary(most / 4 * 3);
    if goes_as_text(&text[..as_base64]) { as_text } else { as_text.max(as_base64) }
}

/// Bytes of a text in JSON: a control character may take six.
fn escaped_bytes(text: &str) -> usize {
    text.bytes().map(escaped_byte).sum()
}

/// Bytes of one byte of text in JSON.
fn escaped_byte(byte: u8) -> usize {
    match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 8 | 12 => 2,
        0..32 => 6,
        _ => 1,
    }
}

impl<'de> Deserialize<'de> for Captured {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = RawCaptured::deserialize(deserializer)?;
        let data = match (raw.text, raw.base64) {
            (Some(text), None) => text.into_bytes(),
            (None, Some(encoded)) => STANDARD.decode(encoded).map_err(serde::de::Error::custom)?,
            _ => return Err(serde::de::Error::custom("exactly one of `text`, `base64` is expected")),
        };
        Ok(Self { data, bytes: raw.bytes, truncated: raw.truncated })
    }
}

impl JsonSchema for Captured {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Captured".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        RawCaptured::json_schema(generator)
    }
}

/// What a program and all that it started used, as the kernel counted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Usage {
    /// Milliseconds on the clock.
    pub wall_time_ms: u64,
    /// Milliseconds of user time.
    pub cpu_user_ms: u64,
    /// Milliseconds of system time.
    pub cpu_system_ms: u64,
    /// Milliseconds for which it was held back by `cpu_millis`.
    pub cpu_throttled_ms: u64,
    /// The most bytes of memory at one time.
    pub memory_peak_bytes: u64,
    /// How many processes the kernel killed for memory.
    pub oom_kills: u64,
    /// The most processes and threads at one time.
    pub pids_peak: u64,
    /// How many forks the `pids` limit refused.
    pub pids_denied: u64,
    /// Bytes read from block devices.
    pub io_read_bytes: u64,
    /// Bytes written to block devices.
    pub io_write_bytes: u64,
    /// Bytes of files that it had written at the end.
    pub disk_bytes: u64,
    /// Files, directories and links that it had made at the end.
    pub disk_inodes: u64,
}

impl Usage {
    /// The usage of this and then `next` over one file system: times add up, peaks are the higher.
    #[must_use]
    pub fn then(self, next: Self) -> Self {
        Self {
            wall_time_ms: self.wall_time_ms + next.wall_time_ms,
            cpu_user_ms: self.cpu_user_ms + next.cpu_user_ms,
            cpu_system_ms: self.cpu_system_ms + next.cpu_system_ms,
            cpu_throttled_ms: self.cpu_throttled_ms + next.cpu_throttled_ms,
            memory_peak_bytes: self.memory_peak_bytes.max(next.memory_peak_bytes),
            oom_kills: self.oom_kills + next.oom_kills,
            pids_peak: self.pids_peak.max(next.pids_peak),
            pids_denied: self.pids_denied + next.pids_denied,
            io_read_bytes: self.io_read_bytes + next.io_read_bytes,
            io_write_bytes: self.io_write_bytes + next.io_write_bytes,
            disk_bytes: next.disk_bytes,
            disk_inodes: next.disk_inodes,
        }
    }
}

/// What kind of thing an output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link; never followed.
    Symlink,
    /// A path of a lower layer that the job deleted.
    Deleted,
    /// A socket, FIFO or device; listed and never opened.
    Special,
}

/// One path that the job made, changed or deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OutputFile {
    /// Where it is in the sandbox; bytes that are not UTF-8 are shown as `\xNN`.
    pub path: String,
    /// What it is.
    pub kind: OutputKind,
    /// Its permission bits; none for `deleted`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Its size; 0 for all but files.
    pub bytes: u64,
    /// SHA-256 of a file's bytes, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Where a symbolic link points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// A blob with the asked-for paths: a tar, compressed by zstd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Archive {
    /// Digest of the compressed bytes, and their name in the blob store.
    pub blob: Digest,
    /// How many compressed bytes.
    pub bytes: u64,
}

/// What was kept of what the job wrote.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Outputs {
    /// The paths that the job's globs match, in order.
    pub files: Vec<OutputFile>,
    /// The files, directories and links among them; null where there are none.
    pub archive: Option<Archive>,
    /// The committed layer; null where none was asked for.
    pub layer: Option<Digest>,
    /// Whether there was more than is kept.
    pub truncated: bool,
}

/// When what happened, and how long each part took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Timeline {
    /// When the queue accepted it.
    pub submitted_at: Timestamp,
    /// When a worker began with it; null if none did.
    pub started_at: Option<Timestamp>,
    /// When the verdict was there.
    pub finished_at: Timestamp,
    /// Milliseconds in the queue.
    pub queue_ms: u64,
    /// Microseconds from the worker's start to the program's.
    pub setup_us: u64,
    /// Microseconds that the program ran.
    pub run_us: u64,
    /// Microseconds to read what it wrote.
    pub collect_us: u64,
    /// Microseconds to take the sandbox down, as far as it delayed the answer.
    pub teardown_us: u64,
}

/// How one step ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StepResult {
    /// The step's name; `main` for a plain `command`.
    pub name: String,
    /// How it ended.
    pub status: Status,
    /// Why; null on success.
    pub reason: Option<Reason>,
    /// The same in words; empty on success.
    pub message: String,
    /// The limit that was hit.
    pub limit: Option<LimitHit>,
    /// The program's exit code, where it exited.
    pub exit_code: Option<i32>,
    /// The signal that ended it, such as `SIGSEGV`.
    pub signal: Option<String>,
    /// Names of the system calls that were refused, where the job asked for them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused_syscalls: Vec<String>,
    /// What it wrote to stdout.
    pub stdout: Captured,
    /// What it wrote to stderr.
    pub stderr: Captured,
    /// What it used.
    pub usage: Usage,
    /// When what happened.
    pub timeline: Timeline,
}

/// The one terminal result of a job.
///
/// Of several steps, verdict and program's end are those of the step that decided; the usage is
/// the whole job's; stdout and stderr are the steps' one after another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JobResult {
    /// The job.
    pub id: JobId,
    /// Which attempt this was, from 1; 0 if none was made.
    pub attempt: u32,
    /// The worker that answered; empty if none had it.
    pub worker: String,
    /// How it ended.
    pub status: Status,
    /// Why; null on success.
    pub reason: Option<Reason>,
    /// The same in words; empty on success.
    pub message: String,
    /// The limit that was hit.
    pub limit: Option<LimitHit>,
    /// The program's exit code, where it exited.
    pub exit_code: Option<i32>,
    /// The signal that ended it, such as `SIGSEGV`.
    pub signal: Option<String>,
    /// Names of the system calls that were refused, where the job asked for them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused_syscalls: Vec<String>,
    /// What it wrote to stdout.
    pub stdout: Captured,
    /// What it wrote to stderr.
    pub stderr: Captured,
    /// What it used.
    pub usage: Usage,
    /// What was kept of what it wrote.
    pub outputs: Outputs,
    /// Every step that ran, in order.
    pub steps: Vec<StepResult>,
    /// When what happened.
    pub timeline: Timeline,
    /// The job's labels.
    pub labels: BTreeMap<String, String>,
}

impl JobResult {
    /// The result of a job whose program never ran.
    #[must_use]
    pub fn without_run(
        id: JobId,
        labels: BTreeMap<String, String>,
        submitted_at: Timestamp,
        reason: Reason,
        message: impl Into<String>,
    ) -> Self {
        let now = Timestamp::now();
        Self {
            id,
            attempt: 0,
            worker: String::new(),
            status: reason.status(),
            reason: Some(reason),
            message: message.into(),
            limit: None,
            exit_code: None,
            signal: None,
            refused_syscalls: Vec::new(),
            stdout: Captured::default(),
            stderr: Captured::default(),
            usage: Usage::default(),
            outputs: Outputs::default(),
            steps: Vec::new(),
            timeline: Timeline {
                submitted_at,
                started_at: None,
                finished_at: now,
                queue_ms: u64::try_from(now.since(submitted_at).as_millis()).unwrap_or(u64::MAX),
                setup_us: 0,
                run_us: 0,
                collect_us: 0,
                teardown_us: 0,
            },
            labels,
        }
    }
}

/// Where a job is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// It waits for a worker.
    Queued,
    /// A worker has it.
    Running,
    /// Its result is there.
    Finished,
}

wire_name!(JobState { Queued => "queued", Running => "running", Finished => "finished" });

/// What the gateway says of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JobView {
    /// The job.
    pub id: JobId,
    /// Where it is.
    pub state: JobState,
    /// When it was accepted.
    pub submitted_at: Timestamp,
    /// The job's labels.
    pub labels: BTreeMap<String, String>,
    /// Its result, once it is finished.
    pub result: Option<JobResult>,
}
