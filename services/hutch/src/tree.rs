//! Trees that jobs made, of any depth: counted and removed.
//!
//! A job can nest directories deeper than a path is long or than a process has descriptors. So every step is taken
//! from the descriptor of a directory (openat(2)), two of them are open at one time, and nothing recurs. No symbolic
//! link is followed.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

const DIRECTORY: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// The bytes of all files below a directory; what cannot be read is not counted.
pub(crate) fn size(directory: &Path) -> u64 {
    let Ok(mut here) = open(nix::fcntl::AT_FDCWD, directory) else { return 0 };
    let Ok(level) = Level::read(&here) else { return 0 };
    let mut bytes = level.bytes;
    let mut levels = vec![level];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.directories.pop() {
            let below = open(&here, name.as_c_str()).and_then(|fd| Ok((Level::read(&fd)?, fd)));
            if let Ok((level, fd)) = below {
                bytes += level.bytes;
                levels.push(level);
                here = fd;
            }
            continue;
        }
        levels.pop();
        let Some(level) = levels.last() else { break };
        // A job that moves a directory meanwhile must not lead the count out of the tree.
        match open(&here, c"..") {
            Ok(above) if id_of(&above).is_ok_and(|id| id == level.id) => here = above,
            _ => break,
        }
    }
    bytes
}

/// Removes a directory with all that is in it. `pit` is an empty directory of the same file system; it is removed too.
///
/// Every directory goes into the pit under a new name before it is emptied, and so none is ever deep.
pub(crate) fn remove(directory: &Path, pit: &Path) -> io::Result<()> {
    fs::rename(directory, pit.join("0"))?;
    let pit_fd = open(nix::fcntl::AT_FDCWD, pit)?;
    let mut left = vec![0_u64];
    let mut made = 0;
    while let Some(number) = left.pop() {
        let name = number.to_string();
        let fd = open(&pit_fd, name.as_str())?;
        for entry in names(&fd)? {
            if kind_of(&stat(&fd, &entry)?) == SFlag::S_IFDIR {
                made += 1;
                renameat(&fd, entry.as_c_str(), &pit_fd, made.to_string().as_str())?;
                left.push(made);
            } else {
                unlinkat(&fd, entry.as_c_str(), UnlinkatFlags::NoRemoveDir)?;
            }
        }
        match unlinkat(&pit_fd, name.as_str(), UnlinkatFlags::RemoveDir) {
            Ok(()) => {}
            // A job that still runs put something there meanwhile: once more.
            Err(Errno::ENOTEMPTY) => left.push(number),
            Err(errno) => return Err(errno.into()),
        }
    }
    fs::remove_dir(pit)
}

/// One directory, as it was read.
struct Level {
    /// Device and inode.
    id: (u64, u64),
    bytes: u64,
    /// Those that are still to be looked into.
    directories: Vec<CString>,
}

impl Level {
    fn read(fd: &OwnedFd) -> nix::Result<Self> {
        let mut level = Self { id: id_of(fd)?, bytes: 0, directories: Vec::new() };
        for name in names(fd)? {
            let Ok(stat) = stat(fd, &name) else { continue };
            match kind_of(&stat) {
                SFlag::S_IFDIR => level.directories.push(name),
                SFlag::S_IFREG => level.bytes += u64::try_from(stat.st_size).unwrap_or(0),
                _ => {}
            }
        }
        Ok(level)
    }
}

fn open<P: ?Sized + nix::NixPath>(at: impl AsFd, path: &P) -> nix::Result<OwnedFd> {
    openat(at, path, DIRECTORY, Mode::empty())
}

/// What is in a directory, but for itself and the one above.
fn names(fd: &OwnedFd) -> nix::Result<Vec<CString>> {
    let own = |name: &CStr| matches!(name.to_bytes(), b"." | b"..");
    let mut directory = Dir::openat(fd, ".", DIRECTORY, Mode::empty())?;
    let mut names = Vec::new();
    for entry in directory.iter() {
        let entry = entry?;
        if !own(entry.file_name()) {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

fn stat(fd: &OwnedFd, name: &CStr) -> nix::Result<FileStat> {
    fstatat(fd, name, AtFlags::AT_SYMLINK_NOFOLLOW)
}

fn kind_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

fn id_of(fd: &OwnedFd) -> nix::Result<(u64, u64)> {
    fstat(fd).map(|stat| (stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::mkdirat;

    use super::*;

    /// So deep that neither a path nor the descriptors of a process reach its end, with a file at the end.
    fn deep(top: &Path, depth: u32) {
        fs::create_dir(top).expect("make");
        let mut here = open(nix::fcntl::AT_FDCWD, top).expect("open");
        for _ in 0..depth {
            mkdirat(&here, "d", Mode::S_IRWXU).expect("make");
            here = open(&here, "d").expect("open");
        }
        let file = openat(&here, "f", OFlag::O_CREAT | OFlag::O_WRONLY, Mode::S_IRWXU).expect("file");
        nix::unistd::write(&file, b"12345").expect("write");
    }

    #[test]
    fn a_tree_of_any_depth_is_counted_and_removed() {
        let home = tempfile::tempdir().expect("home");
        let outside = tempfile::tempdir().expect("outside");
        fs::write(outside.path().join("kept"), "x").expect("write");
        let (top, pit) = (home.path().join("top"), home.path().join("pit"));
        deep(&top, 20_000);
        fs::create_dir_all(top.join("wide/0")).expect("make");
        fs::write(top.join("wide/1"), "123").expect("write");
        std::os::unix::fs::symlink(outside.path(), top.join("wide/out")).expect("link");
        assert_eq!(size(&top), 8);
        fs::create_dir(&pit).expect("pit");
        remove(&top, &pit).expect("removed");
        assert_eq!(fs::read_dir(home.path()).expect("home").count(), 0);
        assert!(outside.path().join("kept").exists());
    }

    #[test]
    fn what_is_not_there_has_no_bytes() {
        assert_eq!(size(Path::new("/nowhere/at/all")), 0);
    }
}
