//! Scratch space on disk: what holds of a disk in memory, and what only a disk has.
//!
//! What is small here is on disk all the same, since the rows' worker keeps nothing in memory.

use std::path::Path;

use hutch_proto::{OutputKind, Reason};
use serde_json::json;

use crate::row::{MIB, Row, Spec, py, row, sh, steps};

/// The setting under which these rows run.
pub(crate) const SETTING: (&str, &str) = ("HUTCH__WORKER__SCRATCH_MEMORY_BYTES", "4KiB");

/// A disk is full when less is left than the largest folio, or than a sixteenth of a small one.
fn nearly(all: u64) -> std::ops::RangeInclusive<u64> {
    all - (2 * MIB).min(all / 16)..=all
}

pub(crate) fn rows() -> Vec<Row> {
    if let Err(why) = possible() {
        hutch_tests::skip("scratch space on disk", &why);
        return Vec::new();
    }
    [space(), inodes(), attacks(), life()].into_iter().flatten().map(|row| row.with_env(SETTING)).collect()
}

pub(crate) fn possible() -> Result<(), String> {
    if !["/sbin/mkfs.ext4", "/usr/sbin/mkfs.ext4"].into_iter().any(|path| Path::new(path).exists()) {
        return Err("mkfs.ext4 (e2fsprogs) is missing".to_owned());
    }
    let control = std::fs::File::options().read(true).write(true).open("/dev/loop-control");
    control.map(drop).map_err(|e| format!("no loop devices: {e}"))
}

fn space() -> Vec<Row> {
    let small = json!({"disk_bytes": 8 * MIB});
    let full = |name: &str, spec: Spec| {
        row(name, spec.limits(small.clone()))
            .hits(Reason::Disk, "disk_bytes", 8 * MIB, nearly(8 * MIB))
            .usage("disk_bytes", nearly(8 * MIB))
            .says("disk")
    };
    let fill = |path: &str| sh(&format!("dd if=/dev/zero of={path} bs=64k count=200 2> /tmp/said; exit 5"));
    vec![
        full("on disk: full", fill("/tmp/x")).having_exited(5),
        full("on disk: full, in /usr", fill("/usr/x").set("user", json!("root"))).having_exited(5),
        full("on disk: full, in /dev/shm", fill("/dev/shm/x")).having_exited(5),
        full(
            "on disk: full, by many files",
            sh("for i in $(seq 300); do head -c 65536 /dev/zero > /tmp/$i || exit 7; done"),
        )
        .having_exited(7),
        row(
            "on disk: all of it can be written",
            sh("head -c 8000000 /dev/zero > /tmp/x").limits(small.clone()),
        )
        .usage("disk_bytes", 8_000_000..=8 * MIB),
        row("on disk: nothing written is nothing used", sh("exit 0").limits(small.clone()))
            .usage("disk_bytes", 0..=0)
            .usage("disk_inodes", 0..=0),
        row(
            "on disk: it is not paid from memory",
            sh("head -c 60000000 /dev/zero > /tmp/x; cat /tmp/x | wc -c"),
        )
        .check(|result| {
            crate::row::holds(result.stdout.data == b"60000000\n", || "not read back".to_owned())
        }),
        row(
            "on disk: more than the job's memory",
            // Each piece is on disk before the next: cgroup v1 does not hold back who writes faster than a disk takes it.
            sh("dd if=/dev/zero of=/tmp/x bs=64k count=1000 oflag=dsync 2> /dev/null; wc -c < /tmp/x")
                .limits(json!({"memory_bytes": 24 * MIB, "disk_bytes": 100 * MIB})),
        )
        .stdout("65536000\n"),
        row("a disk larger than the host's", sh("exit 0").limits(json!({"disk_bytes": 1_u64 << 49})))
            .refused(Reason::SpecInvalid, &["limits.disk_bytes", "than the disk of"]),
    ]
}

fn inodes() -> Vec<Row> {
    let few = json!({"disk_inodes": 100, "disk_bytes": 8 * MIB});
    let touch = "i=0; while [ $i -lt 500 ] && true > /tmp/$i; do i=$((i+1)); done 2> /dev/null";
    vec![
        row("on disk: no more files than allowed", sh(&format!("{touch}; [ $i = 500 ]")).limits(few.clone()))
            .hits(Reason::Disk, "disk_inodes", 100, 100..=100)
            .having_exited(1)
            .usage("disk_inodes", 100..=100),
        row(
            "on disk: more files than one group holds",
            sh("df -i / | tail -1 | awk '{ exit $4 < 200000 }'").limits(json!({"disk_inodes": 200_000})),
        ),
    ]
}

