//! A file as a block device, and a file system on it that is let go without being written out: loop(4),
//! `struct loop_config` of the kernel's `linux/loop.h`, and ext4's shutdown.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use crate::{Errno, Result};

const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
/// The device lets go of its file when nobody has it open any more: also when whoever attached it was killed.
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// Past the host's page cache, in which the same bytes would be a second time.
const LO_FLAGS_DIRECT_IO: u32 = 16;
const EXT4_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587D;
/// What is not on disk yet is not written any more.
const EXT4_GOING_FLAGS_NOLOGFLUSH: u32 = 2;

/// How often a device is asked for that another process takes first.
const TRIES: usize = 64;

/// Layout of `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// Layout of `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A file as a block device, until this and every mount of it is gone.
#[derive(Debug)]
pub struct LoopDevice {
    _device: File,
    path: String,
}

impl LoopDevice {
    /// Attaches a file, opened for reading and writing, to a free device.
    ///
    /// # Errors
    /// ENOENT or EPERM where this process has no loop devices, ENOSPC where all are taken; see loop(4).
    pub fn attach(image: BorrowedFd<'_>) -> Result<Self> {
        let open = |path: &str| {
            let opened = OpenOptions::new().read(true).write(true).open(path);
            opened.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
        };
        let control = open("/dev/loop-control")?;
        for _ in 0..TRIES {
            // SAFETY: this request takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            let path = format!("/dev/loop{}", Errno::result(number)?);
            let device = open(&path)?;
            match configure(&device, image) {
                Ok(()) => return Ok(Self { _device: device, path }),
                Err(Errno::EBUSY) => {}
                Err(e) => return Err(e),
            }
        }
        Err(Errno::EBUSY)
    }

    /// Where the device is.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }
}

fn configure(device: &File, image: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: a loop_config of zeroes is valid: no offset, no limit, the default size of blocks.
    let mut config: LoopConfig = unsafe { std::mem::zeroed() };
    config.fd = u32::try_from(image.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    config.info.flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO;
    for (to, from) in config.info.file_name.iter_mut().zip(b"hutch-scratch") {
        *to = *from;
    }
    // SAFETY: `config` has the kernel's layout and outlives the call.
    let answer = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    Errno::result(answer).map(drop)
}

/// Has an ext4 file system forget what it has not written, and write nothing more: `file` is any of its files.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN; ENOTTY on another file system.
pub fn shut_down(file: BorrowedFd<'_>) -> Result<()> {
    let flags = EXT4_GOING_FLAGS_NOLOGFLUSH;
    // SAFETY: the request reads the number that it is given, which outlives the call.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), EXT4_IOC_SHUTDOWN, &raw const flags) };
    Errno::result(answer).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_the_kernel_s() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }
}
