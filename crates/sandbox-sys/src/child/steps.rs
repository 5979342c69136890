//! init's walk over the plan's steps: from the launcher's small root to the sandbox's own.

use std::ffi::CStr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::Mode;

use super::files::{Owner, RESOLVE, make_directory};
use super::{Failure, Sandbox};
use crate::mount::{
    NODEV, NOEXEC, NOSUID, NewFilesystem, RDONLY, RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, attach, clone_tree,
    open_beneath, restrict,
};
use crate::plan::{MaskKind, Step};
use crate::record::Stage;
use crate::{Errno, Result};

/// What init holds while it builds.
struct Site<'a> {
    sandbox: &'a Sandbox<'a>,
    /// The sandbox's root, once its overlay is there.
    root: Option<OwnedFd>,
    /// The sandbox's own /proc, once it is there.
    proc_mount: Option<OwnedFd>,
    /// The sandbox's uid 0, as the host sees it.
    owner: Owner,
}

/// Walks all steps; a failure names the step.
pub(super) fn walk(sandbox: &Sandbox<'_>) -> core::result::Result<(), Failure> {
    let base = sandbox.plan.ids.base;
    let mut site = Site { sandbox, root: None, proc_mount: None, owner: Owner { uid: base, gid: base } };
    for (index, step) in sandbox.plan.steps.iter().enumerate() {
        site.perform(step).map_err(|errno| match step {
            Step::Volume { index, .. } => Failure { stage: Stage::Volume, errno, index: *index },
            _ => Failure::of(Stage::Step, index)(errno),
        })?;
    }
    Ok(())
}

impl Site<'_> {
    fn perform(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Attach { mount, target } => attach(self.sandbox.fd(*mount)?, AT_FDCWD, target),
            Step::Overlay { lowers, upper, work, target } => self.overlay(lowers, upper, work, target),
            Step::Directory { inside, mode } => {
                make_directory(self.root()?, inside, *mode, self.owner).map(drop)
            }
            Step::Devices => self.devices(),
            Step::Volume { mount, inside, .. } => {
                let place = make_directory(self.root()?, inside, 0o755, self.owner)?;
                attach(self.sandbox.fd(*mount)?, place.as_fd(), c"")
            }
            Step::Bind { source, inside, attributes } => {
                let mount = clone_tree(AT_FDCWD, source)?;
                restrict(mount.as_fd(), *attributes)?;
                let place = open_beneath(self.root()?, inside, libc::O_PATH, 0, RESOLVE)?;
                attach(mount.as_fd(), place.as_fd(), c"")
            }
            Step::Proc => {
                let mount = NewFilesystem::open(c"proc")?.mount(NOSUID | NODEV | NOEXEC)?;
                let place = self.own_directory(c"proc")?;
                attach(mount.as_fd(), place.as_fd(), c"")?;
                self.proc_mount = Some(mount);
                Ok(())
            }
            Step::Mask { name, kind } => self.mask(name, *kind),
            Step::Pivot => self.pivot(),
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

    fn overlay(
        &mut self,
        lowers: &[std::ffi::CString],
        upper: &CStr,
        work: &CStr,
        target: &CStr,
    ) -> Result<()> {
        let overlay = NewFilesystem::open(c"overlay")?;
        overlay.set(c"source", c"hutch")?;
        // An id of its own for each file system costs an xattr; kernels before 6.6 do not have the choice.
        let _ = overlay.set(c"uuid", c"null");
        for lower in lowers {
            overlay.set(c"lowerdir+", lower)?;
        }
        overlay.set(c"upperdir", upper)?;
        overlay.set(c"workdir", work)?;
        let mount = overlay.mount(NOSUID | NODEV)?;
        match &self.root {
            None => {
                attach(mount.as_fd(), AT_FDCWD, target)?;
                let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
                self.root = Some(openat(AT_FDCWD, target, flags, Mode::empty())?);
                Ok(())
            }
            Some(_) => {
                let place = make_directory(self.root()?, target, 0o755, self.owner)?;
                attach(mount.as_fd(), place.as_fd(), c"")
            }
        }
    }

    fn devices(&self) -> Result<()> {
        let tree = clone_tree(AT_FDCWD, c"/dev")?;
        let place = self.own_directory(c"dev")?;
        attach(tree.as_fd(), place.as_fd(), c"")?;
        let terminals = NewFilesystem::open(c"devpts")?;
        terminals.set_flag(c"newinstance")?;
        terminals.set(c"ptmxmode", c"0666")?;
        terminals.set(c"mode", c"0620")?;
        let terminals = terminals.mount(NOSUID | NOEXEC)?;
        let place =
            open_beneath(self.root()?, c"dev/pts", libc::O_PATH, 0, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)?;
        attach(terminals.as_fd(), place.as_fd(), c"")
    }

    /// Covers a path of the sandbox's own /proc, of which no layer has a say.
    fn mask(&self, name: &CStr, kind: MaskKind) -> Result<()> {
        let proc_mount = self.proc_mount.as_ref().map(OwnedFd::as_fd).ok_or(Errno::ENOTDIR)?;
        let cover = match kind {
            MaskKind::File => clone_tree(AT_FDCWD, c"/dev/null"),
            MaskKind::Directory => clone_tree(AT_FDCWD, c"/e"),
            MaskKind::ReadOnly => clone_tree(proc_mount, name),
        };
        let cover = match cover {
            Err(Errno::ENOENT) if kind == MaskKind::ReadOnly => return Ok(()),
            other => other?,
        };
        if kind != MaskKind::File {
            restrict(cover.as_fd(), RDONLY | NOSUID | NODEV | NOEXEC)?;
        }
        match attach(cover.as_fd(), proc_mount, name) {
            Err(Errno::ENOENT) => Ok(()),
            other => other,
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
