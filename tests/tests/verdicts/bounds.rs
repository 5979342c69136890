//! Processes, disk, size of files: limits that a program may meet and go on.

use hutch_proto::Reason;
use serde_json::json;

use crate::row::{MIB, Row, SOME, argv, probe, py, row, sh, sh_probe};

pub(crate) fn rows() -> Vec<Row> {
    [processes(), disk(), inodes(), size_of_files(), processors()].into_iter().flatten().collect()
}

fn processes() -> Vec<Row> {
    let few = json!({"pids": 16});
    vec![
        row("no more processes than allowed", probe("forks").limits(few.clone()))
            .stdout("15 EAGAIN\n")
            .usage("pids_peak", 16..=16)
            .usage("pids_denied", SOME),
        row("threads are processes", probe("threads").limits(few.clone()))
            .stdout("15 EAGAIN\n")
            .usage("pids_peak", 16..=16)
            .usage("pids_denied", SOME),
        row(
            "a shell that cannot fork",
            sh("sleep 9 & sleep 9 & sleep 9 & sleep 9 & echo all").limits(json!({"pids": 3})),
        )
        .exits(2)
        .usage("pids_denied", SOME)
        .usage("pids_peak", 3..=3),
        row("one process alone", argv(&["true"]).limits(json!({"pids": 1})))
            .usage("pids_peak", 1..=1)
            .usage("pids_denied", 0..=0),
        row("within the processes allowed", sh("for i in 1 2 3 4 5; do sleep 0.2 & done; wait").limits(few))
            .usage("pids_peak", 5..=16)
            .usage("pids_denied", 0..=0),
        row("a fork bomb", probe("bomb").limits(json!({"pids": 50, "wall_time_ms": 1500})))
            .hits(Reason::WallTime, "wall_time_ms", 1500, 1500..=20_000)
            .usage("pids_peak", 50..=50)
            .usage("pids_denied", SOME),
        row(
            "a fork bomb with little memory",
            probe("bomb").limits(json!({"pids": 4000, "memory_bytes": 32 * MIB, "wall_time_ms": 30_000})),
        )
        .out_of_memory(32 * MIB),
        row(
            "a fork bomb of a shell's",
            sh("f() { f | f & }; f; sleep 2; exit 3").limits(json!({"pids": 40})),
        )
        .usage("pids_peak", 40..=40)
        .usage("pids_denied", SOME)
        .exits(3)
        .however_it_ended(),
    ]
}

fn disk() -> Vec<Row> {
    let small = json!({"disk_bytes": 4 * MIB});
    let fill = |path: &str, then: &str| {
        sh(&format!("dd if=/dev/zero of={path} bs=64k count=200 2> /tmp/said; {then}"))
    };
    let full = |name: &str, spec: crate::row::Spec| {
        row(name, spec.limits(small.clone()))
            .hits(Reason::Disk, "disk_bytes", 4 * MIB, 4 * MIB..=4 * MIB)
            .usage("disk_bytes", 4 * MIB..=4 * MIB)
            .says("disk")
    };
    vec![
        full("a disk that is full", fill("/tmp/x", "exit 5")).having_exited(5),
        full("a disk that is full, in the home", fill("$HOME/x", "exit 1")).having_exited(1),
        full("a disk that is full, in /usr", fill("/usr/x", "exit 1").set("user", json!("root")))
            .having_exited(1),
        full("a disk that is full, in /dev/shm", fill("/dev/shm/x", "exit 1")).having_exited(1),
        full("a disk that is full, in python", py("open('/tmp/x', 'wb').write(b'x' * (8 << 20))"))
            .having_exited(1),
        full(
            "a disk that is full, by many files",
            sh("for i in $(seq 200); do head -c 65536 /dev/zero > /tmp/$i || exit 7; done"),
        )
        .having_exited(7),
        full(
            "a disk that is full, and an abort",
            sh_probe("dd if=/dev/zero of=/tmp/x bs=64k count=200; exec $P abort"),
        )
        .having_died("SIGABRT"),
        row("a full disk is no failure by itself", fill("/tmp/x", "exit 0").limits(small.clone()))
            .usage("disk_bytes", 4 * MIB..=4 * MIB),
        row(
            "a full disk says so",
            sh("dd if=/dev/zero of=/tmp/x bs=64k count=200 2>&1 | grep -o 'No space left.*'")
                .limits(small.clone()),
        )
        .stdout("No space left on device\n"),
        row(
            "a failure without a full disk",
            sh("head -c 3000000 /dev/zero > /tmp/x; exit 5").limits(small.clone()),
        )
        .exits(5)
        .usage("disk_bytes", 2_900_000..=4 * MIB - 1),
        row("reading is not writing", sh("cat /usr/bin/* 2> /dev/null | wc -c").limits(small.clone()))
            .usage("disk_bytes", 0..=65_536),
        row("nothing written is nothing used", sh("exit 0"))
            .usage("disk_bytes", 0..=0)
            .usage("disk_inodes", 0..=0),
        row("what was written at the end counts", sh("head -c 1000000 /dev/zero > /tmp/x"))
            .usage("disk_bytes", 1_000_000..=1_100_000)
            .usage("disk_inodes", 1..=3),
        row(
            "steps share the disk",
            crate::row::steps(json!([
                {"name": "a", "command": ["sh", "-c", "head -c 3000000 /dev/zero > /tmp/a"]},
                {"name": "b", "command": ["sh", "-c", "head -c 3000000 /dev/zero > /tmp/b"]},
            ]))
            .limits(small),
        )
        .hits(Reason::Disk, "disk_bytes", 4 * MIB, 4 * MIB..=4 * MIB)
        .having_exited(1),
    ]
}

