//! The archive of a job's outputs: a tar, compressed by zstd, in a file without a name.
//!
//! The same files make the same bytes: entries in the walk's order, owners as inside the sandbox,
//! times in whole seconds.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek as _, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use hutch_sandbox_sys::mount::{RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, open_beneath};
use nix::sys::stat::fstat;
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};

use super::walk::Entry;

/// zstd's own default is 3; 1 is about three times as fast for a little more size.
const LEVEL: i32 = 1;

/// Writes on and hashes what it writes.
pub(super) struct Hashing<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W> Hashing<W> {
    pub(super) fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new(), bytes: 0 }
    }

    /// What it wrote to, the digest and the size of what was written.
    pub(super) fn finish(self) -> (W, [u8; 32], u64) {
        (self.inner, self.hash.finalize().into(), self.bytes)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Reads on and hashes what it reads.
struct HashingReader<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(bytes)?;
        self.hash.update(&bytes[..count]);
        Ok(count)
    }
}

type Stream = tar::Builder<zstd::Encoder<'static, Hashing<BufWriter<File>>>>;

/// An archive that is being written.
pub(super) struct ArchiveWriter {
    stream: Stream,
    left: u64,
    entries: u64,
}

impl ArchiveWriter {
    /// An archive of at most this many bytes of files, in a directory that has room for it.
    pub(super) fn new(dir: &Path, most: u64) -> io::Result<Self> {
        let hashing = Hashing::new(BufWriter::new(unnamed(dir)?));
        Ok(Self { stream: tar::Builder::new(zstd::Encoder::new(hashing, LEVEL)?), left: most, entries: 0 })
    }

    /// Adds a regular file and returns its hash; none if it does not fit.
    pub(super) fn add_file(&mut self, entry: &Entry) -> io::Result<Option<[u8; 32]>> {
        let Some((file, size)) = open_file(entry)? else { return Ok(None) };
        if size > self.left {
            return Ok(None);
        }
        self.left -= size;
        let mut header = header(entry, EntryType::Regular);
        header.set_size(size);
        let mut reader = HashingReader { inner: file.take(size), hash: Sha256::new() };
        let added = self.stream.append_data(&mut header, inner_path(entry), &mut reader);
        Ok(self.count(added)?.then(|| reader.hash.finalize().into()))
    }

    /// Adds a directory; false if it cannot be in a tar.
    pub(super) fn add_dir(&mut self, entry: &Entry) -> io::Result<bool> {
        let mut header = header(entry, EntryType::Directory);
        let added = self.stream.append_data(&mut header, inner_path(entry), io::empty());
        self.count(added)
    }

    /// Adds a symbolic link, as it is; false if it cannot be in a tar.
    pub(super) fn add_link(&mut self, entry: &Entry, target: &[u8]) -> io::Result<bool> {
        use std::os::unix::ffi::OsStrExt as _;
        let mut header = header(entry, EntryType::Symlink);
        let target = std::ffi::OsStr::from_bytes(target);
        let added = self.stream.append_link(&mut header, inner_path(entry), target);
        self.count(added)
    }

    /// Whether an entry is in the archive now. The builder refuses a header that it cannot write, such as one for a long
    /// name that it cuts within a character, before it writes any of it.
    fn count(&mut self, added: io::Result<()>) -> io::Result<bool> {
        match added {
            Ok(()) => {
                self.entries += 1;
                Ok(true)
            }
            Err(e) if e.raw_os_error().is_none() => {
                tracing::debug!(error = %e, "an output is left out of the archive");
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// The finished archive, its hash and size; none if it is empty.
    pub(super) fn finish(self) -> io::Result<Option<(File, [u8; 32], u64)>> {
        if self.entries == 0 {
            return Ok(None);
        }
        let (inner, hash, bytes) = self.stream.into_inner()?.finish()?.finish();
        let mut file = inner.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.rewind()?;
        Ok(Some((file, hash, bytes)))
    }
}

/// A new file without a name, in a directory that has room for it: O_TMPFILE of open(2).
pub(super) fn unnamed(dir: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(dir)
}

/// Opens a regular file of the walk for reading, and nothing else; its size.
pub(super) fn open_file(entry: &Entry) -> io::Result<Option<(File, u64)>> {
    let flags = libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS;
    let file = open_beneath(entry.parent.as_fd(), &entry.name, flags, 0, resolve)?;
    let stat = fstat(&file)?;
    let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
    Ok((stat.st_mode & libc::S_IFMT == libc::S_IFREG).then(|| (File::from(file), size)))
}

/// The path as a tar has it: without the slash in front.
fn inner_path(entry: &Entry) -> &Path {
    use std::os::unix::ffi::OsStrExt as _;
    Path::new(std::ffi::OsStr::from_bytes(entry.path.strip_prefix(b"/").unwrap_or(&entry.path)))
}

fn header(entry: &Entry, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_mode(entry.stat.st_mode & 0o7777);
    header.set_mtime(u64::try_from(entry.stat.st_mtime).unwrap_or(0));
    // Ranges of ids begin at multiples of 65,536: the low half is the id inside.
    header.set_uid(u64::from(entry.stat.st_uid & 0xffff));
    header.set_gid(u64::from(entry.stat.st_gid & 0xffff));
    header
}
