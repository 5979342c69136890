//! What developers run: `cargo xtask test`, `vm-test`, `weak`, `threat-table`, `check`, `bench`, `schema`, `fuzz`.

mod check;
mod install;
mod suite;
mod threat_table;
mod vm;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "The project's own tasks", arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing, then run formatting, lints, architecture checks and every test
    Test {
        /// Run the long forms of soaks too
        #[arg(long)]
        long: bool,
    },
    /// Run suites in a virtual machine with Debian's kernel and cgroup v2 alone
    VmTest {
        /// Which suites; all but the long ones if none is named
        suites: Vec<String>,
        /// Run what takes long too
        #[arg(long)]
        long: bool,
        /// A shell in the guest in place of suites
        #[arg(long)]
        shell: bool,
    },
    /// Build the binary with defences that can be taken away, which the hostile tests use
    Weak,
    /// Merge what the hostile tests wrote (HUTCH_HOSTILE_TABLE) into docs/threat-model.md
    ThreatTable {
        /// Files with a line of JSON for each attack
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Check who imports whom, and where unsafe code is
    Check,
    /// Compare fresh sandboxes with a bare spawn, bubblewrap, crun and runc, in one interleaved run
    Bench {
        /// Arguments for the benchmark, such as `--rounds 2000`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Write what is generated anew: the JSON Schemas of proto/schema, docs/system-calls.md
    Schema,
    /// Fuzz the spec parser for a while (needs cargo-fuzz)
    Fuzz {
        /// For how many seconds
        #[arg(default_value_t = 60)]
        seconds: u32,
    },
}

/// Runs cargo, with environment variables on top.
fn cargo(args: &[&str], env: &[(&str, &str)]) -> anyhow::Result<()> {
    let mut command = Command::new(env!("CARGO"));
    command.args(args).envs(env.iter().copied());
    let status = command.status().context("start cargo")?;
    if !status.success() {
        bail!("`cargo {}` failed: {status}", args.join(" "));
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    match Args::parse().task {
        Task::Test { long } => suite::run(long),
        Task::VmTest { suites, long, shell } => vm::run(&suites, long, shell),
        Task::Weak => suite::weak(),
        Task::ThreatTable { files } => threat_table::merge(&files),
        Task::Check => check::run(),
        Task::Bench { args } => {
            install::packages(install::FOR_BENCH)?;
            cargo(&["build", "--release", "--package", "hutch-bench", "--package", "hutch"], &[])?;
            // crun refuses a host that has both versions of cgroups: the second is hidden from the whole run.
            let script = "umount /sys/fs/cgroup/unified 2> /dev/null; exec target/release/hutch-bench \"$@\"";
            let status =
                Command::new("unshare").args(["--mount", "sh", "-c", script, "bench"]).args(args).status()?;
            if status.success() { Ok(()) } else { bail!("the benchmark failed: {status}") }
        }
        Task::Schema => {
            let update = [("HUTCH_UPDATE_SCHEMAS", "1")];
            cargo(&["test", "--package", "hutch-proto", "--test", "spec", "schema_on_file"], &update)?;
            cargo(&["test", "--package", "hutch-sandbox", "--lib", "the_document_says"], &update)
        }
        Task::Fuzz { seconds } => {
            let time = format!("-max_total_time={seconds}");
            let args = ["fuzz", "run", "--fuzz-dir", "proto/fuzz", "job_spec", "--", &time];
            cargo(&args, &[("RUSTC_BOOTSTRAP", "1")])
        }
    }
}
