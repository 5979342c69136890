//! Several programs over one file system.

use hutch_proto::{Reason, Status};
use serde_json::json;

use crate::row::{ANY, Row, row, same, steps, text};

const OK: (Status, Option<Reason>) = (Status::Succeeded, None);
const NOT_OK: (Status, Option<Reason>) = (Status::Failed, Some(Reason::NonzeroExit));

pub(crate) fn rows() -> Vec<Row> {
    [order(), apart(), limits()].into_iter().flatten().collect()
}

fn order() -> Vec<Row> {
    let script = |name: &str, script: &str| json!({"name": name, "command": ["sh", "-c", script]});
    let allowed = |name: &str, script: &str| json!({"name": name, "command": ["sh", "-c", script], "allow_failure": true});
    vec![
        row("two steps share files", steps(json!([
            script("write", "echo hello > ~/x; echo there > /tmp/y; echo shm > /dev/shm/z; mkdir -p /tmp/d/e"),
            script("read", "cat ~/x /tmp/y /dev/shm/z; rmdir /tmp/d/e"),
            script("again", "ls -d /tmp/d/*; echo $?"),
        ])))
        .stdout("hello\nthere\nshm\n2\n")
        .ran(&[("write", OK.0, OK.1), ("read", OK.0, OK.1), ("again", OK.0, OK.1)]),
        row("a step that fails is the last", steps(json!([
            script("a", "echo a"), script("b", "echo b; exit 3"), script("c", "echo c"),
        ])))
        .exits(3)
        .stdout("a\nb\n")
        .ran(&[("a", OK.0, OK.1), ("b", NOT_OK.0, NOT_OK.1)])
        .check(|result| same("exit codes", &result.steps.iter().map(|step| step.exit_code).collect(), &vec![Some(0), Some(3)])),
        row("a step that may fail", steps(json!([
            script("a", "echo a"), allowed("b", "echo b; exit 3"), script("c", "echo c"),
        ])))
        .stdout("a\nb\nc\n")
        .ran(&[("a", OK.0, OK.1), ("b", NOT_OK.0, NOT_OK.1), ("c", OK.0, OK.1)]),
        row("a step that may fail, and one that may not", steps(json!([
            allowed("a", "exit 3"), script("b", "exit 4"), script("c", "exit 0"),
        ])))
        .exits(4)
        .ran(&[("a", NOT_OK.0, NOT_OK.1), ("b", NOT_OK.0, NOT_OK.1)]),
        row("a last step that may fail", steps(json!([script("a", "exit 0"), allowed("b", "kill -ABRT $$")])))
            .ran(&[("a", OK.0, OK.1), ("b", Status::Failed, Some(Reason::Signal))]),
        row("a limit of a step that may fail", steps(json!([
            {"name": "a", "command": ["sleep", "60"], "limits": {"wall_time_ms": 300}, "allow_failure": true},
            {"name": "b", "command": ["echo", "b"]},
        ])))
        .stdout("b\n")
        .ran(&[("a", Status::LimitExceeded, Some(Reason::WallTime)), ("b", OK.0, OK.1)]),
        row("a step that may not be there", steps(json!([
            {"name": "a", "command": ["no-such-command"], "allow_failure": true}, {"name": "b", "command": ["echo", "b"]},
        ])))
        .stdout("b\n")
        .ran(&[("a", Status::Failed, Some(Reason::CommandNotFound)), ("b", OK.0, OK.1)]),
        row("a program that an earlier step wrote", steps(json!([
            script("write", "printf '#!/bin/sh\\necho made\\n' > ~/x; chmod 755 ~/x"),
            {"name": "run", "command": ["/home/job/x"]},
        ])))
        .stdout("made\n"),
        row("files are written once", steps(json!([
            script("change", "cat /box/x; echo changed > /box/x"), script("read", "cat /box/x"),
        ])).file("/box/x", "given\n", "0644"))
        .stdout("given\nchanged\n"),
        row("as many steps as there may be", steps((0..32).map(|n| script(&format!("s{n}"), "echo x >> ~/x; wc -l < ~/x")).collect()))
            .check(|result| same("the last", &result.steps.last().map(|step| text(&step.stdout)), &Some("32\n".to_owned()))),
    ]
}

