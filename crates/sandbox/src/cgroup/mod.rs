//! Control groups: found once at the start, then one fresh group for each job and step.
//!
//! In order: [`Cgroups::find`] reads which controller lives on which hierarchy, below the worker's own
//! cgroup, and makes a home there; [`Cgroups::create`] makes a job's group and sets its limits;
//! [`JobCgroup::readings`] says what the kernel counted; dropping the group removes it. What
//! differs between the versions is in [`v1`] and [`v2`]: which file, in which unit.
//!
//! After cgroup-v1 and cgroup-v2 of the kernel's documentation, and cgroups(7).

mod disks;
mod find;
mod v1;
mod v2;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hutch_proto::Limits;

use disks::Disk;
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

/// What the kernel counted for a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Readings {
    pub(crate) memory_bytes: u64,
    pub(crate) memory_peak_bytes: u64,
    pub(crate) oom_kills: u64,
    /// How often the group's own memory limit was in the way; 0 if memory ran out above it.
    pub(crate) memory_limit_hits: u64,
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

/// One job's place in one hierarchy, with the files that every job needs open.
#[derive(Debug)]
struct Place {
    version: Version,
    controllers: Vec<Controller>,
    dir: PathBuf,
    kept: Vec<Kept>,
    /// The disks whose use is counted and limited.
    disks: Arc<[Disk]>,
}

/// A control file that is open.
#[derive(Debug)]
struct Kept {
    name: &'static str,
    access: Access,
    file: File,
}

impl Place {
    fn make(
        version: Version,
        controllers: Vec<Controller>,
        dir: PathBuf,
        disks: Arc<[Disk]>,
    ) -> Result<Self, CgroupError> {
        fs::create_dir(&dir).map_err(CgroupError::of("make", &dir))?;
        let mut place = Self { version, controllers, dir, kept: Vec::new(), disks };
        let files = match version {
            Version::V1 => v1::KEPT,
            Version::V2 => v2::KEPT,
        };
        for (controller, name, access) in files {
            if place.controllers.contains(controller) {
                let file = match access {
                    Access::Read => File::open(place.dir.join(name)),
                    Access::Write => OpenOptions::new().write(true).open(place.dir.join(name)),
                    Access::Both => OpenOptions::new().read(true).write(true).open(place.dir.join(name)),
                };
                // Some are on some kernels only; what is needed is found out when it is used.
                place.kept.extend(file.ok().map(|file| Kept { name, access: *access, file }));
            }
        }
        Ok(place)
    }

    fn has(&self, controller: Controller) -> bool {
        self.controllers.contains(&controller)
    }

    fn kept(&self, name: &str) -> Option<&File> {
        self.kept.iter().find(|kept| kept.name == name).map(|kept| &kept.file)
    }

    fn write(&self, name: &str, value: &str) -> io::Result<()> {
        match self.kept(name) {
            Some(mut file) => file.write_all(value.as_bytes()),
            None => write_file(&self.dir.join(name), value),
        }
    }

    /// The text of a control file; empty if it is not there.
    fn text(&self, name: &str) -> String {
        let Some(file) = self.kept(name) else { return read_text(&self.dir, name) };
        let mut bytes = [0; 4096];
        let count = file.read_at(&mut bytes, 0).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    }

    /// The number that is a control file's whole text.
    fn number(&self, name: &str) -> Option<u64> {
        self.text(name).trim().parse().ok()
    }

    fn read(&self, readings: &mut Readings) {
        for controller in &self.controllers {
            match self.version {
                Version::V1 => v1::read(*controller, self, readings),
                Version::V2 => v2::read(*controller, self, readings),
            }
        }
    }
}

/// How fast a disk may be used: bytes and operations a second, of reads and of writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct IoRates {
    bytes: [Option<u64>; 2],
    ops: [Option<u64>; 2],
}

impl IoRates {
    const LIFTED: Self = Self { bytes: [None; 2], ops: [None; 2] };

    fn of(limits: &Limits) -> Self {
        Self {
            bytes: [limits.io_read_bytes_per_s, limits.io_write_bytes_per_s],
            ops: [limits.io_read_ops_per_s, limits.io_write_ops_per_s],
        }
    }
}

/// How a kept file is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    Both,
}

/// A group of one job, used once; removed when dropped.
#[derive(Debug)]
pub(crate) struct JobCgroup {
    places: Arc<Vec<Place>>,
    /// Readable when memory runs out; only where the kernel does not kill the whole group by itself.
    out_of_memory: Option<OwnedFd>,
}

