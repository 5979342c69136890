//! Processes: clone3(2), pidfds, capabilities, seccomp. None of these functions allocates.

use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::bpf::Instruction;
use crate::mount::check;
use crate::{Errno, Result};

/// Flags of clone3(2) and unshare(2) that this crate uses.
pub mod flags {
    /// A new mount namespace.
    pub const NEWNS: u64 = 0x0002_0000;
    /// A new cgroup namespace.
    pub const NEWCGROUP: u64 = 0x0200_0000;
    /// A new UTS namespace.
    pub const NEWUTS: u64 = 0x0400_0000;
    /// A new IPC namespace.
    pub const NEWIPC: u64 = 0x0800_0000;
    /// A new user namespace.
    pub const NEWUSER: u64 = 0x1000_0000;
    /// A new PID namespace.
    pub const NEWPID: u64 = 0x2000_0000;
    /// A new network namespace.
    pub const NEWNET: u64 = 0x4000_0000;
    pub(crate) const VM: u64 = 0x0000_0100;
    pub(crate) const PIDFD: u64 = 0x0000_1000;
    pub(crate) const VFORK: u64 = 0x0000_4000;
    pub(crate) const INTO_CGROUP: u64 = 0x2_0000_0000;
}

/// Layout of `struct clone_args`, clone3(2).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Which side of a clone this is.
#[derive(Debug)]
pub(crate) enum Cloned {
    /// The new process.
    Child,
    /// The old one, with the new one's pid and pidfd.
    Parent {
        /// The child, in the caller's PID namespace.
        pid: libc::pid_t,
        /// The child.
        pidfd: OwnedFd,
    },
}

