//! Others that isolate a program, each run as its users run it: a command, waited for.
//!
//! Each is given the same root file system and the same program. What isn't installed is left out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use serde_json::Value;

/// Another that can be measured beside us.
pub(crate) struct Peer {
    /// Its name.
    pub(crate) name: &'static str,
    /// What it does for it.
    pub(crate) does: &'static str,
    /// What it says of its version.
    pub(crate) version: String,
    command: Box<dyn Fn(usize) -> Command + Sync>,
}

impl Peer {
    /// Runs the program once, for the client of this number. Some runtimes fail now and then with a program that ends as
    /// soon as it begins: they get another try, whose time is counted too.
    pub(crate) fn run(&self, client: usize) -> anyhow::Result<()> {
        run(&mut (self.command)(client)).or_else(|_| run(&mut (self.command)(client)))
    }
}

/// The bare spawn, and those of the peers that are here.
pub(crate) fn all(dir: &Path, root: &Path, program: &str, hutch: Option<&Path>) -> anyhow::Result<Vec<Peer>> {
    let own = root.join(program.trim_start_matches('/'));
    let mut peers = vec![Peer {
        name: "bare spawn",
        does: "nothing",
        version: String::new(),
        command: Box::new(move |_| Command::new(&own)),
    }];
    if let Some(version) = version("bwrap") {
        peers.push(bubblewrap(version, root, program));
    }
    for (name, program_of) in [("crun", "crun"), ("runc", "runc")] {
        let Some(version) = version(program_of) else { continue };
        let bundle = bundle(dir, root, program, name)?;
        peers.push(Peer {
            name,
            does: "OCI's default: 6 namespaces, cgroup; no user namespace, no seccomp, no init, read-only root",
            version,
            command: Box::new(move |client| runtime(program_of, &bundle, client)),
        });
    }
    if let Some(hutch) = hutch {
        peers.push(alone(hutch.to_owned(), root, program));
    }
    Ok(peers)
}

fn bubblewrap(version: String, root: &Path, program: &str) -> Peer {
    let (root, program) = (root.to_owned(), program.to_owned());
    Peer {
        name: "bubblewrap",
        does: "6 namespaces; no cgroup, no seccomp, read-only root",
        version,
        command: Box::new(move |_| {
            let mut command = Command::new("bwrap");
            command.args(["--unshare-all", "--die-with-parent", "--ro-bind"]).arg(&root).arg("/");
            command.args(["--dev", "/dev", "--proc", "/proc", &program]);
            command
        }),
    }
}

/// Our own command, as a whole process: launcher, engine and all are started for the one job.
fn alone(hutch: PathBuf, root: &Path, program: &str) -> Peer {
    let (layer, program) = (format!("dir:{}", root.display()), program.to_owned());
    Peer {
        name: "hutch run",
        does: "everything, as a command",
        version: String::new(),
        command: Box::new(move |_| {
            let mut command = Command::new(&hutch);
            command.args(["run", "--layer", &layer, "--", &program]);
            command
        }),
    }
}

fn runtime(name: &str, bundle: &Path, client: usize) -> Command {
    let mut command = Command::new(name);
    command.args(["run", "--bundle"]).arg(bundle).arg(format!("hutch-bench-{}-{client}", std::process::id()));
    command
}

/// A directory as the OCI runtimes want it, with the runtime's own default spec for our program.
fn bundle(dir: &Path, root: &Path, program: &str, name: &str) -> anyhow::Result<PathBuf> {
    let bundle = dir.join(name);
    fs::create_dir_all(&bundle)?;
    let made = Command::new(name).arg("spec").current_dir(&bundle).status();
    if !made.with_context(|| format!("{name} spec"))?.success() {
        bail!("{name} spec failed");
    }
    let path = bundle.join("config.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(&path)?)?;
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = vec![program].into();
    spec["root"]["path"] = root.to_string_lossy().into();
    fs::write(&path, spec.to_string())?;
    Ok(bundle)
}

/// The first line of what a program says of its version; none if it isn't here.
fn version(program: &str) -> Option<String> {
    let said = Command::new(program).arg("--version").stderr(Stdio::null()).output().ok()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    Some(said.lines().next().unwrap_or_default().to_owned())
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}
