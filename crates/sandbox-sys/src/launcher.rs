//! The launcher: a small process with one thread from which sandboxes are cloned.
//!
//! `fork` splits it off before any thread starts; it enters its own small root, then serves requests
//! one after another: clone an init that waits for its order, make a user namespace to show layers
//! through, remember where the cgroups are. When the other end of its socket closes, its worker is gone: it kills
//! every sandbox, waits until the last process is dead, removes the cgroups, and ends.

use std::collections::BTreeSet;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};
use nix::sys::stat::Mode;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setsid};
use serde::{Deserialize, Serialize};

use crate::bpf::Filters;
use crate::channel::{Channel, Handed};
use crate::child::Workspace;
use crate::child::parked::{open_namespace, user_namespace};
use crate::defence::{self, Defence, without};
use crate::network::{NetworkNamespace, SlotNetworks};
use crate::plan::{IdRange, Plan, RootIs, RootPlan};
use crate::process::{
    Cloned, clone_process, close_all_but, exit_now, flags, forget_arguments, reset_signals,
};
use crate::tinyroot::{self, OldRoot};
use crate::{Errno, Result, child};

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// Clone an init that prepares itself and waits for its order; the answer's descriptors are a pidfd of it, its
    /// mount namespace, and the socket for the order.
    Park(IdRange, NetworkNamespace),
    /// Clone an usher into the sandbox whose init is the descriptor, a pidfd; the answer's descriptors are a pidfd of the
    /// usher and the socket for its order.
    Enter,
    /// Make a user namespace that maps these ids so; the answer's descriptor is the namespace.
    Userns(IdRange, RootIs),
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

/// An init that waits for its order: all of a sandbox that is the same for every job. It is used once; dropping it
/// ends it.
#[derive(Debug)]
pub struct Parked {
    init: OwnedFd,
    mounts: OwnedFd,
    socket: Channel,
}

impl Parked {
    /// Gives the order to build the sandbox's file system. `fds` are those that the plan names; whatever goes wrong is
    /// told on the report pipe of the program that it gets.
    ///
    /// # Errors
    /// EPIPE or ECONNRESET if init has ended meanwhile; E2BIG if there are too many descriptors.
    pub fn build(self, plan: &RootPlan, fds: &[BorrowedFd<'_>]) -> Result<Built> {
        let body = postcard::to_stdvec(plan).map_err(|_| Errno::EINVAL)?;
        self.socket.send(&body, fds)?;
        Ok(Built(self))
    }
}

/// An init that builds its sandbox's file system, or has built it, and waits for a program. Dropping it ends it.
#[derive(Debug)]
pub struct Built(Parked);

impl Built {
    /// Whether it waits still; one that could not build its file system says so when it gets a program.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        // Signal 0 is only tried: kill(2).
        crate::process::signal(self.0.init.as_fd(), 0).is_ok()
    }

    /// Gives the order to run a program.
    ///
    /// # Errors
    /// As for [`Parked::build`].
    pub fn start(self, plan: &Plan, fds: &[BorrowedFd<'_>]) -> Result<Started> {
        let Parked { init, mounts, socket } = self.0;
        let body = postcard::to_stdvec(plan).map_err(|_| Errno::EINVAL)?;
        socket.send(&body, fds)?;
        let handed_back = HandedBack { socket, scratch: None, terminal: None };
        Ok(Started { init, mounts, handed_back })
    }
}

/// An usher that waits for its order: it brings one more program into a sandbox that runs. Dropping it ends it.
#[derive(Debug)]
pub struct Usher {
    process: OwnedFd,
    socket: Channel,
}

impl Usher {
    /// Gives the order to run a program in the sandbox; of the plan only the report and the program count.
    ///
    /// # Errors
    /// As for [`Parked::build`].
    pub fn start(self, plan: &Plan, fds: &[BorrowedFd<'_>]) -> Result<Ushered> {
        let body = postcard::to_stdvec(plan).map_err(|_| Errno::EINVAL)?;
        self.socket.send(&body, fds)?;
        let handed_back = HandedBack { socket: self.socket, scratch: None, terminal: None };
        Ok(Ushered { process: self.process, handed_back })
    }
}

/// An usher at work.
#[derive(Debug)]
pub struct Ushered {
    /// A pidfd of the usher: SIGTERM has it kill the program; readable when it has said how the program ended.
    pub process: OwnedFd,
    /// Where the other side of the program's terminal comes.
    pub handed_back: HandedBack,
}

/// A sandbox that was started.
#[derive(Debug)]
pub struct Started {
    /// A pidfd of its init: readable when the last process of the sandbox is dead.
    pub init: OwnedFd,
    /// Its mount namespace: while this is held, its mounts need not be taken down.
    pub mounts: OwnedFd,
    /// Where it sends what it hands back.
    pub handed_back: HandedBack,
}

/// Where a sandbox sends what it hands back.
#[derive(Debug)]
pub struct HandedBack {
    socket: Channel,
    scratch: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
}

impl HandedBack {
    /// The socket: readable when something came, or when nothing will any more.
    #[must_use]
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }

    /// Takes in what came next; false if nothing will come any more. Waits if nothing came yet.
    ///
    /// # Errors
    /// EBADMSG if something else came.
    pub fn receive(&mut self) -> Result<bool> {
        let Some((body, mut fds)) = self.socket.receive()? else { return Ok(false) };
        let fd = fds.pop().filter(|_| fds.is_empty()).ok_or(Errno::EBADMSG)?;
        match body.as_slice() {
            [what] if *what == Handed::Scratch as u8 => self.scratch = Some(fd),
            [what] if *what == Handed::Terminal as u8 => self.terminal = Some(fd),
            _ => return Err(Errno::EBADMSG),
        }
        Ok(true)
    }

    /// The other side of the program's terminal, if it came.
    pub fn take_terminal(&mut self) -> Option<OwnedFd> {
        self.terminal.take()
    }

    /// What a [`Step::HandBack`](crate::Step) sent; none if init ended before it came to that. Call it when init is
    /// dead: it waits for messages or for the end.
    ///
    /// # Errors
    /// EBADMSG if something else came.
    pub fn take_scratch(&mut self) -> Result<Option<OwnedFd>> {
        while self.scratch.is_none() && self.receive()? {}
        Ok(self.scratch.take())
    }
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
    pub fn fork(filters: Filters) -> Result<Self> {
        defence::arm();
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
                let served = close_all_but(there.as_fd()).and_then(|()| serve(&Channel::new(there), filters));
                exit_now(i32::from(served.is_err()))
            }
        }
    }

    /// Has an init cloned that prepares itself for a sandbox with these ids.
    ///
    /// # Errors
    /// What clone3(2) answers; EPIPE if the launcher is gone.
    pub fn park(&self, ids: IdRange, network: NetworkNamespace) -> Result<Parked> {
        let answer: [OwnedFd; 3] =
            self.request(Some(&Request::Park(ids, network)), &[])?.try_into().map_err(|_| Errno::EBADMSG)?;
        let [init, mounts, socket] = answer;
        Ok(Parked { init, mounts, socket: Channel::new(socket) })
    }

    /// Has an usher cloned for a sandbox, given a pidfd of its init.
    ///
    /// # Errors
    /// EAGAIN if its program does not run yet; ESRCH or ENOENT if the sandbox has ended; what clone3(2) answers.
    pub fn enter(&self, init: BorrowedFd<'_>) -> Result<Usher> {
        let answer: [OwnedFd; 2] =
            self.request(Some(&Request::Enter), &[init])?.try_into().map_err(|_| Errno::EBADMSG)?;
        let [process, socket] = answer;
        Ok(Usher { process, socket: Channel::new(socket) })
    }

    /// A user namespace that maps these ids, for showing the owners of layers and volumes.
    ///
    /// # Errors
    /// EPERM or ENOSPC if the host forbids user namespaces; EPIPE if the launcher is gone.
    pub fn userns(&self, ids: IdRange, root: RootIs) -> Result<OwnedFd> {
        let answer = self.request(Some(&Request::Userns(ids, root)), &[])?;
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

    /// Whether the launcher lives.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        // It is this process's child: if it ended, it is a zombie, or gone.
        let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT | WaitPidFlag::WEXITED;
        matches!(waitid(Id::Pid(self.pid), flags), Ok(WaitStatus::StillAlive))
    }

    /// Ends the launcher, and every sandbox with it; returns when they are gone. What is asked of it afterwards fails.
    pub fn end(&self) {
        if let Some(channel) = &self.channel {
            let channel = channel.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = shutdown(channel.fd().as_raw_fd(), Shutdown::Both);
        }
        let _ = waitpid(self.pid, None);
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
    filters: Filters,
    children: BTreeSet<libc::pid_t>,
    cgroups: Vec<(OwnedFd, String)>,
    networks: SlotNetworks,
    workspace: Workspace,
}

/// The launcher's life, in the forked process.
fn serve(channel: &Channel, filters: Filters) -> Result<()> {
    let begun = begin(filters);
    answer(channel, &begun.as_ref().map(|_| Vec::new()).map_err(|e| *e))?;
    let (mut service, signals) = begun?;
    loop {
        let mut ready =
            [PollFd::new(channel.fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let [asked, child_ended] = ready.map(|fd| fd.any().unwrap_or(true));
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
                }
                Err(Errno::EINTR) => {}
                Err(e) => answer(channel, &Err(e))?,
            }
        }
    }
    service.end();
    Ok(())
}

fn begin(filters: Filters) -> Result<(Service, SignalFd)> {
    setsid()?;
    nix::sys::prctl::set_dumpable(false)?;
    // SAFETY: the launcher has one thread, and uses neither arguments nor environment.
    unsafe { forget_arguments(b"hutch-init") };
    nix::sys::prctl::set_name(c"hutch-init")?;
    // What was ignored when this process began would be ignored in every sandbox.
    reset_signals()?;
    lift_limits()?;
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
        filters,
        children: BTreeSet::new(),
        cgroups: Vec::new(),
        networks: SlotNetworks::default(),
        workspace: Workspace::new(),
    };
    Ok((service, signals))
}

