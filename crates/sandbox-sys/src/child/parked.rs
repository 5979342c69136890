//! What init prepares before anyone asks for its sandbox, since it is the same for every job.
//!
//! In order: the network namespace, the dearest part; /proc with its masks at `/p`; the devices at `/d`; and
//! the program's user namespace, whose id maps somebody outside of it has to write. Each is for one sandbox.

use core::fmt::Write as _;
use std::ffi::CStr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::sys::wait::waitpid;
use nix::unistd::{AccessFlags, Pid, faccessat};

use super::{Failure, Line};
use crate::defence::{Defence, without};
use crate::mount::{NODEV, NOEXEC, NOSUID, NewFilesystem, RDONLY, attach, clone_tree, restrict};
use crate::network::{self, NetworkNamespace};
use crate::plan::{IdRange, RootIs};
use crate::process::{Beside, Stack, flags, set_effective_user, start_sharing};
use crate::record::Stage;
use crate::{Errno, Result};

/// Where the prepared mounts are in the launcher's small root.
pub(super) const PROC: &CStr = c"/p";
pub(super) const DEVICES: &CStr = c"/d";

/// How a path is masked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mask {
    /// `/dev/null` in place of a file.
    File,
    /// An empty directory in its place.
    Directory,
    /// Itself, read-only.
    ReadOnly,
}

/// Paths of /proc that tell of the host or reach into it: the lists of the OCI runtimes, and those of
/// the kernel's symbols and messages. What a kernel does not have is passed over.
const MASKS: [(&CStr, Mask); 19] = [
    (c"acpi", Mask::Directory),
    (c"asound", Mask::Directory),
    (c"interrupts", Mask::File),
    (c"kallsyms", Mask::File),
    (c"kcore", Mask::File),
    (c"keys", Mask::File),
    (c"key-users", Mask::File),
    (c"kmsg", Mask::File),
    (c"latency_stats", Mask::File),
    (c"sched_debug", Mask::File),
    (c"scsi", Mask::Directory),
    (c"timer_list", Mask::File),
    (c"timer_stats", Mask::File),
    (c"bus", Mask::ReadOnly),
    (c"fs", Mask::ReadOnly),
    (c"irq", Mask::ReadOnly),
    // Everybody may write there, and so set the host's kernel to watching: psi.rst.
    (c"pressure", Mask::ReadOnly),
    (c"sys", Mask::ReadOnly),
    (c"sysrq-trigger", Mask::ReadOnly),
];

/// Prepares everything and returns the program's user namespace.
pub(super) fn prepare(
    ids: IdRange,
    network: NetworkNamespace,
    stack: &mut Stack,
) -> core::result::Result<OwnedFd, Failure> {
    // A slot's own is inherited from the launcher, which has entered it.
    if network == NetworkNamespace::Fresh && !without(Defence::NetworkNamespace) {
        network::isolate().map_err(Failure::at(Stage::Network))?;
    }
    let proc_mount = mount_proc().map_err(Failure::at(Stage::Launch))?;
    mount_devices().map_err(Failure::at(Stage::Launch))?;
    user_namespace(proc_mount.as_fd(), ids, RootIs::Root, stack).map_err(Failure::at(Stage::IdMap))
}

/// A proc(5) of this PID namespace, its masks on it.
fn mount_proc() -> Result<OwnedFd> {
    let mount = NewFilesystem::open(c"proc")?.mount(NOSUID | NODEV | NOEXEC)?;
    attach(mount.as_fd(), AT_FDCWD, PROC)?;
    if without(Defence::ProcMasks) {
        return Ok(mount);
    }
    MASKS.into_iter().try_for_each(|(name, kind)| mask(mount.as_fd(), name, kind))?;
    Ok(mount)
}

