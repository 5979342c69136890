//! What `stress-ng` does to a worker: every stressor that it has, each as a job of its own on the host's programs.
//!
//! In order: slots are warmed up, a small job's time is measured alone, then beside the stressors; at the end the worker
//! lives, has what it had, and the host is as before. The short form runs four stressors at one time; with
//! `HUTCH_LONG_TESTS=1` they run one after another, and the neighbour must not take twice its time.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hutch_tests::house::{House, Served};
use hutch_tests::processes::{Process, size};
use serde_json::{Value, json};

const CLASSES: &str =
    "cpu cpu-cache device filesystem gpu interrupt io memory network os pipe scheduler security vm";
/// Those of stress-ng's classes, so that a version that names them otherwise is seen.
const LEAST_STRESSORS: usize = 200;
const SLOTS: usize = 5;
/// What the kernel itself counts there, or makes up.
const NO_SETTINGS: &[&str] = &[
    "fs/dentry-state",
    "fs/file-nr",
    "fs/inode-nr",
    "fs/inode-state",
    "fs/aio-nr",
    "fs/quota/",
    "kernel/ns_last_pid",
    "kernel/random/",
    "kernel/pty/nr",
    "kernel/perf_event_max_sample_rate",
    "nf_conntrack_count",
    "kernel/hung_task_detect",
];

/// Every stressor of every class, once.
fn stressors() -> Option<Vec<String>> {
    let mut all = std::collections::BTreeSet::new();
    for class in CLASSES.split(' ') {
        let output = Command::new("stress-ng").arg("--class").arg(format!("{class}?")).output().ok()?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let (_, names) = said.split_once("stressors: ")?;
        all.extend(names.split_whitespace().map(str::to_owned));
    }
    Some(all.into_iter().collect())
}

/// The host's settings, sysctl(8), by path.
fn settings() -> BTreeMap<String, Vec<u8>> {
    let root = Path::new("/proc/sys");
    let (mut found, mut open) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(path);
            } else if !NO_SETTINGS.iter().any(|skipped| name.contains(skipped))
                && let Ok(value) = std::fs::read(&path)
            {
                found.insert(name, value);
            }
        }
    }
    found
}

/// Runs a job to its result.
fn run(up: &Served, spec: &Value) -> Value {
    let result = up.post("/v1/jobs?wait_ms=60000", spec);
    assert!(result["status"].is_string(), "{result}");
    result
}

/// How long small jobs take, one after another, until there are enough of them.
fn neighbour(up: &Served, enough: impl Fn(usize) -> bool) -> Vec<Duration> {
    let mut took = Vec::new();
    while !enough(took.len()) {
        let begun = Instant::now();
        let result = run(up, &json!({"layers": ["host"], "command": ["true"], "priority": 9}));
        assert_eq!(result["status"], "succeeded", "a neighbour: {result}");
        took.push(begun.elapsed());
    }
    took.sort();
    took
}

fn p99(sorted: &[Duration]) -> Duration {
    sorted[(sorted.len() * 99 / 100).min(sorted.len() - 1)]
}

/// Runs all stressors, so many at one time; how each ended.
fn stress(up: &Served, stressors: &[String], at_once: usize) -> BTreeMap<String, Value> {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let one = || {
            let mut ended = Vec::new();
            while let Some(name) = stressors.get(next.fetch_add(1, Ordering::Relaxed)) {
                let spec = json!({
                    "layers": ["host"], "command": ["stress-ng", format!("--{name}"), "1", "--timeout", "1"],
                    "limits": {"wall_time_ms": 5000, "pids": 256},
                });
                ended.push((name.clone(), run(up, &spec)));
            }
            ended
        };
        let threads: Vec<_> = (0..at_once).map(|_| scope.spawn(one)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn a_worker_and_its_host_live_through_every_stressor() {
    let Some(house) = House::with_sandboxes() else { return };
    let Some(stressors) = stressors() else {
        return hutch_tests::skip("stressors", "stress-ng is not installed");
    };
    assert!(stressors.len() > LEAST_STRESSORS, "{} stressors", stressors.len());
    let long = std::env::var("HUTCH_LONG_TESTS").is_ok_and(|value| value == "1");
    let up = house.serve(&["up", "--slots", &SLOTS.to_string()]);
    std::thread::scope(|scope| {
        for _ in 0..2 * SLOTS {
            scope.spawn(|| run(&up, &json!({"layers": ["host"], "command": ["sleep", "0.3"]})));
        }
    });
    let alone = neighbour(&up, |count| count == 100);
    let worker = up.process();
    let [launcher] = &worker.children()[..] else { panic!("not one launcher") };
    let own = Process::of(std::process::id()).unwrap();
    let before = (settings(), worker.open_fds(), worker.cgroups(), own.mounts());

    let over = AtomicBool::new(false);
    let (ended, beside) = std::thread::scope(|scope| {
        let beside = scope.spawn(|| neighbour(&up, |count| count > 0 && over.load(Ordering::Relaxed)));
        let ended = stress(&up, &stressors, if long { 1 } else { SLOTS - 1 });
        over.store(true, Ordering::Relaxed);
        (ended, beside.join().unwrap())
    });

    let mut ends: BTreeMap<String, usize> = BTreeMap::new();
    for (name, result) in &ended {
        let fair = ["succeeded", "failed", "limit_exceeded"].iter().any(|status| result["status"] == *status);
        assert!(fair, "{name}: {result}");
        *ends.entry(format!("{} {}", result["status"], result["reason"])).or_default() += 1;
    }
    assert_eq!(ended.len(), stressors.len());
    assert!(ends["\"succeeded\" null"] > LEAST_STRESSORS, "too few of them ran: {ends:?}");
    let (alone, beside) = (p99(&alone), p99(&beside));
    eprintln!(
        "{} stressors: {ends:?}; a neighbour's p99 alone {alone:?}, beside them {beside:?}",
        ended.len()
    );
    if long {
        assert!(beside < alone * 2, "a neighbour's p99 alone {alone:?}, beside stressors {beside:?}");
    }
    // The last sandbox is taken down after its answer.
    let has = || (worker.open_fds(), worker.cgroups(), launcher.children().len());
    let as_before = |(fds, cgroups, inits)| fds <= before.1 + 8 && cgroups <= before.2 && inits <= SLOTS;
    let begun = Instant::now();
    while !as_before(has()) && begun.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(as_before(has()), "descriptors, cgroups, inits: {:?}, before {:?}", has(), (before.1, before.2));
    assert_eq!(own.mounts(), before.3, "mounts");
    assert!(size(&house.path("data")).1 < 64 << 20, "files left: {:?}", size(&house.path("data")));
    let after = settings();
    let changed: Vec<_> =
        before.0.iter().filter(|(name, was)| after.get(*name).is_some_and(|is| is != *was)).collect();
    assert!(
        changed.is_empty(),
        "settings of the host changed: {:?}",
        changed.iter().map(|(name, _)| name).collect::<Vec<_>>()
    );
    assert!(launcher.is_alive() && worker.is_alive());
}
