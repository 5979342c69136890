//! What a job's sandboxes are made of, as descriptors: dropping them undoes everything.
//!
//! In order: layers and volumes are opened below the directories that the config allows, never by a
//! path twice; the scratch file system is made, sized, with an upper and a work directory for each
//! overlay; stdin and files become sealed memory. Each step then gets fresh mounts of it all.

use std::ffi::CString;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use hutch_proto::{Digest, Reason, VolumeSource};
use hutch_sandbox_sys::defence::{Defence, without};
use hutch_sandbox_sys::mount::{
    RDONLY, RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, clone_tree, harmless, map_owners,
    open_beneath, restrict,
};
use hutch_sandbox_sys::{Errno, IdRange};
use hutch_trees::{InUse, LayerFacts};
use nix::fcntl::{AT_FDCWD, FcntlArg, OFlag, SealFlag, fcntl, openat};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fstat, mkdirat};

use crate::config::EngineConfig;
use crate::hostlayer::HostLayer;
use crate::plan::{JobPlan, LayerSource, MountPlan, VolumePlan};
use crate::refusal::Refusal;
use crate::scratch::Scratch;

/// A directory that is shown in a sandbox.
#[derive(Debug)]
struct Shown {
    dir: OwnedFd,
    read_only: bool,
    owners: Owners,
}

/// How the owners of what is shown appear in a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owners {
    /// Every id as it is on disk.
    All,
    /// As on disk, but root is nobody on either side.
    StrangerRoot,
}

/// User namespaces whose maps show owners.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OwnerMaps<'a> {
    pub(crate) all: BorrowedFd<'a>,
    pub(crate) stranger_root: BorrowedFd<'a>,
}

/// A job's file system, ready for its first step.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) mounts: MountPlan,
    shown: Vec<Shown>,
    volumes: Vec<Shown>,
    pub(crate) scratch: Scratch,
    /// The stored layers, kept from being removed.
    _stored: Vec<InUse>,
    /// The time of the newest file of the stored layers, in seconds since 1970.
    pub(crate) newest_s: i64,
    pub(crate) payload: Option<OwnedFd>,
}

/// Fresh mounts for one step, attached nowhere yet.
#[derive(Debug)]
pub(crate) struct StepMounts {
    pub(crate) layers: Vec<OwnedFd>,
    pub(crate) volumes: Vec<OwnedFd>,
}

impl Prepared {
    /// Opens and makes everything.
    ///
    /// # Errors
    /// The verdict: `image_error` or `volume_error` for what cannot be opened, `host_error` for the rest.
    pub(crate) fn new(
        plan: &JobPlan,
        config: &EngineConfig,
        host: Option<&HostLayer>,
        ids: IdRange,
    ) -> Result<Self, Refusal> {
        let mut shown = Vec::new();
        let mut places = Vec::new();
        let mut stored = Vec::new();
        let mut newest_s = 0;
        for (index, layer) in plan.layers.iter().enumerate() {
            if is_hidden(plan, index) {
                continue;
            }
            let dir = match layer {
                LayerSource::Dir(path) => open_layer(path, index, config)?,
                LayerSource::Stored(digest) => {
                    let (layer, facts) = open_stored(digest, index, config)?;
                    let dir = layer.dir.try_clone();
                    newest_s = newest_s.max(facts.newest_s);
                    stored.push(layer);
                    dir.map_err(|e| Refusal::host(format!("cannot open the layer {digest}: {e}")))?
                }
                LayerSource::Host => open_skeleton(host)?,
            };
            shown.push(Shown { dir, read_only: true, owners: Owners::All });
            places.push(index);
        }
        let layers = shown.len();
        let trees = if plan.layers.first() == Some(&LayerSource::Host) {
            open_trees(host, &mut shown, &places)?
        } else {
            Vec::new()
        };
        let volumes = plan
            .volumes
            .iter()
            .enumerate()
            .map(|(index, volume)| open_volume(volume, index, config))
            .collect::<Result<Vec<_>, _>>()?;
        let prefixes: Vec<_> =
            std::iter::once("").chain(trees.iter().map(|(path, _)| path.as_str())).collect();
        let scratch = Scratch::make(plan, config, &prefixes, ids)?;
        let mounts = MountPlan {
            layers,
            trees,
            targets: plan.volumes.iter().map(|volume| volume.target.clone()).collect(),
        };
        let mut made = Self { mounts, shown, volumes, scratch, _stored: stored, newest_s, payload: None };
        made.add_files(plan)?;
        Ok(made)
    }

