//! Where attacks are made: a service in a directory of its own, and what is measured of it and of its host.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hutch_tests::house::{House, Served};
use hutch_tests::processes::Process;
use hutch_tests::programs::{self, Program};
use serde_json::{Value, json};

/// Which binary.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    /// The product.
    Product,
    /// The tests' own, and which defences are taken away.
    Weak(PathBuf, String),
}

/// A service on which an attack is made.
#[derive(Debug)]
pub(crate) struct Site {
    served: Served,
    directory: PathBuf,
    kind: Kind,
}

/// How much slower a machine may be than the one that the bounds are for.
const PATIENCE: Duration = Duration::from_secs(300);
/// What a worker may keep of memory that an attack made it use: the allocator holds on to what the largest spec took.
const SLACK_KB: u64 = 64 << 10;
/// A benign job after an attack: its answer comes within this time on an idle machine.
const SOON: Duration = Duration::from_secs(2);

/// What is as before after an attack.
#[derive(Debug)]
pub(crate) struct Figures {
    processes: Vec<(Process, usize, usize)>,
    resident_kb: u64,
    cgroups: usize,
}

impl Site {
    /// Starts a service with two slots, which may stack any directory as a layer, and mount those below `allowed`.
    pub(crate) fn open(house: &House, kind: Kind, more: &[(&str, String)]) -> Self {
        let binary = match &kind {
            Kind::Product => hutch_tests::hutch::binary(),
            Kind::Weak(binary, _) => binary,
        };
        let allowed = house.path("allowed");
        fs::create_dir_all(&allowed).unwrap();
        let mut command = house.command_of(binary, &["up", "--slots", "2"]);
        command.env("HUTCH__WORKER__LAYER_DIRS", "/").env("HUTCH__WORKER__ALLOWED_HOST_PATHS", &allowed);
        command.envs(more.iter().map(|(name, value)| (*name, value)));
        if let Kind::Weak(_, without) = &kind {
            // It would see that it is weak, and take no jobs.
            command.env("HUTCH_WITHOUT", without).env("HUTCH__WORKER__PROVE", "false");
        }
        let site = Self { served: Served::start(command), directory: house.path(""), kind };
        // Without some defences no job of the host's programs runs at all.
        if matches!(site.kind, Kind::Product) {
            site.runs_a_job();
        }
        site
    }

    /// Whether this is the product, and not a binary that lacks a defence.
    pub(crate) fn is_the_product(&self) -> bool {
        matches!(self.kind, Kind::Product)
    }

    /// The service's data directory.
    pub(crate) fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// The directory below which host paths are allowed as volumes.
    pub(crate) fn allowed(&self) -> PathBuf {
        self.directory.join("allowed")
    }

    /// A directory of the test's own that no config allows.
    pub(crate) fn place(&self, name: &str) -> PathBuf {
        let place = self.directory.join("places").join(name);
        fs::create_dir_all(&place).unwrap();
        place
    }

    /// The service.
    pub(crate) fn served(&self) -> &Served {
        &self.served
    }

    /// A command of the same binary, on a data directory of its own.
    pub(crate) fn command(&self, wrapper: &[&str], arguments: &[&str]) -> Command {
        let binary = match &self.kind {
            Kind::Product => hutch_tests::hutch::binary(),
            Kind::Weak(binary, _) => binary,
        };
        let mut words = wrapper.iter().map(OsStr::new).chain([binary.as_os_str()]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).args(arguments).env("HUTCH__DATA_DIR", self.place("data-of-a-command"));
        if let Kind::Weak(_, without) = &self.kind {
            command.env("HUTCH_WITHOUT", without);
        }
        command
    }

    /// Runs a job: its JobResult, or the problem that was answered in its place.
    pub(crate) fn job(&self, spec: &Value) -> Value {
        // The longest that a gateway waits: where all is computed in software, a job takes its time.
        self.served.post("/v1/jobs?wait_ms=600000", spec)
    }

