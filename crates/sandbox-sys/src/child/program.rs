//! The program's process, from its clone to exec.
//!
//! In order: cgroup and cgroup namespace; user namespace, whose ids are mapped already, and its root there; files; who the user is, with an entry and a home made where there are none; working
//! directory; descriptors; resource limits; user; capabilities; seccomp; exec. All capabilities it
//! has on the way are those of its own user namespace: a bind-mounted volume of the host is as
//! closed to it as to any stranger.

use core::fmt::Write as _;
use std::ffi::CStr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, fchmod, fstat};

use super::files::{
    self, Owner, change_owner, make_directory, make_parent, open_regular, read_into, write_all,
};
use super::receive::give;
use super::user::{Key, find_group, find_user, groups_of, made_group, made_user};
use super::{Failure, Line, Sandbox};
use crate::channel::Handed;
use crate::defence::{Defence, without};
use crate::order::{CgroupRef, FileRef, List, TextRef};
use crate::plan::WindowSize;
use crate::process::{
    close_at_exec, exec, exit_now, forbid_capabilities, install_filter, install_listened_filter,
    keep_capabilities, monotonic_ns, set_groups, set_ids, set_rlimit, unblock_signals,
};
use crate::record::{Record, Stage};
use crate::terminal;
use crate::{Errno, Result};

const MAX_GROUPS: usize = 64;
const ROOT: Owner = Owner { uid: 0, gid: 0 };

/// The user that the program will be.
struct Identity {
    uid: u32,
    gid: u32,
    groups: [u32; MAX_GROUPS],
    group_count: usize,
    /// `HOME=` and the home directory, with a NUL.
    home: [u8; 1024],
    /// `USER=` and the name, with a NUL.
    user: [u8; 80],
}

/// Becomes the program, or says why not and ends.
pub(super) fn run(sandbox: &mut Sandbox<'_>) -> ! {
    let Err(Failure { stage, errno, index }) = prepare_and_exec(sandbox);
    sandbox.report(Record::Failed { stage, errno: errno as i32, index });
    exit_now(127)
}

fn prepare_and_exec(sandbox: &mut Sandbox<'_>) -> core::result::Result<core::convert::Infallible, Failure> {
    enter_cgroup(sandbox).map_err(Failure::at(Stage::Cgroup))?;
    let mapping = Failure::at(Stage::IdMap);
    if !without(Defence::UserNamespace) {
        nix::sched::setns(sandbox.userns, CloneFlags::CLONE_NEWUSER).map_err(&mapping)?;
    }
    set_ids(0, 0).map_err(&mapping)?;
    let root = openat(AT_FDCWD, c"/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(&mapping)?;
    // Who the user is may be said by the job's own files: those come first.
    write_files(sandbox, root.as_fd(), is_database, ROOT)?;
    let identity = identify(sandbox, root.as_fd()).map_err(Failure::at(Stage::User))?;
    let owner = Owner { uid: identity.uid, gid: identity.gid };
    write_files(sandbox, root.as_fd(), |path| !is_database(path), owner)?;
    let cwd = open_cwd(sandbox, root.as_fd(), &identity).map_err(Failure::at(Stage::Cwd))?;
    take_streams(sandbox, root.as_fd(), owner).map_err(Failure::at(Stage::Stdio))?;
    for (index, limit) in sandbox.order.program.rlimits.enumerate() {
        limit
            .and_then(|limit| set_rlimit(limit.resource, limit.soft, limit.hard))
            .map_err(Failure::of(Stage::Rlimit, index))?;
    }
    confine(&identity, sandbox.order.program.terminal.is_some()).map_err(Failure::at(Stage::Confine))?;
    nix::unistd::fchdir(&cwd).map_err(Failure::at(Stage::Cwd))?;
    if !without(Defence::Seccomp) {
        filter_calls(sandbox).map_err(Failure::at(Stage::Confine))?;
    }
    Err(Failure::at(Stage::Exec)(exec_first(sandbox, &identity)))
}

fn enter_cgroup(sandbox: &Sandbox<'_>) -> Result<()> {
    let (CgroupRef::Tasks(tasks) | CgroupRef::Unified(_, tasks)) = sandbox.order.program.cgroup;
    for file in tasks {
        nix::unistd::write(sandbox.fd(file?)?, b"0")?;
    }
    if without(Defence::CgroupNamespace) {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWCGROUP)
}

fn is_database(path: &CStr) -> bool {
    path == c"/etc/passwd" || path == c"/etc/group"
}

/// Writes those of the job's files that are wanted; missing directories above them get the same owner.
fn write_files(
    sandbox: &Sandbox<'_>,
    root: BorrowedFd<'_>,
    wanted: impl Fn(&CStr) -> bool,
    owner: Owner,
) -> core::result::Result<(), Failure> {
    for (index, file) in sandbox.order.program.files.enumerate() {
        let write = |file: FileRef<'_>| -> Result<()> {
            let path = file.path.get()?;
            if !wanted(path) {
                return Ok(());
            }
            let payload = sandbox.fd(sandbox.order.program.payload.ok_or(Errno::EBADF)?)?;
            make_parent(root, path, owner)?;
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC;
            let to = open_regular(root, path, flags, 0o600)?;
            files::copy_part(payload, file.offset, file.length, &to)?;
            fchmod(&to, Mode::from_bits_truncate(file.mode))?;
            change_owner(to.as_fd(), owner)
        };
        file.and_then(write).map_err(Failure::of(Stage::File, index))?;
    }
    Ok(())
}

