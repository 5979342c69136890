//! Unpacks a layer's tar into a directory.
//!
//! In order, for each entry: its headers are read ([`crate::entry`]); its directory is found or made; what is there
//! under its name gives way, but for a directory that stays one; it is made, and gets owner, mode, attributes and time, in
//! this order, since chown(2) clears set-user-ID bits. Times of directories come last, when nothing changes
//! them any more. `.wh.NAME` deletes NAME of the layers below, `.wh..wh..opq` all that they have in its directory.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;

use hutch_proto::Digest;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat, linkat, mkfifoat, symlinkat};

use crate::entry::{Extensions, Item, Kind, Read1};
use crate::error::{UnpackError, is_the_layers_fault};
use crate::root::{Parent, Root, libc_kind, text};
use crate::stream::{Counted, OverCap, decompressed};

/// How much a layer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caps {
    /// Bytes of the uncompressed tar.
    pub bytes: u64,
    /// Entries of the tar.
    pub entries: u64,
}

/// Whose the files of a tree are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owners {
    /// Whoever the tar says: needs CAP_CHOWN and CAP_FOWNER.
    AsInTar,
    /// The caller's own: all that an ordinary user can make.
    Own,
}

/// What was unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    /// The digest of the uncompressed tar.
    pub diff_id: Digest,
    /// The size of the uncompressed tar.
    pub bytes: u64,
    /// How many entries it had.
    pub entries: u64,
    /// The time of its newest file or directory, in seconds since 1970.
    pub newest_s: i64,
}

/// How much is kept in mind of directories whose times are still to be set.
const MOST_PENDING_BYTES: usize = 256 << 20;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Unpacks a layer, compressed or not, into an empty directory. Links in it never lead out of the directory.
///
/// # Errors
/// [`UnpackError`]; what was unpacked until then stays for the caller to remove.
pub fn unpack(
    blob: impl Read,
    into: BorrowedFd<'_>,
    owners: Owners,
    caps: Caps,
) -> Result<Unpacked, UnpackError> {
    let stream = decompressed(blob).map_err(|e| UnpackError::Malformed(e.to_string()))?;
    let mut archive = tar::Archive::new(Counted::new(stream, caps.bytes));
    let mut tree = Tree { root: Root::new(into), owners, pending: Vec::new(), pending_bytes: 0, newest_s: 0 };
    let mut extensions = Extensions::default();
    let mut count = 0;
    let entries = archive.entries().map_err(|e| malformed(&e))?.raw(true);
    for entry in entries {
        let mut entry = entry.map_err(|e| malformed(&e))?;
        count += 1;
        if count > caps.entries {
            return Err(UnpackError::TooLarge { what: "entries", most: caps.entries });
        }
        let shown = shown(&entry.path_bytes());
        let wrong = |message: String| UnpackError::Entry { index: count, path: shown.clone(), message };
        let item = match extensions.read(&mut entry).map_err(wrong)? {
            Read1::Extension => continue,
            Read1::Item(item) => item,
        };
        tree.add(&item, &mut entry).map_err(|e| e.told(count, &shown))?;
    }
    tree.finish()?;
    let (digest, bytes) = archive.into_inner().finish().map_err(|e| malformed(&e))?;
    Ok(Unpacked { diff_id: Digest::from_sha256(digest), bytes, entries: count, newest_s: tree.newest_s })
}

/// Why one entry was not made.
enum Fault {
    Errno(Errno),
    Layer(String),
    Read(io::Error),
    Host(UnpackError),
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl Fault {
    fn told(self, index: u64, path: &str) -> UnpackError {
        let entry = |message: String| UnpackError::Entry { index, path: path.to_owned(), message };
        match self {
            Self::Errno(errno) if is_the_layers_fault(errno) => entry(errno.desc().to_owned()),
            Self::Errno(errno) => UnpackError::host(format!("make `{path}`"), errno),
            Self::Layer(message) => entry(message),
            Self::Read(e) => malformed(&e),
            Self::Host(e) => e,
        }
    }
}

/// A reading error: a cap, or bytes that are no tar.
fn malformed(error: &io::Error) -> UnpackError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<OverCap>()) {
        Some(OverCap(most)) => UnpackError::TooLarge { what: "bytes", most: *most },
        None => UnpackError::Malformed(error.to_string()),
    }
}

/// A path for people: short, with no control character.
fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).chars().take(120).flat_map(char::escape_debug).collect()
}

/// A directory whose time is still to be set.
struct Pending {
    path: Vec<Vec<u8>>,
    mtime: (i64, u32),
}

