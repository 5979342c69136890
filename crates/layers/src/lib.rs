//! What is kept by the digest of its bytes: inputs, outputs and, on top of them, layers.
//!
//! [`BlobStore`] puts bytes below `blobs/sha256/<hex>` of an object store: a directory of this
//! machine (mode 0700) or a bucket that several machines share. Whatever is read back is checked
//! against the digest that names it.

mod blob_store;
mod bucket;
mod error;
mod hashing;

pub use blob_store::{BlobStore, Stored};
pub use error::StoreError;
pub use hashing::Hasher;
pub use object_store::ObjectStore;
