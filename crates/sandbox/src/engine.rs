//! The engine: one job, one fresh sandbox, from spec to report.
//!
//! `JobSpec -> Plan -> Prepared -> Running -> Exited -> Collected -> Report`: each stage consumes what the one
//! before made, and undoes itself when dropped. A job of several steps shares one Prepared; each step has
//! its own Running, in namespaces and a cgroup of its own.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use hutch_proto::{Captured, JobSpec, Reason, StepResult, Timeline, Timestamp, Usage};
use hutch_sandbox_sys::{CgroupHome, IdRange, Launcher as RawLauncher, RootIs};
use tokio_util::sync::CancellationToken;

use crate::cgroup::{Cgroups, GroupWatch, JobCgroup, Readings};
use crate::collect::{self, Collected};
use crate::config::EngineConfig;
use crate::host::{self, IdRanges};
use crate::hostlayer::HostLayer;
use crate::observe::{Observer, SlotGauges, Stream};
use crate::plan::{Abilities, JobPlan, StepPlan};
use crate::prepare::{DiskUse, OwnerMaps, Prepared, volumes_dir};
use crate::refusal::Refusal;
use crate::report::{Durations, Report};
use crate::spawn::{Means, ParkedInits, spawn, with_source};
use crate::supervise::{Exited, supervise};
use crate::verdict::{End, Observed, Verdict, decide};
use crate::{failure, seccomp};

/// A process of its own, small and with one thread, from which sandboxes are cloned.
#[derive(Debug)]
pub struct Launcher(RawLauncher);

impl Launcher {
    /// Forks the launcher. Call it first in `main`, while the process has one thread.
    ///
    /// # Errors
    /// If this process has threads already, or may not make mount namespaces.
    pub fn fork() -> Result<Self, EngineError> {
        let filter = seccomp::default_filter().map_err(|e| EngineError(e.to_string()))?;
        RawLauncher::fork(filter).map(Self).map_err(|e| match e {
            hutch_sandbox_sys::Errno::EPERM => EngineError(
                "this process may not make mount namespaces; run as root, or in a container with CAP_SYS_ADMIN"
                    .to_owned(),
            ),
            other => EngineError(format!("cannot fork the launcher: {}", other.desc())),
        })
    }
}

/// Why there can be no engine on this host; says what would help.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct EngineError(String);

/// One job for the engine.
#[derive(Debug)]
pub struct Order {
    /// The job, its blobs already resolved to inline content.
    pub job: JobSpec,
    /// The slot it runs in; no two running jobs share one.
    pub slot: u32,
    /// Cancels it.
    pub cancel: CancellationToken,
}

/// Runs jobs; cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    // Dropped first: with the launcher every sandbox dies, and its cgroups are free to go.
    launcher: RawLauncher,
    cgroups: Cgroups,
    config: EngineConfig,
    abilities: Abilities,
    host: Option<HostLayer>,
    ids: IdRanges,
    owner_maps: Vec<SlotMaps>,
    parked: ParkedInits,
    reaped: u64,
    gauges: Mutex<BTreeMap<u32, LiveGroup>>,
}

/// User namespaces through whose maps a slot's sandboxes see owners.
#[derive(Debug)]
struct SlotMaps {
    all: OwnedFd,
    stranger_root: OwnedFd,
}

impl SlotMaps {
    fn make(launcher: &RawLauncher, ids: IdRange) -> hutch_sandbox_sys::Result<Self> {
        Ok(Self {
            all: launcher.userns(ids, RootIs::Root)?,
            stranger_root: launcher.userns(ids, RootIs::Nobody)?,
        })
    }

    fn borrowed(&self) -> OwnerMaps<'_> {
        OwnerMaps { all: self.all.as_fd(), stranger_root: self.stranger_root.as_fd() }
    }
}

/// A running step's cgroup, as the gauges see it.
#[derive(Debug)]
struct LiveGroup {
    watch: GroupWatch,
    memory_limit_bytes: u64,
}

