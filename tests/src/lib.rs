//! End-to-end tests of hutch; see the `tests` folder of this crate. What they share is here.

pub mod broker;
pub mod house;
pub mod hutch;
pub mod person;
pub mod processes;
pub mod programs;
pub mod proxy;
pub mod tools;

/// Says aloud what could not be tested here and why: on stderr, and in the file that `HUTCH_SKIPPED` names,
/// where the test command counts the lines.
pub fn skip(what: &str, why: &str) {
    use std::io::Write as _;
    let line = format!("{what}: {why}\n");
    eprint!("SKIPPED: {line}");
    let Some(path) = std::env::var_os("HUTCH_SKIPPED") else { return };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    // One write of a line that is appended: lines of several processes do not mix.
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    if let Err(error) = written {
        eprintln!("SKIPPED: this could not be counted: {error}");
    }
}

/// Shows the logs of what is tested, as `RUST_LOG` asks for.
pub fn log() {
    let logs = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_test_writer()
        .try_init();
    // Another test of this process has done so before.
    drop(logs);
}

/// Whether the owners of the files there can be mapped by a mount: mount_setattr(2). File systems that hand on another's
/// files (an overlay, what a network or a virtual machine's host shares) cannot.
#[must_use]
pub fn has_idmapped_mounts(path: &std::path::Path) -> bool {
    use nix::sys::statfs::{FUSE_SUPER_MAGIC, NFS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, statfs};
    let without = [FUSE_SUPER_MAGIC, NFS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC];
    statfs(path).is_ok_and(|found| !without.contains(&found.filesystem_type()))
}

/// The version of the kernel, its first two numbers: uname(2).
///
/// # Panics
/// If the kernel has no version.
#[must_use]
pub fn kernel() -> (u32, u32) {
    let name = nix::sys::utsname::uname().expect("uname");
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers =
        release.split(|other: char| !other.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}
