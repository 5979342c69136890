//! How programs end: by exit, by signals, by way of other programs.

use std::time::Duration;

use hutch_proto::Reason;
use serde_json::json;

use crate::row::{Row, SOME, probe, row, sh, sh_probe};

/// The signals that end a program by default, but for SIGKILL and SIGSTOP all that a program can also ignore.
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
    (34, "SIGRTMIN"),
    (37, "SIGRTMIN+3"),
    (64, "SIGRTMIN+30"),
];

/// Those that do nothing by default, and those that stop: in an orphaned process group, which is what a program
/// without a terminal is in, a stop from the keyboard does nothing either (setpgid(2)).
const HARMLESS: &[(i32, &str)] = &[
    (17, "SIGCHLD"),
    (18, "SIGCONT"),
    (20, "SIGTSTP"),
    (21, "SIGTTIN"),
    (22, "SIGTTOU"),
    (23, "SIGURG"),
    (28, "SIGWINCH"),
];

pub(crate) fn rows() -> Vec<Row> {
    [exits(), signals(), chains()].into_iter().flatten().collect()
}

fn exits() -> Vec<Row> {
    let mut rows: Vec<Row> = [0, 1, 2, 42, 126, 127, 255]
        .into_iter()
        .map(|code| {
            row(format!("exit {code}"), sh(&format!("exit {code}"))).exits(code).stdout("").stderr("")
        })
        .collect();
    rows.push(row("exit -1", probe("exit -1")).exits(255));
    rows.push(row("exit 256 is 0", probe("exit 256")).exits(0));
    rows.push(row("an exit code above 128 is no signal", sh("exit 137")).exits(137).says("137"));
    rows
}

fn signals() -> Vec<Row> {
    let mut rows: Vec<Row> = DEADLY
        .iter()
        .map(|(number, name)| {
            row(format!("signal {number}, {name}"), probe(&format!("signal {number}")))
                .dies(name)
                .stdout("")
                .says(name)
        })
        .collect();
    rows.extend(HARMLESS.iter().map(|(number, name)| {
        row(format!("signal {number}, {name}, does nothing"), probe(&format!("signal {number}")))
            .stdout("alive\n")
    }));
    rows.push(
        row(
            "signal 19, SIGSTOP, waits for the clock",
            probe("signal 19").limits(json!({"wall_time_ms": 700})),
        )
        .hits(Reason::WallTime, "wall_time_ms", 700, 700..=10_000)
        .cpu_ms(0..=600),
    );
    rows.push(row("a null pointer", probe("null")).dies("SIGSEGV"));
    rows.push(row("a division by zero", probe("divide")).dies("SIGFPE"));
    rows.push(row("no such instruction", probe("trap")).dies("SIGILL"));
    rows.push(row("abort", probe("abort")).dies("SIGABRT"));
    rows.push(row("memory behind the end of a file", probe("bus")).dies("SIGBUS"));
    rows.push(row("a signal of a child's is the shell's code", sh_probe("$P null; exit $?")).exits(139));
    rows.push(row("a child kills its parent", sh("sh -c 'kill -9 $PPID'; sleep 20")).dies("SIGKILL"));
    rows.push(row("the first process cannot be killed", sh("kill -9 1; kill -TERM 1; exit 8")).exits(8));
    rows.push(row("everybody else can be killed", sh("sleep 50 & kill -9 -1; exit 4")).exits(4));
    rows
}

fn chains() -> Vec<Row> {
    let quick = |row: Row| {
        row.check(|result| {
            let took = Duration::from_millis(result.usage.wall_time_ms);
            crate::row::holds(took < Duration::from_secs(15), || format!("it took {took:?}"))
        })
    };
    vec![
        row("one program becomes another", sh("exec sh -c 'exec sh -c \"exec sh -c \\\"exit 7\\\"\"'"))
            .exits(7),
        row("the last of a chain dies", sh_probe("exec sh -c 'exec $P signal 11'")).dies("SIGSEGV"),
        row("children's children", sh("sh -c 'sh -c \"sh -c \\\"exit 3\\\"\"'; exit $?")).exits(3),
        row("a pipe of programs", sh("echo abc | tr a-c x-z | rev")).stdout("zyx\n").usage("pids_peak", SOME),
        quick(row("a child in the background", sh("sleep 100 & echo done")).stdout("done\n")),
        quick(row("a daemon that keeps stdout", probe("daemon")).stdout("left\n")),
        quick(row("a session of its own", sh("setsid sleep 100 & exit 5")).exits(5)),
        quick(
            row("a child that goes on printing", sh("yes & sleep 0.2; exit 6"))
                .exits(6)
                .check(|result| crate::row::holds(result.stdout.bytes > 0, || "no output".to_owned())),
        ),
        row("always in a new session, always forking", probe("flee").limits(json!({"pids": 32})))
            .exits(0)
            .usage("pids_peak", 1..=32),
        row(
            "zombies that nobody waits for",
            sh("for i in 1 2 3 4 5 6 7 8; do (true &) ; done; sleep 0.2; exit 0"),
        )
        .exits(0),
    ]
}
