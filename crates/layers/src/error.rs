//! Why the store did not do as asked.

use std::io;

use hutch_proto::Digest;

/// Why the store did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The address is not one of a store.
    #[error("`{url}` is not a store: {message}")]
    Url {
        /// The address as it was given.
        url: String,
        /// What is wrong with it, and what would be right.
        message: String,
    },
    /// The directory of the store cannot be made or used.
    #[error("the store's directory {path} cannot be used")]
    Directory {
        /// The directory.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// There is no such blob.
    #[error("blob {0} is not in the store: upload it first")]
    NotFound(Digest),
    /// There is more of it than may be taken.
    #[error("{bytes} bytes are more than the {most} that may be taken")]
    TooLarge {
        /// How many there are, or were seen before reading ended.
        bytes: u64,
        /// How many may be taken.
        most: u64,
    },
    /// The bytes are not those that the digest names.
    #[error("the bytes of blob {expected} are damaged: they have the digest {found}")]
    Damaged {
        /// The name of the blob.
        expected: Digest,
        /// The digest of what is there.
        found: Digest,
    },
    /// The object store failed; trying again may help.
    #[error("the store cannot {operation} `{location}`")]
    Object {
        /// What was to be done, as a verb.
        operation: &'static str,
        /// With what.
        location: String,
        /// What the object store said.
        source: object_store::Error,
    },
    /// A record in the store is not one of ours.
    #[error("the record `{location}` cannot be read")]
    Record {
        /// Which record.
        location: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// What should be an image or a layer is not.
    #[error("{0}")]
    Image(String),
    /// The registry did not do as asked.
    #[error("cannot {operation}: {message}")]
    Registry {
        /// What was to be done.
        operation: String,
        /// What the registry or the network said.
        message: String,
        /// Whether another try may do better.
        transient: bool,
    },
    /// The bytes on their way into the store could not be read or kept.
    #[error("{operation}")]
    Transfer {
        /// What was to be done.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl StoreError {
    /// Whether the same call may do better later: the fault is the store's or the host's.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Object { .. } | Self::Transfer { .. } | Self::Directory { .. } => true,
            Self::Registry { transient, .. } => *transient,
            _ => false,
        }
    }

    /// The error and what caused it, in one line.
    #[must_use]
    pub fn full(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}
