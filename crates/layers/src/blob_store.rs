//! Blobs: bytes named by their digest.
//!
//! In: bytes are hashed on their way, and are there under their name only when they are whole. Out:
//! a size cap before the first byte, the digest after the last. What is there already is not
//! written again.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use hutch_proto::Digest;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path as Location;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart};

use crate::{Hasher, StoreError, bucket};

/// How much of a file is read at a time.
const CHUNK: usize = 256 << 10;
/// From this size on a blob goes up in parts.
const ONE_PART: u64 = 8 << 20;

/// A blob that is in the store now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its name.
    pub digest: Digest,
    /// Its size.
    pub bytes: u64,
}

/// Blobs in an object store; cheap to clone.
#[derive(Debug, Clone)]
pub struct BlobStore {
    objects: Arc<dyn ObjectStore>,
    url: String,
    spool: PathBuf,
}

impl BlobStore {
    /// The store at this address: `file:///srv/hutch`, or `s3://bucket/prefix` with the usual `AWS_*`
    /// variables (`AWS_ENDPOINT` for other stores than Amazon's), or `memory:///` for tests.
    ///
    /// A directory is made if it is missing, and open to its owner alone.
    ///
    /// # Errors
    /// [`StoreError::Url`] for what is none of these; [`StoreError::Directory`].
    pub fn open(url: &str) -> Result<Self, StoreError> {
        let objects: Arc<dyn ObjectStore> = match url.split_once("://") {
            Some(("file", path)) if path.starts_with('/') => return Self::in_directory(Path::new(path)),
            Some(("s3", rest)) if !rest.is_empty() && !rest.starts_with('/') => bucket::open(url, rest)?,
            Some(("memory", _)) => Arc::new(InMemory::new()),
            _ => {
                return Err(StoreError::Url {
                    url: url.to_owned(),
                    message: "an address such as file:///var/lib/hutch or s3://bucket/prefix is expected"
                        .to_owned(),
                });
            }
        };
        Ok(Self { objects, url: url.to_owned(), spool: std::env::temp_dir() })
    }

