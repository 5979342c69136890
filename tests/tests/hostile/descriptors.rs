//! Descriptors that leak.

use std::os::fd::AsRawFd as _;
use std::process::Command;

use hutch_sandbox::Defence;
use hutch_tests::programs::{self, Program};
use serde_json::{Value, json};

use crate::attack::{Attack, Outcome};
use crate::site::{Site, hostile, job, text};

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

/// A descriptor that is passed on to a program is seen by it.
fn leak_is_seen() -> Result<String, String> {
    let program = programs::on_host(Program::Hostile).ok_or("there is no C compiler")?;
    let file = std::fs::File::open("/etc").map_err(|e| e.to_string())?;
    let script = format!(
        "exec {} extra-descriptors 9< /proc/{}/fd/{}",
        program.display(),
        std::process::id(),
        file.as_raw_fd()
    );
    let output = Command::new("sh").args(["-c", &script]).output().map_err(|e| e.to_string())?;
    let seen = String::from_utf8_lossy(&output.stdout).into_owned();
    if seen.starts_with("9 ") {
        Ok("a leaked descriptor is seen".to_owned())
    } else {
        Err(format!("a leak is not seen: {seen}"))
    }
}

#[test]
fn a02_leaked_descriptors() {
    Attack::new(
        "2: descriptors of the worker that leak (CVE-2024-21626)",
        "all descriptors close at exec",
        |site| {
            let specs =
                [json!({}), json!({"stdin": {"text": "x"}, "files": [{"path": "/box/f", "text": "x"}]})];
            let through: Vec<_> =
                specs.iter().flat_map(|more| lines(&site.hostile(&["extra-descriptors"], more))).collect();
            Outcome::of(&through, "0, 1 and 2 alone")
        },
    )
    .control(leak_is_seen)
    .bites_without(&[Defence::CloseDescriptors])
    .run();
}

/// A job in a directory that is a descriptor of somebody's.
fn cwd_by_descriptor(site: &Site) -> Outcome {
    let mut through = Vec::new();
    for dir in ["/proc/self/fd", "/proc/1/fd", "/proc/thread-self/fd"] {
        for fd in 3..24 {
            let spec = job(&["ls"], &json!({"cwd": format!("{dir}/{fd}"), "user": "root"}));
            let result = site.job(&spec);
            if result["status"] == "succeeded" {
                through.push(format!("{dir}/{fd} has {}", text(&result["stdout"]).lines().count()));
            }
        }
    }
    Outcome::of(&through, "every such directory is refused")
}

#[test]
fn a02_cwd_that_is_a_descriptor() {
    Attack::new(
        "2: a working directory `/proc/self/fd/N` (CVE-2024-21626)",
        "openat2 follows no link of proc",
        cwd_by_descriptor,
    )
    .control(|| {
        let there = std::fs::File::open("/usr").map_err(|e| e.to_string())?;
        let path = format!("/proc/self/fd/{}/bin", there.as_raw_fd());
        if std::fs::metadata(path).is_ok() {
            Ok("the directory is entered".to_owned())
        } else {
            Err("no such links".to_owned())
        }
    })
    .bites_without(&[Defence::ScopedPaths])
    .run();
}

#[test]
fn a03_descriptors_that_leak_between_starts() {
    let starts = if std::env::var_os("HUTCH_LONG_TESTS").is_some() { 1000 } else { 40 };
    Attack::new(
        "3: descriptors that leak into a sandbox that starts at the same time",
        "CLOEXEC from birth; one thread clones",
        move |site| {
            let specs: Vec<Value> =
                (0..starts).map(|_| hostile(&["extra-descriptors"], &Value::Null)).collect();
            let through: Vec<_> =
                site.jobs(&specs).iter().flat_map(|result| lines(&text(&result["stdout"]))).collect();
            Outcome::of(&through, format!("{starts} starts, no extra descriptor"))
        },
    )
    .control(leak_is_seen)
    .bites_without(&[Defence::CloseDescriptors])
    .run();
}
