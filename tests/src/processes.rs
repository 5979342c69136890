//! Processes, mounts and cgroups of this host, as proc(5) shows them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A process, told apart from a later one with the same pid.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its pid here.
    pub pid: u32,
    began: String,
}

/// Fields of proc_pid_stat(5) from the third on: state, parent, …
fn stat(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

impl Process {
    /// The process that has this pid now.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        Some(Self { pid, began: stat(pid)?.get(19)?.clone() })
    }

    /// Whether it has not ended; one that nobody has waited for has.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        stat(self.pid)
            .is_some_and(|fields| fields.get(19) == Some(&self.began) && fields[0] != "Z" && fields[0] != "X")
    }

    /// The processes that it started and that live.
    #[must_use]
    pub fn children(&self) -> Vec<Self> {
        let parent = self.pid.to_string();
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| stat(*pid).is_some_and(|fields| fields.get(1) == Some(&parent)))
            .filter_map(Self::of)
            .collect()
    }

    /// Its children, theirs, and so on.
    #[must_use]
    pub fn descendants(&self) -> Vec<Self> {
        let mut all = Vec::new();
        let mut open = self.children();
        while let Some(process) = open.pop() {
            open.extend(process.children());
            all.push(process);
        }
        all
    }

    /// How many descriptors it has open.
    #[must_use]
    pub fn open_fds(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid)).map_or(0, Iterator::count)
    }

    /// Its resident memory in kB.
    #[must_use]
    pub fn resident_kb(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok()).unwrap_or(0)
    }

    /// How many mounts its namespace has.
    #[must_use]
    pub fn mounts(&self) -> usize {
        fs::read_to_string(format!("/proc/{}/mountinfo", self.pid)).map_or(0, |text| text.lines().count())
    }

    /// How many files and directories there are in its root, on the same file system.
    #[must_use]
    pub fn root_entries(&self) -> usize {
        use std::os::unix::fs::MetadataExt as _;
        let root = PathBuf::from(format!("/proc/{}/root/", self.pid));
        let Ok(device) = fs::metadata(&root).map(|meta| meta.dev()) else { return 0 };
        let (mut count, mut open) = (0, vec![root]);
        while let Some(dir) = open.pop() {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                count += 1;
                if entry.metadata().is_ok_and(|meta| meta.is_dir() && meta.dev() == device) {
                    open.push(entry.path());
                }
            }
        }
        count
    }

    /// The homes of its cgroups: `hutch-PID-…`, in every hierarchy.
    #[must_use]
    pub fn cgroup_homes(&self) -> Vec<PathBuf> {
        homes(&format!("hutch-{}-", self.pid))
    }

    /// The cgroups of its jobs: what is below its homes.
    #[must_use]
    pub fn cgroups(&self) -> usize {
        self.cgroup_homes().iter().map(|home| children(home).len()).sum()
    }
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Cgroups whose name begins so.
fn homes(prefix: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open: Vec<PathBuf> = cgroup_mounts().into_iter().collect();
    while let Some(dir) = open.pop() {
        for child in children(&dir) {
            let name = child.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.starts_with(prefix) {
                found.push(child);
            } else {
                open.push(child);
            }
        }
    }
    found
}

fn cgroup_mounts() -> BTreeSet<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            after.starts_with("cgroup").then(|| before.split(' ').nth(4)).flatten()
        })
        .map(PathBuf::from)
        .collect()
}

/// Files and bytes below a directory.
#[must_use]
pub fn size(dir: &Path) -> (usize, u64) {
    let (mut count, mut bytes) = (0, 0);
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            count += 1;
            if meta.is_dir() {
                open.push(entry.path());
            } else {
                bytes += meta.len();
            }
        }
    }
    (count, bytes)
}