/// Clones this process as fork(2) does, with more flags; the child starts with a copy of memory.
///
/// # Safety
/// The caller's process must have one thread, and the child must end by exec or [`exit_now`].
pub(crate) unsafe fn clone_process(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned> {
    let mut pidfd: libc::c_int = -1;
    let mut args = CloneArgs {
        flags: flags | flags::PIDFD,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if let Some(dir) = cgroup {
        args.flags |= flags::INTO_CGROUP;
        args.cgroup = u64::try_from(dir.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    }
    // SAFETY: `args` has the kernel's layout and size; without CLONE_VM the child has its own
    // copy of this stack, so returning twice is what fork does.
    let answer = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    match check(answer)? {
        0 => Ok(Cloned::Child),
        pid => {
            let pid = libc::pid_t::try_from(pid).map_err(|_| Errno::EOVERFLOW)?;
            // SAFETY: with CLONE_PIDFD the kernel stored a new descriptor here.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent { pid, pidfd })
        }
    }
}

/// The stack of a process that shares its parent's memory for a while.
#[derive(Debug)]
pub(crate) struct Stack(Box<[u128]>);

impl Stack {
    /// A stack of this many KiB; its pages are only made when they are used.
    pub(crate) fn new(kib: usize) -> Self {
        Self(vec![0; kib * 64].into_boxed_slice())
    }
}

/// Whether a parent goes on beside a child that shares its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beside {
    /// It waits until the child has exec'ed or ended (CLONE_VFORK).
    Waits,
    /// It goes on.
    GoesOn,
}

/// Starts a process that shares this one's memory (CLONE_VM of clone(2)). No page table is copied, which makes it
/// the cheapest start.
///
/// # Safety
/// `run` must not return, and must leave memory such that the parent can go on: it may write only to what `argument`
/// points to and to its own stack. If the parent does not wait, the stack must outlive the child, and `run` may not
/// use the C library beyond plain system calls that do not fail, since both have one `errno`.
pub(crate) unsafe fn start_sharing(
    flags: u64,
    parent: Beside,
    cgroup: Option<BorrowedFd<'_>>,
    stack: &mut Stack,
    run: extern "C" fn(*mut libc::c_void) -> !,
    argument: *mut libc::c_void,
) -> Result<libc::pid_t> {
    let mut args = CloneArgs {
        flags: flags | flags::VM | if parent == Beside::Waits { flags::VFORK } else { 0 },
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.0.as_mut_ptr() as u64,
        stack_size: size_of_val(&*stack.0) as u64,
        ..CloneArgs::default()
    };
    if let Some(dir) = cgroup {
        args.flags |= flags::INTO_CGROUP;
        args.cgroup = u64::try_from(dir.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    }
    // SAFETY: `args` lives through the call, its stack is this function's alone and aligned to 16 bytes;
    // `run` and `argument` are as this function's contract says.
    let answer = unsafe { clone3_onto(&args, run, argument) };
    if answer < 0 {
        return Err(Errno::from_raw(i32::try_from(-answer).unwrap_or(libc::EINVAL)));
    }
    libc::pid_t::try_from(answer).map_err(|_| Errno::EOVERFLOW)
}

/// clone3(2) onto another stack, where `run` is called; the parent gets the pid, or a negative errno.
///
/// # Safety
/// As for [`start_sharing`]; `args` must name a stack.
#[cfg(target_arch = "x86_64")]
unsafe fn clone3_onto(
    args: &CloneArgs,
    run: extern "C" fn(*mut libc::c_void) -> !,
    argument: *mut libc::c_void,
) -> libc::c_long {
    let answer: libc::c_long;
    // SAFETY: the child begins behind `syscall` with a stack of its own, never goes on to label 2, and
    // calls `run` with its argument; the parent's registers are as after any system call.
    unsafe {
        core::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => answer,
            in("rdi") std::ptr::from_ref(args),
            in("rsi") size_of::<CloneArgs>(),
            in("r12") argument,
            in("r13") run,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    answer
}

/// As above.
///
/// # Safety
/// As above.
#[cfg(target_arch = "aarch64")]
unsafe fn clone3_onto(
    args: &CloneArgs,
    run: extern "C" fn(*mut libc::c_void) -> !,
    argument: *mut libc::c_void,
) -> libc::c_long {
    let answer: libc::c_long;
    // SAFETY: as above.
    unsafe {
        core::arch::asm!(
            "svc 0",
            "cbnz x0, 2f",
            "mov x29, xzr",
            "mov x0, x20",
            "blr x21",
            "brk 1",
            "2:",
            in("x8") libc::SYS_clone3,
            inlateout("x0") std::ptr::from_ref(args) => answer,
            in("x1") size_of::<CloneArgs>(),
            in("x20") argument,
            in("x21") run,
        );
    }
    answer
}

/// Ends this process at once, running no destructor.
pub(crate) fn exit_now(code: libc::c_int) -> ! {
    // SAFETY: _exit(2) does not return and touches no memory of ours.
    unsafe { libc::_exit(code) }
}

/// Sends a signal to the process behind a pidfd: pidfd_send_signal(2).
///
/// # Errors
/// ESRCH if it has ended.
pub fn signal(pidfd: BorrowedFd<'_>, signal: libc::c_int) -> Result<()> {
    // SAFETY: a null siginfo is allowed; the rest are integers.
    let answer = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<u8>(), 0)
    };
    check(answer).map(drop)
}

/// Lets every descriptor from `first` on close at exec: close_range(2).
pub(crate) fn close_at_exec(first: libc::c_uint) -> Result<()> {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: integers only; nothing is closed now.
    let answer =
        unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) };
    check(answer).map(drop)
}

/// Closes every descriptor in a range: close_range(2).
pub(crate) fn close_range(first: libc::c_uint, last: libc::c_uint) -> Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: integers only; callers hold no descriptor in the range that they use afterwards.
    let answer = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    check(answer).map(drop)
}

