//! `hutch submit`: hands a job to a gateway.
//!
//! The job gets its id here, so that a request may be repeated: the same id is the same job.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use hutch_proto::{JobId, JobResult, JobSpec};
use reqwest::{Method, StatusCode};

use super::client::{Client, refusal};
use super::follow::follow;
use crate::cli::SubmitArgs;
use crate::term::Waiting;
use crate::{exit, order, term, verdict};

/// How long one request waits for the result.
const WAIT_MS: u64 = 20_000;
/// How often a gateway that is gone, or has no queue, is tried again.
const RETRIES: u32 = 5;

/// Hands the job in, and waits for it if that is wanted.
pub(crate) async fn submit(args: SubmitArgs) -> anyhow::Result<ExitCode> {
    let job = order::read_spec(&args.spec)?;
    let client = Client::new(&args.client)?;
    if args.wait {
        let result = wait(&client, &job).await?;
        term::line(serde_json::to_string_pretty(&result).context("the result cannot be shown")?);
        let failed = !verdict::is_success(&result);
        return Ok(if failed { ExitCode::from(exit::FAILURE) } else { ExitCode::SUCCESS });
    }
    post(&client, &job, 0).await?;
    if !args.follow {
        term::line(job.id);
        return Ok(ExitCode::SUCCESS);
    }
    if !follow(&client, job.id).await? {
        return Ok(ExitCode::from(exit::FAILURE));
    }
    let result = result_of(&client, job.id).await?;
    if !verdict::is_success(&result) {
        term::note(verdict::sentence(&result));
    }
    Ok(exit::of(&result))
}

/// Waits for the result, request after request.
async fn wait(client: &Client, job: &JobSpec) -> anyhow::Result<JobResult> {
    let mut waiting = Waiting::new();
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        let asked = post(client, job, WAIT_MS);
        tokio::pin!(asked);
        let answer = loop {
            tokio::select! {
                answer = &mut asked => break answer?,
                _ = ticks.tick() => waiting.show(format!("waiting for job {}", job.id)),
            }
        };
        if let Some(result) = answer {
            return Ok(result);
        }
    }
}

/// Hands the job in; the result, if it came in time.
async fn post(client: &Client, job: &JobSpec, wait_ms: u64) -> anyhow::Result<Option<JobResult>> {
    let body = serde_json::to_vec(job).context("the job cannot be sent")?;
    let path = if wait_ms > 0 { format!("/v1/jobs?wait_ms={wait_ms}") } else { "/v1/jobs".to_owned() };
    let mut tries = 0;
    loop {
        let answer = client.send(Method::POST, &path, Some(body.clone()), &[]).await;
        let again = match &answer {
            Ok(answer) => answer.status() == StatusCode::SERVICE_UNAVAILABLE,
            Err(_) => tries > 0,
        };
        if again && tries < RETRIES {
            tries += 1;
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        }
        let answer = answer?;
        return match answer.status() {
            StatusCode::OK => {
                let bytes = answer.bytes().await?;
                Ok(Some(serde_json::from_slice(&bytes).context("the gateway's result is not understood")?))
            }
            status if status.is_success() => Ok(None),
            _ => Err(refusal(answer).await),
        };
    }
}

/// The result of a job that has ended.
async fn result_of(client: &Client, id: JobId) -> anyhow::Result<JobResult> {
    for _ in 0..RETRIES {
        if let Some(result) = client.job(id).await?.result {
            return Ok(result);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    anyhow::bail!("job {id} has ended, but its result is not there yet: try `hutch status {id}`")
}
