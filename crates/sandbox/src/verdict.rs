//! The verdict: a pure function of what was observed.
//!
//! In this order: memory, since a killed process explains whatever came after (and if it was not the job's own
//! limit that was reached, it is the host's fault); then what made us kill; then limits
//! that the kernel enforced; then how the program ended. A sandbox that ended without a word and without a
//! cause of ours is the host's fault, never the program's.

use hutch_proto::{LimitHit, Limits, Reason, Status};
use nix::sys::signal::Signal;

use crate::cgroup::Readings;

/// Microseconds for which a limit on the processor may hold set-up back before it is to blame for its length.
const MOST_HELD_BACK_US: u64 = 10_000_000;

/// Why the tree was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    WallTime,
    CpuTime,
    IdleTime,
    Memory,
    /// More was read from disks or written to them than is allowed.
    Io,
    Output(&'static str),
    Requested,
    /// A system call, by its number, was refused to a job that is to be killed for that.
    Syscall(i32),
    /// Set-up did not come to an end.
    Setup,
}

/// How the program ended, as wait(2) gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Exited(i32),
    Signaled(i32),
}

impl End {
    pub(crate) fn of(wait_status: i32) -> Self {
        if libc::WIFSIGNALED(wait_status) {
            Self::Signaled(libc::WTERMSIG(wait_status))
        } else {
            Self::Exited(libc::WEXITSTATUS(wait_status))
        }
    }
}

/// What was seen of one step.
#[derive(Debug, Clone)]
pub(crate) struct Observed {
    pub(crate) cause: Option<Cause>,
    pub(crate) end: Option<End>,
    pub(crate) readings: Readings,
    pub(crate) wall_ms: u64,
    pub(crate) idle_ms: u64,
    pub(crate) stdout_bytes: u64,
    pub(crate) stderr_bytes: u64,
    /// The scratch space was full when last looked at: bytes, inodes.
    pub(crate) disk_full: (bool, bool),
    pub(crate) disk_bytes: u64,
    pub(crate) disk_inodes: u64,
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) status: Status,
    pub(crate) reason: Option<Reason>,
    pub(crate) message: String,
    pub(crate) limit: Option<LimitHit>,
    pub(crate) exit_code: Option<i32>,
    pub(crate) signal: Option<String>,
}

/// A signal's name, such as `SIGSEGV`; real-time signals are `SIGRTMIN+n`.
pub(crate) fn signal_name(signal: i32) -> String {
    match Signal::try_from(signal) {
        Ok(known) => known.as_str().to_owned(),
        Err(_) => match signal - libc::SIGRTMIN() {
            0 => "SIGRTMIN".to_owned(),
            above @ 1.. => format!("SIGRTMIN+{above}"),
            // The two below are the C library's own.
            _ => format!("SIG{signal}"),
        },
    }
}

pub(crate) fn decide(limits: &Limits, seen: &Observed) -> Verdict {
    let (exit_code, signal) = match seen.end {
        Some(End::Exited(code)) => (Some(code), None),
        Some(End::Signaled(signal)) => (None, Some(signal_name(signal))),
        None => (None, Some("SIGKILL".to_owned())),
    };
    let (reason, message, limit) = match limit_hit(limits, seen) {
        Some(hit) => hit,
        None => plain_end(seen),
    };
    // A fault of the host says nothing of the program, and so nothing of its end.
    // Where memory ran out the whole tree is killed: a shell that still told of its child's end, before its own
    // came, was killed as well.
    let (exit_code, signal) = match reason {
        Some(Reason::HostError) => (None, None),
        Some(Reason::Memory) => (None, Some("SIGKILL".to_owned())),
        _ => (exit_code, signal),
    };
    let status = reason.map_or(Status::Succeeded, Reason::status);
    Verdict { status, reason, message, limit, exit_code, signal }
}

type Finding = (Option<Reason>, String, Option<LimitHit>);

fn hit(reason: Reason, name: &str, allowed: u64, measured: u64, message: String) -> Finding {
    (Some(reason), message, Some(LimitHit { name: name.to_owned(), allowed, measured }))
}

fn over(reason: Reason, name: &str, unit: &str, allowed: u64, measured: u64) -> Finding {
    let message = format!("{reason}: {allowed} {unit} allowed, {measured} used");
    hit(reason, name, allowed, measured, message)
}

