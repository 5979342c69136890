//! Debian packages that the tests and the benchmark use.

use std::process::Command;

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
];

/// What the benchmark uses.
pub(crate) const FOR_BENCH: &[Package] =
    &[("busybox-static", "/bin/busybox"), ("bubblewrap", "/usr/bin/bwrap")];

/// Installs those of the packages that are missing. Services that they bring are not started.
pub(crate) fn packages(wanted: &[Package]) -> anyhow::Result<()> {
    let missing: Vec<_> = wanted
        .iter()
        .filter(|(_, file)| !std::path::Path::new(file).exists())
        .map(|(name, _)| *name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("installing {}", missing.join(", "));
    let install = [&["install", "--yes", "--quiet", "--no-install-recommends"], &missing[..]].concat();
    for args in [&["update", "--quiet"][..], &install] {
        let mut command = Command::new("apt-get");
        command.args(args).env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1");
        let status = command.stdout(std::process::Stdio::null()).status();
        let hint = || format!("run apt-get; install {} by hand", missing.join(" "));
        if !status.with_context(hint)?.success() {
            bail!("apt-get {} failed; run as root, or install {} by hand", args.join(" "), missing.join(" "));
        }
    }
    Ok(())
}
