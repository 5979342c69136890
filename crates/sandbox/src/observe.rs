//! What can be seen of a job while it runs.

use hutch_proto::Usage;

/// One of a program's two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Hears what happens to one job. Called on the engine's own task: return quickly.
pub trait Observer: Send + Sync {
    /// The first program is about to run.
    fn started(&self) {}
    /// A program wrote; bytes beyond the kept ones are not shown.
    fn output(&self, _step: &str, _stream: Stream, _bytes: &[u8]) {}
    /// What the job has used so far, about once a second.
    fn usage(&self, _usage: &Usage) {}
}

/// An observer that looks away.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl Observer for Unobserved {}

/// The state of a running job's cgroup, as the kernel says it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SlotGauges {
    /// The slot.
    pub slot: u32,
    /// Bytes of memory now.
    pub memory_bytes: u64,
    /// Those of them that are anonymous: heaps and stacks.
    pub memory_anonymous_bytes: u64,
    /// Those of them that are of files: page cache and tmpfs, the scratch file system among it.
    pub memory_file_bytes: u64,
    /// Bytes of memory allowed.
    pub memory_limit_bytes: u64,
    /// Microseconds of processor time.
    pub cpu_us: u64,
    /// Microseconds for which it was held back.
    pub cpu_throttled_us: u64,
    /// Processes and threads now.
    pub pids: u64,
    /// Bytes read from block devices.
    pub io_read_bytes: u64,
    /// Bytes written to block devices.
    pub io_write_bytes: u64,
    /// Microseconds of pressure, where the kernel counts them: (resource, kind, total).
    pub pressure_us: [Option<(&'static str, &'static str, u64)>; 6],
}
