//! Suites in a virtual machine with cgroup v2 alone and the oldest kernel that hutch supports: `cargo xtask vm-test`.
//!
//! The suites are built here and run there: the guest sees this host's files read only (virtiofs), below an overlay in
//! its memory, so that it needs neither a compiler nor a root of its own. In order: packages, kernel, test programs,
//! the share for results, the guest; then what it wrote is read. A suite that wrote no status has failed, and so has
//! a guest that panics or hangs. qemu computes every instruction (TCG), so that it needs no rights and no KVM, and what
//! computes is 15 times slower than here.

mod guest;
mod kernel;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::{cargo, install, suite};

/// A test program that runs in the guest.
struct Suite {
    name: &'static str,
    /// For how many seconds at most; many times what it takes, so that only what hangs meets it.
    patience: u64,
    /// Arguments of the test program.
    args: &'static str,
    /// What of it is left out, and why.
    left_out: Option<&'static str>,
    /// Whether it runs with `--long` or by name alone.
    long: bool,
}

const SUITES: &[Suite] = &[
    Suite {
        name: "isolation",
        patience: 900,
        args: "--skip whatever_is_deleted_is_deleted_inside_alone",
        left_out: Some(
            "deleting all files: the daemon that shares them has each open that was ever looked at",
        ),
        long: false,
    },
    Suite { name: "verdicts", patience: 3600, args: "", left_out: None, long: true },
    Suite { name: "leftovers", patience: 1800, args: "", left_out: None, long: true },
    Suite { name: "kills", patience: 1800, args: "", left_out: None, long: true },
    Suite { name: "hostile", patience: 3600, args: "", left_out: None, long: true },
];

/// Where everything of the guest is.
const DIR: &str = "target/vm";

/// Runs suites in the guest: those that are named, or all that are not long.
///
/// # Errors
/// That a suite failed or did not end, or that there was no guest.
pub(crate) fn run(names: &[String], long: bool, shell: bool) -> anyhow::Result<()> {
    if let Some(unknown) = names.iter().find(|name| SUITES.iter().all(|suite| suite.name != name.as_str())) {
        let known: Vec<_> = SUITES.iter().map(|suite| suite.name).collect();
        bail!("no suite is called {unknown}; there are {}", known.join(", "));
    }
    let chosen = SUITES.iter().filter(|suite| {
        if names.is_empty() { long || !suite.long } else { names.iter().any(|name| name == suite.name) }
    });
    let chosen: Vec<_> = chosen.collect();
    let dir = std::env::current_dir()?.join(DIR);
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let kernel = match install::packages(install::FOR_VM)
        .and_then(|()| kernel::get(&dir, include_str!("vm/init.sh")))
    {
        Ok(kernel) => kernel,
        Err(error) => return skip(&format!("the suites on cgroup v2 in a virtual machine: {error:#}")),
    };
    let share = dir.join("share");
    let _ = fs::remove_dir_all(&share);
    fs::create_dir_all(&share).with_context(|| format!("create {}", share.display()))?;
    let patience = prepare(&share, &chosen, long, shell)?;
    let begun = Instant::now();
    let ended = guest::boot(&kernel, &dir, &share, patience, shell);
    report(&share, &chosen, shell, &ended)?;
    if !shell {
        eprintln!("vm: all suites passed in {} s", begun.elapsed().as_secs());
    }
    for suite in &chosen {
        if let Some(why) = suite.left_out {
            skip(&format!("vm, {}: {why}", suite.name))?;
        }
    }
    for suite in SUITES.iter().filter(|suite| names.is_empty() && suite.long && !long) {
        skip(&format!(
            "vm, {}: it is long where qemu computes every instruction; --long runs it",
            suite.name
        ))?;
    }
    Ok(())
}

