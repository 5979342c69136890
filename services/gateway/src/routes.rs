//! All routes, and the doors before them.

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::middleware::{from_fn_with_state, map_response};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post};

use crate::auth::{Scope, require};
use crate::problem::Problem;
use crate::{Gateway, blobs, events, exec, jobs, listing, metrics, openapi, outputs, page};

/// Every route of the gateway.
pub fn router(gateway: Arc<Gateway>) -> Router {
    let guarded = |scope: Scope, routes: MethodRouter<Arc<Gateway>>| {
        routes.route_layer(from_fn_with_state((Arc::clone(&gateway), scope), require))
    };
    let read = |routes| guarded(Scope::Read, routes);
    let submit = |routes| guarded(Scope::Submit, routes);
    Router::new()
        .route("/v1/jobs", submit(post(jobs::submit)).merge(read(get(listing::list))))
        .route("/v1/jobs/batch", submit(post(jobs::batch)))
        .route("/v1/jobs/{id}", read(get(jobs::get)).merge(submit(delete(jobs::cancel))))
        .route("/v1/jobs/{id}/events", read(get(events::events)))
        .route("/v1/jobs/{id}/exec", submit(get(exec::exec)))
        .route("/v1/jobs/{id}/stdout", read(get(outputs::stdout)))
        .route("/v1/jobs/{id}/stderr", read(get(outputs::stderr)))
        .route("/v1/jobs/{id}/outputs", read(get(outputs::list)))
        .route("/v1/jobs/{id}/outputs/{*path}", read(get(outputs::file)))
        .route("/v1/blobs", submit(post(blobs::upload)))
        .route("/v1/blobs/{digest}", read(get(blobs::download)))
        .route("/v1/queues", read(get(jobs::queues)))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics::show))
        .route("/openapi.json", get(openapi::show))
        .route("/", get(page::show))
        .fallback(unknown)
        .method_not_allowed_fallback(|| async { Problem::method_not_allowed() })
        // Every body is read with a cap of its own.
        .layer(DefaultBodyLimit::disable())
        .layer(map_response(careful))
        .layer(from_fn_with_state(Arc::clone(&gateway), metrics::count))
        .with_state(gateway)
}

async fn ready(State(gateway): State<Arc<Gateway>>) -> Response {
    match gateway.not_ready() {
        None => "ready\n".into_response(),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")).into_response(),
    }
}

async fn unknown(request: Request) -> Problem {
    let path: String = request.uri().path().chars().take(200).collect();
    Problem::not_found(format!("`{path}` is not served here; /openapi.json lists what is"))
}

/// No answer is taken for what it is not.
async fn careful(mut response: Response) -> Response {
    let nosniff = axum::http::HeaderValue::from_static("nosniff");
    response.headers_mut().insert(axum::http::header::X_CONTENT_TYPE_OPTIONS, nosniff);
    response
}
