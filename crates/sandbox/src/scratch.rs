//! The scratch file system, which takes what a job writes: in memory up to `scratch_memory_bytes`, on disk above.
//!
//! In order: a file system of the job's size is made, attached nowhere; in it an upper and a work directory for each
//! overlay, and `/dev/shm`; then it is asked how full it is. One on disk is shut down before it is let go: what it has
//! not written yet is nobody's any more.

use std::ffi::CString;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use hutch_sandbox_sys::defence::{Defence, without};
use hutch_sandbox_sys::mount::{NewFilesystem, harmless};
use hutch_sandbox_sys::{Errno, IdRange, loopdev};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::sys::statvfs::fstatvfs;

use crate::config::EngineConfig;
use crate::image::{self, ImageError};
use crate::plan::{JobPlan, scratch_dirs};
use crate::refusal::Refusal;

/// Inodes of the scratch file system that are ours, not the job's: `shm`, and four for each overlay.
const OWN_INODES: u64 = 1;
const OWN_INODES_PER_OVERLAY: u64 = 4;
/// A tmpfs has two more: its root, and one that overlayfs's extended attributes are worth (it counts them, by size).
const OWN_INODES_IN_MEMORY: u64 = 2;
/// On disk a directory takes a block.
const OWN_BYTES_ON_DISK: u64 = image::BLOCK;
/// On disk a write that comes as one large folio is refused when there is not room for all of it: the largest there
/// are, and the part of a small disk that counts as nothing.
const LARGEST_FOLIO: u64 = 2 << 20;
const NEARLY_ALL: u64 = 16;

/// Where one overlay's changes are.
#[derive(Debug)]
pub(crate) struct Upper {
    /// Where the overlay is in the sandbox: empty for the root.
    pub(crate) prefix: String,
    /// The upper directory.
    pub(crate) dir: OwnedFd,
}

/// How full the scratch file system is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct DiskUse {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    pub(crate) bytes_full: bool,
    pub(crate) inodes_full: bool,
}

/// What a job writes to.
#[derive(Debug)]
pub(crate) struct Scratch {
    mount: OwnedFd,
    pub(crate) uppers: Vec<Upper>,
    on_disk: bool,
    /// What was free before the job wrote anything, and is not ours.
    free_bytes: u64,
    free_inodes: u64,
}

impl Scratch {
    /// Makes it: with an overlay at each of these places of the sandbox. It may take some 100 ms on disk.
    ///
    /// # Errors
    /// The verdict: of the spec if this worker's disk can never hold it, else of the host.
    pub(crate) fn make(
        plan: &JobPlan,
        config: &EngineConfig,
        prefixes: &[&str],
        ids: IdRange,
    ) -> Result<Self, Refusal> {
        let failed = |e: Errno| Refusal::host(format!("cannot make the scratch file system: {}", e.desc()));
        let own = Own::of(prefixes.len() as u64, plan.scratch_on_disk);
        let inodes = plan.disk_inodes.saturating_add(own.inodes);
        let mount = if plan.scratch_on_disk {
            let bytes = plan.disk_bytes.saturating_add(own.bytes);
            image::make(&config.data_dir, bytes, inodes).map_err(|e| match e {
                ImageError::TooLarge { .. } => Refusal::spec("limits.disk_bytes", e.to_string()),
                other => Refusal::host(format!("scratch space on disk: {other}")),
            })?
        } else {
            in_memory(plan.disk_bytes, inodes).map_err(failed)?
        };
        let (free_bytes, free_inodes) = free(mount.as_fd()).map_err(failed)?;
        let mut scratch = Self {
            mount,
            uppers: Vec::new(),
            on_disk: plan.scratch_on_disk,
            free_bytes: free_bytes.saturating_sub(own.bytes),
            free_inodes: if plan.scratch_on_disk {
                free_inodes.saturating_sub(own.inodes)
            } else {
                plan.disk_inodes
            },
        };
        scratch.add_directories(prefixes, ids).map_err(failed)?;
        Ok(scratch)
    }

