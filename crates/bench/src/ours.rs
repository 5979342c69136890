//! Our engine in this process, as a worker's slot uses it, with each trick behind a switch.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use hutch_proto::{JobSpec, Status};
use hutch_sandbox::{
    Durations, Engine, EngineConfig, Launcher, NetworkNamespace, Order, Remains, Unobserved,
};
use tokio_util::sync::CancellationToken;

/// What of the engine is switched on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Switches {
    /// Its name in the table.
    pub(crate) name: &'static str,
    /// What that means.
    pub(crate) does: &'static str,
    prepare_ahead: bool,
    network: NetworkNamespace,
}

/// All that are measured. The first is the default.
pub(crate) const ALL: [Switches; 4] = [
    Switches {
        name: "hutch",
        does: "everything: 7 namespaces, overlay, cgroups, seccomp, init, outputs",
        prepare_ahead: true,
        network: NetworkNamespace::Fresh,
    },
    Switches {
        name: "hutch, nothing ahead",
        does: "the same, all made when it is asked for",
        prepare_ahead: false,
        network: NetworkNamespace::Fresh,
    },
    Switches {
        name: "hutch, per-slot",
        does: "the same; a slot keeps an empty network namespace that was proved untouched",
        prepare_ahead: true,
        network: NetworkNamespace::PerSlot,
    },
    Switches {
        name: "hutch, per-slot, nothing ahead",
        does: "both",
        prepare_ahead: false,
        network: NetworkNamespace::PerSlot,
    },
];

/// An engine, and a job for it.
pub(crate) struct Ours {
    pub(crate) switches: Switches,
    runtime: tokio::runtime::Runtime,
    engine: Engine,
    spec: Vec<u8>,
}

/// What one job took, and what is to be taken down after it.
pub(crate) struct Ran {
    pub(crate) durations: Durations,
    pub(crate) stdout: Vec<u8>,
    pub(crate) remains: Option<Remains>,
}

impl Ours {
    pub(crate) fn new(
        switches: Switches,
        launcher: Launcher,
        data: PathBuf,
        root: &Path,
        program: &str,
    ) -> anyhow::Result<Self> {
        let mut config = EngineConfig::new(data);
        config.slots = 2;
        config.layer_dirs = vec![root.to_owned()];
        config.prepare_ahead = switches.prepare_ahead;
        config.network_namespace = switches.network;
        let layer = format!("dir:{}", root.display());
        let spec = serde_json::json!({"layers": [layer], "command": [program], "cwd": "/"});
        Ok(Self {
            switches,
            engine: Engine::new(launcher, config)?,
            runtime: tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?,
            spec: spec.to_string().into_bytes(),
        })
    }

    /// A job in a task of its own, as a worker's slot runs it.
    pub(crate) fn run(&self, client: usize) -> anyhow::Result<Ran> {
        let job = JobSpec::parse(&self.spec)?;
        let slot = u32::try_from(client).context("so many clients")?;
        let engine = self.engine.clone();
        let order = Order { job, slot, cancel: CancellationToken::new(), strokes: None };
        let task = self.runtime.spawn(async move { engine.run(order, &Unobserved).await });
        let report = self.runtime.block_on(task)?;
        if report.status != Status::Succeeded {
            bail!("{}: {}", report.status, report.message);
        }
        Ok(Ran { durations: report.durations, stdout: report.stdout.data, remains: report.remains })
    }
}
