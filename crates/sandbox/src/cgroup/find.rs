//! Which controller lives where: /proc/self/cgroup and /proc/self/mountinfo, cgroups(7), proc(5).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use hutch_sandbox_sys::defence::{Defence, without};

use super::disks::Disk;
use super::{Controller, JobCgroup, Version, read_text, v1, write_file};

/// Prefix of the name of every home; the worker's pid and start time follow.
const HOME_PREFIX: &str = "hutch-";
/// The leaf into which processes step down on v2, so that the group above may have controlled children.
const LEAF: &str = "hutch-worker";

/// One hierarchy that is used, and the worker's place in it.
#[derive(Debug)]
pub(crate) struct Hierarchy {
    pub(crate) version: Version,
    pub(crate) controllers: Vec<Controller>,
    /// The cgroup that the worker was started in.
    pub(crate) parent: PathBuf,
    /// The directory below it that holds this worker's jobs.
    pub(crate) home: PathBuf,
}

/// The hierarchies of this host.
#[derive(Debug)]
pub(crate) struct Cgroups {
    pub(crate) hierarchies: Vec<Hierarchy>,
    pub(crate) home_name: String,
    /// The disks that jobs can come to, as far as is known.
    pub(super) disks: Arc<[Disk]>,
    /// Groups made ahead, each for one job.
    pub(super) spare: Mutex<Vec<JobCgroup>>,
}

/// Why jobs could not be limited here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FindError {
    /// A controller is nowhere.
    #[error("this host cannot limit {what}: {remedy}")]
    Missing {
        /// What cannot be limited.
        what: &'static str,
        /// What to do about it.
        remedy: &'static str,
    },
    /// On v2, a controller is given to a group above and not to the worker's own.
    #[error(
        "this host cannot limit {what}: the {controller} controller is not delegated from {} to {}; as root write \
         `+{controller}` to cgroup.subtree_control of that group and of those between, or have systemd do it \
         (Delegate=yes)", above.display(), own.display()
    )]
    Undelegated {
        /// What cannot be limited.
        what: &'static str,
        /// By which controller.
        controller: &'static str,
        /// The nearest group above that has it.
        above: PathBuf,
        /// The worker's own group.
        own: PathBuf,
    },
    /// A home could not be made.
    #[error("cannot make a cgroup at {}; run as root, or delegate a cgroup (systemd: Delegate=yes)", path.display())]
    Home {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The files of proc(5) cannot be read.
    #[error("cannot read {path}")]
    Proc {
        /// Which.
        path: &'static str,
        /// Why not.
        source: io::Error,
    },
}

impl Cgroups {
    /// Finds the hierarchies and makes a home in each.
    ///
    /// # Errors
    /// What cannot be enforced here, and the remedy.
    pub(crate) fn find() -> Result<Self, FindError> {
        let read = |path| fs::read_to_string(path).map_err(|source| FindError::Proc { path, source });
        let places = places(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?);
        let home_name = format!("{HOME_PREFIX}{}", own_identity());
        let mut cgroups =
            Self { hierarchies: Vec::new(), home_name, disks: Arc::new([]), spare: Mutex::new(Vec::new()) };
        let mut taken: Vec<Controller> = Vec::new();
        let mut unified = None;
        for (version, parent, controllers) in places {
            if version == Version::V2 {
                unified = Some(parent.clone());
            }
            let controllers: Vec<_> = match version {
                Version::V1 => controllers,
                Version::V2 => unified_controllers(&parent),
            }
            .into_iter()
            .filter(|controller| !taken.contains(controller))
            .collect();
            if controllers.is_empty() {
                continue;
            }
            taken.extend(&controllers);
            cgroups.make_home(version, parent, controllers)?;
        }
        for (controller, name, what, remedy) in REQUIRED {
            if !taken.contains(controller) && !without(Defence::HeldLimits) {
                if let Some((own, above)) =
                    unified.and_then(|own| Some((own.clone(), delegates_not(&own, *controller)?)))
                {
                    return Err(FindError::Undelegated { what, controller: name, above, own });
                }
                return Err(FindError::Missing { what, remedy });
            }
        }
        if !taken.contains(&Controller::Cpuacct) && !cgroups.accounts_on_unified() {
            return Err(FindError::Missing {
                what: "processor time",
                remedy: "mount the cpuacct controller",
            });
        }
        Ok(cgroups)
    }

