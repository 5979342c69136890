//! Whether jobs are isolated on this host, shown by attacks on a sandbox of the engine's own.
//!
//! 1. A job runs this process's own binary as `probe`, as root of its sandbox, and says of each trial what came of it
//!    (`inside`). What it must not reach was made before, and is named to it.
//! 2. Another takes more memory than it may, and must be killed for it.
//! 3. Each trial is judged here: one of which nothing was heard has failed.

mod inside;

use std::collections::BTreeMap;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};

use hutch_proto::{JobSpec, Reason, Status, VolumeSource};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::engine::Engine;
use crate::plan::VolumePlan;
use crate::report::Report;

pub use inside::probe;

/// Where the sandbox shows the directory of the binary.
const PLACE: &str = "/proof";
/// What the job that tries to exceed its limits may have.
const MEMORY_BYTES: u64 = 32 << 20;
/// What it takes, if it is let.
const TAKEN_BYTES: u64 = 3 * MEMORY_BYTES;

/// The trials, and what to do about one that is not held.
const TRIALS: &[(&str, &str)] = &[
    (
        "namespaces",
        "use a kernel with all namespaces (CONFIG_NAMESPACES, CONFIG_USER_NS, CONFIG_NET_NS, CONFIG_PID_NS)",
    ),
    ("processes", "use a kernel with CONFIG_PID_NS; a proc of its own must be mountable where hutch runs"),
    ("descriptors", "start hutch with no open files but 0, 1 and 2"),
    ("environment", "report it: no job may see the environment of its worker"),
    ("capabilities", "do not change the secure bits of the user that hutch runs as; report it"),
    ("no_new_privileges", "use Linux 6.1 or newer"),
    ("system_calls", "use a kernel with CONFIG_SECCOMP_FILTER"),
    (
        "devices",
        "allow device nodes to be bind-mounted where hutch runs; mount its data directory with nodev",
    ),
    ("proc", "run it where /proc has nothing mounted below it, or with CAP_SYS_ADMIN in that namespace"),
    ("host_files", "mount the data directory's file system where no job's layers lead to it"),
    ("network", "use a kernel with CONFIG_NET_NS; give hutch CAP_NET_ADMIN"),
    (
        "process_limit",
        "enable the pids controller (CONFIG_CGROUP_PIDS), and delegate it (systemd: Delegate=yes)",
    ),
    ("disk_limit", "use a kernel with CONFIG_TMPFS"),
    (
        "memory_limit",
        "enable the memory controller (cgroup_enable=memory), and delegate it (systemd: Delegate=yes)",
    ),
    ("store", "chmod o-rwx the data directory: a user of this host could run what is in layers"),
];

const SANDBOX_REMEDY: &str =
    "run it as root, or in a container with SYS_ADMIN, NET_ADMIN, SYS_PTRACE and writable cgroups";

/// What came of one attack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// Its name, such as `system_calls`.
    pub name: String,
    /// Whether the sandbox held.
    pub held: bool,
    /// What was seen.
    pub seen: String,
    /// What to do about it; empty if it held.
    pub remedy: String,
}

impl Trial {
    fn judged(name: &str, outcome: Result<String, String>) -> Self {
        let remedy =
            || TRIALS.iter().find(|(trial, _)| *trial == name).map_or(SANDBOX_REMEDY, |trial| trial.1);
        match outcome {
            Ok(seen) => Self { name: name.to_owned(), held: true, seen, remedy: String::new() },
            Err(seen) => Self { name: name.to_owned(), held: false, seen, remedy: remedy().to_owned() },
        }
    }
}

/// What came of all attacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Each of them, in the order in which they were made.
    pub trials: Vec<Trial>,
}

impl Proof {
    /// No sandbox could be made or nothing was heard of it, for this reason.
    #[must_use]
    pub fn failed(why: impl Into<String>) -> Self {
        Self { trials: vec![Trial::judged("sandbox", Err(why.into()))] }
    }

    /// What is not held, each with its remedy; none if everything is.
    #[must_use]
    pub fn shortfall(&self) -> Option<String> {
        let failed = self.trials.iter().filter(|trial| !trial.held);
        let said: Vec<_> =
            failed.map(|trial| format!("{}: {} ({})", trial.name, trial.seen, trial.remedy)).collect();
        (!said.is_empty()).then(|| said.join("; "))
    }
}

/// What a job must not reach, as the program in it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Host {
    /// The engine's own namespaces, by their names in /proc/self/ns: namespaces(7).
    namespaces: BTreeMap<String, String>,
    /// The name of an abstract socket on which the engine listens: unix(7).
    socket: String,
    /// A directory of the host that no layer shows.
    directory: PathBuf,
}