fn apart() -> Vec<Row> {
    vec![
        row("a step's processes are gone in the next", steps(json!([
            {"name": "a", "command": ["sh", "-c", "(trap '' HUP TERM; sleep 300) & setsid sleep 301 & echo $$"]},
            {"name": "b", "command": ["sh", "-c", "cat /proc/[0-9]*/comm; ls -d /proc/[0-9]* | wc -l"]},
        ])))
        .never_prints("sleep")
        .usage("wall_time_ms", 0..=20_000),
        row("a step's shared memory is gone in the next", steps(json!([
            {"name": "a", "command": ["python3", "-c",
                "import ctypes\nc = ctypes.CDLL(None)\nprint(c.shmget(4711, 4096, 0o1666) >= 0)"]},
            {"name": "b", "command": ["python3", "-c", "import ctypes\nc = ctypes.CDLL(None)\nprint(c.shmget(4711, 4096, 0))"]},
        ])))
        .stdout("True\n-1\n"),
        row("a step's port is free in the next", steps(json!([
            {"name": "a", "command": ["python3", "-c", SERVE]}, {"name": "b", "command": ["python3", "-c", SERVE]},
        ])))
        .stdout("served\nserved\n"),
        row("a step that breaks the next one's places", steps(json!([
            {"name": "a", "command": ["sh", "-c", "rm -rf /tmp /home /box; ln -s /etc /tmp; ln -s /proc/self/root /box; mkfifo /home; exit 0"]},
            {"name": "b", "command": ["sh", "-c", "echo alive; touch /tmp/x; readlink /tmp"], "cwd": "/"},
        ])).set("user", json!("root")))
        .stdout("alive\n/etc\n"),
        row("a step that leaves a FIFO for a passwd", steps(json!([
            {"name": "a", "command": ["sh", "-c", "rm /etc/passwd; mkfifo /etc/passwd"]},
            {"name": "b", "command": ["echo", "b"]},
        ])).set("user", json!("root")))
        .refused(Reason::SpecInvalid, &["/etc/passwd"])
        .ran(&[("a", OK.0, OK.1)]),
    ]
}

const SERVE: &str = "import socket\ns = socket.create_server(('127.0.0.1', 8080))\n\
                     c = socket.create_connection(('127.0.0.1', 8080))\nprint('served')";

fn limits() -> Vec<Row> {
    vec![
        row("each step has its own limits", steps(json!([
            {"name": "a", "command": ["sh", "-c", "ulimit -n"], "limits": {"open_files": 50}},
            {"name": "b", "command": ["sh", "-c", "ulimit -n; sleep 60"], "limits": {"wall_time_ms": 400}},
        ])).limits(json!({"open_files": 60, "wall_time_ms": 20_000})))
        .hits(Reason::WallTime, "wall_time_ms", 400, 400..=10_000)
        .stdout("50\n60\n")
        .ran(&[("a", OK.0, OK.1), ("b", Status::LimitExceeded, Some(Reason::WallTime))]),
        row("each step has its own processor time", steps(json!([
            {"name": "a", "command": ["python3", "-c", BURN]}, {"name": "b", "command": ["python3", "-c", BURN]},
            {"name": "c", "command": ["python3", "-c", BURN]},
        ])).limits(json!({"cpu_time_ms": 1500})))
        .cpu_ms(1190..=6000)
        .usage("wall_time_ms", ANY),
        row("each step has its own processes", steps(json!([
            {"name": "a", "command": ["sh", "-c", "sleep 9 & sleep 9 & echo a"]},
            {"name": "b", "command": ["sh", "-c", "sleep 9 & sleep 9 & echo b"]},
        ])).limits(json!({"pids": 3})))
        .stdout("a\nb\n")
        .usage("pids_peak", 3..=3)
        .usage("pids_denied", 0..=0),
    ]
}

const BURN: &str = "import time\nwhile time.process_time() < 0.4: pass";
