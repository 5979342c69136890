//! From prepared to running: init is told of the file system, then of the program; meanwhile pipes and a cgroup are made.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use hutch_proto::{Limits, SeccompRefused};
use hutch_sandbox_sys::defence::{Defence, without};
use hutch_sandbox_sys::notify::listener_socket;
use hutch_sandbox_sys::{
    Built, Errno, FdIndex, FileWrite, HandedBack, Plan, Program, ProgramCgroup, Started,
};
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use crate::ahead::Means;
use crate::cgroup::{Entrance, JobCgroup};
use crate::plan::{JobPlan, rlimits};
use crate::prepare::{Prepared, sealed};
use crate::refusal::Refusal;
use crate::seccomp;
use crate::terminal::DEFAULT_SIZE;

/// A sandbox whose init lives.
#[derive(Debug)]
pub(crate) struct Running {
    /// init; when it is dead, so is everything in the sandbox.
    pub(crate) init: OwnedFd,
    /// Its mount namespace: while this is held, nobody waits for its mounts to be taken down.
    pub(crate) mounts: OwnedFd,
    /// Where the scratch file system comes back for the next step.
    pub(crate) handed_back: HandedBack,
    /// Where records come from.
    pub(crate) report: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
    /// Where the listener for refused system calls comes, if it is wanted.
    pub(crate) refusals: Option<OwnedFd>,
    /// Readable when memory ran out, where the kernel leaves it to us to kill the rest.
    pub(crate) out_of_memory: Option<OwnedFd>,
    pub(crate) cgroup: JobCgroup,
    /// Bytes of the job's memory that are charged elsewhere.
    pub(crate) carried_bytes: u64,
}

/// The least memory that a group is given: below that the kernel cannot run a program in it.
const LEAST_MEMORY: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// The descriptors that travel with a plan, in order.
#[derive(Default)]
pub(crate) struct FdList<'a>(pub(crate) Vec<BorrowedFd<'a>>);

impl<'a> FdList<'a> {
    /// Adds descriptors and says where the first of them is.
    pub(crate) fn add(&mut self, fds: impl IntoIterator<Item = BorrowedFd<'a>>) -> FdIndex {
        let first = FdIndex::try_from(self.0.len()).unwrap_or(FdIndex::MAX);
        self.0.extend(fds);
        first
    }
}

/// Starts one step of a job, by its place in the plan, in the sandbox that was built ahead or in a new one.
///
/// # Errors
/// `host_error`, with the operation that failed.
pub(crate) fn spawn(
    means: Means<'_>,
    job: &JobPlan,
    number: usize,
    prepared: &Prepared,
    built: Option<Built>,
    network: Option<BorrowedFd<'_>>,
) -> Result<Running, Refusal> {
    let step = job.steps.get(number).ok_or_else(|| Refusal::host("there is no such step"))?;
    let (first, last) = (number == 0, number + 1 == job.steps.len());
    // It builds while all else is made here.
    let built = match built {
        Some(built) => built,
        None => means.build(prepared, last)?,
    };
    let carried_bytes = carried(job, prepared, first);
    let limits = Limits {
        memory_bytes: step.limits.memory_bytes.saturating_sub(carried_bytes).max(LEAST_MEMORY),
        ..step.limits.clone()
    };
    let limits = weakened(limits);
    let mut cgroup = means.cgroups.take(&limits).map_err(|e| Refusal::host(with_source(&e)))?;
    let out_of_memory = cgroup.take_out_of_memory();
    let entrance = cgroup.entrance().map_err(|e| Refusal::host(with_source(&e)))?;
    let stdin = if step.stdin.is_empty() || step.terminal { None } else { Some(sealed(&[&step.stdin])?) };
    let (report, report_end) = pipe()?;
    let (stdout, stdout_end) = output_pipe()?;
    let (stderr, stderr_end) = output_pipe()?;

    let (refusals, refusals_end) = match step.refused {
        SeccompRefused::Errno => (None, None),
        SeccompRefused::Report | SeccompRefused::Kill => {
            let failed = |e: Errno| Refusal::host(format!("cannot make a socket: {}", e.desc()));
            let (here, there) = listener_socket().map_err(failed)?;
            (Some(here), Some(there))
        }
    };

    let mut fds = FdList::default();
    let report_index = fds.add([report_end.as_fd()]);
    let stdin_index = stdin.as_ref().map(|stdin| fds.add([stdin.as_fd()]));
    let listener = refusals_end.as_ref().map(|end| fds.add([end.as_fd()]));
    let stdout_index = fds.add([stdout_end.as_fd()]);
    let stderr_index = fds.add([stderr_end.as_fd()]);
    let network = network.map(|namespace| fds.add([namespace]));
    let payload = prepared.payload.as_ref().filter(|_| first).map(|payload| fds.add([payload.as_fd()]));
    let program_cgroup = match &entrance {
        Entrance::Tasks(tasks) => ProgramCgroup::Tasks(indices(&mut fds, tasks)),
        Entrance::Unified(dir, tasks) => {
            let dir = fds.add([dir.as_fd()]);
            ProgramCgroup::Unified(dir, indices(&mut fds, tasks))
        }
    };
    let plan = Plan {
        hostname: job.hostname.clone(),
        report: report_index,
        network,
        ids: means.ids,
        program: Program {
            cgroup: program_cgroup,
            user: job.user.clone(),
            group: job.group.clone(),
            files: if first { file_writes(job) } else { Vec::new() },
            payload,
            cwd: step.cwd.clone(),
            argv: step.argv.clone(),
            candidates: step.candidates.clone(),
            env: step.env.clone(),
            set_home: step.set_home,
            set_user: step.set_user,
            rlimits: rlimits(&step.limits),
            stdin: stdin_index,
            outputs: [stdout_index, stderr_index],
            terminal: step.terminal.then_some(DEFAULT_SIZE),
            filter: seccomp::index(step.profile, step.refused),
            listener,
        },
    };
    let Started { init, mounts, handed_back } = built
        .start(&plan, &fds.0)
        .map_err(|e| Refusal::host(format!("the launcher could not start a sandbox: {}", e.desc())))?;
    Ok(Running {
        init,
        mounts,
        handed_back,
        report,
        stdout,
        stderr,
        refusals,
        out_of_memory,
        cgroup,
        carried_bytes,
    })
}

