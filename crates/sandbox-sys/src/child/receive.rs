//! Taking an order from the socket, into space that was made before, and giving a descriptor back: unix(7), cmsg(3).
//!
//! The other end is [`Channel::send`](crate::channel::Channel::send): a byte that says where the body is, then the
//! body, or nothing if the body is in a memfd that travels as the last descriptor.

use core::ffi::c_void;
use core::ptr::null_mut;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use crate::channel::{Handed, IN_MEMFD, INLINE, MAX_BODY, MAX_FDS, MAX_PACKET};
use crate::{Errno, Result};

/// Space for an order and its descriptors.
pub(crate) struct Mailbox {
    packet: Vec<u8>,
    control: Vec<u64>,
    fds: Vec<RawFd>,
}

impl Mailbox {
    pub(crate) fn new() -> Self {
        const FDS_BYTES: u32 = 4 * 253;
        // SAFETY: CMSG_SPACE only computes.
        let control = unsafe { libc::CMSG_SPACE(FDS_BYTES) } as usize;
        Self {
            packet: vec![0; MAX_PACKET + 1],
            control: vec![0; control.div_ceil(8)],
            fds: Vec::with_capacity(MAX_FDS),
        }
    }

    /// Waits for an order; none when the other end is closed.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<Option<(&[u8], &[RawFd])>> {
        let length = loop {
            match self.receive_packet(socket) {
                Err(Errno::EINTR) => {}
                other => break other?,
            }
        };
        match self.packet.first() {
            _ if length == 0 => Ok(None),
            Some(&INLINE) => Ok(Some((self.packet.get(1..length).ok_or(Errno::EBADMSG)?, &self.fds))),
            Some(&IN_MEMFD) => {
                let memfd = self.fds.pop().ok_or(Errno::EBADMSG)?;
                // SAFETY: the kernel has just made this descriptor for this process, and nobody else has it.
                let body = map(&unsafe { OwnedFd::from_raw_fd(memfd) })?;
                Ok(Some((body, &self.fds)))
            }
            _ => Err(Errno::EBADMSG),
        }
    }

    fn receive_packet(&mut self, socket: BorrowedFd<'_>) -> Result<usize> {
        let mut part = libc::iovec { iov_base: self.packet.as_mut_ptr().cast(), iov_len: self.packet.len() };
        // SAFETY: an all-zero msghdr is valid.
        let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = self.control.as_mut_ptr().cast();
        message.msg_controllen = self.control.len() * 8;
        // SAFETY: `message` names one part and one control buffer of the lengths given, all of them alive.
        let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        let length = usize::try_from(Errno::result(length)?).map_err(|_| Errno::EBADMSG)?;
        if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            return Err(Errno::EMSGSIZE);
        }
        self.take_fds(&message);
        Ok(length)
    }

    /// Notes the descriptors that came; there is room for as many as one message can carry.
    fn take_fds(&mut self, message: &libc::msghdr) {
        self.fds.clear();
        // SAFETY: the kernel filled the control buffer that `message` names.
        let header = unsafe { libc::CMSG_FIRSTHDR(message) };
        if header.is_null() {
            return;
        }
        // SAFETY: a header that is not null lies in the control buffer, aligned to 8 bytes.
        let control = unsafe { &*header };
        if control.cmsg_level != libc::SOL_SOCKET || control.cmsg_type != libc::SCM_RIGHTS {
            return;
        }
        // SAFETY: CMSG_LEN only computes.
        let head = unsafe { libc::CMSG_LEN(0) } as usize;
        // SAFETY: as above; the data lies behind its header.
        let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
        for index in 0..(control.cmsg_len.saturating_sub(head) / 4).min(MAX_FDS) {
            // SAFETY: `cmsg_len` says that there are so many descriptors.
            let place = unsafe { data.add(index) };
            // SAFETY: as above; the data need not be aligned for reading so.
            self.fds.push(unsafe { place.read_unaligned() });
        }
    }
}

/// Sends a descriptor back over the socket, as [`Channel::receive`](crate::channel::Channel::receive) reads it: the body is
/// a byte that says what it is.
pub(super) fn give(socket: BorrowedFd<'_>, what: Handed, fd: BorrowedFd<'_>) -> Result<()> {
    use nix::sys::socket::MsgFlags;
    let mut kind = [INLINE, what as u8];
    let mut part = libc::iovec { iov_base: kind.as_mut_ptr().cast(), iov_len: kind.len() };
    // Room for a header and one descriptor, aligned as cmsg(3) wants.
    let mut control = [0_u64; 4];
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: CMSG_SPACE only computes.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(4) } as usize;
    // SAFETY: the control buffer has room for a header.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: it is not null, since there is room, and lies in the control buffer.
    let place = unsafe { &mut *header };
    place.cmsg_level = libc::SOL_SOCKET;
    place.cmsg_type = libc::SCM_RIGHTS;
    // SAFETY: CMSG_LEN only computes.
    place.cmsg_len = unsafe { libc::CMSG_LEN(4) } as usize;
    // SAFETY: the data lies behind its header, with room for one descriptor.
    let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
    // SAFETY: as above; the data need not be aligned for writing so.
    unsafe { data.write_unaligned(fd.as_raw_fd()) };
    let flags = (MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT).bits();
    // SAFETY: `message` names one part and one control buffer, both alive.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    Errno::result(sent).map(drop)
}

/// The bytes of a memfd, in memory for the rest of this process's life.
fn map(memfd: &OwnedFd) -> Result<&'static [u8]> {
    let size = nix::sys::stat::fstat(memfd)?.st_size;
    let length = usize::try_from(size).map_err(|_| Errno::EBADMSG)?;
    if length == 0 || length as u64 > MAX_BODY {
        return Err(Errno::E2BIG);
    }
    // SAFETY: a new private mapping of a file of this length, at a place of the kernel's choice.
    let address = unsafe {
        libc::mmap(
            null_mut(),
            length,
            libc::PROT_READ,
            libc::MAP_PRIVATE | libc::MAP_POPULATE,
            memfd.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    let address: *const c_void = address;
    // SAFETY: the mapping is `length` bytes long, read-only, and never taken away.
    Ok(unsafe { core::slice::from_raw_parts(address.cast(), length) })
}