fn limit_hit(limits: &Limits, seen: &Observed) -> Option<Finding> {
    let cpu_ms = seen.readings.cpu_us() / 1000;
    if seen.readings.oom_kills > 0 || seen.cause == Some(Cause::Memory) {
        let (allowed, kills) = (limits.memory_bytes, seen.readings.oom_kills);
        let measured = seen.readings.memory_peak_bytes;
        if seen.readings.memory_limit_hits == 0 {
            let message = format!(
                "the host, or a group around the worker, ran out of memory while the job had {measured} of its {allowed} bytes"
            );
            return Some((Some(Reason::HostError), message, None));
        }
        // We may be told, and kill, before the kernel has chosen whom to kill.
        let killed = match kills {
            0 => "every process killed".to_owned(),
            1 => "1 process killed by the kernel".to_owned(),
            more => format!("{more} processes killed by the kernel"),
        };
        let message = format!("memory: {allowed} bytes allowed, reached; {killed}");
        return Some(hit(Reason::Memory, "memory_bytes", allowed, measured, message));
    }
    match seen.cause {
        Some(Cause::WallTime) => {
            return Some(over(Reason::WallTime, "wall_time_ms", "ms", limits.wall_time_ms, seen.wall_ms));
        }
        Some(Cause::IdleTime) => {
            let allowed = limits.idle_time_ms.unwrap_or(0);
            return Some(over(Reason::IdleTime, "idle_time_ms", "ms", allowed, seen.idle_ms));
        }
        Some(Cause::Output(name)) => {
            let (allowed, measured) = match name {
                "stderr_bytes" => (limits.stderr_bytes, seen.stderr_bytes),
                _ => (limits.stdout_bytes, seen.stdout_bytes),
            };
            return Some(over(Reason::Output, name, "bytes", allowed, measured));
        }
        Some(Cause::Requested) => {
            return Some((Some(Reason::Requested), "cancelled on request".to_owned(), None));
        }
        Some(Cause::Syscall(number)) => {
            let call = crate::seccomp::name(number);
            let message = format!("syscall: `{call}` was called, which is refused; every process killed");
            return Some((Some(Reason::Syscall), message, None));
        }
        // The program's process writes the job's files, and is held back as the program would be.
        Some(Cause::Setup) if seen.readings.throttled_us > MOST_HELD_BACK_US => {
            let message = format!(
                "limits.cpu_millis: {} is too little to write the job's files and begin",
                limits.cpu_millis
            );
            return Some((Some(Reason::SpecInvalid), message, None));
        }
        Some(Cause::Setup) => {
            return Some((Some(Reason::HostError), "the sandbox was not ready in time".to_owned(), None));
        }
        Some(Cause::CpuTime | Cause::Memory | Cause::Io) | None => {}
    }
    if let Some(allowed) = limits.cpu_time_ms
        && (seen.cause == Some(Cause::CpuTime) || cpu_ms > allowed)
    {
        return Some(over(Reason::CpuTime, "cpu_time_ms", "ms", allowed, cpu_ms));
    }
    for (name, allowed, measured) in [
        ("io_read_bytes", limits.io_read_bytes, seen.readings.io_read_bytes),
        ("io_write_bytes", limits.io_write_bytes, seen.readings.io_write_bytes),
    ] {
        if let Some(allowed) = allowed
            && measured > allowed
        {
            return Some(over(Reason::Disk, name, "bytes", allowed, measured));
        }
    }
    let failed = seen.end.is_some_and(|end| end != End::Exited(0));
    if let (Some(allowed), Some(End::Signaled(libc::SIGXFSZ))) = (limits.file_size_bytes, seen.end) {
        let message = format!("file_size: a file of {allowed} bytes is allowed, more was written");
        return Some(hit(Reason::FileSize, "file_size_bytes", allowed, allowed, message));
    }
    match seen.disk_full {
        (true, _) if failed => {
            Some(over(Reason::Disk, "disk_bytes", "bytes", limits.disk_bytes, seen.disk_bytes))
        }
        (_, true) if failed => {
            Some(over(Reason::Disk, "disk_inodes", "inodes", limits.disk_inodes, seen.disk_inodes))
        }
        _ => None,
    }
}

fn plain_end(seen: &Observed) -> Finding {
    match seen.end {
        Some(End::Exited(0)) => (None, String::new(), None),
        Some(End::Exited(code)) => (Some(Reason::NonzeroExit), format!("exited with code {code}"), None),
        Some(End::Signaled(signal)) => {
            (Some(Reason::Signal), format!("killed by signal {}", signal_name(signal)), None)
        }
        None => {
            let message = "the sandbox was killed from outside, by neither the job nor the worker";
            (Some(Reason::HostError), message.to_owned(), None)
        }
    }
}

#[cfg(test)]
mod tests {
    use hutch_proto::{LimitPolicy, LimitsSpec};

    use super::*;

    fn limits() -> Limits {
        let asked = LimitsSpec {
            cpu_time_ms: Some(100),
            file_size_bytes: Some(10),
            idle_time_ms: Some(50),
            ..LimitsSpec::default()
        };
        LimitPolicy::default().resolve(&asked, "limits").expect("limits")
    }