    /// Adds the files that come with a job.
    pub(crate) fn add_files(&mut self, plan: &JobPlan) -> Result<(), Refusal> {
        let files: Vec<&[u8]> = plan.files.iter().map(|file| file.bytes.as_slice()).collect();
        self.payload = if files.is_empty() { None } else { Some(sealed(&files)?) };
        Ok(())
    }

    /// Closes the directories that were shown, once no other step will be mounted from them.
    pub(crate) fn close_shown(&mut self) {
        self.shown.clear();
        self.volumes.clear();
    }

    /// Whether the directories of a plan's layers are those that were opened for it. Layers of the store never change.
    pub(crate) fn is_current(&self, plan: &JobPlan, config: &EngineConfig) -> bool {
        let mut shown = self.shown.iter();
        plan.layers.iter().enumerate().all(|(index, layer)| {
            if is_hidden(plan, index) {
                return true;
            }
            let Some(shown) = shown.next() else { return false };
            let LayerSource::Dir(path) = layer else { return true };
            open_layer(path, index, config).is_ok_and(|dir| is_same(&dir, &shown.dir))
        })
    }

    /// Fresh mounts for one step.
    pub(crate) fn step_mounts(&self, maps: OwnerMaps<'_>) -> Result<StepMounts, Refusal> {
        let failed = |e: Errno| Refusal::host(format!("cannot mount the job's layers: {}", e.desc()));
        let all = |shown: &[Shown]| shown.iter().map(|one| one.mount(maps)).collect::<Result<Vec<_>, _>>();
        Ok(StepMounts {
            layers: all(&self.shown).map_err(failed)?,
            volumes: all(&self.volumes).map_err(failed)?,
        })
    }
}

/// One that comes again further up is hidden by itself, and overlayfs refuses to have it twice.
fn is_hidden(plan: &JobPlan, index: usize) -> bool {
    plan.layers[index + 1..].contains(&plan.layers[index])
}

fn is_same(one: &OwnedFd, other: &OwnedFd) -> bool {
    match (fstat(one), fstat(other)) {
        (Ok(one), Ok(other)) => (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino),
        _ => false,
    }
}

impl Shown {
    fn mount(&self, maps: OwnerMaps<'_>) -> hutch_sandbox_sys::Result<OwnedFd> {
        let mount = clone_tree(self.dir.as_fd(), c"")?;
        let map = match self.owners {
            Owners::All => maps.all,
            Owners::StrangerRoot => maps.stranger_root,
        };
        // A file system without idmapped mounts shows the owners as nobody; what everybody may read
        // still serves.
        match map_owners(mount.as_fd(), map) {
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => {}
            other => other?,
        }
        restrict(mount.as_fd(), harmless() | if self.read_only { RDONLY } else { 0 })?;
        Ok(mount)
    }
}