fn inodes() -> Vec<Row> {
    let few = json!({"disk_inodes": 100});
    let touch = "i=0; while [ $i -lt 500 ] && true > /tmp/$i; do i=$((i+1)); done 2> /dev/null";
    vec![
        row("no more files than allowed", sh(&format!("{touch}; [ $i = 500 ]")).limits(few.clone()))
            .hits(Reason::Disk, "disk_inodes", 100, 100..=100)
            .having_exited(1)
            .usage("disk_inodes", 100..=100)
            .says("disk"),
        row(
            "as many directories as allowed, and exit 0",
            sh("cd /tmp; for i in $(seq 500); do mkdir $i || exit 0; done 2> /dev/null").limits(few.clone()),
        )
        .usage("disk_inodes", 100..=100),
        row("how many files there may be", sh(&format!("{touch}; echo $i")).limits(few)).check(|result| {
            let count = crate::row::text(&result.stdout).trim().parse().unwrap_or(0);
            crate::row::within("files made", count, &(90..=100))
        }),
    ]
}

fn size_of_files() -> Vec<Row> {
    let limited = json!({"file_size_bytes": MIB});
    vec![
        row("a file larger than allowed", probe("write /tmp/x 2000000").limits(limited.clone()))
            .hits(Reason::FileSize, "file_size_bytes", MIB, MIB..=MIB)
            .having_died("SIGXFSZ")
            .usage("disk_bytes", MIB..=MIB + 65_536),
        row("a file as large as allowed", probe("write /tmp/x 1048576").limits(limited.clone())),
        row(
            "a file larger than allowed, written by a child",
            sh_probe("$P write /tmp/x 2000000; exit $?").limits(limited.clone()),
        )
        .exits(153),
        row(
            "a program that ignores SIGXFSZ",
            py("open('/tmp/x', 'wb').write(b'x' * (2 << 20))").limits(limited),
        )
        .exits(1)
        .check(|result| {
            let said = crate::row::text(&result.stderr);
            crate::row::holds(said.contains("File too large"), || said)
        }),
        row("no file at all", sh("exec 2> /dev/null; echo x > /tmp/x").limits(json!({"file_size_bytes": 0})))
            .hits(Reason::FileSize, "file_size_bytes", 0, 0..=0)
            .having_died("SIGXFSZ"),
        row("output is no file", sh("head -c 100000 /dev/zero").limits(json!({"file_size_bytes": 10}))),
        row("no core", sh_probe("ulimit -c; $P abort; ls; exit 0")).stdout("0\n"),
    ]
}

fn processors() -> Vec<Row> {
    let nproc = py("import os\nprint(sorted(os.sched_getaffinity(0)))");
    vec![
        row("one processor of several", nproc.clone().limits(json!({"cpuset": "0"}))).stdout("[0]\n"),
        row("a processor that is not there", nproc.limits(json!({"cpuset": "900"})))
            .refused(Reason::SpecInvalid, &["limits.cpuset", "900"]),
    ]
}
