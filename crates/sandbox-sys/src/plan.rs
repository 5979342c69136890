//! What a sandbox is told: every decision already made, every text already NUL-terminated. A plan
//! names descriptors by their place in the list that travels with it.
//!
//! [`RootPlan`] and [`Plan`] are written by the worker, one after the other; the child reads the same bytes as a
//! [`RootOrder`](crate::order::RootOrder) and an [`Order`](crate::order::Order), which borrow from them and so need no
//! memory of their own.

use std::ffi::{CStr, CString};

use serde::ser::Error as _;
use serde::{Deserialize, Serialize, Serializer};

/// A text for the kernel; travels with its NUL.
#[derive(Clone, PartialEq, Eq)]
pub struct Text(CString);

impl Text {
    /// The text.
    #[must_use]
    pub fn as_cstr(&self) -> &CStr {
        &self.0
    }
}

impl From<CString> for Text {
    fn from(text: CString) -> Self {
        Self(text)
    }
}

impl From<&CStr> for Text {
    fn from(text: &CStr) -> Self {
        Self(text.to_owned())
    }
}

impl std::fmt::Debug for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(&self.0, f)
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0.as_bytes_with_nul())
    }
}

/// A list goes as the bytes of its items, so that it can be passed over without being read.
fn as_list<T: Serialize, S: Serializer>(items: &[T], serializer: S) -> Result<S::Ok, S::Error> {
    let mut bytes = Vec::new();
    for item in items {
        bytes = postcard::to_extend(item, bytes).map_err(S::Error::custom)?;
    }
    serializer.serialize_bytes(&bytes)
}

/// Place of a descriptor in the list that travels with a plan.
pub type FdIndex = u16;

/// How a sandbox's file system is built: what init is told first, and may be told before there is a program for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RootPlan {
    /// What init does to the mount namespace, in order; the last one is [`Step::Pivot`].
    #[serde(serialize_with = "as_list")]
    pub steps: Vec<Step>,
}

/// Everything about one program in one sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The sandbox's host name, as of sethostname(2).
    pub hostname: String,
    /// Where records are written; a pipe.
    pub report: FdIndex,
    /// A network namespace that init enters in place of its own: setns(2).
    pub network: Option<FdIndex>,
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
    /// How many. The id right above them is the sandbox's init's, and nobody's inside.
    pub count: u32,
}

/// Who the root of a map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RootIs {
    /// The first id of the range, as all others follow.
    Root,
    /// Nobody, on either side: what root owns on disk belongs to no user of the sandbox, and what the sandbox's root
    /// makes belongs to nobody (65534) on disk.
    Nobody,
}

impl IdRange {
    /// The id of the sandbox's init, which is nobody's inside: to a job's root, init is a stranger. It also owns the
    /// program's user namespace, so that what the kernel counts for each user (inotify(7), pending signals) is counted
    /// for this sandbox alone.
    #[must_use]
    pub fn init_id(self) -> u32 {
        self.base + self.count
    }
}

/// One step of building the file system. Paths that begin with `/l`, `/s` and `/n` are in the
/// launcher's small root; `inside` paths are in the sandbox's, links resolved within it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Step {
    /// Attaches a detached mount in the launcher's small root.
    Attach {
        /// The mount.
        mount: FdIndex,
        /// Where.
        target: Text,
    },
    /// Clones an attached mount and sends it back to who ordered the sandbox: [`HandedBack`](crate::HandedBack)
    /// receives it. A detached mount can be attached once, and before Linux 6.15 only one that is attached can be
    /// cloned; so whoever needs it again asks for it while it is there.
    HandBack {
        /// Where, in the launcher's small root.
        source: Text,
    },
    /// Mounts an overlay: overlayfs in the kernel's documentation.
    Overlay {
        /// Lower directories, topmost first.
        #[serde(serialize_with = "as_list")]
        lowers: Vec<Text>,
        /// The upper directory.
        upper: Text,
        /// The work directory, on the same file system.
        work: Text,
        /// Where, in the launcher's small root; then it is opened as the sandbox's root, if none is yet.
        target: Text,
    },
    /// Makes a directory and those above it, where missing.
    Directory {
        /// Where, in the sandbox.
        inside: Text,
        /// Its mode, if it is made.
        mode: u32,
    },
    /// Moves the device tree that was prepared to `/dev`.
    Devices,
    /// Attaches a detached mount at a directory of the sandbox; the directory is made where missing.
    Volume {
        /// The mount.
        mount: FdIndex,
        /// Where, in the sandbox.
        inside: Text,
        /// The place in the job's list, for errors.
        index: u32,
    },
    /// Binds a directory of the launcher's small root at a directory of the sandbox that is there.
    Bind {
        /// Where from.
        source: Text,
        /// Where to, in the sandbox.
        inside: Text,
        /// Mount attributes to add.
        attributes: u64,
    },
    /// Moves the proc(5) that was prepared, masks and all, to `/proc`.
    Proc,
    /// Makes the sandbox's root the only root there is: pivot_root(2).
    Pivot,
}

/// The program, and what its process does to itself before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Program {
    /// How it enters its cgroup.
    pub cgroup: ProgramCgroup,
    /// Name or number of the user, as of passwd(5).
    pub user: String,
    /// Name or number of the group, as of group(5).
    pub group: Option<String>,
    /// Files to write before the start.
    #[serde(serialize_with = "as_list")]
    pub files: Vec<FileWrite>,
    /// Descriptor with the files' bytes.
    pub payload: Option<FdIndex>,
    /// Working directory; the user's home if none.
    pub cwd: Option<Text>,
    /// Arguments, the program's name first.
    #[serde(serialize_with = "as_list")]
    pub argv: Vec<Text>,
    /// Paths to try, in order.
    #[serde(serialize_with = "as_list")]
    pub candidates: Vec<Text>,
    /// Environment, `NAME=value` each.
    #[serde(serialize_with = "as_list")]
    pub env: Vec<Text>,
    /// Whether HOME is to be set from passwd.
    pub set_home: bool,
    /// Whether USER is to be set from passwd.
    pub set_user: bool,
    /// Resource limits.
    #[serde(serialize_with = "as_list")]
    pub rlimits: Vec<Rlimit>,
    /// Descriptor that becomes 0; the sandbox's own `/dev/null` if none.
    pub stdin: Option<FdIndex>,
    /// Descriptors that become 1 and 2.
    pub outputs: [FdIndex; 2],
    /// A pseudo-terminal of the sandbox's own takes the place of all three: pty(7). Its other side is handed back.
    pub terminal: Option<WindowSize>,
    /// Which of the launcher's filters it gets.
    pub filter: u8,
    /// A socket to which the filter's listener is sent, if refusals are to be told.
    pub listener: Option<FdIndex>,
}

/// How large a terminal is: TIOCSWINSZ(2const).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// How a program enters its cgroup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum ProgramCgroup {
    /// cgroup v1: the process writes 0 to each of these open `tasks` files.
    Tasks(#[serde(serialize_with = "as_list")] Vec<FdIndex>),
    /// cgroup v2: the process is born in this directory (CLONE_INTO_CGROUP), and writes 0 to each of the
    /// `tasks` files of controllers that are still on v1.
    Unified(FdIndex, #[serde(serialize_with = "as_list")] Vec<FdIndex>),
}

/// A file that is written before the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileWrite {
    /// Where, in the sandbox.
    pub path: Text,
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
