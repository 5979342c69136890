//! What a gateway counts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::Gateway;
use crate::problem::Problem;

/// How long a scrape waits for the queue's depths.
const DEPTHS: Duration = Duration::from_secs(2);
/// Stands for every path that is not a route.
const UNMATCHED: &str = "unmatched";

const BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// The counters of one gateway.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    seconds: HistogramVec,
    depth: IntGaugeVec,
}

impl Metrics {
    pub(crate) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let metrics = Self {
            requests: IntCounterVec::new(
                Opts::new("hutch_http_requests_total", "Requests that were answered."),
                &["method", "route", "status"],
            )?,
            seconds: HistogramVec::new(
                HistogramOpts::new(
                    "hutch_http_request_seconds",
                    "Time to the head of the answer; a wait for a result counts.",
                )
                .buckets(BUCKETS.to_vec()),
                &["method", "route"],
            )?,
            depth: IntGaugeVec::new(
                Opts::new("hutch_queue_depth", "Jobs that wait and run, by queue."),
                &["queue", "state"],
            )?,
            registry,
        };
        metrics.registry.register(Box::new(metrics.requests.clone()))?;
        metrics.registry.register(Box::new(metrics.seconds.clone()))?;
        metrics.registry.register(Box::new(metrics.depth.clone()))?;
        Ok(metrics)
    }
}

/// Counts a request under the route that it matched, never under its own path.
pub(crate) async fn count(State(gateway): State<Arc<Gateway>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let method = known(request.method());
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| UNMATCHED.to_owned(), |path| path.as_str().to_owned());
    let response = next.run(request).await;
    let metrics = &gateway.metrics;
    metrics.requests.with_label_values(&[method, &route, response.status().as_str()]).inc();
    metrics.seconds.with_label_values(&[method, &route]).observe(begun.elapsed().as_secs_f64());
    response
}

/// Methods are made up by clients; only those that are known are labels.
fn known(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

/// `GET /metrics`.
pub(crate) async fn show(State(gateway): State<Arc<Gateway>>) -> Result<Response, Problem> {
    refresh_depths(&gateway).await;
    let mut families = gateway.metrics.registry.gather();
    for registry in &gateway.config.registries {
        families.extend(registry.gather());
    }
    let text = TextEncoder::new()
        .encode_to_string(&families)
        .map_err(|error| Problem::internal(format!("the metrics cannot be shown: {error}")))?;
    Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response())
}

async fn refresh_depths(gateway: &Gateway) {
    let depth = &gateway.metrics.depth;
    depth.reset();
    match tokio::time::timeout(DEPTHS, gateway.queue.depths()).await {
        Ok(Ok(depths)) => {
            for queue in depths {
                for (state, jobs) in [("queued", queue.queued), ("running", queue.running)] {
                    let jobs = i64::try_from(jobs).unwrap_or(i64::MAX);
                    depth.with_label_values(&[queue.queue.as_str(), state]).set(jobs);
                }
            }
        }
        Ok(Err(error)) => tracing::debug!(%error, "the queue does not tell its depths"),
        Err(_) => tracing::debug!("the queue does not tell its depths in time"),
    }
}
