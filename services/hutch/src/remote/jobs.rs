//! `hutch status`, `logs` and `cancel`: one job of a gateway.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Context;
use hutch_proto::{JobId, JobView};
use reqwest::Method;

use super::client::Client;
use super::follow::follow;
use crate::cli::{JobArgs, LogsArgs};
use crate::{term, verdict};

/// Shows where a job is.
pub(crate) async fn status(args: JobArgs) -> anyhow::Result<ExitCode> {
    let view = Client::new(&args.client)?.job(args.id).await?;
    if args.json {
        term::line(serde_json::to_string_pretty(&view).context("the job cannot be shown")?);
    } else {
        term::text(describe(&view));
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(view: &JobView) -> String {
    let mut lines = vec![("job", view.id.to_string()), ("submitted", view.submitted_at.to_string())];
    if !view.labels.is_empty() {
        let labels: Vec<String> = view.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        lines.push(("labels", term::safe_line(&labels.join(", "))));
    }
    match &view.result {
        None => lines.push(("state", view.state.to_string())),
        Some(result) => {
            lines.push(("verdict", verdict::sentence(result)));
            if result.timeline.started_at.is_some() {
                lines.push(("used", verdict::usage(&result.usage)));
                let worker = format!("{}, attempt {}", term::safe_line(&result.worker), result.attempt);
                lines.push(("worker", worker));
            }
            if !result.outputs.files.is_empty() {
                lines.push((
                    "outputs",
                    format!("{}; `hutch outputs {}` lists them", result.outputs.files.len(), view.id),
                ));
            }
        }
    }
    lines.into_iter().map(|(name, value)| format!("{name:<10} {value}\n")).collect()
}

/// Shows what a job wrote so far, or until it ends.
pub(crate) async fn logs(args: LogsArgs) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.client)?;
    if args.follow {
        follow(&client, args.id).await?;
        return Ok(ExitCode::SUCCESS);
    }
    copy(&client, args.id, "stdout", io::stdout()).await?;
    copy(&client, args.id, "stderr", io::stderr()).await?;
    Ok(ExitCode::SUCCESS)
}

async fn copy(client: &Client, id: JobId, stream: &str, mut to: impl Write) -> anyhow::Result<()> {
    let bytes = client.ask(Method::GET, &format!("/v1/jobs/{id}/{stream}"), None).await?.bytes().await?;
    match to.write_all(&bytes).and_then(|()| to.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.with_context(|| format!("{stream} cannot be written")),
    }
}

/// Calls a job off.
pub(crate) async fn cancel(args: JobArgs) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.client)?;
    let answer = client.ask(Method::DELETE, &format!("/v1/jobs/{}", args.id), None).await?;
    let answer: serde_json::Value = serde_json::from_slice(&answer.bytes().await?)?;
    if args.json {
        term::line(&answer);
    } else if answer["outcome"] == "already_finished" {
        term::note(format!("job {} had ended already", args.id));
    }
    Ok(ExitCode::SUCCESS)
}