/// How a program is put into its group.
#[derive(Debug)]
pub(crate) enum Entrance {
    /// By writing to these `tasks` files.
    Tasks(Vec<OwnedFd>),
    /// By being born in this directory, and writing to the `tasks` files of v1 controllers.
    Unified(OwnedFd, Vec<OwnedFd>),
}

/// The file of a v1 group by which a process enters.
const TASKS: &str = "tasks";

static NEXT: AtomicU64 = AtomicU64::new(0);

impl Cgroups {
    /// A fresh group with these limits, made ahead where there is one.
    ///
    /// # Errors
    /// Which file the kernel refused, and why.
    pub(crate) fn take(&self, limits: &Limits) -> Result<JobCgroup, CgroupError> {
        let spare = if limits.cpuset.is_some() { None } else { self.spares().pop() };
        let mut group = match spare {
            Some(spare) => spare,
            None => self.make(limits.cpuset.is_some())?,
        };
        group.limit(limits)?;
        group.keep(|kept| kept.access != Access::Write || kept.name == TASKS);
        Ok(group)
    }

    /// Makes a group ahead, unless there are `most` already. A failure shows when the group is needed.
    pub(crate) fn make_spare(&self, most: usize) {
        if self.spares().len() < most
            && let Ok(group) = self.make(false)
        {
            self.spares().push(group);
        }
    }

    fn spares(&self) -> MutexGuard<'_, Vec<JobCgroup>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(&self, cpuset: bool) -> Result<JobCgroup, CgroupError> {
        let name = format!("job-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let mut places = Vec::with_capacity(self.hierarchies.len());
        let mut out_of_memory = None;
        for hierarchy in &self.hierarchies {
            let mut controllers = hierarchy.controllers.clone();
            if !cpuset {
                controllers.retain(|controller| *controller != Controller::Cpuset);
            }
            if controllers.is_empty() {
                continue;
            }
            let (dir, disks) = (hierarchy.home.join(&name), Arc::clone(&self.disks));
            let place = Place::make(hierarchy.version, controllers, dir, disks)?;
            if place.version == Version::V1 && place.has(Controller::Memory) {
                let event = v1::out_of_memory(&place.dir);
                out_of_memory = Some(event.map_err(CgroupError::of("watch", &place.dir))?);
            }
            places.push(place);
        }
        Ok(JobCgroup { places: Arc::new(places), out_of_memory })
    }
}

impl JobCgroup {
    fn limit(&self, limits: &Limits) -> Result<(), CgroupError> {
        for place in self.places.iter() {
            let settings = match place.version {
                Version::V1 => v1::settings(limits, place),
                Version::V2 => v2::settings(limits, place),
            };
            for (file, value) in settings {
                place.write(file, &value).map_err(CgroupError::of("set", &place.dir.join(file)))?;
            }
        }
        Ok(())
    }

    /// Closes control files that are not needed any more: there may be a thousand groups at one time.
    fn keep(&mut self, wanted: impl Fn(&Kept) -> bool) {
        for place in Arc::get_mut(&mut self.places).into_iter().flatten() {
            place.kept.retain(&wanted);
        }
    }

    /// How a program enters this group.
    pub(crate) fn entrance(&mut self) -> Result<Entrance, CgroupError> {
        let mut open: Vec<Option<File>> = self.places.iter().map(|_| None).collect();
        for (place, open) in Arc::get_mut(&mut self.places).into_iter().flatten().zip(&mut open) {
            let at = place.kept.iter().position(|kept| kept.name == TASKS);
            *open = at.map(|at| place.kept.swap_remove(at).file);
        }
        entrance(&self.places, open)
    }

    /// A view of this group that does not keep it.
    pub(crate) fn watch(&self) -> GroupWatch {
        GroupWatch { places: Arc::clone(&self.places) }
    }

    /// What the kernel has counted so far; what it does not count is 0.
    pub(crate) fn readings(&self) -> Readings {
        readings(&self.places)
    }

    /// Only the processor time, in microseconds: what deadlines look at.
    pub(crate) fn cpu_us(&self) -> u64 {
        let mut readings = Readings::default();
        for place in self.places.iter() {
            match place.version {
                Version::V1 if place.has(Controller::Cpuacct) => {
                    v1::read(Controller::Cpuacct, place, &mut readings);
                }
                Version::V2 if place.has(Controller::Cpu) => v2::read(Controller::Cpu, place, &mut readings),
                _ => {}
            }
        }
        readings.cpu_us()
    }

