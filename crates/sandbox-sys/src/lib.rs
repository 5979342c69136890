//! The kernel's side of a sandbox, and the only crate with unsafe code.
//!
//! In the order of use: [`Launcher::fork`] makes a small process with one thread, in a mount
//! namespace of its own that holds next to nothing; [`Launcher::start`] sends it a [`Plan`] with
//! descriptors and gets a pidfd back; the launcher clones the sandbox's init, which walks the
//! plan's [`Step`]s, clones the program, and reaps; both tell what happens as [`Record`]s on a
//! pipe of the caller's.
//!
//! Between clone and exec nothing allocates, locks, logs or panics: all that the child needs was
//! made before, and a failure goes back as stage, errno and index.

pub mod bpf;
mod channel;
mod child;
mod launcher;
pub mod mount;
mod plan;
pub mod process;
mod record;
mod spare;
mod tinyroot;

pub use child::user;
pub use launcher::{CgroupHome, Launcher, Started};
pub use nix::errno::Errno;
pub use plan::{FdIndex, FileWrite, IdRange, MaskKind, Plan, Program, ProgramCgroup, Rlimit, Step};
pub use record::{RECORD_BYTES, Record, Stage};

/// What a system call answers: a value or an errno.
pub type Result<T> = core::result::Result<T, Errno>;
