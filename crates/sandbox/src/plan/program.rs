//! One step's program: its arguments, its environment, where it may be, and its resource limits.

use std::collections::BTreeMap;
use std::ffi::CString;

use hutch_proto::{JobSpec, Limits, SeccompProfile, SeccompRefused, SeccompSpec, StepSpec};
use hutch_sandbox_sys::defence::{Defence, without};
use hutch_sandbox_sys::{Rlimit, Text};

use super::inline;
use crate::refusal::Refusal;

/// Where programs are looked for, unless the job says otherwise.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_LANG: &str = "C.UTF-8";

/// One program of a job, decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StepPlan {
    pub(crate) name: String,
    pub(crate) limits: Limits,
    pub(crate) argv: Vec<Text>,
    pub(crate) candidates: Vec<Text>,
    pub(crate) env: Vec<Text>,
    pub(crate) set_home: bool,
    pub(crate) set_user: bool,
    pub(crate) cwd: Option<Text>,
    /// The field of the spec that says so.
    pub(crate) cwd_path: String,
    pub(crate) stdin: Vec<u8>,
    pub(crate) profile: SeccompProfile,
    pub(crate) refused: SeccompRefused,
    pub(crate) allow_failure: bool,
    /// Whether it runs on a terminal of its own.
    pub(crate) terminal: bool,
}

/// Decides about one program; what a step leaves out is the job's.
pub(super) fn plan(
    spec: &JobSpec,
    step: Option<(usize, &StepSpec)>,
    command: &[String],
    limits: Limits,
    default: SeccompSpec,
) -> Result<StepPlan, Refusal> {
    let (number, step) = step.unzip();
    let mut env: BTreeMap<&str, &str> = BTreeMap::from([("LANG", DEFAULT_LANG), ("PATH", DEFAULT_PATH)]);
    if spec.tty {
        env.insert("TERM", "xterm");
    }
    // What a worker that hands its own environment on would give away.
    let own = if without(Defence::CleanEnvironment) { std::env::vars().collect() } else { BTreeMap::new() };
    env.extend(own.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    let given = spec.env.iter().chain(step.into_iter().flat_map(|step| &step.env));
    env.extend(given.map(|(name, value)| (name.as_str(), value.as_str())));
    let stdin = step.and_then(|step| step.stdin.as_ref()).or(spec.stdin.as_ref());
    let cwd = step.and_then(|step| step.cwd.as_ref()).or(spec.cwd.as_ref());
    let own = step.map(|step| step.seccomp).unwrap_or_default();
    let seccomp = own.over(spec.seccomp).over(default);
    let name = step.map_or("main", |step| &step.name);
    Ok(StepPlan {
        name: name.to_owned(),
        limits,
        argv: command.iter().map(|argument| text(argument)).collect::<Result<_, _>>()?,
        candidates: candidates(&command[0], env["PATH"])?,
        set_home: !env.contains_key("HOME"),
        set_user: !env.contains_key("USER"),
        env: env.iter().map(|(name, value)| text(&format!("{name}={value}"))).collect::<Result<_, _>>()?,
        cwd_path: match number.filter(|_| step.is_some_and(|step| step.cwd.is_some())) {
            Some(number) => format!("steps[{number}].cwd"),
            None => "cwd".to_owned(),
        },
        cwd: cwd.map(|cwd| text(cwd.as_str())).transpose()?,
        stdin: stdin.map(|content| inline(content, "stdin")).transpose()?.unwrap_or_default(),
        terminal: spec.tty,
        profile: seccomp.profile.unwrap_or_default(),
        refused: seccomp.refused.unwrap_or_default(),
        allow_failure: step.is_some_and(|step| step.allow_failure),
    })
}

pub(crate) fn text(text: &str) -> Result<Text, Refusal> {
    CString::new(text)
        .map(Text::from)
        .map_err(|_| Refusal::spec("command", "a text may not contain a NUL byte"))
}

/// The paths that execvp(3) would try.
pub(crate) fn candidates(program: &str, path: &str) -> Result<Vec<Text>, Refusal> {
    if program.contains('/') {
        return Ok(vec![text(program)?]);
    }
    path.split(':')
        .map(|dir| if dir.is_empty() { "." } else { dir })
        .map(|dir| text(&format!("{dir}/{program}")))
        .collect()
}

/// The resource limits of a program: getrlimit(2).
pub(crate) fn rlimits(limits: &Limits) -> Vec<Rlimit> {
    const UNLIMITED: u64 = u64::MAX;
    let both = |resource: u32, value: u64| Rlimit { resource, soft: value, hard: value };
    vec![
        both(libc::RLIMIT_NOFILE, limits.open_files),
        both(libc::RLIMIT_FSIZE, limits.file_size_bytes.unwrap_or(UNLIMITED)),
        both(libc::RLIMIT_STACK, limits.stack_bytes),
        both(libc::RLIMIT_CORE, limits.core_bytes),
        both(libc::RLIMIT_MEMLOCK, 64 << 10),
        both(libc::RLIMIT_MSGQUEUE, 0),
        both(libc::RLIMIT_RTPRIO, 0),
        both(libc::RLIMIT_NICE, 0),
        both(libc::RLIMIT_SIGPENDING, 1024),
    ]
}
