//! `hutch spec`: look at a job before it is handed in.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use hutch_proto::JobSpec;

use crate::cli::SpecCommand;
use crate::{order, term};

/// Checks a spec, or prints the schema.
pub(crate) fn spec(command: SpecCommand) -> anyhow::Result<ExitCode> {
    match command {
        SpecCommand::Check { file } => check(&file),
        SpecCommand::Schema => {
            let schema = serde_json::to_string_pretty(&hutch_proto::schema::job_spec());
            term::line(schema.context("the schema cannot be shown")?);
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn check(file: &Path) -> anyhow::Result<ExitCode> {
    let job = order::read_spec(file)?;
    term::line(format!("{} is a job: {}", order::shown(file), summary(&job)));
    Ok(ExitCode::SUCCESS)
}

fn summary(job: &JobSpec) -> String {
    let programs = match (&job.command, job.steps.len()) {
        (Some(command), _) => {
            format!("runs {}", term::safe_line(&command.join(" ")).chars().take(60).collect::<String>())
        }
        (None, 0) => "runs its image's command".to_owned(),
        (None, steps) => format!("runs {steps} steps"),
    };
    format!("{} layers, {programs}, queue {}", job.layers.len(), job.queue)
}
