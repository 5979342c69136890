//! The files of cgroup v2: Documentation/admin-guide/cgroup-v2.rst of the kernel.

use std::path::Path;

use hutch_proto::Limits;

use super::v1::quota_us;
use super::{Controller, Readings, Setting, keyed, read_number, read_text};

/// What to write for these limits, in order.
pub(super) fn settings(limits: &Limits, controllers: &[Controller]) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut set = |controller, file, value: String| settings.push(Setting { controller, file, value });
    for controller in controllers {
        match controller {
            Controller::Memory => {
                set(*controller, "memory.max", limits.memory_bytes.to_string());
                set(*controller, "memory.swap.max", limits.swap_bytes.to_string());
                set(*controller, "memory.oom.group", "1".to_owned());
            }
            Controller::Pids => set(*controller, "pids.max", limits.pids.to_string()),
            Controller::Cpu => {
                set(*controller, "cpu.max", format!("{} 100000", quota_us(limits.cpu_millis)));
            }
            Controller::Cpuset => {
                set(*controller, "cpuset.cpus", limits.cpuset.clone().unwrap_or_default());
            }
            Controller::Cpuacct | Controller::Io => {}
        }
    }
    settings
}

/// Adds what one controller counted.
pub(super) fn read(controller: Controller, dir: &Path, readings: &mut Readings) {
    match controller {
        Controller::Memory => {
            let current = read_number(dir, "memory.current").unwrap_or(0);
            readings.memory_bytes = current;
            readings.memory_peak_bytes = read_number(dir, "memory.peak").unwrap_or(current);
            readings.oom_kills = keyed(&read_text(dir, "memory.events"), "oom_kill").unwrap_or(0);
        }
        Controller::Pids => {
            readings.pids = read_number(dir, "pids.current").unwrap_or(0);
            readings.pids_peak = read_number(dir, "pids.peak").unwrap_or(0);
            readings.pids_denied = keyed(&read_text(dir, "pids.events"), "max").unwrap_or(0);
        }
        Controller::Cpu => {
            let stat = read_text(dir, "cpu.stat");
            readings.cpu_user_us = keyed(&stat, "user_usec").unwrap_or(0);
            readings.cpu_system_us = keyed(&stat, "system_usec").unwrap_or(0);
            readings.throttled_us = keyed(&stat, "throttled_usec").unwrap_or(0);
        }
        Controller::Io => {
            let text = read_text(dir, "io.stat");
            readings.io_read_bytes = field_sum(&text, "rbytes=");
            readings.io_write_bytes = field_sum(&text, "wbytes=");
        }
        Controller::Cpuacct | Controller::Cpuset => {}
    }
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
        assert_eq!(field_sum(text, "rbytes="), 15);
        assert_eq!(field_sum(text, "wbytes="), 3);
    }
}
