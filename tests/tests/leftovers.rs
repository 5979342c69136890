//! What is left when jobs are over, and when whoever ran them is killed: nothing.
//!
//! `HUTCH_LONG_TESTS=1` runs ten times as many jobs.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use hutch_tests::broker::Broker;
use hutch_tests::house::{House, Served};
use hutch_tests::hutch::{Home, can_run};
use hutch_tests::processes::{Process, size};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// How soon after a kill nothing may be left, on a machine with much to do.
const SOON: Duration = Duration::from_secs(30);

/// How many jobs are many.
fn many() -> usize {
    let long = std::env::var("HUTCH_LONG_TESTS").is_ok_and(|value| value == "1");
    if long { 20_000 } else { 2000 }
}

fn engine_loop(arguments: &[&str], dir: &Path, count: usize) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine_loop"));
    command.args(arguments).arg(dir).arg(count.to_string()).stdin(Stdio::null());
    command
}

#[test]
fn a_process_that_ran_many_jobs_holds_nothing() {
    if !can_run("many jobs") {
        return;
    }
    let count = many();
    let home = Home::new();
    let mut command = engine_loop(&["many"], home.path(), count);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let process = Process::of(child.id()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(process.cgroup_homes(), Vec::<std::path::PathBuf>::new(), "cgroups left");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let figures: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [early, late] = figures.as_slice() else { panic!("{said}") };
    eprintln!("after {} jobs: {early}\nafter {} jobs: {late}", early["jobs"], late["jobs"]);
    assert_eq!((&early["jobs"], &late["jobs"]), (&json!(50), &json!(count)));
    for same in
        ["fds", "mounts", "data_files", "data_bytes", "launcher_fds", "launcher_mounts", "launcher_files"]
    {
        assert_eq!(early[same], late[same], "{same} grows: {said}");
    }
    // What waits for the slot's next job: a group, which is a directory in each hierarchy, and an init.
    assert_eq!((&early["cgroups"], &early["launcher_children"]), (&late["cgroups"], &json!(1)), "{said}");
    assert_eq!(late["launcher_children"], json!(1), "{said}");
    assert!(late["cgroups"].as_u64().unwrap() <= 6, "{said}");
    let grown = |what: &str| late[what].as_u64().unwrap().saturating_sub(early[what].as_u64().unwrap());
    assert!(grown("rss_kb") < 8 << 10, "this process grows: {said}");
    assert!(grown("launcher_rss_kb") < 1 << 10, "the launcher grows: {said}");
}

/// What a worker has, counted from outside.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    open_files: usize,
    engine_files: usize,
    mounts: usize,
    cgroups: usize,
    children: usize,
    launcher_files: usize,
    launcher_mounts: usize,
    launcher_entries: usize,
    /// Files and bytes of its data directory.
    data: (usize, u64),
}

impl Holdings {
    fn of(worker: &Served, data: &Path) -> (Self, u64) {
        let process = worker.process();
        let [engine] = &process.children()[..] else { panic!("not one engine") };
        let [launcher] = &engine.children()[..] else { panic!("not one launcher") };
        let holdings = Self {
            open_files: process.open_fds(),
            engine_files: engine.open_fds(),
            mounts: process.mounts() + engine.mounts(),
            cgroups: engine.cgroups(),
            children: launcher.children().len(),
            launcher_files: launcher.open_fds(),
            launcher_mounts: launcher.mounts(),
            launcher_entries: launcher.root_entries(),
            data: size(data),
        };
        (holdings, process.resident_kb() + engine.resident_kb() + launcher.resident_kb())
    }
}

/// Sends jobs, and waits for the last one.
fn run_through(gateway: &Served, queue: &str, count: usize) {
    let job = json!({
        "layers": ["host"], "queue": queue, "cwd": "/box",
        "command": ["sh", "-c", "echo here; echo x > ~/x; mkdir out; echo y > out/y; echo z > /kept/z"],
        "outputs": {"paths": ["/box/**"]}, "volumes": [{"volume": "kept", "target": "/kept"}],
    });
    for part in (0..count).step_by(500) {
        let jobs = vec![job.clone(); (count - part).min(500)];
        let answers = gateway.post("/v1/jobs/batch", &Value::from(jobs));
        let ids = answers.as_array().unwrap();
        assert!(ids.iter().all(|answer| answer["id"].is_string()), "{answers}");
        for answer in ids {
            let path = format!("/v1/jobs/{}", answer["id"].as_str().unwrap());
            let mut view = gateway.get_json(&path);
            while view["state"] != "finished" {
                std::thread::sleep(Duration::from_millis(20));
                view = gateway.get_json(&path);
            }
            assert_eq!(view["result"]["status"], "succeeded", "{view}");
        }
    }
}

#[test]
fn a_worker_that_ran_many_jobs_holds_nothing() {
    let Some(house) = House::with_sandboxes() else { return };
    let broker = Broker::shared();
    let (queue, store) = (format!("soak-{}", std::process::id()), house.path("store"));
    let shared = ["--broker", broker.url(), "--store", &format!("file://{}", store.display())];
    let gateway = house.serve(&[&["gateway"][..], &shared].concat());
    let worker = house.serve_with(
        &[&["worker", "--slots", "1", "--data", "worker", "--queue", &queue][..], &shared].concat(),
        &[("HUTCH__WORKER__ALLOW_HOST_LAYER", "true")],
    );
    let look = |count| {
        run_through(&gateway, &queue, count);
        // The last sandbox is taken down after its answer.
        std::thread::sleep(Duration::from_millis(500));
        Holdings::of(&worker, &house.path("worker"))
    };
    let (early, early_kb) = look(50);
    let (late, late_kb) = look(many());
    eprintln!("after 50 jobs: {early:?}, {early_kb} kB\nafter {} more: {late:?}, {late_kb} kB", many());
    assert_eq!(early, late, "something grows");
    assert!(late_kb.saturating_sub(early_kb) < 8 << 10, "memory grows: {early_kb} kB, then {late_kb} kB");
}