/// Ways around the size.
fn attacks() -> Vec<Row> {
    let small = json!({"disk_bytes": 8 * MIB});
    let full = |name: &str, script: &str| {
        row(name, py(&format!("import os, mmap\n{script}")).limits(small.clone()))
            .hits(Reason::Disk, "disk_bytes", 8 * MIB, nearly(8 * MIB))
            .having_exited(3)
            .usage("disk_bytes", nearly(8 * MIB))
    };
    let fd = "f = os.open('/tmp/x', os.O_RDWR | os.O_CREAT)\n";
    vec![
        full(
            "on disk: fallocate takes no more",
            &format!("{fd}n = 0\ntry:\n  while True:\n    os.posix_fallocate(f, n, 1 << 16); n += 1 << 16\nexcept OSError as e:\n  print(e.errno, flush=True); os._exit(3)"),
        )
        .stdout("28\n"),
        row(
            "on disk: a hole is not room",
            py(&format!("import os\n{fd}os.truncate(f, 1 << 40)\nprint(os.stat(f).st_size)")).limits(small.clone()),
        )
        .stdout("1099511627776\n")
        .usage("disk_bytes", 0..=65_536),
        // Holes are filled through a map: the page that has no room is a SIGBUS, and nothing is lost before it.
        row(
            "on disk: a map of holes",
            py(&format!("import os, mmap\n{fd}os.truncate(f, 32 << 20)\nm = mmap.mmap(f, 32 << 20)\nfor i in range(0, 32 << 20, 4096): m[i] = 1"))
                .limits(small.clone()),
        )
        .hits(Reason::Disk, "disk_bytes", 8 * MIB, nearly(8 * MIB))
        .having_died("SIGBUS"),
        full(
            "on disk: past the page cache",
            "f = os.open('/tmp/x', os.O_RDWR | os.O_CREAT | os.O_DIRECT)\nb = mmap.mmap(-1, 1 << 16)\ntry:\n  while True: os.write(f, b)\nexcept OSError as e:\n  print(e.errno, flush=True); os._exit(3)",
        )
        .stdout("28\n"),
        row(
            "on disk: room that was given back is there again",
            sh("for i in 1 2 3 4 5; do head -c 7000000 /dev/zero > /tmp/x || exit 1; rm /tmp/x; sync; done")
                .limits(small.clone()),
        ),
        row(
            "on disk: no device of the host's is there",
            sh("ls /dev | grep -c loop; find / -xdev -type b 2> /dev/null | wc -l").limits(small.clone()),
        )
        .stdout("0\n0\n"),
        row(
            "on disk: root inside has no more than anybody",
            sh("dd if=/dev/zero of=/x bs=64k count=200 2> /dev/null; exit 6").limits(small).set("user", json!("root")),
        )
        .hits(Reason::Disk, "disk_bytes", 8 * MIB, nearly(8 * MIB))
        .having_exited(6),
    ]
}

fn life() -> Vec<Row> {
    let small = json!({"disk_bytes": 8 * MIB});
    vec![
        row(
            "on disk: steps share it",
            steps(json!([
                {"name": "a", "command": ["sh", "-c", "head -c 5000000 /dev/zero > /tmp/a; echo kept > /tmp/k"]},
                {"name": "b", "command": ["sh", "-c", "cat /tmp/k; rm /tmp/a; head -c 5000000 /dev/zero > /tmp/b"]},
                {"name": "c", "command": ["sh", "-c", "wc -c < /tmp/b; head -c 5000000 /dev/zero > /tmp/c"]},
            ]))
            .limits(small.clone()),
        )
        .hits(Reason::Disk, "disk_bytes", 8 * MIB, nearly(8 * MIB))
        .having_exited(1)
        .stdout("kept\n5000000\n"),
        row(
            "on disk: outputs and files",
            sh("cat /box/in > /box/out; mkdir /box/d; ln -s out /box/l; rm /etc/hostname 2> /dev/null; stat -c %u /box/out")
                .limits(small)
                .file("/box/in", "text", "0644")
                .set("outputs", json!({"paths": ["/box/*"]})),
        )
        .stdout("1001\n")
        .output("/box/out", OutputKind::File)
        .output("/box/d", OutputKind::Dir)
        .output("/box/l", OutputKind::Symlink),
    ]
}
