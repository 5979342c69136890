//! What a sandbox costs in counts, which are the same on a busy machine and on a quiet one: system calls, by strace(1).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use hutch_tests::hutch::can_run;
use serde_json::json;

/// The most system calls of a sandbox: of the engine, the launcher, init and a program that does next to nothing, from
/// the order until all is taken down and the next is made. Raise it only for something that is worth it.
const MOST: f64 = 375.0;
/// Calls that depend on who is quicker, and checks that a debug build makes of its descriptors.
const LEFT_OUT: [&str; 7] =
    ["epoll_wait", "fcntl", "futex", "poll", "restart_syscall", "rt_sigtimedwait", "wait4"];

/// Calls by name, of an engine that runs this many jobs.
fn calls(dir: &Path, jobs: usize) -> BTreeMap<String, f64> {
    let counts = dir.join(format!("counts-{jobs}"));
    let layer = format!("dir:{}", dir.join("layer").display());
    let job = json!({"job": {"layers": [layer], "command": ["/bin/true"], "cwd": "/"}});
    let ran = Command::new("strace")
        .args(["-f", "-c", "-o"])
        .arg(&counts)
        .args([env!("CARGO_BIN_EXE_engine_loop"), "acts"])
        .arg(dir.join("data"))
        .arg(json!(vec![job; jobs]).to_string())
        .stdout(Stdio::null())
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    // Per cent, seconds, microseconds each, calls, errors if any, name.
    let counts = fs::read_to_string(counts).unwrap();
    let rows = counts.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.first()?.parse::<f64>().ok()?;
        Some(((*words.last()?).to_owned(), words.get(3)?.parse().ok()?))
    });
    rows.filter(|(name, _)| name != "total" && !LEFT_OUT.contains(&name.as_str())).collect()
}

#[test]
fn a_sandbox_takes_no_more_system_calls_than_it_did() {
    if !can_run("system calls of a sandbox") {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        return hutch_tests::skip("system calls of a sandbox", "strace is not installed");
    }
    let dir = tempfile::tempdir().unwrap();
    let layer = dir.path().join("layer");
    for place in ["bin", "dev", "etc", "proc", "tmp"] {
        fs::create_dir_all(layer.join(place)).unwrap();
    }
    fs::copy("/bin/busybox", layer.join("bin/true")).unwrap();
    // The user has an entry and a home: none is made.
    fs::write(layer.join("etc/passwd"), "job:x:1001:1001::/:/bin/sh\n").unwrap();
    fs::write(layer.join("etc/group"), "job:x:1001:\n").unwrap();
    // What the start and the end take falls out.
    let (few, many) = (calls(dir.path(), 10), calls(dir.path(), 50));
    let mut each: Vec<_> = many
        .iter()
        .map(|(name, count)| (name, (count - few.get(name).copied().unwrap_or_default()) / 40.0))
        .collect();
    each.sort_by(|one, other| other.1.total_cmp(&one.1));
    let sum: f64 = each.iter().map(|(_, count)| count).sum();
    let most: Vec<_> = each.iter().take(30).map(|(name, count)| format!("{name} {count:.1}")).collect();
    eprintln!("{sum:.1} system calls for each sandbox: {}, ...", most.join(", "));
    assert!(sum > 100.0, "so few were never counted: {sum}");
    assert!(sum <= MOST, "{sum:.1} system calls, {MOST} at most: {}", most.join(", "));
}
