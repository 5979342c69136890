//! Jobs in and out: submit one or many, look one up, call one off.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures::StreamExt;
use hutch_proto::{JobId, JobSpec, JobView, MAX_SPEC_BYTES, SpecError};
use hutch_queue::{CancelOutcome, Submitted};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::auth::MayRead;
use crate::extract::{IdInPath, Query, whole};
use crate::problem::Problem;
use crate::{Gateway, waiting};

/// The longest that a request waits for a result.
const MOST_WAIT_MS: u64 = 600_000;
/// The most jobs of one batch.
const BATCH_JOBS: usize = 1000;
/// The most bytes of one batch.
const BATCH_BYTES: usize = 32 << 20;
/// How many jobs of a batch are on their way to the queue at one time.
const BATCH_ABREAST: usize = 64;

/// `POST /v1/jobs[?wait_ms=]`.
///
/// Who waits for a job of one's own sees its result. An id that is known already may be anybody's, so its result
/// needs the scope `read`.
pub(crate) async fn submit(
    State(gateway): State<Arc<Gateway>>,
    Extension(MayRead(may_read)): Extension<MayRead>,
    uri: Uri,
    body: Body,
) -> Result<Response, Problem> {
    let query = Query::of(&uri, &["wait_ms"])?;
    let wait = query.field::<u64>("wait_ms", "a number of milliseconds")?.unwrap_or(0);
    if wait > MOST_WAIT_MS {
        return Err(Problem::bad_request(format!(
            "`wait_ms` may be {MOST_WAIT_MS}, not {wait}: ask again for what takes longer"
        )));
    }
    let deadline = Instant::now() + Duration::from_millis(wait);
    let json = whole(body, MAX_SPEC_BYTES, "; put large content in blobs").await?;
    let job = JobSpec::parse(&json)?;
    let submitted = gateway.ask(gateway.queue.submit(&job)).await?;
    let location = [(header::LOCATION, format!("/v1/jobs/{}", job.id))];
    if wait > 0 && submitted == Submitted::Known && !may_read {
        let withheld = "a job of this id was there before, and its result needs a token with read";
        let body = Json(json!({"id": job.id, "withheld": withheld}));
        return Ok((StatusCode::ACCEPTED, location, body).into_response());
    }
    if wait > 0
        && let Some(result) = waiting::result(&gateway, job.id, deadline).await?
    {
        return Ok(Json(result).into_response());
    }
    Ok((StatusCode::ACCEPTED, location, Json(json!({"id": job.id}))).into_response())
}

/// `POST /v1/jobs/batch`: an array of specs; the answer has as many entries, in the same order.
pub(crate) async fn batch(
    State(gateway): State<Arc<Gateway>>,
    uri: Uri,
    body: Body,
) -> Result<Response, Problem> {
    Query::of(&uri, &[])?;
    let json = whole(body, BATCH_BYTES, "; send several batches").await?;
    let json = str::from_utf8(&json).map_err(SpecError::from)?;
    let specs: Vec<&RawValue> = serde_json::from_str(json).map_err(|error| not_an_array(json, &error))?;
    if specs.len() > BATCH_JOBS {
        return Err(Problem::too_large(format!(
            "a batch may have {BATCH_JOBS} jobs, this one has {}",
            specs.len()
        )));
    }
    let jobs: Vec<Result<JobSpec, SpecError>> =
        specs.iter().map(|spec| JobSpec::parse(spec.get().as_bytes())).collect();
    let answers: Vec<Value> = futures::stream::iter(jobs)
        .map(|job| accept(&gateway, job))
        .buffered(BATCH_ABREAST)
        .map(|answer| match answer {
            Ok(id) => json!({"id": id}),
            Err(problem) => json!({"problem": problem.to_json()}),
        })
        .collect()
        .await;
    Ok((StatusCode::ACCEPTED, Json(answers)).into_response())
}

async fn accept(gateway: &Gateway, job: Result<JobSpec, SpecError>) -> Result<JobId, Problem> {
    let job = job?;
    gateway.ask(gateway.queue.submit(&job)).await?;
    Ok(job.id)
}

fn not_an_array(json: &str, error: &serde_json::Error) -> Problem {
    if serde_json::from_str::<serde::de::IgnoredAny>(json).is_ok() {
        let field = hutch_proto::Problem::new("", "an array of specs is expected");
        return Problem::spec_invalid(vec![field]);
    }
    SpecError::NotJson(error.to_string()).into()
}

/// `GET /v1/jobs/{id}`.
pub(crate) async fn get(
    State(gateway): State<Arc<Gateway>>,
    IdInPath(id): IdInPath,
) -> Result<Json<JobView>, Problem> {
    view(&gateway, id).await.map(Json)
}

/// What is known of a job, or that nothing is.
pub(crate) async fn view(gateway: &Gateway, id: JobId) -> Result<JobView, Problem> {
    gateway
        .ask(gateway.queue.get(id))
        .await?
        .ok_or_else(|| Problem::not_found(format!("no job {id} is known")))
}

/// `DELETE /v1/jobs/{id}`.
pub(crate) async fn cancel(
    State(gateway): State<Arc<Gateway>>,
    IdInPath(id): IdInPath,
) -> Result<Response, Problem> {
    let outcome = match gateway.ask(gateway.queue.cancel(id)).await? {
        CancelOutcome::Accepted => "accepted",
        CancelOutcome::AlreadyFinished => "already_finished",
        CancelOutcome::Unknown => return Err(Problem::not_found(format!("no job {id} is known"))),
    };
    Ok((StatusCode::ACCEPTED, Json(json!({"id": id, "outcome": outcome}))).into_response())
}

/// `GET /v1/queues`.
pub(crate) async fn queues(State(gateway): State<Arc<Gateway>>) -> Result<Json<Value>, Problem> {
    let depths = gateway.ask(gateway.queue.depths()).await?;
    let queues: Vec<Value> = depths
        .into_iter()
        .map(|depth| json!({"queue": depth.queue, "queued": depth.queued, "running": depth.running}))
        .collect();
    Ok(Json(json!({"queues": queues})))
}
