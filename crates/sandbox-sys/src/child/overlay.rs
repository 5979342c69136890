//! Mounting an overlay, by whichever interface this kernel has for it: overlayfs.rst of the kernel's documentation.
//!
//! Layers are given one by one (`lowerdir+`) since Linux 6.7, by fsconfig(2), which has room for 256 bytes of text.
//! Before that they are one text for mount(2), which has room for a page.

use std::ffi::CStr;
use std::os::fd::AsFd as _;

use nix::fcntl::AT_FDCWD;
use nix::mount::{MsFlags, mount};

use super::Line;
use crate::Result;
use crate::mount::{NODEV, NOSUID, NewFilesystem, attach, harmless};
use crate::order::{List, TextRef};

/// Room for the options of mount(2): less than a page is taken of a text.
const MOST_OPTIONS: usize = 4000;

/// Options that do not depend on the job. What a layer says in extended attributes of whole directories or files that
/// are elsewhere is not followed, whatever the host's defaults are.
const FIXED: [(&CStr, &CStr); 3] =
    [(c"redirect_dir", c"nofollow"), (c"metacopy", c"off"), (c"index", c"off")];

/// How overlays are mounted on this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OverlayApi {
    /// By descriptors, layer by layer.
    Descriptors,
    /// By mount(2).
    Classic,
}

impl OverlayApi {
    /// Looks at what the kernel takes. A file system that does not know fsconfig(2) itself takes every option, and
    /// judges them only when it is made.
    pub(super) fn find() -> Self {
        let knows = NewFilesystem::open(c"overlay").is_ok_and(|overlay| {
            overlay.set(c"no-such-option", c"x").is_err() && overlay.set(c"lowerdir+", c"/").is_ok()
        });
        if knows { Self::Descriptors } else { Self::Classic }
    }
}

/// What an overlay is made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts<'a> {
    /// Lower directories, topmost first.
    pub(super) lowers: List<'a, TextRef<'a>>,
    /// The upper directory.
    pub(super) upper: &'a CStr,
    /// The work directory.
    pub(super) work: &'a CStr,
}

/// Mounts an overlay at a directory of the launcher's small root.
pub(super) fn mount_at(api: OverlayApi, parts: Parts<'_>, target: &CStr) -> Result<()> {
    match api {
        OverlayApi::Descriptors => by_descriptors(parts, target),
        OverlayApi::Classic => classic(parts, target),
    }
}

fn by_descriptors(parts: Parts<'_>, target: &CStr) -> Result<()> {
    let overlay = NewFilesystem::open(c"overlay")?;
    overlay.set(c"source", c"hutch")?;
    // An id of its own for each file system costs an xattr; kernels before 6.6 do not have the choice.
    let _ = overlay.set(c"uuid", c"null");
    for (name, value) in FIXED {
        overlay.set(name, value)?;
    }
    for lower in parts.lowers {
        overlay.set(c"lowerdir+", lower?.get()?)?;
    }
    overlay.set(c"upperdir", parts.upper)?;
    overlay.set(c"workdir", parts.work)?;
    attach(overlay.mount(harmless())?.as_fd(), AT_FDCWD, target)
}

fn classic(parts: Parts<'_>, target: &CStr) -> Result<()> {
    let mut options = Line::<MOST_OPTIONS>::empty();
    options.push(b"lowerdir=")?;
    for (number, lower) in parts.lowers.enumerate() {
        if number > 0 {
            options.push(b":")?;
        }
        options.push(lower?.get()?.to_bytes())?;
    }
    for (name, value) in [(c"upperdir", parts.upper), (c"workdir", parts.work)].into_iter().chain(FIXED) {
        options.push(b",")?;
        options.push(name.to_bytes())?;
        options.push(b"=")?;
        options.push(value.to_bytes())?;
    }
    let mut flags = MsFlags::empty();
    flags.set(MsFlags::MS_NOSUID, harmless() & NOSUID != 0);
    flags.set(MsFlags::MS_NODEV, harmless() & NODEV != 0);
    mount(Some(c"hutch"), target, Some(c"overlay"), flags, Some(options.as_cstr()?))
}
