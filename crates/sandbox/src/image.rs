//! A file system of a given size on disk, for what is too large for memory: ext4 in a file without a name, behind a
//! loop device.
//!
//! In order: the file's bytes are taken from the disk ahead (fallocate(2)), so that a job that began cannot find the
//! host's disk full; mkfs.ext4(8) writes an empty file system without a journal; it is mounted, attached nowhere; and
//! what it has to give beyond what was asked for is taken away again. The file never has a name and the device clears
//! itself: when the last mount is gone, however that came, so are both. Nothing but the kernel's own ext4 ever writes
//! to it, and what was not written by then never is.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hutch_sandbox_sys::loopdev::LoopDevice;
use hutch_sandbox_sys::mount::{NewFilesystem, harmless};
use nix::fcntl::{FallocateFlags, OFlag, fallocate, openat};
use nix::sys::stat::Mode;
use nix::sys::statvfs::{Statvfs, fstatvfs};

/// Bytes of an ext4 block, and of what is written to the disk of one inode.
pub(crate) const BLOCK: u64 = 4096;
const INODE: u64 = 256;
/// The most blocks of a group, and the most inodes: what one block of a bitmap has bits for.
const GROUP: u64 = 32_768;
/// Inodes that ext4 keeps for itself, and those that are the sandbox's.
const OWN_INODES: u64 = 64;
/// What ext4 holds back for itself, at most (4096 blocks), and as much for bitmaps and the like of a small one.
const HELD_BACK: u64 = 32 << 20;
/// What is left to everybody else on the disk.
const LEFT_TO_OTHERS: u64 = 64 << 20;
/// The most superfluous inodes that are taken away, one by one.
const MOST_SPARE_INODES: u64 = 4096;

/// Features of ext4 that are used, whatever the host's mke2fs.conf(5) says. No journal: nobody needs the file system
/// after a crash.
const FEATURES: &str = "none,extent,filetype,large_file,huge_file,flex_bg,dir_nlink,extra_isize,sparse_super,\
    dir_index,ext_attr,64bit,metadata_csum";

/// Why there is no file system on disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// The disk could not hold it even if it were empty.
    #[error("{wanted} bytes are more than the disk of {} has in all, {there}", dir.display())]
    TooLarge { dir: PathBuf, wanted: u64, there: u64 },
    /// The disk does not have the room now.
    #[error("the disk of {} has {free} bytes free, the job needs {wanted}", dir.display())]
    Full { dir: PathBuf, wanted: u64, free: u64 },
    /// Something failed.
    #[error("cannot {operation}: {source}")]
    Failed { operation: &'static str, source: io::Error },
}

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl Fn(E) -> ImageError {
    move |source| ImageError::Failed { operation, source: source.into() }
}

/// Whether this host can have file systems on disk; if not, why.
pub(crate) fn possible() -> Result<(), String> {
    mkfs().map(drop).ok_or("mkfs.ext4 is missing: install e2fsprogs")?;
    let control = File::options().read(true).write(true).open("/dev/loop-control");
    control.map(drop).map_err(|e| format!("/dev/loop-control cannot be opened: {e}"))
}

fn mkfs() -> Option<PathBuf> {
    let search = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&search)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join("mkfs.ext4"))
        .find(|path| path.is_absolute() && path.is_file())
}

/// How a file system is laid out that has this much to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    image_bytes: u64,
    inodes: u64,
    group_blocks: u64,
}

impl Layout {
    fn of(bytes: u64, inodes: u64) -> Self {
        let inodes = inodes.saturating_add(OWN_INODES);
        let payload = bytes.saturating_add(inodes.saturating_mul(INODE));
        let image_bytes =
            payload.saturating_add(payload / 256).saturating_add(HELD_BACK).next_multiple_of(1 << 20);
        // Many inodes on little room need more groups, each of which has room for so many.
        let mut group_blocks = GROUP;
        while group_blocks > 1024 && (image_bytes / BLOCK / group_blocks).saturating_mul(GROUP) < inodes {
            group_blocks /= 2;
        }
        Self { image_bytes, inodes, group_blocks }
    }
}

/// Makes and mounts an empty file system on the disk of `dir` that has `bytes` and `inodes` to give, root's own aside.
///
/// # Errors
/// If the disk cannot hold it, or a step fails.
pub(crate) fn make(dir: &Path, bytes: u64, inodes: u64) -> Result<OwnedFd, ImageError> {
    let layout = Layout::of(bytes, inodes);
    let image = tempfile::tempfile_in(dir).map_err(failed("make an image"))?;
    reserve(dir, &image, layout.image_bytes)?;
    write_empty(&image, layout)?;
    let device = LoopDevice::attach(image.as_fd()).map_err(failed("attach a loop device"))?;
    let mount = mount(&device).map_err(failed("mount an image"))?;
    trim(&mount, bytes, inodes)?;
    Ok(mount)
}

