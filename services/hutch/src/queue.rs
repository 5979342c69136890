//! Opens what the settings name: the queue, and the store beside it.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use hutch_layers::BlobStore;
use hutch_queue::Queue;
use hutch_queue::embedded::{EmbeddedOptions, EmbeddedQueue};

use crate::settings::{Settings, absolute};

/// The data directory, made if it is missing, and open to its owner alone.
pub(crate) fn data_dir(settings: &Settings) -> anyhow::Result<PathBuf> {
    let directory = absolute(&settings.data_dir)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory).with_context(|| {
        format!("the data directory {} cannot be made: choose another with --data DIR", directory.display())
    })?;
    Ok(directory)
}

/// The store for blobs.
pub(crate) fn store(settings: &Settings) -> anyhow::Result<BlobStore> {
    data_dir(settings)?;
    BlobStore::open(&settings.store_url()).map_err(|error| anyhow!(error.full()))
}

/// The queue: the broker's, or the embedded one.
pub(crate) async fn open(settings: &Settings, _blobs: &BlobStore) -> anyhow::Result<Arc<dyn Queue>> {
    match &settings.broker.url {
        Some(url) => bail!("broker.url: there is no queue yet for `{url}`"),
        None => embedded(settings).await,
    }
}

/// The embedded queue, in a file of the data directory.
pub(crate) async fn embedded(settings: &Settings) -> anyhow::Result<Arc<dyn Queue>> {
    let file = data_dir(settings)?.join("queue.db");
    let queue = tokio::task::spawn_blocking(move || EmbeddedQueue::open(&file, EmbeddedOptions::default()))
        .await
        .context("the embedded queue cannot be opened")??;
    Ok(Arc::new(queue))
}