/// Reads a database of the sandbox; a missing one is empty.
fn read_database<'b>(root: BorrowedFd<'_>, path: &CStr, space: &'b mut [u8]) -> Result<&'b [u8]> {
    let length = match open_regular(root, path, libc::O_RDONLY, 0) {
        Ok(file) => read_into(&file, space)?,
        Err(Errno::ENOENT | Errno::ENOTDIR) => 0,
        Err(e) => return Err(e),
    };
    space.get(..length).ok_or(Errno::EIO)
}

/// Enters a line into a database of the sandbox in place of the one that hutch made before, if there is one; the file is
/// made where missing.
fn enter(
    root: BorrowedFd<'_>,
    path: &CStr,
    database: &[u8],
    made: Option<core::ops::Range<usize>>,
    line: &Line,
) -> Result<()> {
    make_parent(root, path, ROOT)?;
    let Some(made) = made else {
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND;
        let file = open_regular(root, path, flags, 0o644)?;
        if database.last().is_some_and(|byte| *byte != b'\n') {
            write_all(&file, b"\n")?;
        }
        return write_all(&file, line.as_bytes());
    };
    let file = open_regular(root, path, libc::O_WRONLY | libc::O_TRUNC, 0)?;
    write_all(&file, database.get(..made.start).unwrap_or_default())?;
    write_all(&file, line.as_bytes())?;
    write_all(&file, database.get(made.end..).unwrap_or_default())
}

fn text<const N: usize>(prefix: &[u8], value: &[u8]) -> Result<[u8; N]> {
    let mut space = [0; N];
    let end = prefix.len() + value.len();
    let to = space.get_mut(..end).filter(|_| end < N).ok_or(Errno::ENAMETOOLONG)?;
    to[..prefix.len()].copy_from_slice(prefix);
    to[prefix.len()..].copy_from_slice(value);
    Ok(space)
}

/// Finds out who the user is; one that is given by number and has no entry gets one, and a home.
fn identify(sandbox: &mut Sandbox<'_>, root: BorrowedFd<'_>) -> Result<Identity> {
    let key = Key::of(sandbox.order.program.user);
    let wanted_group = sandbox.order.program.group.map(Key::of);
    let passwd = read_database(root, c"/etc/passwd", sandbox.database)?;
    let mut identity = match (find_user(passwd, key), key) {
        (Some(user), _) => Identity {
            uid: user.uid,
            gid: user.gid,
            groups: [0; MAX_GROUPS],
            group_count: 0,
            home: text(b"HOME=", user.home)?,
            user: text(b"USER=", user.name)?,
        },
        (None, Key::Id(uid)) => {
            let gid = match wanted_group {
                Some(Key::Id(gid)) => gid,
                _ => uid,
            };
            new_user(root, passwd, uid, gid)?
        }
        (None, Key::Name(_)) => return Err(Errno::ENOENT),
    };
    let group = read_database(root, c"/etc/group", sandbox.database)?;
    match wanted_group {
        Some(Key::Id(gid)) => identity.gid = gid,
        Some(key @ Key::Name(_)) => identity.gid = find_group(group, key).ok_or(Errno::ESRCH)?,
        None => {}
    }
    // A layer's passwd may have ids that are not in the sandbox's map.
    let end = sandbox.order.ids.count;
    if identity.uid >= end || identity.gid >= end {
        return Err(Errno::ERANGE);
    }
    let name = CStr::from_bytes_until_nul(&identity.user).map_err(|_| Errno::EINVAL)?.to_bytes();
    let name = name.strip_prefix(b"USER=").unwrap_or_default();
    identity.group_count = groups_of(group, name, end, &mut identity.groups);
    if find_group(group, Key::Id(identity.gid)).is_none() {
        let mut line = Line::new();
        let gid = identity.gid;
        let made = made_group(group);
        let taken = made.is_none() && find_group(group, Key::Name(b"job")).is_some();
        let suffix = Suffix(taken.then_some(gid));
        writeln!(line, "job{suffix}:x:{gid}:").map_err(|_| Errno::ENAMETOOLONG)?;
        enter(root, c"/etc/group", group, made, &line)?;
    }
    Ok(identity)
}

