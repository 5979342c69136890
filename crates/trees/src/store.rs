//! The layers of this host: a directory that only its owner can enter, with a tree for each diff id.
//!
//! A layer is unpacked under a temporary name, checked against its digest, written through to the disk (syncfs(2)),
//! and only then renamed to its own: what is there under its digest is whole. Who unpacks holds a lock on the temporary
//! directory; one that nobody holds is left over from a process that was killed, and is removed.
//!
//! | path | what |
//! |---|---|
//! | `DIR/sha256/HEX/fs` | the tree |
//! | `DIR/sha256/HEX/layer.json` | what is known of it |
//! | `DIR/tmp/NAME` | one that is being unpacked |

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use hutch_proto::Digest;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::error::UnpackError;
use crate::root::remove_tree;
use crate::unpack::{Caps, Owners, Unpacked, unpack};

/// What is known of a layer that is in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerFacts {
    /// The size of its uncompressed tar.
    pub bytes: u64,
    /// How many entries it has.
    pub entries: u64,
    /// The time of its newest file or directory, in seconds since 1970.
    pub newest_s: i64,
}

/// A layer's tree that stays while this lives.
#[derive(Debug)]
pub struct InUse {
    /// The root of the tree.
    pub dir: OwnedFd,
    _lock: Flock<File>,
}

/// The layers of this host; cheap to clone.
#[derive(Debug, Clone)]
pub struct TreeStore {
    dir: PathBuf,
    owners: Owners,
}

impl TreeStore {
    /// The store in this directory, which is made if it is missing, with what killed processes left removed.
    ///
    /// # Errors
    /// [`UnpackError::Host`] if it cannot be made or used.
    pub fn open(dir: &Path, owners: Owners) -> Result<Self, UnpackError> {
        let made = |dir: &Path| -> io::Result<()> {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
        };
        let store = Self { dir: dir.to_owned(), owners };
        for dir in [dir, &store.trees(), &store.tmp()] {
            made(dir).map_err(|e| UnpackError::host(format!("make {}", dir.display()), e))?;
        }
        store.sweep()?;
        Ok(store)
    }

    fn trees(&self) -> PathBuf {
        self.dir.join("sha256")
    }

    fn tmp(&self) -> PathBuf {
        self.dir.join("tmp")
    }

    fn place(&self, diff_id: &Digest) -> PathBuf {
        self.trees().join(diff_id.hex())
    }

    /// The tree of a layer, for a mount.
    #[must_use]
    pub fn tree(&self, diff_id: &Digest) -> PathBuf {
        self.place(diff_id).join("fs")
    }

    /// What is known of a layer; none if it is not here.
    #[must_use]
    pub fn facts(&self, diff_id: &Digest) -> Option<LayerFacts> {
        let bytes = fs::read(self.place(diff_id).join("layer.json")).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Unpacks a layer, compressed or not, which must have this diff id; nothing is done if it is here already.
    ///
    /// # Errors
    /// [`UnpackError`]; nothing is kept then.
    pub fn add(&self, diff_id: &Digest, blob: impl Read, caps: Caps) -> Result<LayerFacts, UnpackError> {
        if let Some(facts) = self.facts(diff_id) {
            return Ok(facts);
        }
        self.unpack(Some(diff_id), blob, caps).map(|(_, facts)| facts)
    }

    /// Unpacks a layer whose diff id is not known yet.
    ///
    /// # Errors
    /// [`UnpackError`]; nothing is kept then.
    pub fn add_unknown(&self, blob: impl Read, caps: Caps) -> Result<(Digest, LayerFacts), UnpackError> {
        self.unpack(None, blob, caps)
    }

    fn unpack(
        &self,
        expected: Option<&Digest>,
        blob: impl Read,
        caps: Caps,
    ) -> Result<(Digest, LayerFacts), UnpackError> {
        let temporary = Temporary::make(&self.tmp())?;
        let fs = temporary.path.join("fs");
        let host = |what: &str| {
            let operation = format!("{what} in {}", self.dir.display());
            move |e: io::Error| UnpackError::host(operation, e)
        };
        DirBuilder::new().mode(0o755).create(&fs).map_err(host("make a layer"))?;
        let root = File::open(&fs).map_err(host("open a layer"))?;
        let unpacked = unpack(blob, root.as_fd(), self.owners, caps)?;
        if let Some(expected) = expected
            && *expected != unpacked.diff_id
        {
            return Err(UnpackError::WrongDigest { expected: expected.clone(), found: unpacked.diff_id });
        }
        let Unpacked { diff_id, bytes, entries, newest_s } = unpacked;
        let facts = LayerFacts { bytes, entries, newest_s };
        let json = serde_json::to_vec(&facts).map_err(io::Error::other).map_err(host("describe a layer"))?;
        fs::write(temporary.path.join("layer.json"), json).map_err(host("write"))?;
        nix::unistd::syncfs(&root).map_err(|e| UnpackError::host("write a layer to the disk", e))?;
        temporary.publish(&self.place(&diff_id))?;
        let trees = File::open(self.trees()).and_then(|trees| trees.sync_all());
        trees.map_err(host("write to the disk"))?;
        Ok((diff_id, facts))
    }

    /// Every layer here, with what is known of it and when it was last used.
    ///
    /// # Errors
    /// [`UnpackError::Host`] if the store cannot be read.
    pub fn list(&self) -> Result<Vec<(Digest, LayerFacts, SystemTime)>, UnpackError> {
        let failed = |e: io::Error| UnpackError::host(format!("read {}", self.trees().display()), e);
        let mut layers = Vec::new();
        for entry in fs::read_dir(self.trees()).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let Some(Ok(digest)) = name.to_str().map(|hex| format!("sha256:{hex}").parse::<Digest>()) else {
                continue;
            };
            let used = fs::metadata(entry.path().join("layer.json")).and_then(|meta| meta.modified());
            if let (Some(facts), Ok(used)) = (self.facts(&digest), used) {
                layers.push((digest, facts, used));
            }
        }
        layers.sort_by(|a, b| a.0.hex().cmp(b.0.hex()));
        Ok(layers)
    }

