//! What the engine is told once, at its start.

use std::path::PathBuf;

use hutch_proto::{LimitPolicy, SeccompSpec};
use hutch_sandbox_sys::NetworkNamespace;
use hutch_trees::CappedTrees;

use crate::egress::EgressConfig;

/// How an [`Engine`](crate::Engine) treats every job.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Directory of its own, made if missing (mode 0700): the host layer's skeleton, named volumes.
    pub data_dir: PathBuf,
    /// How many jobs run at one time; slots are numbered from 0.
    pub slots: u32,
    /// Whether jobs may stack the host's own programs.
    pub allow_host_layer: bool,
    /// Directories below which `host_path` volumes may lie.
    pub allowed_host_paths: Vec<PathBuf>,
    /// Directories below which `dir:` layers may lie.
    pub layer_dirs: Vec<PathBuf>,
    /// The stored layers of this host; without it jobs can stack none.
    pub trees: Option<CappedTrees>,
    /// Defaults and maximums of the limits.
    pub limits: LimitPolicy,
    /// How the system calls of a job are treated that does not say so.
    pub seccomp: SeccompSpec,
    /// Which jobs have a way out to the internet, and how far.
    pub egress: EgressConfig,
    /// Up to this `disk_bytes` what a job writes lives in memory.
    pub scratch_memory_bytes: u64,
    /// Whether what is the same for every job is made before it is asked for: an init in its namespaces, and a cgroup, each
    /// used once. It costs a process for each slot, and makes the answer come sooner.
    pub prepare_ahead: bool,
    /// Where the network namespace of a sandbox comes from.
    pub network_namespace: NetworkNamespace,
    /// How many entries of outputs are listed at most.
    pub max_output_files: usize,
    /// How many bytes of files go into the archive at most.
    pub max_archive_bytes: u64,
    /// How many bytes of files may be in a layer that a job commits.
    pub max_layer_bytes: u64,
}

impl EngineConfig {
    /// The defaults, below this data directory.
    #[must_use]
    pub fn new(data_dir: PathBuf) -> Self {
        Self {
            data_dir,
            slots: 1,
            allow_host_layer: false,
            allowed_host_paths: Vec::new(),
            layer_dirs: Vec::new(),
            trees: None,
            limits: LimitPolicy::default(),
            seccomp: SeccompSpec::default(),
            egress: EgressConfig::default(),
            scratch_memory_bytes: 256 << 20,
            prepare_ahead: true,
            network_namespace: NetworkNamespace::Fresh,
            max_output_files: 10_000,
            max_archive_bytes: 256 << 20,
            max_layer_bytes: 8 << 30,
        }
    }
}
