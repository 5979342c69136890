//! The files of cgroup v1: Documentation/admin-guide/cgroup-v1 of the kernel.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use hutch_proto::Limits;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Access, Controller, IoRates, Place, Readings, disks, keyed, read_text, write_file};

/// Microseconds over which a quota is counted: the kernel's default.
const PERIOD_US: u64 = 100_000;

/// Files that every job needs.
pub(super) const KEPT: &[(Controller, &str, Access)] = &[
    (Controller::Memory, "tasks", Access::Write),
    (Controller::Memory, "memory.limit_in_bytes", Access::Both),
    (Controller::Memory, "memory.memsw.limit_in_bytes", Access::Write),
    (Controller::Memory, "memory.kmem.tcp.limit_in_bytes", Access::Write),
    (Controller::Memory, "memory.max_usage_in_bytes", Access::Read),
    (Controller::Memory, "memory.failcnt", Access::Read),
    (Controller::Memory, "memory.memsw.failcnt", Access::Read),
    (Controller::Memory, "memory.oom_control", Access::Read),
    (Controller::Pids, "tasks", Access::Write),
    (Controller::Pids, "pids.max", Access::Write),
    (Controller::Pids, "pids.peak", Access::Read),
    (Controller::Pids, "pids.events", Access::Read),
    (Controller::Cpu, "tasks", Access::Write),
    (Controller::Cpu, "cpu.cfs_quota_us", Access::Write),
    (Controller::Cpu, "cpu.stat", Access::Read),
    (Controller::Cpuacct, "tasks", Access::Write),
    (Controller::Cpuacct, "cpuacct.usage", Access::Read),
    (Controller::Cpuacct, "cpuacct.usage_sys", Access::Read),
    (Controller::Io, "tasks", Access::Write),
    (Controller::Io, "blkio.throttle.io_service_bytes", Access::Read),
    (Controller::Cpuset, "tasks", Access::Write),
];

