//! The child's side, after clone: init prepares, waits for its order, builds the sandbox, starts the program
//! and reaps.
//!
//! In order: init prepares what is the same for every job ([`parked`]) and waits for an order; it walks the
//! order's steps, and waits for another, of a program; it starts the program's process, gives up its own privileges, and
//! waits. The program's
//! process ([`program`]) enters its cgroup and its user namespace, writes files, becomes the user, confines itself
//! and runs; until then it shares init's memory, and init stands still. When it ends, init says how and
//! ends too; being pid 1 of the sandbox, it takes all that is left of it along (pid_namespaces(7)).
//!
//! Nothing in here allocates, locks, logs or panics: space was made before ([`Workspace`]), and the order is
//! read where it lies.

mod files;
mod overlay;
pub(crate) mod parked;
mod program;
mod receive;
mod steps;
pub mod user;
pub(crate) mod usher;

use std::ffi::CStr;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use crate::bpf::Filters;
use crate::defence::{Defence, without};
use crate::network::NetworkNamespace;
use crate::order::{CgroupRef, Order, RootOrder};
use crate::plan::{FdIndex, IdRange};
use crate::process::{
    Beside, CAP_KILL, Stack, close_range, exit_now, keep_capabilities, monotonic_ns, prctl, start_sharing,
};
use crate::record::{Record, Stage};
use crate::{Errno, Result};
use overlay::OverlayApi;
use receive::Mailbox;

/// The most bytes of passwd and group that are read.
const MAX_DATABASE: usize = 1 << 20;
/// Stack of the program's process until exec: copying a file takes 32 KiB of it.
const STACK_KIB: usize = 256;
/// The most arguments and variables of a program, and their ends.
const MAX_ARGV: usize = 4096 + 1;
const MAX_ENVP: usize = 4096 + 3;

/// Space that every sandbox's child uses, made once; each child has a copy of its own.
pub(crate) struct Workspace {
    mailbox: Mailbox,
    /// Bytes of a passwd or group file.
    database: Vec<u8>,
    /// The program's process runs on it until exec.
    stack: Stack,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    overlays: OverlayApi,
}

impl Workspace {
    pub(crate) fn new() -> Self {
        Self {
            overlays: OverlayApi::find(),
            mailbox: Mailbox::new(),
            database: vec![0; MAX_DATABASE],
            stack: Stack::new(STACK_KIB),
            argv: Vec::with_capacity(MAX_ARGV),
            envp: Vec::with_capacity(MAX_ENVP),
        }
    }

    /// The stack, for a process of the launcher's own.
    pub(crate) fn stack(&mut self) -> &mut Stack {
        &mut self.stack
    }
}

/// A sandbox whose order is there.
pub(crate) struct Sandbox<'a> {
    order: Order<'a>,
    socket: BorrowedFd<'a>,
    fds: &'a [RawFd],
    report: BorrowedFd<'a>,
    userns: BorrowedFd<'a>,
    filters: &'a Filters,
    database: &'a mut [u8],
    argv: &'a mut Vec<*const libc::c_char>,
    envp: &'a mut Vec<*const libc::c_char>,
}

/// What the file system is built with.
struct Site<'a> {
    socket: BorrowedFd<'a>,
    overlays: OverlayApi,
    fds: &'a [RawFd],
    ids: IdRange,
}

impl Sandbox<'_> {
    fn fd(&self, index: FdIndex) -> Result<BorrowedFd<'_>> {
        fd_of(self.fds, index)
    }

    fn report(&self, record: Record) {
        tell(self.report, record);
    }
}

fn fd_of(fds: &[RawFd], index: FdIndex) -> Result<BorrowedFd<'_>> {
    let fd = *fds.get(usize::from(index)).ok_or(Errno::EBADMSG)?;
    // SAFETY: the descriptors came with the order and stay open until exec or exit.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

