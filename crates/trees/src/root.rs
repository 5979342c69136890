//! A tree that is being made: every operation is below its root, by descriptors.
//!
//! The directory that an entry is in is resolved by openat2(2) with RESOLVE_IN_ROOT: links in it lead to what they
//! mean inside the tree, never out of it. The entry's own name is then used in that directory alone, and a link
//! of that name is never followed.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat, mkdirat, mknodat};
use nix::unistd::{UnlinkatFlags, unlinkat};

const OPEN_DIR: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

/// What marks a directory as opaque for an overlay that an administrator mounts, and for one of an ordinary user.
pub(crate) const OPAQUE: [&str; 2] = ["trusted.overlay.opaque", "user.overlay.opaque"];

/// The root of a tree.
#[derive(Debug)]
pub(crate) struct Root<'r>(BorrowedFd<'r>);

/// A directory of the tree that entries are made in.
#[derive(Debug)]
pub(crate) struct Parent(OwnedFd);

impl<'r> Root<'r> {
    pub(crate) fn new(dir: BorrowedFd<'r>) -> Self {
        Self(dir)
    }

    /// The directory of these names, each made if it is missing.
    pub(crate) fn parent(&self, names: &[Vec<u8>]) -> Result<Parent, Errno> {
        match self.open(names) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            done => return done,
        }
        for depth in 0..names.len() {
            match self.open(&names[..=depth]) {
                Ok(_) => {}
                Err(Errno::ENOENT | Errno::ENOTDIR) => {
                    let above = self.open(&names[..depth])?;
                    let name = text(&names[depth])?;
                    // What a layer deletes below and then has again hides what was there.
                    let hides = above.is_whiteout(&name)?;
                    if hides {
                        above.remove(&name)?;
                    }
                    mkdirat(&above, name.as_c_str(), Mode::from_bits_truncate(0o755))?;
                    if hides {
                        above.make_opaque(&name)?;
                    }
                }
                Err(e) => return Err(e),
            }
        }
        self.open(names)
    }

    /// The directory of these names.
    pub(crate) fn open(&self, names: &[Vec<u8>]) -> Result<Parent, Errno> {
        let mut path = names.join(&b'/');
        if path.is_empty() {
            path.push(b'.');
        }
        let how = OpenHow::new()
            .flags(OPEN_DIR)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        // EAGAIN: somebody renamed something, anywhere on the system, meanwhile.
        for _ in 0..8 {
            match openat2(self.0, text(&path)?.as_c_str(), how) {
                Err(Errno::EAGAIN) => {}
                done => return done.map(Parent),
            }
        }
        Err(Errno::EBUSY)
    }
}

impl AsFd for Parent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Parent {
    /// What is there under this name; none if nothing is.
    pub(crate) fn stat(&self, name: &CStr) -> Result<Option<FileStat>, Errno> {
        match fstatat(&self.0, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub(crate) fn is_whiteout(&self, name: &CStr) -> Result<bool, Errno> {
        let kind = |stat: FileStat| stat.st_mode & libc_kind() == SFlag::S_IFCHR.bits() && stat.st_rdev == 0;
        Ok(self.stat(name)?.is_some_and(kind))
    }

    /// Makes the mark of something deleted: mknod(2) of a device 0:0 needs no privilege.
    pub(crate) fn whiteout(&self, name: &CStr) -> Result<(), Errno> {
        mknodat(&self.0, name, SFlag::S_IFCHR, Mode::empty(), 0)
    }

    /// Marks a directory so that nothing below it in other layers is seen.
    pub(crate) fn make_opaque(&self, name: &CStr) -> Result<(), Errno> {
        use xattr::FileExt as _;
        let dir = std::fs::File::from(openat(&self.0, name, OPEN_DIR | OFlag::O_NOFOLLOW, Mode::empty())?);
        let set = |name: &str| dir.set_xattr(name, b"y");
        match OPAQUE.map(set) {
            [Ok(()), _] | [_, Ok(())] => Ok(()),
            [Err(e), _] => Err(Errno::from_raw(e.raw_os_error().unwrap_or(0))),
        }
    }

    /// Removes what is there under this name, a whole tree too; nothing there is fine.
    pub(crate) fn remove(&self, name: &CStr) -> Result<(), Errno> {
        match unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(Errno::EISDIR | Errno::EPERM) => {
                remove_dir(self.0.try_clone().map_err(|_| Errno::EMFILE)?, name)
            }
            Err(e) => Err(e),
        }
    }
}

/// Removes a directory and all below it: one step down or one removal at a time, with one directory open.
fn remove_dir(above: OwnedFd, name: &CStr) -> Result<(), Errno> {
    let mut here = above;
    let mut names = vec![name.to_owned()];
    while let Some(name) = names.last().cloned() {
        match unlinkat(&here, name.as_c_str(), UnlinkatFlags::RemoveDir) {
            Ok(()) => {
                names.pop();
                if !names.is_empty() {
                    here = openat(&here, c"..", OPEN_DIR | OFlag::O_NOFOLLOW, Mode::empty())?;
                }
            }
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => {
                let dir = openat(&here, name.as_c_str(), OPEN_DIR | OFlag::O_NOFOLLOW, Mode::empty())?;
                match empty_of_files(&dir)? {
                    Some(below) => {
                        here = dir;
                        names.push(below);
                    }
                    None => continue,
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Removes every file in a directory; the name of a directory in it, if there is one.
fn empty_of_files(dir: &OwnedFd) -> Result<Option<CString>, Errno> {
    let mut open = nix::dir::Dir::openat(dir, c".", OPEN_DIR, Mode::empty())?;
    for entry in open.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR | Errno::EPERM) => return Ok(Some(name.to_owned())),
            done => done?,
        }
    }
    Ok(None)
}

/// The bits of a mode that say what a file is.
pub(crate) fn libc_kind() -> u32 {
    SFlag::S_IFMT.bits()
}

/// A name for a system call.
pub(crate) fn text(name: &[u8]) -> Result<CString, Errno> {
    CString::new(name).map_err(|_| Errno::EINVAL)
}

/// Removes a tree of this name in a directory.
pub(crate) fn remove_tree(dir: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    Parent(openat(dir, c".", OPEN_DIR, Mode::empty())?).remove(name)
}