    fn seen(end: Option<End>) -> Observed {
        Observed {
            cause: None,
            end,
            readings: Readings::default(),
            wall_ms: 5,
            idle_ms: 0,
            stdout_bytes: 0,
            stderr_bytes: 0,
            disk_full: (false, false),
            disk_bytes: 0,
            disk_inodes: 0,
        }
    }

    fn reason(seen: &Observed) -> Option<Reason> {
        decide(&limits(), seen).reason
    }

    #[test]
    fn a_program_s_own_end_is_its_verdict() {
        assert_eq!(reason(&seen(Some(End::Exited(0)))), None);
        assert_eq!(reason(&seen(Some(End::Exited(137)))), Some(Reason::NonzeroExit));
        let verdict = decide(&limits(), &seen(Some(End::Signaled(libc::SIGSEGV))));
        assert_eq!((verdict.reason, verdict.signal.as_deref()), (Some(Reason::Signal), Some("SIGSEGV")));
    }

    #[test]
    fn a_refused_call_is_named() {
        let mut seen = seen(None);
        seen.cause = Some(Cause::Syscall(i32::try_from(libc::SYS_ptrace).expect("number")));
        let verdict = decide(&limits(), &seen);
        assert_eq!((verdict.status, verdict.reason), (Status::LimitExceeded, Some(Reason::Syscall)));
        assert!(verdict.message.contains("`ptrace`"), "{}", verdict.message);
        assert_eq!(verdict.signal.as_deref(), Some("SIGKILL"));
    }

    #[test]
    fn set_up_that_a_limit_held_back_is_no_fault_of_the_host() {
        let mut seen = seen(None);
        seen.cause = Some(Cause::Setup);
        assert_eq!(reason(&seen), Some(Reason::HostError));
        seen.readings.throttled_us = 59_000_000;
        assert_eq!(reason(&seen), Some(Reason::SpecInvalid));
    }

    #[test]
    fn memory_comes_before_all_else() {
        let mut seen = seen(Some(End::Exited(1)));
        seen.readings.oom_kills = 1;
        seen.readings.memory_limit_hits = 1;
        seen.cause = Some(Cause::WallTime);
        assert_eq!(reason(&seen), Some(Reason::Memory));
    }

    #[test]
    fn a_shell_that_outlived_its_child_for_a_moment_was_killed_too() {
        let mut seen = seen(Some(End::Exited(137)));
        seen.readings.oom_kills = 1;
        seen.readings.memory_limit_hits = 1;
        let verdict = decide(&limits(), &seen);
        assert_eq!((verdict.exit_code, verdict.signal.as_deref()), (None, Some("SIGKILL")));
    }

    #[test]
    fn memory_that_ran_out_above_the_job_is_the_host_s_fault() {
        let mut seen = seen(Some(End::Signaled(libc::SIGKILL)));
        seen.readings.oom_kills = 1;
        let verdict = decide(&limits(), &seen);
        assert_eq!((verdict.status, verdict.signal), (Status::InfraError, None));
    }

    #[test]
    fn processor_time_counts_even_if_the_program_was_quicker_than_we() {
        let mut seen = seen(Some(End::Exited(0)));
        seen.readings.cpu_user_us = 101_000;
        assert_eq!(reason(&seen), Some(Reason::CpuTime));
        seen.readings.cpu_user_us = 100_000;
        assert_eq!(reason(&seen), None);
    }

    #[test]
    fn a_full_disk_matters_only_to_a_program_that_fails() {
        let mut seen = seen(Some(End::Exited(0)));
        seen.disk_full = (true, false);
        assert_eq!(reason(&seen), None);
        seen.end = Some(End::Exited(1));
        assert_eq!(reason(&seen), Some(Reason::Disk));
    }

    #[test]
    fn the_file_size_signal_is_a_limit_only_where_there_is_one() {
        let seen = seen(Some(End::Signaled(libc::SIGXFSZ)));
        assert_eq!(reason(&seen), Some(Reason::FileSize));
        let none = LimitPolicy::default().resolve(&LimitsSpec::default(), "limits").expect("limits");
        assert_eq!(decide(&none, &seen).reason, Some(Reason::Signal));
    }

    #[test]
    fn an_end_without_a_word_is_the_host_s_fault() {
        let verdict = decide(&limits(), &seen(None));
        assert_eq!((verdict.status, verdict.signal), (Status::InfraError, None));
        let mut killed = seen(None);
        killed.cause = Some(Cause::WallTime);
        let verdict = decide(&limits(), &killed);
        assert_eq!((verdict.reason, verdict.signal.as_deref()), (Some(Reason::WallTime), Some("SIGKILL")));
    }

    #[test]
    fn signals_have_names() {
        assert_eq!(signal_name(libc::SIGKILL), "SIGKILL");
        assert_eq!(signal_name(libc::SIGRTMIN()), "SIGRTMIN");
        assert_eq!(signal_name(libc::SIGRTMIN() + 3), "SIGRTMIN+3");
    }
}
