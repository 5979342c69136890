//! Exit codes: 0 success, 1 failure, 2 wrong usage; `run` exits as its program did.

use std::process::ExitCode;

use hutch_proto::{JobResult, Reason, Status};

use crate::cli::Command;

/// Something failed.
pub(crate) const FAILURE: u8 = 1;
/// A limit of time was hit, as of timeout(1).
const TIMED_OUT: u8 = 124;
/// The job could not be run, as of docker run.
const NOT_RUN: u8 = 125;
/// The command is there and cannot be run.
const NOT_EXECUTABLE: u8 = 126;
/// What the engine says of such a command.
const CANNOT_BE_RUN: &str = "cannot be run";
/// The command is not there.
const NOT_FOUND: u8 = 127;
/// A refused system call ended the job: 128 + SIGSYS, as where the kernel itself kills for it. The processes die of
/// SIGKILL.
const REFUSED_CALL: u8 = 159;
/// Somebody pressed Ctrl-C: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

/// The exit code of a command that fails itself.
pub(crate) fn on_error(command: &Command) -> u8 {
    if matches!(command, Command::Run(_) | Command::Exec(_)) { NOT_RUN } else { FAILURE }
}

/// The exit code that stands for a job's result.
pub(crate) fn of(result: &JobResult) -> ExitCode {
    ExitCode::from(code_of(result))
}

fn code_of(result: &JobResult) -> u8 {
    match (result.status, result.reason) {
        (Status::Succeeded, _) => 0,
        (Status::Rejected | Status::InfraError, _) => NOT_RUN,
        (Status::Cancelled, _) => INTERRUPTED,
        (_, Some(Reason::CpuTime | Reason::WallTime | Reason::IdleTime)) => TIMED_OUT,
        (_, Some(Reason::Syscall)) => REFUSED_CALL,
        (_, Some(Reason::CommandNotFound)) if result.message.contains(CANNOT_BE_RUN) => NOT_EXECUTABLE,
        (_, Some(Reason::CommandNotFound)) => NOT_FOUND,
        _ => ended(result),
    }
}

/// The code of a program that ended, by itself or not.
fn ended(result: &JobResult) -> u8 {
    if let Some(number) = result.signal.as_deref().and_then(signal_number) {
        return 128_u8.saturating_add(number);
    }
    result
        .exit_code
        .and_then(|code| u8::try_from(code & 0xff).ok())
        .filter(|code| *code != 0)
        .unwrap_or(FAILURE)
}

/// The number of a signal by its name, real-time ones (`SIGRTMIN+3`) included.
fn signal_number(name: &str) -> Option<u8> {
    if let Ok(signal) = name.parse::<nix::sys::signal::Signal>() {
        return u8::try_from(signal as i32).ok();
    }
    // signal(7): glibc's SIGRTMIN is 34.
    let above = name.strip_prefix("SIGRTMIN")?;
    let above = if above.is_empty() { 0 } else { above.strip_prefix('+')?.parse::<u8>().ok()? };
    34_u8.checked_add(above).filter(|number| *number <= 64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use hutch_proto::{JobId, Timestamp};

    use super::*;

    fn result(reason: Reason, exit_code: Option<i32>, signal: Option<&str>) -> JobResult {
        let mut result =
            JobResult::without_run(JobId::generate(), BTreeMap::new(), Timestamp::now(), reason, "");
        result.exit_code = exit_code;
        result.signal = signal.map(str::to_owned);
        result
    }

    #[test]
    fn run_exits_as_its_program_did() {
        for (reason, exit_code, signal, expected) in [
            (Reason::NonzeroExit, Some(3), None, 3),
            (Reason::NonzeroExit, Some(255), None, 255),
            (Reason::Signal, None, Some("SIGSEGV"), 139),
            (Reason::Signal, None, Some("SIGRTMIN+1"), 163),
            (Reason::WallTime, None, Some("SIGKILL"), 124),
            (Reason::CpuTime, None, Some("SIGKILL"), 124),
            (Reason::IdleTime, None, Some("SIGKILL"), 124),
            (Reason::Memory, None, Some("SIGKILL"), 137),
            (Reason::Memory, Some(0), None, 1),
            (Reason::Disk, Some(28), None, 28),
            (Reason::FileSize, None, Some("SIGXFSZ"), 153),
            (Reason::Syscall, None, Some("SIGKILL"), 159),
            (Reason::CommandNotFound, None, None, 127),
            (Reason::SpecInvalid, None, None, 125),
            (Reason::HostError, None, None, 125),
            (Reason::Requested, None, None, 130),
        ] {
            assert_eq!(
                code_of(&result(reason, exit_code, signal)),
                expected,
                "{reason} {exit_code:?} {signal:?}"
            );
        }
        let mut there = result(Reason::CommandNotFound, None, None);
        there.message = "cannot be run: /box/x is a directory or not executable".to_owned();
        assert_eq!(code_of(&there), 126);
        let mut fine = result(Reason::Signal, Some(0), None);
        (fine.status, fine.reason) = (Status::Succeeded, None);
        assert_eq!(code_of(&fine), 0);
    }
}
