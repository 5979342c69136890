//! The launcher's own file system: one small tmpfs, and a tree of devices.
//!
//! A sandbox's mount namespace begins as a copy of the launcher's, and copying costs by the mount;
//! so the launcher keeps two. `/l/N` is where layers are attached, `/s` where the scratch file
//! system, `/n` where the new root, `/t` where a tree that goes into it; `/p` and `/d` are where each init prepares its own /proc and /dev;
//! `/e` is empty; `/dev` is the device tree, made once and shown to every sandbox read-only.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknodat};
use nix::unistd::{fchdir, mkdir, pivot_root, symlinkat};

use crate::mount::{NOEXEC, NOSUID, NewFilesystem, RDONLY, attach, clone_tree, restrict};
use crate::{Errno, Result};

/// How many layers can be attached at one time, upper parts of the host layer among them.
pub(crate) const LAYER_PLACES: usize = 128;

/// Where a tree of programs is mounted before it is moved into the new root.
pub(crate) const TREE: &CStr = c"/t";

/// The character devices of a sandbox: name, major, minor.
const DEVICES: [(&CStr, u64, u64); 6] = [
    (c"null", 1, 3),
    (c"zero", 1, 5),
    (c"full", 1, 7),
    (c"random", 1, 8),
    (c"urandom", 1, 9),
    (c"tty", 5, 0),
];

/// The links in `/dev`.
const LINKS: [(&CStr, &CStr); 5] = [
    (c"/proc/self/fd", c"fd"),
    (c"/proc/self/fd/0", c"stdin"),
    (c"/proc/self/fd/1", c"stdout"),
    (c"/proc/self/fd/2", c"stderr"),
    (c"pts/ptmx", c"ptmx"),
];

/// What of the old file system stays reachable.
#[derive(Debug)]
pub(crate) struct OldRoot {
    /// The host's `/proc`.
    pub(crate) proc_dir: OwnedFd,
}

/// Moves this process into a mount namespace and root of its own.
pub(crate) fn enter() -> Result<OldRoot> {
    let host = openat(AT_FDCWD, c"/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    let proc_dir = openat(AT_FDCWD, c"/proc", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&CStr>, c"/", None::<&CStr>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&CStr>)?;
    let root = NewFilesystem::open(c"tmpfs")?;
    root.set(c"mode", c"0755")?;
    root.set(c"size", c"1m")?;
    let root = root.mount(NOSUID)?;
    let devices = device_tree(host.as_fd())?;
    // Any directory serves: the old root is gone a moment later.
    [c"/tmp", c"/mnt", c"/"]
        .into_iter()
        .map(|place| attach(root.as_fd(), AT_FDCWD, place))
        .find(Result::is_ok)
        .unwrap_or(Err(Errno::ENOENT))?;
    fchdir(&root)?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    for name in ["l", "s", "n", "t", "e", "p", "d", "dev"] {
        mkdir(name, Mode::from_bits_truncate(0o755))?;
    }
    for place in 0..LAYER_PLACES {
        mkdir(format!("l/{place}").as_str(), Mode::from_bits_truncate(0o755))?;
    }
    attach(devices.as_fd(), AT_FDCWD, c"/dev")?;
    Ok(OldRoot { proc_dir })
}

/// A detached tmpfs with the devices, the links and the places for `pts` and `shm`.
fn device_tree(host: BorrowedFd<'_>) -> Result<OwnedFd> {
    let tree = NewFilesystem::open(c"tmpfs")?;
    tree.set(c"mode", c"0755")?;
    tree.set(c"size", c"64k")?;
    let tree = tree.mount(NOSUID | NOEXEC)?;
    let old_mask = nix::sys::stat::umask(Mode::empty());
    for (name, major, minor) in DEVICES {
        let mode = Mode::from_bits_truncate(0o666);
        match mknodat(&tree, name, SFlag::S_IFCHR, mode, makedev(major, minor)) {
            Ok(()) => {}
            Err(Errno::EPERM) => bind_device(host, &tree, name)?,
            Err(e) => return Err(e),
        }
    }
    for (target, name) in LINKS {
        symlinkat(target, &tree, name)?;
    }
    for name in [c"pts", c"shm"] {
        nix::sys::stat::mkdirat(&tree, name, Mode::from_bits_truncate(0o755))?;
    }
    nix::sys::stat::umask(old_mask);
    restrict(tree.as_fd(), RDONLY)?;
    Ok(tree)
}

/// Shows the host's own device node, where this process may not make one (in a container, say).
fn bind_device(host: BorrowedFd<'_>, tree: &OwnedFd, name: &CStr) -> Result<()> {
    let path = CString::new(format!("dev/{}", name.to_string_lossy())).map_err(|_| Errno::EINVAL)?;
    let node = clone_tree(host, &path)?;
    drop(openat(tree, name, OFlag::O_CREAT | OFlag::O_CLOEXEC, Mode::empty())?);
    attach(node.as_fd(), tree.as_fd(), name)
}