/// Closes all but stdin, stdout, stderr and one socket: in a process that was just forked, copies of what its parent
/// has open, which nobody here will use or close.
pub(crate) fn close_all_but(socket: BorrowedFd<'_>) -> Result<()> {
    const FIRST: libc::c_uint = 3;
    let socket = libc::c_uint::try_from(socket.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    close_range(FIRST, socket.saturating_sub(1))?;
    close_range(FIRST.max(socket + 1), libc::c_uint::MAX)
}

const CAP_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Keeps these capabilities (a bit mask of the first 32) and gives up all others: capset(2).
pub(crate) fn keep_capabilities(mask: u32) -> Result<()> {
    let mut header = CapHeader { version: CAP_VERSION_3, pid: 0 };
    let data = [CapData { effective: mask, permitted: mask, inheritable: 0 }, CapData::default()];
    // SAFETY: header and data have the layout of version 3: one header, two data blocks.
    let answer = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    check(answer).map(drop)
}

/// CAP_KILL as a mask for [`keep_capabilities`].
pub(crate) const CAP_KILL: u32 = 1 << 5;

/// prctl(2) with up to two arguments that are integers.
pub(crate) fn prctl(option: libc::c_int, arg2: libc::c_ulong, arg3: libc::c_ulong) -> Result<()> {
    let zero: libc::c_ulong = 0;
    // SAFETY: the options used in this crate take integers only.
    let answer = unsafe { libc::prctl(option, arg2, arg3, zero, zero) };
    check(answer.into()).map(drop)
}

/// Empties the bounding and ambient sets and locks the secure bits: capabilities(7).
pub(crate) fn forbid_capabilities() -> Result<()> {
    const SECURE_BITS_ALL_LOCKED: libc::c_ulong = 0b1110_1111;
    for capability in 0..64 {
        match prctl(libc::PR_CAPBSET_DROP, capability, 0) {
            Ok(()) => {}
            Err(Errno::EINVAL) => break,
            Err(e) => return Err(e),
        }
    }
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0)?;
    prctl(libc::PR_SET_SECUREBITS, SECURE_BITS_ALL_LOCKED, 0)
}

/// Layout of `struct sock_fprog`.
#[repr(C)]
struct FilterProgram {
    len: libc::c_ushort,
    filter: *const Instruction,
}

/// Installs a seccomp filter on this thread and all it will start: seccomp(2).
pub(crate) fn install_filter(filter: &[Instruction]) -> Result<()> {
    set_filter(filter, 0).map(drop)
}

/// The same with a listener: seccomp_unotify(2). A call that waits for its answer is interrupted by what kills it alone.
pub(crate) fn install_listened_filter(filter: &[Instruction]) -> Result<OwnedFd> {
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    let fd = RawFd::try_from(set_filter(filter, flags)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_filter(filter: &[Instruction], flags: libc::c_ulong) -> Result<libc::c_long> {
    const SET_MODE_FILTER: libc::c_uint = 1;
    let len = libc::c_ushort::try_from(filter.len()).map_err(|_| Errno::EINVAL)?;
    let program = FilterProgram { len, filter: filter.as_ptr() };
    // SAFETY: `program` has the kernel's layout and points to `len` instructions.
    let answer = unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, flags, &raw const program) };
    check(answer)
}

/// Lets one signal act as it does by default: rt_sigaction(2). The raw call, since the C library keeps two of them
/// to itself, and they too may have come ignored from whoever started us.
fn reset_signal(signal: libc::c_int) -> Result<()> {
    /// Layout of the kernel's `struct sigaction`; all zero is SIG_DFL.
    #[repr(C)]
    #[derive(Default)]
    struct Action {
        handler: usize,
        flags: libc::c_ulong,
        restorer: usize,
        mask: u64,
    }
    let action = Action::default();
    // SAFETY: `action` has the kernel's layout, its mask the size that is passed; the default runs no code of ours.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            &raw const action,
            std::ptr::null::<u8>(),
            size_of::<u64>(),
        )
    };
    check(answer).map(drop)
}

/// Lets every signal act as it does by default; ignored ones would stay so over exec: signal(7).
pub(crate) fn reset_signals() -> Result<()> {
    const LAST: libc::c_int = 64;
    for signal in 1..=LAST {
        match reset_signal(signal) {
            // SIGKILL and SIGSTOP are as they are.
            Err(Errno::EINVAL) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Unblocks all signals, for a program that will be run.
pub(crate) fn unblock_signals() -> Result<()> {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}

/// Sets the ids of this process for good: setresgid(2), then setresuid(2), on this thread alone.
pub(crate) fn set_ids(uid: u32, gid: u32) -> Result<()> {
    // SAFETY: integers only. The raw call acts on this thread, the only one.
    let answer = unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) };
    check(answer)?;
    // SAFETY: as above.
    let answer = unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) };
    check(answer).map(drop)
}