    /// Runs jobs all at one time: their results.
    pub(crate) fn jobs(&self, specs: &[Value]) -> Vec<Value> {
        let ids: Vec<_> = specs.iter().map(|spec| self.served.post("/v1/jobs", spec)).collect();
        let result = |answer: &Value| {
            let path = format!("/v1/jobs/{}", answer["id"].as_str().unwrap_or_else(|| panic!("{answer}")));
            let begun = Instant::now();
            loop {
                let job = self.served.get_json(&path);
                if job["state"] == "finished" {
                    return job["result"].clone();
                }
                assert!(begun.elapsed() < PATIENCE * 5, "{path} is {}", job["state"]);
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        ids.iter().map(result).collect()
    }

    /// What a job that must succeed writes to stdout.
    pub(crate) fn stdout(&self, spec: &Value) -> String {
        let result = self.job(spec);
        assert_eq!(result["status"], "succeeded", "{result:#}");
        text(&result["stdout"])
    }

    /// What a shell's program writes as this user.
    pub(crate) fn shell(&self, user: &str, script: &str) -> String {
        self.stdout(&job(&["sh", "-c", script], &json!({"user": user})))
    }

    /// What one of the attacks of `hostile.c` says.
    pub(crate) fn hostile(&self, words: &[&str], more: &Value) -> String {
        self.stdout(&hostile(words, more))
    }

    fn processes(&self) -> Vec<Process> {
        let own = self.served.process();
        let mut all = own.descendants();
        all.push(own);
        all
    }

    /// How many files there are in the roots of the service's launchers: those with next to no mounts.
    pub(crate) fn roots(&self) -> usize {
        let launchers = self.processes().into_iter().filter(|process| (1..8).contains(&process.mounts()));
        launchers.map(|process| process.root_entries()).max().unwrap_or(0)
    }

    /// What is to be as before.
    pub(crate) fn figures(&self) -> Figures {
        // One init is parked ahead for each slot; give it the time.
        std::thread::sleep(Duration::from_millis(100));
        let processes = self.processes().into_iter().map(|process| {
            let (fds, mounts) = (process.open_fds(), process.mounts());
            (process, fds, mounts)
        });
        Figures {
            processes: processes.collect(),
            resident_kb: self.served.process().resident_kb(),
            cgroups: self.cgroups(),
        }
    }

    fn cgroups(&self) -> usize {
        self.processes().iter().map(Process::cgroups).sum()
    }

    /// What is not as before, if anything.
    fn difference(&self, before: &Figures) -> Option<String> {
        let now = self.processes();
        // Each slot that has been used parks an init of its own; a busy host may not have done so at the first look.
        if now.len() > before.processes.len() + SLOTS {
            return Some(format!("{} processes, {} before", now.len(), before.processes.len()));
        }
        let own = self.served.process();
        if own.resident_kb() > before.resident_kb + SLACK_KB {
            return Some(format!("{} kB resident, {} before", own.resident_kb(), before.resident_kb));
        }
        let cgroups = self.cgroups();
        if cgroups > before.cgroups + SPARE_GROUPS {
            return Some(format!("{cgroups} cgroups, {} before", before.cgroups));
        }
        before.processes.iter().filter(|(process, ..)| process.is_alive()).find_map(
            |(process, fds, mounts)| {
                let (fds_now, mounts_now) = (process.open_fds(), process.mounts());
                (fds_now > fds + SPARE_FDS || mounts_now > *mounts).then(|| {
                    format!(
                        "{process:?}: {fds_now} descriptors, {mounts_now} mounts; {fds} and {mounts} before"
                    )
                })
            },
        )
    }

    /// Worker and launcher are as before, a job runs, and the metrics answer.
    pub(crate) fn is_as_before(&self, before: &Figures) {
        let took = self.runs_a_job();
        eprintln!("the next job was answered in {} ms", took.as_millis());
        if std::env::var_os("HUTCH_LONG_TESTS").is_some() {
            assert!(took < SOON, "the next job took {took:?}");
        }
        let metrics = self.served.get("/metrics");
        assert!(metrics.contains("hutch_jobs_total{"), "{metrics}");
        let begun = Instant::now();
        while let Some(difference) = self.difference(before) {
            assert!(begun.elapsed() < PATIENCE, "not as before: {difference}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs a job that does no harm; how long its answer took.
    fn runs_a_job(&self) -> Duration {
        let begun = Instant::now();
        assert_eq!(self.stdout(&json!({"layers": ["host"], "command": ["echo", "benign"]})), "benign\n");
        begun.elapsed()
    }

    /// Ends the service; its cgroups must go.
    pub(crate) fn close(self) {
        let processes = self.processes();
        drop(self.served);
        let begun = Instant::now();
        while processes.iter().any(|process| process.is_alive() || !process.cgroup_homes().is_empty()) {
            assert!(begun.elapsed() < PATIENCE, "of {processes:?} something is left");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The slots of a site.
const SLOTS: usize = 2;
/// Groups that are made ahead, in every hierarchy.
const SPARE_GROUPS: usize = 16;
/// Descriptors that a worker may have more: a connection that is kept, and of each slot its parked init and spare group.
const SPARE_FDS: usize = 40;

/// A job of the host's programs and the tests' own.
pub(crate) fn job(command: &[&str], more: &Value) -> Value {
    let mut layers = vec![json!("host")];
    layers.extend(programs::layer().map(|dir| json!(format!("dir:{}", dir.display()))));
    let mut spec = json!({"layers": layers, "command": command, "cwd": "/"});
    for (name, value) in more.as_object().into_iter().flatten() {
        spec[name] = value.clone();
    }
    spec
}

/// A job that is one of the attacks of `hostile.c`.
pub(crate) fn hostile(words: &[&str], more: &Value) -> Value {
    let path = programs::inside(Program::Hostile);
    job(&[&[path.as_str()], words].concat(), more)
}

/// What one of the attacks of `hostile.c` says outside of a sandbox.
pub(crate) fn hostile_outside(words: &[&str]) -> Result<String, String> {
    let program = programs::on_host(Program::Hostile).ok_or("there is no C compiler")?;
    let output = Command::new(program).args(words).output().map_err(|e| e.to_string())?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A stream's text in a JobResult.
pub(crate) fn text(stream: &Value) -> String {
    stream["text"].as_str().unwrap_or_default().to_owned()
}

/// What no job may change of its host.
pub(crate) fn host_settings() -> Vec<String> {
    const SETTINGS: &[&str] = &[
        "kernel/core_pattern",
        "kernel/hostname",
        "kernel/modprobe",
        "kernel/panic",
        "kernel/pid_max",
        "kernel/randomize_va_space",
        "kernel/sysrq",
        "net/ipv4/ip_forward",
        "vm/overcommit_memory",
    ];
    let mut all: Vec<String> = SETTINGS
        .iter()
        .map(|name| {
            format!("{name}: {}", fs::read_to_string(Path::new("/proc/sys").join(name)).unwrap_or_default())
        })
        .collect();
    let binary = fs::metadata(hutch_tests::hutch::binary()).unwrap();
    all.push(format!("binary: {} {:o} {} {}", binary.len(), binary.mode(), binary.mtime(), binary.ctime()));
    all
}

/// The kernel and the version of cgroups, for the table.
pub(crate) fn host() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kernel = release.trim().splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let version = if mounts.contains(" - cgroup ") { "v1" } else { "v2" };
    format!("{kernel} {version}")
}
