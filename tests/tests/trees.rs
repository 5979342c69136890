//! Trees of processes that go on forking, each into a session of its own, while they are killed: all of them die,
//! soon, and nothing of them is left.
//!
//! `HUTCH_LONG_TESTS=1` kills a thousand.

use std::time::{Duration, Instant};

use hutch_tests::house::{House, Served};
use serde_json::{Value, json};

/// How soon after its end is due all of a tree must be dead.
const SOON: Duration = Duration::from_secs(2);
const WALL_MS: u64 = 300;
const SLOTS: usize = 2;
const PIDS: u64 = 64;

/// Every process forks again and again; one that cannot any more ends, which makes room for another. The first stays.
const FORKING: &str = "import os, signal\n\
    first = os.getpid()\n\
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n\
    while True:\n\
    \x20 try: pid = os.fork()\n\
    \x20 except OSError:\n\
    \x20   if os.getpid() != first: os._exit(0)\n\
    \x20   continue\n\
    \x20 if pid == 0: os.setsid()";

/// A plain bomb: every process stays, and all of them try to fork.
const BOMB: &str = "import os\nwhile True:\n\x20 try: os.fork()\n\x20 except OSError: pass";

fn kill_one(up: &Served, script: &str) -> Duration {
    let spec = json!({
        "layers": ["host"], "command": ["python3", "-c", script],
        "limits": {"wall_time_ms": WALL_MS, "pids": PIDS},
    });
    let result = up.post("/v1/jobs?wait_ms=60000", &spec);
    assert_eq!(
        (&result["status"], &result["reason"]),
        (&json!("limit_exceeded"), &json!("wall_time")),
        "{result}"
    );
    assert!(result["usage"]["pids_denied"].as_u64() > Some(0), "it did not fork: {result}");
    assert_eq!(result["usage"]["pids_peak"], json!(PIDS), "{result}");
    Duration::from_millis(result["usage"]["wall_time_ms"].as_u64().unwrap() - WALL_MS)
}

#[test]
fn trees_that_fork_while_they_are_killed_die() {
    let Some(house) = House::with_sandboxes() else { return };
    let long = std::env::var("HUTCH_LONG_TESTS").is_ok_and(|value| value == "1");
    let count = if long { 1000 } else { 60 };
    let up = house.serve(&["up", "--slots", &SLOTS.to_string()]);
    let [engine] = &up.process().children()[..] else { panic!("not one engine") };
    let [launcher] = &engine.children()[..] else { panic!("not one launcher") };
    let mut slowest = Duration::ZERO;
    for number in 0..count {
        let took = kill_one(&up, if number % 2 == 0 { FORKING } else { BOMB });
        assert!(took < SOON, "tree {number} was dead {took:?} after its end was due");
        slowest = slowest.max(took);
        // What is left are inits that wait for their order, one for each slot.
        let begun = Instant::now();
        let left = || launcher.descendants().len();
        while left() > SLOTS {
            assert!(begun.elapsed() < SOON, "{} processes are left of tree {number}", left() - SLOTS);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    eprintln!("{count} of {count} trees dead, the slowest {slowest:?} after its end was due");
    // A directory in each hierarchy for each group that was made ahead.
    let homes = engine.cgroup_homes().len();
    let begun = Instant::now();
    while engine.cgroups() > homes * SLOTS && begun.elapsed() < SOON {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(engine.cgroups() <= homes * SLOTS, "{} cgroups left", engine.cgroups());
    let result: Value = up.post("/v1/jobs?wait_ms=60000", &json!({"layers": ["host"], "command": ["true"]}));
    assert_eq!(result["status"], "succeeded", "{result}");
}
