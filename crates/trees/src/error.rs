//! Why a layer was not unpacked.

use std::io;

use hutch_proto::Digest;
use nix::errno::Errno;

/// Why a layer was not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The layer is not one that can be used; another try ends the same.
    #[error("entry {index} (`{path}`): {message}")]
    Entry {
        /// Which entry of the tar, from 1.
        index: u64,
        /// Its path as the tar has it, shortened and escaped.
        path: String,
        /// What is wrong with it.
        message: String,
    },
    /// The bytes are no tar, or break off.
    #[error("not a layer: {0}")]
    Malformed(String),
    /// A cap was reached.
    #[error("the layer has more than {most} {what}")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        most: u64,
    },
    /// The bytes are not those that the digest names.
    #[error("the layer should have the digest {expected}, and has {found}")]
    WrongDigest {
        /// The digest that names it.
        expected: Digest,
        /// The digest of what came.
        found: Digest,
    },
    /// Another process says so of the layer.
    #[error("{0}")]
    Told(String),
    /// This host could not do it; another try may do better.
    #[error("cannot {operation}: {source}")]
    Host {
        /// What was to be done.
        operation: String,
        /// What the system said.
        source: io::Error,
    },
}

impl UnpackError {
    /// Whether another try may do better: the fault is this host's.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Host { .. })
    }

    pub(crate) fn host(operation: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Host { operation: operation.into(), source: source.into() }
    }
}

/// Whether an error comes of what the layer asks for, and not of this host.
pub(crate) fn is_the_layers_fault(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ENAMETOOLONG
            | Errno::ENOTDIR
            | Errno::ELOOP
            | Errno::EISDIR
            | Errno::ENOENT
            | Errno::EEXIST
            | Errno::EXDEV
            | Errno::EMLINK
            | Errno::EINVAL
            | Errno::EAGAIN
    )
}