    /// Only what was read from disks and written to them, in bytes.
    pub(crate) fn io_bytes(&self) -> (u64, u64) {
        let mut readings = Readings::default();
        for place in self.places.iter().filter(|place| place.has(Controller::Io)) {
            match place.version {
                Version::V1 => v1::read(Controller::Io, place, &mut readings),
                Version::V2 => v2::read(Controller::Io, place, &mut readings),
            }
        }
        (readings.io_read_bytes, readings.io_write_bytes)
    }

    /// Lets all that waits for a disk go ahead: a process cannot die while its reads or writes are held back.
    pub(crate) fn lift_io_rates(&self) {
        for place in self.places.iter().filter(|place| place.has(Controller::Io)) {
            let settings = match place.version {
                Version::V1 => v1::io_rates(IoRates::LIFTED, place),
                Version::V2 => v2::io_rates(IoRates::LIFTED, place),
            };
            for (file, value) in settings {
                if let Err(e) = place.write(file, &value) {
                    tracing::warn!(dir = %place.dir.display(), file, error = %e, "a disk's rate is not lifted");
                }
            }
        }
    }

    /// Takes the descriptor that becomes readable when memory runs out.
    pub(crate) fn take_out_of_memory(&mut self) -> Option<OwnedFd> {
        self.out_of_memory.take()
    }
}

/// A view of a group that may be gone by now; then all is 0.
#[derive(Debug)]
pub(crate) struct GroupWatch {
    places: Arc<Vec<Place>>,
}

impl GroupWatch {
    /// How one more program enters the group.
    pub(crate) fn entrance(&self) -> Result<Entrance, CgroupError> {
        entrance(&self.places, self.places.iter().map(|_| None))
    }

    /// What the kernel has counted so far.
    pub(crate) fn readings(&self) -> Readings {
        let mut readings = readings(&self.places);
        for place in self.places.iter() {
            let file = match place.version {
                Version::V1 => "memory.usage_in_bytes",
                Version::V2 => "memory.current",
            };
            if place.has(Controller::Memory) {
                readings.memory_bytes = place.number(file).unwrap_or(0);
            }
            if place.has(Controller::Pids) {
                readings.pids = place.number("pids.current").unwrap_or(0);
            }
        }
        readings
    }

    /// Bytes of anonymous memory and of files' memory: memory.stat. What a job keeps on a tmpfs is a file's on both versions.
    pub(crate) fn memory_kinds(&self) -> (u64, u64) {
        let Some(place) = self.places.iter().find(|place| place.has(Controller::Memory)) else {
            return (0, 0);
        };
        let text = place.text("memory.stat");
        let (anonymous, file) = match place.version {
            Version::V1 => ("total_rss", "total_cache"),
            Version::V2 => ("anon", "file"),
        };
        (keyed(&text, anonymous).unwrap_or(0), keyed(&text, file).unwrap_or(0))
    }

    /// Pressure of the group in microseconds, where the kernel counts it: resource, kind, total.
    pub(crate) fn pressure(&self) -> [Option<(&'static str, &'static str, u64)>; 6] {
        let unified = self.places.iter().find(|place| place.version == Version::V2);
        unified.map_or([None; 6], |place| v2::pressure(&place.dir))
    }
}

/// How a program enters a group, by the `tasks` files that are open already, or else are opened now.
fn entrance(places: &[Place], open: impl IntoIterator<Item = Option<File>>) -> Result<Entrance, CgroupError> {
    let mut unified = None;
    let mut tasks = Vec::new();
    for (place, open) in places.iter().zip(open) {
        match place.version {
            Version::V1 => {
                let file = match open {
                    Some(file) => Ok(file),
                    None => OpenOptions::new().write(true).open(place.dir.join(TASKS)),
                };
                tasks.push(file.map_err(CgroupError::of("enter", &place.dir))?.into());
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

fn readings(places: &[Place]) -> Readings {
    let mut readings = Readings::default();
    for place in places {
        place.read(&mut readings);
    }
    readings
}

impl Drop for JobCgroup {
    fn drop(&mut self) {
        for place in self.places.iter() {
            remove(&place.dir);
        }
    }
}

/// How long a group may stay busy after its last process has died.
const MOST_BUSY: Duration = Duration::from_secs(10);

/// Removes a group. The last process may be a moment from gone, on a busy host a long one, so it is tried for a while.
fn remove(dir: &Path) {
    let begun = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        match fs::remove_dir(dir) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(dir = %dir.display(), error = %e, "cgroup not removed");
                return;
            }
            _ => return,
        }
        if begun.elapsed() > MOST_BUSY {
            break;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(200));
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

/// The number behind a key in a text of `key value` lines.
fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}
