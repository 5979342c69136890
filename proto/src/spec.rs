//! The job, as its author writes it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::object::{self, Object};
use crate::{Content, JobId, JobPath, LayerRef, LimitsSpec, Mode, SeccompSpec, UserSpec};

/// The most bytes that a spec's JSON may have; larger content goes to the blob store.
pub const MAX_SPEC_BYTES: usize = 8 << 20;

fn default_queue() -> String {
    "default".to_owned()
}

fn default_priority() -> u8 {
    4
}

fn default_attempts() -> u32 {
    3
}

fn is_false(value: &bool) -> bool {
    !value
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// One job: a file system, a program or several, and what they may use.
///
/// Parse it with [`JobSpec::parse`], which also validates what the types alone cannot say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// The job's id and idempotency key; a new UUIDv7 if left out.
    #[serde(default = "JobId::generate")]
    pub id: JobId,
    /// The layers of its file system, base first: 1..=64.
    #[schemars(length(min = 1, max = 64))]
    pub layers: Vec<LayerRef>,
    /// Program and arguments, looked up in the sandbox's `PATH`; no shell. The image's if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// Environment variables, over `PATH`, `HOME`, `USER`, `LANG` and the image's own.
    #[serde(default, deserialize_with = "object::texts", skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory, made if missing; the image's, else the user's home, if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<JobPath>,
    /// Whom the program runs as.
    #[serde(default)]
    pub user: UserSpec,
    /// What the program reads from stdin; empty if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<Content>,
    /// Files written below the root before the start, owned by `user`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileSpec>,
    /// What the job may use.
    #[serde(default, deserialize_with = "object::one", skip_serializing_if = "is_default")]
    pub limits: LimitsSpec,
    /// Which system calls it may make.
    #[serde(default, deserialize_with = "object::one", skip_serializing_if = "is_default")]
    pub seccomp: SeccompSpec,
    /// Directories that outlive the job.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeMount>,
    /// What of the network the job sees.
    #[serde(default)]
    pub network: Network,
    /// What is kept of what the job wrote.
    #[serde(default, deserialize_with = "object::one", skip_serializing_if = "is_default")]
    pub outputs: OutputsSpec,
    /// Several programs over one file system, run in order; then there is no `command`.
    #[serde(default, deserialize_with = "object::many", skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepSpec>,
    /// The class of worker that takes it.
    #[serde(default = "default_queue")]
    pub queue: String,
    /// 0..=31, higher first.
    #[serde(default = "default_priority")]
    #[schemars(range(max = 31))]
    pub priority: u8,
    /// How often it is tried when a worker or its host fails: 1..=100.
    #[serde(default = "default_attempts")]
    #[schemars(range(min = 1, max = 100))]
    pub max_attempts: u32,
    /// Milliseconds after which it is no longer started: `cancelled`, reason `expired`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in_ms: Option<u64>,
    /// Kept with the result.
    #[serde(default, deserialize_with = "object::texts", skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Run the program on a pseudo-terminal.
    #[serde(default, skip_serializing_if = "is_false")]
    pub tty: bool,
}

/// A file written before the start: one of `text`, `base64`, `blob`, with its place and mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Object<RawFile>", into = "RawFile")]
#[schemars(with = "RawFile")]
pub struct FileSpec {
    /// Where it is written.
    pub path: JobPath,
    /// Its bytes.
    pub content: Content,
    /// Its permission bits.
    pub mode: Mode,
}

/// The wire form of [`FileSpec`]. Spelled out, since serde cannot refuse unknown fields of a
/// flattened struct.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "FileSpec")]
struct RawFile {
    /// Where it is written: an absolute path inside the sandbox.
    path: JobPath,
    /// The bytes as UTF-8 text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    /// The bytes in standard base64 with padding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
    /// The digest of a blob that was uploaded before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    blob: Option<crate::Digest>,
    /// Permission bits as octal text.
    #[serde(default)]
    mode: Mode,
}