    fn add_directories(&mut self, prefixes: &[&str], ids: IdRange) -> Result<(), Errno> {
        let mount = &self.mount;
        let owner = (Some(ids.base.into()), Some(ids.base.into()));
        let make = |path: &str, mode: u32| -> Result<(), Errno> {
            mkdirat(mount, path, Mode::from_bits_truncate(mode))?;
            let flags = nix::sys::stat::FchmodatFlags::FollowSymlink;
            nix::sys::stat::fchmodat(mount, path, Mode::from_bits_truncate(mode), flags)?;
            nix::unistd::fchownat(mount, path, owner.0, owner.1, nix::fcntl::AtFlags::empty())
        };
        make("shm", 0o1777)?;
        for (overlay, prefix) in prefixes.iter().enumerate() {
            let (upper, work) = scratch_dirs(overlay);
            mkdirat(mount, format!("o{overlay}").as_str(), Mode::from_bits_truncate(0o755))?;
            make(&upper, 0o755)?;
            make(&work, 0o755)?;
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let dir = openat(mount, upper.as_str(), flags, Mode::empty())?;
            self.uppers.push(Upper { prefix: (*prefix).to_owned(), dir });
        }
        Ok(())
    }

    /// The file system, attached nowhere yet.
    pub(crate) fn mount(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    /// Takes the file system back from a step, so that the next one can attach it.
    pub(crate) fn renew(&mut self, mount: OwnedFd) {
        self.mount = mount;
    }

    /// How full it is: fstatfs(2).
    pub(crate) fn disk_use(&self) -> DiskUse {
        let Ok((bytes, inodes)) = free(self.mount.as_fd()) else { return DiskUse::default() };
        DiskUse {
            bytes: self.free_bytes.saturating_sub(bytes),
            inodes: self.free_inodes.saturating_sub(inodes),
            bytes_full: bytes
                < if self.on_disk { LARGEST_FOLIO.min(self.free_bytes / NEARLY_ALL) } else { 1 },
            inodes_full: inodes == 0,
        }
    }

    /// Says that nobody needs it any more: what is not on disk yet will not be written.
    pub(crate) fn let_go(&self) {
        if self.on_disk
            && let Some(upper) = self.uppers.first()
            && let Err(e) = loopdev::shut_down(upper.dir.as_fd())
        {
            tracing::debug!(error = e.desc(), "scratch space is written out before it goes");
        }
    }

    /// Bytes of what was written that are held in memory.
    pub(crate) fn memory_bytes(&self) -> u64 {
        if self.on_disk { 0 } else { self.disk_use().bytes }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// What of a scratch file system is the sandbox's own.
struct Own {
    bytes: u64,
    inodes: u64,
}

impl Own {
    fn of(overlays: u64, on_disk: bool) -> Self {
        let inodes = OWN_INODES + OWN_INODES_PER_OVERLAY * overlays;
        if on_disk {
            Self { bytes: inodes * OWN_BYTES_ON_DISK, inodes }
        } else {
            Self { bytes: 0, inodes: inodes + OWN_INODES_IN_MEMORY }
        }
    }
}

/// Bytes and inodes that can still be written.
fn free(mount: BorrowedFd<'_>) -> Result<(u64, u64), Errno> {
    let stat = fstatvfs(mount)?;
    Ok((image::available(&stat), stat.files_free()))
}

fn in_memory(bytes: u64, inodes: u64) -> Result<OwnedFd, Errno> {
    let (bytes, inodes) = if without(Defence::SizedScratch) { (1 << 40, 1 << 40) } else { (bytes, inodes) };
    let number = |value: u64| CString::new(value.to_string()).map_err(|_| Errno::EINVAL);
    let tmpfs = NewFilesystem::open(c"tmpfs")?;
    tmpfs.set(c"size", &number(bytes)?)?;
    tmpfs.set(c"nr_inodes", &number(inodes)?)?;
    tmpfs.set(c"mode", c"0755")?;
    tmpfs.mount(harmless())
}
