//! `hutch submit`: hands a job to a gateway.
//!
//! The job gets its id here, so that a request may be repeated: the same id is the same job.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use hutch_proto::{JobId, JobResult, JobSpec};
use reqwest::{Method, StatusCode};
use serde::Deserialize;

use super::client::{Client, refusal};
use super::follow::follow;
use crate::cli::SubmitArgs;
use crate::term::Waiting;
use crate::{exit, order, term, verdict};

/// How long one request waits for the result.
const WAIT_MS: u64 = 20_000;
/// How long a gateway that has no queue, or went away, is tried again: a broker that restarts is back by then.
const PATIENCE: Duration = Duration::from_secs(40);
/// How long to wait between tries.
const PAUSE: Duration = Duration::from_secs(1);
/// How often a result that was told of is looked for.
const LOOKS: u32 = 20;

/// Hands the job in, and waits for it if that is wanted.
pub(crate) async fn submit(args: SubmitArgs) -> anyhow::Result<ExitCode> {
    let job = order::read_spec(&args.spec)?;
    let client = Client::new(&args.client)?;
    let mut handing = Handing::new(&client, &job)?;
    if args.wait {
        let result = handing.wait().await?;
        term::line(serde_json::to_string_pretty(&result).context("the result cannot be shown")?);
        let failed = !verdict::is_success(&result);
        return Ok(if failed { ExitCode::from(exit::FAILURE) } else { ExitCode::SUCCESS });
    }
    handing.post("/v1/jobs").await?;
    if !args.follow {
        term::line(job.id);
        return Ok(ExitCode::SUCCESS);
    }
    if !follow(&client, job.id).await? {
        return Ok(ExitCode::from(exit::FAILURE));
    }
    let result = result_of(&client, job.id).await?;
    for cut in verdict::cuts(&result) {
        term::note(format!("{cut}; limits.stdout_bytes and limits.stderr_bytes of the spec keep more"));
    }
    if !verdict::is_success(&result) {
        term::note(verdict::sentence(&result));
    }
    Ok(exit::of(&result))
}

/// What a gateway says of a job that it took.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Accepted {
    /// Why it will not show the result, if it will not.
    withheld: Option<String>,
}

/// One job on its way to a gateway.
struct Handing<'a> {
    client: &'a Client,
    id: JobId,
    body: Vec<u8>,
    /// Whether the gateway has answered once; one that never did is likely not there at all.
    answered: bool,
}

impl<'a> Handing<'a> {
    fn new(client: &'a Client, job: &JobSpec) -> anyhow::Result<Self> {
        let body = serde_json::to_vec(job).context("the job cannot be sent")?;
        Ok(Self { client, id: job.id, body, answered: false })
    }

    /// Waits for the result, request after request.
    async fn wait(&mut self) -> anyhow::Result<JobResult> {
        let id = self.id;
        let mut waiting = Waiting::new();
        let mut ticks = tokio::time::interval(PAUSE);
        let path = format!("/v1/jobs?wait_ms={WAIT_MS}");
        loop {
            let asked = self.post(&path);
            tokio::pin!(asked);
            let answer = loop {
                tokio::select! {
                    answer = &mut asked => break answer?,
                    _ = ticks.tick() => waiting.show(format!("waiting for job {id}")),
                }
            };
            if let Some(result) = answer {
                return Ok(result);
            }
        }
    }

    /// Hands the job in; the result, if the answer has it.
    async fn post(&mut self, path: &str) -> anyhow::Result<Option<JobResult>> {
        let begun = Instant::now();
        loop {
            let answer = self.client.send(Method::POST, path, Some(self.body.clone()), &[]).await;
            self.answered |= answer.is_ok();
            let again = match &answer {
                Ok(answer) => answer.status() == StatusCode::SERVICE_UNAVAILABLE,
                Err(_) => self.answered,
            };
            if again && begun.elapsed() < PATIENCE {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            let answer = answer?;
            return match answer.status() {
                StatusCode::OK => {
                    let bytes = answer.bytes().await?;
                    serde_json::from_slice(&bytes).map(Some).context("the gateway's result is not understood")
                }
                status if status.is_success() => {
                    let answer: Accepted = serde_json::from_slice(&answer.bytes().await?).unwrap_or_default();
                    match answer.withheld {
                        // Asking again would be answered so for ever.
                        Some(why) => bail!("job {} was handed in; {}", self.id, term::safe_line(&why)),
                        None => Ok(None),
                    }
                }
                _ => Err(refusal(answer).await),
            };
        }
    }
}

/// The result of a job that has ended.
async fn result_of(client: &Client, id: JobId) -> anyhow::Result<JobResult> {
    for _ in 0..LOOKS {
        if let Some(result) = client.job(id).await?.result {
            return Ok(result);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    bail!("job {id} has ended, but its result is not there yet: try `hutch status {id}`")
}
