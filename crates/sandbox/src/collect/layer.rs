//! What a job wrote, as a layer that other jobs can stack: a tar, compressed by zstd.
//!
//! The same changes make the same bytes: entries in the walk's order, owners as inside the sandbox, attributes sorted, and
//! no time later than one second after the newest file of the layers below. That second makes what a job wrote newer
//! than all that it was given, as `make` wants it, without saying when it ran; a job that sets SOURCE_DATE_EPOCH
//! (reproducible-builds.org) sets it itself.
//!
//! overlayfs' whiteouts and opaque directories become those of the OCI image specification (layer.md). Sockets, FIFOs
//! and devices are left out, as are names that would themselves be whiteouts.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Read as _, Seek as _, Write};
use std::os::fd::OwnedFd;

use hutch_proto::Digest;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use tar::{EntryType, Header};

use super::OWN;
use super::archive::{Hashing, open_file, unnamed};
use super::walk::{Entry, Kind, Walk};
use crate::config::EngineConfig;
use crate::plan::JobPlan;
use crate::prepare::Prepared;

/// zstd's own default.
const LEVEL: i32 = 3;
/// The latest time where no layer below says one: 2001-09-09.
const EARLIEST_S: i64 = 1_000_000_000;
/// The most attributes of one file, in bytes.
const MOST_XATTR_BYTES: usize = 64 << 10;

/// A layer that a job made.
#[derive(Debug)]
pub struct CommittedLayer {
    /// The digest of its uncompressed tar.
    pub diff_id: Digest,
    /// The digest of its compressed bytes.
    pub blob: Digest,
    /// How many compressed bytes there are.
    pub bytes: u64,
    /// Its compressed bytes, in a file without a name.
    pub file: File,
}

type Stream = Hashing<zstd::Encoder<'static, Hashing<BufWriter<File>>>>;

/// A layer that is being written.
struct LayerWriter {
    stream: tar::Builder<Stream>,
    left: u64,
    latest_s: i64,
    /// Files with several names: where each was first.
    linked: HashMap<u64, Vec<u8>>,
}

/// Makes a layer of all that a job wrote; none if it is more than the config allows.
pub(super) fn commit(
    plan: &JobPlan,
    prepared: &Prepared,
    config: &EngineConfig,
) -> io::Result<Option<CommittedLayer>> {
    let below_s = prepared.newest_s.saturating_add(1).max(EARLIEST_S);
    let compressed = Hashing::new(BufWriter::new(unnamed(&config.data_dir)?));
    let mut writer = LayerWriter {
        stream: tar::Builder::new(Hashing::new(zstd::Encoder::new(compressed, LEVEL)?)),
        left: config.max_layer_bytes,
        latest_s: plan.commit_time_s.unwrap_or(below_s),
        linked: HashMap::new(),
    };
    for upper in &prepared.scratch.uppers {
        let mut walk = Walk::new(&upper.dir, &upper.prefix)?;
        while let Some(entry) = walk.next()? {
            if is_own(&entry.path) || entry.name.to_bytes().starts_with(b".wh.") {
                continue;
            }
            if !writer.add(&entry)? {
                return Ok(None);
            }
        }
        if walk.was_cut() {
            return Ok(None);
        }
    }
    writer.finish().map(Some)
}

fn is_own(path: &[u8]) -> bool {
    OWN.iter()
        .any(|own| path.strip_prefix(own.as_bytes()).is_some_and(|rest| matches!(rest, [] | [b'/', ..])))
}

impl LayerWriter {
    /// Adds an entry; false if it does not fit.
    fn add(&mut self, entry: &Entry) -> io::Result<bool> {
        let path = entry.path.strip_prefix(b"/").unwrap_or(&entry.path);
        match &entry.kind {
            Kind::File => return self.file(entry, path),
            Kind::Dir => {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let dir: OwnedFd = openat(&entry.parent, entry.name.as_c_str(), flags, Mode::empty())?;
                self.attributes(&File::from(dir))?;
                let mut path = path.to_vec();
                path.push(b'/');
                self.append(self.header(entry, EntryType::Directory), &path, b"", io::empty())?;
                if entry.opaque {
                    path.extend_from_slice(b".wh..wh..opq");
                    self.append(mark(), &path, b"", io::empty())?;
                }
            }
            Kind::Symlink(target) => {
                self.append(self.header(entry, EntryType::Symlink), path, target, io::empty())?;
            }
            Kind::Deleted => {
                let split = path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
                let marked = [&path[..split], b".wh.", &path[split..]].concat();
                self.append(mark(), &marked, b"", io::empty())?;
            }
            Kind::Special => {}
        }
        Ok(true)
    }

