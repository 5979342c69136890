//! The use of disks: how fast, and how much in all. What is written goes past the page cache or is waited for, since
//! cgroup v1 holds back, and counts, nothing else.
//!
//! Only that a job was held back long enough is asked, never that it was quick.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use hutch_proto::Reason;
use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

use crate::row::{ANY, MIB, Row, SOME, Spec, row, sh};
use crate::scratch;

pub(crate) fn rows() -> Vec<Row> {
    if let Err(why) = scratch::possible().and_then(|()| possible()) {
        hutch_tests::skip("the use of disks", &why);
        return Vec::new();
    }
    let rows = [rates(), totals(), ends()].into_iter().flatten().map(|mut row| {
        row.name = format!("disk use: {}", row.name);
        row.with_env(scratch::SETTING)
    });
    rows.collect()
}

fn possible() -> Result<(), String> {
    let device = std::env::temp_dir().metadata().map_err(|e| e.to_string())?.dev();
    let device = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    if !Path::new(&device).exists() {
        return Err("temporary files are not on a disk".to_owned());
    }
    let controllers = std::fs::read_to_string("/proc/cgroups").map_err(|e| e.to_string())?;
    let blkio = controllers.lines().any(|line| line.starts_with("blkio") && line.ends_with('1'));
    if blkio { Ok(()) } else { Err("no blkio controller".to_owned()) }
}

/// It writes or reads 4 MiB, 64 KiB at a time, of which a disk is to take 2 MiB a second, or 32 a second.
const TOOK_LONG: std::ops::RangeInclusive<u64> = 1000..=u64::MAX;

const WRITE: &str = "dd if=/dev/zero of=/tmp/x bs=64k count=64 oflag=direct 2> /dev/null";

fn with(script: &str, limits: Value) -> Spec {
    sh(script).limits(json!({"disk_bytes": 64 * MIB})).limits(limits)
}

fn rates() -> Vec<Row> {
    let volume = json!([{"volume": "rate", "target": "/v"}]);
    let written = json!({"io_write_bytes_per_s": 2 * MIB});
    let slow = |name: &str, spec: Spec| row(name, spec).usage("wall_time_ms", TOOK_LONG);
    vec![
        row("a disk that is written to as fast as it takes it", with(WRITE, json!({})))
            // Once, though it goes through a second device.
            .usage("io_write_bytes", 4 * MIB..=6 * MIB),
        slow("bytes written a second", with(WRITE, written.clone()))
            .usage("io_write_bytes", 4 * MIB..=6 * MIB),
        slow("writes a second", with(WRITE, json!({"io_write_ops_per_s": 32}))),
        slow(
            "bytes written a second, when they are waited for",
            with("dd if=/dev/zero of=/tmp/x bs=64k count=64 conv=fsync 2> /dev/null", written.clone()),
        ),
        slow(
            "bytes read a second",
            with(
                &format!("{WRITE}; dd if=/tmp/x of=/dev/null bs=64k iflag=direct 2> /dev/null"),
                json!({"io_read_bytes_per_s": 2 * MIB}),
            ),
        )
        .usage("io_read_bytes", 4 * MIB..=6 * MIB),
        slow(
            "reads a second",
            with(
                &format!("{WRITE}; dd if=/tmp/x of=/dev/null bs=64k iflag=direct 2> /dev/null"),
                json!({"io_read_ops_per_s": 32}),
            ),
        ),
        slow(
            "bytes written a second to a volume",
            with(&WRITE.replace("/tmp", "/v"), written).set("volumes", volume),
        ),
    ]
}

fn totals() -> Vec<Row> {
    let more = 8 * MIB + 1..=u64::MAX;
    let endless = "while :; do dd if=/dev/zero of=/tmp/x bs=64k count=64 oflag=direct 2> /dev/null; done";
    vec![
        row("bytes written in all", with(endless, json!({"io_write_bytes": 8 * MIB})))
            .hits(Reason::Disk, "io_write_bytes", 8 * MIB, more.clone())
            .usage("io_write_bytes", more.clone())
            .says("8388608 bytes allowed"),
        row(
            "bytes written in all, to a volume",
            with(&endless.replace("/tmp", "/v"), json!({"io_write_bytes": 8 * MIB}))
                .set("volumes", json!([{"volume": "total", "target": "/v"}])),
        )
        .hits(Reason::Disk, "io_write_bytes", 8 * MIB, more.clone()),
        row(
            "bytes read in all",
            with(
                &format!(
                    "{WRITE}; while :; do dd if=/tmp/x of=/dev/null bs=64k iflag=direct 2> /dev/null; done"
                ),
                json!({"io_read_bytes": 8 * MIB}),
            ),
        )
        .hits(Reason::Disk, "io_read_bytes", 8 * MIB, more.clone()),
        row("more than is allowed, quicker than we look", with(WRITE, json!({"io_write_bytes": MIB})))
            .hits(Reason::Disk, "io_write_bytes", MIB, MIB + 1..=u64::MAX)
            .however_it_ended(),
        row("no more than is allowed", with(WRITE, json!({"io_write_bytes": 16 * MIB})))
            .usage("io_write_bytes", SOME),
        row(
            "the bytes of each step are its own",
            crate::row::steps(json!([
                {"name": "a", "command": ["sh", "-c", WRITE]},
                {"name": "b", "command": ["sh", "-c", WRITE]},
            ]))
            .limits(json!({"disk_bytes": 64 * MIB, "io_write_bytes": 6 * MIB})),
        )
        .usage("io_write_bytes", 8 * MIB..=12 * MIB),
    ]
}

/// What is held back does not hold up an end: 32 MiB would take 512 seconds.
fn ends() -> Vec<Row> {
    let slow = json!({"io_write_bytes_per_s": 64 << 10});
    let write = "dd if=/dev/zero of=/tmp/x bs=32M count=1 oflag=direct 2> /dev/null";
    vec![
        row(
            "a write under way, when time is up",
            with(write, slow.clone()).limits(json!({"wall_time_ms": 1000})),
        )
        .hits(Reason::WallTime, "wall_time_ms", 1000, 1000..=60_000)
        .usage("wall_time_ms", 1000..=60_000),
        row("a write under way, when the program ends", with(&format!("{write} & sleep 1; exit 3"), slow))
            .exits(3)
            .usage("io_write_bytes", ANY),
    ]
}
