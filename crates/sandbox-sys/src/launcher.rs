//! The launcher: a small process with one thread from which sandboxes are cloned.
//!
//! `fork` splits it off before any thread starts; it enters its own small root, then serves requests
//! one after another: start a sandbox, make a user namespace to show layers through, remember
//! where the cgroups are. When the other end of its socket closes, its worker is gone: it kills
//! every sandbox, waits until the last process is dead, removes the cgroups, and ends.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setsid};
use serde::{Deserialize, Serialize};

use crate::bpf::Instruction;
use crate::channel::Channel;
use crate::child::{Given, Sandbox, Workspace};
use crate::plan::{IdRange, Plan};
use crate::process::{Cloned, clone_process, exit_now, flags, forget_arguments, reset_signal};
use crate::spare::{Nascent, Spare, open_namespace, user_namespace};
use crate::tinyroot::{self, OldRoot};
use crate::{Errno, Result, child};

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// Start a sandbox; the answer's descriptors are a pidfd of its init and its mount namespace.
    Start(Box<Plan>),
    /// Make a user namespace with this map; the answer's descriptor is the namespace.
    Userns(IdRange),
    /// Remove these cgroups at the end; one descriptor each, of the directory they lie in.
    Cgroups(Vec<String>),
}

/// A directory of cgroups that the launcher removes when its worker is gone.
#[derive(Debug, Clone, Copy)]
pub struct CgroupHome<'a> {
    /// The directory that it lies in.
    pub parent: BorrowedFd<'a>,
    /// Its name there.
    pub name: &'a str,
}

/// A sandbox that was started.
#[derive(Debug)]
pub struct Started {
    /// A pidfd of its init: readable when the last process of the sandbox is dead.
    pub init: OwnedFd,
    /// Its mount namespace: while this is held, its mounts need not be taken down. None if it has ended already.
    pub mounts: Option<OwnedFd>,
}

/// The worker's handle on its launcher. When it is dropped, the launcher ends and every sandbox with it.
#[derive(Debug)]
pub struct Launcher {
    channel: Option<Mutex<Channel>>,
    pid: Pid,
}

