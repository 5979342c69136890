//! The whole suite, in the order in which things break: packages, formatting, architecture, lints, tests.

use std::fs;
use std::time::Instant;

use crate::{cargo, check, install};

/// Where tests say what they could not do, a line each.
const SKIPPED: &str = "target/skipped.txt";

/// Runs everything; the first failure ends it.
pub(crate) fn run(long: bool) -> anyhow::Result<()> {
    let begun = Instant::now();
    install::packages(install::FOR_TESTS)?;
    cargo(&["fmt", "--all", "--check"], &[])?;
    check::run()?;
    cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[])?;
    cargo(&["build", "--workspace"], &[])?;
    let _ = fs::remove_file(SKIPPED);
    let skipped = std::env::current_dir()?.join(SKIPPED);
    let skipped = skipped.to_string_lossy();
    let mut env = vec![("HUTCH_SKIPPED", &*skipped)];
    if long {
        env.push(("HUTCH_LONG_TESTS", "1"));
    }
    cargo(&["test", "--workspace", "--no-fail-fast"], &env)?;
    let reasons = fs::read_to_string(SKIPPED).unwrap_or_default();
    eprintln!("\nall tests passed in {} s; {} skipped", begun.elapsed().as_secs(), reasons.lines().count());
    for reason in reasons.lines() {
        eprintln!("  skipped: {reason}");
    }
    Ok(())
}
