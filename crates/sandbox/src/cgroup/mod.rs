//! Control groups: found once at the start, then one fresh group for each job and step.
//!
//! In order: [`Cgroups::find`] reads which controller lives on which hierarchy, below the worker's own
//! cgroup, and makes a home there; [`Cgroups::create`] makes a job's group and sets its limits;
//! [`JobCgroup::readings`] says what the kernel counted; dropping the group removes it. What
//! differs between the versions is in [`v1`] and [`v2`]: which file, in which unit.
//!
//! After cgroup-v1 and cgroup-v2 of the kernel's documentation, and cgroups(7).

mod find;
mod v1;
mod v2;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use hutch_proto::Limits;

pub(crate) use find::Cgroups;

/// A resource that cgroups hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Controller {
    /// Memory and swap.
    Memory,
    /// Processes and threads.
    Pids,
    /// Processor time: quota and, on v2, accounting.
    Cpu,
    /// Processor time: accounting, on v1.
    Cpuacct,
    /// Block devices.
    Io,
    /// Which processors.
    Cpuset,
}

/// Which of the two interfaces a hierarchy has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// A hierarchy of cgroup v1.
    V1,
    /// The unified hierarchy.
    V2,
}

/// One file to write for a limit.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    controller: Controller,
    file: &'static str,
    value: String,
}

/// What the kernel counted for a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Readings {
    pub(crate) memory_bytes: u64,
    pub(crate) memory_peak_bytes: u64,
    pub(crate) oom_kills: u64,
    pub(crate) cpu_user_us: u64,
    pub(crate) cpu_system_us: u64,
    pub(crate) throttled_us: u64,
    pub(crate) pids: u64,
    pub(crate) pids_peak: u64,
    pub(crate) pids_denied: u64,
    pub(crate) io_read_bytes: u64,
    pub(crate) io_write_bytes: u64,
}

impl Readings {
    /// Microseconds of user and system time.
    pub(crate) fn cpu_us(&self) -> u64 {
        self.cpu_user_us + self.cpu_system_us
    }
}

/// A cgroup could not be made or set.
#[derive(Debug, thiserror::Error)]
#[error("cgroup: {operation} {}", path.display())]
pub(crate) struct CgroupError {
    operation: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl CgroupError {
    fn of(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { operation, path: path.to_owned(), source }
    }
}

/// One job's place in one hierarchy.
#[derive(Debug, Clone)]
struct Place {
    version: Version,
    controllers: Vec<Controller>,
    dir: PathBuf,
}

/// A group of one job; removed when dropped.
#[derive(Debug)]
pub(crate) struct JobCgroup {
    places: Vec<Place>,
}

/// How a program is put into its group.
#[derive(Debug)]
pub(crate) enum Entrance {
    /// By writing to these `tasks` files.
    Tasks(Vec<OwnedFd>),
    /// By being born in this directory, and writing to the `tasks` files of v1 controllers.
    Unified(OwnedFd, Vec<OwnedFd>),
}

static NEXT: AtomicU64 = AtomicU64::new(0);

impl Cgroups {
    /// A fresh group with these limits.
    ///
    /// # Errors
    /// Which file the kernel refused, and why.
    pub(crate) fn create(&self, slot: u32, limits: &Limits) -> Result<JobCgroup, CgroupError> {
        let name = format!("slot-{slot}-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let mut group = JobCgroup { places: Vec::with_capacity(self.hierarchies.len()) };
        for hierarchy in &self.hierarchies {
            let controllers: Vec<_> = hierarchy
                .controllers
                .iter()
                .copied()
                .filter(|controller| *controller != Controller::Cpuset || limits.cpuset.is_some())
                .collect();
            if controllers.is_empty() {
                continue;
            }
            let dir = hierarchy.home.join(&name);
            fs::create_dir(&dir).map_err(CgroupError::of("make", &dir))?;
            group.places.push(Place { version: hierarchy.version, controllers, dir });
        }
        group.limit(limits)?;
        Ok(group)
    }
}

impl JobCgroup {
    fn limit(&self, limits: &Limits) -> Result<(), CgroupError> {
        for place in &self.places {
            let settings = match place.version {
                Version::V1 => v1::settings(limits, &place.controllers, &place.dir),
                Version::V2 => v2::settings(limits, &place.controllers),
            };
            for setting in settings {
                let path = place.dir.join(setting.file);
                write_file(&path, &setting.value).map_err(CgroupError::of("set", &path))?;
            }
        }
        Ok(())
    }

