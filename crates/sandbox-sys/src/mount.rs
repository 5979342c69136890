//! The mount API by descriptors: fsopen(2), fsconfig(2), fsmount(2), open_tree(2), move_mount(2),
//! mount_setattr(2), openat2(2). No path is resolved twice. None of these functions allocates.

use std::ffi::CStr;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::null;

use crate::defence::{Defence, without};
use crate::{Errno, Result};

/// Mount attribute: read-only.
pub const RDONLY: u64 = 0x1;
/// Mount attribute: set-user-ID bits and file capabilities have no effect.
pub const NOSUID: u64 = 0x2;
/// Mount attribute: device nodes cannot be opened.
pub const NODEV: u64 = 0x4;
/// Mount attribute: nothing can be executed.
pub const NOEXEC: u64 = 0x8;
const IDMAP: u64 = 0x0010_0000;

const AT_EMPTY_PATH: libc::c_int = 0x1000;
const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_uint = libc::O_CLOEXEC as libc::c_uint;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_uint = 0x40;

/// openat2(2): no symbolic link such as those of `/proc/PID/fd` is followed.
pub const RESOLVE_NO_MAGICLINKS: u64 = 0x02;
/// openat2(2): no symbolic link at all is followed.
pub const RESOLVE_NO_SYMLINKS: u64 = 0x04;
/// openat2(2): nothing above the directory is reached.
pub const RESOLVE_BENEATH: u64 = 0x08;
/// openat2(2): the directory is taken for `/`.
pub const RESOLVE_IN_ROOT: u64 = 0x10;

/// Turns a system call's answer into a result.
pub(crate) fn check(answer: libc::c_long) -> Result<libc::c_long> {
    if answer < 0 { Err(Errno::last()) } else { Ok(answer) }
}

/// A new descriptor from a system call's answer.
///
/// # Safety
/// The call must answer with a descriptor that nobody else owns, or with -1.
unsafe fn owned(answer: libc::c_long) -> Result<OwnedFd> {
    let fd = libc::c_int::try_from(check(answer)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: by this function's contract `fd` is open and nobody's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A file system that is being set up: fsopen(2).
#[derive(Debug)]
pub struct NewFilesystem(OwnedFd);

impl NewFilesystem {
    /// Begins with a file system of this type.
    ///
    /// # Errors
    /// ENODEV if the kernel does not have it; EPERM without CAP_SYS_ADMIN.
    pub fn open(kind: &CStr) -> Result<Self> {
        // SAFETY: `kind` is a NUL-terminated text that outlives the call.
        let answer = unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) };
        // SAFETY: fsopen answers with a new descriptor.
        unsafe { owned(answer) }.map(Self)
    }

    fn config(&self, command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>) -> Result<()> {
        let key = key.map_or(null(), CStr::as_ptr);
        let value = value.map_or(null(), CStr::as_ptr);
        // SAFETY: key and value are null or NUL-terminated texts that outlive the call.
        let answer = unsafe { libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, key, value, 0) };
        check(answer).map(drop)
    }

    /// Sets an option with a value.
    ///
    /// # Errors
    /// EINVAL if the file system does not know the option or refuses the value.
    pub fn set(&self, key: &CStr, value: &CStr) -> Result<()> {
        self.config(FSCONFIG_SET_STRING, Some(key), Some(value))
    }

    /// Sets an option without a value.
    ///
    /// # Errors
    /// EINVAL if the file system does not know the option.
    pub fn set_flag(&self, key: &CStr) -> Result<()> {
        self.config(FSCONFIG_SET_FLAG, Some(key), None)
    }

    /// Makes the file system and a mount of it that is attached nowhere yet.
    ///
    /// # Errors
    /// What the file system answers; see mount(2).
    pub fn mount(self, attributes: u64) -> Result<OwnedFd> {
        self.config(FSCONFIG_CMD_CREATE, None, None)?;
        let attributes = libc::c_uint::try_from(attributes).map_err(|_| Errno::EINVAL)?;
        // SAFETY: only integers are passed.
        let answer =
            unsafe { libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), FSMOUNT_CLOEXEC, attributes) };
        // SAFETY: fsmount answers with a new descriptor.
        unsafe { owned(answer) }
    }
}