    fn accounts_on_unified(&self) -> bool {
        self.hierarchies
            .iter()
            .any(|place| place.version == Version::V2 && place.controllers.contains(&Controller::Cpu))
    }

    fn make_home(
        &mut self,
        version: Version,
        parent: PathBuf,
        controllers: Vec<Controller>,
    ) -> Result<(), FindError> {
        let home = parent.join(&self.home_name);
        let failed = |source| FindError::Home { path: home.clone(), source };
        if version == Version::V2 {
            delegate(&parent, &controllers).map_err(failed)?;
        }
        match fs::create_dir(&home) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(e)),
            _ => {}
        }
        if version == Version::V2 {
            enable(&home, &controllers).map_err(failed)?;
        }
        if version == Version::V1 && controllers.contains(&Controller::Cpuset) {
            for file in ["cpuset.cpus", "cpuset.mems"] {
                write_file(&home.join(file), read_text(&parent, file).trim()).map_err(failed)?;
            }
        }
        self.hierarchies.push(Hierarchy { version, controllers, parent, home });
        Ok(())
    }

    /// The processors to which jobs can be bound, as a list of cpuset(7); none where they cannot be.
    pub(crate) fn processors(&self) -> Option<String> {
        let place = self.hierarchies.iter().find(|place| place.controllers.contains(&Controller::Cpuset))?;
        let file = match place.version {
            Version::V1 => "cpuset.effective_cpus",
            Version::V2 => "cpuset.cpus.effective",
        };
        Some(read_text(&place.home, file))
    }

    /// Has the use of these directories' disks counted, and limited where a job is to be.
    ///
    /// # Errors
    /// Why their use cannot be limited here.
    pub(crate) fn watch_disks(&mut self, data_dir: &Path, others: &[&Path]) -> Result<(), String> {
        let (disks, unknown) = Disk::all_of(data_dir, others);
        self.disks = disks.into();
        let place = self.hierarchies.iter().find(|place| place.controllers.contains(&Controller::Io));
        let place = place.ok_or("it has no io controller (blkio on cgroup v1)")?;
        if place.version == Version::V1 {
            v1::count_io(&place.home, &self.disks);
        }
        let file = match place.version {
            Version::V1 => "blkio.throttle.write_bps_device",
            // The home's own limit would be the jobs' together.
            Version::V2 => "io.max",
        };
        if !place.home.join(file).exists() {
            return Err("its kernel does not hold I/O back (CONFIG_BLK_DEV_THROTTLING)".to_owned());
        }
        unknown.map_or(Ok(()), Err)
    }

    /// Whether swap can be limited: by the kernel's accounting, or because there is none.
    pub(crate) fn limits_swap(&self) -> bool {
        let accounted = self.hierarchies.iter().any(|place| {
            let file = match place.version {
                Version::V1 => "memory.memsw.limit_in_bytes",
                Version::V2 => "memory.swap.max",
            };
            place.controllers.contains(&Controller::Memory) && place.home.join(file).exists()
        });
        accounted || fs::read_to_string("/proc/swaps").is_ok_and(|swaps| swaps.lines().count() <= 1)
    }

    /// Removes what killed workers left in this worker's neighbourhood; returns how many groups of jobs.
    pub(crate) fn reap(&self) -> u64 {
        let mut reaped = std::collections::BTreeSet::new();
        for hierarchy in &self.hierarchies {
            for home in children(&hierarchy.parent) {
                let name = home.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                let identity = name.strip_prefix(HOME_PREFIX).filter(|_| name != LEAF);
                if identity.is_none_or(is_alive) {
                    continue;
                }
                for job in children(&home) {
                    kill_all(&job);
                    super::remove(&job);
                    reaped.insert(format!("{name}/{}", job.file_name().unwrap_or_default().display()));
                }
                super::remove(&home);
            }
        }
        reaped.len() as u64
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        self.spare.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
        for hierarchy in &self.hierarchies {
            super::remove(&hierarchy.home);
        }
    }
}

