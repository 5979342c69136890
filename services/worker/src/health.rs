//! Whether this host can take jobs now, and if not, why.
//!
//! A host without room, without descriptors, or on which one job after the other fails for no fault
//! of its own, takes no more jobs for a while: elsewhere they may do better.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::statvfs::statvfs;

/// The least room on the data directory's file system.
const ROOM_BYTES: u64 = 64 << 20;
/// The least number of free inodes there; a file system may not count them.
const ROOM_INODES: u64 = 1000;
/// From this many failures in a row on the worker is not ready.
const NOT_READY: u32 = 3;
/// The longest pause after a failure of the host.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// What is known of this host.
#[derive(Debug)]
pub(crate) struct Health {
    data_dir: PathBuf,
    failures: Mutex<Failures>,
    broken: OnceLock<String>,
}

#[derive(Debug, Default)]
struct Failures {
    in_a_row: u32,
    last: String,
}

impl Health {
    pub(crate) fn new(data_dir: PathBuf) -> Self {
        Self { data_dir, failures: Mutex::default(), broken: OnceLock::new() }
    }

    /// Why no job should be taken now; none if one may.
    pub(crate) fn unfit(&self) -> Option<String> {
        no_room(&self.data_dir).or_else(no_descriptors)
    }

    /// Why this worker is not ready; none if it is.
    pub(crate) fn not_ready(&self) -> Option<String> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.in_a_row >= NOT_READY {
            let Failures { in_a_row, last } = &*failures;
            return Some(format!("the last {in_a_row} jobs failed because of this host: {last}"));
        }
        drop(failures);
        self.unfit()
    }

    /// Nothing can be run here any more, whatever is waited for.
    pub(crate) fn breaks(&self, why: &str) {
        let _ = self.broken.set(why.to_owned());
    }

    /// Why nothing can be run here any more; none if something can.
    pub(crate) fn broken(&self) -> Option<String> {
        self.broken.get().cloned()
    }

    /// A job ran to a verdict.
    pub(crate) fn succeeded(&self) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).in_a_row = 0;
    }

    /// A job failed because of this host; returns how long to wait before the next.
    pub(crate) fn failed(&self, message: &str) -> Duration {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.in_a_row = failures.in_a_row.saturating_add(1);
        message.clone_into(&mut failures.last);
        let doubled = Duration::from_millis(100) * 2_u32.pow(failures.in_a_row.min(8));
        doubled.min(LONGEST_PAUSE)
    }
}

fn no_room(directory: &Path) -> Option<String> {
    let at = directory.display();
    let room = match statvfs(directory) {
        Ok(room) => room,
        Err(errno) => return Some(format!("{at} cannot be looked at: {errno}")),
    };
    let bytes = room.blocks_available().saturating_mul(room.fragment_size());
    if bytes < ROOM_BYTES {
        return Some(format!("{at} has {bytes} bytes of room, {ROOM_BYTES} are needed: free some"));
    }
    let inodes = room.files_available();
    (room.files() > 0 && inodes < ROOM_INODES)
        .then(|| format!("{at} has {inodes} free inodes, {ROOM_INODES} are needed: remove some files"))
}

fn no_descriptors() -> Option<String> {
    let error = File::open("/dev/null").err()?;
    Some(format!("no file can be opened: {error}; raise the limit of open files"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_fails_again_and_again_is_not_ready() {
        let health = Health::new(std::env::temp_dir());
        assert_eq!(health.not_ready(), None);
        let pauses: Vec<_> = (0..20).map(|_| health.failed("no cgroup")).collect();
        assert!(pauses.is_sorted() && pauses[19] == LONGEST_PAUSE, "{pauses:?}");
        assert!(health.not_ready().expect("not ready").contains("no cgroup"));
        health.succeeded();
        assert_eq!(health.not_ready(), None);
    }

    #[test]
    fn a_directory_that_is_gone_is_named() {
        let health = Health::new(PathBuf::from("/nowhere/at/all"));
        assert!(health.unfit().expect("unfit").contains("/nowhere/at/all"));
    }
}
