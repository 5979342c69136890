//! An usher: brings one more program into a sandbox that runs, as setns(2) allows, and says how it ended.
//!
//! In order: it lets go of every descriptor that is not for this; enters the namespaces of the sandbox's init, staying
//! itself outside of its PID namespace, where no process of the job sees it; takes its order; and starts the program's
//! process, which goes the way of the job's own program: cgroup, user namespace, user, resource limits, no capabilities,
//! no new privileges, filter, exec. Until exec that process is one that cannot be dumped, so the job can neither trace it nor
//! look at its descriptors (ptrace(2)). When init dies, the program dies; the usher reaps it, since nobody else does.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use super::{Failure, Sandbox, Workspace, begin, fd_of, lasting, retire, start_program, tell};
use crate::bpf::Filters;
use crate::order::Order;
use crate::process::{close_range, exit_now, monotonic_ns};
use crate::record::{Record, Stage};
use crate::{Errno, Result};

/// The life of an usher; `init` is a pidfd.
pub(crate) fn usher(
    workspace: &mut Workspace,
    socket: BorrowedFd<'_>,
    init: OwnedFd,
    userns: OwnedFd,
    filters: &Filters,
) -> ! {
    let Workspace { mailbox, database, stack, argv, envp, .. } = workspace;
    let userns = lasting(userns);
    let entered = begin()
        .and_then(|()| let_go([socket.as_raw_fd(), init.as_raw_fd(), userns.as_raw_fd()]))
        .and_then(|()| enter(init));
    let Ok(Some((bytes, fds))) = mailbox.receive(socket) else { exit_now(1) };
    let Ok(order) = Order::parse(bytes) else { exit_now(1) };
    let Ok(report) = fd_of(fds, order.report) else { exit_now(1) };
    let started = entered.map_err(Failure::at(Stage::Launch)).and_then(|()| {
        let mut sandbox = Sandbox { order, socket, fds, report, userns, filters, database, argv, envp };
        let program = start_program(&mut sandbox, stack)?;
        // Not a reason to leave the program without somebody who reaps it.
        let _ = retire(&sandbox);
        Ok(program)
    });
    match started {
        Ok(program) => attend(report, program),
        Err(failure) => tell(report, failure.into()),
    }
    exit_now(0)
}

/// Closes all but these, and has the null device in the place of the worker's streams.
fn let_go(mut kept: [RawFd; 3]) -> Result<()> {
    let null = openat(AT_FDCWD, c"/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    drop(null);
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept {
        let fd = libc::c_uint::try_from(fd).map_err(|_| Errno::EBADF)?;
        if fd < first {
            return Err(Errno::EBADF);
        }
        close_range(first, fd - 1)?;
        first = fd + 1;
    }
    close_range(first, libc::c_uint::MAX)
}

/// Enters the namespaces that init is in. That of PIDs is for children only; that of users is entered by the program, as
/// in the beginning of the job, and a cgroup namespace of the same root is made by it.
fn enter(init: OwnedFd) -> Result<()> {
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    setns(init.as_fd(), namespaces)
}

/// Waits until the program has ended and says how; SIGTERM asks to kill it.
fn attend(report: BorrowedFd<'_>, program: Pid) {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.add(Signal::SIGTERM);
    loop {
        let mut wait_status: libc::c_int = 0;
        // SAFETY: `wait_status` is an int that the call fills.
        let pid = unsafe { libc::waitpid(program.as_raw(), &raw mut wait_status, libc::WNOHANG) };
        if pid == program.as_raw() {
            return tell(report, Record::Ended { wait_status, at_ns: monotonic_ns() });
        }
        if pid < 0 {
            return;
        }
        if mask.wait() == Ok(Signal::SIGTERM) {
            let _ = nix::sys::signal::kill(program, Signal::SIGKILL);
        }
    }
}