/// The controller and its name, what it limits, and what to do where the kernel has it not.
const REQUIRED: &[(Controller, &str, &str, &str)] = &[
    (
        Controller::Memory,
        "memory",
        "memory",
        "enable the memory controller (kernel parameter cgroup_enable=memory)",
    ),
    (Controller::Pids, "pids", "processes", "enable the pids controller (CONFIG_CGROUP_PIDS)"),
    (Controller::Cpu, "cpu", "processor time", "enable the cpu controller (CONFIG_CFS_BANDWIDTH)"),
];

/// The nearest group above this one of v2 that has a controller which this one has not; none if none has.
fn delegates_not(own: &Path, controller: Controller) -> Option<PathBuf> {
    own.ancestors()
        .skip(1)
        .take_while(|above| above.join("cgroup.controllers").exists())
        .find(|above| unified_controllers(above).contains(&controller))
        .map(Path::to_owned)
}

fn controller_of(name: &str) -> Option<Controller> {
    Some(match name {
        "memory" => Controller::Memory,
        "pids" => Controller::Pids,
        "cpu" => Controller::Cpu,
        "cpuacct" => Controller::Cpuacct,
        "blkio" | "io" => Controller::Io,
        "cpuset" => Controller::Cpuset,
        _ => return None,
    })
}

/// The worker's own cgroup in every mounted hierarchy, v1 first.
fn places(mountinfo: &str, own: &str) -> Vec<(Version, PathBuf, Vec<Controller>)> {
    let own: BTreeMap<&str, &str> = own
        .lines()
        .filter_map(|line| {
            let (_, rest) = line.split_once(':')?;
            rest.split_once(':')
        })
        .collect();
    let mut found: Vec<_> = mountinfo
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let mut fields = before.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            let mut fields = after.split(' ');
            let (kind, _source, options) = (fields.next()?, fields.next()?, fields.next()?);
            let (version, path, controllers) = match kind {
                "cgroup2" => (Version::V2, own.get("")?, Vec::new()),
                "cgroup" => {
                    let names = own.iter().find(|(names, _)| {
                        !names.is_empty()
                            && names.split(',').all(|name| options.split(',').any(|o| o == name))
                    })?;
                    (Version::V1, names.1, names.0.split(',').filter_map(controller_of).collect())
                }
                _ => return None,
            };
            let below = path.strip_prefix(root.trim_end_matches('/')).unwrap_or(path);
            let place = Path::new(point).join(below.trim_start_matches('/'));
            // Who was moved into a leaf before is still at home in the group above.
            let place = match place.parent() {
                Some(above) if version == Version::V2 && place.ends_with(LEAF) => above.to_owned(),
                _ => place,
            };
            Some((version, place, controllers))
        })
        .collect();
    found.sort_by_key(|(version, _, _)| *version == Version::V2);
    found
}

fn unified_controllers(dir: &Path) -> Vec<Controller> {
    read_text(dir, "cgroup.controllers").split_whitespace().filter_map(controller_of).collect()
}

/// Lets controllers be used below a cgroup, all or none of them: in a group that has processes, some could be had
/// alone, and would turn it into a threaded one.
fn enable(dir: &Path, controllers: &[Controller]) -> io::Result<()> {
    let names = controllers.iter().filter_map(|controller| match controller {
        Controller::Memory => Some("+memory"),
        Controller::Pids => Some("+pids"),
        Controller::Cpu => Some("+cpu"),
        Controller::Io => Some("+io"),
        Controller::Cpuset => Some("+cpuset"),
        Controller::Cpuacct => None,
    });
    write_file(&dir.join("cgroup.subtree_control"), &names.collect::<Vec<_>>().join(" "))
}

