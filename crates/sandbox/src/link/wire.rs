//! How a message is on the wire.
//!
//! A body is the length of its head (4 bytes, little-endian), the head (postcard: the message and the length of each part),
//! and the parts, byte for byte. A small body is in the packet, behind a 0; a large one is in a sealed memfd that comes
//! along with a packet that is a single 1. Nothing is believed: lengths are held against what is there, and what is there
//! against a cap, before anything is allocated.

use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use hutch_sandbox_sys::PacketSocket;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The most bytes of a packet.
pub(super) const MAX_PACKET: usize = 64 << 10;
/// The most bytes of a head: a message and the lengths of its parts.
const MAX_HEAD: u32 = 4 << 20;
const INLINE: u8 = 0;
const IN_MEMFD: u8 = 1;

/// Why a message cannot be sent or read. After it the link is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("the link failed: {0}")]
    Socket(#[from] hutch_sandbox_sys::Errno),
    #[error("a message cannot be passed on: {0}")]
    Io(#[from] io::Error),
    #[error("a message is not as it should be: {0}")]
    Wrong(&'static str),
}

/// A message, and the bytes and descriptors that belong to it.
#[derive(Debug)]
pub(super) struct Message<T> {
    pub(super) what: T,
    pub(super) parts: Vec<Vec<u8>>,
    pub(super) fds: Vec<OwnedFd>,
}

impl<T> Message<T> {
    /// A message alone.
    pub(super) fn of(what: T) -> Self {
        Self { what, parts: Vec::new(), fds: Vec::new() }
    }

    /// How many bytes it carries.
    pub(super) fn bytes(&self) -> usize {
        self.parts.iter().map(Vec::len).sum()
    }
}

/// Sends a message; waits while the other end has not read enough of those before.
pub(super) fn send<T: Serialize>(socket: &PacketSocket, message: &Message<T>) -> Result<(), LinkError> {
    let lengths: Vec<u64> = message.parts.iter().map(|part| part.len() as u64).collect();
    let head = postcard::to_stdvec(&(&message.what, lengths)).map_err(|_| LinkError::Wrong("its head"))?;
    let head_len = u32::try_from(head.len()).ok().filter(|len| *len <= MAX_HEAD);
    let head_len = head_len.ok_or(LinkError::Wrong("its head is too long"))?.to_le_bytes();
    let mut fds: Vec<BorrowedFd<'_>> = message.fds.iter().map(OwnedFd::as_fd).collect();
    if 1 + head_len.len() + head.len() + message.bytes() <= MAX_PACKET {
        let mut packet = vec![INLINE];
        for piece in [&head_len[..], &head].into_iter().chain(message.parts.iter().map(Vec::as_slice)) {
            packet.extend_from_slice(piece);
        }
        return Ok(socket.send(&packet, &fds)?);
    }
    let mut body =
        File::from(memfd_create(c"hutch-message", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    for piece in [&head_len[..], &head].into_iter().chain(message.parts.iter().map(Vec::as_slice)) {
        body.write_all(piece)?;
    }
    fcntl(&body, FcntlArg::F_ADD_SEALS(seals() | SealFlag::F_SEAL_SEAL))?;
    fds.push(body.as_fd());
    Ok(socket.send(&[IN_MEMFD], &fds)?)
}

/// What keeps a memfd as it is while it is read.
fn seals() -> SealFlag {
    SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE
}

/// Receives a message of at most `most` bytes with at most `MOST_FDS` descriptors, that of its body among them; none
/// when the other end is closed.
pub(super) fn receive<T: DeserializeOwned, const MOST_FDS: usize>(
    socket: &PacketSocket,
    packet: &mut [u8],
    most: u64,
) -> Result<Option<Message<T>>, LinkError> {
    let Some((length, mut fds)) = socket.receive::<MOST_FDS>(packet)? else { return Ok(None) };
    let message = match packet[..length] {
        [INLINE, ref body @ ..] => decode(body, body.len() as u64)?,
        [IN_MEMFD] => {
            let body = fds.pop().ok_or(LinkError::Wrong("its body did not come"))?;
            decode_memfd(body, most)?
        }
        _ => return Err(LinkError::Wrong("its kind")),
    };
    Ok(Some(Message { fds, ..message }))
}

fn decode_memfd<T: DeserializeOwned>(body: OwnedFd, most: u64) -> Result<Message<T>, LinkError> {
    // Only a memfd has seals. A sealed one stays as it is, and to read it waits for nobody.
    let sealed = fcntl(&body, FcntlArg::F_GET_SEALS).map_or(SealFlag::empty(), SealFlag::from_bits_retain);
    if !sealed.contains(seals()) {
        return Err(LinkError::Wrong("its body can still change"));
    }
    let mut body = File::from(body);
    let size = body.metadata()?.len();
    if size > most {
        return Err(LinkError::Wrong("it is too large"));
    }
    body.seek(SeekFrom::Start(0))?;
    decode(body, size)
}

/// Reads a body of this size; it must be used up to its last byte.
pub(super) fn decode<T: DeserializeOwned>(mut body: impl Read, size: u64) -> Result<Message<T>, LinkError> {
    let mut head_len = [0; 4];
    body.read_exact(&mut head_len)?;
    let head_len = u32::from_le_bytes(head_len);
    let rest = size.checked_sub(4 + u64::from(head_len)).filter(|_| head_len <= MAX_HEAD);
    let rest = rest.ok_or(LinkError::Wrong("its head is longer than itself"))?;
    let head = read(&mut body, head_len.into())?;
    let ((what, lengths), left): ((T, Vec<u64>), &[u8]) =
        postcard::take_from_bytes(&head).map_err(|_| LinkError::Wrong("its head cannot be read"))?;
    let total = lengths.iter().try_fold(0_u64, |sum, length| sum.checked_add(*length));
    if !left.is_empty() || total != Some(rest) {
        return Err(LinkError::Wrong("its parts are not as long as it says"));
    }
    let parts = lengths.into_iter().map(|length| read(&mut body, length)).collect::<Result<_, _>>()?;
    Ok(Message { what, parts, fds: Vec::new() })
}

fn read(body: &mut impl Read, length: u64) -> Result<Vec<u8>, LinkError> {
    let length = usize::try_from(length).map_err(|_| LinkError::Wrong("a part is too long"))?;
    let mut bytes = vec![0; length];
    body.read_exact(&mut bytes)?;
    Ok(bytes)
}