/// Sets the effective user alone, so that it can be set back: setresuid(2), on this thread alone. Capabilities are out
/// of effect while it is not root.
pub(crate) fn set_effective_user(uid: u32) -> Result<()> {
    const AS_IT_IS: u32 = u32::MAX;
    // SAFETY: integers only. The raw call acts on this thread, the only one.
    let answer = unsafe { libc::syscall(libc::SYS_setresuid, AS_IT_IS, uid, AS_IT_IS) };
    check(answer).map(drop)
}

/// Sets the supplementary groups: setgroups(2).
pub(crate) fn set_groups(groups: &[libc::gid_t]) -> Result<()> {
    // SAFETY: pointer and length are those of one slice.
    let answer = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    check(answer).map(drop)
}

/// Nanoseconds of CLOCK_MONOTONIC; 0 if there is no such clock.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a timespec that the call fills.
    let answer = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    if answer != 0 {
        return 0;
    }
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// A random number that nobody can guess: getrandom(2).
///
/// # Errors
/// ENOSYS if the kernel has none.
pub fn random_key() -> Result<[u64; 2]> {
    let mut key = [0_u64; 2];
    // SAFETY: the buffer is 16 bytes long; so few come at once.
    let got = unsafe { libc::getrandom(key.as_mut_ptr().cast(), 16, 0) };
    match Errno::result(got)? {
        16 => Ok(key),
        _ => Err(Errno::EIO),
    }
}

/// Replaces this process by a program: execve(2). Returns only when that fails. The key goes along where execve has no
/// arguments: see [`Filters`](crate::bpf::Filters).
///
/// # Safety
/// `argv` and `envp` must be arrays of pointers to NUL-terminated texts, ended by a null pointer.
pub(crate) unsafe fn exec(
    path: &std::ffi::CStr,
    argv: *const *const libc::c_char,
    envp: *const *const libc::c_char,
    key: [u64; 2],
) -> Errno {
    // SAFETY: by this function's contract.
    unsafe { libc::syscall(libc::SYS_execve, path.as_ptr(), argv, envp, key[0], key[1]) };
    Errno::last()
}

/// Sets a resource limit: prlimit(2) on this process.
pub(crate) fn set_rlimit(resource: u32, soft: u64, hard: u64) -> Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` has the layout of rlimit64; no old value is asked for.
    let answer =
        unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, &raw const limit, std::ptr::null::<u8>()) };
    check(answer).map(drop)
}

/// Overwrites this process's arguments and environment, as /proc/PID/cmdline and environ show them: arguments may
/// hold secrets, and a sandbox's init is a copy of this process. `std::env` is empty afterwards.
///
/// # Safety
/// No other thread may exist, and nobody may hold a reference into the arguments or the environment.
pub(crate) unsafe fn forget_arguments(name: &[u8]) {
    // Fields 48 to 51 of proc_pid_stat(5), counted from the one after the name (3).
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let Some((_, fields)) = stat.rsplit_once(')') else { return };
    let fields: Vec<usize> =
        fields.split_whitespace().skip(45).take(4).filter_map(|f| f.parse().ok()).collect();
    let [arg_start, arg_end, env_start, env_end] = fields[..] else { return };
    for (start, end, text) in [(arg_start, arg_end, name), (env_start, env_end, &b""[..])] {
        for (offset, address) in (start..end).enumerate() {
            let byte = text.get(offset).copied().unwrap_or(0);
            // SAFETY: the kernel says that these addresses hold this process's own arguments and
            // environment, which are writable memory; by this function's contract nobody looks at them.
            unsafe { std::ptr::write_volatile(address as *mut u8, byte) };
        }
    }
}
