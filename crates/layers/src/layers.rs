//! Layers for jobs: found here, or fetched; images and earlier jobs expanded to them.
//!
//! In order, for a job: each reference becomes the diff ids that it stands for ([`Layers::resolve`]); what of them is
//! not in this host's [`TreeStore`] is fetched from the blob store and unpacked, once however many jobs want it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt as _;
use hutch_proto::{Digest, JobId, JobSpec, LayerRef};
use hutch_trees::{CappedTrees, Caps, LayerFacts, Owners, TreeStore, Trees, UnpackError};
use tokio::sync::Mutex as AsyncMutex;

use crate::catalog::{Catalog, ImageRecord, LayerRecord};
use crate::image::ImageName;
use crate::registry::Registries;
use crate::{BlobStore, StoreError};

/// The most layers of a job, images expanded.
pub const MOST_LAYERS: usize = 64;

/// Why a job's layers could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The job names what is not there, or what cannot be used; another try ends the same.
    #[error("{path}: {message}")]
    Wrong {
        /// The field that names it.
        path: String,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// The store, a registry or this host failed; another try may do better.
    #[error("{path}: {}", .source.full())]
    Store {
        /// The field that names it.
        path: String,
        /// What went wrong.
        source: StoreError,
    },
}

/// How often layers were here already, and how often they had to be fetched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Here already.
    pub hits: u64,
    /// Fetched and unpacked.
    pub misses: u64,
}

/// The layers that jobs may use; cheap to clone.
#[derive(Debug, Clone)]
pub struct Layers {
    catalog: Catalog,
    trees: Arc<dyn Trees>,
    registries: Option<Arc<Registries>>,
    underway: Arc<Mutex<HashMap<String, Arc<AsyncMutex<()>>>>>,
    counts: Arc<Mutex<CacheCounts>>,
}

impl Layers {
    /// Layers whose blobs are in this store, unpacked by these.
    #[must_use]
    pub fn new(blobs: BlobStore, trees: Arc<dyn Trees>) -> Self {
        Self {
            catalog: Catalog::new(blobs),
            trees,
            registries: None,
            underway: Arc::default(),
            counts: Arc::default(),
        }
    }

    /// Layers whose blobs are in this store, unpacked by this process below this directory.
    ///
    /// # Errors
    /// [`StoreError::Image`] if the directory cannot be used.
    pub fn open(blobs: BlobStore, dir: &Path, caps: Caps) -> Result<Self, StoreError> {
        Ok(Self::new(blobs, Arc::new(CappedTrees { store: open_trees(dir)?, caps })))
    }

    /// The same, and images that are not here are fetched from their registries.
    #[must_use]
    pub fn with_registries(self, registries: Registries) -> Self {
        Self { registries: Some(Arc::new(registries)), ..self }
    }

    /// The records.
    #[must_use]
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// What is unpacked here.
    #[must_use]
    pub fn trees(&self) -> &dyn Trees {
        self.trees.as_ref()
    }

    /// How often layers were here already.
    #[must_use]
    pub fn counts(&self) -> CacheCounts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts stored layers in place of images and earlier jobs, takes what the job leaves out from the image's config,
    /// and has every layer here.
    ///
    /// # Errors
    /// [`LayerError`], with the field that names the layer.
    pub async fn resolve(&self, job: &mut JobSpec) -> Result<(), LayerError> {
        let mut expanded = Vec::new();
        for (index, layer) in std::mem::take(&mut job.layers).into_iter().enumerate() {
            let path = format!("layers[{index}]");
            match layer {
                LayerRef::Image(name) => {
                    let image = self.image(&name, &path).await?;
                    image.config.fill(job);
                    expanded.extend(
                        image.layers.into_iter().map(|layer| (path.clone(), LayerRef::Stored(layer))),
                    );
                }
                LayerRef::Job(id) => {
                    expanded.push((path.clone(), LayerRef::Stored(self.committed(id, &path).await?)))
                }
                other => expanded.push((path, other)),
            }
        }
        if expanded.len() > MOST_LAYERS {
            let message = format!("{} layers, images expanded; a job may have {MOST_LAYERS}", expanded.len());
            return Err(LayerError::Wrong { path: "layers".to_owned(), message });
        }
        for (path, layer) in &expanded {
            if let LayerRef::Stored(digest) = layer {
                self.ensure(digest, path).await?;
            }
        }
        job.layers = expanded.into_iter().map(|(_, layer)| layer).collect();
        Ok(())
    }

    async fn image(&self, name: &str, path: &str) -> Result<ImageRecord, LayerError> {
        let wrong = |message| LayerError::Wrong { path: path.to_owned(), message };
        let known: ImageName = name.parse().map_err(wrong)?;
        let failed = |source: StoreError| failed(path, source);
        if let Some(image) = self.catalog.image(&known).await.map_err(failed)? {
            return Ok(image);
        }
        let Some(registries) = &self.registries else {
            return Err(wrong(format!(
                "there is no image {known} here: `hutch layer pull {known}` or `hutch layer import FILE --name {known}` \
                 brings it"
            )));
        };
        let gate = self.gate(&known.to_string());
        let turn = gate.lock().await;
        let pulled = match self.catalog.image(&known).await {
            Ok(None) => self.pull(&known, registries, &|_, _| ()).await,
            Ok(Some(image)) => Ok(image),
            Err(error) => Err(error),
        };
        drop(turn);
        self.lock_underway().remove(&known.to_string());
        pulled.map_err(|source| match source {
            // Whoever named the registry must hear of it, now.
            source @ StoreError::Registry { .. } => wrong(source.full()),
            source => failed(source),
        })
    }

