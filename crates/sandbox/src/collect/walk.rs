//! A walk over an upper directory: iterative, by descriptors, of any depth.
//!
//! Only one directory is open at a time; the way back up is `..`, which nobody can change any
//! more, since the tree is dead. overlayfs marks what was deleted by a character device 0:0, and what was only
//! copied up by an xattr (Documentation/filesystems/overlayfs.rst).

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use hutch_sandbox_sys::mount::has_xattr;
use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstatat};

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Dir,
    Symlink(Vec<u8>),
    Deleted,
    Special,
}

impl Kind {
    /// Bytes of a symbolic link's target.
    pub(super) fn target_bytes(&self) -> usize {
        match self {
            Self::Symlink(target) => target.len(),
            _ => 0,
        }
    }
}

/// One entry of an upper directory.
#[derive(Debug)]
pub(super) struct Entry {
    /// Path in the sandbox, with a slash in front.
    pub(super) path: Vec<u8>,
    pub(super) stat: FileStat,
    pub(super) kind: Kind,
    /// A directory that is there only to hold a change below it.
    pub(super) only_holds: bool,
    /// A directory that hides all that the layers below have in it.
    pub(super) opaque: bool,
    /// The directory that it is in, and its name there.
    pub(super) parent: OwnedFd,
    pub(super) name: CString,
}

impl Entry {
    /// The path as text; bytes that are not UTF-8 and control characters are shown as `\xNN`.
    pub(super) fn shown_path(&self) -> String {
        let mut shown = String::with_capacity(self.path.len());
        for chunk in self.path.utf8_chunks() {
            for letter in chunk.valid().chars() {
                if letter.is_control() {
                    shown.extend(letter.to_string().bytes().map(|byte| format!("\\x{byte:02x}")));
                } else {
                    shown.push(letter);
                }
            }
            shown.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
        }
        shown
    }
}

/// Names in one directory that are still to be seen, and how long its path is.
struct Level {
    names: Vec<CString>,
    path_length: usize,
}

/// The walk; directories come before what is in them, names in order.
pub(super) struct Walk {
    here: OwnedFd,
    levels: Vec<Level>,
    path: Vec<u8>,
    /// Something was passed over.
    cut: bool,
}

/// The longest path that is looked at: PATH_MAX, beyond which no program finds it by one name either.
const MAX_PATH: usize = 4096;

const OPEN_DIR: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

impl Walk {
    /// A walk of this directory, whose place in the sandbox is `prefix`.
    pub(super) fn new(upper: &OwnedFd, prefix: &str) -> io::Result<Self> {
        let here = openat(upper, c".", OPEN_DIR, Mode::empty())?;
        let names = names(&here)?;
        let path = prefix.as_bytes().to_vec();
        Ok(Self { here, levels: vec![Level { names, path_length: path.len() }], path, cut: false })
    }

    /// Whether something was passed over: a path that is too long, or what went away meanwhile.
    pub(super) fn was_cut(&self) -> bool {
        self.cut
    }

    /// The next entry; none at the end.
    pub(super) fn next(&mut self) -> io::Result<Option<Entry>> {
        loop {
            let Some(level) = self.levels.last_mut() else { return Ok(None) };
            self.path.truncate(level.path_length);
            let Some(name) = level.names.pop() else {
                self.levels.pop();
                if !self.levels.is_empty() {
                    self.here = openat(&self.here, c"..", OPEN_DIR, Mode::empty())?;
                }
                continue;
            };
            self.path.push(b'/');
            self.path.extend_from_slice(name.to_bytes());
            if self.path.len() > MAX_PATH {
                self.cut = true;
                continue;
            }
            match self.visit(name) {
                Ok(entry) => return Ok(Some(entry)),
                // The tree is dead, but may have passed a descriptor of it to another, over a socket in a volume.
                Err(e) if e.kind() == io::ErrorKind::NotFound => self.cut = true,
                Err(e) => return Err(e),
            }
        }
    }

    /// The entry of this name here, and down into it if it is a directory.
    fn visit(&mut self, name: CString) -> io::Result<Entry> {
        let parent = self.here.try_clone()?;
        let stat = fstatat(&self.here, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let kind = self.kind(&name, &stat)?;
        let (mut only_holds, mut opaque) = (false, false);
        if kind == Kind::Dir {
            let dir = openat(&self.here, name.as_c_str(), OPEN_DIR, Mode::empty())?;
            only_holds = has_xattr(dir.as_fd(), c"trusted.overlay.origin");
            opaque = has_xattr(dir.as_fd(), c"trusted.overlay.opaque");
            self.levels.push(Level { names: names(&dir)?, path_length: self.path.len() });
            self.here = dir;
        }
        Ok(Entry { path: self.path.clone(), stat, kind, only_holds, opaque, parent, name })
    }

    fn kind(&self, name: &CStr, stat: &FileStat) -> io::Result<Kind> {
        Ok(match stat.st_mode & libc::S_IFMT {
            libc::S_IFREG => Kind::File,
            libc::S_IFDIR => Kind::Dir,
            libc::S_IFLNK => {
                use std::os::unix::ffi::OsStringExt as _;
                Kind::Symlink(readlinkat(&self.here, name)?.into_vec())
            }
            libc::S_IFCHR if stat.st_rdev == 0 => Kind::Deleted,
            _ => Kind::Special,
        })
    }
}

/// The names in a directory, last first, so that popping gives them in order.
fn names(dir: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut open = Dir::openat(dir.as_fd(), c".", OPEN_DIR, Mode::empty())?;
    let mut names = Vec::new();
    for entry in open.iter() {
        let name = entry?.file_name().to_owned();
        if !matches!(name.as_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    names.sort_by(|a, b| b.cmp(a));
    Ok(names)
}
