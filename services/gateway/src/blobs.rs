//! Blobs in and out: `POST /v1/blobs`, `GET /v1/blobs/{digest}`.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::body::{Body, HttpBody};
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hutch_proto::{Digest, IdError};
use serde_json::json;

use crate::Gateway;
use crate::extract::{pieces, read_away};
use crate::outputs::foreign;
use crate::problem::Problem;

/// Takes a blob as it comes, up to the cap.
pub(crate) async fn upload(State(gateway): State<Arc<Gateway>>, body: Body) -> Result<Response, Problem> {
    let most = gateway.config.max_blob_bytes;
    let announced = body.size_hint().lower();
    if announced > most {
        read_away(pieces(body)).await;
        return Err(Problem::too_large(format!("a blob may have {most} bytes, this one has {announced}")));
    }
    let stored = gateway.blobs.put_stream(pieces(body), most).await?;
    let answer = json!({"blob": stored.digest, "bytes": stored.bytes});
    Ok((StatusCode::CREATED, Json(answer)).into_response())
}

/// Sends a blob as it is.
pub(crate) async fn download(
    State(gateway): State<Arc<Gateway>>,
    Path(fields): Path<HashMap<String, String>>,
) -> Result<Response, Problem> {
    let digest: Digest = fields
        .get("digest")
        .map_or("", String::as_str)
        .parse()
        .map_err(|error: IdError| Problem::not_found(error.to_string()))?;
    let (bytes, stream) = gateway.blobs.stream(&digest).await?;
    let mut response = foreign(Body::from_stream(stream), "application/octet-stream");
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(bytes));
    Ok(response)
}
