//! More programs in a sandbox that runs: each is as confined as the job's own, and ends with it.

use std::process::{Command, Stdio};

use hutch_tests::hutch::can_run;
use serde_json::{Value, json};

/// What came of a job, and of the programs that were run in it.
fn exec(job: &Value, execs: &Value, ends_by_itself: bool) -> Value {
    let dir = tempfile::tempdir().expect("a directory");
    let orders = json!({"job": job, "execs": execs, "end": ends_by_itself});
    let done = Command::new(env!("CARGO_BIN_EXE_engine_loop"))
        .args(["exec", dir.path().to_str().expect("text"), &orders.to_string()])
        .stdin(Stdio::null())
        .output()
        .expect("engine_loop");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).expect("json")
}

/// A job that says it runs, and goes on for a while.
fn running(before: &str) -> Value {
    json!({"layers": ["host"], "command": ["sh", "-c", format!("{before}; echo runs; exec sleep 60")],
           "env": {"OWN": "job"}, "limits": {"wall_time_ms": 60_000}})
}

fn shell(script: &str) -> Value {
    json!({"command": ["sh", "-c", script]})
}

/// What one shell's script writes in a job.
fn output(job: &Value, script: &str) -> String {
    let all = exec(job, &json!([shell(script)]), false);
    assert_eq!(all["execs"][0]["end"], 0, "{all}");
    all["execs"][0]["stdout"].as_str().expect("text").to_owned()
}

#[test]
fn it_ends_as_a_shell_says() {
    if !can_run("programs in running jobs") {
        return;
    }
    let execs = json!([
        shell("echo out; echo err >&2"),
        shell("exit 3"),
        {"command": ["no-such-program"]},
        {"command": ["/etc/passwd"]},
        shell("kill -TERM $$"),
        {"command": ["cat"], "stdin": "typed\n"},
        {"command": ["true"], "stdin": "x".repeat(100_000)},
        {"command": ["sh", "-c", "echo $OWN $MORE $HOME $USER $PWD"], "env": {"MORE": "more"}, "cwd": "/tmp"},
        {"command": []},
        {"command": ["true"], "cwd": "not/absolute"},
    ]);
    let all = exec(&running(":"), &execs, false);
    let ends: Vec<_> = (0..8).map(|at| all["execs"][at]["end"].clone()).collect();
    assert_eq!(ends, [0, 3, 127, 126, 143, 0, 0, 0].map(|code| json!(code)), "{all}");
    assert_eq!((&all["execs"][0]["stdout"], &all["execs"][0]["stderr"]), (&json!("out\n"), &json!("err\n")));
    assert_eq!(all["execs"][5]["stdout"], "typed\n");
    assert_eq!(all["execs"][7]["stdout"], "job more /home/job job /tmp\n");
    for wrong in [8, 9] {
        assert!(all["execs"][wrong]["end"].is_string(), "{all}");
    }
    assert_eq!(all["result"]["reason"], "requested", "{all}");
}

#[test]
fn it_is_where_the_job_is_and_as_confined() {
    if !can_run("namespaces of programs in running jobs") {
        return;
    }
    let look = "for ns in user mnt pid net ipc uts; do readlink /proc/self/ns/$ns; done; cat /proc/self/cgroup; id -u; id -G; \
                grep -E '^(CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp|Seccomp_filters):' /proc/self/status; \
                cat /proc/self/limits; cat /proc/self/oom_score_adj; ls /proc/self/fd; umask; hostname";
    let job = running(&format!("({look}) > /tmp/own"));
    let all = exec(&job, &json!([shell("cat /tmp/own"), shell(look)]), false);
    let (own, others) = (&all["execs"][0]["stdout"], &all["execs"][1]["stdout"]);
    let text = others.as_str().expect("text");
    assert_eq!(own, others, "{all}");
    assert!(text.contains("NoNewPrivs:\t1") && text.contains("Seccomp:\t2"), "{text}");
    assert!(
        text.contains("CapEff:\t0000000000000000") && text.contains("CapBnd:\t0000000000000000"),
        "{text}"
    );
    assert!(text.contains("\n1001\n"), "{text}");
}

