//! Unpacks what a job left into a directory of the caller's.
//!
//! The archive was written by hutch, but what is in it by a job: nothing of it may land outside, no
//! link may point outside, and no bit but plain permissions is kept.

use std::fs;
use std::io::Read;
use std::path::{Component, Path};

use anyhow::Context;
use tar::{Archive, Entry, EntryType};

/// What became of an archive.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// How many entries are there now.
    pub(crate) entries: u64,
    /// What was left out, and why.
    pub(crate) skipped: Vec<String>,
}

/// Unpacks a compressed archive into this directory, which is made if it is missing.
pub(crate) fn unpack(archive: impl Read, directory: &Path) -> anyhow::Result<Unpacked> {
    fs::create_dir_all(directory).with_context(|| format!("{} cannot be made", directory.display()))?;
    let plain = zstd::Decoder::new(archive).context("the archive cannot be read")?;
    let mut archive = Archive::new(plain);
    archive.set_preserve_permissions(false);
    archive.set_preserve_ownerships(false);
    archive.set_unpack_xattrs(false);
    archive.set_mask(0o7000);
    let mut unpacked = Unpacked::default();
    for entry in archive.entries().context("the archive cannot be read")? {
        let mut entry = entry.context("the archive is damaged")?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let done = match refused(&entry) {
            Some(why) => Err(why),
            None => match entry.unpack_in(directory) {
                Ok(true) => Ok(()),
                Ok(false) => Err("it would land outside"),
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("`{}` cannot be unpacked", crate::term::safe(&name)));
                }
            },
        };
        match done {
            Ok(()) => unpacked.entries += 1,
            Err(why) => unpacked.skipped.push(format!("{name}: {why}")),
        }
    }
    Ok(unpacked)
}

/// Why an entry is left out; none if it is not.
fn refused(entry: &Entry<'_, impl Read>) -> Option<&'static str> {
    let path = entry.path().ok()?;
    let target = entry.link_name().ok().flatten();
    match entry.header().entry_type() {
        EntryType::Regular | EntryType::Directory | EntryType::GNUSparse | EntryType::Continuous => None,
        EntryType::Symlink if target.is_none_or(|target| leads_out(&path, &target)) => {
            Some("a symbolic link that leads outside")
        }
        EntryType::Symlink | EntryType::Link => None,
        _ => Some("neither a file, a directory nor a link"),
    }
}

/// Whether a symbolic link at `path` can reach what is not below the archive's root.
fn leads_out(path: &Path, target: &Path) -> bool {
    let plain = |component: &Component<'_>| matches!(component, Component::Normal(_));
    let mut depth = path.components().filter(plain).count().saturating_sub(1);
    for component in target.components() {
        match component {
            Component::Normal(_) => depth += 1,
            Component::CurDir => {}
            Component::ParentDir if depth > 0 => depth -= 1,
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return true,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tar::{Builder, Header};

    use super::*;

    fn header(kind: EntryType, mode: u32, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header
    }

    /// A header whose name is what a careful builder would refuse.
    fn forged(name: &str, mut header: Header) -> Header {
        header.as_gnu_mut().expect("gnu").name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        header
    }

    #[test]
    fn nothing_lands_outside() {
        let mut builder = Builder::new(Vec::new());
        builder.append_data(&mut header(EntryType::Regular, 0o4755, 2), "box/a", &b"hi"[..]).expect("append");
        builder
            .append(&forged("../evil", header(EntryType::Regular, 0o644, 4)), &b"evil"[..])
            .expect("append");
        builder.append(&forged("/abs", header(EntryType::Regular, 0o644, 4)), &b"evil"[..]).expect("append");
        for (name, target) in [("box/out", "../../x"), ("box/abs", "/etc"), ("box/in", "../box/a")] {
            builder.append_link(&mut header(EntryType::Symlink, 0o777, 0), name, target).expect("append");
        }
        builder
            .append_data(&mut header(EntryType::Regular, 0o644, 4), "box/out/evil", &b"evil"[..])
            .expect("append");
        builder.append_data(&mut header(EntryType::Fifo, 0o644, 0), "box/fifo", &b""[..]).expect("append");
        let archive = zstd::encode_all(&builder.into_inner().expect("tar")[..], 0).expect("zstd");

        let outer = tempfile::tempdir().expect("directory");
        let inner = outer.path().join("inner");
        let unpacked = unpack(&archive[..], &inner).expect("unpacked");
        assert_eq!(fs::read(inner.join("box/a")).expect("a"), b"hi");
        assert_eq!(fs::metadata(inner.join("box/a")).expect("a").permissions().mode() & 0o7000, 0);
        assert_eq!(fs::read_dir(outer.path()).expect("outer").count(), 1, "only `inner`");
        assert!(fs::symlink_metadata(inner.join("box/abs")).is_err());
        assert_eq!(fs::read(inner.join("box/in")).expect("in"), b"hi");
        assert_eq!(unpacked.skipped.len(), 4, "{:?}", unpacked.skipped);
    }

    #[test]
    fn a_link_that_was_there_before_is_not_followed_out() {
        let mut builder = Builder::new(Vec::new());
        builder
            .append_data(&mut header(EntryType::Regular, 0o644, 4), "d/evil", &b"evil"[..])
            .expect("append");
        let archive = zstd::encode_all(&builder.into_inner().expect("tar")[..], 0).expect("zstd");
        let (outer, inner) = (tempfile::tempdir().expect("outer"), tempfile::tempdir().expect("inner"));
        std::os::unix::fs::symlink(outer.path(), inner.path().join("d")).expect("link");
        let error = format!("{:#}", unpack(&archive[..], inner.path()).expect_err("outside"));
        assert!(error.contains("d/evil"), "{error}");
        assert_eq!(fs::read_dir(outer.path()).expect("outer").count(), 0);
    }
}
