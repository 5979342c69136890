//! What of the host is in /proc.

use hutch_sandbox::Defence;
use serde_json::json;

use crate::attack::{Attack, Outcome};
use crate::site::{Site, hostile_outside};

const WRITTEN: &[&str] = &[
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/msgmax",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/fs/pipe-max-size",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sysrq-trigger",
    "/proc/irq/default_smp_affinity",
    "/proc/pressure/cpu",
];

/// Those that were opened for writing.
fn opened(said: &str) -> Vec<String> {
    said.lines().filter_map(|line| line.strip_suffix(" OK")).map(str::to_owned).collect()
}

fn write_settings(site: &Site) -> Outcome {
    let words = [&["open-for-writing"], WRITTEN].concat();
    Outcome::of(&opened(&site.hostile(&words, &json!({"user": "root"}))), "none can be opened for writing")
}

#[test]
fn a23_settings_of_the_host() {
    Attack::new(
        "23: write core_pattern, sysrq-trigger, other settings of the host",
        "these paths are read-only; their owner is no user of the sandbox",
        write_settings,
    )
    .control(|| {
        let there = opened(&hostile_outside(&[&["open-for-writing"], WRITTEN].concat())?);
        if there.is_empty() {
            Err("root cannot write them either".to_owned())
        } else {
            Ok(format!("{} are written", there.len()))
        }
    })
    .bites_without(&[Defence::ProcMasks, Defence::UserNamespace])
    .run();
}

#[test]
fn a26_processes_of_the_host() {
    Attack::new("26: see and signal processes of the host", "PID namespace; a proc of its own", |site| {
        let seen = site
            .shell("root", "cd /proc; for p in [0-9]*; do [ $p = 1 ] || [ $p = $$ ] || cat $p/comm; done");
        Outcome::held_if(seen.is_empty(), seen)
    })
    .control(|| Ok("this test sees itself".to_owned()))
    .bites_without(&[Defence::PidNamespace])
    .run();
}