impl LiveGroup {
    fn gauges(&self, slot: u32) -> SlotGauges {
        let readings = self.watch.readings();
        SlotGauges {
            slot,
            memory_bytes: readings.memory_bytes,
            memory_limit_bytes: self.memory_limit_bytes,
            cpu_us: readings.cpu_us(),
            cpu_throttled_us: readings.throttled_us,
            pids: readings.pids,
            io_read_bytes: readings.io_read_bytes,
            io_write_bytes: readings.io_write_bytes,
            pressure_us: self.watch.pressure(),
        }
    }
}

impl Engine {
    /// An engine on this host: looks at what the kernel can do, removes what a killed predecessor left.
    ///
    /// # Errors
    /// If no job could be isolated here; the message names the remedy.
    pub fn new(launcher: Launcher, config: EngineConfig) -> Result<Self, EngineError> {
        let failed =
            |what: &str, e: &dyn std::error::Error| EngineError(format!("{what}: {}", with_source(e)));
        let launcher = launcher.0;
        let cgroups = Cgroups::find().map_err(|e| EngineError(with_source(&e)))?;
        let reaped = cgroups.reap();
        tell_launcher(&launcher, &cgroups)?;
        make_private(&config.data_dir).map_err(|e| failed("cannot make the data directory", &e))?;
        make_private(&volumes_dir(&config)).map_err(|e| failed("cannot make the volumes directory", &e))?;
        let host = if config.allow_host_layer {
            let dir = config.data_dir.join("host");
            make_private(&dir).map_err(|e| failed("cannot make the host layer", &e))?;
            Some(HostLayer::make(&dir).map_err(|e| failed("cannot make the host layer", &e))?)
        } else {
            None
        };
        let ids = IdRanges::take(config.slots).map_err(|e| failed("cannot take ids for the slots", &e))?;
        let owner_maps = (0..config.slots)
            .filter_map(|slot| ids.of(slot))
            .map(|range| SlotMaps::make(&launcher, range))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| {
                EngineError(format!(
                    "cannot make user namespaces: {}; see user.max_user_namespaces",
                    e.desc()
                ))
            })?;
        let abilities = Abilities {
            processors: cgroups.processors().map(|list| crate::plan::processors(&list)),
            swap: cgroups.limits_swap(),
            hard_limits: host::hard_limits(),
        };
        Ok(Self(Arc::new(Inner {
            launcher,
            cgroups,
            config,
            abilities,
            host,
            ids,
            owner_maps,
            parked: ParkedInits::default(),
            reaped,
            gauges: Mutex::new(BTreeMap::new()),
        })))
    }

    /// Runs one job to its verdict. Whatever goes wrong is in the report.
    pub async fn run(&self, order: Order, observer: &dyn Observer) -> Report {
        let mut course = Course::begin(self.clone(), order.slot);
        let plan = match JobPlan::new(&order.job, &self.0.config, &self.0.abilities) {
            Ok(plan) => plan,
            Err(refusal) => return course.refused(refusal),
        };
        match self.run_plan(&plan, &order, observer, &mut course).await {
            Ok(prepared) => {
                let collected = self.collect(plan, prepared, &mut course.remains).await;
                course.collected(collected)
            }
            Err(refusal) => course.refused(refusal),
        }
    }

    /// Runs all steps that are to run, and hands the file system on.
    async fn run_plan(
        &self,
        plan: &JobPlan,
        order: &Order,
        observer: &dyn Observer,
        course: &mut Course,
    ) -> Result<Prepared, Refusal> {
        let inner = &*self.0;
        let no_slot = || Refusal::host("there is no such slot");
        let ids = inner.ids.of(order.slot).ok_or_else(no_slot)?;
        let mut prepared = Prepared::new(plan, &inner.config, inner.host.as_ref(), ids)?;
        let told = AtomicBool::new(false);
        for (number, step) in plan.steps.iter().enumerate() {
            let means = Means {
                launcher: &inner.launcher,
                parked: &inner.parked,
                cgroups: &inner.cgroups,
                owner_maps: inner
                    .owner_maps
                    .get(order.slot as usize)
                    .map(SlotMaps::borrowed)
                    .ok_or_else(no_slot)?,
                ids,
            };
            // Two overlays on one upper directory must not be mounted at one time.
            course.remains.mounts.clear();
            let running = spawn(means, plan, number, &prepared)?;
            let _live = self.register(order.slot, &running.cgroup, step.limits.memory_bytes);
            if !told.swap(true, Ordering::Relaxed) {
                observer.started();
            }
            let exited = supervise(running, step, course.kept(), &prepared, &order.cancel, observer)
                .await
                .map_err(|e| Refusal::host(format!("lost sight of a sandbox: {e}")))?;
            let handed_back = exited.handed_back.take();
            if !course.step_done(step, plan, exited)? || number + 1 == plan.steps.len() {
                break;
            }
            match handed_back {
                Ok(Some(scratch)) => prepared.renew_scratch(scratch),
                _ => return Err(Refusal::host("a sandbox kept the job's files from its next step")),
            }
        }
        Ok(prepared)
    }

    /// Reads what the job wrote, if it asked for any of it.
    async fn collect(
        &self,
        plan: JobPlan,
        prepared: Prepared,
        remains: &mut Remains,
    ) -> Result<Collected, Refusal> {
        if plan.globs.is_empty() {
            remains.prepared = Some(prepared);
            return Ok(Collected::default());
        }
        let engine = self.clone();
        let work = move || (collect::collect(&plan, &prepared, &engine.0.config), prepared);
        let failed =
            |e: &dyn std::fmt::Display| Refusal::host(format!("cannot read what the job wrote: {e}"));
        let (collected, prepared) = tokio::task::spawn_blocking(work).await.map_err(|e| failed(&e))?;
        remains.prepared = Some(prepared);
        collected.map_err(|e| failed(&e))
    }

    fn register(&self, slot: u32, group: &JobCgroup, memory_limit_bytes: u64) -> Live<'_> {
        self.live().insert(slot, LiveGroup { watch: group.watch(), memory_limit_bytes });
        Live { engine: self, slot }
    }

    fn live(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, LiveGroup>> {
        self.0.gauges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cgroups of the jobs that run now.
    #[must_use]
    pub fn gauges(&self) -> Vec<SlotGauges> {
        self.live().iter().map(|(slot, group)| group.gauges(*slot)).collect()
    }

    /// Whether sandboxes can be made still: the launcher lives.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.0.launcher.is_alive()
    }

    /// How many left-over sandboxes were removed at the start.
    #[must_use]
    pub fn reaped(&self) -> u64 {
        self.0.reaped
    }
}

