//! The whole suite, in the order in which things break: packages, formatting, architecture, lints, tests.

use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::{cargo, check, install, vm};

/// Where tests say what they could not do, a line each.
const SKIPPED: &str = "target/skipped.txt";

/// Runs everything; the first failure ends it.
pub(crate) fn run(long: bool) -> anyhow::Result<()> {
    let begun = Instant::now();
    install::packages(install::FOR_TESTS)?;
    install::tools();
    cargo(&["fmt", "--all", "--check"], &[])?;
    check::run()?;
    cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[])?;
    cargo(&["build", "--workspace"], &[])?;
    weak()?;
    let _ = fs::remove_file(SKIPPED);
    dependencies()?;
    let skipped = std::env::current_dir()?.join(SKIPPED);
    let skipped = skipped.to_string_lossy();
    let mut env = vec![("HUTCH_SKIPPED", &*skipped)];
    if long {
        env.push(("HUTCH_LONG_TESTS", "1"));
    }
    cargo(&["test", "--workspace", "--no-fail-fast"], &env)?;
    if long {
        vm::run(&[], false, false)?;
    } else {
        count_skipped(
            "the suites on cgroup v2 in a virtual machine: part of --long; `cargo xtask vm-test` runs them",
        )?;
    }
    let reasons = fs::read_to_string(SKIPPED).unwrap_or_default();
    eprintln!("\nall tests passed in {} s; {} skipped", begun.elapsed().as_secs(), reasons.lines().count());
    for reason in reasons.lines() {
        eprintln!("  skipped: {reason}");
    }
    Ok(())
}

/// Builds the binary with defences that can be taken away: alone, so that the feature is not unified into the product.
pub(crate) fn weak() -> anyhow::Result<()> {
    cargo(&["build", "--package", "hutch-weak", "--features", "weaken"], &[])
}

/// Counts what could not be tested, with its reason.
pub(crate) fn count_skipped(what: &str) -> anyhow::Result<()> {
    let mut file = fs::OpenOptions::new().create(true).append(true).open(SKIPPED)?;
    Ok(writeln!(file, "{what}")?)
}

/// Licences, sources and bans of all that is depended on, by cargo-deny (deny.toml), where it is installed.
fn dependencies() -> anyhow::Result<()> {
    let installed = Command::new("cargo-deny").arg("--version").stdout(Stdio::null()).status();
    if installed.is_ok_and(|status| status.success()) {
        return cargo(&["deny", "--log-level", "error", "check", "bans", "licenses", "sources"], &[]);
    }
    let reason = "licences and sources of what is depended on: cargo-deny is not installed\n";
    Ok(fs::write(SKIPPED, reason)?)
}
