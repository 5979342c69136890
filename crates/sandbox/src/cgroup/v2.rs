//! The files of cgroup v2: Documentation/admin-guide/cgroup-v2.rst of the kernel.

use std::path::Path;

use hutch_proto::Limits;

use super::v1::quota_us;
use super::{Access, Controller, IoRates, Place, Readings, disks, keyed, read_text};

/// Files that every job needs.
pub(super) const KEPT: &[(Controller, &str, Access)] = &[
    (Controller::Memory, "memory.max", Access::Write),
    (Controller::Memory, "memory.swap.max", Access::Write),
    (Controller::Memory, "memory.oom.group", Access::Write),
    (Controller::Memory, "memory.peak", Access::Read),
    (Controller::Memory, "memory.events", Access::Read),
    (Controller::Pids, "pids.max", Access::Write),
    (Controller::Pids, "pids.peak", Access::Read),
    (Controller::Pids, "pids.events", Access::Read),
    (Controller::Cpu, "cpu.max", Access::Write),
    (Controller::Cpu, "cpu.stat", Access::Read),
    (Controller::Io, "io.stat", Access::Read),
];

/// What to write for these limits, in order: file and value.
pub(super) fn settings(limits: &Limits, place: &Place) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    for controller in &place.controllers {
        match controller {
            Controller::Memory => {
                settings.push(("memory.max", limits.memory_bytes.to_string()));
                // Without the file there is no swap, or the host is refused.
                if place.kept("memory.swap.max").is_some() {
                    settings.push(("memory.swap.max", limits.swap_bytes.to_string()));
                }
                settings.push(("memory.oom.group", "1".to_owned()));
            }
            Controller::Pids => settings.push(("pids.max", limits.pids.to_string())),
            Controller::Cpu => settings.push(("cpu.max", format!("{} 100000", quota_us(limits.cpu_millis)))),
            Controller::Cpuset => settings.push(("cpuset.cpus", limits.cpuset.clone().unwrap_or_default())),
            Controller::Io => {
                let rates = IoRates::of(limits);
                if rates != IoRates::LIFTED {
                    settings.extend(io_rates(rates, place));
                }
            }
            Controller::Cpuacct => {}
        }
    }
    settings
}

/// What to write so that each disk has these rates.
pub(super) fn io_rates(rates: IoRates, place: &Place) -> Vec<(&'static str, String)> {
    let word = |rate: Option<u64>| rate.map_or("max".to_owned(), |rate| rate.to_string());
    let ([read_bytes, write_bytes], [read_ops, write_ops]) = (rates.bytes.map(word), rates.ops.map(word));
    let all = format!("rbps={read_bytes} wbps={write_bytes} riops={read_ops} wiops={write_ops}");
    place.disks.iter().map(|disk| ("io.max", format!("{disk} {all}"))).collect()
}

/// Adds what one controller counted.
pub(super) fn read(controller: Controller, place: &Place, readings: &mut Readings) {
    match controller {
        Controller::Memory => {
            readings.memory_peak_bytes = place.number("memory.peak").unwrap_or(0);
            let events = place.text("memory.events");
            readings.oom_kills = keyed(&events, "oom_kill").unwrap_or(0);
            readings.memory_limit_hits = keyed(&events, "max").unwrap_or(0);
        }
        Controller::Pids => {
            readings.pids_peak = place.number("pids.peak").unwrap_or(0);
            readings.pids_denied = keyed(&place.text("pids.events"), "max").unwrap_or(0);
        }
        Controller::Cpu => {
            let stat = place.text("cpu.stat");
            readings.cpu_user_us = keyed(&stat, "user_usec").unwrap_or(0);
            readings.cpu_system_us = keyed(&stat, "system_usec").unwrap_or(0);
            readings.throttled_us = keyed(&stat, "throttled_usec").unwrap_or(0);
        }
        Controller::Io => {
            let text = place.text("io.stat");
            readings.io_read_bytes = device_sum(&text, "rbytes=", &place.disks);
            readings.io_write_bytes = device_sum(&text, "wbytes=", &place.disks);
        }
        Controller::Cpuacct | Controller::Cpuset => {}
    }
}

/// The sum over disks of the number behind `key`.
fn device_sum(text: &str, key: &str, disks: &[disks::Disk]) -> u64 {
    let lines =
        text.lines().filter(|line| disks::is_among(line.split(' ').next().unwrap_or_default(), disks));
    lines.map(|line| field_sum(line, key)).sum()
}

/// The sum over lines of the number behind `key`.
fn field_sum(text: &str, key: &str) -> u64 {
    text.split_whitespace().filter_map(|word| word.strip_prefix(key)?.parse::<u64>().ok()).sum()
}

/// Totals of pressure stall information: Documentation/accounting/psi.rst.
pub(super) fn pressure(dir: &Path) -> [Option<(&'static str, &'static str, u64)>; 6] {
    let mut all = [None; 6];
    let files = [("cpu", "cpu.pressure"), ("memory", "memory.pressure"), ("io", "io.pressure")];
    for (place, (resource, file)) in files.into_iter().enumerate() {
        let text = read_text(dir, file);
        for (offset, kind) in ["some", "full"].into_iter().enumerate() {
            let line = text.lines().find(|line| line.starts_with(kind));
            all[place * 2 + offset] = line.map(|line| (resource, kind, field_sum(line, "total=")));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_stat_adds_up() {
        let text = "8:0 rbytes=10 wbytes=3 rios=1 wios=1\n8:16 rbytes=5 wbytes=0\n";
        assert_eq!(device_sum(text, "rbytes=", &[]), 15);
        assert_eq!(device_sum(text, "wbytes=", &[]), 3);
        assert_eq!(device_sum(text, "rbytes=", &[disks::Disk { major: 8, minor: 16 }]), 5);
    }
}
