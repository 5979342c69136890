//! Verdicts that depend on what happens outside the sandbox: cancelling, a host in need, the state that hutch itself was
//! started in, and what a worker's config allows.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hutch_proto::{JobResult, Reason, Status};
use hutch_tests::hutch::{Home, PATIENCE, can_run, finish, result_of, start};
use hutch_tests::processes::Process;
use hutch_tests::programs::{self, Program};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

fn shell(script: &str, limits: Value) -> Value {
    json!({"layers": ["host"], "command": ["sh", "-c", script], "limits": limits})
}

/// Runs a job, and sends hutch a signal once the job's program runs for a moment.
fn cancelled_by(signal: Signal, spec: &Value) -> JobResult {
    let home = Home::new();
    let started = start(home.command(), spec);
    let hutch = Process::of(started.child.id()).unwrap();
    // hutch, its launcher, init, the program, its child.
    let begun = Instant::now();
    while hutch.descendants().len() < 4 && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(300));
    kill(Pid::from_raw(hutch.pid.try_into().unwrap()), signal).unwrap();
    let outcome = finish(started, PATIENCE);
    result_of(&outcome).unwrap()
}

#[test]
fn a_job_that_is_called_off_is_cancelled() {
    if !can_run("cancelling") {
        return;
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let result = cancelled_by(signal, &shell("sleep 100; echo survived", json!({})));
        assert_eq!(
            (result.status, result.reason),
            (Status::Cancelled, Some(Reason::Requested)),
            "{result:?}"
        );
        assert_eq!(
            (result.exit_code, result.signal.as_deref(), &result.limit),
            (None, Some("SIGKILL"), &None)
        );
        assert!(result.usage.wall_time_ms < 60_000);
    }
}

#[test]
fn a_job_that_is_called_off_has_its_grace() {
    if !can_run("cancelling with grace") {
        return;
    }
    let script = "trap 'echo bye; exit 5' TERM; sleep 100 & wait";
    let result = cancelled_by(Signal::SIGINT, &shell(script, json!({"kill_grace_ms": 30_000})));
    assert_eq!((result.status, result.reason), (Status::Cancelled, Some(Reason::Requested)), "{result:?}");
    assert_eq!((result.exit_code, &result.stdout.data[..]), (Some(5), &b"bye\n"[..]));
    let result =
        cancelled_by(Signal::SIGINT, &shell("trap '' TERM; sleep 100", json!({"kill_grace_ms": 500})));
    assert_eq!((result.status, result.signal.as_deref()), (Status::Cancelled, Some("SIGKILL")), "{result:?}");
    // A grace that runs already is no reason not to hear.
    let limits = json!({"wall_time_ms": 300, "kill_grace_ms": 100_000});
    let result = cancelled_by(Signal::SIGINT, &shell("trap '' TERM; sleep 100", limits));
    assert_eq!(result.reason, Some(Reason::WallTime), "{result:?}");
    assert!(result.usage.wall_time_ms < 30_000, "{result:?}");
}

/// A cgroup of v1's memory controller below this process's own; removed with it.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new(bytes: u64) -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let below = own.lines().find_map(|line| line.split_once(":memory:"))?.1;
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let line = mounts.lines().find(|line| line.contains(" - cgroup ") && line.ends_with(",memory"))?;
        let mut fields = line.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let below = below.strip_prefix(root.trim_end_matches('/')).unwrap_or(below);
        let parent = Path::new(point).join(below.trim_start_matches('/'));
        let group = Self(parent.join(format!("outer-{}", std::process::id())));
        fs::create_dir(&group.0).ok()?;
        fs::write(group.0.join("memory.limit_in_bytes"), bytes.to_string()).ok()?;
        Some(group)
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let begun = Instant::now();
        while fs::remove_dir(&self.0).is_err() && begun.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn memory_that_runs_out_around_the_worker_is_the_host_s_fault() {
    if !can_run("memory around the worker") {
        return;
    }
    let Some(probe) = programs::layer() else { return };
    let Some(group) = MemoryGroup::new(192 << 20) else {
        hutch_tests::skip("memory around the worker", "there is no memory controller of cgroup v1 here");
        return;
    };
    let home = Home::new();
    let run = |memory_bytes: u64| {
        let inner = home.command();
        let mut outer = Command::new("sh");
        outer.args(["-c", "echo 0 > \"$0/tasks\" && exec \"$@\""]).arg(&group.0);
        outer.arg(inner.get_program()).args(inner.get_args()).current_dir("/");
        let spec = json!({
            "layers": ["host", format!("dir:{}", probe.display())],
            "command": [programs::inside(Program::Probe), "map", "600"],
            "limits": {"memory_bytes": memory_bytes},
        });
        home.run_with(outer, &spec).unwrap()
    };
    let result = run(1 << 30);
    assert_eq!((result.status, result.reason), (Status::InfraError, Some(Reason::HostError)), "{result:?}");
    assert_eq!((result.exit_code, result.signal.as_deref(), &result.limit), (None, None, &None));
    let result = run(64 << 20);
    assert_eq!(result.reason, Some(Reason::Memory), "its own limit still is its own: {result:?}");
}

