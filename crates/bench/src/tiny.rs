//! A program of some 200 bytes, without a C library: it writes the time at which it began to stdout, and ends.
//!
//! What it takes to run is what the kernel asks for a process; and it tells when its first instruction ran: elf(5),
//! clock_gettime(2). x86-64 alone.

use std::path::Path;

use anyhow::Context as _;

/// Where the program is in memory.
const BASE: u64 = 0x40_0000;
/// Length of the headers, behind which the code lies.
const HEADERS: u64 = 64 + 56;

/// The code: clock_gettime(CLOCK_MONOTONIC) into the stack, write of its 16 bytes to 1, exit with 0.
const CODE: [u8; 42] = [
    0x48, 0x83, 0xec, 0x10, // sub rsp, 16
    0xb8, 0xe4, 0x00, 0x00, 0x00, // mov eax, SYS_clock_gettime
    0xbf, 0x01, 0x00, 0x00, 0x00, // mov edi, CLOCK_MONOTONIC
    0x48, 0x89, 0xe6, // mov rsi, rsp
    0x0f, 0x05, // syscall
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, SYS_write
    0xba, 0x10, 0x00, 0x00, 0x00, // mov edx, 16; edi is 1 still
    0x0f, 0x05, // syscall
    0xb8, 0x3c, 0x00, 0x00, 0x00, // mov eax, SYS_exit
    0x31, 0xff, // xor edi, edi
    0x0f, 0x05, // syscall
    0x0f, 0x0b, // ud2
];

/// Writes it to a file that anybody may run.
pub(crate) fn write(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(path, elf()).with_context(|| format!("write {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// The nanoseconds that it wrote.
pub(crate) fn began_ns(output: &[u8]) -> Option<u64> {
    let (seconds, nanoseconds) = output.split_at_checked(8)?;
    let seconds = u64::from_le_bytes(seconds.try_into().ok()?);
    Some(seconds * 1_000_000_000 + u64::from_le_bytes(nanoseconds.try_into().ok()?))
}

fn elf() -> Vec<u8> {
    let mut file = Vec::new();
    let length = HEADERS + CODE.len() as u64;
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    // ELF header: 64 bits, little-endian, an executable for x86-64.
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    half(&mut file, 2);
    half(&mut file, 62);
    file.extend(1_u32.to_le_bytes());
    for value in [BASE + HEADERS, 64, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for value in [64, 56, 1, 64, 0, 0] {
        half(&mut file, value);
    }
    // One segment, to be loaded, readable and executable.
    file.extend(1_u32.to_le_bytes());
    file.extend(5_u32.to_le_bytes());
    for value in [0, BASE, BASE, length, length, 0x1000] {
        file.extend(value.to_le_bytes());
    }
    file.extend(CODE);
    file
}
