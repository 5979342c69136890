//! What all requests share.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hutch_layers::BlobStore;
use hutch_queue::{Queue, QueueError};
use prometheus::Registry;
use tokio_util::sync::CancellationToken;

use crate::auth::Tokens;
use crate::hub::Hub;
use crate::metrics::Metrics;

/// How long the queue may take to answer.
const QUEUE_ANSWER: Duration = Duration::from_secs(15);

/// How a [`Gateway`] treats every request.
#[derive(Clone)]
pub struct GatewayConfig {
    /// Who may do what; without, only this machine may, and then everything.
    pub tokens: Option<Tokens>,
    /// The most bytes of an uploaded blob.
    pub max_blob_bytes: u64,
    /// Metrics of others in this process, shown along with the gateway's own.
    pub registries: Vec<Registry>,
    /// Says why others in this process are not ready; none if they are.
    pub not_ready: Option<NotReady>,
}

/// Says why something is not ready; none if it is.
pub type NotReady = Arc<dyn Fn() -> Option<String> + Send + Sync>;

impl fmt::Debug for GatewayConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatewayConfig")
            .field("tokens", &self.tokens.is_some())
            .field("max_blob_bytes", &self.max_blob_bytes)
            .finish_non_exhaustive()
    }
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self { tokens: None, max_blob_bytes: 1 << 30, registries: Vec::new(), not_ready: None }
    }
}

/// Why there can be no gateway.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// Anybody could run jobs.
    #[error(
        "{0} can be reached from other machines, and without tokens anybody could run jobs: \
         set gateway.tokens_file (--tokens-file FILE), or listen on 127.0.0.1"
    )]
    Exposed(SocketAddr),
    /// The metrics cannot be registered.
    #[error("{0}")]
    Metrics(#[from] prometheus::Error),
    /// The connections cannot be served.
    #[error("the gateway ended")]
    Serve(#[from] std::io::Error),
}

/// What all requests share.
pub struct Gateway {
    pub(crate) queue: Arc<dyn Queue>,
    pub(crate) blobs: BlobStore,
    pub(crate) config: GatewayConfig,
    pub(crate) hub: Arc<Hub>,
    pub(crate) metrics: Metrics,
    /// Cancelled when the gateway is to end; long answers end with it.
    pub(crate) closing: CancellationToken,
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Gateway {
    /// A gateway to this queue. Call it on the runtime: it listens to events from now on.
    ///
    /// # Errors
    /// [`GatewayError::Metrics`].
    pub fn new(
        queue: Arc<dyn Queue>,
        blobs: BlobStore,
        config: GatewayConfig,
        closing: CancellationToken,
    ) -> Result<Self, GatewayError> {
        let hub = Arc::new(Hub::default());
        tokio::spawn(Arc::clone(&hub).listen(queue.subscribe(), closing.clone()));
        Ok(Self { queue, blobs, config, hub, metrics: Metrics::new()?, closing })
    }

    /// Whether it may listen at this address: beyond loopback only with tokens.
    ///
    /// # Errors
    /// [`GatewayError::Exposed`].
    pub fn check_exposure(listen: SocketAddr, tokens: Option<&Tokens>) -> Result<(), GatewayError> {
        if tokens.is_none() && !listen.ip().to_canonical().is_loopback() {
            return Err(GatewayError::Exposed(listen));
        }
        Ok(())
    }

    /// Why jobs cannot be taken now; none if they can.
    pub(crate) fn not_ready(&self) -> Option<String> {
        if self.closing.is_cancelled() {
            return Some("the gateway is ending".to_owned());
        }
        if !self.queue.connected() {
            return Some("the queue is not connected".to_owned());
        }
        self.config.not_ready.as_ref().and_then(|others| others())
    }

    /// The queue's answer, if it comes in time.
    pub(crate) async fn ask<T>(
        &self,
        question: impl Future<Output = Result<T, QueueError>>,
    ) -> Result<T, QueueError> {
        match tokio::time::timeout(QUEUE_ANSWER, question).await {
            Ok(answer) => answer,
            Err(_) => Err(QueueError::Unavailable(format!("no answer within {QUEUE_ANSWER:?}"))),
        }
    }
}
