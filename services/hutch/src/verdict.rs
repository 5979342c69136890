//! A result in the words of people.

use hutch_proto::units::ByteSize;
use hutch_proto::{Captured, JobResult, Reason, Status, Usage};

use crate::term::safe_line;

/// How a job ended, in one line.
pub(crate) fn sentence(result: &JobResult) -> String {
    let status = result.status.as_str().replace('_', " ");
    let message = match (result.message.is_empty(), result.reason) {
        (false, _) => safe_line(&result.message),
        (true, Some(reason)) => how(reason, result),
        (true, None) => String::new(),
    };
    if message.is_empty() { status } else { format!("{status}: {message}") }
}

/// What the reason says, where the result has no words of its own.
fn how(reason: Reason, result: &JobResult) -> String {
    match (reason, result.exit_code, &result.signal) {
        (Reason::NonzeroExit, Some(code), _) => format!("exit code {code}"),
        (Reason::Signal, _, Some(signal)) => safe_line(signal),
        _ => reason.as_str().replace('_', " "),
    }
}

/// Status and reason in a word or two.
pub(crate) fn short(result: &JobResult) -> String {
    match result.reason {
        Some(reason) => format!("{} ({reason})", result.status),
        None => result.status.to_string(),
    }
}

/// What it used, in one line.
pub(crate) fn usage(usage: &Usage) -> String {
    let mut text = format!(
        "{} on the clock, {} of processor, {} of memory at most",
        time(usage.wall_time_ms),
        time(usage.cpu_user_ms + usage.cpu_system_ms),
        size(usage.memory_peak_bytes),
    );
    for (count, what) in [(usage.oom_kills, "killed for memory"), (usage.pids_denied, "forks refused")] {
        if count > 0 {
            text.push_str(&format!(", {count} {what}"));
        }
    }
    text
}

/// What was written and not kept, a line for each stream of each step. Who calls a job off has seen enough of it.
pub(crate) fn cuts(result: &JobResult) -> Vec<String> {
    if result.status == Status::Cancelled {
        return Vec::new();
    }
    let streams = result.steps.iter().flat_map(|step| {
        let step_name = (result.steps.len() > 1).then_some(&step.name);
        [("stdout", &step.stdout, step_name), ("stderr", &step.stderr, step_name)]
    });
    let line = |(stream, captured, step): (&str, &Captured, Option<&String>)| {
        let of = step.map(|name| format!(" of step {}", safe_line(name))).unwrap_or_default();
        format!("{stream}{of} is cut: {} of {} bytes were kept", captured.data.len(), captured.bytes)
    };
    streams.filter(|(_, captured, _)| captured.truncated).map(line).collect()
}

/// Whether a job did what it was meant to.
pub(crate) fn is_success(result: &JobResult) -> bool {
    result.status == Status::Succeeded
}

/// A time with the precision that people want.
pub(crate) fn time(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms}ms"),
        1000..60_000 => format!("{}.{:02}s", ms / 1000, ms % 1000 / 10),
        _ => format!("{}m {:02}s", ms / 60_000, ms % 60_000 / 1000),
    }
}

/// A size with the precision that people want.
pub(crate) fn size(bytes: u64) -> String {
    for (unit, name) in [(1_u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
        if bytes >= unit {
            return format!("{}.{}{name}", bytes / unit, bytes % unit * 10 / unit);
        }
    }
    format!("{}B", ByteSize(bytes))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use hutch_proto::{JobId, Timestamp};

    use super::*;

    #[test]
    fn numbers_are_shown_as_people_want_them() {
        assert_eq!((time(812), time(1530), time(61_000)), ("812ms".into(), "1.53s".into(), "1m 01s".into()));
        assert_eq!(
            (size(12), size(1536), size(256 << 20)),
            ("12B".into(), "1.5KiB".into(), "256.0MiB".into())
        );
    }

    #[test]
    fn a_verdict_is_one_sentence() {
        let of = |reason, message: &str| {
            JobResult::without_run(JobId::generate(), BTreeMap::new(), Timestamp::now(), reason, message)
        };
        assert_eq!(
            sentence(&of(Reason::Memory, "memory: 1 byte allowed")),
            "limit exceeded: memory: 1 byte allowed"
        );
        let mut failed = of(Reason::NonzeroExit, "");
        failed.exit_code = Some(3);
        assert_eq!(sentence(&failed), "failed: exit code 3");
        assert_eq!(sentence(&of(Reason::HostError, "\x1b[2J")), "infra error: \\u{1b}[2J");
    }
}