impl Engine {
    /// Attacks sandboxes of its own, in slot 0, in which no job may run meanwhile. The binary that this process runs must
    /// hand the words after `probe` on its command line to [`probe`]. It takes some tens of milliseconds.
    pub async fn prove(&self) -> Proof {
        let report = match self.attacked().await {
            Ok(report) => report,
            Err(why) => return Proof::failed(why),
        };
        if report.status != Status::Succeeded {
            let said = String::from_utf8_lossy(&report.stderr.data).into_owned();
            return Proof::failed(format!(
                "a job that tries attacks ended as {}: {} {said}",
                report.status, report.message
            ));
        }
        let setup = report.durations.setup_us;
        let ran = format!("a job ran; it took {}.{:03}ms to prepare", setup / 1000, setup % 1000);
        let heard: Vec<(String, Result<String, String>)> = report
            .stdout
            .data
            .split(|byte| *byte == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
            .collect();
        take_down(report).await;
        let mut trials = vec![Trial::judged("sandbox", Ok(ran))];
        for (name, _) in TRIALS {
            let outcome = match *name {
                "memory_limit" => self.takes_memory().await,
                "store" => store(self.data_dir()),
                name => heard.iter().find(|(trial, _)| trial == name).map_or_else(
                    || Err("nothing was heard of it".to_owned()),
                    |(_, outcome)| outcome.clone(),
                ),
            };
            trials.push(Trial::judged(name, outcome));
        }
        Proof { trials }
    }

    /// Has the attacks made.
    async fn attacked(&self) -> Result<Report, String> {
        let socket = format!("hutch-proof-{}", hutch_proto::JobId::generate());
        let listener = SocketAddr::from_abstract_name(&socket)
            .and_then(|address| UnixListener::bind_addr(&address))
            .map_err(|e| format!("cannot listen on an abstract socket: {e}"))?;
        let host = Host { namespaces: inside::namespaces(), socket, directory: self.data_dir().to_owned() };
        let host =
            serde_json::to_string(&host).map_err(|e| format!("cannot name what is of the host: {e}"))?;
        let limits =
            json!({"memory_bytes": 128 << 20, "disk_bytes": inside::DISK_BYTES, "pids": inside::PROCESSES});
        let report = self.run_probe(&["attacks", &host], &limits).await;
        drop(listener);
        report
    }

    /// Takes more memory than it may: it must be killed for that.
    async fn takes_memory(&self) -> Result<String, String> {
        let limits = json!({"memory_bytes": MEMORY_BYTES});
        let report = self.run_probe(&["memory", &TAKEN_BYTES.to_string()], &limits).await?;
        let (reason, status, message) = (report.reason, report.status, report.message.clone());
        take_down(report).await;
        match reason {
            Some(Reason::Memory) => {
                Ok(format!("a program that took more than {} MiB was killed", MEMORY_BYTES >> 20))
            }
            _ => Err(format!("a program took {} MiB and ended as {status}: {message}", TAKEN_BYTES >> 20)),
        }
    }

    /// Runs this process's own binary as `probe` in a sandbox, as its root.
    async fn run_probe(&self, words: &[&str], limits: &serde_json::Value) -> Result<Report, String> {
        let binary = std::env::current_exe().map_err(|e| format!("cannot find the binary that runs: {e}"))?;
        let (Some(dir), Some(name)) = (binary.parent(), binary.file_name().and_then(|name| name.to_str()))
        else {
            return Err(format!("{} cannot be shown to a job", binary.display()));
        };
        let program = format!("{PLACE}/{name}");
        let command: Vec<&str> =
            [program.as_str(), "probe"].into_iter().chain(words.iter().copied()).collect();
        // Whatever jobs are given here by default, what is refused is answered with an error, which the program expects.
        let spec = json!({
            "layers": ["host"], "command": command, "user": "root", "limits": limits,
            "seccomp": {"profile": "default", "refused": "errno"},
        });
        let job = JobSpec::parse(spec.to_string().as_bytes()).map_err(|e| e.to_string())?;
        let shown = VolumePlan {
            source: VolumeSource::HostPath(dir.display().to_string()),
            target: PLACE.to_owned(),
            read_only: true,
            ours: true,
        };
        Ok(self.run_own(job, shown).await)
    }
}

/// Nobody else on the host may come to what is in layers.
fn store(data_dir: &Path) -> Result<String, String> {
    let mode = data_dir.metadata().map_err(|e| format!("{}: {e}", data_dir.display()))?.permissions().mode();
    let seen = format!("{} has mode {:o}", data_dir.display(), mode & 0o7777);
    if mode & 0o007 == 0 { Ok(seen) } else { Err(seen) }
}

/// Takes a sandbox down; the next trial is in the same slot.
async fn take_down(report: Report) {
    if tokio::task::spawn_blocking(move || drop(report)).await.is_err() {
        tracing::error!("a sandbox could not be taken down, it is left for the reaper");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_held_is_told_with_its_remedy() {
        let held = Trial::judged("network", Ok("lo alone".to_owned()));
        assert_eq!(Proof { trials: vec![held.clone()] }.shortfall(), None);
        let through = Trial::judged("system_calls", Err("bpf: let through".to_owned()));
        let told = Proof { trials: vec![held, through] }.shortfall().expect("shortfall");
        assert!(told.starts_with("system_calls: bpf") && told.contains("CONFIG_SECCOMP_FILTER"), "{told}");
        assert!(Proof::failed("no cgroup").shortfall().expect("shortfall").contains("no cgroup"));
    }
}