impl TryFrom<Object<RawFile>> for FileSpec {
    type Error = String;

    fn try_from(Object(raw): Object<RawFile>) -> Result<Self, String> {
        let content = Content::from_parts(raw.text, raw.base64, raw.blob)?;
        Ok(Self { path: raw.path, content, mode: raw.mode })
    }
}

impl From<FileSpec> for RawFile {
    fn from(file: FileSpec) -> Self {
        let (text, base64, blob) = file.content.into_parts();
        Self { path: file.path, text, base64, blob, mode: file.mode }
    }
}

/// A directory bound into the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Object<RawVolume>", into = "RawVolume")]
#[schemars(with = "RawVolume")]
pub struct VolumeMount {
    /// What is bound.
    pub source: VolumeSource,
    /// Where it appears; made if missing.
    pub target: JobPath,
    /// Whether the job may not write to it.
    pub read_only: bool,
}

/// What a volume shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeSource {
    /// A volume that the worker keeps under this name.
    Named(String),
    /// A directory of the host, under a path that the worker's config allows.
    HostPath(String),
}

/// The wire form of [`VolumeMount`]: exactly one of `volume`, `host_path`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "VolumeMount")]
struct RawVolume {
    /// Name of a volume that the worker keeps; made at its first use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    volume: Option<String>,
    /// Directory of the host, under a path that the worker's config allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host_path: Option<String>,
    /// Where it appears in the sandbox.
    target: JobPath,
    /// Default: false for a named volume, true for a host path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    read_only: Option<bool>,
}

impl TryFrom<Object<RawVolume>> for VolumeMount {
    type Error = String;

    fn try_from(Object(raw): Object<RawVolume>) -> Result<Self, String> {
        let (source, default_read_only) = match (raw.volume, raw.host_path) {
            (Some(name), None) => (VolumeSource::Named(name), false),
            (None, Some(path)) => (VolumeSource::HostPath(path), true),
            (None, None) => return Err("one of `volume`, `host_path` is needed".to_owned()),
            (Some(_), Some(_)) => return Err("only one of `volume`, `host_path` may be given".to_owned()),
        };
        Ok(Self { source, target: raw.target, read_only: raw.read_only.unwrap_or(default_read_only) })
    }
}

impl From<VolumeMount> for RawVolume {
    fn from(mount: VolumeMount) -> Self {
        let (volume, host_path) = match mount.source {
            VolumeSource::Named(name) => (Some(name), None),
            VolumeSource::HostPath(path) => (None, Some(path)),
        };
        Self { volume, host_path, target: mount.target, read_only: Some(mount.read_only) }
    }
}

/// What of the network a job sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// A private network namespace with nothing but loopback.
    #[default]
    None,
    /// Outbound only; private, link-local and metadata ranges are blocked.
    Egress,
}

/// What is kept of what the job wrote.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OutputsSpec {
    /// Globs over what the job made, changed or deleted, such as `/box/out/**`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
    /// Commit what the job wrote as a new layer.
    #[serde(skip_serializing_if = "is_false")]
    pub layer: bool,
}

/// One of several programs of a job; what it leaves out it takes from the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StepSpec {
    /// Its name, unique in the job.
    pub name: String,
    /// Program and arguments; no shell.
    pub command: Vec<String>,
    /// What the program reads from stdin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<Content>,
    /// Environment variables, over the job's.
    #[serde(default, deserialize_with = "object::texts", skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<JobPath>,
    /// Its own limits, over the job's.
    #[serde(default, deserialize_with = "object::one", skip_serializing_if = "is_default")]
    pub limits: LimitsSpec,
    /// Its own treatment of system calls, over the job's.
    #[serde(default, deserialize_with = "object::one", skip_serializing_if = "is_default")]
    pub seccomp: SeccompSpec,
    /// Whether the next step runs, and the job may succeed, even when this one does not.
    #[serde(default, skip_serializing_if = "is_false")]
    pub allow_failure: bool,
}
