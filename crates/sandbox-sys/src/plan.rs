//! What the launcher and the child are told: every decision already made, every text already
//! NUL-terminated. A plan names descriptors by their place in the list that travels with it.

use std::ffi::CString;

use serde::{Deserialize, Serialize};

/// Place of a descriptor in the list that travels with a plan.
pub type FdIndex = u16;

/// Everything about one program in one sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The sandbox's host name, as of sethostname(2).
    pub hostname: String,
    /// Where records are written; a pipe.
    pub report: FdIndex,
    /// What init does to the mount namespace, in order; the last one is [`Step::Pivot`].
    pub steps: Vec<Step>,
    /// The ids of the host that the sandbox's user namespace maps, from 0.
    pub ids: IdRange,
    /// The program.
    pub program: Program,
}

/// A range of the host's uids and gids that a sandbox sees as 0 and up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// The host's id that is 0 inside.
    pub base: u32,
    /// How many.
    pub count: u32,
}

/// One step of building the file system. Paths that begin with `/l`, `/s` and `/n` are in the
/// launcher's small root; `inside` paths are in the sandbox's, links resolved within it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Attaches a detached mount in the launcher's small root.
    Attach {
        /// The mount.
        mount: FdIndex,
        /// Where.
        target: CString,
    },
    /// Mounts an overlay: overlayfs in the kernel's documentation.
    Overlay {
        /// Lower directories, topmost first.
        lowers: Vec<CString>,
        /// The upper directory.
        upper: CString,
        /// The work directory, on the same file system.
        work: CString,
        /// Where, in the launcher's small root; then it is opened as the sandbox's root, if none is yet.
        target: CString,
    },
    /// Makes a directory and those above it, where missing.
    Directory {
        /// Where, in the sandbox.
        inside: CString,
        /// Its mode, if it is made.
        mode: u32,
    },
    /// Attaches the launcher's device tree at `/dev`, and a new devpts in it.
    Devices,
    /// Attaches a detached mount at a directory of the sandbox; the directory is made where missing.
    Volume {
        /// The mount.
        mount: FdIndex,
        /// Where, in the sandbox.
        inside: CString,
        /// The place in the job's list, for errors.
        index: u32,
    },
    /// Binds a directory of the launcher's small root at a directory of the sandbox that is there.
    Bind {
        /// Where from.
        source: CString,
        /// Where to, in the sandbox.
        inside: CString,
        /// Mount attributes to add.
        attributes: u64,
    },
    /// Mounts a new proc(5) at `/proc`.
    Proc,
    /// Hides or write-protects a path of `/proc` if it is there.
    Mask {
        /// The path, below `/proc`.
        name: CString,
        /// How.
        kind: MaskKind,
    },
    /// Makes the sandbox's root the only root there is: pivot_root(2).
    Pivot,
}

/// How a path is masked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MaskKind {
    /// `/dev/null` in place of a file.
    File,
    /// An empty directory in its place.
    Directory,
    /// Itself, read-only.
    ReadOnly,
}

/// The program, and what its process does to itself before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// How it enters its cgroup.
    pub cgroup: ProgramCgroup,
    /// Name or number of the user, as of passwd(5).
    pub user: String,
    /// Name or number of the group, as of group(5).
    pub group: Option<String>,
    /// Files to write before the start.
    pub files: Vec<FileWrite>,
    /// Descriptor with the files' bytes.
    pub payload: Option<FdIndex>,
    /// Working directory; the user's home if none.
    pub cwd: Option<CString>,
    /// Arguments, the program's name first.
    pub argv: Vec<CString>,
    /// Paths to try, in order.
    pub candidates: Vec<CString>,
    /// Environment, `NAME=value` each.
    pub env: Vec<CString>,
    /// Whether HOME is to be set from passwd.
    pub set_home: bool,
    /// Whether USER is to be set from passwd.
    pub set_user: bool,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// Descriptors that become 0, 1 and 2.
    pub stdio: [FdIndex; 3],
}

/// How a program enters its cgroup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProgramCgroup {
    /// cgroup v1: the process writes 0 to each of these open `tasks` files.
    Tasks(Vec<FdIndex>),
    /// cgroup v2: the process is born in this directory (CLONE_INTO_CGROUP), and writes 0 to each of the
    /// `tasks` files of controllers that are still on v1.
    Unified(FdIndex, Vec<FdIndex>),
}

/// A file that is written before the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileWrite {
    /// Where, in the sandbox.
    pub path: CString,
    /// Where its bytes begin in the payload.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
    /// Its permission bits.
    pub mode: u32,
}

/// A resource limit: getrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// RLIMIT_*.
    pub resource: u32,
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}