/// A number that makes a name unlike one that is taken.
struct Suffix(Option<u32>);

impl core::fmt::Display for Suffix {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.map_or(Ok(()), |id| write!(f, "-{id}"))
    }
}

/// Enters a user into the sandbox's own passwd, and makes the home. The user is `job`, and takes the place of one that
/// hutch made before, such as that of the host layer; another user of that name, a layer's own, keeps it.
fn new_user(root: BorrowedFd<'_>, passwd: &[u8], uid: u32, gid: u32) -> Result<Identity> {
    let made = made_user(passwd);
    let (replaces, taken) = (made.is_some(), find_user(passwd, Key::Name(b"job")).is_some());
    let suffix = Suffix((taken && !replaces).then_some(uid));
    let mut line = Line::new();
    writeln!(line, "job{suffix}:x:{uid}:{gid}:job:/home/job{suffix}:/bin/sh")
        .map_err(|_| Errno::ENAMETOOLONG)?;
    enter(root, c"/etc/passwd", passwd, made, &line)?;
    let mut home = Line::new();
    write!(home, "/home/job{suffix}").map_err(|_| Errno::ENAMETOOLONG)?;
    make_parent(root, home.as_cstr()?, ROOT)?;
    let owner = Owner { uid, gid };
    let directory = make_directory(root, home.as_cstr()?, 0o755, owner)?;
    // A volume there keeps its owner.
    if replaces && fstat(&directory)?.st_dev == fstat(root)?.st_dev {
        change_owner(directory.as_fd(), owner)?;
    }
    let mut user = Line::new();
    write!(user, "job{suffix}").map_err(|_| Errno::ENAMETOOLONG)?;
    Ok(Identity {
        uid,
        gid,
        groups: [0; MAX_GROUPS],
        group_count: 0,
        home: text(b"HOME=", home.as_bytes())?,
        user: text(b"USER=", user.as_bytes())?,
    })
}

/// Makes the working directory where missing and opens it; it is entered as the user, later.
fn open_cwd(sandbox: &Sandbox<'_>, root: BorrowedFd<'_>, identity: &Identity) -> Result<OwnedFd> {
    let home =
        CStr::from_bytes_until_nul(identity.home.get(5..).unwrap_or_default()).map_err(|_| Errno::EINVAL)?;
    let home = if home.to_bytes().first() == Some(&b'/') { home } else { c"/" };
    let path = match sandbox.order.program.cwd {
        Some(cwd) => cwd.get()?,
        None => home,
    };
    let owner = Owner { uid: identity.uid, gid: identity.gid };
    make_directory(root, path, 0o755, owner)
}

/// Puts the program's streams at 0, 1 and 2; every other descriptor closes at exec.
fn take_streams(sandbox: &Sandbox<'_>, root: BorrowedFd<'_>, owner: Owner) -> Result<()> {
    if let Some(size) = sandbox.order.program.terminal {
        return take_terminal(sandbox, root, owner, size);
    }
    let [stdout, stderr] = sandbox.order.program.outputs;
    match sandbox.order.program.stdin {
        Some(stdin) => nix::unistd::dup2_stdin(sandbox.fd(stdin)?)?,
        // Opened here, so that no two jobs share an open file.
        None => {
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
            nix::unistd::dup2_stdin(openat(root, c"dev/null", flags, Mode::empty())?)?;
        }
    }
    nix::unistd::dup2_stdout(sandbox.fd(stdout)?)?;
    nix::unistd::dup2_stderr(sandbox.fd(stderr)?)?;
    if without(Defence::CloseDescriptors) {
        return keep_at_exec();
    }
    close_at_exec(3)
}