fn mask(proc_mount: BorrowedFd<'_>, name: &CStr, kind: Mask) -> Result<()> {
    // Looked at first: a mount that is made and then not attached costs the kernel a grace period to let go.
    match faccessat(proc_mount, name, AccessFlags::F_OK, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Err(Errno::ENOENT) => return Ok(()),
        other => other?,
    }
    let cover = match kind {
        Mask::File => clone_tree(AT_FDCWD, c"/dev/null")?,
        Mask::Directory => clone_tree(AT_FDCWD, c"/e")?,
        Mask::ReadOnly => clone_tree(proc_mount, name)?,
    };
    if kind != Mask::File {
        restrict(cover.as_fd(), RDONLY | NOSUID | NODEV | NOEXEC)?;
    }
    attach(cover.as_fd(), proc_mount, name)
}

/// The launcher's device tree, and a devpts of this sandbox's own in it.
fn mount_devices() -> Result<()> {
    let tree = clone_tree(AT_FDCWD, c"/dev")?;
    attach(tree.as_fd(), AT_FDCWD, DEVICES)?;
    let terminals = NewFilesystem::open(c"devpts")?;
    terminals.set_flag(c"newinstance")?;
    terminals.set(c"ptmxmode", c"0666")?;
    terminals.set(c"mode", c"0620")?;
    // The host has some thousands for all.
    terminals.set(c"max", c"64")?;
    attach(terminals.mount(NOSUID | NOEXEC)?.as_fd(), tree.as_fd(), c"pts")
}

/// A user namespace with its ids mapped. A process is started for it, and let go once the namespace is held.
pub(crate) fn user_namespace(
    proc_dir: BorrowedFd<'_>,
    ids: IdRange,
    root: RootIs,
    stack: &mut Stack,
) -> Result<OwnedFd> {
    // Whoever makes it owns it.
    set_effective_user(ids.init_id())?;
    // SAFETY: `sleep` does not return, writes nothing, and is dead before this function, and so the stack, is left.
    let pid =
        unsafe { start_sharing(flags::NEWUSER, Beside::GoesOn, None, stack, sleep, core::ptr::null_mut()) };
    set_effective_user(0)?;
    let pid = pid?;
    let namespace = write_map(proc_dir, pid, "uid_map", ids, root)
        .and_then(|()| write_map(proc_dir, pid, "gid_map", ids, root))
        .and_then(|()| open_namespace(proc_dir, pid, "user"));
    let pid = Pid::from_raw(pid);
    nix::sys::signal::kill(pid, Signal::SIGKILL)?;
    waitpid(pid, None)?;
    namespace
}

/// Waits to be killed, or for its parent to die.
extern "C" fn sleep(_: *mut libc::c_void) -> ! {
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    loop {
        nix::unistd::pause();
    }
}

/// Writes a map of ids: user_namespaces(7).
fn write_map(
    proc_dir: BorrowedFd<'_>,
    pid: libc::pid_t,
    name: &str,
    ids: IdRange,
    root: RootIs,
) -> Result<()> {
    let mut path = Line::new();
    write!(path, "{pid}/{name}").map_err(|_| Errno::ENAMETOOLONG)?;
    let mut map = Line::new();
    let IdRange { base, count } = ids;
    let written = match root {
        RootIs::Root => writeln!(map, "0 {base} {count}"),
        RootIs::Nobody => {
            let last = count.saturating_sub(1);
            let (own, first, others) = (ids.init_id(), base + 1, count.saturating_sub(2));
            writeln!(map, "0 {own} 1\n1 {first} {others}\n{last} {base} 1")
        }
    };
    written.map_err(|_| Errno::ENAMETOOLONG)?;
    let file = openat(proc_dir, path.as_cstr()?, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    nix::unistd::write(&file, map.as_bytes()).map(drop)
}

/// A namespace of a process: namespaces(7).
pub(crate) fn open_namespace(proc_dir: BorrowedFd<'_>, pid: libc::pid_t, kind: &str) -> Result<OwnedFd> {
    let mut path = Line::new();
    write!(path, "{pid}/ns/{kind}").map_err(|_| Errno::ENAMETOOLONG)?;
    openat(proc_dir, path.as_cstr()?, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
}