    fn file(&mut self, entry: &Entry, path: &[u8]) -> io::Result<bool> {
        let Some((file, size)) = open_file(entry)? else { return Ok(true) };
        if entry.stat.st_nlink > 1 {
            if let Some(first) = self.linked.get(&entry.stat.st_ino).cloned() {
                self.append(self.header(entry, EntryType::Link), path, &first, io::empty())?;
                return Ok(true);
            }
            self.linked.insert(entry.stat.st_ino, path.to_vec());
        }
        if size > self.left {
            return Ok(false);
        }
        self.left -= size;
        self.attributes(&file)?;
        let mut header = self.header(entry, EntryType::Regular);
        header.set_size(size);
        self.append(header, path, b"", file.take(size))?;
        Ok(true)
    }

    /// Writes the extended attributes that a layer keeps, ahead of the entry that has them.
    fn attributes(&mut self, file: &File) -> io::Result<()> {
        use std::os::unix::ffi::OsStrExt as _;
        use xattr::FileExt as _;
        let mut names: Vec<_> = file.list_xattr()?.collect();
        names.sort();
        let mut records = Vec::new();
        for name in names {
            let kept =
                name.as_bytes().starts_with(b"user.") && !name.as_bytes().starts_with(b"user.overlay.");
            if let (true, Some(value)) = (kept, file.get_xattr(&name)?)
                && records.len() + value.len() < MOST_XATTR_BYTES
            {
                records.extend(pax_record(&[b"SCHILY.xattr.", name.as_bytes()].concat(), &value));
            }
        }
        if records.is_empty() {
            return Ok(());
        }
        let mut header = blank(EntryType::XHeader);
        header.set_size(records.len() as u64);
        self.append(header, b"././@PaxHeader", b"", records.as_slice())
    }

    fn header(&self, entry: &Entry, kind: EntryType) -> Header {
        let mut header = blank(kind);
        header.set_mode(entry.stat.st_mode & 0o7777);
        header.set_mtime(u64::try_from(entry.stat.st_mtime.min(self.latest_s)).unwrap_or(0));
        // Ranges of ids begin at multiples of 65,536: the low half is the id inside.
        header.set_uid(u64::from(entry.stat.st_uid & 0xffff));
        header.set_gid(u64::from(entry.stat.st_gid & 0xffff));
        header
    }

    /// Writes an entry, names of any bytes and length: a long one goes ahead in a header of its own, as GNU tar does.
    fn append(
        &mut self,
        mut header: Header,
        path: &[u8],
        link: &[u8],
        content: impl io::Read,
    ) -> io::Result<()> {
        for (name, kind) in [(link, EntryType::GNULongLink), (path, EntryType::GNULongName)] {
            if name.len() > 100 {
                let mut long = blank(kind);
                long.set_size(name.len() as u64 + 1);
                set_names(&mut long, b"././@LongLink", b"");
                self.stream.append(&long, name.chain(&[0][..]))?;
            }
        }
        set_names(&mut header, path, link);
        self.stream.append(&header, content)
    }

    fn finish(self) -> io::Result<CommittedLayer> {
        let (encoder, diff_id, _) = self.stream.into_inner()?.finish();
        let (buffered, blob, bytes) = encoder.finish()?.finish();
        let mut file = buffered.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.flush()?;
        file.rewind()?;
        Ok(CommittedLayer {
            diff_id: Digest::from_sha256(diff_id),
            blob: Digest::from_sha256(blob),
            bytes,
            file,
        })
    }
}

/// A header with nothing in it.
fn blank(kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

/// The header of a whiteout.
fn mark() -> Header {
    blank(EntryType::Regular)
}

/// Puts names into a header, as much of them as it holds.
fn set_names(header: &mut Header, path: &[u8], link: &[u8]) {
    let old = header.as_old_mut();
    for (field, name) in [(&mut old.name, path), (&mut old.linkname, link)] {
        let length = name.len().min(field.len());
        field.fill(0);
        field[..length].copy_from_slice(&name[..length]);
    }
    header.set_cksum();
}

/// A record of a PAX header: `LENGTH KEY=VALUE\n`, the length counting itself.
fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_its_own_length() {
        assert_eq!(pax_record(b"path", b"abc"), b"12 path=abc\n");
        let value = vec![b'x'; 91];
        let record = pax_record(b"k", &value);
        assert_eq!(record.len().to_string().as_bytes(), &record[..record.len().to_string().len()]);
    }

    #[test]
    fn the_sandboxs_own_places_are_left_out() {
        assert!(is_own(b"/dev") && is_own(b"/proc/x"));
        assert!(!is_own(b"/device") && !is_own(b"/usr/dev"));
    }
}
