//! System calls that a filter asks about: seccomp_unotify(2).
//!
//! A program's process sends the listener of its filter over a socket of the caller's; from then on each refused call
//! waits until it is answered, or its process is killed. A job can neither answer nor ask by itself: it has no listener,
//! and installs no filters.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::channel::Channel;
use crate::{Errno, Result};

/// `SECCOMP_IOCTL_NOTIF_RECV`: `_IOWR('!', 0, struct seccomp_notif)`.
const RECEIVE: libc::c_ulong = request(0, size_of::<libc::seccomp_notif>());
/// `SECCOMP_IOCTL_NOTIF_SEND`: `_IOWR('!', 1, struct seccomp_notif_resp)`.
const SEND: libc::c_ulong = request(1, size_of::<libc::seccomp_notif_resp>());

const fn request(number: libc::c_ulong, size: usize) -> libc::c_ulong {
    const READ_AND_WRITE: libc::c_ulong = 3 << 30;
    READ_AND_WRITE | (size as libc::c_ulong) << 16 | (b'!' as libc::c_ulong) << 8 | number
}

/// A socket over which the listener comes, and the end that goes with the plan.
///
/// # Errors
/// EMFILE or ENFILE.
pub fn listener_socket() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
}

/// The listener that has come over the socket; none if the other end was closed without one. It waits.
///
/// # Errors
/// EBADMSG if something else came.
pub fn receive_listener(socket: OwnedFd) -> Result<Option<OwnedFd>> {
    match Channel::new(socket).receive()? {
        Some((_, mut fds)) if fds.len() == 1 => Ok(fds.pop()),
        Some(_) => Err(Errno::EBADMSG),
        None => Ok(None),
    }
}

/// A call that waits for its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    id: u64,
    /// The call's number on this machine.
    pub number: i32,
}

/// What a listener has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// A call waits.
    Call(Waiting),
    /// None does now.
    Nothing,
    /// No process is left that could ask.
    Nobody,
}

/// Takes the next call that waits. It does not block.
///
/// # Errors
/// What poll(2) or the ioctl(2) answers.
pub fn receive(listener: BorrowedFd<'_>) -> Result<Asked> {
    let mut ready = [PollFd::new(listener, PollFlags::POLLIN)];
    poll(&mut ready, PollTimeout::ZERO)?;
    let events = ready[0].revents().unwrap_or(PollFlags::empty());
    if !events.contains(PollFlags::POLLIN) {
        let over = events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
        return Ok(if over { Asked::Nobody } else { Asked::Nothing });
    }
    // SAFETY: an all-zero seccomp_notif is valid, and what the kernel wants to be given.
    let mut asked: libc::seccomp_notif = unsafe { core::mem::zeroed() };
    // SAFETY: the request's number holds the size of this struct, which the kernel fills.
    let answer = unsafe { libc::ioctl(listener.as_fd().as_raw_fd(), RECEIVE, &raw mut asked) };
    match Errno::result(answer) {
        Ok(_) => Ok(Asked::Call(Waiting { id: asked.id, number: asked.data.nr })),
        // Whoever asked was killed meanwhile.
        Err(Errno::ENOENT) => Ok(Asked::Nothing),
        Err(Errno::EINTR) => Ok(Asked::Nothing),
        Err(e) => Err(e),
    }
}

/// Answers a call with EPERM.
///
/// # Errors
/// What the ioctl(2) answers; that whoever asked is dead is none.
pub fn refuse(listener: BorrowedFd<'_>, waiting: Waiting) -> Result<()> {
    let response = libc::seccomp_notif_resp { id: waiting.id, val: 0, error: -libc::EPERM, flags: 0 };
    // SAFETY: the request's number holds the size of this struct, which the kernel only reads.
    let answer = unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw const response) };
    match Errno::result(answer) {
        Ok(_) | Err(Errno::ENOENT) => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_those_of_the_kernel_s_header() {
        assert_eq!((RECEIVE, SEND), (0xc050_2100, 0xc018_2101));
    }
}
