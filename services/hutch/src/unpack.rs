//! Unpacks what a job left into a directory of the caller's.
//!
//! The archive was written by hutch, but what is in it by a job: nothing of it may land outside, no
//! link may point outside, and no bit but plain permissions is kept. What cannot be unpacked is left out and named.

use std::error::Error;
use std::fs;
use std::io::{self, Read};
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
        let done = match refused(&entry, directory) {
            Some(why) => Err(why.to_owned()),
            None => match entry.unpack_in(directory) {
                Ok(true) => Ok(()),
                Ok(false) => Err("it would land outside".to_owned()),
                // The job's own doing, such as a name that is too long, must not hide how the job ended.
                Err(error) => Err(root_of(&error)),
            },
        };
        match done {
            Ok(()) => unpacked.entries += 1,
            Err(why) => unpacked.skipped.push(format!("{name}: {why}")),
        }
    }
    Ok(unpacked)
}

/// What the system said, without the names that lead to it.
fn root_of(error: &io::Error) -> String {
    let mut root: &dyn Error = error;
    while let Some(source) = root.source() {
        root = source;
    }
    format!("it cannot be unpacked: {root}")
}

/// Why an entry is left out; none if it is not.
fn refused(entry: &Entry<'_, impl Read>, directory: &Path) -> Option<&'static str> {
    let path = entry.path().ok()?;
    if behind_a_link(directory, &path) {
        return Some("it lies behind a symbolic link");
    }
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

/// Whether the way to an entry goes through a symbolic link: then it is elsewhere than its path says, and so would be
/// what a relative link there points to.
fn behind_a_link(directory: &Path, path: &Path) -> bool {
    let mut place = directory.to_owned();
    let parents = path.parent().into_iter().flat_map(Path::components);
    for parent in parents.filter(|part| matches!(part, Component::Normal(_))) {
        place.push(parent);
        if fs::symlink_metadata(&place).is_ok_and(|meta| meta.is_symlink()) {
            return true;
        }
    }
    false
}

/// Whether a symbolic link at `path` can reach what is not below the archive's root. A `..` after a name is taken
/// for a way out: the name may be a link, and then `..` is not where the text says.
fn leads_out(path: &Path, target: &Path) -> bool {
    let plain = |component: &Component<'_>| matches!(component, Component::Normal(_));
    let mut depth = path.components().filter(plain).count().saturating_sub(1);
    let mut named = false;
    for component in target.components() {
        match component {
            Component::Normal(_) => named = true,
            Component::CurDir => {}
            Component::ParentDir if depth > 0 && !named => depth -= 1,
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
        let unpacked = unpack(&archive[..], inner.path()).expect("unpacked");
        assert_eq!((unpacked.entries, unpacked.skipped.len()), (0, 1));
        assert!(unpacked.skipped[0].starts_with("d/evil: "), "{:?}", unpacked.skipped);
        assert_eq!(fs::read_dir(outer.path()).expect("outer").count(), 0);
    }

    #[test]
    fn no_link_leads_out_through_another() {
        let mut builder = Builder::new(Vec::new());
        for (name, target) in [
            ("a/b/c/d", "../../.."),
            ("e", "a/b/c/d/../../../etc/hostname"),
            ("f", "./a/../../x"),
            ("a/b/up", "../../top"),
            ("s", "a"),
            ("s/b/c/far", "../../../../x"),
        ] {
            builder.append_link(&mut header(EntryType::Symlink, 0o777, 0), name, target).expect("append");
        }
        let archive = zstd::encode_all(&builder.into_inner().expect("tar")[..], 0).expect("zstd");
        let inner = tempfile::tempdir().expect("inner");
        let unpacked = unpack(&archive[..], inner.path()).expect("unpacked");
        assert_eq!(unpacked.skipped.len(), 3, "{:?}", unpacked.skipped);
        for (name, there) in [
            ("a/b/c/d", true),
            ("e", false),
            ("f", false),
            ("a/b/up", true),
            ("s", true),
            ("a/b/c/far", false),
        ] {
            assert_eq!(inner.path().join(name).symlink_metadata().is_ok(), there, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_unpacked_is_left_out_and_the_rest_is_there() {
        let mut builder = Builder::new(Vec::new());
        let deep = vec!["d".repeat(200); 25].join("/");
        for name in [deep, "n".repeat(300), "fine".to_owned()] {
            builder.append_data(&mut header(EntryType::Regular, 0o644, 2), name, &b"hi"[..]).expect("append");
        }
        let archive = zstd::encode_all(&builder.into_inner().expect("tar")[..], 0).expect("zstd");
        let inner = tempfile::tempdir().expect("inner");
        let unpacked = unpack(&archive[..], inner.path()).expect("unpacked");
        assert_eq!(fs::read(inner.path().join("fine")).expect("fine"), b"hi");
        assert_eq!((unpacked.entries, unpacked.skipped.len()), (1, 2));
        assert!(unpacked.skipped.iter().all(|why| why.contains("too long")), "{:?}", unpacked.skipped);
    }
}
