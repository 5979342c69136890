//! System calls that no job may make, tried with arguments that do nothing where they are let through.

use crate::mount::check;
use crate::{Errno, Result};

/// Makes one system call with six arguments.
macro_rules! call {
    ($number:ident $(, $argument:expr)*) => {{
        let mut arguments: [libc::c_long; 6] = [0; 6];
        let given: &[libc::c_long] = &[$($argument),*];
        for (place, argument) in arguments.iter_mut().zip(given) {
            *place = *argument;
        }
        let [a, b, c, d, e, f] = arguments;
        // SAFETY: every pointer among the arguments of the calls below is null, with which the kernel answers EFAULT, or is
        // looked at by none of them; no call that succeeds changes memory of this process.
        check(unsafe { libc::syscall(libc::$number, a, b, c, d, e, f) }).map(drop)
    }};
}

/// Tries them all in this process, which is in a user namespace of its own afterwards if even that was let through.
/// What each was answered, by its name.
#[must_use]
pub fn system_calls() -> Vec<(&'static str, Result<()>)> {
    let netlink = libc::c_long::from(libc::AF_NETLINK);
    let raw = libc::c_long::from(libc::SOCK_RAW);
    vec![
        ("mount", call!(SYS_mount)),
        ("fsopen", call!(SYS_fsopen)),
        ("open_tree", call!(SYS_open_tree, -1)),
        ("setns", call!(SYS_setns, -1)),
        ("clone3", call!(SYS_clone3)),
        ("bpf", call!(SYS_bpf, -1)),
        ("io_uring_setup", call!(SYS_io_uring_setup)),
        ("perf_event_open", call!(SYS_perf_event_open, 0, 0, -1, -1)),
        ("userfaultfd", call!(SYS_userfaultfd, -1)),
        // KEYCTL_GET_KEYRING_ID of the session's keyring, which is not made if it is not there.
        ("keyctl", call!(SYS_keyctl, 0, -3)),
        ("ptrace", call!(SYS_ptrace, -1)),
        ("process_vm_readv", call!(SYS_process_vm_readv)),
        ("pidfd_getfd", call!(SYS_pidfd_getfd, -1)),
        ("open_by_handle_at", call!(SYS_open_by_handle_at, -1)),
        ("socket(AF_NETLINK)", call!(SYS_socket, netlink, raw)),
        ("unshare(CLONE_NEWUSER)", call!(SYS_unshare, libc::c_long::from(libc::CLONE_NEWUSER))),
    ]
}

/// Whether this is how a call is refused, as the policy of a job does.
#[must_use]
pub fn is_refusal(answer: Result<()>) -> bool {
    matches!(answer, Err(Errno::EPERM | Errno::ENOSYS | Errno::EACCES | Errno::EAFNOSUPPORT))
}
