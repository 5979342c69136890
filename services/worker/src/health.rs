//! Whether this host can take jobs now, and if not, why.
//!
//! A host without room, without descriptors, or on which one job after the other fails for no fault
//! of its own, takes no more jobs for a while: elsewhere they may do better. One job that fails again and
//! again may itself be the cause, and counts as one; and failures that nothing adds to are forgotten.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use hutch_proto::JobId;
use nix::sys::statvfs::statvfs;

/// The least room on the data directory's file system.
const ROOM_BYTES: u64 = 64 << 20;
/// The least number of free inodes there; a file system may not count them.
const ROOM_INODES: u64 = 1000;
/// From this many different jobs that failed in a row on the worker is not ready.
const NOT_READY: usize = 3;
/// How many of them are told apart.
const REMEMBERED: usize = 32;
/// After how long without a new failure they are forgotten.
const FADE: Duration = Duration::from_secs(60);
/// The longest pause after a failure of the host.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// What is known of the isolation of jobs on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Isolation {
    /// Attacks were held, or nobody asks for them.
    #[default]
    Held,
    /// Nothing yet.
    Untried,
    /// An attack got through: which, and what to do about it.
    Not(String),
}

/// What is known of this host.
#[derive(Debug)]
pub(crate) struct Health {
    data_dir: PathBuf,
    failures: Mutex<Failures>,
    broken: OnceLock<String>,
    isolation: Mutex<Isolation>,
}

/// What failed since a job last ran to a verdict.
#[derive(Debug, Default)]
struct Failures {
    jobs: BTreeSet<JobId>,
    /// Why, and when, the last one did.
    last: Option<(String, Instant)>,
}

impl Failures {
    fn add(&mut self, job: JobId, message: &str, now: Instant) {
        self.fade(now);
        if self.jobs.len() < REMEMBERED {
            self.jobs.insert(job);
        }
        self.last = Some((message.to_owned(), now));
    }

    /// Forgets what is long past.
    fn fade(&mut self, now: Instant) {
        if self.last.as_ref().is_some_and(|(_, at)| now.saturating_duration_since(*at) >= FADE) {
            *self = Self::default();
        }
    }

    fn not_ready(&mut self, now: Instant) -> Option<String> {
        self.fade(now);
        let (message, _) = self.last.as_ref().filter(|_| self.jobs.len() >= NOT_READY)?;
        Some(format!("the last {} jobs failed because of this host: {message}", self.jobs.len()))
    }

    /// How long to wait before the next job.
    fn pause(&self) -> Duration {
        let exponent = u32::try_from(self.jobs.len()).unwrap_or(8).min(8);
        (Duration::from_millis(100) * 2_u32.pow(exponent)).min(LONGEST_PAUSE)
    }
}

impl Health {
    pub(crate) fn new(data_dir: PathBuf) -> Self {
        Self { data_dir, failures: Mutex::default(), broken: OnceLock::new(), isolation: Mutex::default() }
    }

    /// Why no job should be taken now; none if one may.
    pub(crate) fn unfit(&self) -> Option<String> {
        no_room(&self.data_dir).or_else(no_descriptors)
    }

    /// Why this worker is not ready; none if it is.
    pub(crate) fn not_ready(&self) -> Option<String> {
        self.unproven().or_else(|| self.failures().not_ready(Instant::now())).or_else(|| self.unfit())
    }

    /// What is known of the isolation of jobs from now on.
    pub(crate) fn proved(&self, isolation: Isolation) {
        *self.isolation() = isolation;
    }

    /// Whether that was never tried.
    pub(crate) fn is_untried(&self) -> bool {
        *self.isolation() == Isolation::Untried
    }

    /// Why no job may be run yet; none if one may.
    pub(crate) fn unproven(&self) -> Option<String> {
        match &*self.isolation() {
            Isolation::Untried => Some("whether jobs are isolated here was not tried yet".to_owned()),
            Isolation::Not(why) => Some(format!("jobs would not be isolated here: {why}")),
            Isolation::Held => None,
        }
    }

    fn isolation(&self) -> MutexGuard<'_, Isolation> {
        self.isolation.lock().unwrap_or_else(PoisonError::into_inner)
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
        *self.failures() = Failures::default();
    }

    /// A job failed because of this host; returns how long to wait before the next.
    pub(crate) fn failed(&self, job: JobId, message: &str) -> Duration {
        let mut failures = self.failures();
        failures.add(job, message, Instant::now());
        failures.pause()
    }

    fn failures(&self) -> MutexGuard<'_, Failures> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
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
        let pauses: Vec<_> = (0..40).map(|_| health.failed(JobId::generate(), "no cgroup")).collect();
        assert!(pauses.is_sorted() && pauses[39] == LONGEST_PAUSE, "{pauses:?}");
        assert!(health.not_ready().expect("not ready").contains("no cgroup"));
        health.succeeded();
        assert_eq!(health.not_ready(), None);
    }

    /// A hostile job that is tried again and again says nothing of the host.
    #[test]
    fn one_job_counts_once() {
        let health = Health::new(std::env::temp_dir());
        let hostile = JobId::generate();
        let pauses: Vec<_> = (0..20).map(|_| health.failed(hostile, "no answer")).collect();
        assert!(pauses.iter().all(|pause| *pause == pauses[0]), "{pauses:?}");
        assert_eq!(health.not_ready(), None);
        health.failed(JobId::generate(), "no answer");
        assert_eq!(health.not_ready(), None);
        health.failed(JobId::generate(), "no answer");
        assert!(health.not_ready().is_some());
    }

    #[test]
    fn failures_fade() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        for _ in 0..NOT_READY {
            failures.add(JobId::generate(), "no cgroup", now);
        }
        assert!(failures.not_ready(now + FADE / 2).is_some());
        assert_eq!(failures.not_ready(now + FADE), None);
        failures.add(JobId::generate(), "no cgroup", now + FADE);
        assert_eq!(failures.not_ready(now + FADE), None, "counted anew");
    }

    #[test]
    fn a_directory_that_is_gone_is_named() {
        let health = Health::new(PathBuf::from("/nowhere/at/all"));
        assert!(health.unfit().expect("unfit").contains("/nowhere/at/all"));
    }
}
