//! Pseudo-terminals: pty(7), ioctl_tty(2). None of these functions allocates.

use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use crate::mount::check;
use crate::plan::WindowSize;
use crate::{Errno, Result};

/// The program's side of a terminal, opened by way of ours: no path is involved.
///
/// # Errors
/// ENOTTY if `ours` is no `ptmx`; ENOSPC or EMFILE if there is no room for another.
pub(crate) fn open_peer(ours: BorrowedFd<'_>) -> Result<OwnedFd> {
    let unlocked: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int.
    let answer = unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) };
    check(answer.into())?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes flags of open(2) as an integer.
    let answer = unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    check(answer.into())?;
    // SAFETY: the ioctl answers with a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(answer) })
}

/// Makes the terminal at descriptor 0 the controlling one of this session, which has none.
pub(crate) fn control() -> Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    let answer = unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) };
    check(answer.into()).map(drop)
}

/// Sets how large a terminal is; its programs are told by SIGWINCH.
///
/// # Errors
/// ENOTTY if it is no terminal.
pub fn set_size(terminal: BorrowedFd<'_>, size: WindowSize) -> Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize.
    let answer = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    check(answer.into()).map(drop)
}

/// How large a terminal is; none if it is no terminal, or does not say.
#[must_use]
pub fn size(terminal: BorrowedFd<'_>) -> Option<WindowSize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes a winsize.
    let answer = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    let known = Errno::result(answer).is_ok() && size.ws_row > 0 && size.ws_col > 0;
    known.then_some(WindowSize { rows: size.ws_row, columns: size.ws_col })
}
