//! What this host is: id ranges that are ours, limits that cannot be raised.

use std::fs::{self, File, OpenOptions};
use std::path::Path;

use hutch_sandbox_sys::IdRange;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::plan::HardLimits;

/// The resource limits that this process can give at most.
pub(crate) fn hard_limits() -> HardLimits {
    let hard = |resource| getrlimit(resource).map_or(u64::MAX, |(_, hard)| hard);
    HardLimits {
        open_files: hard(Resource::RLIMIT_NOFILE),
        stack_bytes: hard(Resource::RLIMIT_STACK),
        core_bytes: hard(Resource::RLIMIT_CORE),
    }
}

/// Descriptors of the engine for each slot: a job that runs, what is left of one, and what waits for the next.
const OPEN_FILES_PER_SLOT: u64 = 64;

/// Raises how many files this process may have open to what it may be raised to, and says so if that is less than these
/// slots may need.
pub(crate) fn raise_open_files(slots: u32) {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if soft < hard
        && let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::debug!(error = e.desc(), "the limit of open files stays at {soft}");
    }
    let wanted = u64::from(slots) * OPEN_FILES_PER_SLOT;
    if hard < wanted {
        tracing::warn!(
            "{slots} slots may need {wanted} open files, {hard} are allowed: raise `ulimit -n`, or LimitNOFILE of systemd"
        );
    }
}

/// Ids of the host that no other sandbox on it has, one range for each slot.
#[derive(Debug)]
pub(crate) struct IdRanges {
    ranges: Vec<IdRange>,
    /// Holds the locks; they go with it.
    _locks: File,
}

/// First id, count of a range, and how many ranges there are: all below 0x7000_0000, above which
/// systemd has uses for ids.
const FIRST_ID: u32 = 0x3000_0000;
/// Ids of a range: those that a sandbox sees, and its init's.
const IDS: u32 = 0x1_0000;
const RANGES: u32 = 0x4000;

impl IdRanges {
    /// Takes a range for each slot, by locks on one file that all hutch processes of this host share.
    pub(crate) fn take(slots: u32) -> std::io::Result<Self> {
        let dir = Path::new("/run/hutch");
        fs::create_dir_all(dir)?;
        let mut options = OpenOptions::new();
        let locks = options.read(true).write(true).create(true).truncate(false).open(dir.join("ids.lock"))?;
        let mut ranges = Vec::new();
        for range in 0..RANGES {
            if ranges.len() == slots as usize {
                break;
            }
            if lock_byte(&locks, range) {
                ranges.push(IdRange { base: FIRST_ID + range * IDS, count: IDS - 1 });
            }
        }
        if ranges.len() < slots as usize {
            return Err(std::io::Error::other("every range of ids is taken by another hutch process"));
        }
        Ok(Self { ranges, _locks: locks })
    }

    /// The range of a slot.
    pub(crate) fn of(&self, slot: u32) -> Option<IdRange> {
        self.ranges.get(slot as usize).copied()
    }
}

/// Locks one byte for this open file: F_OFD_SETLK of fcntl_locking(2).
fn lock_byte(file: &File, byte: u32) -> bool {
    let lock = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap_or(1),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or(0),
        l_start: byte.into(),
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).is_ok()
}