/// Opens a directory below one of the allowed ones.
fn open_allowed(path: &Path, allowed: &[PathBuf], resolve: u64) -> Result<OwnedFd, Errno> {
    if without(Defence::AllowedPaths) {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        return openat(AT_FDCWD, path, flags, Mode::empty());
    }
    let root = allowed.iter().find(|root| path.starts_with(root)).ok_or(Errno::EACCES)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let base = openat(AT_FDCWD, root.as_path(), flags, Mode::empty())?;
    let below = path.strip_prefix(root).map_err(|_| Errno::EACCES)?;
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    let below = CString::new(below.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    open_beneath(base.as_fd(), &below, libc::O_PATH | libc::O_DIRECTORY, 0, resolve)
}

fn open_layer(path: &Path, index: usize, config: &EngineConfig) -> Result<OwnedFd, Refusal> {
    open_allowed(path, &config.layer_dirs, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS).map_err(|e| {
        Refusal::new(
            Reason::ImageError,
            format!("layers[{index}]: cannot open {}: {}", path.display(), e.desc()),
        )
    })
}

/// Opens a layer of the store, and keeps it there. That it is not there is no fault of the job: whoever ran it was to
/// fetch it.
fn open_stored(digest: &Digest, index: usize, config: &EngineConfig) -> Result<(InUse, LayerFacts), Refusal> {
    let Some(trees) = &config.trees else {
        let message = format!("layers[{index}]: this worker keeps no layers");
        return Err(Refusal::new(Reason::ImageError, message));
    };
    let missing = || Refusal::host(format!("layers[{index}]: the layer {digest} is not here"));
    let layer =
        trees.store.open_tree(digest).map_err(|e| Refusal::host(e.to_string()))?.ok_or_else(missing)?;
    let facts = trees.store.facts(digest).ok_or_else(missing)?;
    Ok((layer, facts))
}

fn open_path(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    openat(AT_FDCWD, path, flags, Mode::empty())
}

fn host_layer(host: Option<&HostLayer>) -> Result<&HostLayer, Refusal> {
    host.ok_or_else(|| Refusal::host("the host layer was not set up"))
}

fn open_skeleton(host: Option<&HostLayer>) -> Result<OwnedFd, Refusal> {
    let skeleton = &host_layer(host)?.skeleton;
    open_path(skeleton)
        .map_err(|e| Refusal::host(format!("cannot open {}: {}", skeleton.display(), e.desc())))
}

/// Opens the host's trees, and says which layers above have each of them too. `places` are the layers' places in
/// the job's list.
fn open_trees(
    host: Option<&HostLayer>,
    shown: &mut Vec<Shown>,
    places: &[usize],
) -> Result<Vec<(String, Vec<usize>)>, Refusal> {
    let mut trees = Vec::new();
    let layers = shown.len();
    for tree in &host_layer(host)?.trees {
        let inside = CString::new(tree.trim_start_matches('/')).unwrap_or_default();
        let mut above = Vec::new();
        for (index, layer) in shown.iter().enumerate().take(layers).skip(1) {
            let resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS;
            match open_beneath(layer.dir.as_fd(), &inside, libc::O_PATH | libc::O_DIRECTORY, 0, resolve) {
                Ok(_) => above.push(index),
                Err(Errno::ENOENT) => {}
                Err(_) => {
                    let place = places.get(index).copied().unwrap_or(index);
                    let message =
                        format!("layers[{place}]: {tree} must be a directory to be stacked on the host's");
                    return Err(Refusal::new(Reason::ImageError, message));
                }
            }
        }
        let dir = open_path(Path::new(tree))
            .map_err(|e| Refusal::host(format!("cannot open the host's {tree}: {}", e.desc())))?;
        shown.push(Shown { dir, read_only: true, owners: Owners::All });
        trees.push((tree.clone(), above));
    }
    Ok(trees)
}

/// The directory in which named volumes are kept.
pub(crate) fn volumes_dir(config: &EngineConfig) -> PathBuf {
    config.data_dir.join("volumes")
}

fn open_volume(volume: &VolumePlan, index: usize, config: &EngineConfig) -> Result<Shown, Refusal> {
    let failed = |what: &str, e: Errno| {
        Refusal::new(Reason::VolumeError, format!("volumes[{index}]: cannot open {what}: {}", e.desc()))
    };
    match &volume.source {
        VolumeSource::HostPath(path) if volume.ours => {
            let dir = open_path(Path::new(path)).map_err(|e| failed(path, e))?;
            Ok(Shown { dir, read_only: volume.read_only, owners: Owners::All })
        }
        VolumeSource::HostPath(path) => {
            let resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS;
            let dir = open_allowed(Path::new(path), &config.allowed_host_paths, resolve)
                .map_err(|e| failed(path, e))?;
            Ok(Shown { dir, read_only: volume.read_only, owners: Owners::StrangerRoot })
        }
        VolumeSource::Named(name) => {
            let open = || -> Result<OwnedFd, Errno> {
                let home = open_path(&volumes_dir(config))?;
                let name = CString::new(name.as_str()).map_err(|_| Errno::EINVAL)?;
                match mkdirat(&home, name.as_c_str(), Mode::empty()) {
                    // Whoever a job runs as may use its volume.
                    Ok(()) => {
                        let flags = nix::sys::stat::FchmodatFlags::FollowSymlink;
                        nix::sys::stat::fchmodat(
                            &home,
                            name.as_c_str(),
                            Mode::from_bits_truncate(0o1777),
                            flags,
                        )?;
                    }
                    Err(Errno::EEXIST) => {}
                    Err(e) => return Err(e),
                }
                let resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS;
                open_beneath(home.as_fd(), &name, libc::O_PATH | libc::O_DIRECTORY, 0, resolve)
            };
            let dir = open().map_err(|e| failed(name, e))?;
            Ok(Shown { dir, read_only: volume.read_only, owners: Owners::All })
        }
    }
}

/// Memory with these bytes, one after another, that nobody can change any more: memfd_create(2).
pub(crate) fn sealed(parts: &[&[u8]]) -> Result<OwnedFd, Refusal> {
    let make = || -> std::io::Result<OwnedFd> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let mut file = File::from(memfd_create(c"hutch-input", flags)?);
        for part in parts {
            file.write_all(part)?;
        }
        let seals =
            SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        // A description of its own: read-only, and at the beginning.
        Ok(File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into())
    };
    make().map_err(|e| Refusal::host(format!("cannot hold the job's input: {e}")))
}
