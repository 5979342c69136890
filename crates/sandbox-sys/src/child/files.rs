//! Directories and files in the sandbox, by descriptors and without allocation: openat2(2).

use std::ffi::CStr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nix::sys::stat::{FileStat, Mode, fstat, mkdirat};

use crate::mount::{RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, open_beneath};
use crate::{Errno, Result};

/// Links are followed as inside the sandbox, but never those of proc(5).
pub(super) const RESOLVE: u64 = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS;

const MAX_PATH: usize = 4096;

/// Who owns what is made: as chown(2).
#[derive(Debug, Clone, Copy)]
pub(super) struct Owner {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// A path in a fixed space, cut at any of its slashes.
struct Prefixes {
    bytes: [u8; MAX_PATH],
    length: usize,
}

impl Prefixes {
    fn of(path: &CStr) -> Result<Self> {
        let from = path.to_bytes();
        let mut bytes = [0; MAX_PATH];
        bytes
            .get_mut(..from.len())
            .filter(|to| to.len() < MAX_PATH)
            .ok_or(Errno::ENAMETOOLONG)?
            .copy_from_slice(from);
        Ok(Self { bytes, length: from.len() })
    }

    /// Calls `visit` with every prefix that ends before a slash, then with the whole, and the place where the
    /// last part begins: never at a slash, since a name with one would be looked up from another root.
    fn each(&mut self, mut visit: impl FnMut(&CStr, usize) -> Result<()>) -> Result<()> {
        let mut last = self.bytes.iter().take_while(|byte| **byte == b'/').count();
        for end in last + 1..=self.length {
            if end < self.length && self.bytes[end] != b'/' {
                continue;
            }
            if self.bytes[end - 1] != b'/' {
                let kept = core::mem::replace(&mut self.bytes[end], 0);
                let prefix = CStr::from_bytes_until_nul(&self.bytes[..=end]).map_err(|_| Errno::EINVAL)?;
                visit(prefix, last)?;
                self.bytes[end] = kept;
            }
            last = end + 1;
        }
        Ok(())
    }
}

/// Opens a directory of the sandbox (O_PATH), making it and those above it where missing.
pub(super) fn make_directory(root: BorrowedFd<'_>, path: &CStr, mode: u32, owner: Owner) -> Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    match open_beneath(root, path, flags, 0, RESOLVE) {
        Err(Errno::ENOENT) => {}
        other => return other,
    }
    let mut here = open_beneath(root, c"/", flags, 0, RESOLVE)?;
    Prefixes::of(path)?.each(|prefix, last| {
        here = match open_beneath(root, prefix, flags, 0, RESOLVE) {
            Err(Errno::ENOENT) => {
                let name = prefix.to_bytes_with_nul().get(last..).ok_or(Errno::EINVAL)?;
                let name = CStr::from_bytes_with_nul(name).map_err(|_| Errno::EINVAL)?;
                if name.to_bytes().contains(&b'/') {
                    return Err(Errno::EINVAL);
                }
                make_one(here.as_fd(), name, mode, owner)?;
                let made = open_beneath(here.as_fd(), name, flags, 0, RESOLVE_NO_MAGICLINKS)?;
                change_owner(made.as_fd(), owner)?;
                made
            }
            other => other?,
        };
        Ok(())
    })?;
    Ok(here)
}

/// Makes one directory. On a mount that shows owners through the sandbox's ids there is no place for ours: there it is
/// made as the owner.
fn make_one(dir: BorrowedFd<'_>, name: &CStr, mode: u32, owner: Owner) -> Result<()> {
    let mode = Mode::from_bits_truncate(mode);
    match mkdirat(dir, name, mode) {
        Err(Errno::EOVERFLOW) => as_owner(owner, || mkdirat(dir, name, mode)),
        other => other,
    }
}

/// Does one thing with the file-system ids of another: setfsuid(2), which is for this thread alone and gives back
/// what it takes of capabilities.
fn as_owner<T>(owner: Owner, work: impl FnOnce() -> Result<T>) -> Result<T> {
    use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
    let (uid, gid) = (setfsuid(Uid::from_raw(u32::MAX)), setfsgid(Gid::from_raw(u32::MAX)));
    setfsgid(Gid::from_raw(owner.gid));
    setfsuid(Uid::from_raw(owner.uid));
    let done = work();
    setfsuid(uid);
    setfsgid(gid);
    done
}

