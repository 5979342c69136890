//! Services that root starts: what talks to the network has no privileges, what has privileges has no network, and neither
//! is in the other's hands.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use hutch_tests::house::{House, Served};
use hutch_tests::processes::Process;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// How long something may take to be noticed.
const SOON: Duration = Duration::from_secs(20);

/// A line of proc_pid_status(5).
fn status(process: &Process, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}:"))).unwrap_or_default();
    line.trim().to_owned()
}

/// The inodes of sockets that a process has open.
fn sockets(process: &Process) -> BTreeSet<String> {
    let fds = fs::read_dir(format!("/proc/{}/fd", process.pid)).unwrap().flatten();
    fds.filter_map(|fd| fs::read_link(fd.path()).ok())
        .filter_map(|target| Some(target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect()
}

/// The inodes of the internet sockets in a process's network namespace.
fn internet(process: &Process) -> BTreeSet<String> {
    let tables = ["tcp", "tcp6", "udp", "udp6", "raw", "raw6"];
    tables
        .iter()
        .filter_map(|table| fs::read_to_string(format!("/proc/{}/net/{table}", process.pid)).ok())
        .flat_map(|text| {
            let rows: Vec<_> = text.lines().skip(1).map(str::to_owned).collect();
            rows.into_iter().filter_map(|row| row.split_whitespace().nth(9).map(str::to_owned))
        })
        .collect()
}

fn has_internet(process: &Process) -> bool {
    sockets(process).intersection(&internet(process)).next().is_some()
}

fn namespace(process: &Process, kind: &str) -> String {
    fs::read_link(format!("/proc/{}/ns/{kind}", process.pid)).unwrap().display().to_string()
}

/// Nobody's process: no root, no capabilities, no way to any.
fn is_powerless(process: &Process) {
    let uids = status(process, "Uid");
    assert!(!uids.split_whitespace().any(|uid| uid == "0"), "{uids}");
    assert!(!status(process, "Gid").split_whitespace().any(|gid| gid == "0"));
    assert_eq!(status(process, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(process, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(process, "NoNewPrivs"), "1");
}

/// Its engine's process; none of a gateway.
fn engine(served: &Served) -> Process {
    let [engine] = &served.process().children()[..] else { panic!("not one engine") };
    engine.clone()
}

fn job(served: &Served, script: &str) -> Value {
    served.post("/v1/jobs?wait_ms=60000", &json!({"layers": ["host"], "command": ["sh", "-c", script]}))
}

#[test]
fn what_has_a_network_has_no_privileges_and_the_other_way_round() {
    let Some(house) = House::with_sandboxes() else { return };
    for arguments in [&["up", "--slots", "2"][..], &["worker", "--slots", "2"], &["gateway"]] {
        let served = house.serve(&[arguments, &["--data", arguments[0]]].concat());
        let main = served.process();
        is_powerless(&main);
        assert!(has_internet(&main), "it listens");
        let runs_jobs = arguments[0] != "gateway";
        let others = main.descendants();
        assert_eq!(!others.is_empty(), runs_jobs);
        for other in others {
            assert!(!has_internet(&other), "{}", status(&other, "Name"));
            assert_ne!(namespace(&other, "net"), namespace(&main, "net"), "{}", status(&other, "Name"));
            let devices = fs::read_to_string(format!("/proc/{}/net/dev", other.pid)).unwrap();
            assert!(devices.lines().skip(2).all(|row| row.trim().starts_with("lo:")), "{devices}");
        }
        served.signal(Signal::SIGTERM);
        assert_eq!(served.end().0, 0);
    }
}

#[test]
fn jobs_run_and_each_directory_is_whose_it_should_be() {
    let Some(house) = House::with_sandboxes() else { return };
    let served = house.serve(&["up", "--slots", "2"]);
    let spec = json!({
        "layers": ["host"], "cwd": "/box", "command": ["sh", "-c", "cat; head -c 300000 /dev/zero; echo kept > out"],
        "stdin": {"text": "x".repeat(200_000)}, "outputs": {"paths": ["/box/**"]},
        "volumes": [{"volume": "v", "target": "/v"}],
    });
    let done = served.post("/v1/jobs?wait_ms=60000", &spec);
    assert_eq!(done["status"], "succeeded", "{done}");
    assert_eq!(done["stdout"]["bytes"], 500_000);
    let id = done["id"].as_str().unwrap();
    assert_eq!(served.get(&format!("/v1/jobs/{id}/outputs/box/out")), "kept\n");
    assert!(served.get("/metrics").contains("hutch_reaped_sandboxes_total 0"));
    let main: u32 = status(&served.process(), "Uid").split_whitespace().next().unwrap().parse().unwrap();
    let data = house.path("data");
    for (name, uid, mode) in
        [("", 0, 0o710), ("service", main, 0o700), ("service/queue.db", main, 0o644), ("volumes", 0, 0o700)]
    {
        let meta = fs::metadata(data.join(name)).unwrap();
        assert_eq!((meta.uid(), meta.permissions().mode() & 0o777), (uid, mode), "{name}");
    }
}

/// As whoever took the service over, by whatever hole in it: its user, on the host.
fn as_user_of(main: &Process, program: &str, arguments: &[&str]) -> (bool, String) {
    let uid: u32 = status(main, "Uid").split_whitespace().next().unwrap().parse().unwrap();
    let output = Command::new(program).args(arguments).uid(uid).gid(uid).output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn the_service_s_user_has_no_hold_on_the_engine() {
    let Some(house) = House::with_sandboxes() else { return };
    let served = house.serve(&["up", "--slots", "1"]);
    let (main, engine) = (served.process(), engine(&served));
    let proc_of = |file: &str| format!("/proc/{}/{file}", engine.pid);
    for file in ["fd", "mem", "environ", "maps"] {
        let (done, said) = as_user_of(&main, "sh", &["-c", &format!("ls {0} && exec 3<{0}", proc_of(file))]);
        assert!(!done, "{file}: {said}");
    }
    let (done, said) = as_user_of(&main, "sh", &["-c", &format!("kill -KILL {}", engine.pid)]);
    assert!(!done && said.to_lowercase().contains("permitted"), "{said}");
    // The same, done by root, can be done: it is not the test that fails.
    assert!(fs::read_dir(proc_of("fd")).is_ok());
    // Nor has another process of the same user a hold on the service.
    let (done, _) = as_user_of(&main, "sh", &["-c", &format!("exec 3</proc/{}/mem", main.pid)]);
    assert!(!done);
    let (done, _) = as_user_of(&main, "ls", &[house.path("data").join("volumes").to_str().unwrap()]);
    assert!(!done);
    assert_eq!(job(&served, "exit 0")["status"], "succeeded");
}

#[test]
fn a_dead_engine_is_the_host_s_fault_and_ends_the_service() {
    let Some(house) = House::with_sandboxes() else { return };
    let served = house.serve(&["up", "--slots", "1"]);
    let engine = engine(&served);
    let spec = json!({"layers": ["host"], "command": ["sleep", "100"], "max_attempts": 2});
    let id = served.post("/v1/jobs", &spec)["id"].as_str().unwrap().to_owned();
    let begun = Instant::now();
    while served.get_json(&format!("/v1/jobs/{id}"))["state"] != "running" {
        assert!(begun.elapsed() < SOON, "it does not run");
        std::thread::sleep(Duration::from_millis(20));
    }
    let all = engine.descendants();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(engine.pid.try_into().unwrap()), Signal::SIGKILL)
        .unwrap();
    let (code, said) = served.end();
    assert!(code == 1 && said.contains("start the worker again"), "{code}: {said}");
    let begun = Instant::now();
    while all.iter().any(Process::is_alive) || !engine.cgroup_homes().is_empty() {
        assert!(begun.elapsed() < SOON, "something is left of a killed engine");
        std::thread::sleep(Duration::from_millis(20));
    }
    // The job was given back, and is run by the next.
    let again = house.serve(&["up", "--slots", "1"]);
    assert_ne!(again.get_json(&format!("/v1/jobs/{id}"))["state"], "finished");
}

/// What an older version kept as root is the service's now.
#[test]
fn what_root_kept_before_is_handed_over() {
    let Some(house) = House::with_sandboxes() else { return };
    let first = house.serve(&["up", "--slots", "1"]);
    let id = job(&first, "echo before")["id"].as_str().unwrap().to_owned();
    first.signal(Signal::SIGTERM);
    assert_eq!(first.end().0, 0);
    let data = house.path("data");
    for entry in fs::read_dir(data.join("service")).unwrap().flatten() {
        fs::rename(entry.path(), data.join(entry.file_name())).unwrap();
        std::os::unix::fs::lchown(data.join(entry.file_name()), Some(0), Some(0)).unwrap();
    }
    fs::remove_dir(data.join("service")).unwrap();
    let again = house.serve(&["up", "--slots", "1"]);
    assert_eq!(again.get_json(&format!("/v1/jobs/{id}"))["result"]["stdout"]["text"], "before\n");
    assert_eq!(job(&again, "echo after")["stdout"]["text"], "after\n");
    assert!(!data.join("queue.db").exists());
}
