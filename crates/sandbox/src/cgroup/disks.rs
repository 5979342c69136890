//! The disks below directories, by the numbers under which cgroups know them.
//!
//! A rate is set, and use is counted, for a whole disk: of a partition it is the disk that it is on (sysfs, `/sys/dev/block`).
//! A loop device is never among them, unless data lies on one: what is read and written through it is charged to the
//! same group again, on the disk below.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

/// A block device: what io.max and the files of blkio name as `MAJOR:MINOR`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) major: u64,
    pub(super) minor: u64,
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl Disk {
    /// The disks of a worker's data and of these other directories; and which of them is on a file system that does not
    /// say what disk it is on.
    pub(super) fn all_of(data_dir: &Path, others: &[&Path]) -> (Vec<Self>, Option<String>) {
        let mut disks = Vec::new();
        let mut unknown = None;
        for dir in std::iter::once(&data_dir).chain(others) {
            match Self::of(dir) {
                Some(disk) if disks.contains(&disk) => {}
                Some(disk) => disks.push(disk),
                // What is in memory alone needs no disk; scratch space on it would be behind a device of its own.
                None if *dir != data_dir
                    && statfs(*dir).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC) => {}
                None => {
                    unknown.get_or_insert(format!("{} is not on a disk, or not on one alone", dir.display()));
                }
            }
        }
        (disks, unknown)
    }

    fn of(dir: &Path) -> Option<Self> {
        let device = fs::metadata(dir).ok()?.dev();
        let entry = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
        let entry = fs::canonicalize(entry).ok()?;
        let whole = if entry.join("partition").exists() { entry.parent()? } else { &entry };
        let numbers = fs::read_to_string(whole.join("dev")).ok()?;
        let (major, minor) = numbers.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

/// Whether a device, as `MAJOR:MINOR`, is one of these; any is, where none is known.
pub(super) fn is_among(device: &str, disks: &[Disk]) -> bool {
    disks.is_empty() || disks.iter().any(|disk| disk.to_string() == device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_no_disk_is_known_all_count() {
        let disk = Disk { major: 8, minor: 16 };
        assert!(is_among("8:16", &[disk]) && !is_among("8:1", &[disk]) && is_among("8:1", &[]));
    }

    #[test]
    fn proc_is_on_no_disk() {
        let (disks, unknown) = Disk::all_of(Path::new("/proc"), &[Path::new("/proc")]);
        assert_eq!(disks, []);
        assert!(unknown.is_some_and(|why| why.contains("/proc")));
    }
}
