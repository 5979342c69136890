//! A sandbox that could not be set up: from stage, errno and index to a sentence and a verdict.

use hutch_proto::{MAX_ID, Reason, VolumeSource};
use hutch_sandbox_sys::{Errno, Record, Stage};

use crate::plan::{JobPlan, StepPlan};
use crate::refusal::Refusal;
use crate::verdict::Verdict;

/// The verdict on a step whose program did not run.
///
/// # Errors
/// The verdict on the whole job, where it is not the program that is wrong.
pub(crate) fn explain(record: Record, plan: &JobPlan, step: &StepPlan) -> Result<Verdict, Refusal> {
    let Record::Failed { stage, errno, index } = record else {
        return Err(Refusal::host("a sandbox sent a record out of turn"));
    };
    let errno = Errno::from_raw(errno);
    let what = errno.desc();
    let index = index as usize;
    match stage {
        Stage::Exec => exec(errno, step),
        Stage::File => {
            let path = plan.files.get(index).map_or("?", |file| &file.path);
            Err(Refusal::spec(&format!("files[{index}]"), format!("cannot write {path}: {what}")))
        }
        Stage::User => Err(user(errno, plan)),
        Stage::Cwd => {
            let cwd =
                step.cwd.as_ref().map_or("the user's home".into(), |cwd| cwd.as_cstr().to_string_lossy());
            Err(Refusal::spec(&step.cwd_path, format!("cannot make or enter {cwd}: {what}")))
        }
        Stage::Volume => {
            let target = plan.volumes.get(index).map_or("?", |volume| &volume.target);
            let source = match plan.volumes.get(index).map(|volume| &volume.source) {
                Some(VolumeSource::Named(name) | VolumeSource::HostPath(name)) => name,
                None => "?",
            };
            let message = format!("volumes[{index}]: cannot mount {source} at {target}: {what}");
            Err(Refusal::new(Reason::VolumeError, message))
        }
        Stage::Step if matches!(errno, Errno::ELOOP | Errno::ENOTDIR | Errno::EXDEV | Errno::EEXIST) => {
            let message = format!(
                "a layer has a link or a file where a directory of the sandbox must be, or lies within another \
                 (set-up step {index}): {what}"
            );
            Err(Refusal::new(Reason::ImageError, message))
        }
        Stage::Rlimit => Err(Refusal::host(format!("the host refused resource limit {index}: {what}"))),
        other => Err(Refusal::host(format!("set-up failed at {other:?}, step {index}: {what}"))),
    }
}

fn exec(errno: Errno, step: &StepPlan) -> Result<Verdict, Refusal> {
    let program = step.argv.first().map(|name| name.as_cstr().to_string_lossy()).unwrap_or_default();
    let message = match errno {
        Errno::ENOENT | Errno::ENOTDIR if program.contains('/') => {
            format!("not found: {program}, or the interpreter that it names")
        }
        Errno::ENOENT | Errno::ENOTDIR => {
            format!("not found: no {program} in PATH, or no interpreter for it")
        }
        Errno::EACCES | Errno::EISDIR => format!("cannot be run: {program} is a directory or not executable"),
        Errno::ENOEXEC => {
            format!("cannot be run: {program} is neither a binary of this machine nor a script with #!")
        }
        Errno::E2BIG => {
            return Err(Refusal::spec(
                "command",
                "arguments and environment together are too long for this kernel",
            ));
        }
        // What the host may have run out of; all else is said by the file, such as EIO by one that ends too early.
        Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE => {
            return Err(Refusal::host(format!("cannot run {program}: {}", errno.desc())));
        }
        other => format!("cannot be run: {program}: {}", other.desc()),
    };
    let reason = Reason::CommandNotFound;
    Ok(Verdict {
        status: reason.status(),
        reason: Some(reason),
        message,
        limit: None,
        exit_code: None,
        signal: None,
    })
}

fn user(errno: Errno, plan: &JobPlan) -> Refusal {
    let group = plan.group.as_deref().unwrap_or_default();
    match errno {
        Errno::ENOENT => {
            Refusal::spec("user", format!("there is no user `{}` in the sandbox's /etc/passwd", plan.user))
        }
        Errno::ESRCH => {
            Refusal::spec("user", format!("there is no group `{group}` in the sandbox's /etc/group"))
        }
        Errno::ERANGE => Refusal::spec(
            "user",
            format!("`{}` has a uid or gid that no sandbox has: 0..={MAX_ID} is possible", plan.user),
        ),
        other => Refusal::spec(
            "user",
            format!("the sandbox's /etc/passwd or /etc/group cannot be used: {}", other.desc()),
        ),
    }
}
