//! The `hutch` binary in a directory of a test's own: commands that end, and services that serve until they are told
//! to end, or killed.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::OnceLock;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::processes::Process;

/// A directory for one test, and the binary in it.
#[derive(Debug)]
pub struct House {
    directory: tempfile::TempDir,
}

/// What a command came to.
#[derive(Debug)]
pub struct Done {
    /// Its exit code; -1 if a signal ended it.
    pub code: i32,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Done {
    /// What it wrote to stdout, as JSON.
    ///
    /// # Panics
    /// If it is none.
    #[must_use]
    pub fn json(&self) -> Value {
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
    /// An empty one.
    ///
    /// # Panics
    /// If there is no room for it.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it makes a directory, which a default should not")]
    pub fn new() -> Self {
        Self { directory: tempfile::Builder::new().prefix("hutch-test-").tempdir().expect("directory") }
    }

    /// A house whose host can run sandboxes; none, which is counted as a test that was skipped, if it cannot.
    #[must_use]
    pub fn with_sandboxes() -> Option<Self> {
        static REFUSAL: OnceLock<Option<String>> = OnceLock::new();
        let house = Self::new();
        let refusal = REFUSAL.get_or_init(|| {
            let doctor = house.hutch(&["doctor"]);
            (doctor.code != 0).then_some(doctor.stdout)
        });
        let Some(reason) = refusal else { return Some(house) };
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        let why: Vec<&str> = reason.lines().filter(|line| line.starts_with("FAIL")).collect();
        crate::skip(&test, &why.join("; "));
        None
    }

    /// Where something of this name is, or may be made.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file; returns its path.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).expect("write");
        path.to_str().expect("utf-8").to_owned()
    }

    /// A command of the binary that keeps all it keeps in this house.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_of(crate::hutch::binary(), arguments)
    }

    /// The same, of another binary.
    #[must_use]
    pub fn command_of(&self, binary: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary);
        command
            .args(arguments)
            .current_dir(self.directory.path())
            .env_remove("HUTCH_URL")
            .env_remove("HUTCH_LOG")
            .env("HUTCH__DATA_DIR", self.path("data"))
            .stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    ///
    /// # Panics
    /// If it cannot be run.
    #[must_use]
    pub fn hutch(&self, arguments: &[&str]) -> Done {
        self.command(arguments).output().expect("run").into()
    }

    /// The same, with something to read.
    ///
    /// # Panics
    /// If it cannot be run, or does not read.
    #[must_use]
    pub fn hutch_with_stdin(&self, arguments: &[&str], stdin: &[u8]) -> Done {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("spawn");
        child.stdin.take().expect("stdin").write_all(stdin).expect("write");
        child.wait_with_output().expect("run").into()
    }

    /// Starts a service and waits for the line that says it is ready.
    ///
    /// # Panics
    /// If it does not become ready.
    #[must_use]
    pub fn serve(&self, arguments: &[&str]) -> Served {
        self.serve_with(arguments, &[])
    }

    /// The same, with these variables.
    ///
    /// # Panics
    /// If it does not become ready.
    #[must_use]
    pub fn serve_with(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Served {
        let mut command = self.command(arguments);
        command.envs(variables.iter().copied());
        Served::start(command)
    }
}

/// A service that runs; it is killed when it is dropped.
#[derive(Debug)]
pub struct Served {
    child: Child,
    stderr: BufReader<ChildStderr>,
    /// Where it listens.
    pub url: String,
    /// The line that said it is ready.
    pub ready: String,
    http: Http,
}

impl Served {
    /// Starts a service, on a port that is free, and waits for the line that says it is ready.
    ///
    /// # Panics
    /// If it does not become ready.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        command.args(["--listen", "127.0.0.1:0"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
        let mut stderr = BufReader::new(child.stderr.take().expect("stderr"));
        let mut said = String::new();
        let (url, ready) = loop {
            let mut line = String::new();
            let more = stderr.read_line(&mut line).expect("line");
            assert!(more > 0, "it is not ready: {said}");
            if let Some(url) = line.split_whitespace().find(|word| word.starts_with("http://")) {
                break (url.trim_end_matches("/metrics").to_owned(), line);
            }
            said.push_str(&line);
        };
        Self { child, stderr, url, ready, http: Http::new() }
    }
}

/// A client of HTTP that waits for its answers.
#[derive(Debug)]
struct Http {
    runtime: tokio::runtime::Runtime,
    client: reqwest::Client,
}

impl Http {
    fn new() -> Self {
        // Whoever was first has installed the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        Self { runtime, client: reqwest::Client::new() }
    }

    fn text(&self, request: reqwest::RequestBuilder) -> String {
        let answer = async { request.send().await?.text().await };
        self.runtime.block_on(answer).expect("answer")
    }
}

impl Served {
    /// Sends it a signal.
    ///
    /// # Panics
    /// If it is gone.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("pid");
        kill(Pid::from_raw(pid), signal).expect("signal");
    }

    /// Its process.
    ///
    /// # Panics
    /// If it is gone.
    #[must_use]
    pub fn process(&self) -> Process {
        Process::of(self.child.id()).expect("a process")
    }

    /// Waits for the end; returns the exit code and what was said after the ready line.
    ///
    /// # Panics
    /// If it cannot be waited for.
    #[must_use]
    pub fn end(mut self) -> (i32, String) {
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).expect("stderr");
        (self.child.wait().expect("ended").code().unwrap_or(-1), said)
    }

    /// Lines of stdout, as they come.
    ///
    /// # Panics
    /// If they were asked for before.
    pub fn stdout(&mut self) -> impl Iterator<Item = String> + use<> {
        let stdout = BufReader::new(self.child.stdout.take().expect("stdout"));
        stdout.lines().map_while(Result::ok)
    }

    /// What a path answers.
    ///
    /// # Panics
    /// If nothing does.
    #[must_use]
    pub fn get(&self, path: &str) -> String {
        self.http.text(self.http.client.get(format!("{}{path}", self.url)))
    }

    /// What a path answers, as JSON.
    ///
    /// # Panics
    /// If nothing does, or it is no JSON.
    #[must_use]
    pub fn get_json(&self, path: &str) -> Value {
        let text = self.get(path);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}: {text}"))
    }

    /// What a path answers to this.
    ///
    /// # Panics
    /// If nothing does, or it is no JSON.
    #[must_use]
    pub fn post(&self, path: &str, body: &Value) -> Value {
        let text = self.http.text(self.http.client.post(format!("{}{path}", self.url)).json(body));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}: {text}"))
    }

    /// The status that a path answers to this body, said to be JSON. A service that closes the connection before it has
    /// read a body to its end has answered with 413.
    #[must_use]
    pub fn post_text(&self, path: &str, body: String) -> u16 {
        let request = self.http.client.post(format!("{}{path}", self.url));
        let request = request.header("content-type", "application/json").body(body);
        self.http
            .runtime
            .block_on(async { request.send().await })
            .map_or(413, |answer| answer.status().as_u16())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