/// Four jobs that sleep, with all that belongs to them.
struct Sleeping {
    child: Child,
    stdout: BufReader<ChildStdout>,
    engine: Process,
    launcher: Process,
    all: Vec<Process>,
    mounts: usize,
    _home: Home,
}

impl Sleeping {
    fn start() -> Self {
        let mounts = Process::of(std::process::id()).unwrap().mounts();
        let home = Home::new();
        let mut child = engine_loop(&["sleep"], home.path(), 4).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "\"ready\"\n");
        let engine = Process::of(child.id()).unwrap();
        let [launcher] = &engine.children()[..] else { panic!("not one launcher") };
        let launcher = launcher.clone();
        let all = engine.descendants();
        // The launcher, and for each job its init, its program and three that sleep.
        assert!(all.len() > 4 * 5, "{} processes", all.len());
        assert!(engine.cgroups() >= 4, "{} cgroups", engine.cgroups());
        Self { child, stdout, engine, launcher, all, mounts, _home: home }
    }

    fn kill(&self, process: &Process) {
        kill(Pid::from_raw(process.pid.try_into().unwrap()), Signal::SIGKILL).unwrap();
    }

    /// Asserts that no process and no mount is left, and none of the cgroups if they should be gone too.
    fn nothing_is_left(&self, cgroups: bool) {
        let begun = Instant::now();
        let alive = || self.all.iter().filter(|process| process.is_alive()).count();
        let homes = || if cgroups { self.engine.cgroup_homes() } else { Vec::new() };
        while (alive() > 0 || !homes().is_empty()) && begun.elapsed() < SOON {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(alive(), 0, "processes left");
        assert!(homes().is_empty(), "cgroups left: {:?}", homes());
        eprintln!("nothing left after {:?}", begun.elapsed());
        assert_eq!(Process::of(std::process::id()).unwrap().mounts(), self.mounts, "mounts left");
    }
}

impl Drop for Sleeping {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_killed_engine_leaves_nothing() {
    if !can_run("a killed engine") {
        return;
    }
    let mut sleeping = Sleeping::start();
    sleeping.kill(&sleeping.engine);
    sleeping.child.wait().unwrap();
    sleeping.nothing_is_left(true);
}

#[test]
fn a_killed_launcher_takes_its_jobs_along_and_they_are_the_host_s_fault() {
    if !can_run("a killed launcher") {
        return;
    }
    let mut sleeping = Sleeping::start();
    sleeping.kill(&sleeping.launcher);
    sleeping.nothing_is_left(false);
    let mut said = String::new();
    sleeping.stdout.read_to_string(&mut said).unwrap();
    let results: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(results.len(), 4, "{said}");
    for result in results {
        assert_eq!(
            (&result["status"], &result["reason"]),
            (&json!("infra_error"), &json!("host_error")),
            "{result}"
        );
    }
    sleeping.child.wait().unwrap();
    sleeping.nothing_is_left(true);
}

#[test]
fn the_next_one_removes_what_a_killed_launcher_and_engine_left() {
    if !can_run("a killed engine and launcher") {
        return;
    }
    let mut sleeping = Sleeping::start();
    sleeping.kill(&sleeping.launcher);
    sleeping.kill(&sleeping.engine);
    sleeping.child.wait().unwrap();
    sleeping.nothing_is_left(false);
    let result = Home::new().run(&json!({"layers": ["host"], "command": ["true"]})).unwrap();
    assert_eq!(result.exit_code, Some(0), "{}", result.message);
    assert_eq!(sleeping.engine.cgroup_homes(), Vec::<std::path::PathBuf>::new(), "cgroups left");
}

#[test]
fn a_killed_init_is_the_host_s_fault() {
    if !can_run("a killed init") {
        return;
    }
    let mut sleeping = Sleeping::start();
    for init in sleeping.launcher.children() {
        sleeping.kill(&init);
    }
    let mut said = String::new();
    sleeping.stdout.read_to_string(&mut said).unwrap();
    assert_eq!(said.matches("\"infra_error\"").count(), 4, "{said}");
    sleeping.child.wait().unwrap();
    sleeping.nothing_is_left(true);
}

#[test]
fn hutch_run_leaves_its_volumes_and_outputs_alone() {
    if !can_run("hutch run") {
        return;
    }
    let home = Home::new();
    let run = || {
        let spec = json!({
            "layers": ["host"], "command": ["sh", "-c", "echo x > /v/x; echo y > ~/y; touch -d @1700000000 ~/y"],
            "volumes": [{"volume": "v", "target": "/v"}], "outputs": {"paths": ["/home/**"]},
        });
        home.run(&spec).unwrap()
    };
    let first = run();
    let kept = size(home.path());
    let again = run();
    assert_eq!(first.outputs, again.outputs, "the same files make the same archive");
    assert_eq!(size(home.path()), kept, "the same archive is kept once");
    let volumes: Vec<_> = fs::read_dir(home.path().join("volumes")).unwrap().flatten().collect();
    assert_eq!(volumes.len(), 1);
}
