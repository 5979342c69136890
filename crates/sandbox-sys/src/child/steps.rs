//! init's walk over the plan's steps: from the launcher's small root to the sandbox's own.

use std::ffi::CStr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::Mode;

use super::files::{Owner, RESOLVE, make_directory};
use super::overlay::{self, Parts};
use super::receive::give;
use super::{Failure, Site, fd_of, parked};
use crate::channel::Handed;
use crate::defence::{Defence, without};
use crate::mount::{
    RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, attach, clone_tree, open_beneath, relocate, restrict,
};
use crate::order::{List, StepRef};
use crate::plan::FdIndex;
use crate::record::Stage;
use crate::tinyroot;
use crate::{Errno, Result};

/// What init holds while it builds.
struct Building<'a> {
    site: &'a Site<'a>,
    /// The sandbox's root, once its overlay is there.
    root: Option<OwnedFd>,
    /// The sandbox's uid 0, as the host sees it.
    owner: Owner,
}

/// Walks all steps; a failure names the step.
pub(super) fn walk(steps: List<'_, StepRef<'_>>, site: &Site<'_>) -> core::result::Result<(), Failure> {
    let base = site.ids.base;
    let mut building = Building { site, root: None, owner: Owner { uid: base, gid: base } };
    for (index, step) in steps.enumerate() {
        let failed = Failure::of(Stage::Step, index);
        let step = step.map_err(&failed)?;
        building.perform(step).map_err(|errno| match step {
            StepRef::Volume { index, .. } => Failure { stage: Stage::Volume, errno, index },
            _ => failed(errno),
        })?;
    }
    Ok(())
}

impl Building<'_> {
    fn fd(&self, index: FdIndex) -> Result<BorrowedFd<'_>> {
        fd_of(self.site.fds, index)
    }

    fn perform(&mut self, step: StepRef<'_>) -> Result<()> {
        match step {
            StepRef::Attach { mount, target } => attach(self.fd(mount)?, AT_FDCWD, target.get()?),
            StepRef::HandBack { source } => {
                give(self.site.socket, Handed::Scratch, clone_tree(AT_FDCWD, source.get()?)?.as_fd())
            }
            StepRef::Overlay { lowers, upper, work, target } => {
                let parts = Parts { lowers, upper: upper.get()?, work: work.get()? };
                self.overlay(parts, target.get()?)
            }
            StepRef::Directory { inside, mode } => {
                make_directory(self.root()?, inside.get()?, mode, self.owner).map(drop)
            }
            StepRef::Devices if without(Defence::DeviceTree) => Ok(()),
            StepRef::Proc if without(Defence::OwnProc) => Ok(()),
            StepRef::Devices => relocate(parked::DEVICES, self.own_directory(c"dev")?.as_fd()),
            StepRef::Volume { mount, inside, .. } => {
                let place = make_directory(self.root()?, inside.get()?, 0o755, self.owner)?;
                attach(self.fd(mount)?, place.as_fd(), c"")
            }
            StepRef::Bind { source, inside, attributes } => {
                let mount = clone_tree(AT_FDCWD, source.get()?)?;
                restrict(mount.as_fd(), attributes)?;
                let place = open_beneath(self.root()?, inside.get()?, libc::O_PATH, 0, RESOLVE)?;
                attach(mount.as_fd(), place.as_fd(), c"")
            }
            StepRef::Proc => relocate(parked::PROC, self.own_directory(c"proc")?.as_fd()),
            StepRef::Pivot => self.pivot(),
        }
    }

    fn root(&self) -> Result<BorrowedFd<'_>> {
        self.root.as_ref().map(OwnedFd::as_fd).ok_or(Errno::ENOTDIR)
    }

    /// A directory right below the root that may not be a link, whatever a layer says.
    fn own_directory(&self, name: &CStr) -> Result<OwnedFd> {
        let resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS;
        match open_beneath(self.root()?, name, libc::O_PATH | libc::O_DIRECTORY, 0, resolve) {
            Err(Errno::ENOENT) => make_directory(self.root()?, name, 0o755, self.owner),
            other => other,
        }
    }

    /// Mounts an overlay: the first one is the sandbox's root, the others are in it.
    fn overlay(&mut self, parts: Parts<'_>, target: &CStr) -> Result<()> {
        match &self.root {
            None => {
                overlay::mount_at(self.site.overlays, parts, target)?;
                let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
                self.root = Some(openat(AT_FDCWD, target, flags, Mode::empty())?);
                Ok(())
            }
            Some(_) => {
                overlay::mount_at(self.site.overlays, parts, tinyroot::TREE)?;
                let place = make_directory(self.root()?, target, 0o755, self.owner)?;
                relocate(tinyroot::TREE, place.as_fd())
            }
        }
    }

    /// Stacks the old root on the new one and lets it go: pivot_root(2), the last example of its notes.
    fn pivot(&self) -> Result<()> {
        nix::unistd::fchdir(self.root()?)?;
        nix::unistd::pivot_root(c".", c".")?;
        umount2(c".", MntFlags::MNT_DETACH)?;
        nix::unistd::chdir(c"/")
    }
}
