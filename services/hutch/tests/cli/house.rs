//! Runs the binary in a directory of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::OnceLock;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A directory for one test, and the binary in it.
pub(crate) struct House {
    directory: tempfile::TempDir,
}

/// What a command came to.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl House {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("directory") }
    }

    /// A house whose host can run sandboxes; none, with the reason on stderr, if it cannot.
    pub(crate) fn with_sandboxes() -> Option<Self> {
        static REFUSAL: OnceLock<Option<String>> = OnceLock::new();
        let house = Self::new();
        let refusal = REFUSAL.get_or_init(|| {
            let doctor = house.hutch(&["doctor"]);
            (doctor.code != 0).then_some(doctor.stdout)
        });
        if let Some(reason) = refusal {
            eprintln!("skipped: no sandbox can be made here:\n{reason}");
            return None;
        }
        Some(house)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file; returns its path.
    pub(crate) fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).expect("write");
        path.to_str().expect("utf-8").to_owned()
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hutch"));
        command
            .args(arguments)
            .current_dir(self.directory.path())
            .env_remove("HUTCH_URL")
            .env_remove("HUTCH_LOG")
            .env("HUTCH__DATA_DIR", self.path("data"))
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn hutch(&self, arguments: &[&str]) -> Done {
        self.command(arguments).output().expect("run").into()
    }

    pub(crate) fn hutch_with_stdin(&self, arguments: &[&str], stdin: &[u8]) -> Done {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("spawn");
        child.stdin.take().expect("stdin").write_all(stdin).expect("write");
        child.wait_with_output().expect("run").into()
    }

    /// Starts a service and waits for the line that says it is ready.
    pub(crate) fn serve(&self, arguments: &[&str]) -> Served {
        self.serve_with(arguments, &[])
    }

    /// The same, with these variables.
    pub(crate) fn serve_with(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Served {
        let mut child = self
            .command(arguments)
            .envs(variables.iter().copied())
            .args(["--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("spawn");
        let mut stderr = BufReader::new(child.stderr.take().expect("stderr"));
        let mut line = String::new();
        stderr.read_line(&mut line).expect("line");
        let url = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap_or_else(|| {
            let mut rest = String::new();
            let _ = stderr.read_to_string(&mut rest);
            panic!("not ready: {line}{rest}")
        });
        let url = url.trim_end_matches("/metrics").to_owned();
        Served { child, stderr, url, ready: line.clone() }
    }
}

/// A service that runs; it is killed when it is dropped.
pub(crate) struct Served {
    child: Child,
    stderr: BufReader<ChildStderr>,
    pub(crate) url: String,
    /// The line that said it is ready.
    pub(crate) ready: String,
}

impl Served {
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("pid");
        kill(Pid::from_raw(pid), signal).expect("signal");
    }

    /// Waits for the end; returns the exit code and what was said after the ready line.
    pub(crate) fn end(mut self) -> (i32, String) {
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).expect("stderr");
        (self.child.wait().expect("ended").code().unwrap_or(-1), said)
    }

    /// Lines of stdout, as they come.
    pub(crate) fn stdout(&mut self) -> impl Iterator<Item = String> + use<> {
        let stdout = BufReader::new(self.child.stdout.take().expect("stdout"));
        stdout.lines().map_while(Result::ok)
    }

    /// What a path answers.
    pub(crate) fn get(&self, path: &str) -> String {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = format!("{}{path}", self.url);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async { reqwest::get(url).await.expect("answer").text().await.expect("text") })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a path is there.
pub(crate) fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}