/// The tree so far.
struct Tree<'r> {
    root: Root<'r>,
    owners: Owners,
    /// Directories whose times are set at the end.
    pending: Vec<Pending>,
    pending_bytes: usize,
    newest_s: i64,
}

impl Tree<'_> {
    fn add(&mut self, item: &Item, content: &mut impl Read) -> Result<(), Fault> {
        let Some((name, parents)) = item.path.split_last() else {
            return self.root_itself(item);
        };
        if let Some(deleted) = name.strip_prefix(WHITEOUT) {
            return self.whiteout(parents, name, deleted);
        }
        let parent = self.root.parent(parents)?;
        let name = text(name)?;
        let there = parent.stat(&name)?;
        let hides = parent.is_whiteout(&name)?;
        let is_dir = there.is_some_and(|stat| stat.st_mode & libc_kind() == SFlag::S_IFDIR.bits());
        let stays = is_dir && item.kind == Kind::Dir;
        if there.is_some() && !stays {
            parent.remove(&name)?;
        }
        match &item.kind {
            Kind::File { size } => return self.file(&parent, &name, *size, item, content),
            Kind::Dir if stays => {}
            Kind::Dir => mkdirat(&parent, name.as_c_str(), Mode::from_bits_truncate(0o700))?,
            Kind::Symlink(target) => {
                symlinkat(std::ffi::OsStr::from_bytes(target), &parent, name.as_c_str())?;
            }
            Kind::HardLink(target) => return self.hard_link(target, &parent, &name),
            Kind::Fifo => mkfifoat(&parent, name.as_c_str(), Mode::from_bits_truncate(0o600))?,
            // A device in a layer is nothing that a job could use.
            Kind::Device => return Ok(()),
        }
        if hides && item.kind == Kind::Dir {
            parent.make_opaque(&name)?;
        }
        self.owner_and_mode(&parent, &name, item)?;
        if item.kind == Kind::Dir {
            let dir = openat(&parent, name.as_c_str(), OFlag::O_RDONLY | OFlag::O_NOFOLLOW, Mode::empty())?;
            attributes(&File::from(dir), item)?;
            return self.time_later(item);
        }
        self.time(&parent, &name, item.mtime)?;
        Ok(())
    }

    /// The entry `./`: what the root itself is like.
    fn root_itself(&mut self, item: &Item) -> Result<(), Fault> {
        if item.kind != Kind::Dir {
            return Err(Fault::Layer("the root can be nothing but a directory".to_owned()));
        }
        let root = self.root.open(&[])?;
        self.owner_and_mode(&root, c".", item)?;
        self.time_later(item)
    }

    fn whiteout(&mut self, parents: &[Vec<u8>], name: &[u8], deleted: &[u8]) -> Result<(), Fault> {
        if name == OPAQUE {
            let Some((dir, above)) = parents.split_last() else {
                return self.root.open(&[])?.make_opaque(c".").map_err(Fault::from);
            };
            self.root.parent(parents)?;
            return self.root.parent(above)?.make_opaque(&text(dir)?).map_err(Fault::from);
        }
        // The marks that aufs keeps for itself.
        if deleted.starts_with(WHITEOUT) {
            return Ok(());
        }
        if matches!(deleted, b"" | b"." | b"..") {
            return Err(Fault::Layer("a whiteout of nothing".to_owned()));
        }
        let parent = self.root.parent(parents)?;
        let deleted = text(deleted)?;
        match parent.stat(&deleted)? {
            None => parent.whiteout(&deleted)?,
            // It is of the layers below that something is deleted; what this one has in its place stays.
            Some(stat) if stat.st_mode & libc_kind() == SFlag::S_IFDIR.bits() => {
                parent.make_opaque(&deleted)?
            }
            Some(_) => {}
        }
        Ok(())
    }

    fn file(
        &mut self,
        parent: &Parent,
        name: &CString,
        size: u64,
        item: &Item,
        content: &mut impl Read,
    ) -> Result<(), Fault> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = File::from(openat(parent, name.as_c_str(), flags, Mode::from_bits_truncate(0o600))?);
        copy_sparse(content, &file, size)?;
        self.owner_and_mode(parent, name, item)?;
        attributes(&file, item)?;
        self.time(parent, name, item.mtime)?;
        Ok(())
    }

    fn hard_link(&self, target: &[Vec<u8>], parent: &Parent, name: &CString) -> Result<(), Fault> {
        let missing = || Fault::Layer("a hard link to what this layer does not have before it".to_owned());
        let (last, above) = target.split_last().ok_or_else(missing)?;
        let above = match self.root.open(above) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Err(missing()),
            done => done?,
        };
        let last = text(last)?;
        let stat = above.stat(&last)?.ok_or_else(missing)?;
        match SFlag::from_bits_truncate(stat.st_mode & libc_kind()) {
            SFlag::S_IFREG | SFlag::S_IFLNK | SFlag::S_IFIFO => {}
            _ => return Err(missing()),
        }
        Ok(linkat(&above, last.as_c_str(), parent, name.as_c_str(), AtFlags::empty())?)
    }

    fn owner_and_mode(&self, parent: &Parent, name: &std::ffi::CStr, item: &Item) -> Result<(), Fault> {
        if self.owners == Owners::AsInTar {
            let (uid, gid) = (Uid::from_raw(item.uid), Gid::from_raw(item.gid));
            fchownat(parent, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        }
        if !matches!(item.kind, Kind::Symlink(_)) {
            // An ordinary user must be able to read and remove what is unpacked.
            let least = match (self.owners, &item.kind) {
                (Owners::Own, Kind::Dir) => 0o700,
                (Owners::Own, _) => 0o400,
                (Owners::AsInTar, _) => 0,
            };
            let mode = Mode::from_bits_truncate(item.mode | least);
            // The name was made just now, and is no link.
            fchmodat(parent, name, mode, FchmodatFlags::FollowSymlink)?;
        }
        Ok(())
    }

    fn time_later(&mut self, item: &Item) -> Result<(), Fault> {
        self.newest_s = self.newest_s.max(item.mtime.0);
        self.pending_bytes += 64 + item.path.iter().map(|name| name.len() + 24).sum::<usize>();
        if self.pending_bytes > MOST_PENDING_BYTES {
            let most = MOST_PENDING_BYTES as u64;
            return Err(Fault::Host(UnpackError::TooLarge { what: "bytes of directories' names", most }));
        }
        self.pending.push(Pending { path: item.path.clone(), mtime: item.mtime });
        Ok(())
    }

    fn time(&mut self, parent: &Parent, name: &std::ffi::CStr, mtime: (i64, u32)) -> Result<(), Errno> {
        self.newest_s = self.newest_s.max(mtime.0);
        let time = TimeSpec::new(mtime.0, mtime.1.into());
        utimensat(parent, name, &time, &time, UtimensatFlags::NoFollowSymlink)
    }

    /// Sets the times of directories.
    fn finish(&mut self) -> Result<(), UnpackError> {
        for Pending { path, mtime } in std::mem::take(&mut self.pending) {
            let set = |tree: &mut Self| {
                let dir = tree.root.open(&path)?;
                tree.time(&dir, c".", mtime)
            };
            match set(self) {
                // A later entry put something else in its place.
                Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                done => done.map_err(|e| UnpackError::host("set the time of a directory", e))?,
            }
        }
        Ok(())
    }
}

