//! What the tests and the benchmark use: Debian packages, and tools from PyPI.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

/// A package, and a file that shows that it is there.
type Package = (&'static str, &'static str);

/// What the tests use.
pub(crate) const FOR_TESTS: &[Package] = &[
    ("rabbitmq-server", "/usr/lib/rabbitmq/bin/rabbitmq-server"),
    ("python3-pika", "/usr/lib/python3/dist-packages/pika/__init__.py"),
    ("python3-minimal", "/usr/bin/python3"),
    ("busybox-static", "/bin/busybox"),
    ("gcc", "/usr/bin/gcc"),
    ("libc6-dev", "/usr/include/stdio.h"),
    ("python3-venv", "/usr/share/doc/python3-venv"),
    ("stress-ng", "/usr/bin/stress-ng"),
    ("zstd", "/usr/bin/zstd"),
    ("strace", "/usr/bin/strace"),
    ("umoci", "/usr/bin/umoci"),
    ("skopeo", "/usr/bin/skopeo"),
    ("docker-registry", "/usr/bin/docker-registry"),
    ("prometheus", "/usr/bin/promtool"),
    ("e2fsprogs", "/usr/sbin/mkfs.ext4"),
    ("passt", "/usr/bin/pasta"),
    ("nftables", "/usr/sbin/nft"),
    ("iproute2", "/usr/sbin/ip"),
];

/// What the virtual machine uses.
pub(crate) const FOR_VM: &[Package] = &[
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    ("busybox-static", "/bin/busybox"),
    ("e2fsprogs", "/sbin/mkfs.ext4"),
];

/// Tools from PyPI for the tests: the command, and what pip installs.
const TOOLS: &[(&str, &str)] = &[("cepheus", "cepheus-engine==1.1.1")];

/// What the benchmark uses.
pub(crate) const FOR_BENCH: &[Package] = &[
    ("busybox-static", "/bin/busybox"),
    ("bubblewrap", "/usr/bin/bwrap"),
    ("crun", "/usr/bin/crun"),
    ("runc", "/usr/sbin/runc"),
];

/// Installs those of the packages that are missing. Services that they bring are not started.
pub(crate) fn packages(wanted: &[Package]) -> anyhow::Result<()> {
    let missing: Vec<_> =
        wanted.iter().filter(|(_, file)| !Path::new(file).exists()).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("installing {}", missing.join(", "));
    let install = [&["install", "--yes", "--quiet", "--no-install-recommends"], &missing[..]].concat();
    for args in [&["update", "--quiet"][..], &install] {
        let mut command = Command::new("apt-get");
        command.args(args).env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1");
        let status = command.stdout(Stdio::null()).status();
        let hint = || format!("run apt-get; install {} by hand", missing.join(" "));
        if !status.with_context(hint)?.success() {
            bail!("apt-get {} failed; run as root, or install {} by hand", args.join(" "), missing.join(" "));
        }
    }
    Ok(())
}

/// Installs those of the tools that are missing, each in a virtual environment of its own in `target/tools`. One that
/// cannot be had is no failure: the tests that use it say that they were skipped.
pub(crate) fn tools() {
    for (command, wanted) in TOOLS {
        let home = Path::new("target/tools").join(command);
        if home.join("bin").join(command).exists() {
            continue;
        }
        eprintln!("installing {wanted}");
        let made = Command::new("python3").args(["-m", "venv"]).arg(&home).stdout(Stdio::null()).status();
        let installed = made.is_ok_and(|status| status.success())
            && Command::new(home.join("bin/pip"))
                .args(["install", "--quiet", "--disable-pip-version-check", wanted])
                .status()
                .is_ok_and(|status| status.success());
        if !installed {
            eprintln!("{wanted} cannot be installed; what needs it is skipped");
        }
    }
}
