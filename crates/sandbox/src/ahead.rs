//! What waits in a slot for its next job: an init, or a whole sandbox that lacks nothing but a program.
//!
//! When a slot's job has been taken down, an init is parked for the next one. If the slot's last two jobs had the same
//! file system, that is built ahead too: layers and scratch space mounted, the root entered. Each is used once. Such a
//! sandbox is used only for a job whose layers are where its own are; it is let go when nobody asks for it for a while,
//! and with it the layers of the store that it holds.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hutch_sandbox_sys::{Built, Errno, IdRange, Launcher, NetworkNamespace, Parked, RootPlan};

use crate::cgroup::Cgroups;
use crate::config::EngineConfig;
use crate::hostlayer::HostLayer;
use crate::plan::{JobPlan, Slots, mount_steps};
use crate::prepare::{OwnerMaps, Prepared};
use crate::refusal::Refusal;
use crate::spawn::FdList;

/// How long a sandbox waits for a job.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// What making a sandbox in a slot needs of the engine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Means<'a> {
    pub(crate) launcher: &'a Launcher,
    pub(crate) waiting: &'a Waiting,
    pub(crate) cgroups: &'a Cgroups,
    pub(crate) config: &'a EngineConfig,
    pub(crate) host: Option<&'a HostLayer>,
    pub(crate) owner_maps: OwnerMaps<'a>,
    pub(crate) ids: IdRange,
    pub(crate) network: NetworkNamespace,
}

/// What waits, by the slot's first id.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    places: Mutex<BTreeMap<u32, Place>>,
    used: AtomicU64,
}

/// One slot's.
#[derive(Debug, Default)]
struct Place {
    /// The file system of the slot's last job, if it may be built ahead.
    last: Option<JobPlan>,
    init: Option<Parked>,
    sandbox: Option<Box<Ahead>>,
    /// Somebody looks whether the sandbox waits for too long.
    watched: bool,
}

/// A sandbox that waits for a program.
#[derive(Debug)]
pub(crate) struct Ahead {
    pub(crate) built: Built,
    pub(crate) prepared: Prepared,
    root: JobPlan,
    since: Instant,
}

impl Waiting {
    fn places(&self) -> MutexGuard<'_, BTreeMap<u32, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many jobs found their sandbox built.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn take_init(&self, ids: IdRange) -> Option<Parked> {
        self.places().get_mut(&ids.base)?.init.take()
    }

    fn take_sandbox(&self, ids: IdRange) -> Option<Box<Ahead>> {
        self.places().get_mut(&ids.base)?.sandbox.take()
    }

    /// Notes a slot's last file system; true if it is that of the one before.
    fn note(&self, ids: IdRange, root: Option<&JobPlan>) -> bool {
        let mut places = self.places();
        let place = places.entry(ids.base).or_default();
        let again = root.is_some() && place.last.as_ref() == root;
        if !again {
            place.last = root.cloned();
        }
        again
    }

    /// Whether the caller is to look after the slot's sandbox from now on, until [`Waiting::outstayed`] says that it is gone.
    pub(crate) fn watch(&self, ids: IdRange) -> bool {
        let mut places = self.places();
        let place = places.entry(ids.base).or_default();
        place.sandbox.is_some() && !std::mem::replace(&mut place.watched, true)
    }

    /// For how much longer a slot's sandbox may wait; none if it is gone, or was let go now.
    pub(crate) fn outstayed(&self, ids: IdRange) -> Option<Duration> {
        let mut places = self.places();
        let place = places.get_mut(&ids.base)?;
        let left = place.sandbox.as_ref().map(|ahead| PATIENCE.saturating_sub(ahead.since.elapsed()));
        if left.is_some_and(|left| !left.is_zero()) {
            return left;
        }
        place.watched = false;
        let gone = place.sandbox.take();
        drop(places);
        drop(gone);
        None
    }
}

impl Means<'_> {
    /// The sandbox that waits for a job like this one, if there is one.
    pub(crate) fn take_ahead(&self, plan: &JobPlan) -> Option<Ahead> {
        let ahead = *self.waiting.take_sandbox(self.ids)?;
        let fits = plan.root_alone().as_ref() == Some(&ahead.root)
            && ahead.built.is_alive()
            && ahead.prepared.is_current(&ahead.root, self.config);
        self.waiting.used.fetch_add(u64::from(fits), Ordering::Relaxed);
        fits.then_some(ahead)
    }

    /// Has an init build a job's file system: the one that waits, or a new one. One that was killed while it waited is no
    /// fault of the job. `last` if no other step needs the file system after this one.
    pub(crate) fn build(&self, prepared: &Prepared, last: bool) -> Result<Built, Refusal> {
        let mounts = prepared.step_mounts(self.owner_maps)?;
        let mut fds = FdList::default();
        let slots = Slots {
            layers: fds.add(mounts.layers.iter().map(OwnedFd::as_fd)),
            scratch: fds.add([prepared.scratch.mount()]),
            volumes: fds.add(mounts.volumes.iter().map(OwnedFd::as_fd)),
        };
        let plan = RootPlan { steps: mount_steps(&prepared.mounts, slots, last) };
        let built = match self.waiting.take_init(self.ids).map(|parked| parked.build(&plan, &fds.0)) {
            Some(Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN)) | None => {
                self.launcher.park(self.ids, self.network).and_then(|parked| parked.build(&plan, &fds.0))
            }
            Some(built) => built,
        };
        built.map_err(|e| Refusal::host(format!("the launcher could not start a sandbox: {}", e.desc())))
    }

    /// Has what waits for the slot's next job made, after one with this file system. A failure shows when it is needed.
    pub(crate) fn refill(&self, root: Option<&JobPlan>) {
        self.cgroups.make_spare(self.config.slots as usize);
        if self.waiting.note(self.ids, root)
            && let Some(root) = root
            && let Ok(prepared) = Prepared::new(root, self.config, self.host, self.ids)
            && let Ok(built) = self.build(&prepared, true)
        {
            let ahead = Ahead { built, prepared, root: root.clone(), since: Instant::now() };
            self.waiting.places().entry(self.ids.base).or_default().sandbox = Some(Box::new(ahead));
        } else if let Ok(parked) = self.launcher.park(self.ids, self.network) {
            self.waiting.places().entry(self.ids.base).or_default().init = Some(parked);
        }
    }
}
