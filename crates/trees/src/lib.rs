//! Layers as directory trees on this host.
//!
//! In order: a layer's bytes are decompressed, hashed and counted ([`stream`]); each entry of the tar is read with
//! every cap applied ([`entry`]); it is made below the tree's own root, by descriptors ([`root`], [`unpack`]); and
//! the whole tree appears in the store under its diff id only when it is complete ([`store`]).
//!
//! A tree is what overlayfs takes for a lower directory: a whiteout is a character device 0:0, an opaque directory
//! carries an extended attribute (Documentation/filesystems/overlayfs.rst; the tar's side is the OCI image
//! specification, layer.md).

mod access;
mod entry;
mod error;
mod root;
mod store;
mod stream;
mod unpack;

pub use access::{CappedTrees, Listed, Trees};
pub use error::UnpackError;
pub use store::{InUse, LayerFacts, TreeStore};
pub use stream::decompressed;
pub use unpack::{Caps, Owners, Unpacked, unpack};