/// Takes the image's room from the disk.
fn reserve(dir: &Path, image: &File, wanted: u64) -> Result<(), ImageError> {
    let disk = fstatvfs(image).map_err(failed("look at the disk"))?;
    let there = disk.blocks().saturating_mul(disk.fragment_size());
    if wanted > there {
        return Err(ImageError::TooLarge { dir: dir.to_owned(), wanted, there });
    }
    let free = disk.blocks_available().saturating_mul(disk.fragment_size());
    let full = || ImageError::Full { dir: dir.to_owned(), wanted, free };
    if wanted.saturating_add(LEFT_TO_OTHERS) > free {
        return Err(full());
    }
    let length = i64::try_from(wanted).map_err(|_| full())?;
    fallocate(image, FallocateFlags::empty(), 0, length).map_err(|e| match e {
        nix::errno::Errno::ENOSPC => full(),
        other => failed("take an image's room from the disk")(other),
    })
}

/// Has an empty file system written into the image: mkfs.ext4(8). The image is its standard input, and so has a name.
fn write_empty(image: &File, layout: Layout) -> Result<(), ImageError> {
    let operation = "write an empty file system";
    let program = mkfs().ok_or_else(|| failed(operation)(io::Error::from(io::ErrorKind::NotFound)))?;
    let done = Command::new(program)
        .args(["-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-O", FEATURES])
        .args(["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"])
        .args(["-N", &layout.inodes.to_string(), "-g", &layout.group_blocks.to_string(), "/proc/self/fd/0"])
        .stdin(Stdio::from(image.try_clone().map_err(failed(operation))?))
        .stdout(Stdio::null())
        .env_clear()
        .output()
        .map_err(failed(operation))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr).trim().chars().take(500).collect::<String>();
    Err(failed(operation)(io::Error::other(format!("mkfs.ext4 ended with {}: {said}", done.status))))
}

fn mount(device: &LoopDevice) -> nix::Result<OwnedFd> {
    let ext4 = NewFilesystem::open(c"ext4")?;
    let source = CString::new(device.path()).map_err(|_| nix::errno::Errno::EINVAL)?;
    ext4.set(c"source", &source)?;
    // A fault of the disk stops the job's writing at once.
    ext4.set(c"errors", c"remount-ro")?;
    // Nobody needs it after a crash: a job's fsync(2) does not have the host's disk flushed.
    ext4.set_flag(c"nobarrier")?;
    ext4.set_flag(c"noinit_itable")?;
    ext4.mount(harmless())
}

/// Takes away what the file system has to give beyond what was asked for: one file, as large, and some without bytes.
fn trim(mount: &OwnedFd, bytes: u64, inodes: u64) -> Result<(), ImageError> {
    /// A tree of extents takes a block now and then.
    const TRIES: usize = 8;
    let operation = "size a file system on disk";
    let stat = || fstatvfs(mount).map_err(failed(operation));
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let touch = |name: &str| openat(mount, name, flags, Mode::empty()).map_err(failed(operation));
    let rest = touch("rest")?;
    let superfluous = stat()?.files_free().saturating_sub(inodes);
    for number in 0..if superfluous > MOST_SPARE_INODES { 0 } else { superfluous } {
        touch(&format!("rest-{number}"))?;
    }
    let mut taken = 0;
    let wanted = bytes / BLOCK * BLOCK;
    for _ in 0..TRIES {
        let there = available(&stat()?) / BLOCK * BLOCK;
        if there == wanted {
            break;
        }
        let length = (taken + there).saturating_sub(wanted);
        let end = i64::try_from(length).unwrap_or(i64::MAX);
        if length > taken {
            fallocate(&rest, FallocateFlags::empty(), 0, end).map_err(failed(operation))?;
        } else {
            nix::unistd::ftruncate(&rest, end).map_err(failed(operation))?;
        }
        taken = length;
    }
    let now = stat()?;
    if available(&now) < wanted || now.files_free() < inodes {
        let message = format!("it has {} bytes and {} inodes only", available(&now), now.files_free());
        return Err(failed(operation)(io::Error::other(message)));
    }
    Ok(())
}

/// Bytes that can be written: what ext4 holds back for itself is not among them.
pub(crate) fn available(stat: &Statvfs) -> u64 {
    stat.blocks_available().saturating_mul(stat.fragment_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_have_room_for_the_inodes() {
        for (bytes, inodes) in
            [(257 << 20, 100_000), (1 << 40, 100_000), (300 << 20, 4_000_000), (1 << 30, 16)]
        {
            let layout = Layout::of(bytes, inodes);
            let groups = layout.image_bytes / BLOCK / layout.group_blocks;
            assert!(groups * GROUP >= layout.inodes, "{layout:?}");
            assert!(layout.image_bytes > bytes + inodes * INODE, "{layout:?}");
        }
    }

    #[test]
    fn no_size_overflows() {
        assert!(Layout::of(u64::MAX / 2, 1 << 40).image_bytes > u64::MAX / 2);
    }
}
