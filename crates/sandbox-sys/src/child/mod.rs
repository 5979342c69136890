//! The child's side, after clone: init builds the sandbox, starts the program and reaps.
//!
//! In order: init leaves the network, walks the plan's steps, starts the program's process, gives up its
//! own privileges, and waits. The program's process ([`program`]) enters its cgroup and its user
//! namespace, writes files, becomes the user, confines itself and runs; until then it shares init's memory,
//! and init stands still. When it ends, init says how and ends too; being pid 1 of the sandbox, it takes all
//! that is left of it along (pid_namespaces(7)).
//!
//! Nothing in here allocates, locks, logs or panics.

mod files;
mod program;
mod steps;
pub mod user;

use std::ffi::CStr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use crate::bpf::Instruction;
use crate::plan::{Plan, ProgramCgroup};
use crate::process::{
    CAP_KILL, Stack, close_range, exit_now, keep_capabilities, monotonic_ns, prctl, start_sharing,
};
use crate::record::{Record, Stage};
use crate::{Errno, Result};

/// The most bytes of passwd and group that are read.
const MAX_DATABASE: usize = 1 << 20;
/// Stack of the program's process until exec: copying a file takes 32 KiB of it.
const STACK_KIB: usize = 256;

/// Space that every sandbox's child uses, made once; each child has a copy of its own.
pub(crate) struct Workspace {
    /// Bytes of a passwd or group file.
    database: Vec<u8>,
    /// The program's process runs on it until exec.
    stack: Stack,
}

impl Workspace {
    pub(crate) fn new() -> Self {
        Self { database: vec![0; MAX_DATABASE], stack: Stack::new(STACK_KIB) }
    }
}

/// The descriptors that a sandbox is given.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Given<'a> {
    /// Those that the plan names.
    pub(crate) fds: &'a [OwnedFd],
    /// The program's user namespace, its ids mapped.
    pub(crate) userns: BorrowedFd<'a>,
    /// A network namespace made ahead; without it, init makes one.
    pub(crate) network: Option<BorrowedFd<'a>>,
}

/// Everything that init and the program's process will need, made before the clone.
pub(crate) struct Sandbox<'a> {
    plan: &'a Plan,
    given: Given<'a>,
    filter: &'a [Instruction],
    report: BorrowedFd<'a>,
    argv: Vec<*const libc::c_char>,
    /// The environment, with room for HOME and USER and the end.
    envp: Vec<*const libc::c_char>,
    workspace: &'a mut Workspace,
}

impl<'a> Sandbox<'a> {
    pub(crate) fn new(
        plan: &'a Plan,
        given: Given<'a>,
        filter: &'a [Instruction],
        workspace: &'a mut Workspace,
    ) -> Result<Self> {
        let report = given.fds.get(usize::from(plan.report)).ok_or(Errno::EBADF)?.as_fd();
        let program = &plan.program;
        let mut argv: Vec<_> = program.argv.iter().map(|text| text.as_ptr()).collect();
        argv.push(core::ptr::null());
        let mut envp: Vec<_> = program.env.iter().map(|text| text.as_ptr()).collect();
        envp.extend([core::ptr::null(); 3]);
        Ok(Self { plan, given, filter, report, argv, envp, workspace })
    }

    fn fd(&self, index: u16) -> Result<BorrowedFd<'a>> {
        self.given.fds.get(usize::from(index)).map(OwnedFd::as_fd).ok_or(Errno::EBADF)
    }

    fn report(&self, record: Record) {
        let _ = nix::unistd::write(self.report, &record.to_bytes());
    }
}

/// Why set-up ended early.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Failure {
    stage: Stage,
    errno: Errno,
    index: u32,
}

impl Failure {
    fn at(stage: Stage) -> impl Fn(Errno) -> Self {
        move |errno| Self { stage, errno, index: 0 }
    }

    fn of(stage: Stage, index: usize) -> impl Fn(Errno) -> Self {
        move |errno| Self { stage, errno, index: u32::try_from(index).unwrap_or(u32::MAX) }
    }
}

/// The life of a sandbox's pid 1.
pub(crate) fn init(sandbox: &mut Sandbox<'_>) -> ! {
    let code = match start(sandbox) {
        Ok(program) => wait_for(sandbox, program),
        Err(Failure { stage, errno, index }) => {
            sandbox.report(Record::Failed { stage, errno: errno as i32, index });
            1
        }
    };
    exit_now(code)
}

