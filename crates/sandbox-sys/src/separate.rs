//! Privilege separation: one process keeps the privileges, the other goes on without any.
//!
//! [`fork_privileged`] splits off the process that keeps them, while there is one thread; it has no network. Then
//! [`become_user`] has the calling process give up all of its own for good.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::stat::Mode;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setsid};

use crate::defence::{self, Defence, without};
use crate::packet::PacketSocket;
use crate::process::{
    close_all_but, exit_now, forbid_capabilities, keep_capabilities, prctl, set_groups, set_ids,
};
use crate::{Errno, Result};

/// The process that keeps the privileges, a child of this one.
#[derive(Debug)]
pub struct Privileged(Pid);

impl Privileged {
    /// Whether it lives.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT | WaitPidFlag::WEXITED;
        matches!(waitid(Id::Pid(self.0), flags), Ok(WaitStatus::StillAlive))
    }

    /// Waits until it has ended; it does when its socket is closed.
    pub fn wait(&self) {
        while waitpid(self.0, None) == Err(Errno::EINTR) {}
    }
}

/// Forks a process that keeps this one's privileges and does `run` with its end of a socket and the network namespace that
/// this process is in; what that returns is its exit code. It is in a network namespace of its own, with nothing in it; no other process can look into it; and of signals
/// only SIGKILL ends it: it goes when its socket is closed. Call it while this process has one thread.
///
/// # Errors
/// EBUSY if there are other threads already; EPERM if this process may not make network namespaces.
pub fn fork_privileged(run: impl FnOnce(PacketSocket, OwnedFd) -> i32) -> Result<(PacketSocket, Privileged)> {
    if std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() > 1) {
        return Err(Errno::EBUSY);
    }
    defence::arm();
    let (here, there) = PacketSocket::pair()?;
    // SAFETY: there is one thread, so the child may go on as if nothing had happened.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            drop(there);
            // The child's first word is that it is set up, or why not.
            let mut word = [0; 4];
            let errno = here.receive::<0>(&mut word)?.map_or(libc::EPIPE, |_| i32::from_le_bytes(word));
            let privileged = Privileged(child);
            if errno == 0 {
                return Ok((here, privileged));
            }
            privileged.wait();
            Err(Errno::from_raw(errno))
        }
        ForkResult::Child => {
            drop(here);
            let begun = close_all_but(there.fd()).and_then(|()| begin());
            let errno = begun.as_ref().err().map_or(0, |e| *e as i32);
            let told = there.send(&errno.to_le_bytes(), &[]);
            let (Ok(network), Ok(())) = (begun, told) else { exit_now(1) };
            exit_now(catch_unwind(AssertUnwindSafe(|| run(there, network))).unwrap_or(101))
        }
    }
}

/// Sets this process up; the network namespace that it was in.
fn begin() -> Result<OwnedFd> {
    setsid()?;
    nix::sys::prctl::set_dumpable(false)?;
    nix::sys::prctl::set_name(c"hutch-engine")?;
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        mask.add(signal);
    }
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None)?;
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let network = nix::fcntl::open(c"/proc/self/ns/net", flags, Mode::empty())?;
    if !without(Defence::NetworkNamespace) {
        unshare(CloneFlags::CLONE_NEWNET)?;
    }
    Ok(network)
}

/// Has this process be this user and nobody else from now on: no other groups, no capabilities, no way to get any, and
/// other processes of this user cannot look into it. Call it while there is one thread: others would stay as they are.
///
/// # Errors
/// EBUSY if there are other threads already; EPERM if it may not change who it is.
pub fn become_user(uid: u32, gid: u32) -> Result<()> {
    if std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() > 1) {
        return Err(Errno::EBUSY);
    }
    set_groups(&[])?;
    match forbid_capabilities() {
        // Without CAP_SETPCAP the bounding set stays: no_new_privs lets nothing come of it.
        Err(Errno::EPERM) => {}
        other => other?,
    }
    set_ids(uid, gid)?;
    keep_capabilities(0)?;
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0)?;
    nix::sys::prctl::set_dumpable(false)
}