/// What is left of a job's sandboxes when its answer is there: dead, but not yet taken down.
///
/// Dropping it takes them down: mounts, scratch file system, cgroups, in that order. It takes a fraction of a
/// millisecond, seldom more, and blocks: drop it after answering, and before the slot runs its next job.
#[derive(Debug)]
pub struct Remains {
    mounts: Vec<OwnedFd>,
    prepared: Option<Prepared>,
    cgroups: Vec<JobCgroup>,
    engine: Engine,
    slot: u32,
}

impl Drop for Remains {
    fn drop(&mut self) {
        self.mounts.clear();
        self.prepared = None;
        self.cgroups.clear();
        let inner = &*self.engine.0;
        if !inner.config.prepare_ahead {
            return;
        }
        inner.cgroups.make_spare(inner.config.slots as usize);
        if let Some(ids) = inner.ids.of(self.slot) {
            inner.parked.refill(&inner.launcher, ids);
        }
    }
}

/// Takes a slot's gauges away when its step is over.
struct Live<'a> {
    engine: &'a Engine,
    slot: u32,
}

impl Drop for Live<'_> {
    fn drop(&mut self) {
        self.engine.live().remove(&self.slot);
    }
}

fn make_private(dir: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
}

fn tell_launcher(launcher: &RawLauncher, cgroups: &Cgroups) -> Result<(), EngineError> {
    let failed =
        |e: &dyn std::fmt::Display| EngineError(format!("cannot hand the cgroups to the launcher: {e}"));
    let parents = cgroups
        .hierarchies
        .iter()
        .map(|hierarchy| std::fs::File::open(&hierarchy.parent))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| failed(&e))?;
    let homes: Vec<_> = parents
        .iter()
        .map(|parent| CgroupHome { parent: parent.as_fd(), name: &cgroups.home_name })
        .collect();
    launcher.remember_cgroups(&homes).map_err(|e| failed(&e))
}

