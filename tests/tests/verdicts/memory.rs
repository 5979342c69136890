//! Memory in every shape in which a program can have it.

use hutch_proto::Reason;
use serde_json::json;

use crate::row::{MIB, Row, Spec, holds, probe, py, row, same, sh, sh_probe, steps};

/// What these programs may have.
const ALLOWED: u64 = 64 * MIB;

fn limited(spec: Spec) -> Spec {
    spec.limits(json!({"memory_bytes": ALLOWED}))
}

/// The limit ends the job, and the kernel says that it killed.
fn too_much(name: &str, spec: Spec) -> Row {
    row(name, limited(spec)).out_of_memory(ALLOWED).says("memory").says("67108864")
}

pub(crate) fn rows() -> Vec<Row> {
    [too_much_rows(), enough_rows()].into_iter().flatten().collect()
}

fn too_much_rows() -> Vec<Row> {
    let dd = |path: &str| sh(&format!("dd if=/dev/zero of={path} bs=1M count=200; sleep 20; echo survived"));
    vec![
        too_much("memory by malloc", probe("heap 256")).stdout(""),
        too_much("memory by mmap", probe("map 256")).stdout(""),
        too_much("memory by python", py("x = bytearray(300 << 20)\nprint('survived')")).stdout(""),
        too_much("memory by System V", probe("system-v 256")),
        too_much("memory by memfd", probe("memfd 256")),
        too_much("memory by /dev/shm", dd("/dev/shm/x")).never_prints("survived"),
        too_much("memory by a file in /tmp", dd("/tmp/x")).never_prints("survived"),
        too_much("memory by a file in the home", dd("$HOME/x")).never_prints("survived"),
        too_much(
            "memory by a stack that may grow so far",
            probe("recurse").limits(json!({"stack_bytes": 1 << 30})),
        ),
        too_much(
            "memory in a child, while the parent lives",
            sh_probe("$P heap 256 & wait; sleep 20; echo survived"),
        )
        .never_prints("survived")
        .usage("wall_time_ms", 0..=15_000),
        too_much(
            "memory in a child, while others live",
            sh_probe("sleep 40 & sleep 40 & $P map 256; sleep 20; exit 0"),
        )
        .usage("wall_time_ms", 0..=15_000),
        too_much("memory in many small children", probe("children 40 4")).never_prints("survived"),
        too_much(
            "memory in a child of another session",
            sh_probe("setsid $P heap 256 & sleep 20; echo survived"),
        )
        .never_prints("survived")
        .usage("wall_time_ms", 0..=15_000),
        too_much(
            "memory, whatever grace there is",
            probe("heap 256").limits(json!({"kill_grace_ms": 20_000})),
        )
        .usage("wall_time_ms", 0..=15_000),
        row(
            "memory in a later step",
            steps(json!([
                {"name": "small", "command": ["true"]},
                {"name": "large", "command": ["python3", "-c", "x = bytearray(300 << 20)"],
                 "limits": {"memory_bytes": ALLOWED}},
                {"name": "never", "command": ["true"]},
            ])),
        )
        .out_of_memory(ALLOWED)
        .check(|result| same("steps", &result.steps.len(), &2)),
        row(
            "memory by files, a part in each step",
            steps(json!([
                {"name": "a", "command": ["sh", "-c", "head -c 40000000 /dev/zero > /tmp/a"]},
                {"name": "b", "command": ["sh", "-c", "head -c 40000000 /dev/zero > /tmp/b"]},
            ]))
            .limits(json!({"memory_bytes": ALLOWED})),
        )
        .out_of_memory(ALLOWED)
        .check(|result| same("steps", &result.steps.len(), &2)),
        row(
            "memory by the files that came with the job",
            limited(probe("map 40"))
                .file("/box/large", &"x".repeat(7_000_000), "0644")
                .limits(json!({"memory_bytes": 44 * MIB})),
        )
        .out_of_memory(44 * MIB),
    ]
}

fn enough_rows() -> Vec<Row> {
    vec![
        row("a stack without end", limited(probe("recurse"))).dies("SIGSEGV").usage("oom_kills", 0..=0),
        row("a stack without end, and a small stack", limited(probe("recurse").limits(json!({"stack_bytes": 262_144}))))
            .dies("SIGSEGV")
            .usage("memory_peak_bytes", 1..=4 * MIB),
        row("a stack without end, in python", py("import sys\nsys.setrecursionlimit(10)\nf = lambda: f()\nf()"))
            .exits(1)
            .check(|result| {
                let said = crate::row::text(&result.stderr);
                holds(said.contains("RecursionError"), || said)
            }),
        row("memory below the limit", limited(probe("map 32")))
            .stdout("held 32\n")
            .usage("memory_peak_bytes", 32 * MIB..=ALLOWED)
            .usage("oom_kills", 0..=0),
        row("memory that is given back", limited(probe("twice 40"))).usage("memory_peak_bytes", 40 * MIB..=ALLOWED),
        row("address space is no memory", limited(probe("reserve 256"))).stdout("reserved\n"),
        row("memory that cannot be locked", limited(probe("lock 1000000"))).exits(3).stdout("ENOMEM\n"),
        row(
            "files that are read are no memory for long",
            limited(sh("cat /usr/lib/*/*.so* /usr/bin/* 2> /dev/null | head -c 300000000 | wc -c")).limits(json!({"memory_bytes": 24 * MIB})),
        )
        .usage("memory_peak_bytes", 1..=24 * MIB),
        row("a file that is gone again is no memory", limited(sh("for i in 1 2 3 4; do dd if=/dev/zero of=/tmp/x bs=1M count=40 2> /dev/null && rm /tmp/x; done")))
            .usage("memory_peak_bytes", 30 * MIB..=ALLOWED),
        row("the least memory", sh("exit 0").limits(json!({"memory_bytes": 4 * MIB}))).usage("memory_peak_bytes", 1..=4 * MIB),
        row("too little to begin", probe("map 2").limits(json!({"memory_bytes": MIB})))
            .hits(Reason::Memory, "memory_bytes", MIB, MIB / 2..=2 * MIB),
    ]
}
