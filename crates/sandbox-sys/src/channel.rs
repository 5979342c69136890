//! Messages with descriptors over a seqpacket socket: unix(7), cmsg(3).
//!
//! A message is one packet: a byte that says where the body is, then the body, or nothing if the
//! body is in a sealed memfd that travels as the last descriptor.

use std::cell::RefCell;
use std::fs::File;
use std::io::{IoSlice, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::memfd::{MFdFlags, memfd_create};

pub(crate) use crate::packet::MAX_FDS;
use crate::{Errno, Result, packet};

/// The most bytes in a packet; larger bodies go in a memfd.
pub(crate) const MAX_PACKET: usize = 64 << 10;
/// The most bytes of a body.
pub(crate) const MAX_BODY: u64 = 64 << 20;
/// First byte of a packet: the body follows.
pub(crate) const INLINE: u8 = 0;
/// First byte of a packet: the body is in the last descriptor.
pub(crate) const IN_MEMFD: u8 = 1;

/// What a sandbox hands back, the byte that says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Handed {
    /// The scratch file system, for the next step.
    Scratch = 1,
    /// The side of its terminal that is not the program's.
    Terminal = 2,
    /// The listener of the program's filter, over a socket of its own: see [`notify`](crate::notify).
    Listener = 3,
}

/// One end of the channel; a message and its answer are one after the other.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
    /// Space for one packet; only its first bytes are used, mostly.
    packet: RefCell<Vec<u8>>,
}

impl Channel {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket, packet: RefCell::new(vec![0; MAX_PACKET + 1]) }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends a body and descriptors.
    pub(crate) fn send(&self, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let memfd = if body.len() < MAX_PACKET { None } else { Some(in_memfd(body)?) };
        raw.extend(memfd.as_ref().map(AsRawFd::as_raw_fd));
        if raw.len() > MAX_FDS {
            return Err(Errno::E2BIG);
        }
        let kind = [if memfd.is_some() { IN_MEMFD } else { INLINE }];
        let parts = [IoSlice::new(&kind), IoSlice::new(if memfd.is_some() { &[] } else { body })];
        packet::send(self.socket.as_fd(), &parts, &raw)
    }

    /// Receives a body and descriptors; none when the other end is closed.
    pub(crate) fn receive(&self) -> Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        let mut buffer = self.packet.borrow_mut();
        let Some((length, mut fds)) = packet::receive::<MAX_FDS>(self.socket.as_fd(), &mut buffer)? else {
            return Ok(None);
        };
        match buffer.first() {
            Some(&INLINE) => Ok(Some((buffer[1..length].to_vec(), fds))),
            Some(&IN_MEMFD) => {
                let body = from_memfd(fds.pop().ok_or(Errno::EBADMSG)?)?;
                Ok(Some((body, fds)))
            }
            _ => Err(Errno::EBADMSG),
        }
    }
}

fn in_memfd(body: &[u8]) -> Result<File> {
    let mut file = File::from(memfd_create(c"hutch-plan", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(body).map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    Ok(file)
}

fn from_memfd(fd: OwnedFd) -> Result<Vec<u8>> {
    use std::io::{Seek as _, SeekFrom};
    let io = |e: std::io::Error| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    let mut file = File::from(fd);
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    let mut body = Vec::new();
    let read = (&mut file).take(MAX_BODY + 1).read_to_end(&mut body).map_err(io)?;
    if read as u64 > MAX_BODY { Err(Errno::E2BIG) } else { Ok(body) }
}
