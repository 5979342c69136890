//! `hutch up`: worker, gateway, page and metrics in one process, on the embedded queue.
//!
//! At the end the worker goes first, so that whoever waits for a result still gets it; then the
//! gateway; then the queue.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use hutch_gateway::{Gateway, GatewayConfig};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::cli::UpArgs;
use crate::ready::{Ready, RunsJobs};
use crate::services::{build_worker, flags, gateway_config, listen_for_jobs, slot_flags};
use crate::{demo, queue, settings, signals, term};

/// Everything made ready.
pub(crate) fn ready(args: &UpArgs, config: Option<&Path>) -> anyhow::Result<Ready> {
    let flags = slot_flags(flags(&args.serve), &args.slots).default_of("worker.allow_host_layer", true);
    let settings = settings::load(config, &flags)?.settings;
    if settings.broker.url.is_some() {
        term::note(
            "broker.url is set and not used: `hutch up` has a queue of its own; `hutch worker` and `hutch gateway` \
             use a broker",
        );
    }
    let gateway_config = gateway_config(&settings)?;
    let listener = listen_for_jobs(&settings, &gateway_config)?;
    Ready::separated(settings, listener, Some(gateway_config), RunsJobs::Yes)
}

/// Runs everything until it is told to end.
pub(crate) async fn up(args: UpArgs, ready: Ready) -> anyhow::Result<ExitCode> {
    let Ready { settings, homes, listener, engine, registries, gateway } = ready;
    let gateway_config = gateway.unwrap_or_default();
    let listener = TcpListener::from_std(listener)?;
    let address = listener.local_addr()?;
    let blobs = queue::store(&settings, &homes)?;
    let queue = queue::embedded(&homes).await?;
    let worker = build_worker(&settings, &homes, engine, registries, Arc::clone(&queue), blobs.clone())?;
    let closing = CancellationToken::new();
    let gateway_config = GatewayConfig {
        registries: vec![worker.registry().clone()],
        not_ready: Some(Arc::new({
            let worker = Arc::clone(&worker);
            move || worker.not_ready()
        })),
        ..gateway_config
    };
    let gateway = Arc::new(Gateway::new(Arc::clone(&queue), blobs, gateway_config, closing.clone())?);
    let drain = worker.drain();
    let signals = signals::drain_on_end(drain.clone());
    let routes = hutch_gateway::router(Arc::clone(&gateway));
    let mut serving = tokio::spawn(hutch_gateway::serve(listener, gateway, routes));
    term::note(match worker.prove().await {
        None => format!(
            "ready on http://{address} ({} slots; data in {})",
            settings.worker.slots,
            settings.data_dir.display()
        ),
        Some(why) => format!("on http://{address} no job is taken: {why}"),
    });
    let mut working = tokio::spawn(async move { worker.run().await });
    if args.demo {
        tokio::select! {
            shown = demo::show(queue.as_ref(), address) => shown?,
            () = drain.stop.cancelled() => {}
        }
    }
    let (worked, served) = tokio::select! {
        worked = &mut working => {
            closing.cancel();
            (worked, serving.await)
        }
        served = &mut serving => {
            drain.stop.cancel();
            (working.await, served)
        }
    };
    signals.abort();
    queue::close(queue.as_ref()).await;
    worked.context("the worker ended")??;
    served.context("the gateway ended")??;
    Ok(ExitCode::SUCCESS)
}
