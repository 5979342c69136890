//! Attacks on the verdict, and on what the limits and the spec promise.

use std::fs;

use hutch_proto::{JobResult, Status};
use hutch_sandbox::Defence;
use hutch_tests::hutch::can_run;
use hutch_tests::programs::{self, Program};
use serde_json::{Value, json};

use crate::attack::{Attack, Outcome};
use crate::site::{Site, hostile, job, text};

/// A host that cannot count processes: the controller is not mounted in what the command sees.
fn on_a_lesser_host(site: &Site) -> Outcome {
    let script = "for d in /sys/fs/cgroup/pids /sys/fs/cgroup/*pids*; do umount -l $d 2> /dev/null; done; \
                  grep -q ' - cgroup ' /proc/self/mountinfo || umount -l /sys/fs/cgroup; exec \"$@\"";
    let wrapper = ["unshare", "--mount", "sh", "-c", script, "sh"];
    let spec = "{\"layers\": [\"host\"], \"command\": [\"true\"], \"limits\": {\"pids\": 5}}";
    let path = site.place("lesser").join("spec.json");
    fs::write(&path, spec).unwrap();
    let path = path.display().to_string();
    let output = site.command(&wrapper, &["run", "--json", &path]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    match serde_json::from_slice::<JobResult>(&output.stdout) {
        Ok(result) if result.status == Status::Succeeded => {
            Outcome::Through("it ran without a limit".to_owned())
        }
        Ok(result) => Outcome::Held(result.message),
        Err(_) => Outcome::held_if(said.contains("cannot limit processes") || said.contains("cgroup"), said),
    }
}

#[test]
fn a58_limits_that_this_host_cannot_hold() {
    Attack::new(
        "58: a limit that the host cannot enforce",
        "the host is looked at first; the job is refused",
        on_a_lesser_host,
    )
    .control(|| {
        let there = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        if there.is_empty() {
            Err("this host has no cgroups".to_owned())
        } else {
            Ok("with the controller it runs".to_owned())
        }
    })
    .bites_without(&[Defence::HeldLimits])
    .run();
}

/// Specs that are too much of something.
fn bombs() -> Vec<(&'static str, String)> {
    let many = |name: &str, item: &str, count: usize| {
        format!(
            "{{\"layers\": [\"host\"], \"command\": [\"true\"], \"{name}\": [{}]}}",
            vec![item; count].join(",")
        )
    };
    let mut env: Vec<String> = (0..100_000).map(|number| format!("\"V{number}\": \"x\"")).collect();
    env.push("\"LAST\": \"x\"".to_owned());
    let command = |argument: &str, count: usize| {
        format!(
            "{{\"layers\": [\"host\"], \"command\": [{}]}}",
            vec![format!("\"{argument}\""); count].join(",")
        )
    };
    vec![
        ("nesting", format!("{{\"layers\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000))),
        ("nested objects", "{\"stdin\": ".repeat(50_000)),
        (
            "variables",
            format!("{{\"layers\": [\"host\"], \"command\": [\"true\"], \"env\": {{{}}}}}", env.join(",")),
        ),
        ("volumes", many("volumes", "{\"volume\": \"v\", \"target\": \"/v\"}", 100_000)),
        ("files", many("files", "{\"path\": \"/f\", \"text\": \"\"}", 100_000)),
        ("steps", many("steps", "{\"name\": \"s\", \"command\": [\"true\"]}", 10_000)),
        ("one long argument", command(&"x".repeat(200 << 10), 1)),
        ("arguments of 4 MiB", command(&"x".repeat(1000), 4096)),
        (
            "layers",
            format!("{{\"layers\": [{}], \"command\": [\"true\"]}}", vec!["\"host\""; 10_000].join(",")),
        ),
        ("globs", many("labels", "1", 10).replace("labels", "outputs")),
        (
            "a body of 20 MiB",
            format!("{{\"layers\": [\"host\"], \"command\": [\"{}\"]}}", "x".repeat(20 << 20)),
        ),
    ]
}

#[test]
fn a59_specs_that_are_too_much() {
    Attack::new(
        "59: a spec that is nested 100,000 deep, has 100,000 variables or volumes, or more arguments than exec takes",
        "a cap on every part, before it is held",
        |site| {
            let mut through = Vec::new();
            let mut resident = [0; 2];
            for kb in &mut resident {
                for (name, spec) in bombs() {
                    let status = site.served().post_text("/v1/jobs?wait_ms=30000", spec);
                    if !(400..500).contains(&status) {
                        through.push(format!("{name}: {status}"));
                    }
                }
                *kb = site.served().process().resident_kb();
            }
            if resident[1] > resident[0] + (32 << 10) {
                through.push(format!("memory grows: {resident:?} kB"));
            }
            Outcome::of(&through, "each is answered with 4xx")
        },
    )
    .control(|| Ok("the same within the caps is taken".to_owned()))
    .has_no_switch("what is over a cap is no spec")
    .run();
}

/// Whether a result tells what really happened: the program ended with 7.
fn is_true(result: &Value) -> bool {
    result["status"] == "failed" && result["reason"] == "nonzero_exit" && result["exit_code"] == 7
}

#[test]
fn a60_a_verdict_that_is_forged() {
    Attack::new(
        "60: kill its own init; print a result; write records of its end to whatever is open",
        "the verdict comes from the kernel, over a pipe that no program has",
        |site| {
            let fake = "{\\\"status\\\": \\\"succeeded\\\", \\\"exit_code\\\": 0}";
            let kills = format!(
                "kill -9 1; kill -TERM 1; kill -INT 1; kill -SEGV 1; sleep 0.2; echo \"{fake}\"; exit 7"
            );
            let root = json!({"user": "root"});
            let results = [
                ("kills init and prints a result", site.job(&job(&["sh", "-c", &kills], &root))),
                ("forges records", site.job(&hostile(&["forge-the-end"], &root))),
            ];
            let lies: Vec<_> = results
                .iter()
                .filter(|(_, result)| !is_true(result))
                .map(|(how, result)| format!("{how}: {} {}", result["status"], result["exit_code"]))
                .collect();
            Outcome::of(&lies, "exit code 7, as it was")
        },
    )
    .control(|| Ok("the program ends with 7".to_owned()))
    .has_no_switch("a record that is forged is overruled by the last one, init's own")
    .run();
}

/// Signals that end whoever does not expect them.
const DEADLY: &[(i32, &str)] = &[
    (1, "SIGHUP"),
    (2, "SIGINT"),
    (3, "SIGQUIT"),
    (4, "SIGILL"),
    (5, "SIGTRAP"),
    (6, "SIGABRT"),
    (7, "SIGBUS"),
    (8, "SIGFPE"),
    (9, "SIGKILL"),
    (10, "SIGUSR1"),
    (11, "SIGSEGV"),
    (12, "SIGUSR2"),
    (13, "SIGPIPE"),
    (14, "SIGALRM"),
    (15, "SIGTERM"),
    (16, "SIGSTKFLT"),
    (24, "SIGXCPU"),
    (25, "SIGXFSZ"),
    (26, "SIGVTALRM"),
    (27, "SIGPROF"),
    (29, "SIGIO"),
    (30, "SIGPWR"),
    (31, "SIGSYS"),
];

#[test]
fn a61_every_signal_on_itself() {
    if !can_run("signals") {
        return;
    }
    let probe = programs::inside(Program::Probe);
    Attack::new(
        "61: raise each signal on itself",
        "the program is never process 1, to which signals are dropped",
        |site| {
            let specs: Vec<_> = DEADLY
                .iter()
                .map(|(number, _)| job(&[&probe, "signal", &number.to_string()], &Value::Null))
                .collect();
            let wrong: Vec<_> = site
                .jobs(&specs)
                .iter()
                .zip(DEADLY)
                .filter(|(result, (_, name))| result["signal"] != *name)
                .map(|(result, (_, name))| {
                    format!("{name}: {} {}{}", result["status"], result["signal"], text(&result["stdout"]))
                })
                .collect();
            Outcome::of(&wrong, format!("{} signals are reported as what they were", DEADLY.len()))
        },
    )
    .control(|| Ok("outside, each ends the program".to_owned()))
    .bites_without(&[Defence::NeverPidOne])
    .run();
}
