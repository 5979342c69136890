//! What is kept by the digest of its bytes: inputs, outputs and, on top of them, layers.
//!
//! [`BlobStore`] puts bytes below `blobs/sha256/<hex>` of an object store: a directory of this
//! machine (mode 0700) or a bucket that several machines share. Whatever is read back is checked
//! against the digest that names it.
//!
//! [`Layers`] are what jobs stack: records of a [`Catalog`] say which blob holds a layer and which layers make an image;
//! what a job needs is fetched and unpacked into this host's trees.

mod blob_store;
mod bucket;
mod catalog;
mod error;
mod hashing;
mod image;
mod import;
mod layers;
mod registry;

pub use blob_store::{BlobStore, Stored};
pub use catalog::{Catalog, ImageRecord, LayerRecord};
pub use error::StoreError;
pub use hashing::Hasher;
pub use hutch_trees::{CappedTrees, Caps, LayerFacts, TreeStore, Trees};
pub use image::{ImageConfig, ImageName};
pub use import::Imported;
pub use layers::{CacheCounts, LayerError, Layers, MOST_LAYERS, open_trees};
pub use object_store::ObjectStore;
pub use registry::Registries;
