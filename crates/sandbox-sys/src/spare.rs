//! Namespaces made ahead, each for one sandbox.
//!
//! A network namespace is the dearest part of a sandbox, and a user namespace needs somebody outside to write
//! its id maps. Both are made by a process of their own while nobody waits: it makes the network
//! namespace, brings loopback up, makes the user namespace, says so, and is let go once the launcher holds both.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, openat};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::child::isolate_network;
use crate::plan::IdRange;
use crate::process::{Cloned, clone_process, exit_now, flags, signal};
use crate::{Errno, Result};

/// A user namespace with its maps, and a network namespace with loopback up and nothing else.
#[derive(Debug)]
pub(crate) struct Spare {
    pub(crate) userns: OwnedFd,
    pub(crate) network: OwnedFd,
}

/// A spare that is being made.
#[derive(Debug)]
pub(crate) struct Nascent {
    pub(crate) ids: IdRange,
    pid: libc::pid_t,
    pidfd: OwnedFd,
    ready: OwnedFd,
}

impl Nascent {
    /// Begins with one.
    pub(crate) fn begin(ids: IdRange) -> Result<Self> {
        let (ready, say) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        // SAFETY: the launcher has one thread, and the child never returns.
        match unsafe { clone_process(0, None) }? {
            Cloned::Child => make(&say),
            Cloned::Parent { pid, pidfd } => Ok(Self { ids, pid, pidfd, ready }),
        }
    }

    /// Readable when it is made, or has failed.
    pub(crate) fn ready(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    /// Takes what was made.
    pub(crate) fn finish(self, proc_dir: BorrowedFd<'_>) -> Result<Spare> {
        let made = matches!(nix::unistd::read(&self.ready, &mut [0]), Ok(1));
        let spare = if made { self.take(proc_dir) } else { Err(Errno::EPERM) };
        // The launcher reaps it with all others.
        signal(self.pidfd.as_fd(), libc::SIGKILL)?;
        spare
    }

    fn take(&self, proc_dir: BorrowedFd<'_>) -> Result<Spare> {
        write_id_maps(proc_dir, self.pid, self.ids)?;
        Ok(Spare {
            userns: open_namespace(proc_dir, self.pid, "user")?,
            network: open_namespace(proc_dir, self.pid, "net")?,
        })
    }
}

fn make(say: &OwnedFd) -> ! {
    let made = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
        .and_then(|()| isolate_network())
        .and_then(|()| unshare(CloneFlags::CLONE_NEWUSER))
        .and_then(|()| nix::unistd::write(say, &[1]));
    if made.is_err() {
        exit_now(1);
    }
    loop {
        nix::unistd::pause();
    }
}

/// A user namespace with these maps, at once.
pub(crate) fn user_namespace(proc_dir: BorrowedFd<'_>, ids: IdRange) -> Result<OwnedFd> {
    // SAFETY: the launcher has one thread, and the child only waits to be killed.
    match unsafe { clone_process(flags::NEWUSER, None) }? {
        Cloned::Child => {
            let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
            loop {
                nix::unistd::pause();
            }
        }
        Cloned::Parent { pid, pidfd } => {
            let namespace =
                write_id_maps(proc_dir, pid, ids).and_then(|()| open_namespace(proc_dir, pid, "user"));
            signal(pidfd.as_fd(), libc::SIGKILL)?;
            waitpid(Pid::from_raw(pid), None)?;
            namespace
        }
    }
}

fn write_map(proc_dir: BorrowedFd<'_>, pid: libc::pid_t, name: &str, ids: IdRange) -> Result<()> {
    let path = format!("{pid}/{name}");
    let file = openat(proc_dir, path.as_str(), OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let map = format!("0 {} {}\n", ids.base, ids.count);
    nix::unistd::write(&file, map.as_bytes()).map(drop)
}

/// Writes uid_map and gid_map of a process: user_namespaces(7).
fn write_id_maps(proc_dir: BorrowedFd<'_>, pid: libc::pid_t, ids: IdRange) -> Result<()> {
    write_map(proc_dir, pid, "uid_map", ids)?;
    write_map(proc_dir, pid, "gid_map", ids)
}

/// A namespace of a process.
pub(crate) fn open_namespace(proc_dir: BorrowedFd<'_>, pid: libc::pid_t, kind: &str) -> Result<OwnedFd> {
    openat(proc_dir, format!("{pid}/ns/{kind}").as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
}