/// A job's usage as the contract shows it.
pub(crate) fn usage(readings: &Readings, wall_time_ms: u64, disk: DiskUse) -> Usage {
    // The two parts add up to what limits are held against: the whole is rounded, not each part.
    let cpu_system_ms = readings.cpu_system_us / 1000;
    Usage {
        wall_time_ms,
        cpu_user_ms: readings.cpu_us() / 1000 - cpu_system_ms,
        cpu_system_ms,
        cpu_throttled_ms: readings.throttled_us / 1000,
        memory_peak_bytes: readings.memory_peak_bytes,
        oom_kills: readings.oom_kills,
        pids_peak: readings.pids_peak,
        pids_denied: readings.pids_denied,
        io_read_bytes: readings.io_read_bytes,
        io_write_bytes: readings.io_write_bytes,
        disk_bytes: disk.bytes,
        disk_inodes: disk.inodes,
    }
}

/// What is known of a job so far.
struct Course {
    begun: Instant,
    started_at: Timestamp,
    begun_ns: u64,
    step_begun_ns: u64,
    step_begun_at: Timestamp,
    durations: Durations,
    steps: Vec<StepResult>,
    decided: Option<Verdict>,
    usage: Usage,
    remains: Remains,
}

impl Course {
    fn begin(engine: Engine, slot: u32) -> Self {
        let (now, at) = (hutch_sandbox_sys::process::monotonic_ns(), Timestamp::now());
        Self {
            begun: Instant::now(),
            started_at: at,
            begun_ns: now,
            step_begun_ns: now,
            step_begun_at: at,
            durations: Durations::default(),
            steps: Vec::new(),
            decided: None,
            usage: Usage::default(),
            remains: Remains { mounts: Vec::new(), prepared: None, cgroups: Vec::new(), engine, slot },
        }
    }

    /// Bytes of stdout and stderr that are kept of the steps so far.
    fn kept(&self) -> (u64, u64) {
        let sum = |of: fn(&StepResult) -> &Captured| {
            self.steps.iter().map(|step| of(step).data.len() as u64).sum::<u64>()
        };
        (sum(|step| &step.stdout), sum(|step| &step.stderr))
    }