/// Makes a terminal of the sandbox's own the program's streams, and hands its other side back. No path that a layer or
/// the program could have set is used: `/dev` is ours, and the program's side is asked of ours (TIOCGPTPEER(2const)).
fn take_terminal(sandbox: &Sandbox<'_>, root: BorrowedFd<'_>, owner: Owner, size: WindowSize) -> Result<()> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let ours = openat(root, c"dev/pts/ptmx", flags, Mode::empty())?;
    let theirs = terminal::open_peer(ours.as_fd())?;
    terminal::set_size(ours.as_fd(), size)?;
    change_owner(theirs.as_fd(), owner)?;
    give(sandbox.socket, Handed::Terminal, ours.as_fd())?;
    nix::unistd::dup2_stdin(&theirs)?;
    nix::unistd::dup2_stdout(&theirs)?;
    nix::unistd::dup2_stderr(&theirs)?;
    close_at_exec(3)
}

fn confine(identity: &Identity, terminal: bool) -> Result<()> {
    nix::unistd::setsid()?;
    if terminal {
        terminal::control()?;
    }
    nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
    unblock_signals()?;
    if !without(Defence::Capabilities) {
        forbid_capabilities()?;
    }
    set_groups(identity.groups.get(..identity.group_count).unwrap_or_default())?;
    set_ids(identity.uid, identity.gid)?;
    if !without(Defence::Capabilities) {
        keep_capabilities(0)?;
    }
    if without(Defence::NoNewPrivileges) {
        return Ok(());
    }
    nix::sys::prctl::set_no_new_privs()
}

/// Installs the job's filter. One that tells of refusals has a listener, which goes to whoever gave the order; sendmsg(2)
/// and execve(2) with the key are refused by no filter.
fn filter_calls(sandbox: &Sandbox<'_>) -> Result<()> {
    let program = &sandbox.order.program;
    let instructions = sandbox.filters.programs.get(usize::from(program.filter)).ok_or(Errno::EBADMSG)?;
    match program.listener {
        None => install_filter(instructions),
        Some(socket) => {
            let socket = sandbox.fd(socket)?;
            give(socket, Handed::Listener, install_listened_filter(instructions)?.as_fd())
        }
    }
}

/// What happens where descriptors leak: all that init held stay open. Only the tests' binary gets here.
fn keep_at_exec() -> Result<()> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    for raw in 3..64 {
        // SAFETY: nothing is closed; a number that is no descriptor is answered with EBADF.
        let fd = unsafe { BorrowedFd::borrow_raw(raw) };
        match fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())) {
            Err(Errno::EBADF) => {}
            other => drop(other?),
        }
    }
    Ok(())
}

/// Tries each candidate as execvp(3) does; returns the errno that says most.
fn exec_first(sandbox: &mut Sandbox<'_>, identity: &Identity) -> Errno {
    let program = sandbox.order.program;
    let env = [(program.set_home, identity.home.as_ptr()), (program.set_user, identity.user.as_ptr())];
    let env = env.into_iter().filter(|(wanted, _)| *wanted).map(|(_, text)| text.cast());
    if let Err(errno) = point_at(sandbox.argv, program.argv, core::iter::empty())
        .and_then(|()| point_at(sandbox.envp, program.env, env))
    {
        return errno;
    }
    sandbox.report(Record::Started { at_ns: monotonic_ns() });
    let mut said = Errno::ENOENT;
    for candidate in program.candidates {
        let candidate = match candidate.and_then(TextRef::get) {
            Ok(candidate) => candidate,
            Err(errno) => return errno,
        };
        // SAFETY: both arrays end with a null pointer, and their texts with a NUL.
        let errno = unsafe {
            exec(candidate, sandbox.argv.as_ptr(), sandbox.envp.as_ptr(), sandbox.filters.start_key)
        };
        match errno {
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => said = errno,
            other => return other,
        }
    }
    said
}

/// Fills an array with pointers to texts, and ends it with a null pointer; E2BIG if there is no room.
fn point_at(
    array: &mut Vec<*const libc::c_char>,
    texts: List<'_, TextRef<'_>>,
    more: impl Iterator<Item = *const libc::c_char>,
) -> Result<()> {
    array.clear();
    let texts = texts.map(|text| text.and_then(TextRef::get).map(CStr::as_ptr));
    for pointer in texts.chain(more.map(Ok)).chain([Ok(core::ptr::null())]) {
        if array.len() == array.capacity() {
            return Err(Errno::E2BIG);
        }
        array.push(pointer?);
    }
    Ok(())
}