    async fn committed(&self, job: JobId, path: &str) -> Result<Digest, LayerError> {
        self.catalog.job_layer(job).await.map_err(|source| failed(path, source))?.ok_or_else(|| {
            LayerError::Wrong {
                path: path.to_owned(),
                message: format!(
                    "job {job} committed no layer: it must have ended, with `outputs.layer` set"
                ),
            }
        })
    }

    /// Has a layer here: whoever comes second waits for the first.
    async fn ensure(&self, digest: &Digest, path: &str) -> Result<(), LayerError> {
        if self.trees.facts(digest).is_some() {
            self.trees.touch(digest);
            self.count(|counts| counts.hits += 1);
            return Ok(());
        }
        let gate = self.gate(digest.hex());
        let _turn = gate.lock().await;
        let fetched = self.fetch(digest, path).await;
        self.lock_underway().remove(digest.hex());
        fetched
    }

    /// What whoever fetches this holds.
    fn gate(&self, what: &str) -> Arc<AsyncMutex<()>> {
        Arc::clone(self.lock_underway().entry(what.to_owned()).or_default())
    }

    async fn fetch(&self, digest: &Digest, path: &str) -> Result<(), LayerError> {
        if self.trees.facts(digest).is_some() {
            self.count(|counts| counts.hits += 1);
            return Ok(());
        }
        self.count(|counts| counts.misses += 1);
        let failed = |source: StoreError| failed(path, source);
        let record = self.catalog.layer(digest).await.map_err(failed)?.ok_or_else(|| LayerError::Wrong {
            path: path.to_owned(),
            message: format!("there is no layer {digest} in the store; `hutch layer import FILE` brings one"),
        })?;
        self.unpack_blob(&record).await.map_err(failed)
    }

    /// Fetches a layer's bytes, and unpacks them.
    pub(crate) async fn unpack_blob(&self, record: &LayerRecord) -> Result<(), StoreError> {
        let file = self.download(&record.blob).await?;
        self.unpack(record.diff_id.clone(), file).await.map(drop)
    }

    /// A blob as a file without a name, checked against its digest.
    async fn download(&self, blob: &Digest) -> Result<File, StoreError> {
        let transfer = |source| StoreError::Transfer { operation: "cannot keep a layer's bytes", source };
        let (_, mut stream) = self.catalog.blobs().stream(blob).await?;
        let mut file = tempfile::tempfile_in(self.catalog.blobs().spool()).map_err(transfer)?;
        while let Some(piece) = stream.next().await {
            let piece = piece?;
            file = blocking(move || file.write_all(&piece).map(|()| file)).await.map_err(transfer)?;
        }
        file.rewind().map_err(transfer)?;
        Ok(file)
    }

    async fn unpack(&self, digest: Digest, file: File) -> Result<LayerFacts, StoreError> {
        let trees = Arc::clone(&self.trees);
        let work = move || Ok(trees.add(Some(&digest), file));
        blocking(work).await.map_err(lost)?.map(|(_, facts)| facts).map_err(unpacking)
    }

    /// Unpacks a layer from a file, and keeps and records its bytes. Compressed or not, they are kept as they are.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is recorded then.
    pub async fn keep(&self, expected: Option<Digest>, mut file: File) -> Result<LayerRecord, StoreError> {
        let transfer = |source| StoreError::Transfer { operation: "cannot read a layer's bytes", source };
        let trees = Arc::clone(&self.trees);
        let again = file.try_clone().map_err(transfer)?;
        let work = move || Ok(trees.add(expected.as_ref(), again));
        let (diff_id, _) = blocking(work).await.map_err(lost)?.map_err(unpacking)?;
        file.rewind().map_err(transfer)?;
        let stored = self.catalog.blobs().keep_file(file).await?;
        let record = LayerRecord { diff_id, blob: stored.digest, bytes: stored.bytes };
        self.catalog.put_layer(&record).await?;
        Ok(record)
    }

    /// Records the layer that a job committed, its bytes in a file.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn commit(&self, job: JobId, layer: &LayerRecord, file: File) -> Result<(), StoreError> {
        self.catalog.blobs().put_file(file, &layer.blob).await?;
        self.catalog.put_layer(layer).await?;
        self.catalog.put_job_layer(job, &layer.diff_id).await
    }

    fn lock_underway(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<AsyncMutex<()>>>> {
        self.underway.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, change: impl FnOnce(&mut CacheCounts)) {
        change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// The layers that this process unpacks below this directory.
///
/// # Errors
/// [`StoreError::Image`] if the directory cannot be used.
pub fn open_trees(dir: &Path) -> Result<TreeStore, StoreError> {
    let owners = if is_root() { Owners::AsInTar } else { Owners::Own };
    TreeStore::open(dir, owners).map_err(unpacking)
}

/// Whether another try may do better decides what it is.
fn failed(path: &str, source: StoreError) -> LayerError {
    if source.is_transient() {
        LayerError::Store { path: path.to_owned(), source }
    } else {
        LayerError::Wrong { path: path.to_owned(), message: source.full() }
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn lost(source: std::io::Error) -> StoreError {
    StoreError::Transfer { operation: "the unpacking was lost", source }
}

/// What of unpacking is the layer's fault, and what this host's.
fn unpacking(error: UnpackError) -> StoreError {
    match error {
        UnpackError::Host { operation, source } => {
            let source = std::io::Error::new(source.kind(), format!("{operation}: {source}"));
            StoreError::Transfer { operation: "cannot unpack a layer", source }
        }
        other => StoreError::Image(other.to_string()),
    }
}

/// Runs what waits for a disk where waiting is allowed.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other).flatten()
}
