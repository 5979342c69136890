//! `hutch worker` and `hutch gateway`: each service on its own.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use hutch_gateway::{Gateway, GatewayConfig, Tokens};
use hutch_layers::BlobStore;
use hutch_queue::Queue;
use hutch_sandbox::{Engine, Launcher};
use hutch_worker::{Worker, WorkerConfig};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::cli::{GatewayArgs, QueueArgs, ServeArgs, SlotArgs, WorkerArgs};
use crate::queue::For;
use crate::settings::{self, Flags, Settings};
use crate::{engine, queue, signals, term};

/// Where a gateway listens when nothing is set.
pub(crate) const GATEWAY_ADDRESS: &str = "127.0.0.1:7070";
/// Where a worker alone listens when nothing is set.
const WORKER_ADDRESS: &str = "127.0.0.1:7071";

/// The flags that all services have.
pub(crate) fn flags(serve: &ServeArgs) -> Flags {
    let data_dir = serve.data_dir.as_ref().map(|path| path.display().to_string());
    Flags::default().set("listen", "--listen", serve.listen.clone()).set("data_dir", "--data", data_dir)
}

fn queue_flags(flags: Flags, queue: &QueueArgs) -> Flags {
    flags.set("broker.url", "--broker", queue.broker.clone()).set("store.url", "--store", queue.store.clone())
}

/// The flags of what has slots.
pub(crate) fn slot_flags(flags: Flags, slots: &SlotArgs) -> Flags {
    flags.set("worker.slots", "--slots", slots.slots).set_list("worker.queues", "--queue", &slots.queues)
}

/// `hutch worker`.
pub(crate) async fn worker(
    args: WorkerArgs,
    config: Option<&Path>,
    launcher: Option<Launcher>,
) -> anyhow::Result<ExitCode> {
    let flags = slot_flags(queue_flags(flags(&args.serve), &args.queue), &args.slots);
    let settings = settings::load(config, &flags)?.settings;
    let listener = listen(&settings, WORKER_ADDRESS).await?;
    let blobs = queue::store(&settings)?;
    let queue = queue::open(&settings, &blobs, For::Worker).await?;
    let worker = build_worker(&settings, launcher, Arc::clone(&queue), blobs)?;
    let drain = worker.drain();
    let signals = signals::drain_on_end(drain.clone());
    term::note(format!(
        "worker {} is ready: {} slots on {}; http://{}/metrics",
        settings.worker.name,
        settings.worker.slots,
        settings.worker.queues.join(", "),
        listener.local_addr()?
    ));
    let routes = hutch_worker::router(Arc::clone(&worker));
    let server = tokio::spawn(async move { axum::serve(listener, routes).await });
    let ended = worker.run().await;
    server.abort();
    signals.abort();
    queue::close(queue.as_ref()).await;
    ended.map(|()| ExitCode::SUCCESS).map_err(anyhow::Error::new)
}

/// `hutch gateway`.
pub(crate) async fn gateway(args: GatewayArgs, config: Option<&Path>) -> anyhow::Result<ExitCode> {
    let tokens = args.tokens_file.as_ref().map(|path| path.display().to_string());
    let flags =
        queue_flags(flags(&args.serve), &args.queue).set("gateway.tokens_file", "--tokens-file", tokens);
    let settings = settings::load(config, &flags)?.settings;
    let gateway_config = gateway_config(&settings)?;
    let listener = listen_for_jobs(&settings, &gateway_config).await?;
    if settings.broker.url.is_none() {
        // One process owns the file of the embedded queue: no worker can share it.
        term::note(
            "warning: jobs are taken and none is run: without a broker no worker can reach this gateway's queue; \
             start `hutch up` for both in one process, or give gateway and workers the same --broker URL",
        );
    }
    let blobs = queue::store(&settings)?;
    let queue = queue::open(&settings, &blobs, For::Gateway).await?;
    let closing = CancellationToken::new();
    let signals = signals::cancel_on_end(closing.clone());
    let gateway = Arc::new(Gateway::new(Arc::clone(&queue), blobs, gateway_config, closing)?);
    term::note(format!("the gateway is ready: http://{}", listener.local_addr()?));
    let routes = hutch_gateway::router(Arc::clone(&gateway));
    let served = hutch_gateway::serve(listener, gateway, routes).await;
    signals.abort();
    queue::close(queue.as_ref()).await;
    served.map(|()| ExitCode::SUCCESS).map_err(anyhow::Error::new)
}

/// A worker with an engine of its own.
pub(crate) fn build_worker(
    settings: &Settings,
    launcher: Option<Launcher>,
    queue: Arc<dyn Queue>,
    blobs: BlobStore,
) -> anyhow::Result<Arc<Worker>> {
    let launcher = launcher.context("the launcher was not started")?;
    let layers = queue::layers(settings, &blobs)?;
    let engine = Engine::new(launcher, engine::shared(settings, &layers)?)?;
    let own = &settings.worker;
    let config = WorkerConfig {
        queues: own.queues.clone(),
        slots: own.slots,
        drain_grace: Duration::from_millis(own.drain_grace.0),
        lease: Duration::from_millis(own.lease.0),
        metric_labels: own.metric_labels.clone(),
        max_input_bytes: own.max_input_bytes.0,
        store_patience: Duration::from_millis(own.store_patience.0),
        ..WorkerConfig::new(own.name.clone(), queue::data_dir(settings)?)
    };
    Ok(Arc::new(Worker::new(engine, queue, blobs, layers, config)?))
}

/// The config of a gateway, its tokens read.
pub(crate) fn gateway_config(settings: &Settings) -> anyhow::Result<GatewayConfig> {
    let tokens = settings.gateway.tokens_file.as_deref().map(Tokens::read).transpose()?;
    Ok(GatewayConfig {
        tokens,
        max_blob_bytes: settings.gateway.max_blob_bytes.0,
        ..GatewayConfig::default()
    })
}

/// A listener for what the settings say.
async fn listen(settings: &Settings, default: &str) -> anyhow::Result<TcpListener> {
    let address = settings.listen.as_deref().unwrap_or(default);
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            anyhow!("{address} is taken by another program: choose another address with --listen ADDR")
        }
        std::io::ErrorKind::InvalidInput => {
            anyhow!("`{address}` is no address: one such as {default} is expected")
        }
        _ => anyhow::Error::new(error).context(format!("cannot listen on {address}")),
    })
}

/// A listener through which jobs may come: it is refused where anybody could reach it.
pub(crate) async fn listen_for_jobs(
    settings: &Settings,
    config: &GatewayConfig,
) -> anyhow::Result<TcpListener> {
    let listener = listen(settings, GATEWAY_ADDRESS).await?;
    let address: SocketAddr = listener.local_addr()?;
    Gateway::check_exposure(address, config.tokens.as_ref())?;
    Ok(listener)
}
