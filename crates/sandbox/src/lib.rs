//! The engine: one job, one fresh sandbox.
//!
//! `JobSpec -> Plan -> Prepared -> Running -> Exited -> Collected -> Report`. [`Launcher::fork`] first, before any
//! thread; then [`Engine::new`], which looks at the host; then [`Engine::run`] for each job.
//!
//! What is not here: the network, the queue, and unsafe code.

mod ahead;
mod capture;
mod cgroup;
mod collect;
mod config;
mod course;
mod egress;
mod engine;
mod exec;
mod failure;
mod host;
mod hostlayer;
mod image;
mod link;
mod observe;
mod plan;
mod prepare;
mod proof;
mod refusal;
mod refusals;
mod report;
mod scratch;
pub mod seccomp;
mod spawn;
mod supervise;
mod terminal;
mod verdict;

pub use collect::CommittedLayer;
pub use config::EngineConfig;
pub use egress::{EgressConfig, EgressRule, EgressRuleError};
pub use engine::{Engine, EngineError, Launcher, Order};
pub use exec::{ExecEnd, ExecError, ExecOrder};
pub use hutch_sandbox_sys::defence::Defence;
pub use hutch_sandbox_sys::{NetworkNamespace, WindowSize, terminal::size as terminal_size};
pub use hutch_sandbox_sys::{heap, separate};
pub use link::{EngineHandle, EngineProcess, TakeDown};
pub use observe::{Observer, SlotGauges, Stream, Unobserved};
pub use proof::{Proof, Trial, probe};
pub use report::{Durations, JobFacts, Remains, Report};
pub use terminal::{Stroke, Strokes};

/// What benchmarks measure by itself.
#[doc(hidden)]
pub mod measured {
    use hutch_proto::JobSpec;

    use crate::config::EngineConfig;
    use crate::host;
    use crate::plan::{Abilities, JobPlan};

    /// Decides everything about a job on a host without processors to choose from; how many steps it has.
    ///
    /// # Errors
    /// Why it cannot be run as it is written.
    pub fn plan(spec: &JobSpec, config: &EngineConfig) -> Result<usize, String> {
        let abilities = Abilities {
            processors: None,
            swap: true,
            hard_limits: host::hard_limits(),
            images: Err(String::new()),
            io: Err(String::new()),
            egress: Err(String::new()),
        };
        JobPlan::new(spec, config, &abilities).map(|plan| plan.steps.len()).map_err(|e| e.message)
    }
}