    /// Takes in a step that is over; true if the next one is to run.
    fn step_done(&mut self, step: &StepPlan, plan: &JobPlan, exited: Exited) -> Result<bool, Refusal> {
        let now = hutch_sandbox_sys::process::monotonic_ns();
        let started_ns = exited.records.started_ns.unwrap_or(exited.dead_ns);
        let ended_ns = exited.records.ended.map_or(exited.dead_ns, |(_, at)| at).max(started_ns);
        let run_us = (ended_ns - started_ns) / 1000;
        let seen = Observed {
            cause: exited.cause,
            end: exited.records.ended.map(|(status, _)| End::of(status)),
            readings: exited.readings,
            wall_ms: run_us / 1000,
            idle_ms: u64::try_from(exited.idle.as_millis()).unwrap_or(u64::MAX),
            stdout_bytes: exited.stdout.bytes,
            stderr_bytes: exited.stderr.bytes,
            disk_full: (exited.disk.bytes_full, exited.disk.inodes_full),
            disk_bytes: exited.disk.bytes,
            disk_inodes: exited.disk.inodes,
        };
        let (cgroup, mounts) = exited.remains;
        self.remains.cgroups.push(cgroup);
        self.remains.mounts.push(mounts);
        let out_of_memory = exited.readings.oom_kills > 0;
        let verdict = match exited.records.failed {
            Some(record) if !out_of_memory && exited.cause.is_none() => failure::explain(record, plan, step)?,
            _ => decide(&step.limits, &seen),
        };
        let usage = usage(&exited.readings, seen.wall_ms, exited.disk);
        self.usage = self.usage.then(usage);
        let setup_us = started_ns.saturating_sub(self.step_begun_ns) / 1000;
        let teardown_us = now.saturating_sub(ended_ns) / 1000;
        self.durations.setup_us += setup_us;
        self.durations.run_us += run_us;
        self.durations.teardown_us += teardown_us;
        let finished_at = Timestamp::now();
        let goes_on = verdict.reason.is_none()
            || (step.allow_failure && !matches!(verdict.reason, Some(Reason::Requested | Reason::HostError)));
        self.steps.push(StepResult {
            name: step.name.clone(),
            status: verdict.status,
            reason: verdict.reason,
            message: verdict.message.clone(),
            limit: verdict.limit.clone(),
            exit_code: verdict.exit_code,
            signal: verdict.signal.clone(),
            stdout: exited.stdout,
            stderr: exited.stderr,
            usage,
            timeline: Timeline {
                submitted_at: self.started_at,
                started_at: Some(self.step_begun_at),
                finished_at,
                queue_ms: 0,
                setup_us,
                run_us,
                collect_us: 0,
                teardown_us,
            },
        });
        self.step_begun_ns = now;
        self.step_begun_at = finished_at;
        // A failure that is allowed does not decide, unless nothing else does.
        if !(goes_on && verdict.reason.is_some()) {
            self.decided = Some(verdict);
        }
        Ok(goes_on)
    }

    /// The report on a job whose program did not run, or whose sandbox failed.
    fn refused(self, refusal: Refusal) -> Report {
        let Refusal { reason, message, limit } = refusal;
        let verdict = Verdict {
            status: reason.status(),
            reason: Some(reason),
            message,
            limit,
            exit_code: None,
            signal: None,
        };
        self.report(verdict, Collected::default())
    }

    fn collected(mut self, collected: Result<Collected, Refusal>) -> Report {
        let collected = match collected {
            Ok(collected) => collected,
            Err(refusal) => return self.refused(refusal),
        };
        let all_ns = hutch_sandbox_sys::process::monotonic_ns().saturating_sub(self.begun_ns);
        let known = self.durations.setup_us + self.durations.run_us + self.durations.teardown_us;
        self.durations.collect_us = (all_ns / 1000).saturating_sub(known);
        let verdict = self.decided.take().unwrap_or(Verdict {
            status: hutch_proto::Status::Succeeded,
            reason: None,
            message: String::new(),
            limit: None,
            exit_code: Some(0),
            signal: None,
        });
        self.report(verdict, collected)
    }

    fn report(self, verdict: Verdict, collected: Collected) -> Report {
        tracing::debug!(status = %verdict.status, elapsed = ?self.begun.elapsed(), "job done");
        let stdout = concatenated(&self.steps, Stream::Stdout);
        let stderr = concatenated(&self.steps, Stream::Stderr);
        Report {
            status: verdict.status,
            reason: verdict.reason,
            message: verdict.message,
            limit: verdict.limit,
            exit_code: verdict.exit_code,
            signal: verdict.signal,
            stdout,
            stderr,
            usage: self.usage,
            outputs: collected.outputs,
            archive: collected.archive,
            steps: self.steps,
            started_at: Some(self.started_at),
            finished_at: Timestamp::now(),
            durations: self.durations,
            remains: Some(self.remains),
        }
    }
}

fn concatenated(steps: &[StepResult], stream: Stream) -> Captured {
    let mut all = Captured::default();
    for step in steps {
        let one = match stream {
            Stream::Stdout => &step.stdout,
            Stream::Stderr => &step.stderr,
        };
        all.data.extend_from_slice(&one.data);
        all.bytes += one.bytes;
        all.truncated |= one.truncated;
    }
    all
}
