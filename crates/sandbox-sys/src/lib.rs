//! The kernel's side of a sandbox, and the only crate with unsafe code.
//!
//! In the order of use: [`Launcher::fork`] makes a small process with one thread, in a mount
//! namespace of its own that holds next to nothing; [`Launcher::park`] has it clone an init, which
//! prepares what is the same for every sandbox and waits; [`Parked::build`] sends that init a [`RootPlan`] with
//! descriptors, whose [`Step`]s it walks, and [`Built::start`] a [`Plan`]: it starts the program, and reaps; both tell what happens as
//! [`Record`]s on a pipe of the caller's.
//!
//! Between clone and exec nothing allocates, locks, logs or panics: all that the child needs was
//! made before, and a failure goes back as stage, errno and index.

pub mod attempt;
pub mod bpf;
mod channel;
mod child;
pub mod defence;
pub mod heap;
mod launcher;
pub mod loopdev;
pub mod mount;
mod network;
pub mod notify;
mod order;
mod packet;
mod plan;
pub mod process;
mod record;
pub mod separate;
pub mod terminal;
mod tinyroot;

pub use child::user;
pub use launcher::{Built, CgroupHome, HandedBack, Launcher, Parked, Started, Usher, Ushered};
pub use network::NetworkNamespace;
pub use nix::errno::Errno;
pub use packet::PacketSocket;
pub use plan::{
    FdIndex, FileWrite, IdRange, Plan, Program, ProgramCgroup, Rlimit, RootIs, RootPlan, Step, Text,
    WindowSize,
};
pub use record::{RECORD_BYTES, Record, Stage};

/// What a system call answers: a value or an errno.
pub type Result<T> = core::result::Result<T, Errno>;
