//! What is known of layers and images, as records beside the blobs: any worker on the same store finds them.
//!
//! | record | says |
//! |---|---|
//! | `layers/sha256/HEX.json` | which blob holds the layer of this diff id |
//! | `images/HEX.json` | an image: its layers and its config, under the hash of its name |
//! | `jobs/ID/layer.json` | which layer a job committed |
//!
//! A record is written after what it names: who finds it finds that too.

use bytes::Bytes;
use futures::TryStreamExt as _;
use hutch_proto::{Digest, JobId};
use object_store::path::Path as Location;
use object_store::{ObjectStoreExt as _, PutPayload};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::image::{ImageConfig, ImageName};
use crate::{BlobStore, Hasher, StoreError};

/// The largest record that is read.
const MOST_RECORD_BYTES: u64 = 4 << 20;

/// Where a layer's bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The diff id: the digest of its uncompressed tar.
    pub diff_id: Digest,
    /// The blob with its tar, compressed or not.
    pub blob: Digest,
    /// The size of the blob.
    pub bytes: u64,
}

/// An image by its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Its whole name.
    pub name: String,
    /// Its layers, base first.
    pub layers: Vec<Digest>,
    /// What a job takes from it unless it says otherwise.
    pub config: ImageConfig,
}

#[derive(Debug, Serialize, Deserialize)]
struct JobLayer {
    layer: Digest,
}

/// The records of a store; cheap to clone.
#[derive(Debug, Clone)]
pub struct Catalog {
    blobs: BlobStore,
}

impl Catalog {
    /// The records beside these blobs.
    #[must_use]
    pub fn new(blobs: BlobStore) -> Self {
        Self { blobs }
    }

    /// The blobs.
    #[must_use]
    pub fn blobs(&self) -> &BlobStore {
        &self.blobs
    }

    /// Says where a layer's bytes are.
    ///
    /// # Errors
    /// [`StoreError::Object`].
    pub async fn put_layer(&self, record: &LayerRecord) -> Result<(), StoreError> {
        self.put(layer_location(&record.diff_id), record).await
    }

    /// Where a layer's bytes are; none if nobody said.
    ///
    /// # Errors
    /// [`StoreError::Object`], [`StoreError::Record`].
    pub async fn layer(&self, diff_id: &Digest) -> Result<Option<LayerRecord>, StoreError> {
        self.get(layer_location(diff_id)).await
    }

    /// Every layer that is recorded.
    ///
    /// # Errors
    /// [`StoreError::Object`], [`StoreError::Record`].
    pub async fn layers(&self) -> Result<Vec<LayerRecord>, StoreError> {
        self.list("layers/sha256").await
    }

    /// Keeps an image under its name, in place of one that was there.
    ///
    /// # Errors
    /// [`StoreError::Object`].
    pub async fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        self.put(image_location(&record.name), record).await
    }

    /// The image of this name; none if it was neither imported nor pulled.
    ///
    /// # Errors
    /// [`StoreError::Object`], [`StoreError::Record`].
    pub async fn image(&self, name: &ImageName) -> Result<Option<ImageRecord>, StoreError> {
        self.get(image_location(&name.to_string())).await
    }

    /// Every image that is recorded.
    ///
    /// # Errors
    /// [`StoreError::Object`], [`StoreError::Record`].
    pub async fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        self.list("images").await
    }

    /// Says which layer a job committed.
    ///
    /// # Errors
    /// [`StoreError::Object`].
    pub async fn put_job_layer(&self, job: JobId, layer: &Digest) -> Result<(), StoreError> {
        self.put(job_location(job), &JobLayer { layer: layer.clone() }).await
    }

    /// The layer that a job committed; none if it did not.
    ///
    /// # Errors
    /// [`StoreError::Object`], [`StoreError::Record`].
    pub async fn job_layer(&self, job: JobId) -> Result<Option<Digest>, StoreError> {
        let record: Option<JobLayer> = self.get(job_location(job)).await?;
        Ok(record.map(|record| record.layer))
    }

    /// Forgets a layer; its blob stays.
    ///
    /// # Errors
    /// [`StoreError::Object`].
    pub async fn forget_layer(&self, diff_id: &Digest) -> Result<(), StoreError> {
        self.delete(layer_location(diff_id)).await
    }

    /// Forgets an image; its layers stay.
    ///
    /// # Errors
    /// [`StoreError::Object`].
    pub async fn forget_image(&self, name: &str) -> Result<(), StoreError> {
        self.delete(image_location(name)).await
    }

    async fn put(&self, location: Location, record: &impl Serialize) -> Result<(), StoreError> {
        let json = serde_json::to_vec(record)
            .map_err(|source| StoreError::Record { location: location.to_string(), source })?;
        let payload = PutPayload::from_bytes(Bytes::from(json));
        self.blobs.object_store().put(&location, payload).await.map(drop).map_err(failed("write", &location))
    }

    async fn get<T: DeserializeOwned>(&self, location: Location) -> Result<Option<T>, StoreError> {
        let object = match self.blobs.object_store().get(&location).await {
            Ok(object) => object,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(source) => return Err(failed("read", &location)(source)),
        };
        if object.meta.size > MOST_RECORD_BYTES {
            return Err(StoreError::TooLarge { bytes: object.meta.size, most: MOST_RECORD_BYTES });
        }
        let bytes = object.bytes().await.map_err(failed("read", &location))?;
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| StoreError::Record { location: location.to_string(), source })
    }

    async fn list<T: DeserializeOwned>(&self, below: &str) -> Result<Vec<T>, StoreError> {
        let below = Location::from(below);
        let objects = self.blobs.object_store();
        let found: Vec<_> = objects.list(Some(&below)).try_collect().await.map_err(failed("list", &below))?;
        let mut records = Vec::with_capacity(found.len());
        for object in found {
            // One that was removed meanwhile is not there.
            records.extend(self.get(object.location).await?);
        }
        Ok(records)
    }

    async fn delete(&self, location: Location) -> Result<(), StoreError> {
        match self.blobs.object_store().delete(&location).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(failed("remove", &location)(source)),
        }
    }
}

fn failed(operation: &'static str, location: &Location) -> impl FnOnce(object_store::Error) -> StoreError {
    let location = location.to_string();
    move |source| StoreError::Object { operation, location, source }
}

fn layer_location(diff_id: &Digest) -> Location {
    Location::from_iter(["layers", "sha256", &format!("{}.json", diff_id.hex())])
}

/// Names hold slashes and colons: their hash is what a path is made of.
fn image_location(name: &str) -> Location {
    Location::from_iter(["images", &format!("{}.json", Hasher::digest_of(name.as_bytes()).hex())])
}

fn job_location(job: JobId) -> Location {
    Location::from_iter(["jobs", &job.to_string(), "layer.json"])
}