impl Launcher {
    /// Forks the launcher. Call it first in `main`: the process must have one thread.
    ///
    /// # Errors
    /// EBUSY if there are other threads already; EPERM if this process may not make mount namespaces.
    pub fn fork(filter: Vec<Instruction>) -> Result<Self> {
        if std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() > 1) {
            return Err(Errno::EBUSY);
        }
        let (here, there) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: there is one thread, so the child may go on as if nothing had happened.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                drop(there);
                let channel = Channel::new(here);
                let launcher = Self { channel: Some(Mutex::new(channel)), pid: child };
                launcher.request(None, &[]).map(|_| launcher)
            }
            ForkResult::Child => {
                drop(here);
                let code = i32::from(serve(&Channel::new(there), filter).is_err());
                exit_now(code)
            }
        }
    }

    /// Starts a sandbox. `fds` are those that the plan names.
    ///
    /// # Errors
    /// What clone3(2) answers; EPIPE if the launcher is gone.
    pub fn start(&self, plan: Plan, fds: &[BorrowedFd<'_>]) -> Result<Started> {
        let mut answer = self.request(Some(&Request::Start(Box::new(plan))), fds)?.into_iter();
        match (answer.next(), answer.next()) {
            (Some(init), mounts) => Ok(Started { init, mounts }),
            (None, _) => Err(Errno::EBADMSG),
        }
    }

    /// A user namespace with this id map, for showing the owners of layers.
    ///
    /// # Errors
    /// EPERM or ENOSPC if the host forbids user namespaces; EPIPE if the launcher is gone.
    pub fn userns(&self, ids: IdRange) -> Result<OwnedFd> {
        let answer = self.request(Some(&Request::Userns(ids)), &[])?;
        answer.into_iter().next().ok_or(Errno::EBADMSG)
    }

    /// Tells which cgroups to remove when this process is gone.
    ///
    /// # Errors
    /// EPIPE if the launcher is gone.
    pub fn remember_cgroups(&self, homes: &[CgroupHome<'_>]) -> Result<()> {
        let names = homes.iter().map(|home| home.name.to_owned()).collect();
        let fds: Vec<_> = homes.iter().map(|home| home.parent).collect();
        self.request(Some(&Request::Cgroups(names)), &fds).map(drop)
    }

    fn request(&self, request: Option<&Request>, fds: &[BorrowedFd<'_>]) -> Result<Vec<OwnedFd>> {
        let channel = self.channel.as_ref().ok_or(Errno::EPIPE)?;
        let channel = channel.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(request) = request {
            let body = postcard::to_stdvec(request).map_err(|_| Errno::EINVAL)?;
            channel.send(&body, fds)?;
        }
        let (body, fds) = channel.receive()?.ok_or(Errno::EPIPE)?;
        match postcard::from_bytes::<i32>(&body) {
            Ok(0) => Ok(fds),
            Ok(errno) => Err(Errno::from_raw(errno)),
            Err(_) => Err(Errno::EBADMSG),
        }
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        // Closing the socket is the word to end.
        self.channel = None;
        let _ = waitpid(self.pid, None);
    }
}

/// What the launcher keeps between requests.
struct Service {
    old_root: OldRoot,
    filter: Vec<Instruction>,
    children: BTreeSet<libc::pid_t>,
    cgroups: Vec<(OwnedFd, String)>,
    /// Namespaces made ahead, by the base of their ids.
    spares: BTreeMap<u32, Spare>,
    /// Those that are being made.
    nascent: Vec<Nascent>,
    /// The ids whose spare was just used.
    used: Option<IdRange>,
    workspace: Workspace,
}

/// The launcher's life, in the forked process.
fn serve(channel: &Channel, filter: Vec<Instruction>) -> Result<()> {
    let begun = begin(filter);
    answer(channel, &begun.as_ref().map(|_| Vec::new()).map_err(|e| *e))?;
    let (mut service, signals) = begun?;
    loop {
        let [asked, child_ended, nascent @ ..] = &service.wait(channel, &signals)?[..] else { continue };
        let (asked, child_ended) = (*asked, *child_ended);
        service.take_spares(nascent);
        if child_ended {
            while matches!(signals.read_signal(), Ok(Some(_))) {}
            service.reap();
        }
        if asked {
            match channel.receive() {
                Ok(None) => break,
                Ok(Some((body, fds))) => {
                    let done = service.perform(&body, fds);
                    if answer(channel, &done).is_err() {
                        break;
                    }
                    service.begin_spare();
                }
                Err(Errno::EINTR) => {}
                Err(e) => answer(channel, &Err(e))?,
            }
        }
    }
    service.end();
    Ok(())
}

fn begin(filter: Vec<Instruction>) -> Result<(Service, SignalFd)> {
    setsid()?;
    nix::sys::prctl::set_dumpable(false)?;
    // SAFETY: the launcher has one thread, and uses neither arguments nor environment.
    unsafe { forget_arguments(b"hutch-init") };
    nix::sys::prctl::set_name(c"hutch-init")?;
    // A process that was started with SIGCHLD ignored could not wait for its children: wait(2).
    reset_signal(libc::SIGCHLD)?;
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        mask.add(signal);
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None)?;
    let mut watched = SigSet::empty();
    watched.add(Signal::SIGCHLD);
    let signals = SignalFd::with_flags(&watched, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let old_root = tinyroot::enter()?;
    let service = Service {
        old_root,
        filter,
        children: BTreeSet::new(),
        cgroups: Vec::new(),
        spares: BTreeMap::new(),
        nascent: Vec::new(),
        used: None,
        workspace: Workspace::new(),
    };
    Ok((service, signals))
}

fn answer(channel: &Channel, done: &Result<Vec<OwnedFd>>) -> Result<()> {
    let (errno, fds) = match done {
        Ok(fds) => (0, fds.iter().map(OwnedFd::as_fd).collect()),
        Err(e) => (*e as i32, Vec::new()),
    };
    let body = postcard::to_stdvec(&errno).map_err(|_| Errno::EINVAL)?;
    channel.send(&body, &fds)
}

impl Service {
    /// Waits for the socket, the signals and the nascent spares, and says which of them are ready; nothing if interrupted.
    fn wait(&self, channel: &Channel, signals: &SignalFd) -> Result<Vec<bool>> {
        let fds = [channel.fd(), signals.as_fd()].into_iter().chain(self.nascent.iter().map(Nascent::ready));
        let mut ready: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut ready, PollTimeout::NONE) {
            Err(Errno::EINTR) => Ok(Vec::new()),
            other => other.map(|_| ready.iter().map(|fd| fd.any().unwrap_or(true)).collect()),
        }
    }

    fn perform(&mut self, body: &[u8], fds: Vec<OwnedFd>) -> Result<Vec<OwnedFd>> {
        match postcard::from_bytes(body).map_err(|_| Errno::EBADMSG)? {
            Request::Start(plan) => self.start(&plan, &fds),
            Request::Userns(ids) => {
                user_namespace(self.old_root.proc_dir.as_fd(), ids).map(|userns| vec![userns])
            }
            Request::Cgroups(names) if names.len() == fds.len() => {
                self.cgroups = fds.into_iter().zip(names).collect();
                Ok(Vec::new())
            }
            Request::Cgroups(_) => Err(Errno::EBADMSG),
        }
    }

    fn start(&mut self, plan: &Plan, fds: &[OwnedFd]) -> Result<Vec<OwnedFd>> {
        let (userns, network) = match self.spares.remove(&plan.ids.base) {
            Some(Spare { userns, network }) => (userns, Some(network)),
            None => (user_namespace(self.old_root.proc_dir.as_fd(), plan.ids)?, None),
        };
        self.used = Some(plan.ids);
        let given = Given { fds, userns: userns.as_fd(), network: network.as_ref().map(OwnedFd::as_fd) };
        let mut sandbox = Sandbox::new(plan, given, &self.filter, &mut self.workspace)?;
        let namespaces = flags::NEWPID | flags::NEWNS | flags::NEWIPC | flags::NEWUTS;
        // SAFETY: the launcher has one thread, and `init` never returns.
        match unsafe { clone_process(namespaces, None) }? {
            Cloned::Child => child::init(&mut sandbox),
            Cloned::Parent { pid, pidfd } => {
                self.children.insert(pid);
                // It may have come to its end by now.
                let mounts = open_namespace(self.old_root.proc_dir.as_fd(), pid, "mnt").ok();
                Ok([pidfd].into_iter().chain(mounts).collect())
            }
        }
    }

    /// Begins with the next sandbox's namespaces while nobody waits.
    fn begin_spare(&mut self) {
        if let Some(ids) = self.used.take()
            && let Ok(nascent) = Nascent::begin(ids)
        {
            self.nascent.push(nascent);
        }
    }

    /// Takes the spares that are made. One that failed is made again when it is needed, and the failure is seen then.
    fn take_spares(&mut self, ready: &[bool]) {
        let mut ready = ready.iter();
        let made: Vec<_> = self.nascent.extract_if(.., |_| ready.next() == Some(&true)).collect();
        for nascent in made {
            let base = nascent.ids.base;
            if let Ok(spare) = nascent.finish(self.old_root.proc_dir.as_fd()) {
                self.spares.insert(base, spare);
            }
        }
    }

    fn reap(&mut self) {
        while let Ok(status) = waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            match status {
                WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _) => {
                    self.children.remove(&pid.as_raw());
                }
                _ => break,
            }
        }
    }

    /// The last act: every sandbox dies, and its cgroups go.
    fn end(&mut self) {
        for pid in &self.children {
            let _ = nix::sys::signal::kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        for pid in std::mem::take(&mut self.children) {
            let _ = waitpid(Pid::from_raw(pid), None);
        }
        for (parent, name) in &self.cgroups {
            remove_cgroups(parent, name);
        }
    }
}

/// Removes a directory of cgroups whose processes are dead, deepest first.
fn remove_cgroups(parent: &OwnedFd, name: &str) {
    use nix::dir::{Dir, Type};
    use nix::unistd::{UnlinkatFlags, unlinkat};
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    if let Ok(mut dir) = Dir::openat(parent, name, flags, Mode::empty()) {
        let inner: Vec<_> = dir
            .iter()
            .filter_map(core::result::Result::ok)
            .filter(|entry| entry.file_type() == Some(Type::Directory))
            .map(|entry| entry.file_name().to_owned())
            .filter(|name| !name.as_bytes().starts_with(b"."))
            .collect();
        for child in inner {
            let _ = unlinkat(&dir, child.as_c_str(), UnlinkatFlags::RemoveDir);
        }
    }
    let _ = unlinkat(parent.as_fd(), name, UnlinkatFlags::RemoveDir);
}