/// What to write for these limits, in order: file and value.
pub(super) fn settings(limits: &Limits, place: &Place) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    for controller in &place.controllers {
        match controller {
            Controller::Memory => {
                let memory = limits.memory_bytes;
                settings.push(("memory.limit_in_bytes", memory.to_string()));
                // Without swap accounting the file is not there; then the host has no swap, or is refused.
                if place.kept("memory.memsw.limit_in_bytes").is_some() {
                    let both = memory.saturating_add(limits.swap_bytes);
                    settings.push(("memory.memsw.limit_in_bytes", both.to_string()));
                }
                // What sockets hold is counted apart on v1, and only once there is a limit.
                if place.kept("memory.kmem.tcp.limit_in_bytes").is_some() {
                    settings.push(("memory.kmem.tcp.limit_in_bytes", memory.to_string()));
                }
            }
            Controller::Pids => settings.push(("pids.max", limits.pids.to_string())),
            Controller::Cpu => settings.push(("cpu.cfs_quota_us", quota_us(limits.cpu_millis).to_string())),
            Controller::Cpuset => {
                let parent = place.dir.parent().unwrap_or(&place.dir);
                settings.push(("cpuset.mems", read_text(parent, "cpuset.mems").trim().to_owned()));
                settings.push(("cpuset.cpus", limits.cpuset.clone().unwrap_or_default()));
            }
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

/// What to write so that each disk has these rates; 0 is none.
pub(super) fn io_rates(rates: IoRates, place: &Place) -> Vec<(&'static str, String)> {
    let [read_bytes, write_bytes] = rates.bytes;
    let [read_ops, write_ops] = rates.ops;
    let files = [
        ("blkio.throttle.read_bps_device", read_bytes),
        ("blkio.throttle.write_bps_device", write_bytes),
        ("blkio.throttle.read_iops_device", read_ops),
        ("blkio.throttle.write_iops_device", write_ops),
    ];
    let of_disk =
        |disk: &disks::Disk| files.map(|(file, rate)| (file, format!("{disk} {}", rate.unwrap_or(0))));
    place.disks.iter().flat_map(of_disk).collect()
}

/// Has the kernel count what is read from the disks and written to them: newer ones (6.10) begin when a rate is first
/// set for a disk, by whomever; that there is none does as well.
pub(super) fn count_io(home: &Path, disks: &[disks::Disk]) {
    for disk in disks {
        if let Err(e) = write_file(&home.join("blkio.throttle.read_bps_device"), &format!("{disk} 0")) {
            tracing::warn!(%disk, error = %e, "what jobs read from this disk and write to it is not counted");
        }
    }
}

/// Microseconds of a period for this share of a processor; the kernel takes no less than 1,000.
pub(super) fn quota_us(cpu_millis: u64) -> u64 {
    (cpu_millis.saturating_mul(PERIOD_US) / 1000).max(1000)
}

/// Adds what one controller counted.
pub(super) fn read(controller: Controller, place: &Place, readings: &mut Readings) {
    match controller {
        Controller::Memory => {
            readings.memory_peak_bytes = place.number("memory.max_usage_in_bytes").unwrap_or(0);
            readings.oom_kills = keyed(&place.text("memory.oom_control"), "oom_kill").unwrap_or(0);
            readings.memory_limit_hits = memory_limit_hits(place, readings.memory_peak_bytes);
        }
        Controller::Pids => {
            readings.pids_peak = place.number("pids.peak").unwrap_or(0);
            readings.pids_denied = keyed(&place.text("pids.events"), "max").unwrap_or(0);
        }
        Controller::Cpu => {
            readings.throttled_us = keyed(&place.text("cpu.stat"), "throttled_time").unwrap_or(0) / 1000;
        }
        Controller::Cpuacct => {
            // `usage` is exact; how it is split is only sampled, tick by tick.
            let total = place.number("cpuacct.usage").unwrap_or(0) / 1000;
            readings.cpu_system_us = (place.number("cpuacct.usage_sys").unwrap_or(0) / 1000).min(total);
            readings.cpu_user_us = total - readings.cpu_system_us;
        }
        Controller::Io => {
            let text = place.text("blkio.throttle.io_service_bytes");
            readings.io_read_bytes = device_sum(&text, "Read", &place.disks);
            readings.io_write_bytes = device_sum(&text, "Write", &place.disks);
        }
        Controller::Cpuset => {}
    }
}

/// How often the group's own limit was in the way. Not every kernel counts that for `memsw`, which is the
/// one that is met where there may be no swap: there the peak tells, but for what is charged in advance.
fn memory_limit_hits(place: &Place, peak_bytes: u64) -> u64 {
    const MOST_IN_ADVANCE: u64 = 1 << 20;
    let limit_bytes = place.number("memory.limit_in_bytes").unwrap_or(u64::MAX);
    if peak_bytes.saturating_add(MOST_IN_ADVANCE.min(limit_bytes / 16)) >= limit_bytes {
        return 1;
    }
    ["memory.failcnt", "memory.memsw.failcnt"].into_iter().filter_map(|file| place.number(file)).sum()
}

/// The sum over disks of `MAJOR:MINOR OPERATION BYTES` lines.
fn device_sum(text: &str, operation: &str, disks: &[disks::Disk]) -> u64 {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let counts = disks::is_among(words.next()?, disks);
            (words.next()? == operation && counts).then(|| words.next()?.parse::<u64>().ok()).flatten()
        })
        .sum()
}

/// Asks to be told when memory runs out: section 9 and 10 of memory.rst.
pub(super) fn out_of_memory(dir: &Path) -> io::Result<OwnedFd> {
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    let control = File::open(dir.join("memory.oom_control"))?;
    write_file(&dir.join("cgroup.event_control"), &format!("{} {}", event.as_raw_fd(), control.as_raw_fd()))?;
    Ok(event.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_devices_add_up() {
        let text = "8:0 Read 100\n8:0 Write 7\n8:16 Read 1\n8:0 Total 107\nTotal 108\n";
        assert_eq!(device_sum(text, "Read", &[]), 101);
        assert_eq!(device_sum(text, "Write", &[]), 7);
        assert_eq!(device_sum("", "Read", &[]), 0);
        assert_eq!(device_sum(text, "Read", &[disks::Disk { major: 8, minor: 0 }]), 100);
    }

    #[test]
    fn a_share_of_a_processor_is_a_part_of_the_period() {
        assert_eq!(quota_us(1000), 100_000);
        assert_eq!(quota_us(2500), 250_000);
        assert_eq!(quota_us(1), 1000);
    }
}
