//! A service before it begins: all that needs privileges is done, and they are gone.
//!
//! In order: the settings are read and the port is open; the directories are made and given to the user that the service
//! will be; the engine's process is forked, with the config that it will keep; this process becomes that user.

use std::net::TcpListener;

use hutch_gateway::GatewayConfig;
use hutch_layers::Registries;
use hutch_sandbox::{Engine, EngineConfig, EngineHandle, EngineProcess, Launcher};

use crate::privileges::{Homes, give_up, service_user};
use crate::settings::Settings;
use crate::{engine, logging, queue};

/// All that a service begins with.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) settings: Settings,
    pub(crate) homes: Homes,
    pub(crate) listener: TcpListener,
    /// Of one that runs jobs.
    pub(crate) engine: Option<EngineSeat>,
    /// Where its jobs' images come from; the logins are read.
    pub(crate) registries: Option<Registries>,
    /// Of one that takes jobs: its tokens are read.
    pub(crate) gateway: Option<GatewayConfig>,
}

/// Whether a service runs jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RunsJobs {
    Yes,
    No,
}

/// Where a worker's engine is.
#[derive(Debug)]
pub(crate) enum EngineSeat {
    /// In this process, whose privileges are no more than its user's.
    Here(Launcher, Box<EngineConfig>),
    /// In one that kept the privileges that this one gave up.
    Apart(EngineProcess),
}

impl EngineSeat {
    /// The engine.
    pub(crate) fn start(self) -> anyhow::Result<EngineHandle> {
        Ok(match self {
            Self::Here(launcher, config) => Engine::new(launcher, *config)?.into(),
            Self::Apart(process) => process.connect()?,
        })
    }
}

impl Ready {
    /// Separates what keeps its privileges from what goes on without. Call it while there is one thread.
    pub(crate) fn separated(
        settings: Settings,
        listener: TcpListener,
        gateway: Option<GatewayConfig>,
        runs_jobs: RunsJobs,
    ) -> anyhow::Result<Self> {
        let user = service_user();
        let store = settings.store_directory();
        let homes = Homes::of_service(&settings.data_dir, store, user)?;
        let config = || engine::shared(&settings, queue::trees(&settings)?);
        let registries = match runs_jobs {
            RunsJobs::Yes => queue::registries_for_jobs(&settings)?,
            RunsJobs::No => None,
        };
        let engine = match (runs_jobs, user) {
            (RunsJobs::No, _) => None,
            (RunsJobs::Yes, None) => Some(EngineSeat::Here(Launcher::fork()?, Box::new(config()?))),
            (RunsJobs::Yes, Some(_)) => {
                let most = settings.worker.max_input_bytes.0;
                Some(EngineSeat::Apart(EngineProcess::fork(config()?, most, logging::start)?))
            }
        };
        if let Some(user) = user {
            give_up(user)?;
        }
        Ok(Self { settings, homes, listener, engine, registries, gateway })
    }
}
