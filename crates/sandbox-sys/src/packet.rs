//! Packets with descriptors between two processes of ours: unix(7), SOCK_SEQPACKET.
//!
//! A packet arrives whole or not at all, and an empty one is the end. What it says is for others to read.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr,
    recvmsg, sendmsg, shutdown, socketpair,
};

use crate::{Errno, Result};

/// The most descriptors in one packet: SCM_MAX_FD of the kernel.
pub(crate) const MAX_FDS: usize = 253;

/// One end of a pair of sockets that keep the bounds of packets.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Both ends; neither survives an exec.
    ///
    /// # Errors
    /// What socketpair(2) answers.
    pub fn pair() -> Result<(Self, Self)> {
        let (one, other) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(one), Self(other)))
    }

    /// Sends one packet; waits while the other end has not read enough of those before.
    ///
    /// # Errors
    /// EPIPE if the other end is closed; EMSGSIZE if it is too large.
    pub fn send(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        loop {
            match send(self.0.as_fd(), &[IoSlice::new(packet)], &raw) {
                Err(Errno::EINTR) => {}
                other => return other,
            }
        }
    }

    /// Receives one packet into a buffer: its length, and the descriptors that came along, at most `MOST_FDS` of them;
    /// none when the other end is closed.
    ///
    /// # Errors
    /// EMSGSIZE if the packet is longer than the buffer, or has more descriptors.
    pub fn receive<const MOST_FDS: usize>(&self, buffer: &mut [u8]) -> Result<Option<(usize, Vec<OwnedFd>)>> {
        loop {
            match receive::<MOST_FDS>(self.0.as_fd(), buffer) {
                Err(Errno::EINTR) => {}
                other => return other,
            }
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Ends the conversation for both ends; whoever waits here is woken.
    pub fn close(&self) {
        // It may have ended already.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }
}

/// Sends one packet.
pub(crate) fn send(socket: BorrowedFd<'_>, parts: &[IoSlice<'_>], fds: &[RawFd]) -> Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    sendmsg::<UnixAddr>(socket.as_raw_fd(), parts, rights, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

/// Receives one packet; none when the other end is closed.
pub(crate) fn receive<const MOST_FDS: usize>(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut space = nix::cmsg_space!([RawFd; MOST_FDS]);
    let mut parts = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let cut = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made these descriptors for this process.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    match message.bytes {
        0 => Ok(None),
        _ if cut || fds.len() > MOST_FDS => Err(Errno::EMSGSIZE),
        length => Ok(Some((length, fds))),
    }
}
