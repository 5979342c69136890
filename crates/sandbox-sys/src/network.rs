//! Network namespaces of sandboxes: network_namespaces(7).
//!
//! A fresh one for each sandbox is the default, and the dearest part of it. Or a slot keeps one from job to job
//! ([`SlotNetworks`]), in which nothing ever happened: before each sandbox its looks must be what they were when it was
//! made. They are what proc(5) shows of it below `net`: no socket in any state, whoever holds it; loopback alone; and
//! every counter of the protocols as it was, so that not one packet was sent, received or refused. A job that has used
//! the network at all leaves a namespace that looks different, which is let go; the slot gets a new one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use nix::fcntl::{OFlag, openat};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use crate::defence::{Defence, without};
use crate::{Errno, Result};

/// Where a sandbox's network namespace comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkNamespace {
    /// Made for it, and gone with it.
    #[default]
    Fresh,
    /// Its slot's own, if that was proved to be as it was made; else a new one, which the slot keeps.
    PerSlot,
}

/// What is looked at, below `net`. A kernel without IPv6 lacks some.
const SHOWN: [&str; 14] = [
    "sockstat",
    "sockstat6",
    "dev",
    "snmp",
    "snmp6",
    "netstat",
    "unix",
    "packet",
    "route",
    "if_inet6",
    "igmp",
    "igmp6",
    "arp",
    "ip_mr_vif",
];
/// What `sockstat` counts for the whole host.
const OF_THE_HOST: [&str; 3] = ["orphan", "alloc", "mem"];
/// The most bytes of one file.
const MOST: u64 = 64 << 10;

/// Enters a new network namespace and sets loopback up: netdevice(7).
pub(crate) fn isolate() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    // SAFETY: socket(2) takes integers only.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    let socket = Errno::result(socket)?;
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes()) {
        *to = libc::c_char::try_from(*from).unwrap_or(0);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(0);
    // SAFETY: `request` is an ifreq whose name and flags are set, as SIOCSIFFLAGS wants.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    Errno::result(answer).map(drop)
}

/// The network namespaces that slots keep, by the slot's first id.
#[derive(Debug, Default)]
pub(crate) struct SlotNetworks(BTreeMap<u32, Kept>);

#[derive(Debug)]
struct Kept {
    namespace: OwnedFd,
    looks: Vec<u8>,
}

impl SlotNetworks {
    /// Enters a slot's namespace, for whoever is cloned next; a new one unless its own is as it was made. Nobody may be
    /// in it.
    pub(crate) fn enter(&mut self, slot: u32, proc_dir: BorrowedFd<'_>) -> Result<()> {
        // What cannot be looked at is not proved.
        if let Some(kept) = self.0.remove(&slot)
            && setns(kept.namespace.as_fd(), CloneFlags::CLONE_NEWNET).is_ok()
            && (without(Defence::UntouchedNetwork) || looks(proc_dir).is_ok_and(|looks| looks == kept.looks))
        {
            self.0.insert(slot, kept);
            return Ok(());
        }
        isolate()?;
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let namespace = openat(proc_dir, c"self/ns/net", flags, Mode::empty())?;
        let looks = looks(proc_dir)?;
        self.0.insert(slot, Kept { namespace, looks });
        Ok(())
    }
}

/// What proc(5) shows of this process's network namespace.
fn looks(proc_dir: BorrowedFd<'_>) -> Result<Vec<u8>> {
    let mut looks = Vec::with_capacity(16 << 10);
    for name in SHOWN {
        let begun = looks.len();
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = match openat(proc_dir, format!("self/net/{name}").as_str(), flags, Mode::empty()) {
            Err(Errno::ENOENT) => continue,
            other => File::from(other?),
        };
        let read = file.take(MOST).read_to_end(&mut looks);
        if read.map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))? as u64 == MOST {
            return Err(Errno::EFBIG);
        }
        if name == "sockstat" {
            let own = own_counts(&String::from_utf8_lossy(&looks[begun..]));
            looks.truncate(begun);
            looks.extend(own.into_bytes());
        }
    }
    Ok(looks)
}

/// What of `sockstat` is counted for a namespace: `used` counts every socket in it, in any state and family, but those
/// of TCP that only wait for their time to be over, which are `tw`.
fn own_counts(text: &str) -> String {
    let mut own = String::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        own.push_str(words.next().unwrap_or_default());
        while let (Some(key), Some(count)) = (words.next(), words.next()) {
            if !OF_THE_HOST.contains(&key) {
                own.push_str(&format!(" {key} {count}"));
            }
        }
        own.push('\n');
    }
    own
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_counts_is_left_out() {
        let text = "sockets: used 3\nTCP: inuse 1 orphan 0 tw 2 alloc 5 mem 1\nFRAG: inuse 0 memory 7\n";
        assert_eq!(own_counts(text), "sockets: used 3\nTCP: inuse 1 tw 2\nFRAG: inuse 0 memory 7\n");
    }
}