    /// How a program enters this group.
    pub(crate) fn entrance(&self) -> Result<Entrance, CgroupError> {
        let mut unified = None;
        let mut tasks = Vec::new();
        for place in &self.places {
            match place.version {
                Version::V1 => {
                    let path = place.dir.join("tasks");
                    let file = OpenOptions::new().write(true).open(&path);
                    tasks.push(file.map_err(CgroupError::of("open", &path))?.into());
                }
                Version::V2 => {
                    let dir = File::open(&place.dir).map_err(CgroupError::of("open", &place.dir))?;
                    unified = Some(dir.into());
                }
            }
        }
        Ok(match unified {
            Some(dir) => Entrance::Unified(dir, tasks),
            None => Entrance::Tasks(tasks),
        })
    }

    /// A view of this group that does not keep it.
    pub(crate) fn watch(&self) -> GroupWatch {
        GroupWatch { places: self.places.clone() }
    }

    /// What the kernel has counted so far; what it does not count is 0.
    pub(crate) fn readings(&self) -> Readings {
        readings(&self.places)
    }

    /// Only the processor time, in microseconds: what deadlines look at.
    pub(crate) fn cpu_us(&self) -> u64 {
        let mut readings = Readings::default();
        for place in &self.places {
            match place.version {
                Version::V1 if place.controllers.contains(&Controller::Cpuacct) => {
                    v1::read(Controller::Cpuacct, &place.dir, &mut readings);
                }
                Version::V2 if place.controllers.contains(&Controller::Cpu) => {
                    v2::read(Controller::Cpu, &place.dir, &mut readings);
                }
                _ => {}
            }
        }
        readings.cpu_us()
    }

    /// A descriptor that becomes readable when memory runs out; only where the kernel does not kill the
    /// whole group by itself.
    pub(crate) fn out_of_memory(&self) -> Result<Option<OwnedFd>, CgroupError> {
        self.places
            .iter()
            .find(|place| place.version == Version::V1 && place.controllers.contains(&Controller::Memory))
            .map(|place| v1::out_of_memory(&place.dir).map_err(CgroupError::of("watch", &place.dir)))
            .transpose()
    }
}

/// A view of a group that may be gone by now; then all is 0.
#[derive(Debug)]
pub(crate) struct GroupWatch {
    places: Vec<Place>,
}

impl GroupWatch {
    /// What the kernel has counted so far.
    pub(crate) fn readings(&self) -> Readings {
        readings(&self.places)
    }

    /// Pressure of the group in microseconds, where the kernel counts it: resource, kind, total.
    pub(crate) fn pressure(&self) -> [Option<(&'static str, &'static str, u64)>; 6] {
        let unified = self.places.iter().find(|place| place.version == Version::V2);
        unified.map_or([None; 6], |place| v2::pressure(&place.dir))
    }
}

fn readings(places: &[Place]) -> Readings {
    let mut readings = Readings::default();
    for place in places {
        for controller in &place.controllers {
            match place.version {
                Version::V1 => v1::read(*controller, &place.dir, &mut readings),
                Version::V2 => v2::read(*controller, &place.dir, &mut readings),
            }
        }
    }
    readings.pids_peak = readings.pids_peak.max(readings.pids);
    readings
}

impl Drop for JobCgroup {
    fn drop(&mut self) {
        for place in &self.places {
            remove(&place.dir);
        }
    }
}

/// Removes a group. The last process may be a moment from gone, so it is tried for a while.
fn remove(dir: &Path) {
    for pause in [0, 1, 5, 20, 100, 500] {
        std::thread::sleep(std::time::Duration::from_millis(pause));
        match fs::remove_dir(dir) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(dir = %dir.display(), error = %e, "cgroup not removed");
                return;
            }
            _ => return,
        }
    }
    tracing::warn!(dir = %dir.display(), "cgroup still busy, left for the reaper");
}

fn write_file(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// The text of a control file; empty if it is not there.
fn read_text(dir: &Path, file: &str) -> String {
    let mut text = String::new();
    if let Ok(file) = File::open(dir.join(file)) {
        let _ = file.take(64 << 10).read_to_string(&mut text);
    }
    text
}

/// The number that is a control file's whole text.
fn read_number(dir: &Path, file: &str) -> Option<u64> {
    read_text(dir, file).trim().parse().ok()
}

/// The number behind a key in a text of `key value` lines.
fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}
