//! A host's layers, for whoever brings them and asks for them: here, or in another process that may unpack.

use std::fmt;
use std::fs::File;
use std::time::SystemTime;

use hutch_proto::Digest;

use crate::error::UnpackError;
use crate::store::{LayerFacts, TreeStore};
use crate::unpack::Caps;

/// A layer, what is known of it, and when it was last used.
pub type Listed = (Digest, LayerFacts, SystemTime);

/// The layers of a host. Everything here may wait for a disk.
pub trait Trees: fmt::Debug + Send + Sync {
    /// What is known of a layer; none if it is not here.
    fn facts(&self, diff_id: &Digest) -> Option<LayerFacts>;

    /// Notes that a layer is used now.
    fn touch(&self, diff_id: &Digest);

    /// Unpacks a layer, compressed or not, from where the file is now; it must have the diff id that is expected, if one
    /// is.
    ///
    /// # Errors
    /// [`UnpackError`]; nothing is kept then.
    fn add(&self, expected: Option<&Digest>, blob: File) -> Result<(Digest, LayerFacts), UnpackError>;

    /// Every layer here.
    ///
    /// # Errors
    /// [`UnpackError::Host`] if they cannot be read.
    fn list(&self) -> Result<Vec<Listed>, UnpackError>;
}

/// The store of this host, and how large a layer may be that comes into it.
#[derive(Debug, Clone)]
pub struct CappedTrees {
    /// The store.
    pub store: TreeStore,
    /// What one layer may have.
    pub caps: Caps,
}

impl Trees for CappedTrees {
    fn facts(&self, diff_id: &Digest) -> Option<LayerFacts> {
        self.store.facts(diff_id)
    }

    fn touch(&self, diff_id: &Digest) {
        self.store.touch(diff_id);
    }

    fn add(&self, expected: Option<&Digest>, blob: File) -> Result<(Digest, LayerFacts), UnpackError> {
        match expected {
            Some(digest) => self.store.add(digest, blob, self.caps).map(|facts| (digest.clone(), facts)),
            None => self.store.add_unknown(blob, self.caps),
        }
    }

    fn list(&self) -> Result<Vec<Listed>, UnpackError> {
        self.store.list()
    }
}