/// Lifts the soft resource limits of which a program is given none of its own: one that a shell set for the worker
/// would end programs, by SIGXCPU for one, as if it were their own doing.
fn lift_limits() -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    for resource in [
        Resource::RLIMIT_AS,
        Resource::RLIMIT_CPU,
        Resource::RLIMIT_DATA,
        Resource::RLIMIT_LOCKS,
        Resource::RLIMIT_NPROC,
        Resource::RLIMIT_RSS,
        Resource::RLIMIT_RTTIME,
    ] {
        let (_, hard) = getrlimit(resource)?;
        setrlimit(resource, hard, hard)?;
    }
    Ok(())
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
    fn perform(&mut self, body: &[u8], fds: Vec<OwnedFd>) -> Result<Vec<OwnedFd>> {
        match postcard::from_bytes(body).map_err(|_| Errno::EBADMSG)? {
            Request::Park(ids, network) => self.park(ids, network),
            Request::Enter => self.enter(fds),
            Request::Userns(ids, root) => {
                let proc_dir = self.old_root.proc_dir.as_fd();
                user_namespace(proc_dir, ids, root, self.workspace.stack()).map(|userns| vec![userns])
            }
            Request::Cgroups(names) if names.len() == fds.len() => {
                self.cgroups = fds.into_iter().zip(names).collect();
                Ok(Vec::new())
            }
            Request::Cgroups(_) => Err(Errno::EBADMSG),
        }
    }

    fn park(&mut self, ids: IdRange, network: NetworkNamespace) -> Result<Vec<OwnedFd>> {
        if network == NetworkNamespace::PerSlot && !without(Defence::NetworkNamespace) {
            self.networks.enter(ids.base, self.old_root.proc_dir.as_fd())?;
        }
        let (here, there) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let mut namespaces = flags::NEWPID | flags::NEWNS | flags::NEWIPC | flags::NEWUTS;
        for (defence, flag) in
            [(Defence::PidNamespace, flags::NEWPID), (Defence::IpcNamespace, flags::NEWIPC)]
        {
            if without(defence) {
                namespaces &= !flag;
            }
        }
        // SAFETY: the launcher has one thread, and `init` never returns.
        match unsafe { clone_process(namespaces, None) }? {
            Cloned::Child => {
                drop(here);
                child::init(&mut self.workspace, there.as_fd(), ids, network, &self.filters)
            }
            Cloned::Parent { pid, pidfd } => {
                self.children.insert(pid);
                let mounts = open_namespace(self.old_root.proc_dir.as_fd(), pid, "mnt")?;
                Ok(vec![pidfd, mounts, here])
            }
        }
    }

    /// An usher is not among the children that are killed at the end: it reaps its program, for which a dying init waits,
    /// and ends after it.
    fn enter(&mut self, fds: Vec<OwnedFd>) -> Result<Vec<OwnedFd>> {
        let [init]: [OwnedFd; 1] = fds.try_into().map_err(|_| Errno::EBADMSG)?;
        let proc_dir = self.old_root.proc_dir.as_fd();
        let pid = pid_behind(proc_dir, init.as_fd())?;
        if !self.children.contains(&pid) {
            return Err(Errno::ESRCH);
        }
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let path = format!("{pid}/fd/0");
        let userns = nix::fcntl::openat(proc_dir, path.as_str(), flags, Mode::empty());
        // Until init has retired it is what the worker has there, which may be closed or not to be opened.
        let userns = userns.map_err(|e| if e == Errno::ESRCH { e } else { Errno::EAGAIN })?;
        if nix::sys::statfs::fstatfs(&userns)?.filesystem_type() != nix::sys::statfs::NSFS_MAGIC {
            return Err(Errno::EAGAIN);
        }
        let (here, there) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: the launcher has one thread, and `usher` never returns.
        match unsafe { clone_process(0, None) }? {
            Cloned::Child => {
                drop(here);
                child::usher::usher(&mut self.workspace, there.as_fd(), init, userns, &self.filters)
            }
            Cloned::Parent { pidfd, .. } => Ok(vec![pidfd, here]),
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

/// The pid of a pidfd's process, in the launcher's PID namespace; ESRCH if it was reaped.
fn pid_behind(proc_dir: BorrowedFd<'_>, pidfd: BorrowedFd<'_>) -> Result<libc::pid_t> {
    use std::io::Read as _;
    use std::os::fd::AsRawFd as _;
    let path = format!("self/fdinfo/{}", pidfd.as_raw_fd());
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let file = nix::fcntl::openat(proc_dir, path.as_str(), flags, Mode::empty())?;
    let mut text = String::new();
    std::fs::File::from(file).take(4096).read_to_string(&mut text).map_err(|_| Errno::EBADF)?;
    let pid = text.lines().find_map(|line| line.strip_prefix("Pid:")).ok_or(Errno::EBADF)?;
    pid.trim().parse().ok().filter(|pid| *pid > 0).ok_or(Errno::ESRCH)
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