fn tell(report: BorrowedFd<'_>, record: Record) {
    let _ = nix::unistd::write(report, &record.to_bytes());
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

impl From<Failure> for Record {
    fn from(Failure { stage, errno, index }: Failure) -> Self {
        Self::Failed { stage, errno: errno as i32, index }
    }
}

/// The life of a sandbox's pid 1.
pub(crate) fn init(
    workspace: &mut Workspace,
    socket: BorrowedFd<'_>,
    ids: IdRange,
    network: NetworkNamespace,
    filters: &Filters,
) -> ! {
    let Workspace { mailbox, database, stack, argv, envp, overlays } = workspace;
    let overlays = *overlays;
    let prepared =
        begin().map_err(Failure::at(Stage::Launch)).and_then(|()| parked::prepare(ids, network, stack));
    // Without an order there is nobody to tell anything.
    let Ok(Some((bytes, fds))) = mailbox.receive(socket) else { exit_now(1) };
    let Ok(RootOrder { steps }) = RootOrder::parse(bytes) else { exit_now(1) };
    let built = prepared.and_then(|userns| {
        steps::walk(steps, &Site { socket, overlays, fds, ids })?;
        Ok(userns)
    });
    close_all(fds);
    let Ok(Some((bytes, fds))) = mailbox.receive(socket) else { exit_now(1) };
    let Ok(order) = Order::parse(bytes) else { exit_now(1) };
    let Ok(report) = fd_of(fds, order.report) else { exit_now(1) };
    let started = built.and_then(|userns| {
        let userns = lasting(userns);
        let mut sandbox = Sandbox { order, socket, fds, report, userns, filters, database, argv, envp };
        start(&mut sandbox, stack, ids)
    });
    let code = match started {
        Ok(program) => wait_for(report, program),
        Err(failure) => {
            tell(report, failure.into());
            1
        }
    };
    exit_now(code)
}

/// Closes what came with an order that has been carried out.
fn close_all(fds: &[RawFd]) {
    for fd in fds {
        // SAFETY: it came with the order, and nobody uses it any more.
        drop(unsafe { OwnedFd::from_raw_fd(*fd) });
    }
}

/// A descriptor that stays open until exec or exit.
fn lasting(fd: OwnedFd) -> BorrowedFd<'static> {
    let raw = fd.as_raw_fd();
    core::mem::forget(fd);
    // SAFETY: its owner was just forgotten, so nobody closes it.
    unsafe { BorrowedFd::borrow_raw(raw) }
}

fn begin() -> Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    prctl(libc::PR_SET_DUMPABLE, 0, 0)?;
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.add(Signal::SIGTERM);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None)?;
    nix::sys::stat::umask(Mode::empty());
    Ok(())
}

/// Starts the program in the sandbox that was built.
fn start(sandbox: &mut Sandbox<'_>, stack: &mut Stack, ids: IdRange) -> core::result::Result<Pid, Failure> {
    let launch = Failure::at(Stage::Launch);
    // The prepared namespace maps these and no others.
    if sandbox.order.ids != ids {
        return Err(launch(Errno::EBADMSG));
    }
    nix::unistd::sethostname(sandbox.order.hostname).map_err(&launch)?;
    if let Some(network) = sandbox.order.network {
        let entered = sandbox.fd(network).and_then(|network| setns(network, CloneFlags::CLONE_NEWNET));
        entered.map_err(Failure::at(Stage::Network))?;
    }
    let program = start_program(sandbox, stack)?;
    retire(sandbox).map_err(Failure::at(Stage::Confine))?;
    Ok(program)
}

