//! Runs one job from a file or stdin and prints its report: `run SPEC.json`.

use std::io::Read as _;

use hutch_proto::{JobSpec, Timestamp};
use hutch_sandbox::{Engine, EngineConfig, JobFacts, Launcher, Order, Unobserved};
use tokio_util::sync::CancellationToken;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let launcher = Launcher::fork()?;
    let mut json = Vec::new();
    match std::env::args().nth(1) {
        Some(path) => json = std::fs::read(path)?,
        None => drop(std::io::stdin().read_to_end(&mut json)?),
    }
    let job = JobSpec::parse(&json)?;
    let mut config = EngineConfig::new(std::env::temp_dir().join("hutch-example"));
    config.allow_host_layer = true;
    config.layer_dirs = vec!["/".into()];
    config.allowed_host_paths = vec!["/".into()];
    let engine = Engine::new(launcher, config)?;
    let facts = JobFacts {
        id: job.id,
        attempt: 1,
        worker: "example".to_owned(),
        submitted_at: Timestamp::now(),
        labels: job.labels.clone(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let order = Order { job, slot: 0, cancel: CancellationToken::new(), strokes: None };
    let report = runtime.block_on(engine.run(order, &Unobserved));
    serde_json::to_writer_pretty(std::io::stderr(), &report.into_result(facts))?;
    Ok(())
}
