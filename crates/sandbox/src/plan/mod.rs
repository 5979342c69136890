//! From a spec to a plan: every decision, before anything is made. No I/O.
//!
//! In order: what cannot be done here is refused; limits are resolved against the worker's policy;
//! layers and volumes become places; each step gets its arguments, its environment and the
//! paths at which its program may be.

mod mounts;
mod program;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use hutch_proto::{
    Content, Digest, JobSpec, LayerRef, LimitPolicy, Limits, LimitsSpec, Network, Reason, StepSpec,
    VolumeSource,
};

use crate::config::EngineConfig;
use crate::egress::Egress;
use crate::refusal::Refusal;

pub(crate) use mounts::{MountPlan, Slots, scratch_dirs, steps as mount_steps};
pub(crate) use program::{StepPlan, candidates, rlimits, text};

/// resolv.conf(5).
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What this host can enforce, as far as plans depend on it.
#[derive(Debug, Clone)]
pub(crate) struct Abilities {
    /// The processors that can be chosen; none where they cannot.
    pub(crate) processors: Option<BTreeSet<u32>>,
    /// Whether swap is limited (or there is none).
    pub(crate) swap: bool,
    /// The highest resource limits that this process may give.
    pub(crate) hard_limits: HardLimits,
    /// Whether scratch space can be on disk; if not, why.
    pub(crate) images: Result<(), String>,
    /// Whether jobs can have a way out; if not, why.
    pub(crate) egress: Result<(), String>,
    /// Whether the use of disks can be limited; if not, why.
    pub(crate) io: Result<(), String>,
}

/// Resource limits that this process cannot raise: getrlimit(2).
#[derive(Debug, Clone, Copy)]
pub(crate) struct HardLimits {
    pub(crate) open_files: u64,
    pub(crate) stack_bytes: u64,
    pub(crate) core_bytes: u64,
}

/// Where a layer comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LayerSource {
    /// A directory of the host.
    Dir(PathBuf),
    /// A layer of the store.
    Stored(Digest),
    /// The host's own programs.
    Host,
}

/// One volume of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VolumePlan {
    pub(crate) source: VolumeSource,
    pub(crate) target: String,
    pub(crate) read_only: bool,
    /// Whether it is the engine's own: allowed by no config, and shown with the owners that it has.
    pub(crate) ours: bool,
}

/// One file to write before the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FilePlan {
    pub(crate) path: String,
    pub(crate) mode: u32,
    pub(crate) bytes: Vec<u8>,
}

/// Everything about a job, decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct JobPlan {
    pub(crate) hostname: String,
    pub(crate) layers: Vec<LayerSource>,
    pub(crate) volumes: Vec<VolumePlan>,
    pub(crate) files: Vec<FilePlan>,
    /// Whether it has a way out to the internet.
    pub(crate) egress: bool,
    pub(crate) user: String,
    pub(crate) group: Option<String>,
    pub(crate) steps: Vec<StepPlan>,
    pub(crate) disk_bytes: u64,
    pub(crate) disk_inodes: u64,
    /// Whether what the job writes goes to the disk, not to memory.
    pub(crate) scratch_on_disk: bool,
    pub(crate) globs: Vec<String>,
    /// Whether what the job wrote becomes a layer.
    pub(crate) commit: bool,
    /// The latest time of what becomes a layer, in seconds since 1970, if the job sets one (SOURCE_DATE_EPOCH).
    pub(crate) commit_time_s: Option<i64>,
}

impl JobPlan {
    /// Decides everything about a job.
    ///
    /// # Errors
    /// The verdict on a job that cannot be run as it is written, or not on this worker.
    pub(crate) fn new(spec: &JobSpec, config: &EngineConfig, abilities: &Abilities) -> Result<Self, Refusal> {
        let egress = spec.network == Network::Egress;
        if let (true, Err(why)) = (egress, &abilities.egress) {
            let message = format!("`egress` is not available on this worker, `none` is: {why}");
            return Err(Refusal::spec("network", message));
        }
        let limits = config.limits.resolve(&spec.limits, "limits")?;
        check_abilities(&limits, config, abilities, "limits")?;
        let layers = spec
            .layers
            .iter()
            .enumerate()
            .map(|(index, layer)| layer_source(layer, &format!("layers[{index}]"), config))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            hostname: format!("job-{}", &spec.id.to_string()[..8]),
            layers,
            volumes: spec
                .volumes
                .iter()
                .enumerate()
                .map(|(index, volume)| {
                    check_volume(&volume.source, &format!("volumes[{index}]"), config)?;
                    Ok(VolumePlan {
                        source: volume.source.clone(),
                        target: volume.target.to_string(),
                        read_only: volume.read_only,
                        ours: false,
                    })
                })
                .collect::<Result<_, Refusal>>()?,
            files: spec
                .files
                .iter()
                .enumerate()
                .map(|(index, file)| {
                    Ok(FilePlan {
                        path: file.path.to_string(),
                        mode: file.mode.bits(),
                        bytes: inline(&file.content, &format!("files[{index}]"))?,
                    })
                })
                .chain(resolver(spec).map(Ok))
                .collect::<Result<_, Refusal>>()?,
            egress,
            user: spec.user.user().to_owned(),
            group: spec.user.group().map(str::to_owned),
            steps: steps(spec, &limits, config, abilities)?,
            disk_bytes: limits.disk_bytes,
            disk_inodes: limits.disk_inodes,
            scratch_on_disk: limits.disk_bytes > config.scratch_memory_bytes,
            globs: spec.outputs.paths.clone(),
            commit: spec.outputs.layer,
            commit_time_s: spec.env.get("SOURCE_DATE_EPOCH").and_then(|epoch| epoch.parse().ok()),
        })
    }
}

