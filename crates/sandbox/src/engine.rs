//! The engine: one job, one fresh sandbox, from spec to report.
//!
//! `JobSpec -> Plan -> Prepared -> Running -> Exited -> Collected -> Report`: each stage consumes what the one
//! before made, and undoes itself when dropped. A job of several steps shares one Prepared; each step has
//! its own Running, in namespaces and a cgroup of its own.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use hutch_proto::{JobId, JobSpec, LimitPolicy};
use hutch_sandbox_sys::defence::{Defence, without};
use hutch_sandbox_sys::{CgroupHome, IdRange, Launcher as RawLauncher, RootIs};
use hutch_trees::CappedTrees;
use tokio_util::sync::CancellationToken;

use crate::ahead::{Means, PATIENCE, Waiting};
use crate::cgroup::{Cgroups, GroupWatch, JobCgroup};
use crate::collect::{self, Collected};
use crate::config::EngineConfig;
use crate::course::Course;
use crate::egress::{Egress, WayOut};
use crate::exec::{Entered, ExecError, ExecOrder, Inside};
use crate::host::{self, IdRanges};
use crate::hostlayer::HostLayer;
use crate::observe::{Observer, SlotGauges, Unobserved};
use crate::plan::{Abilities, JobPlan, VolumePlan};
use crate::prepare::{OwnerMaps, Prepared, volumes_dir};
use crate::refusal::Refusal;
use crate::report::Report;
use crate::seccomp;
use crate::spawn::{spawn, with_source};
use crate::supervise::supervise;
use crate::terminal::Strokes;

/// A process of its own, small and with one thread, from which sandboxes are cloned.
#[derive(Debug)]
pub struct Launcher(RawLauncher);