/// A new mount of the tree at `path`, attached nowhere; mounts below it are not taken along.
///
/// # Errors
/// EINVAL if `path` is not in the caller's mount namespace; see open_tree(2).
pub fn clone_tree(dir: BorrowedFd<'_>, path: &CStr) -> Result<OwnedFd> {
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH as libc::c_uint;
    // SAFETY: `path` is a NUL-terminated text that outlives the call.
    let answer = unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) };
    // SAFETY: open_tree answers with a new descriptor.
    unsafe { owned(answer) }
}

/// Attaches a detached mount at `path`, as seen from `dir`; an empty path is `dir` itself.
///
/// # Errors
/// See move_mount(2).
pub fn attach(mount: BorrowedFd<'_>, dir: BorrowedFd<'_>, path: &CStr) -> Result<()> {
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both paths are NUL-terminated texts that outlive the call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            dir.as_raw_fd(),
            path.as_ptr(),
            flags,
        )
    };
    check(answer).map(drop)
}

/// Moves an attached mount, with all that is mounted on it, to a directory.
///
/// # Errors
/// See move_mount(2).
pub fn relocate(from: &CStr, to: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: both paths are NUL-terminated texts that outlive the call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            libc::AT_FDCWD,
            from.as_ptr(),
            to.as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    check(answer).map(drop)
}

/// Layout of `struct mount_attr`, mount_setattr(2).
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

fn set_attributes(mount: BorrowedFd<'_>, set: u64, userns: u64) -> Result<()> {
    let attr = MountAttr { set, clear: 0, propagation: 0, userns };
    // SAFETY: `attr` has the kernel's layout and the size that is passed.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    check(answer).map(drop)
}

/// Adds attributes such as [`RDONLY`] to a mount.
///
/// # Errors
/// See mount_setattr(2).
pub fn restrict(mount: BorrowedFd<'_>, attributes: u64) -> Result<()> {
    set_attributes(mount, attributes, 0)
}

/// Shows the owners of a detached mount through the id map of a user namespace.
///
/// # Errors
/// EINVAL if the file system has no idmapped mounts (Linux 5.12 and later has them for most).
pub fn map_owners(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>) -> Result<()> {
    let userns = u64::try_from(userns.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    set_attributes(mount, IDMAP, userns)
}

/// Layout of `struct open_how`, openat2(2).
#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

/// Opens `path` below `dir` with openat2(2); `O_CLOEXEC` is always set.
///
/// # Errors
/// See openat2(2): ELOOP for a link that may not be followed, EXDEV for a way out.
pub fn open_beneath(
    dir: BorrowedFd<'_>,
    path: &CStr,
    flags: libc::c_int,
    mode: u32,
    resolve: u64,
) -> Result<OwnedFd> {
    let flags = u64::try_from(flags | libc::O_CLOEXEC).map_err(|_| Errno::EINVAL)?;
    let (path, resolve) = if without(Defence::ScopedPaths) { (relative(path), 0) } else { (path, resolve) };
    let how = OpenHow { flags, mode: u64::from(mode), resolve };
    loop {
        // SAFETY: `path` is NUL-terminated, `how` has the kernel's layout and the size passed.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                dir.as_raw_fd(),
                path.as_ptr(),
                &raw const how,
                size_of::<OpenHow>(),
            )
        };
        // SAFETY: openat2 answers with a new descriptor.
        match unsafe { owned(answer) } {
            // The kernel asks for another try when a rename raced with a `..` in the way.
            Err(Errno::EAGAIN) => {}
            other => return other,
        }
    }
}

/// A path that begins where its directory is, even without [`RESOLVE_IN_ROOT`].
fn relative(path: &CStr) -> &CStr {
    let start = path.to_bytes().iter().take_while(|byte| **byte == b'/').count();
    let rest = path.to_bytes_with_nul().get(start..).and_then(|rest| CStr::from_bytes_with_nul(rest).ok());
    rest.filter(|rest| !rest.is_empty()).unwrap_or(c".")
}

/// The attributes of every mount of a sandbox that layers, volumes or the job itself can put files in.
#[must_use]
pub fn harmless() -> u64 {
    let unless = |defence: Defence, attribute: u64| if without(defence) { 0 } else { attribute };
    unless(Defence::NoSuid, NOSUID) | unless(Defence::NoDev, NODEV)
}

/// Whether a file has this extended attribute: fgetxattr(2).
#[must_use]
pub fn has_xattr(file: BorrowedFd<'_>, name: &CStr) -> bool {
    // SAFETY: the name is NUL-terminated; with size 0 nothing is written.
    let answer = unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), std::ptr::null_mut(), 0) };
    answer >= 0
}