/// Builds what runs in the guest, and writes down what it shall do; gives how long that may take.
fn prepare(share: &Path, chosen: &[&Suite], long: bool, shell: bool) -> anyhow::Result<Duration> {
    cargo(&["build", "--package", "hutch"], &[])?;
    suite::weak()?;
    let binaries = binaries(chosen)?;
    compile_programs(&share.join("programs"))?;
    let target = std::env::current_dir()?.join("target");
    let binary = |name: &str| target.join("debug").join(name).display().to_string();
    let mut env = String::new();
    for (name, value) in [
        ("HUTCH_BIN", binary("hutch")),
        ("HUTCH_WEAK_BIN", binary("hutch-weak")),
        ("HUTCH_TEST_PROGRAMS", "/run/tmp/programs".to_owned()),
        ("HUTCH_SKIPPED", "/run/vm/skipped".to_owned()),
        ("HUTCH_HOSTILE_TABLE", "/run/vm/hostile-table".to_owned()),
        ("RUST_BACKTRACE", "1".to_owned()),
        ("VM_SHELL", if shell { "1" } else { "" }.to_owned()),
        ("HUTCH_LONG_TESTS", if long { "1" } else { "" }.to_owned()),
    ] {
        if !value.is_empty() {
            env.push_str(&format!("export {name}='{value}'\n"));
        }
    }
    // What narrows a suite on the host does so in the guest.
    for (name, value) in std::env::vars().filter(|(name, _)| name == "HUTCH_ROWS" || name == "RUST_LOG") {
        env.push_str(&format!("export {name}='{}'\n", value.replace('\'', "'\\''")));
    }
    let tests = std::env::current_dir()?.join("tests");
    let mut list = String::new();
    for suite in chosen {
        let program = binaries.get(suite.name).with_context(|| format!("cargo built no {}", suite.name))?;
        let (name, patience, args) = (suite.name, suite.patience, suite.args);
        list.push_str(&format!("{name} {patience} {} {} {args}\n", tests.display(), program.display()));
    }
    fs::write(share.join("env"), env)?;
    fs::write(share.join("suites"), list)?;
    fs::write(share.join("guest.sh"), include_str!("vm/guest.sh"))?;
    let suites: u64 = chosen.iter().map(|suite| suite.patience + 10).sum();
    Ok(Duration::from_secs(120 + suites))
}

/// Builds the test programs, and says where they are.
fn binaries(chosen: &[&Suite]) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let mut command = Command::new(env!("CARGO"));
    command.args([
        "test",
        "--no-run",
        "--message-format=json-render-diagnostics",
        "--package",
        "hutch-tests",
        "--bins",
    ]);
    for suite in chosen {
        command.args(["--test", suite.name]);
    }
    let built = command.stderr(Stdio::inherit()).output().context("start cargo")?;
    if !built.status.success() {
        bail!("the suites cannot be built: {}", built.status);
    }
    let mut found = BTreeMap::new();
    for line in String::from_utf8_lossy(&built.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("read a message of cargo")?;
        let (target, program) = (&message["target"], message["executable"].as_str());
        if let (Some(name), Some(program)) = (target["name"].as_str(), program)
            && target["kind"][0] == "test"
        {
            found.insert(name.to_owned(), program.into());
        }
    }
    Ok(found)
}

/// Compiles the tests' programs in C, for a guest without a compiler.
fn compile_programs(into: &Path) -> anyhow::Result<()> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["run", "--quiet", "--package", "hutch-tests", "--bin", "test_programs"]);
    let made = command.stderr(Stdio::inherit()).output().context("start cargo")?;
    let made_at = String::from_utf8_lossy(&made.stdout);
    if !made.status.success() {
        bail!("the tests' programs cannot be compiled: {}", made.status);
    }
    let copied = Command::new("cp").args(["--recursive", made_at.trim()]).arg(into).status();
    if copied.context("start cp")?.success() { Ok(()) } else { bail!("{} cannot be copied", made_at.trim()) }
}

/// Reads what the guest wrote: every suite must have ended, and well.
fn report(share: &Path, chosen: &[&Suite], shell: bool, ended: &anyhow::Result<()>) -> anyhow::Result<()> {
    let status = fs::read_to_string(share.join("status")).unwrap_or_default();
    let mut faults = Vec::new();
    for name in chosen.iter().map(|suite| suite.name).filter(|_| !shell) {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        match line.and_then(|line| line.split_once(' ')) {
            Some(("0", seconds)) => eprintln!("vm: {name} passed in {seconds} s"),
            Some(("124" | "137", seconds)) => faults.push(format!("{name} did not end in {seconds} s")),
            Some((code, _)) => faults.push(format!("{name} failed with {code}")),
            None => faults.push(format!("{name} did not end")),
        }
    }
    let skipped = fs::read_to_string(share.join("skipped")).unwrap_or_default();
    for line in skipped.lines() {
        suite::count_skipped(&format!("vm, {line}"))?;
    }
    if let Err(error) = ended {
        faults.push(format!("{error:#}"));
    }
    if faults.is_empty() { Ok(()) } else { bail!("in the virtual machine: {}", faults.join("; ")) }
}

/// Says aloud what is not tested.
fn skip(what: &str) -> anyhow::Result<()> {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {what}");
    suite::count_skipped(what)
}