/// Runs a job by a hutch that a shell's script has started, by way of `exec "$@"`.
fn run_from(script: &str, spec: &Value) -> JobResult {
    let home = Home::new();
    let inner = home.command();
    let mut outer = Command::new("bash");
    outer.args(["-c", script, "bash"]).arg(inner.get_program()).args(inner.get_args()).current_dir("/");
    home.run_with(outer, spec).unwrap()
}

#[test]
fn signals_that_hutch_ignores_still_end_programs() {
    if !can_run("ignored signals") {
        return;
    }
    for name in ["HUP", "INT", "QUIT", "TERM", "PIPE", "USR1", "XCPU"] {
        let script = "trap '' HUP INT QUIT TERM PIPE USR1 XCPU; exec \"$@\"";
        let result = run_from(script, &shell(&format!("kill -{name} $$; exit 0"), json!({})));
        assert_eq!(result.signal, Some(format!("SIG{name}")), "{}", result.message);
    }
    // With SIGCHLD ignored, children go without a word to who waits for them.
    let script = "python3 -c 'import os, signal, sys\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nos.execv(sys.argv[1], sys.argv[1:])' \"$@\"";
    let result = run_from(script, &shell("sh -c 'exit 3'; exit $?", json!({"wall_time_ms": 20_000})));
    assert_eq!(result.exit_code, Some(3), "{}", result.message);
}

#[test]
fn what_hutch_was_started_with_is_not_the_program_s() {
    if !can_run("inherited state") {
        return;
    }
    let script = "umask 077; exec 7< /etc/passwd 8< /; cd /tmp; export SECRET=secret; exec \"$@\"";
    let result = run_from(
        script,
        &shell(
            "umask; (ls /proc/$$/fd > fds); wc -l < fds; pwd; env | grep -c SECRET; touch x; stat -c %a x",
            json!({}),
        ),
    );
    assert_eq!(
        String::from_utf8_lossy(&result.stdout.data),
        "0022\n3\n/home/job\n0\n644\n",
        "{}",
        result.message
    );
}

#[test]
fn resource_limits_of_hutch_s_own_are_not_the_program_s() {
    if !can_run("inherited resource limits") {
        return;
    }
    let script = "ulimit -S -t 4 -c 0 -u 50 -d 500000; exec \"$@\"";
    let spin = "import time\nwhile time.process_time() < 4.6: pass\nprint('done')";
    let spec = json!({"layers": ["host"], "command": ["python3", "-c", spin]});
    let result = run_from(script, &spec);
    assert_eq!(
        (result.status, &result.stdout.data[..]),
        (Status::Succeeded, &b"done\n"[..]),
        "{}",
        result.message
    );
}

/// Runs a job by a worker's rules, where nothing is allowed but what lies below this directory.
fn by_the_rules(spec: &Value, allowed: Option<&Path>) -> JobResult {
    let home = Home::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine_loop"));
    command.arg("once").arg(home.path()).arg(spec.to_string()).args(allowed).stdin(Stdio::null());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_worker_allows_what_its_config_says() {
    if !can_run("what a config allows") {
        return;
    }
    let Some(programs) = programs::layer() else { return };
    let dir = crate::fixture("allowed");
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir_all(dir.join("data")).unwrap();
    fs::write(dir.join("data/x"), "seen").unwrap();
    fs::create_dir_all(dir.join("layer/box/bin")).unwrap();
    fs::copy(programs.join("box/bin/probe"), dir.join("layer/box/bin/probe")).unwrap();
    std::os::unix::fs::symlink("/etc", dir.join("out")).unwrap();
    let neighbour = crate::fixture("allowed-not");
    let layer = format!("dir:{}/layer", dir.display());
    let job = |layer: &str, volume: Option<&Path>| {
        let volumes: Vec<_> = volume.iter().map(|path| json!({"host_path": path, "target": "/v"})).collect();
        json!({"layers": [layer], "command": ["/box/bin/probe", "show", "/v/x"], "volumes": volumes})
    };
    let refused = |spec: &Value, allowed: Option<&Path>, reason: Reason, word: &str| {
        let result = by_the_rules(spec, allowed);
        assert_eq!(
            (result.status, result.reason),
            (Status::Rejected, Some(reason)),
            "{spec}: {}",
            result.message
        );
        assert!(result.message.contains(word), "{}", result.message);
    };
    let (data, some) = (dir.join("data"), Some(dir.as_path()));
    let result = by_the_rules(&job(&layer, Some(&data)), some);
    assert_eq!(
        (result.status, &result.stdout.data[..]),
        (Status::Succeeded, &b"seen"[..]),
        "{}",
        result.message
    );
    refused(&job("host", None), some, Reason::SpecInvalid, "worker.allow_host_layer");
    refused(&job(&layer, None), None, Reason::SpecInvalid, "worker.layer_dirs");
    refused(&job("dir:/", None), some, Reason::SpecInvalid, "worker.layer_dirs");
    refused(&job(&layer, Some(Path::new("/etc"))), some, Reason::VolumeError, "worker.allowed_host_paths");
    refused(&job(&layer, Some(&neighbour)), some, Reason::VolumeError, "worker.allowed_host_paths");
    refused(&job(&layer, Some(&dir.join("out"))), some, Reason::VolumeError, "volumes[0]");
    refused(&job(&format!("dir:{}/out", dir.display()), None), some, Reason::ImageError, "layers[0]");
}
