//! A gateway with everything that it needs, in a directory of its own.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, StatusCode};
use hutch_gateway::{Gateway, GatewayConfig, Tokens, router};
use hutch_layers::{BlobStore, Hasher};
use hutch_proto::{Captured, JobResult, OutputFile, OutputKind, Reason, Status, StepResult, Timestamp};
use hutch_queue::embedded::{EmbeddedOptions, EmbeddedQueue};
use hutch_queue::{Consumer, ConsumerConfig, Lease, Queue};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// A gateway and its queue.
pub(crate) struct House {
    pub(crate) queue: Arc<dyn Queue>,
    pub(crate) blobs: BlobStore,
    consumer: Arc<Mutex<Box<dyn Consumer>>>,
    router: Router,
    config: GatewayConfig,
    directory: Arc<tempfile::TempDir>,
}

/// What came back.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("text"))
    }
}

impl House {
    pub(crate) async fn new() -> Self {
        Self::with(GatewayConfig { max_blob_bytes: 1000, ..GatewayConfig::default() }).await
    }

    pub(crate) async fn with_tokens() -> Self {
        let line = |scope: &str, token: &str| {
            format!("{scope} {} {scope}\n", Hasher::digest_of(token.as_bytes()).hex())
        };
        let text = line("read", "reader") + &line("submit", "submitter") + &line("admin", "admin");
        let tokens = Some(Tokens::parse(&text).expect("tokens"));
        Self::with(GatewayConfig { tokens, ..GatewayConfig::default() }).await
    }

    async fn with(config: GatewayConfig) -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let file = directory.path().join("queue.db");
        let queue: Arc<dyn Queue> =
            Arc::new(EmbeddedQueue::open(&file, EmbeddedOptions::default()).expect("queue"));
        let consumer = ConsumerConfig {
            worker: "w".to_owned(),
            queues: vec!["default".to_owned()],
            lease: std::time::Duration::from_secs(30),
        };
        let consumer = Arc::new(Mutex::new(queue.consumer(&consumer).await.expect("consumer")));
        let blobs = BlobStore::in_directory(directory.path()).expect("store");
        let router = gateway(&queue, &blobs, &config);
        Self { queue, blobs, consumer, router, config, directory: Arc::new(directory) }
    }

    /// Another gateway to the same queue, which has heard nothing.
    pub(crate) fn another_gateway(&self) -> Self {
        Self {
            queue: Arc::clone(&self.queue),
            blobs: self.blobs.clone(),
            consumer: Arc::clone(&self.consumer),
            router: gateway(&self.queue, &self.blobs, &self.config),
            config: self.config.clone(),
            directory: Arc::clone(&self.directory),
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, Vec::new(), &[]).await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Answer {
        self.send(Method::POST, path, body.into(), &[]).await
    }

    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        headers: &[(&str, &str)],
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", "127.0.0.1:7070");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::from(body)).expect("request");
        let answer = self.router.clone().oneshot(request).await.expect("answer");
        let (head, body) = answer.into_parts();
        let body = axum::body::to_bytes(body, usize::MAX).await.expect("body").to_vec();
        Answer { status: head.status, headers: head.headers, body }
    }

    /// Serves on a port of its own, until the test ends; where.
    pub(crate) async fn serve(&self) -> std::net::SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("port");
        let address = listener.local_addr().expect("address");
        tokio::spawn(axum::serve(listener, self.router.clone()).into_future());
        address
    }

    /// Takes the next job, as a worker does.
    pub(crate) async fn take(&self) -> Lease {
        self.consumer.lock().await.take().await.expect("lease")
    }

    /// Finishes a job that was taken.
    pub(crate) async fn finish(&self, lease: Lease, change: impl FnOnce(&mut JobResult)) {
        let result = result(&lease, change);
        self.consumer.lock().await.finish(lease, result).await.expect("finished");
    }
}

fn gateway(queue: &Arc<dyn Queue>, blobs: &BlobStore, config: &GatewayConfig) -> Router {
    let gateway = Gateway::new(Arc::clone(queue), blobs.clone(), config.clone(), CancellationToken::new())
        .expect("gateway");
    router(Arc::new(gateway))
}

/// A result of a job that went well.
fn result(lease: &Lease, change: impl FnOnce(&mut JobResult)) -> JobResult {
    let mut result = JobResult::without_run(
        lease.job.id,
        lease.job.labels.clone(),
        lease.submitted_at,
        Reason::Requested,
        "",
    );
    (result.status, result.reason, result.attempt) = (Status::Succeeded, None, lease.attempt);
    result.timeline.started_at = Some(Timestamp::now());
    let stdout = Captured { data: b"from a step".to_vec(), bytes: 11, truncated: false };
    result.steps.push(StepResult {
        name: "main".to_owned(),
        status: result.status,
        reason: None,
        message: String::new(),
        limit: None,
        exit_code: Some(0),
        signal: None,
        refused_syscalls: Vec::new(),
        stdout,
        stderr: Captured::default(),
        usage: result.usage,
        timeline: result.timeline.clone(),
    });
    change(&mut result);
    result
}

/// An archive with one file.
pub(crate) fn tar_zst(path: &str, data: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, path, data).expect("append");
    zstd::encode_all(&builder.into_inner().expect("tar")[..], 0).expect("zstd")
}

/// What a result says of a file.
pub(crate) fn output_file(path: &str, data: &[u8]) -> OutputFile {
    OutputFile {
        path: path.to_owned(),
        kind: OutputKind::File,
        mode: None,
        bytes: data.len() as u64,
        sha256: Some(Hasher::digest_of(data).hex().to_owned()),
        target: None,
    }
}
