//! The conditions on arguments that a policy may name, as instructions. All compare what the kernel looks at: the low
//! 32 bits, unless a rule says otherwise.

use hutch_sandbox_sys::bpf::Instruction;
use serde::{Deserialize, Serialize};
use syscalls::Sysno;

use super::compile::{ALLOW, AND, JUMP_EQUAL, LOAD_WORD, branch, errno, op};
use super::policy::EPERM;

const EINVAL: u32 = libc::EINVAL.unsigned_abs();
const EAFNOSUPPORT: u32 = libc::EAFNOSUPPORT.unsigned_abs();

/// A condition on the arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Rule {
    #[serde(rename = "no-new-namespaces")]
    NoNewNamespaces,
    #[serde(rename = "the-default-one")]
    DefaultPersonality,
    #[serde(rename = "unix-inet-or-inet6")]
    CommonFamilies,
    #[serde(rename = "not-terminal-injection")]
    NoTerminalInjection,
    #[serde(rename = "a-fifo-a-socket-or-a-file")]
    NoDevices,
    #[serde(rename = "not-a-system-call-filter")]
    NoSystemCallFilters,
    #[serde(rename = "it-only-asks")]
    AsksOfFilters,
    #[serde(rename = "not-a-socket-filter")]
    NoSocketFilters,
    #[serde(rename = "the-sandbox-starts-it")]
    StartedByTheSandbox,
}

impl Rule {
    /// The rule's instructions; each path through them returns.
    pub(super) fn instructions(self, start_key: [u64; 2]) -> Vec<Instruction> {
        // CLONE_NEW* of sched.h; CLONE_NEWTIME shares its bit with the exit signal and needs clone3.
        const NAMESPACES: u32 = 0x7E02_0000;
        match self {
            Self::NoNewNamespaces => vec![
                op(LOAD_WORD, at_argument(0)),
                op(AND, NAMESPACES),
                branch(JUMP_EQUAL, 0, 0, 1),
                ALLOW,
                errno(EPERM),
            ],
            Self::DefaultPersonality => one_of(0, None, &[0, u32::MAX], EPERM),
            Self::CommonFamilies => {
                let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6].map(i32::unsigned_abs);
                one_of(0, None, &families, EAFNOSUPPORT)
            }
            Self::NoTerminalInjection => {
                const TIOCSTI: u32 = 0x5412;
                const TIOCLINUX: u32 = 0x541C;
                vec![
                    op(LOAD_WORD, at_argument(1)),
                    branch(JUMP_EQUAL, TIOCSTI, 2, 0),
                    branch(JUMP_EQUAL, TIOCLINUX, 1, 0),
                    ALLOW,
                    errno(EPERM),
                ]
            }
            // mknod has the mode second, mknodat third: a rule for both would have to know which; devices
            // are refused by the kernel anyway, so the pair is told apart by the number.
            Self::NoDevices => mknod(),
            Self::NoSystemCallFilters => {
                let set_seccomp = libc::PR_SET_SECCOMP.unsigned_abs();
                vec![
                    op(LOAD_WORD, at_argument(0)),
                    branch(JUMP_EQUAL, set_seccomp, 1, 0),
                    ALLOW,
                    errno(EINVAL),
                ]
            }
            Self::AsksOfFilters => {
                one_of(0, None, &[libc::SECCOMP_GET_ACTION_AVAIL, libc::SECCOMP_GET_NOTIF_SIZES], EINVAL)
            }
            Self::NoSocketFilters => socket_filter(),
            Self::StartedByTheSandbox => with_key(start_key),
        }
    }
}

/// Where the low half of an argument lies, on a little-endian machine; the high half is 4 bytes on.
const fn at_argument(index: u32) -> u32 {
    16 + 8 * index
}

/// Refuses to attach a program to a socket: setsockopt(2) with SOL_SOCKET and any of these.
fn socket_filter() -> Vec<Instruction> {
    // SO_ATTACH_FILTER, SO_ATTACH_BPF, SO_ATTACH_REUSEPORT_CBPF, SO_ATTACH_REUSEPORT_EBPF of asm-generic/socket.h.
    const FILTERS: [u32; 4] = [26, 50, 51, 52];
    let level = libc::SOL_SOCKET.unsigned_abs();
    let mut program = vec![
        op(LOAD_WORD, at_argument(1)),
        branch(JUMP_EQUAL, level, 1, 0),
        ALLOW,
        op(LOAD_WORD, at_argument(2)),
    ];
    for (left, option) in (1..=4).rev().zip(FILTERS) {
        program.push(branch(JUMP_EQUAL, option, left, 0));
    }
    program.extend([ALLOW, errno(EPERM)]);
    program
}

/// Allows if the argument, masked, is one of these.
fn one_of(argument: u32, mask: Option<u32>, values: &[u32], otherwise: u32) -> Vec<Instruction> {
    let mut program = vec![op(LOAD_WORD, at_argument(argument))];
    program.extend(mask.map(|mask| op(AND, mask)));
    for (index, value) in values.iter().enumerate() {
        let left = u8::try_from(values.len() - index).unwrap_or(u8::MAX);
        program.push(branch(JUMP_EQUAL, *value, left, 0));
    }
    program.push(errno(otherwise));
    program.push(ALLOW);
    program
}

fn mknod() -> Vec<Instruction> {
    let kinds = [0, libc::S_IFREG, libc::S_IFIFO, libc::S_IFSOCK];
    let at_second = one_of(1, Some(libc::S_IFMT), &kinds, EPERM);
    let at_third = one_of(2, Some(libc::S_IFMT), &kinds, EPERM);
    let number = u32::try_from(Sysno::mknodat.id()).unwrap_or(u32::MAX);
    let skip = u8::try_from(at_second.len()).unwrap_or(u8::MAX);
    let mut program = vec![branch(JUMP_EQUAL, number, skip, 0)];
    program.extend(at_second);
    program.extend(at_third);
    program
}

/// Allows if the fourth and fifth argument are the key, all 64 bits of each: execve(2) has three arguments and ignores
/// the rest, so a sandbox shows that it is itself who calls. The key is gone with the memory and the registers that
/// exec replaces.
fn with_key([fourth, fifth]: [u64; 2]) -> Vec<Instruction> {
    let halves = [fourth, fourth >> 32, fifth, fifth >> 32].map(|half| (half & 0xffff_ffff) as u32);
    let places = [at_argument(3), at_argument(3) + 4, at_argument(4), at_argument(4) + 4];
    let mut program = Vec::new();
    for (index, (half, place)) in (0_u8..).zip(halves.into_iter().zip(places)) {
        // Behind the last comparison comes ALLOW, then the refusal.
        program.extend([op(LOAD_WORD, place), branch(JUMP_EQUAL, half, 0, 7 - 2 * index)]);
    }
    program.extend([ALLOW, errno(EPERM)]);
    program
}