#[test]
fn the_job_sees_the_program_and_nothing_of_who_brought_it() {
    if !can_run("ushers that cannot be seen") {
        return;
    }
    // Whatever it can read of any process while programs come: descriptors and the binary of one that is not the job's.
    let spy = "import os, threading\nprint('runs', flush=True)\nbad=set()\nfor _ in range(200000):\n  for p in os.listdir('/proc'):\n\
               \x20   if not p.isdigit() or int(p) == os.getpid(): continue\n    try:\n      exe = os.readlink(f'/proc/{p}/exe')\n\
               \x20     if not exe.startswith(('/usr/', '/bin/')): bad.add(exe)\n\
               \x20     for fd in os.listdir(f'/proc/{p}/fd'):\n        to = os.readlink(f'/proc/{p}/fd/{fd}')\n\
               \x20       if not to.startswith(('pipe:', '/dev/', '/proc/', '/usr/', '/lib', '/bin/', '/etc/', '/tmp/stop')): bad.add(to)\n\
               \x20   except OSError: pass\n  if os.path.exists('/tmp/stop'): break\nprint(bad)";
    let job = json!({"layers": ["host"], "command": ["python3", "-c", spy], "limits": {"wall_time_ms": 60_000, "cpu_millis": 2000}});
    let mut execs: Vec<_> = (0..40).map(|_| shell(":")).collect();
    execs.push(shell("touch /tmp/stop"));
    let all = exec(&job, &json!(execs), true);
    assert_eq!(all["result"]["stdout"]["text"], "runs\nset()\n", "{all}");
}

#[test]
fn what_it_uses_counts_for_the_job() {
    if !can_run("limits of programs in running jobs") {
        return;
    }
    let mut job = running(":");
    job["limits"]["memory_bytes"] = json!(48 << 20);
    let hog = json!([{"command": ["python3", "-c", "b = bytearray(200 << 20)"]}]);
    let all = exec(&job, &hog, true);
    assert_eq!(all["execs"][0]["end"], 137, "{all}");
    assert_eq!(
        (&all["result"]["status"], &all["result"]["reason"]),
        (&json!("limit_exceeded"), &json!("memory"))
    );
}

#[test]
fn it_ends_with_the_job() {
    if !can_run("the end of programs in running jobs") {
        return;
    }
    let job = json!({"layers": ["host"], "command": ["sh", "-c", "echo runs; sleep 1; exit 5"]});
    let all = exec(&job, &json!([shell("sleep 50"), shell("true")]), true);
    assert_eq!(all["execs"][0]["end"], 137, "{all}");
    assert!(all["execs"][1]["end"].as_str().is_some_and(|end| end.contains("does not run here")), "{all}");
    assert_eq!(all["result"]["exit_code"], 5, "{all}");
}

#[test]
fn it_can_have_a_terminal() {
    if !can_run("terminals of programs in running jobs") {
        return;
    }
    let script = "tty; stty size; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && : < /dev/tty && echo all; exit 3";
    let execs = json!([
        {"command": ["sh", "-c", script], "tty": true},
        {"command": ["sh", "-c", "read x; for i in $(seq 500); do [ \"$(stty size)\" = '50 132' ] && break; sleep 0.02; done; stty size"], "tty": true, "stdin": "go\n", "resize": [50, 132]},
    ]);
    let all = exec(&running(":"), &execs, false);
    assert_eq!(all["execs"][0]["end"], 3, "{all}");
    assert_eq!(all["execs"][0]["stdout"], "/dev/pts/0\r\n24 80\r\nall\r\n", "{all}");
    assert!(all["execs"][1]["stdout"].as_str().is_some_and(|text| text.contains("50 132")), "{all}");
}

#[test]
fn a_job_that_mentions_the_program_s_own_binary_gets_no_host_file_to_write() {
    if !can_run("the host's binary from within a job") {
        return;
    }
    // CVE-2019-5736: a program that is a link to whoever starts it, written to while it runs.
    let said = output(
        &running(
            "ln -s /proc/self/exe /tmp/link; printf '#!/proc/self/exe\\n' > /tmp/script; chmod +x /tmp/script",
        ),
        "for p in /proc/[0-9]*; do sh -c \": > $p/exe\" 2>/dev/null && echo wrote $p; done; /tmp/link -c 'echo linked'; true",
    );
    assert!(!said.contains("wrote"), "{said}");
}