/// Sets the extended attributes that a layer may bring.
fn attributes(file: &File, item: &Item) -> Result<(), Fault> {
    use xattr::FileExt as _;
    for (name, value) in &item.xattrs {
        let name = std::ffi::OsStr::from_bytes(name);
        match file.set_xattr(name, value) {
            Ok(()) => {}
            Err(e) => match Errno::from_raw(e.raw_os_error().unwrap_or(0)) {
                // A file system without them still serves.
                Errno::EOPNOTSUPP => {}
                Errno::E2BIG | Errno::ERANGE | Errno::ENOSPC => {
                    return Err(Fault::Layer("an attribute that this file system cannot hold".to_owned()));
                }
                other => return Err(other.into()),
            },
        }
    }
    Ok(())
}

/// Copies a file; runs of zeros become holes.
fn copy_sparse(content: &mut impl Read, mut file: &File, size: u64) -> Result<(), Fault> {
    let mut buffer = vec![0; 64 << 10];
    let mut left = size;
    let host = |e: io::Error| Fault::Host(UnpackError::host("write to the layer store", e));
    while left > 0 {
        let most = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let count = match content.read(&mut buffer[..most]) {
            Ok(0) => return Err(Fault::Read(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Fault::Read(e)),
        };
        left -= count as u64;
        let piece = &buffer[..count];
        if count >= 4096 && piece.iter().all(|byte| *byte == 0) {
            file.seek(SeekFrom::Current(i64::try_from(count).unwrap_or(0))).map_err(host)?;
        } else {
            file.write_all(piece).map_err(host)?;
        }
    }
    file.set_len(size).map_err(host)
}

#[cfg(test)]
mod tests;