impl JobPlan {
    /// The file system alone, if one like it may be built before it is asked for: what is in it does not depend on
    /// the job, and whether it is still the right one can be seen. Jobs of several steps, with volumes, or with scratch
    /// space on disk have theirs made when they are run; so have those with a directory above the host's programs, in which
    /// trees may appear that are stacked on the host's.
    pub(crate) fn root_alone(&self) -> Option<Self> {
        let on_host = self.layers.first() == Some(&LayerSource::Host)
            && self.layers.iter().any(|layer| matches!(layer, LayerSource::Dir(_)));
        if self.steps.len() != 1 || !self.volumes.is_empty() || self.scratch_on_disk || on_host {
            return None;
        }
        Some(Self {
            hostname: String::new(),
            layers: self.layers.clone(),
            volumes: Vec::new(),
            files: Vec::new(),
            egress: false,
            user: String::new(),
            group: None,
            steps: Vec::new(),
            disk_bytes: self.disk_bytes,
            disk_inodes: self.disk_inodes,
            scratch_on_disk: false,
            globs: Vec::new(),
            commit: false,
            commit_time_s: None,
        })
    }
}

/// The bytes of a content that was given in place.
fn inline(content: &Content, path: &str) -> Result<Vec<u8>, Refusal> {
    match content {
        Content::Inline(bytes) => Ok(bytes.clone()),
        Content::Blob(digest) => Err(Refusal::spec(path, format!("there is no blob {digest} in the store"))),
    }
}

/// Where a job with a way out asks for names, unless it brings a file of its own.
fn resolver(spec: &JobSpec) -> Option<FilePlan> {
    let brings = spec.files.iter().any(|file| file.path.to_string() == RESOLV_CONF);
    (spec.network == Network::Egress && !brings).then(|| FilePlan {
        path: RESOLV_CONF.to_owned(),
        mode: 0o644,
        bytes: Egress::resolver().into_bytes(),
    })
}

fn check_abilities(
    limits: &Limits,
    config: &EngineConfig,
    abilities: &Abilities,
    path: &str,
) -> Result<(), Refusal> {
    if let Some(wanted) = &limits.cpuset {
        let path = format!("{path}.cpuset");
        let Some(there) = &abilities.processors else {
            let message = "this host cannot bind a job to processors: it has no cpuset controller";
            return Err(Refusal::spec(&path, message));
        };
        if let Some(missing) = processors(wanted).difference(there).next() {
            let message = format!("processor {missing} is not there; those of this worker are {there:?}");
            return Err(Refusal::spec(&path, message));
        }
    }
    if !abilities.swap {
        let message = "this host cannot limit swap: turn swap off, or swap accounting on (swapaccount=1)";
        return Err(Refusal::spec(&format!("{path}.swap_bytes"), message));
    }
    let HardLimits { open_files, stack_bytes, core_bytes } = abilities.hard_limits;
    for (name, wanted, most) in [
        ("open_files", limits.open_files, open_files),
        ("stack_bytes", limits.stack_bytes, stack_bytes),
        ("core_bytes", limits.core_bytes, core_bytes),
    ] {
        if wanted > most {
            let message = format!("{wanted} is above what this host allows: {most}");
            return Err(Refusal::spec(&format!("{path}.{name}"), message));
        }
    }
    for (name, wanted) in [
        ("io_read_bytes_per_s", limits.io_read_bytes_per_s),
        ("io_write_bytes_per_s", limits.io_write_bytes_per_s),
        ("io_read_ops_per_s", limits.io_read_ops_per_s),
        ("io_write_ops_per_s", limits.io_write_ops_per_s),
        ("io_read_bytes", limits.io_read_bytes),
        ("io_write_bytes", limits.io_write_bytes),
    ] {
        if let (Some(_), Err(why)) = (wanted, &abilities.io) {
            let message = format!("this host cannot limit the use of disks: {why}");
            return Err(Refusal::spec(&format!("{path}.{name}"), message));
        }
    }
    if limits.disk_bytes > config.scratch_memory_bytes
        && let Err(why) = &abilities.images
    {
        let message = format!(
            "{} is above what this worker keeps in memory ({}), and it has no scratch space on disk: {why}",
            limits.disk_bytes, config.scratch_memory_bytes
        );
        return Err(Refusal::spec(&format!("{path}.disk_bytes"), message));
    }
    Ok(())
}