/// Limits without those that were taken away: none is, in the product.
fn weakened(limits: Limits) -> Limits {
    let rates = |limits: Limits| Limits {
        io_read_bytes_per_s: None,
        io_write_bytes_per_s: None,
        io_read_ops_per_s: None,
        io_write_ops_per_s: None,
        ..limits
    };
    let limits = if without(Defence::IoRates) { rates(limits) } else { limits };
    let kept = |defence, limit, far| if without(defence) { far } else { limit };
    Limits {
        memory_bytes: kept(Defence::MemoryLimit, limits.memory_bytes, 1 << 40),
        pids: kept(Defence::ProcessLimit, limits.pids, 10_000),
        cpu_millis: kept(Defence::ProcessorLimit, limits.cpu_millis, 64_000),
        ..limits
    }
}

/// What the job has in memory before this step's group counts anything: files that are written for it, by a process
/// whose memory is still init's, and what earlier steps wrote, each of which was charged to a group of its own.
fn carried(job: &JobPlan, prepared: &Prepared, first: bool) -> u64 {
    if first {
        return job.files.iter().map(|file| (file.bytes.len() as u64).next_multiple_of(PAGE)).sum();
    }
    prepared.scratch.memory_bytes()
}

pub(crate) fn indices<'a>(fds: &mut FdList<'a>, tasks: &'a [OwnedFd]) -> Vec<FdIndex> {
    tasks.iter().map(|task| fds.add([task.as_fd()])).collect()
}

fn file_writes(job: &JobPlan) -> Vec<FileWrite> {
    let mut offset = 0;
    job.files
        .iter()
        .map(|file| {
            let length = file.bytes.len() as u64;
            let path = std::ffi::CString::new(file.path.as_str()).unwrap_or_default().into();
            let write = FileWrite { path, offset, length, mode: file.mode };
            offset += length;
            write
        })
        .collect()
}

pub(crate) fn pipe() -> Result<(OwnedFd, OwnedFd), Refusal> {
    nix::unistd::pipe2(OFlag::O_CLOEXEC)
        .map_err(|e| Refusal::host(format!("cannot make a pipe: {}", e.desc())))
}

/// A pipe that whoever holds its end may open anew: a program's `/dev/stdout` is a link to what it holds
/// already, but opening it asks for the pipe's own permissions, and its owner is no user of the sandbox.
pub(crate) fn output_pipe() -> Result<(OwnedFd, OwnedFd), Refusal> {
    let ends = pipe()?;
    nix::sys::stat::fchmod(&ends.1, Mode::from_bits_truncate(0o666))
        .map_err(|e| Refusal::host(format!("cannot open a pipe to the program: {}", e.desc())))?;
    Ok(ends)
}

/// An error and what caused it, in one line.
pub(crate) fn with_source(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
