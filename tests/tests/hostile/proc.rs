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

const TELLING: &[&str] = &[
    "/proc/kcore",
    "/proc/keys",
    "/proc/key-users",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/proc/latency_stats",
    "/proc/kallsyms",
    "/proc/interrupts",
    "/proc/kmsg",
    "/sys/kernel/notes",
    "/sys/firmware/memmap/0/start",
    "/sys/devices/virtual/powercap/intel-rapl/intel-rapl:0/energy_uj",
    "/sys/class/net/eth0/address",
    "/sys/kernel/uevent_seqnum",
];

fn were_read(said: &str) -> Vec<String> {
    said.lines().filter_map(|line| line.strip_suffix(" READ")).map(str::to_owned).collect()
}

#[test]
fn a24_files_that_tell_of_the_host() {
    let words = [&["read"], TELLING].concat();
    Attack::new(
        "24: read kcore, keys, timers, symbols, firmware, powercap",
        "masks of proc; there is no sysfs",
        |site| {
            let read: Vec<_> = ["root", "1001:1001"]
                .iter()
                .flat_map(|user| were_read(&site.hostile(&words, &json!({"user": user}))))
                .collect();
            Outcome::of(&read, "absent, or empty")
        },
    )
    .control(|| {
        let read = were_read(&hostile_outside(&words)?);
        if read.is_empty() {
            Err("root reads none of them either".to_owned())
        } else {
            Ok(format!("{} are read", read.len()))
        }
    })
    .bites_without(&[Defence::ProcMasks])
    .run();
}

#[test]
fn a27_files_of_cgroups() {
    Attack::new(
        "27: write to cgroups, release_agent (CVE-2022-0492); learn one's place among them",
        "cgroup namespace; no cgroupfs",
        |site| {
            let seen = site.shell(
                "root",
                "grep -v ':/$' /proc/self/cgroup; grep cgroup /proc/self/mountinfo; ls -A /sys; \
                 find / -xdev \\( -name cgroup.procs -o -name release_agent \\) 2> /dev/null; true",
            );
            Outcome::held_if(seen.is_empty(), seen)
        },
    )
    .control(|| {
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mounted =
            std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().contains(" - cgroup");
        if mounted && !own.is_empty() {
            Ok("cgroups are mounted and told of".to_owned())
        } else {
            Err("there are none".to_owned())
        }
    })
    .bites_without(&[Defence::CgroupNamespace])
    .run();
}

#[test]
fn a12_the_worker_s_environment() {
    const SECRET: &str = "hutch-canary-of-the-environment";
    Attack::new("12: read the worker's environment and credentials", "a clean environment", |site| {
        let script =
            "env; cat /proc/self/environ /proc/1/environ /proc/1/cmdline /proc/*/environ 2> /dev/null; true";
        let seen: String = ["root", "1001:1001"].map(|user| site.shell(user, script)).concat();
        assert!(seen.contains("PATH="), "{seen}");
        Outcome::held_if(!seen.contains(SECRET), "what the job's spec says, alone")
    })
    .with("CANARY", SECRET)
    .control(|| {
        let seen =
            std::process::Command::new("env").env("CANARY", SECRET).output().map_err(|e| e.to_string())?;
        if String::from_utf8_lossy(&seen.stdout).contains(SECRET) {
            Ok("a program sees it".to_owned())
        } else {
            Err("no program sees it".to_owned())
        }
    })
    .bites_without(&[Defence::CleanEnvironment])
    .run();
}
