//! The `hutch` binary, run as a user runs it.
//!
//! [`binary`] builds it once for each test program, so that no test meets an old one. [`Home`] is a data
//! directory of the tests' own; [`Home::run`] gives `hutch run --json` a spec and reads the result.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use hutch_proto::JobResult;
use serde_json::Value;

/// Longer than any job of the tests takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The binary under test: `HUTCH_BIN`, or what cargo builds of this workspace.
///
/// # Panics
/// If it cannot be built.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("HUTCH_BIN") {
            return path.into();
        }
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["build", "--quiet", "--package", "hutch"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        let built = cargo.output().expect("start cargo");
        assert!(built.status.success(), "hutch cannot be built:\n{}", String::from_utf8_lossy(&built.stderr));
        // This program is target/PROFILE/deps/NAME-HASH.
        let own = std::env::current_exe().expect("own path");
        own.ancestors().nth(2).expect("target directory").join("hutch")
    })
}

/// The binary with defences that can be taken away: `HUTCH_WEAK_BIN`, or what `cargo xtask weak` has built.
///
/// # Errors
/// That there is none, or that it is older than what it is made of.
pub fn weak_binary() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("HUTCH_WEAK_BIN") {
        return Ok(path.into());
    }
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let weak = own.ancestors().nth(2).ok_or("no target directory")?.join("hutch-weak");
    let missing = |e: std::io::Error| format!("hutch-weak: {e}; `cargo xtask weak` builds it");
    let made = weak.metadata().and_then(|meta| meta.modified()).map_err(missing)?;
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
    let newest = ["sandbox", "sandbox-sys"].map(|name| newest(&crates.join(name).join("src")));
    if newest.into_iter().flatten().any(|changed| changed > made) {
        return Err("hutch-weak is older than its sources; `cargo xtask weak` builds it".to_owned());
    }
    Ok(weak)
}

/// When a file below a directory was changed last.
fn newest(dir: &Path) -> Option<std::time::SystemTime> {
    let entries = std::fs::read_dir(dir).ok()?.flatten();
    let times = entries.filter_map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => newest(&entry.path()),
        _ => entry.metadata().and_then(|meta| meta.modified()).ok(),
    });
    times.max()
}

/// Whether sandboxes can be made here; if not, says so, and the test is skipped.
pub fn can_run(test: &str) -> bool {
    let root = std::fs::read_to_string("/proc/self/status")
        .is_ok_and(|status| status.lines().any(|line| line.starts_with("Uid:\t0\t")));
    if !root {
        crate::skip(test, "only root can make cgroups and mounts here");
    }
    root
}

/// A data directory, and the jobs that are run on it.
#[derive(Debug)]
pub struct Home {
    dir: tempfile::TempDir,
}

/// What came of a command.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended; none if it had to be killed.
    pub status: Option<ExitStatus>,
    /// What it wrote to stdout.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Home {
    /// An empty one.
    ///
    /// # Panics
    /// If there is no room for it.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it makes a directory, which a default should not")]
    pub fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("hutch-test-").tempdir().expect("data directory") }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// `hutch run --json` of a spec that comes on stdin.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(binary());
        command.args(["run", "--json", "--data"]).arg(self.path()).arg("-");
        // What the tests were started with is neither the jobs' nor a config.
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).current_dir("/");
        command
    }

    /// Runs a job and reads its result.
    ///
    /// # Errors
    /// Whatever came in place of one result.
    pub fn run(&self, spec: &Value) -> Result<JobResult, String> {
        self.run_with(self.command(), spec)
    }

    /// Runs a job by a command that [`Home::command`] began.
    ///
    /// # Errors
    /// Whatever came in place of one result.
    pub fn run_with(&self, command: Command, spec: &Value) -> Result<JobResult, String> {
        let outcome = finish(start(command, spec), PATIENCE);
        result_of(&outcome)
    }
}

/// A command that runs, and the files that its output goes to.
#[derive(Debug)]
pub struct Started {
    /// The process.
    pub child: Child,
    stdout: File,
    stderr: File,
}

/// Starts a command with a spec on its stdin.
///
/// # Panics
/// If it cannot be started.
#[must_use]
pub fn start(mut command: Command, spec: &Value) -> Started {
    // Files, since nobody has to read them for the command to go on.
    let file = || tempfile::tempfile().expect("temporary file");
    let (mut stdin, stdout, stderr) = (file(), file(), file());
    stdin.write_all(spec.to_string().as_bytes()).expect("write the spec");
    stdin.rewind().expect("rewind");
    let clone = |file: &File| Stdio::from(file.try_clone().expect("clone a file"));
    let child = command.stdin(stdin).stdout(clone(&stdout)).stderr(clone(&stderr)).spawn();
    Started { child: child.expect("start hutch"), stdout, stderr }
}

/// Waits for a command, for so long at most.
///
/// # Panics
/// If it cannot be waited for.
#[must_use]
pub fn finish(mut started: Started, patience: Duration) -> Outcome {
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = started.child.try_wait().expect("wait") {
            break Some(status);
        }
        if begun.elapsed() > patience {
            let _ = started.child.kill();
            let _ = started.child.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(3));
    };
    let read = |mut file: File| {
        let mut bytes = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("read the output");
        bytes
    };
    let stderr = String::from_utf8_lossy(&read(started.stderr)).into_owned();
    Outcome { status, stdout: read(started.stdout), stderr }
}

/// The one result that `--json` promises.
///
/// # Errors
/// Whatever came in its place.
pub fn result_of(outcome: &Outcome) -> Result<JobResult, String> {
    let Outcome { status, stdout, stderr } = outcome;
    match status {
        None => return Err(format!("hutch did not end in time; stderr: {stderr}")),
        Some(status) if !status.success() => return Err(format!("hutch: {status}; stderr: {stderr}")),
        Some(_) => {}
    }
    serde_json::from_slice(stdout)
        .map_err(|e| format!("stdout is no JobResult: {e}: {}", String::from_utf8_lossy(stdout)))
}