/// Gives what is behind an O_PATH descriptor to an owner: fchownat(2).
pub(super) fn change_owner(file: BorrowedFd<'_>, owner: Owner) -> Result<()> {
    use nix::fcntl::AtFlags;
    use nix::unistd::{Gid, Uid, fchownat};
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    fchownat(file, c"", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)
}

/// The part of a path above its last slash, in a fixed space.
pub(super) fn make_parent(root: BorrowedFd<'_>, path: &CStr, owner: Owner) -> Result<()> {
    let bytes = path.to_bytes();
    let Some(end) = bytes.iter().rposition(|byte| *byte == b'/').filter(|end| *end > 0) else {
        return Ok(());
    };
    let mut space = [0_u8; MAX_PATH];
    space
        .get_mut(..end)
        .filter(|to| to.len() < MAX_PATH)
        .ok_or(Errno::ENAMETOOLONG)?
        .copy_from_slice(&bytes[..end]);
    let parent = CStr::from_bytes_until_nul(&space).map_err(|_| Errno::EINVAL)?;
    make_directory(root, parent, 0o755, owner).map(drop)
}

/// Opens a regular file, never blocking on a FIFO and never opening a device for use.
pub(super) fn open_regular(
    root: BorrowedFd<'_>,
    path: &CStr,
    flags: libc::c_int,
    mode: u32,
) -> Result<OwnedFd> {
    let file = open_beneath(root, path, flags | libc::O_NONBLOCK | libc::O_NOCTTY, mode, RESOLVE)?;
    if is_regular(&fstat(&file)?) { Ok(file) } else { Err(Errno::EINVAL) }
}

fn is_regular(stat: &FileStat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFREG
}

/// Reads a file into a fixed space; EFBIG if it does not fit.
pub(super) fn read_into(file: &OwnedFd, space: &mut [u8]) -> Result<usize> {
    let mut length = 0;
    loop {
        let rest = space.get_mut(length..).filter(|rest| !rest.is_empty()).ok_or(Errno::EFBIG)?;
        match nix::unistd::read(file, rest) {
            Ok(0) => return Ok(length),
            Ok(count) => length += count,
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Writes all bytes.
pub(super) fn write_all(file: &OwnedFd, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        match nix::unistd::write(file, bytes) {
            Ok(count) => bytes = bytes.get(count..).ok_or(Errno::EIO)?,
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Copies a part of one file to the end of another.
pub(super) fn copy_part(from: BorrowedFd<'_>, offset: u64, length: u64, to: &OwnedFd) -> Result<()> {
    let mut space = [0_u8; 32 << 10];
    let mut done = 0;
    while done < length {
        let want = usize::try_from(length - done).unwrap_or(usize::MAX).min(space.len());
        let at = libc::off_t::try_from(offset + done).map_err(|_| Errno::EINVAL)?;
        let part = space.get_mut(..want).ok_or(Errno::EINVAL)?;
        match nix::sys::uio::pread(from, part, at) {
            Ok(0) => return Err(Errno::EIO),
            Ok(count) => {
                write_all(to, part.get(..count).ok_or(Errno::EIO)?)?;
                done += count as u64;
            }
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(path: &CStr) -> Vec<(String, String)> {
        let mut all = Vec::new();
        Prefixes::of(path)
            .expect("short")
            .each(|prefix, last| {
                let text = prefix.to_str().expect("text");
                all.push((text.to_owned(), text[last..].to_owned()));
                Ok(())
            })
            .expect("visited");
        all
    }

    #[test]
    fn the_parts_of_a_path_are_names() {
        let pairs = |wanted: &[(&str, &str)]| -> Vec<(String, String)> {
            wanted.iter().map(|(prefix, name)| ((*prefix).to_owned(), (*name).to_owned())).collect()
        };
        assert_eq!(parts(c"/v"), pairs(&[("/v", "v")]));
        assert_eq!(parts(c"/a/bc/d"), pairs(&[("/a", "a"), ("/a/bc", "bc"), ("/a/bc/d", "d")]));
        assert_eq!(parts(c"proc"), pairs(&[("proc", "proc")]));
        assert_eq!(parts(c"//a//b/"), pairs(&[("//a", "a"), ("//a//b", "b")]));
        assert_eq!(parts(c"/"), pairs(&[]));
        assert_eq!(parts(c""), pairs(&[]));
    }
}