fn start(sandbox: &mut Sandbox<'_>) -> core::result::Result<Pid, Failure> {
    let launch = Failure::at(Stage::Launch);
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(&launch)?;
    prctl(libc::PR_SET_DUMPABLE, 0, 0).map_err(&launch)?;
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.add(Signal::SIGTERM);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None).map_err(&launch)?;
    nix::sys::stat::umask(Mode::empty());
    match sandbox.given.network {
        Some(made) => nix::sched::setns(made, CloneFlags::CLONE_NEWNET),
        None => isolate_network(),
    }
    .map_err(Failure::at(Stage::Network))?;
    nix::unistd::sethostname(sandbox.plan.hostname.as_str()).map_err(&launch)?;
    steps::walk(sandbox)?;
    let program = start_program(sandbox)?;
    retire(sandbox).map_err(Failure::at(Stage::Confine))?;
    Ok(program)
}

/// A new network namespace with loopback up and nothing else: netdevice(7).
pub(crate) fn isolate_network() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    // SAFETY: socket(2) takes integers only.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    let socket = Errno::result(socket)?;
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes()) {
        *to = libc::c_char::try_from(*from).unwrap_or(0);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(0);
    // SAFETY: `request` is an ifreq whose name and flags are set, as SIOCSIFFLAGS wants.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    Errno::result(answer).map(drop)
}

/// Starts the program's process; it has become the program, or failed, when this returns.
fn start_program(sandbox: &mut Sandbox<'_>) -> core::result::Result<Pid, Failure> {
    let cloning = Failure::at(Stage::Clone);
    let cgroup = match &sandbox.plan.program.cgroup {
        ProgramCgroup::Tasks(_) => None,
        ProgramCgroup::Unified(dir, _) => Some(sandbox.fd(*dir).map_err(&cloning)?),
    };
    let mut stack = core::mem::replace(&mut sandbox.workspace.stack, Stack::empty());
    let argument = core::ptr::from_mut(sandbox).cast();
    // SAFETY: init has one thread; `run_program` does not return, and writes only to the sandbox that it is given.
    let pid = unsafe { start_sharing(0, cgroup, &mut stack, run_program, argument) };
    core::mem::forget(stack);
    pid.map(Pid::from_raw).map_err(&cloning)
}

extern "C" fn run_program(sandbox: *mut libc::c_void) -> ! {
    // SAFETY: `start_program` passes a sandbox, and waits while this process uses it.
    let sandbox = unsafe { &mut *sandbox.cast::<Sandbox<'_>>() };
    program::run(sandbox)
}

/// init's own end of privileges: it keeps the report, and the right to signal within its namespace.
fn retire(sandbox: &Sandbox<'_>) -> Result<()> {
    let report = libc::c_uint::try_from(sandbox.report.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    close_range(0, report.saturating_sub(1))?;
    close_range(report + 1, libc::c_uint::MAX)?;
    crate::process::set_groups(&[])?;
    let base = sandbox.plan.ids.base;
    prctl(libc::PR_SET_KEEPCAPS, 1, 0)?;
    crate::process::set_ids(base, base)?;
    keep_capabilities(CAP_KILL)?;
    // A change of ids takes it away: PR_SET_PDEATHSIG(2const).
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    nix::sys::prctl::set_no_new_privs()
}

/// Reaps until the program has ended, passing SIGTERM on, and says how it ended.
fn wait_for(sandbox: &Sandbox<'_>, program: Pid) -> libc::c_int {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.add(Signal::SIGTERM);
    loop {
        let mut wait_status: libc::c_int = 0;
        // SAFETY: `wait_status` is an int that the call fills.
        let pid = unsafe { libc::waitpid(-1, &raw mut wait_status, libc::WNOHANG) };
        if pid == program.as_raw() {
            sandbox.report(Record::Ended { wait_status, at_ns: monotonic_ns() });
            return 0;
        }
        if pid > 0 {
            continue;
        }
        if mask.wait() == Ok(Signal::SIGTERM) {
            let _ = nix::sys::signal::kill(Pid::from_raw(-1), Signal::SIGTERM);
        }
    }
}

/// A line of text in a fixed space.
pub(crate) struct Line {
    bytes: [u8; 128],
    length: usize,
}

impl Line {
    pub(crate) fn new() -> Self {
        Self { bytes: [0; 128], length: 0 }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    pub(crate) fn as_cstr(&self) -> Result<&CStr> {
        CStr::from_bytes_until_nul(&self.bytes).map_err(|_| Errno::ENAMETOOLONG)
    }
}

impl core::fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let end = self.length + text.len();
        // One byte stays free for the NUL.
        let space = self.bytes.get_mut(self.length..end).filter(|_| end < 128).ok_or(core::fmt::Error)?;
        space.copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}
