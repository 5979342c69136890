//! Opens what the settings name: the queue, and the store beside it.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use hutch_layers::{BlobStore, CappedTrees, Caps, Layers, Registries, Trees, open_trees};
use hutch_queue::Queue;
use hutch_queue::embedded::{EmbeddedOptions, EmbeddedQueue};
use hutch_queue::rabbitmq::{RabbitConfig, RabbitQueue};

use crate::privileges::Homes;
use crate::settings::Settings;
use crate::term::Waiting;

/// How long a queue may take to close.
const CLOSE: Duration = Duration::from_secs(10);

/// The data directory, made if it is missing, and open to its owner alone.
pub(crate) fn data_dir(settings: &Settings) -> anyhow::Result<PathBuf> {
    let directory = settings.data_dir.clone();
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory).with_context(|| {
        format!("the data directory {} cannot be made: choose another with --data DIR", directory.display())
    })?;
    Ok(directory)
}

/// A service's store for blobs.
pub(crate) fn store(settings: &Settings, homes: &Homes) -> anyhow::Result<BlobStore> {
    let url = match (&homes.store, &settings.store.url) {
        (Some(directory), _) => format!("file://{}", directory.display()),
        (None, Some(url)) => url.clone(),
        (None, None) => format!("file://{}", homes.service.display()),
    };
    BlobStore::open(&url).map_err(|error| anyhow!(error.full()))
}

/// The layers that are unpacked below the data directory.
pub(crate) fn trees(settings: &Settings) -> anyhow::Result<CappedTrees> {
    let worker = &settings.worker;
    let caps = Caps { bytes: worker.max_layer_bytes.0, entries: worker.max_layer_entries };
    let store = open_trees(&data_dir(settings)?.join("trees")).map_err(|error| anyhow!(error.full()))?;
    Ok(CappedTrees { store, caps })
}

/// The layers that jobs stack: recorded in the store, unpacked by these, and pulled from registries if they are given.
pub(crate) fn layers(blobs: &BlobStore, trees: Arc<dyn Trees>, registries: Option<Registries>) -> Layers {
    let layers = Layers::new(blobs.clone(), trees);
    match registries {
        Some(registries) => layers.with_registries(registries),
        None => layers,
    }
}

/// The registries that workers may pull from, if they may.
pub(crate) fn registries_for_jobs(settings: &Settings) -> anyhow::Result<Option<Registries>> {
    settings.worker.pull_images.then(|| registries(settings)).transpose()
}

/// How registries are spoken to: with the logins of the Docker config file that the settings name.
pub(crate) fn registries(settings: &Settings) -> anyhow::Result<Registries> {
    let worker = &settings.worker;
    let registries = Registries { insecure: worker.insecure_registries.clone(), ..Registries::default() };
    let Some(file) = &worker.registry_logins else { return Ok(registries) };
    let text = fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
    registries.with_docker_config(&text).map_err(|error| anyhow!("{}: {error}", file.display()))
}

/// Who opens a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum For {
    /// Takes jobs, and need not know of others.
    Worker,
    /// Answers for all jobs.
    Gateway,
}

/// The queue: the broker's, or the embedded one.
pub(crate) async fn open(
    settings: &Settings,
    homes: &Homes,
    blobs: &BlobStore,
    who: For,
) -> anyhow::Result<Arc<dyn Queue>> {
    match &settings.broker.url {
        Some(url) => rabbit(settings, homes, url, blobs, who).await,
        None => embedded(homes).await,
    }
}

async fn rabbit(
    settings: &Settings,
    homes: &Homes,
    url: &str,
    blobs: &BlobStore,
    who: For,
) -> anyhow::Result<Arc<dyn Queue>> {
    if settings.store.url.is_none() {
        tracing::warn!(
            store = blobs.url(),
            "broker.url is set and store.url is not: services on other machines find neither blobs nor results"
        );
    }
    let config = RabbitConfig {
        index: match who {
            For::Gateway => Some(homes.service.join("index.db")),
            For::Worker => None,
        },
        name: match who {
            For::Gateway => "hutch gateway".to_owned(),
            For::Worker => format!("hutch worker {}", settings.worker.name),
        },
        ..RabbitConfig::new(url, blobs.object_store())
    };
    let connecting = RabbitQueue::connect(config);
    tokio::pin!(connecting);
    let mut waiting = Waiting::new();
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    let queue = loop {
        tokio::select! {
            queue = &mut connecting => break queue?,
            _ = ticks.tick() => waiting.show("waiting for the broker"),
        }
    };
    Ok(Arc::new(queue))
}

/// The embedded queue, in a file of the service's own directory.
pub(crate) async fn embedded(homes: &Homes) -> anyhow::Result<Arc<dyn Queue>> {
    let file = homes.service.join("queue.db");
    let queue = tokio::task::spawn_blocking(move || EmbeddedQueue::open(&file, EmbeddedOptions::default()))
        .await
        .context("the embedded queue cannot be opened")??;
    Ok(Arc::new(queue))
}

/// Lets what is under way end, and closes; a queue that cannot be reached is not waited for long.
pub(crate) async fn close(queue: &dyn Queue) {
    if tokio::time::timeout(CLOSE, queue.close()).await.is_err() {
        tracing::warn!("the queue did not close in time");
    }
}