/// The numbers in a list as in cpuset(7), such as `0-2,4`.
pub(crate) fn processors(list: &str) -> BTreeSet<u32> {
    let range = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

fn layer_source(layer: &LayerRef, path: &str, config: &EngineConfig) -> Result<LayerSource, Refusal> {
    match layer {
        LayerRef::Host if config.allow_host_layer => Ok(LayerSource::Host),
        LayerRef::Host => Err(Refusal::spec(
            path,
            "the `host` layer is off on this worker; set worker.allow_host_layer = true to allow it",
        )),
        LayerRef::Dir(dir) => {
            let dir = PathBuf::from(dir);
            if config.layer_dirs.iter().any(|allowed| dir.starts_with(allowed)) {
                return Ok(LayerSource::Dir(dir));
            }
            let message = format!("{} is not below a path that worker.layer_dirs allows", dir.display());
            Err(Refusal::spec(path, message))
        }
        LayerRef::Stored(digest) => Ok(LayerSource::Stored(digest.clone())),
        other @ (LayerRef::Image(_) | LayerRef::Job(_)) => {
            Err(Refusal::new(Reason::ImageError, format!("{path}: `{other}` was not expanded to its layers")))
        }
    }
}

fn check_volume(source: &VolumeSource, path: &str, config: &EngineConfig) -> Result<(), Refusal> {
    let VolumeSource::HostPath(host) = source else { return Ok(()) };
    if config.allowed_host_paths.iter().any(|allowed| Path::new(host).starts_with(allowed)) {
        return Ok(());
    }
    let message =
        format!("{path}.host_path: {host} is not below a path that worker.allowed_host_paths allows");
    Err(Refusal::new(Reason::VolumeError, message))
}

/// The job's steps; a plain command is one step called `main`.
fn steps(
    spec: &JobSpec,
    job: &Limits,
    config: &EngineConfig,
    abilities: &Abilities,
) -> Result<Vec<StepPlan>, Refusal> {
    if let Some(command) = &spec.command {
        let limits = step_limits(&config.limits, spec, None, "limits")?;
        return Ok(vec![program::plan(spec, None, command, limits, config.seccomp)?]);
    }
    if spec.steps.is_empty() {
        return Err(Refusal::spec(
            "command",
            "a command or steps are needed, since no layer brings a command",
        ));
    }
    let plan = |(index, step): (usize, &StepSpec)| {
        let path = format!("steps[{index}].limits");
        let limits = step_limits(&config.limits, spec, Some(&step.limits), &path)?;
        check_abilities(&limits, config, abilities, &path)?;
        check_disk(&limits, job, &path)?;
        program::plan(spec, Some((index, step)), &step.command, limits, config.seccomp)
    };
    spec.steps.iter().enumerate().map(plan).collect()
}

/// Steps share the file system that they write to, so none has a limit of its own for it.
fn check_disk(step: &Limits, job: &Limits, path: &str) -> Result<(), Refusal> {
    for (name, asked, shared) in
        [("disk_bytes", step.disk_bytes, job.disk_bytes), ("disk_inodes", step.disk_inodes, job.disk_inodes)]
    {
        if asked != shared {
            let message = format!(
                "all steps write to one file system: the job's own limits.{name}, {shared}, holds, not {asked}"
            );
            return Err(Refusal::spec(&format!("{path}.{name}"), message));
        }
    }
    Ok(())
}

fn step_limits(
    policy: &LimitPolicy,
    spec: &JobSpec,
    step: Option<&LimitsSpec>,
    path: &str,
) -> Result<Limits, Refusal> {
    let asked = step.map_or_else(|| spec.limits.clone(), |step| step.over(&spec.limits));
    Ok(policy.resolve(&asked, path)?)
}