/// Starts the program's process; it has become the program, or failed, when this returns.
fn start_program(sandbox: &mut Sandbox<'_>, stack: &mut Stack) -> core::result::Result<Pid, Failure> {
    let cloning = Failure::at(Stage::Clone);
    let fds = sandbox.fds;
    let cgroup = match sandbox.order.program.cgroup {
        CgroupRef::Tasks(_) => None,
        CgroupRef::Unified(dir, _) => Some(fd_of(fds, dir).map_err(&cloning)?),
    };
    let namespaces = if without(Defence::NeverPidOne) { crate::process::flags::NEWPID } else { 0 };
    let argument = core::ptr::from_mut(sandbox).cast();
    // SAFETY: init has one thread; `run_program` does not return, and writes only to the sandbox that it is given.
    let pid = unsafe { start_sharing(namespaces, Beside::Waits, cgroup, stack, run_program, argument) };
    pid.map(Pid::from_raw).map_err(&cloning)
}

extern "C" fn run_program(sandbox: *mut libc::c_void) -> ! {
    // SAFETY: `start_program` passes a sandbox, and waits while this process uses it.
    let sandbox = unsafe { &mut *sandbox.cast::<Sandbox<'_>>() };
    program::run(sandbox)
}

/// init's own end of privileges: it keeps the report, the right to signal within its namespace, and at 0 the program's user
/// namespace, for whoever is to enter it later.
fn retire(sandbox: &Sandbox<'_>) -> Result<()> {
    let report = libc::c_uint::try_from(sandbox.report.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    if report == 0 {
        return Err(Errno::EBADF);
    }
    nix::unistd::dup2_stdin(sandbox.userns)?;
    close_range(1, report - 1)?;
    close_range(report + 1, libc::c_uint::MAX)?;
    crate::process::set_groups(&[])?;
    let own = sandbox.order.ids.init_id();
    prctl(libc::PR_SET_KEEPCAPS, 1, 0)?;
    crate::process::set_ids(own, own)?;
    keep_capabilities(CAP_KILL)?;
    // A change of ids takes it away: PR_SET_PDEATHSIG(2const).
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    nix::sys::prctl::set_no_new_privs()
}

/// Reaps until the program has ended, passing SIGTERM on, and says how it ended.
fn wait_for(report: BorrowedFd<'_>, program: Pid) -> libc::c_int {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.add(Signal::SIGTERM);
    loop {
        let mut wait_status: libc::c_int = 0;
        // SAFETY: `wait_status` is an int that the call fills.
        let pid = unsafe { libc::waitpid(-1, &raw mut wait_status, libc::WNOHANG) };
        if pid == program.as_raw() {
            tell(report, Record::Ended { wait_status, at_ns: monotonic_ns() });
            return 0;
        }
        if pid > 0 {
            continue;
        }
        // Without a namespace of its own, -1 would be everybody.
        if mask.wait() == Ok(Signal::SIGTERM) && !without(Defence::PidNamespace) {
            let _ = nix::sys::signal::kill(Pid::from_raw(-1), Signal::SIGTERM);
        }
    }
}

/// A line of text in a fixed space.
pub(crate) struct Line<const SPACE: usize = 128> {
    bytes: [u8; SPACE],
    length: usize,
}

impl Line {
    pub(crate) fn new() -> Self {
        Self::empty()
    }
}

impl<const SPACE: usize> Line<SPACE> {
    pub(crate) fn empty() -> Self {
        Self { bytes: [0; SPACE], length: 0 }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    pub(crate) fn as_cstr(&self) -> Result<&CStr> {
        CStr::from_bytes_until_nul(&self.bytes).map_err(|_| Errno::ENAMETOOLONG)
    }

    /// Adds bytes; ENAMETOOLONG if there is no room.
    pub(crate) fn push(&mut self, text: &[u8]) -> Result<()> {
        let end = self.length + text.len();
        // One byte stays free for the NUL.
        let space = self.bytes.get_mut(self.length..end).filter(|_| end < SPACE);
        space.ok_or(Errno::ENAMETOOLONG)?.copy_from_slice(text);
        self.length = end;
        Ok(())
    }
}

impl<const SPACE: usize> core::fmt::Write for Line<SPACE> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        self.push(text.as_bytes()).map_err(|_| core::fmt::Error)
    }
}
