//! What a job wrote: its streams as they are, the list of its files, and each file alone.
//!
//! All of it is a stranger's: it is sent so that no browser takes it for a page of this site.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use hutch_proto::{JobId, OutputKind, Outputs};

use crate::Gateway;
use crate::archive;
use crate::extract::IdInPath;
use crate::jobs::view;
use crate::problem::Problem;

/// `GET /v1/jobs/{id}/stdout`.
pub(crate) async fn stdout(
    State(gateway): State<Arc<Gateway>>,
    IdInPath(id): IdInPath,
) -> Result<Response, Problem> {
    stream(&gateway, id, true).await
}

/// `GET /v1/jobs/{id}/stderr`.
pub(crate) async fn stderr(
    State(gateway): State<Arc<Gateway>>,
    IdInPath(id): IdInPath,
) -> Result<Response, Problem> {
    stream(&gateway, id, false).await
}

/// A stream of a finished job, or what is kept of it while the job runs.
async fn stream(gateway: &Gateway, id: JobId, stdout: bool) -> Result<Response, Problem> {
    let known = view(gateway, id).await?;
    let state = known.state;
    let (data, truncated) = match known.result {
        Some(result) => {
            let output = if stdout { result.stdout } else { result.stderr };
            (output.data, output.truncated)
        }
        None => (gateway.hub.output(id, stdout), false),
    };
    let mut response = foreign(Body::from(data), "text/plain; charset=utf-8");
    let headers = response.headers_mut();
    headers.insert("hutch-state", HeaderValue::from_static(state.as_str()));
    headers.insert("hutch-truncated", HeaderValue::from_static(if truncated { "true" } else { "false" }));
    Ok(response)
}

/// `GET /v1/jobs/{id}/outputs`.
pub(crate) async fn list(
    State(gateway): State<Arc<Gateway>>,
    IdInPath(id): IdInPath,
) -> Result<Json<Outputs>, Problem> {
    outputs(&gateway, id).await.map(Json)
}

/// `GET /v1/jobs/{id}/outputs/{path}`.
pub(crate) async fn file(
    State(gateway): State<Arc<Gateway>>,
    IdInPath(id): IdInPath,
    Path(fields): Path<HashMap<String, String>>,
) -> Result<Response, Problem> {
    let path = format!("/{}", fields.get("path").map_or("", String::as_str).trim_start_matches('/'));
    let outputs = outputs(&gateway, id).await?;
    let Some(file) = outputs.files.iter().find(|file| file.path == path) else {
        return Err(Problem::not_found(format!("`{path}` is not among the outputs of job {id}")));
    };
    if file.kind != OutputKind::File {
        let kind = serde_json::to_value(file.kind).ok().and_then(|kind| kind.as_str().map(str::to_owned));
        return Err(Problem::conflict(format!(
            "`{path}` is no file: its kind is `{}`",
            kind.unwrap_or_default()
        )));
    }
    let Some(blob) = &outputs.archive else {
        return Err(Problem::not_found(format!("nothing was kept of `{path}`: there is no archive")));
    };
    let body = archive::file(&gateway.blobs, &blob.blob, file).await?;
    let mut response = foreign(body, "application/octet-stream");
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(file.bytes));
    headers.insert(header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment"));
    if let Some(tag) = file.sha256.as_ref().and_then(|hash| format!("\"{hash}\"").parse().ok()) {
        headers.insert(header::ETAG, tag);
    }
    Ok(response)
}

/// The outputs of a finished job.
async fn outputs(gateway: &Gateway, id: JobId) -> Result<Outputs, Problem> {
    let known = view(gateway, id).await?;
    let state = known.state;
    known.result.map(|result| result.outputs).ok_or_else(|| {
        Problem::conflict(format!("job {id} is {state}: its outputs are there once it is finished"))
    })
}

/// An answer with bytes that a stranger wrote.
pub(crate) fn foreign(body: Body, kind: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CONTENT_SECURITY_POLICY, "sandbox; default-src 'none'"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, body).into_response()
}
