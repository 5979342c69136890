//! `hutch worker` and `hutch gateway`: each service on its own.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use hutch_gateway::{Gateway, GatewayConfig, Tokens};
use hutch_layers::{BlobStore, Registries};
use hutch_queue::Queue;
use hutch_worker::{Worker, WorkerConfig};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::cli::{GatewayArgs, QueueArgs, ServeArgs, SlotArgs, WorkerArgs};
use crate::privileges::Homes;
use crate::queue::For;
use crate::ready::{EngineSeat, Ready, RunsJobs};
use crate::settings::{self, Flags, Settings};
use crate::{queue, signals, term};

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

/// A worker made ready.
pub(crate) fn worker_ready(args: &WorkerArgs, config: Option<&Path>) -> anyhow::Result<Ready> {
    let flags = slot_flags(queue_flags(flags(&args.serve), &args.queue), &args.slots);
    let settings = settings::load(config, &flags)?.settings;
    let listener = listen(&settings, WORKER_ADDRESS)?;
    Ready::separated(settings, listener, None, RunsJobs::Yes)
}

/// `hutch worker`.
pub(crate) async fn worker(ready: Ready) -> anyhow::Result<ExitCode> {
    let Ready { settings, homes, listener, engine, registries, .. } = ready;
    let listener = TcpListener::from_std(listener)?;
    let blobs = queue::store(&settings, &homes)?;
    let queue = queue::open(&settings, &homes, &blobs, For::Worker).await?;
    let worker = build_worker(&settings, &homes, engine, registries, Arc::clone(&queue), blobs)?;
    let drain = worker.drain();
    let signals = signals::drain_on_end(drain.clone());
    let address = listener.local_addr()?;
    let routes = hutch_worker::router(Arc::clone(&worker));
    let server = tokio::spawn(async move { axum::serve(listener, routes).await });
    let name = &settings.worker.name;
    term::note(match worker.prove().await {
        None => format!(
            "worker {name} is ready: {} slots on {}; http://{address}/metrics",
            settings.worker.slots,
            settings.worker.queues.join(", ")
        ),
        Some(why) => format!("worker {name} is not ready: {why}; http://{address}/metrics"),
    });
    let ended = worker.run().await;
    server.abort();
    signals.abort();
    queue::close(queue.as_ref()).await;
    ended.map(|()| ExitCode::SUCCESS).map_err(anyhow::Error::new)
}

/// A gateway made ready.
pub(crate) fn gateway_ready(args: &GatewayArgs, config: Option<&Path>) -> anyhow::Result<Ready> {
    let tokens = args.tokens_file.as_ref().map(|path| path.display().to_string());
    let flags =
        queue_flags(flags(&args.serve), &args.queue).set("gateway.tokens_file", "--tokens-file", tokens);
    let settings = settings::load(config, &flags)?.settings;
    let gateway_config = gateway_config(&settings)?;
    let listener = listen_for_jobs(&settings, &gateway_config)?;
    Ready::separated(settings, listener, Some(gateway_config), RunsJobs::No)
}

/// `hutch gateway`.
pub(crate) async fn gateway(ready: Ready) -> anyhow::Result<ExitCode> {
    let Ready { settings, homes, listener, gateway, .. } = ready;
    let gateway_config = gateway.unwrap_or_default();
    let listener = TcpListener::from_std(listener)?;
    if settings.broker.url.is_none() {
        // One process owns the file of the embedded queue: no worker can share it.
        term::note(
            "warning: jobs are taken and none is run: without a broker no worker can reach this gateway's queue; \
             start `hutch up` for both in one process, or give gateway and workers the same --broker URL",
        );
    }
    let blobs = queue::store(&settings, &homes)?;
    let queue = queue::open(&settings, &homes, &blobs, For::Gateway).await?;
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

/// A worker with its engine, wherever that is.
pub(crate) fn build_worker(
    settings: &Settings,
    homes: &Homes,
    engine: Option<EngineSeat>,
    registries: Option<Registries>,
    queue: Arc<dyn Queue>,
    blobs: BlobStore,
) -> anyhow::Result<Arc<Worker>> {
    let engine = engine.context("no engine was started")?.start()?;
    let trees = engine.trees().context("the engine has no layers")?;
    let layers = queue::layers(&blobs, trees, registries);
    let own = &settings.worker;
    let config = WorkerConfig {
        queues: own.queues.clone(),
        slots: own.slots,
        drain_grace: Duration::from_millis(own.drain_grace.0),
        lease: Duration::from_millis(own.lease.0),
        prove: own.prove,
        metric_labels: own.metric_labels.clone(),
        max_input_bytes: own.max_input_bytes.0,
        store_patience: Duration::from_millis(own.store_patience.0),
        ..WorkerConfig::new(own.name.clone(), homes.service.clone())
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

/// A listener for what the settings say; opened while the port may be one of the first 1024.
fn listen(settings: &Settings, default: &str) -> anyhow::Result<std::net::TcpListener> {
    let address = settings.listen.as_deref().unwrap_or(default);
    let listener = std::net::TcpListener::bind(address).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            anyhow!("{address} is taken by another program: choose another address with --listen ADDR")
        }
        std::io::ErrorKind::InvalidInput => {
            anyhow!("`{address}` is no address: one such as {default} is expected")
        }
        _ => anyhow::Error::new(error).context(format!("cannot listen on {address}")),
    })?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A listener through which jobs may come: it is refused where anybody could reach it.
pub(crate) fn listen_for_jobs(
    settings: &Settings,
    config: &GatewayConfig,
) -> anyhow::Result<std::net::TcpListener> {
    let listener = listen(settings, GATEWAY_ADDRESS)?;
    let address: SocketAddr = listener.local_addr()?;
    Gateway::check_exposure(address, config.tokens.as_ref())?;
    Ok(listener)
}