impl Launcher {
    /// Forks the launcher. Call it first in `main`, while the process has one thread.
    ///
    /// # Errors
    /// If this process has threads already, or may not make mount namespaces.
    pub fn fork() -> Result<Self, EngineError> {
        let filters = seccomp::filters().map_err(|e| EngineError(e.to_string()))?;
        RawLauncher::fork(filters).map(Self).map_err(|e| match e {
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
pub struct EngineError(pub(crate) String);

/// One job for the engine.
#[derive(Debug)]
pub struct Order {
    /// The job, its blobs already resolved to inline content.
    pub job: JobSpec,
    /// The slot it runs in; no two running jobs share one.
    pub slot: u32,
    /// Cancels it.
    pub cancel: CancellationToken,
    /// Who types at the job's terminal, if it has one; what the spec says of stdin is typed first. Without, the end of the
    /// input follows on that.
    pub strokes: Option<Strokes>,
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
    /// How jobs get a way out; if they cannot, why.
    egress: Result<Egress, String>,
    /// Made when the first job may need it.
    host: OnceLock<HostLayer>,
    ids: IdRanges,
    owner_maps: Vec<SlotMaps>,
    waiting: Waiting,
    reaped: u64,
    gauges: Mutex<BTreeMap<u32, LiveGroup>>,
    inside: Mutex<BTreeMap<JobId, Arc<Inside>>>,
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
        let (memory_anonymous_bytes, memory_file_bytes) = self.watch.memory_kinds();
        SlotGauges {
            slot,
            memory_bytes: readings.memory_bytes,
            memory_anonymous_bytes,
            memory_file_bytes,
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

impl Inner {
    /// What is needed for making a sandbox in a slot; none if there is no such slot.
    fn means(&self, slot: u32) -> Option<Means<'_>> {
        Some(Means {
            launcher: &self.launcher,
            waiting: &self.waiting,
            cgroups: &self.cgroups,
            config: &self.config,
            host: self.host.get(),
            owner_maps: self.owner_maps.get(slot as usize)?.borrowed(),
            ids: self.ids.of(slot)?,
            network: self.config.network_namespace,
        })
    }
}

impl Engine {
    /// An engine on this host: looks at what the kernel can do, removes what a killed predecessor left.
    ///
    /// # Errors
    /// If no job could be isolated here; the message names the remedy.
    pub fn new(launcher: Launcher, config: EngineConfig) -> Result<Self, EngineError> {
        Self::beside_a_network(launcher, config, None)
    }

    /// The same, where the host's network namespace is not the one that this process is in.
    pub(crate) fn beside_a_network(
        launcher: Launcher,
        config: EngineConfig,
        network: Option<OwnedFd>,
    ) -> Result<Self, EngineError> {
        let failed =
            |what: &str, e: &dyn std::error::Error| EngineError(format!("{what}: {}", with_source(e)));
        let launcher = launcher.0;
        host::raise_open_files(config.slots);
        let mut cgroups = Cgroups::find().map_err(|e| EngineError(with_source(&e)))?;
        let reaped = cgroups.reap();
        tell_launcher(&launcher, &cgroups)?;
        make_private(&config.data_dir).map_err(|e| failed("cannot make the data directory", &e))?;
        make_private(&volumes_dir(&config)).map_err(|e| failed("cannot make the volumes directory", &e))?;
        let io = cgroups.watch_disks(&config.data_dir, &other_dirs(&config));
        let host = OnceLock::new();
        if config.allow_host_layer {
            let _ = host.set(host_layer(&config)?);
        }
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
        let egress = Egress::find(config.egress.clone(), network, &config.data_dir);
        let abilities = Abilities {
            egress: egress.as_ref().map(|_| ()).map_err(Clone::clone),
            processors: cgroups.processors().map(|list| crate::plan::processors(&list)),
            swap: cgroups.limits_swap(),
            hard_limits: host::hard_limits(),
            images: crate::image::possible(),
            io,
        };
        Ok(Self(Arc::new(Inner {
            launcher,
            cgroups,
            config,
            abilities,
            egress,
            host,
            ids,
            owner_maps,
            waiting: Waiting::default(),
            reaped,
            gauges: Mutex::new(BTreeMap::new()),
            inside: Mutex::new(BTreeMap::new()),
        })))
    }

    /// Runs one job to its verdict. Whatever goes wrong is in the report.
    pub async fn run(&self, order: Order, observer: &dyn Observer) -> Report {
        let course = Course::begin(Remains::new(self.clone(), order.slot));
        let plan = JobPlan::new(&order.job, &self.0.config, &self.0.abilities);
        self.run_course(course, plan, order, observer).await
    }

    /// Runs a job of the engine's own in slot 0: it may stack the host's programs and sees a directory of the host, whatever
    /// the config allows to others.
    pub(crate) async fn run_own(&self, job: JobSpec, shown: VolumePlan) -> Report {
        let course = Course::begin(Remains::new(self.clone(), 0));
        if self.0.host.get().is_none() {
            match host_layer(&self.0.config) {
                // Another was quicker at most, with the same.
                Ok(host) => drop(self.0.host.set(host)),
                Err(error) => return course.refused(Refusal::host(error.to_string())),
            }
        }
        let own =
            EngineConfig { allow_host_layer: true, limits: LimitPolicy::default(), ..self.0.config.clone() };
        let plan = JobPlan::new(&job, &own, &self.0.abilities).map(|mut plan| {
            plan.volumes.push(shown);
            plan
        });
        let order = Order { job, slot: 0, cancel: CancellationToken::new(), strokes: None };
        self.run_course(course, plan, order, &Unobserved).await
    }

    async fn run_course(
        &self,
        mut course: Course,
        plan: Result<JobPlan, Refusal>,
        order: Order,
        observer: &dyn Observer,
    ) -> Report {
        let plan = match plan {
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

    /// Makes the job's file system; one on disk takes its time.
    async fn prepare(&self, plan: &JobPlan, ids: IdRange) -> Result<Prepared, Refusal> {
        let make = move |engine: &Self, plan: &JobPlan| {
            Prepared::new(plan, &engine.0.config, engine.0.host.get(), ids)
        };
        if !plan.scratch_on_disk {
            return make(self, plan);
        }
        let (engine, plan) = (self.clone(), plan.clone());
        let made = tokio::task::spawn_blocking(move || make(&engine, &plan)).await;
        made.map_err(|e| Refusal::host(format!("cannot make the scratch file system: {e}")))?
    }

    /// Makes a way out to the internet.
    async fn way_out(&self) -> Result<WayOut, Refusal> {
        let engine = self.clone();
        let open = move || engine.0.egress.as_ref().map_err(Clone::clone).and_then(Egress::open);
        let opened = tokio::task::spawn_blocking(open).await.unwrap_or_else(|e| Err(e.to_string()));
        opened.map_err(|why| Refusal::host(format!("cannot give the job its way out: {why}")))
    }

    /// Runs all steps that are to run, and hands the file system on.
    async fn run_plan(
        &self,
        plan: &JobPlan,
        order: &Order,
        observer: &dyn Observer,
        course: &mut Course,
    ) -> Result<Prepared, Refusal> {
        let means = self.0.means(order.slot).ok_or_else(|| Refusal::host("there is no such slot"))?;
        let ids = means.ids;
        let (mut prepared, mut built) = match means.take_ahead(plan) {
            Some(mut ahead) => {
                ahead.prepared.add_files(plan)?;
                (ahead.prepared, Some(ahead.built))
            }
            None => (self.prepare(plan, ids).await?, None),
        };
        course.remains.root = plan.root_alone();
        if plan.egress {
            course.remains.way_out = Some(self.way_out().await?);
        }
        let told = AtomicBool::new(false);
        for (number, step) in plan.steps.iter().enumerate() {
            // Two overlays on one upper directory must not be mounted at one time.
            course.remains.mounts.clear();
            let network = course.remains.way_out.as_ref().map(|way| way.namespace.as_fd());
            let running = spawn(means, plan, number, &prepared, built.take(), network)?;
            if number + 1 == plan.steps.len() {
                prepared.close_shown();
            }
            let _live = self.register(order.slot, &running.cgroup, step.limits.memory_bytes);
            let _open = self.open(order.job.id, Inside::new(&running, plan, step, ids)?);
            if !told.swap(true, Ordering::Relaxed) {
                observer.started();
            }
            let mut exited = supervise(running, step, course.kept(), &prepared, order, observer)
                .await
                .map_err(|e| Refusal::host(format!("lost sight of a sandbox: {e}")))?;
            if number + 1 == plan.steps.len() {
                course.step_done(step, plan, exited)?;
                break;
            }
            let handed_back = exited.handed_back.take_scratch();
            if !course.step_done(step, plan, exited)? {
                break;
            }
            match handed_back {
                Ok(Some(scratch)) => prepared.scratch.renew(scratch),
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
        if plan.globs.is_empty() && !plan.commit {
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

    /// Has a slot's sandbox let go when it has waited for too long.
    fn watch_ahead(&self, ids: IdRange) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if !self.0.waiting.watch(ids) {
            return;
        }
        let engine = Arc::downgrade(&self.0);
        runtime.spawn(async move {
            let mut wait = PATIENCE;
            loop {
                tokio::time::sleep(wait).await;
                let Some(engine) = engine.upgrade() else { return };
                let looked = tokio::task::spawn_blocking(move || engine.waiting.outstayed(ids)).await;
                match looked {
                    Ok(Some(left)) => wait = left,
                    _ => return,
                }
            }
        });
    }

    fn register(&self, slot: u32, group: &JobCgroup, memory_limit_bytes: u64) -> Live<'_> {
        self.live().insert(slot, LiveGroup { watch: group.watch(), memory_limit_bytes });
        Live { engine: self, slot }
    }

    /// Brings one more program into a job that runs here, with every restriction of the job's own: see [`ExecOrder`].
    ///
    /// # Errors
    /// If no such job runs here now, or the program could not be brought in.
    pub(crate) async fn enter(&self, id: JobId, order: &ExecOrder) -> Result<Entered, ExecError> {
        let inside = self.insides().get(&id).cloned().ok_or(ExecError::NotRunning(id))?;
        match crate::exec::enter(&self.0.launcher, &inside, order).await {
            // Whatever failed, failed because the job ended meanwhile.
            Err(ExecError::Host(_)) if inside.has_ended() => Err(ExecError::NotRunning(id)),
            other => other,
        }
    }

    fn open(&self, id: JobId, inside: Inside) -> Open<'_> {
        self.insides().insert(id, Arc::new(inside));
        Open { engine: self, id }
    }

    fn insides(&self) -> std::sync::MutexGuard<'_, BTreeMap<JobId, Arc<Inside>>> {
        self.0.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, LiveGroup>> {
        self.0.gauges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cgroups of the jobs that run now.
    #[must_use]
    pub fn gauges(&self) -> Vec<SlotGauges> {
        self.live().iter().map(|(slot, group)| group.gauges(*slot)).collect()
    }

    /// Whether jobs can have a way out to the internet here.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn egress(&self) -> Result<(), &str> {
        self.0.egress.as_ref().map(|_| ()).map_err(String::as_str)
    }

    /// Whether sandboxes can be made still: the launcher lives.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.0.launcher.is_alive()
    }

    /// Ends every sandbox, and returns when they and their cgroups are gone.
    pub(crate) fn end(&self) {
        self.0.launcher.end();
    }

    /// The stored layers of this host, if jobs may stack any.
    #[must_use]
    pub fn trees(&self) -> Option<&CappedTrees> {
        self.0.config.trees.as_ref()
    }

    /// Where it keeps what is its own.
    pub(crate) fn data_dir(&self) -> &Path {
        &self.0.config.data_dir
    }

    /// How many slots it has.
    pub(crate) fn slots(&self) -> u32 {
        self.0.config.slots
    }

    /// How many jobs found their sandbox built before they were asked for.
    #[must_use]
    pub fn used_ahead(&self) -> u64 {
        self.0.waiting.used()
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
    way_out: Option<WayOut>,
    prepared: Option<Prepared>,
    cgroups: Vec<JobCgroup>,
    /// The file system that the slot's next job may have too.
    root: Option<JobPlan>,
    engine: Engine,
    slot: u32,
}

impl Remains {
    fn new(engine: Engine, slot: u32) -> Self {
        Self {
            mounts: Vec::new(),
            way_out: None,
            prepared: None,
            cgroups: Vec::new(),
            root: None,
            engine,
            slot,
        }
    }

    /// Adds a step's cgroup and mount namespace.
    pub(crate) fn add(&mut self, (cgroup, mounts): (JobCgroup, OwnedFd)) {
        self.cgroups.push(cgroup);
        self.mounts.push(mounts);
    }
}

impl Drop for Remains {
    fn drop(&mut self) {
        // Before its overlays go, which would have it written out.
        if let Some(prepared) = &self.prepared {
            prepared.scratch.let_go();
        }
        self.mounts.clear();
        self.way_out = None;
        self.prepared = None;
        self.cgroups.clear();
        let inner = &*self.engine.0;
        if !inner.config.prepare_ahead {
            return;
        }
        if let Some(means) = inner.means(self.slot) {
            means.refill(self.root.as_ref());
            self.engine.watch_ahead(means.ids);
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

/// Takes a job's way in away when its step is over.
struct Open<'a> {
    engine: &'a Engine,
    id: JobId,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.engine.insides().remove(&self.id);
    }
}

fn host_layer(config: &EngineConfig) -> Result<HostLayer, EngineError> {
    let dir = config.data_dir.join("host");
    make_private(&dir)
        .and_then(|()| HostLayer::make(&dir))
        .map_err(|e| EngineError(format!("cannot make the host layer: {}", with_source(&e))))
}

/// Directories beside the data from which jobs can read, or to which they can write.
fn other_dirs(config: &EngineConfig) -> Vec<&Path> {
    let host = config.allow_host_layer.then_some(Path::new("/usr"));
    let allowed = config.allowed_host_paths.iter().chain(&config.layer_dirs).map(PathBuf::as_path);
    host.into_iter().chain(allowed).filter(|dir| dir.exists()).collect()
}

fn make_private(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    if without(Defence::PrivateStore) {
        std::fs::create_dir_all(dir)?;
        return std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755));
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // A group that may pass through stays: the services' user, whose files lie below.
    let mode = std::fs::metadata(dir)?.permissions().mode() & 0o710;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode | 0o700))
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
