//! From the settings to an engine's config.

use std::path::PathBuf;

use hutch_layers::CappedTrees;
use hutch_sandbox::EngineConfig;

use crate::settings::Settings;

/// The engine of a worker, and the layers that its jobs may stack.
pub(crate) fn shared(settings: &Settings, trees: CappedTrees) -> anyhow::Result<EngineConfig> {
    let worker = &settings.worker;
    Ok(EngineConfig {
        slots: worker.slots,
        allow_host_layer: worker.allow_host_layer,
        allowed_host_paths: worker.allowed_host_paths.clone(),
        layer_dirs: worker.layer_dirs.clone(),
        limits: settings.limits()?,
        seccomp: worker.seccomp,
        egress: settings.egress()?,
        trees: Some(trees),
        prepare_ahead: worker.prepare_ahead,
        network_namespace: worker.network_namespace,
        scratch_memory_bytes: worker.scratch_memory_bytes.0,
        max_output_files: worker.max_output_files,
        max_archive_bytes: worker.max_archive_bytes.0,
        max_layer_bytes: worker.max_layer_bytes.0,
        ..EngineConfig::new(settings.data_dir.clone())
    })
}

/// The engine of `hutch run`: the caller may use whatever the caller can read, and there is no next job to prepare for.
pub(crate) fn alone(settings: &Settings, trees: CappedTrees) -> anyhow::Result<EngineConfig> {
    Ok(EngineConfig {
        slots: 1,
        prepare_ahead: false,
        allow_host_layer: true,
        allowed_host_paths: vec![PathBuf::from("/")],
        layer_dirs: vec![PathBuf::from("/")],
        ..shared(settings, trees)?
    })
}
