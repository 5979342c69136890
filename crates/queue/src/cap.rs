//! Keeps a result below what its home carries: 16 MiB in a message of RabbitMQ 4, a row of SQLite.
//!
//! It is cut before the terminal record is made, so that record and messages stay the same bytes;
//! `truncated` says so. In order, each within its own budget of bytes of JSON:
//!
//! 1. the job's own stdout and stderr, which are what most ask for;
//! 2. the steps' copies of the same;
//! 3. the list of output files, with what is left.
//!
//! Output that shares a budget is cut evenly, to the largest common length at which all of it fits: the
//! short is left alone, and nothing is emptied for the sake of another.

use hutch_proto::{Captured, JobResult, Outputs};

/// For the job's own stdout and stderr together.
const JOB_BYTES: usize = 10 << 20;
/// For the stdout and stderr of all steps together.
const STEPS_BYTES: usize = 4 << 20;
/// For all output and the list of files. What else a result has stays below the half MiB that is left.
const ALL_BYTES: usize = (15 << 20) + (1 << 19);

/// Cuts what is too much.
pub(crate) fn fit(result: &mut JobResult) {
    let job = share(vec![&mut result.stdout, &mut result.stderr], JOB_BYTES);
    let steps = result.steps.iter_mut().flat_map(|step| [&mut step.stdout, &mut step.stderr]);
    let steps = share(steps.collect(), STEPS_BYTES);
    list(&mut result.outputs, ALL_BYTES - job - steps);
}

/// Cuts the longest to a common length, so that all fit into `budget`; how much of it they take.
fn share(captures: Vec<&mut Captured>, budget: usize) -> usize {
    let mut weighed: Vec<_> =
        captures.into_iter().map(|captured| (captured.wire_bytes(), captured)).collect();
    weighed.sort_by_key(|(bytes, _)| *bytes);
    let (mut left, mut count) = (budget, weighed.len());
    for (bytes, captured) in weighed {
        // What the shorter ones do not need is the longer ones'.
        let most = left / count;
        if bytes > most {
            captured.cut_to(most);
        }
        left -= captured.wire_bytes();
        count -= 1;
    }
    budget - left
}

/// Leaves out files from where they fit no more.
fn list(outputs: &mut Outputs, budget: usize) {
    let mut left = Some(budget);
    let fit = outputs.files.iter().take_while(|file| {
        // One that is no JSON makes the whole result none, which is told elsewhere.
        let bytes = serde_json::to_vec(file).map_or(0, |json| json.len() + 1);
        left = left.and_then(|left| left.checked_sub(bytes));
        left.is_some()
    });
    let fit = fit.count();
    if fit < outputs.files.len() {
        outputs.files.truncate(fit);
        outputs.truncated = true;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use hutch_proto::{JobId, OutputFile, OutputKind, Reason, StepResult, Timestamp};

    use super::*;

    /// What every result must stay below.
    const MESSAGE: usize = 16 << 20;

    fn captured(data: Vec<u8>) -> Captured {
        Captured { bytes: data.len() as u64, data, truncated: false }
    }

    /// Stdout and stderr.
    type Written = (Vec<u8>, Vec<u8>);

    /// As the engine makes it: the steps' output, and all of it once more.
    fn result(steps: &[Written]) -> JobResult {
        let now = Timestamp::from_unix_ms(0);
        let mut result =
            JobResult::without_run(JobId::generate(), BTreeMap::new(), now, Reason::HostError, "");
        let join = |of: fn(&Written) -> &Vec<u8>| captured(steps.iter().flat_map(of).copied().collect());
        (result.stdout, result.stderr) = (join(|step| &step.0), join(|step| &step.1));
        result.steps = steps
            .iter()
            .map(|(stdout, stderr)| StepResult {
                name: "main".to_owned(),
                status: result.status,
                reason: result.reason,
                message: String::new(),
                limit: None,
                exit_code: None,
                signal: None,
                refused_syscalls: Vec::new(),
                stdout: captured(stdout.clone()),
                stderr: captured(stderr.clone()),
                usage: result.usage,
                timeline: result.timeline.clone(),
            })
            .collect();
        result
    }

    fn size(result: &JobResult) -> usize {
        serde_json::to_vec(result).unwrap().len()
    }

    #[test]
    fn what_the_default_limits_allow_is_left_alone() {
        for byte in [0, b'x', b'\n', 0xff] {
            let mut whole = result(&[(vec![byte; 1 << 20], vec![byte; 1 << 20])]);
            let before = whole.clone();
            fit(&mut whole);
            assert_eq!(whole, before, "{byte}");
        }
    }

    #[test]
    fn the_job_s_own_output_outlives_the_steps_copies() {
        let step = (vec![b'a'; 1 << 20], Vec::new());
        let mut eight = result(&vec![step; 8]);
        fit(&mut eight);
        assert_eq!((eight.stdout.data.len(), eight.stdout.truncated), (8 << 20, false));
        for step in &eight.steps {
            assert_eq!((step.stdout.data.len(), step.stdout.truncated), (STEPS_BYTES / 16 * 2, true));
        }
    }

    #[test]
    fn the_short_is_left_alone_and_says_so() {
        for data in
            [vec![b'x'; 64 << 20], vec![0xff; 64 << 20], vec![0; 64 << 20], "é".repeat(8 << 20).into_bytes()]
        {
            let mut large = result(&[(data, b"kept".to_vec()), (Vec::new(), b"\xff".to_vec())]);
            fit(&mut large);
            assert!(large.stdout.truncated && large.steps[0].stdout.truncated);
            assert!(!large.stderr.truncated && !large.steps[0].stderr.truncated);
            assert_eq!(large.stderr.data, b"kept\xff");
            assert_eq!(large.steps[1].stderr.data, b"\xff");
            assert!(
                size(&large) > JOB_BYTES + STEPS_BYTES - 100,
                "what may be kept is kept: {}",
                size(&large)
            );
            assert!(size(&large) < MESSAGE, "{}", size(&large));
        }
    }

    #[test]
    fn what_is_long_on_both_streams_is_cut_evenly() {
        let mut large = result(&[(vec![0; 64 << 20], vec![0; 64 << 20])]);
        fit(&mut large);
        assert_eq!(large.stdout, large.stderr);
        assert_eq!(large.stdout.wire_bytes(), JOB_BYTES / 2);
        assert_eq!(large.steps[0].stdout, large.steps[0].stderr);
        assert_eq!(large.steps[0].stdout.wire_bytes(), STEPS_BYTES / 2);
        assert!(size(&large) < MESSAGE, "{}", size(&large));
    }

    #[test]
    fn a_list_of_files_has_what_is_left() {
        let file = OutputFile {
            path: "/box/".to_owned() + &"x".repeat(4000),
            kind: OutputKind::File,
            mode: None,
            bytes: 5,
            sha256: None,
            target: None,
        };
        let mut many = result(&[(vec![0; 64 << 20], vec![0; 64 << 20])]);
        many.outputs.files = vec![file; 10_000];
        fit(&mut many);
        assert!(many.outputs.truncated && many.outputs.files.len() > 100, "{}", many.outputs.files.len());
        assert!(size(&many) < MESSAGE, "{}", size(&many));
    }
}