    /// The store in this directory, which is made if it is missing and open to its owner alone.
    ///
    /// # Errors
    /// [`StoreError::Directory`] if it cannot be made or used.
    pub fn in_directory(directory: &Path) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Directory { path: directory.display().to_string(), source };
        private_directory(directory).map_err(failed)?;
        let spool = directory.join("tmp");
        private_directory(&spool).map_err(failed)?;
        let objects = LocalFileSystem::new_with_prefix(directory)
            .map_err(|error| failed(io::Error::other(error)))?
            .with_fsync(true);
        Ok(Self { objects: Arc::new(objects), url: format!("file://{}", directory.display()), spool })
    }

    /// The object store below, for records that are not blobs.
    #[must_use]
    pub fn object_store(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.objects)
    }

    /// Where it is, for people.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Keeps these bytes.
    ///
    /// # Errors
    /// [`StoreError::Object`].
    pub async fn put(&self, bytes: Bytes) -> Result<Stored, StoreError> {
        let stored = Stored { digest: Hasher::digest_of(&bytes), bytes: bytes.len() as u64 };
        if self.size(&stored.digest).await? == Some(stored.bytes) {
            return Ok(stored);
        }
        let location = location(&stored.digest);
        self.objects
            .put(&location, PutPayload::from_bytes(bytes))
            .await
            .map_err(|source| failed("write", &location, source))?;
        Ok(stored)
    }

    /// Keeps the bytes of a file, from its beginning, under the digest that they must have.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if they have another, and then nothing is kept; [`StoreError::Object`],
    /// [`StoreError::Transfer`].
    pub async fn put_file(&self, file: File, digest: &Digest) -> Result<Stored, StoreError> {
        let (file, bytes) = rewound(file).await?;
        if self.size(digest).await? == Some(bytes) {
            return Ok(Stored { digest: digest.clone(), bytes });
        }
        let found = if bytes < ONE_PART {
            self.put_small(file, digest).await?
        } else {
            self.put_in_parts(file, digest).await?
        };
        if found == *digest {
            Ok(Stored { digest: found, bytes })
        } else {
            Err(StoreError::Damaged { expected: digest.clone(), found })
        }
    }

    /// Keeps the bytes of a file, from its beginning, whatever their digest.
    ///
    /// # Errors
    /// [`StoreError::Object`], [`StoreError::Transfer`].
    pub async fn keep_file(&self, file: File) -> Result<Stored, StoreError> {
        let (mut file, _) = rewound(file).await?;
        let (file, digest) = blocking("cannot read the file", move || {
            let mut hasher = Hasher::new();
            let mut piece = vec![0; CHUNK];
            loop {
                let read = file.read(&mut piece)?;
                if read == 0 {
                    return Ok((file, hasher.finish()));
                }
                hasher.update(&piece[..read]);
            }
        })
        .await?;
        self.put_file(file, &digest).await
    }

    /// A directory of this machine for what is on its way.
    #[must_use]
    pub fn spool(&self) -> &Path {
        &self.spool
    }

    /// Keeps what a stream brings, up to `most` bytes; its digest is known at its end.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`], and then nothing is kept; [`StoreError::Transfer`] if the stream
    /// breaks off; [`StoreError::Object`].
    pub async fn put_stream<S, E>(&self, mut stream: S, most: u64) -> Result<Stored, StoreError>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut spool = tempfile::tempfile_in(&self.spool).map_err(transfer("cannot make a spool file"))?;
        let mut hasher = Hasher::new();
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(io::Error::other).map_err(transfer("the upload broke off"))?;
            hasher.update(&piece);
            if hasher.bytes() > most {
                return Err(StoreError::TooLarge { bytes: hasher.bytes(), most });
            }
            spool = blocking("cannot write to the spool file", move || {
                spool.write_all(&piece)?;
                Ok(spool)
            })
            .await?;
        }
        self.put_file(spool, &hasher.finish()).await
    }

    /// The bytes of a blob, checked against its digest.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::TooLarge`] before anything is read;
    /// [`StoreError::Damaged`]; [`StoreError::Object`].
    pub async fn get(&self, digest: &Digest, most: u64) -> Result<Bytes, StoreError> {
        let (bytes, mut stream) = self.stream(digest).await?;
        if bytes > most {
            return Err(StoreError::TooLarge { bytes, most });
        }
        let mut whole = Vec::with_capacity(usize::try_from(bytes).unwrap_or(0));
        while let Some(piece) = stream.next().await {
            whole.extend_from_slice(&piece?);
        }
        Ok(whole.into())
    }

    /// The size of a blob and its bytes as they come. The last item is an error if they were not
    /// those that the digest names.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Object`].
    pub async fn stream(
        &self,
        digest: &Digest,
    ) -> Result<(u64, BoxStream<'static, Result<Bytes, StoreError>>), StoreError> {
        let location = location(digest);
        let object = self.objects.get(&location).await.map_err(|source| match source {
            object_store::Error::NotFound { .. } => StoreError::NotFound(digest.clone()),
            source => failed("read", &location, source),
        })?;
        let bytes = object.meta.size;
        Ok((bytes, checked(object.into_stream(), digest.clone(), location)))
    }

    /// The size of a blob; none if it is not there.
    ///
    /// # Errors
    /// [`StoreError::Object`].
    pub async fn size(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        let location = location(digest);
        match self.objects.head(&location).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(failed("look for", &location, source)),
        }
    }

    /// Whether a blob is there.
    ///
    /// # Errors
    /// [`StoreError::Object`].
    pub async fn exists(&self, digest: &Digest) -> Result<bool, StoreError> {
        Ok(self.size(digest).await?.is_some())
    }

    /// Writes a file in one go, if it is what it should be; returns the digest that it has.
    async fn put_small(&self, mut file: File, digest: &Digest) -> Result<Digest, StoreError> {
        let whole = blocking("cannot read the file", move || {
            let mut whole = Vec::new();
            file.read_to_end(&mut whole)?;
            Ok(whole)
        })
        .await?;
        let found = Hasher::digest_of(&whole);
        if found == *digest {
            let location = location(digest);
            self.objects
                .put(&location, PutPayload::from(whole))
                .await
                .map_err(|source| failed("write", &location, source))?;
        }
        Ok(found)
    }

    /// Writes a file part by part; it appears under its name only at the end, and only if it is
    /// what it should be. Returns the digest that it has.
    async fn put_in_parts(&self, mut file: File, digest: &Digest) -> Result<Digest, StoreError> {
        let location = location(digest);
        let wrong = |source| failed("write", &location, source);
        let upload = self.objects.put_multipart(&location).await.map_err(wrong)?;
        let mut parts = WriteMultipart::new(upload);
        let mut hasher = Hasher::new();
        loop {
            let (again, piece) = blocking("cannot read the file", move || {
                let mut piece = vec![0; CHUNK];
                let read = file.read(&mut piece)?;
                piece.truncate(read);
                Ok((file, piece))
            })
            .await?;
            file = again;
            if piece.is_empty() {
                break;
            }
            hasher.update(&piece);
            parts.wait_for_capacity(4).await.map_err(wrong)?;
            parts.put(piece.into());
        }
        let found = hasher.finish();
        if found == *digest {
            parts.finish().await.map_err(wrong)?;
        } else {
            parts.abort().await.map_err(wrong)?;
        }
        Ok(found)
    }
}

/// Where a blob is.
fn location(digest: &Digest) -> Location {
    Location::from_iter(["blobs", "sha256", digest.hex()])
}

fn failed(operation: &'static str, location: &Location, source: object_store::Error) -> StoreError {
    StoreError::Object { operation, location: location.to_string(), source }
}

fn transfer(operation: &'static str) -> impl Fn(io::Error) -> StoreError {
    move |source| StoreError::Transfer { operation, source }
}

/// Makes a directory that only its owner can enter.
fn private_directory(directory: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    fs::set_permissions(directory, Permissions::from_mode(0o700))
}

/// The file at its beginning, and its size.
async fn rewound(mut file: File) -> Result<(File, u64), StoreError> {
    blocking("cannot read the file", move || {
        let bytes = file.seek(SeekFrom::End(0))?;
        file.rewind()?;
        Ok((file, bytes))
    })
    .await
}

/// Runs what waits for a disk where waiting is allowed.
async fn blocking<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, StoreError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(io::Error::other).flatten().map_err(transfer(operation))
}

/// The stream, with an error at its end if its bytes had another digest.
fn checked(
    stream: BoxStream<'static, object_store::Result<Bytes>>,
    expected: Digest,
    location: Location,
) -> BoxStream<'static, Result<Bytes, StoreError>> {
    let state = Some((stream, Hasher::new(), expected, location));
    futures::stream::unfold(state, |state| async move {
        let (mut stream, mut hasher, expected, location) = state?;
        match stream.next().await {
            Some(Ok(piece)) => {
                hasher.update(&piece);
                Some((Ok(piece), Some((stream, hasher, expected, location))))
            }
            Some(Err(source)) => Some((Err(failed("read", &location, source)), None)),
            None => {
                let found = hasher.finish();
                (found != expected).then(|| (Err(StoreError::Damaged { expected, found }), None))
            }
        }
    })
    .boxed()
}

#[cfg(test)]
mod tests;