    /// Opens the tree of a layer for use: it is not removed before the answer is dropped. None if it is not here.
    ///
    /// # Errors
    /// [`UnpackError::Host`] if it is there and cannot be opened.
    pub fn open_tree(&self, diff_id: &Digest) -> Result<Option<InUse>, UnpackError> {
        let failed = |e: io::Error| UnpackError::host(format!("open the layer {diff_id}"), e);
        let place = self.place(diff_id);
        let file = match File::open(place.join("layer.json")) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        // One who removes it holds the lock alone, and takes the tree away before letting go.
        let Ok(lock) = Flock::lock(file, FlockArg::LockSharedNonblock) else { return Ok(None) };
        match File::open(place.join("fs")) {
            Ok(dir) => {
                self.touch(diff_id);
                Ok(Some(InUse { dir: dir.into(), _lock: lock }))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed(e)),
        }
    }

    /// Notes that a layer is used now.
    pub fn touch(&self, diff_id: &Digest) {
        // A store that cannot be written to keeps an older time: the layer may be unpacked again, no more.
        let file = File::options().append(true).open(self.place(diff_id).join("layer.json"));
        let _ = file.and_then(|file| file.set_modified(SystemTime::now()));
    }

    /// Removes a layer; whether it was there and nobody uses it.
    ///
    /// # Errors
    /// [`UnpackError::Host`].
    pub fn remove(&self, diff_id: &Digest) -> Result<bool, UnpackError> {
        let Ok(file) = File::open(self.place(diff_id).join("layer.json")) else { return Ok(false) };
        let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(false) };
        let temporary = Temporary::make(&self.tmp())?;
        match fs::rename(self.place(diff_id), temporary.path.join("removed")) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(UnpackError::host(format!("remove the layer {diff_id}"), e)),
        }
    }

    /// Removes what killed processes left half unpacked; how many there were.
    fn sweep(&self) -> Result<usize, UnpackError> {
        let failed = |e: io::Error| UnpackError::host(format!("read {}", self.tmp().display()), e);
        let mut removed = 0;
        for entry in fs::read_dir(self.tmp()).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let Ok(open) = File::open(&path) else { continue };
            if let Ok(lock) = Flock::lock(open, FlockArg::LockExclusiveNonblock) {
                remove_below(&path)?;
                drop(lock);
                removed += 1;
            }
        }
        Ok(removed)
    }
}

/// A directory that goes away with all in it, unless it is published.
struct Temporary {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Temporary {
    fn make(dir: &Path) -> Result<Self, UnpackError> {
        let failed = |e: io::Error| UnpackError::host(format!("make a directory in {}", dir.display()), e);
        loop {
            let path = dir.join(hutch_proto::JobId::generate().to_string());
            DirBuilder::new().mode(0o700).create(&path).map_err(failed)?;
            let Ok(open) = File::open(&path) else { continue };
            // One who sweeps may have come in between: then it is gone, and another is made.
            match Flock::lock(open, FlockArg::LockExclusiveNonblock) {
                Ok(lock) if path.exists() => return Ok(Self { path, _lock: lock }),
                Ok(_) | Err((_, Errno::EWOULDBLOCK)) => {}
                Err((_, e)) => return Err(failed(e.into())),
            }
        }
    }

    /// Gives the directory its own name. One that is there already is as good: it has the same digest.
    fn publish(self, place: &Path) -> Result<(), UnpackError> {
        match fs::rename(&self.path, place) {
            Ok(()) => Ok(()),
            Err(e) if matches!(e.raw_os_error(), Some(libc_code) if is_taken(libc_code)) => Ok(()),
            Err(e) => Err(UnpackError::host(format!("rename a layer to {}", place.display()), e)),
        }
    }
}

fn is_taken(code: i32) -> bool {
    matches!(Errno::from_raw(code), Errno::EEXIST | Errno::ENOTEMPTY)
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // What cannot be removed now is swept when the store is opened again.
        let _ = remove_below(&self.path);
    }
}

/// Removes a directory of the store and all in it.
fn remove_below(path: &Path) -> Result<(), UnpackError> {
    let failed = |e: io::Error| UnpackError::host(format!("remove {}", path.display()), e);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name().map(OsStr::as_bytes)) else {
        return Ok(());
    };
    let parent = File::open(parent).map_err(failed)?;
    let name = crate::root::text(name).map_err(|e| failed(e.into()))?;
    remove_tree(parent.as_fd(), &name).map_err(|e| failed(e.into()))
}

#[cfg(test)]
mod tests;