/// Lets controllers be used below the worker's own cgroup. On v2 a cgroup has either processes or
/// controlled children ("no internal processes"): those that are in it, the worker among them, step down into a leaf
/// first.
fn delegate(parent: &Path, controllers: &[Controller]) -> io::Result<()> {
    /// Processes may be started, or end, while others are moved.
    const TRIES: usize = 20;
    let mut enabled = enable(parent, controllers);
    for _ in 0..TRIES {
        match &enabled {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            _ => break,
        }
        let leaf = parent.join(LEAF);
        match fs::create_dir(&leaf) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        for pid in read_text(parent, "cgroup.procs").lines() {
            match write_file(&leaf.join("cgroup.procs"), pid) {
                Err(e) if e.raw_os_error() != Some(libc::ESRCH) => return Err(e),
                _ => {}
            }
        }
        enabled = enable(parent, controllers);
    }
    enabled
}

/// This process, told apart from a later one with the same pid.
fn own_identity() -> String {
    let pid = std::process::id();
    format!("{pid}-{}", start_time(&pid.to_string()).unwrap_or_default())
}

/// Clock ticks after boot at which a process began: field 22 of proc_pid_stat(5).
fn start_time(pid: &str) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19).map(str::to_owned)
}

fn is_alive(identity: &str) -> bool {
    identity.split_once('-').is_some_and(|(pid, began)| start_time(pid).is_some_and(|now| now == began))
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Kills whatever is left in a group.
fn kill_all(dir: &Path) {
    if write_file(&dir.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    for pid in read_text(dir, "cgroup.procs").lines().filter_map(|pid| pid.parse().ok()) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v1_hierarchies_are_found_below_the_own_cgroup() {
        let mountinfo = "\
30 20 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
32 30 0:28 /a /sys/fs/cgroup/memory rw shared:1 - cgroup cgroup rw,memory\n\
33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let own = "3:memory:/a/b\n2:cpu,cpuacct:/\n1:name=systemd:/x\n0::/u\n";
        let found = places(mountinfo, own);
        assert_eq!(
            found,
            [
                (
                    Version::V1,
                    "/sys/fs/cgroup/cpu,cpuacct/".into(),
                    vec![Controller::Cpu, Controller::Cpuacct]
                ),
                (Version::V1, "/sys/fs/cgroup/memory/b".into(), vec![Controller::Memory]),
                (Version::V2, "/sys/fs/cgroup/unified/u".into(), vec![]),
            ]
        );
        let again = places(mountinfo, "0::/u/hutch-worker\n");
        assert_eq!(again, [(Version::V2, "/sys/fs/cgroup/unified/u".into(), vec![])]);
    }

    #[test]
    fn a_controller_that_is_not_delegated_is_found_above() {
        let root = tempfile::tempdir().expect("dir");
        let (slice, own) = (root.path().join("user.slice"), root.path().join("user.slice/session"));
        fs::create_dir_all(&own).expect("make");
        for (dir, controllers) in [(root.path(), "cpu memory pids"), (&slice, "memory pids"), (&own, "")] {
            fs::write(dir.join("cgroup.controllers"), controllers).expect("write");
        }
        assert_eq!(delegates_not(&own, Controller::Memory).as_deref(), Some(&*slice));
        assert_eq!(delegates_not(&own, Controller::Cpu).as_deref(), Some(root.path()));
        assert_eq!(delegates_not(&own, Controller::Cpuset), None);
        let error = FindError::Undelegated { what: "memory", controller: "memory", above: slice, own };
        let said = error.to_string();
        assert!(
            said.contains("`+memory`")
                && said.contains("Delegate=yes")
                && said.contains("user.slice/session")
        );
    }

    #[test]
    fn a_process_is_known_by_pid_and_start() {
        assert!(is_alive(&own_identity()));
        assert!(!is_alive(&format!("{}-1", std::process::id())));
        assert!(!is_alive("nonsense"));
    }
}
