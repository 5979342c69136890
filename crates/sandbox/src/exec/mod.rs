//! One more program in a sandbox that runs, as `docker exec` does it, with every restriction of the job on it.
//!
//! In order: the job's environment and limits are taken over; an usher is cloned into the sandbox and starts the program in
//! the job's cgroup, namespaces and filter; our ends of its streams go to whoever attends to it ([`attend`]), in this
//! process or another: what is typed goes in, what it writes comes out, until it ends. It is killed when the job ends, and
//! when nobody waits for it any more. What it uses counts for the job.

mod attend;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use hutch_proto::{JobId, SeccompRefused};
use hutch_sandbox_sys::{
    Errno, HandedBack, IdRange, Launcher, Plan, Program, ProgramCgroup, RECORD_BYTES, Record, Stage, Usher,
    Ushered, WindowSize, process,
};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use crate::cgroup::{Entrance, GroupWatch};
use crate::plan::{JobPlan, StepPlan, candidates, rlimits, text};
use crate::refusal::Refusal;
use crate::seccomp;
use crate::spawn::{FdList, Running, indices, output_pipe, pipe, with_source};
use crate::supervise::{read, readable, watched};

pub(crate) use attend::{Streams, attend};

/// How often it is looked whether a sandbox can be entered by now, and how long between.
const TRIES: (u32, Duration) = (200, Duration::from_millis(10));
/// The most arguments and variables, and the most bytes of them: what a job's own command may have.
const MOST_TEXTS: usize = 4096;
const MOST_BYTES: usize = 1 << 20;

/// One more program for a running job. It has the job's user, directories, environment, resource limits and filter; a call
/// that the filter refuses is answered with EPERM, also where the job's own program is told of, or killed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecOrder {
    /// Program and arguments; no shell. Looked up in the job's `PATH`.
    pub command: Vec<String>,
    /// Added to the job's environment.
    pub env: BTreeMap<String, String>,
    /// Where it runs; as the job's program if none. Made if missing.
    pub cwd: Option<String>,
    /// Its terminal, if it is to have one, and how large that is; otherwise its streams are pipes.
    pub terminal: Option<WindowSize>,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecEnd {
    /// It exited with this code.
    Exited(i32),
    /// This signal ended it; SIGKILL also where its job ended.
    Signaled(i32),
    /// There was no such program.
    NotFound,
    /// There is such a file, and it cannot be run.
    NotRunnable,
}

impl ExecEnd {
    /// The exit code that a shell would give: 127, 126, 128+n, or the program's own.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Signaled(signal) => 128 + signal,
            Self::NotFound => 127,
            Self::NotRunnable => 126,
        }
    }
}

/// Why a program was not run in a job.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// No such job runs here now.
    #[error("job {0} does not run here: it waits, has finished, or never was")]
    NotRunning(JobId),
    /// The order is wrong.
    #[error("{0}")]
    Wrong(String),
    /// The host or this program failed.
    #[error("cannot bring a program into the job: {0}")]
    Host(String),
}

impl From<Refusal> for ExecError {
    fn from(refusal: Refusal) -> Self {
        match refusal.reason {
            hutch_proto::Reason::SpecInvalid => Self::Wrong(refusal.message),
            _ => Self::Host(refusal.message),
        }
    }
}

impl From<io::Error> for ExecError {
    fn from(error: io::Error) -> Self {
        Self::Host(error.to_string())
    }
}

/// What entering a running step takes.
#[derive(Debug)]
pub(crate) struct Inside {
    init: OwnedFd,
    group: GroupWatch,
    step: StepPlan,
    user: (String, Option<String>),
    ids: IdRange,
}

impl Inside {
    pub(crate) fn new(
        running: &Running,
        job: &JobPlan,
        step: &StepPlan,
        ids: IdRange,
    ) -> Result<Self, Refusal> {
        let init = running.init.try_clone();
        Ok(Self {
            init: init.map_err(|e| Refusal::host(format!("cannot keep a sandbox's pidfd: {e}")))?,
            group: running.cgroup.watch(),
            step: StepPlan { stdin: Vec::new(), ..step.clone() },
            user: (job.user.clone(), job.group.clone()),
            ids,
        })
    }

    /// Whether the step's last process is dead.
    pub(crate) fn has_ended(&self) -> bool {
        // Signal 0 is only tried: kill(2).
        process::signal(self.init.as_fd(), 0).is_err()
    }

    /// The program as the sandbox is told of it, without its descriptors.
    fn program(&self, order: &ExecOrder) -> Result<Program, ExecError> {
        let wrong = |why: &str| Err(ExecError::Wrong(why.to_owned()));
        let Some(first) = order.command.first().filter(|first| !first.is_empty()) else {
            return wrong("command: names no program");
        };
        let names = order.env.iter().map(|(name, value)| name.len() + value.len() + 2);
        let bytes: usize = order.command.iter().map(|argument| argument.len() + 1).chain(names).sum();
        if order.command.len() > MOST_TEXTS || bytes > MOST_BYTES {
            return wrong("command: more than 4096 arguments, or more than 1 MiB of them");
        }
        if order.env.keys().any(|name| name.is_empty() || name.contains('=')) {
            return wrong("env: a name is empty or has a `=`");
        }
        if order.cwd.as_ref().is_some_and(|cwd| !cwd.starts_with('/')) {
            return wrong("cwd: is not absolute");
        }
        let mut env: BTreeMap<String, String> = BTreeMap::new();
        if order.terminal.is_some() {
            env.insert("TERM".to_owned(), "xterm".to_owned());
        }
        let own = self.step.env.iter().filter_map(|entry| entry.as_cstr().to_str().ok()?.split_once('='));
        env.extend(own.map(|(name, value)| (name.to_owned(), value.to_owned())));
        env.extend(order.env.clone());
        if env.len() > MOST_TEXTS {
            return wrong("env: more than 4096 variables with those of the job");
        }
        Ok(Program {
            cgroup: ProgramCgroup::Tasks(Vec::new()),
            user: self.user.0.clone(),
            group: self.user.1.clone(),
            files: Vec::new(),
            payload: None,
            cwd: match &order.cwd {
                Some(cwd) => Some(text(cwd)?),
                None => self.step.cwd.clone(),
            },
            argv: order.command.iter().map(|argument| text(argument)).collect::<Result<_, _>>()?,
            candidates: candidates(first, env.get("PATH").map_or("", String::as_str))?,
            set_home: !env.contains_key("HOME"),
            set_user: !env.contains_key("USER"),
            env: env
                .iter()
                .map(|(name, value)| text(&format!("{name}={value}")))
                .collect::<Result<_, _>>()?,
            rlimits: rlimits(&self.step.limits),
            stdin: None,
            outputs: [0, 0],
            terminal: order.terminal,
            filter: seccomp::index(self.step.profile, SeccompRefused::Errno),
            listener: None,
        })
    }
}

/// Ends a program when nobody waits for it: its usher kills it.
#[derive(Debug)]
struct Attended(AsyncFd<OwnedFd>);

impl Drop for Attended {
    fn drop(&mut self) {
        let _ = process::signal(self.0.get_ref().as_fd(), libc::SIGTERM);
    }
}

/// A program in a job, and our ends of its streams.
#[derive(Debug)]
pub(crate) struct Entered {
    pub(crate) streams: Streams,
    pub(crate) program: Attending,
}

/// A program that is waited for; it is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Attending {
    usher: Attended,
    report: AsyncFd<OwnedFd>,
    _handed_back: HandedBack,
}

impl Attending {
    /// Waits for its end.
    pub(crate) async fn end(self) -> Result<ExecEnd, ExecError> {
        self.usher.0.readable().await?.retain_ready();
        outcome(&self.report)
    }
}

async fn find_usher(launcher: &Launcher, inside: &Inside) -> Result<Usher, ExecError> {
    for _ in 0..TRIES.0 {
        match launcher.enter(inside.init.as_fd()) {
            Err(Errno::EAGAIN) => tokio::time::sleep(TRIES.1).await,
            other => return other.map_err(|e| ExecError::Host(e.desc().to_owned())),
        }
    }
    Err(ExecError::Host("its own program does not start".to_owned()))
}

/// Has the usher start the program; what it tells of it, and our ends of the streams.
fn start(
    usher: Usher,
    inside: &Inside,
    mut program: Program,
) -> Result<(Ushered, OwnedFd, Streams), ExecError> {
    let (report, report_end) = pipe()?;
    let input = if program.terminal.is_none() { Some(pipe()?) } else { None };
    let (stdin_end, stdin) = input.unzip();
    let (stdout, stdout_end) = output_pipe()?;
    let (stderr, stderr_end) = output_pipe()?;
    let mut fds = FdList::default();
    let report_index = fds.add([report_end.as_fd()]);
    program.stdin = stdin_end.as_ref().map(|end| fds.add([end.as_fd()]));
    program.outputs = [fds.add([stdout_end.as_fd()]), fds.add([stderr_end.as_fd()])];
    let entrance = inside.group.entrance().map_err(|e| ExecError::Host(with_source(&e)))?;
    program.cgroup = match &entrance {
        Entrance::Tasks(tasks) => ProgramCgroup::Tasks(indices(&mut fds, tasks)),
        Entrance::Unified(dir, tasks) => {
            let dir = fds.add([dir.as_fd()]);
            ProgramCgroup::Unified(dir, indices(&mut fds, tasks))
        }
    };
    let plan =
        Plan { hostname: String::new(), report: report_index, network: None, ids: inside.ids, program };
    let ushered = usher.start(&plan, &fds.0).map_err(|e| ExecError::Host(e.desc().to_owned()))?;
    Ok((ushered, report, Streams { stdout, stderr, stdin, terminal: None }))
}

/// Brings a program into a sandbox that runs.
pub(crate) async fn enter(
    launcher: &Launcher,
    inside: &Inside,
    order: &ExecOrder,
) -> Result<Entered, ExecError> {
    let program = inside.program(order)?;
    let usher = find_usher(launcher, inside).await?;
    let (Ushered { process, mut handed_back }, report, mut streams) = start(usher, inside, program)?;
    let usher = Attended(readable(process)?);
    if order.terminal.is_some() {
        streams.terminal = terminal(&usher, &mut handed_back).await?;
    }
    Ok(Entered { streams, program: Attending { usher, report: watched(report)?, _handed_back: handed_back } })
}

/// The terminal that a program opens in its sandbox; none if it ends before.
async fn terminal(usher: &Attended, handed_back: &mut HandedBack) -> io::Result<Option<OwnedFd>> {
    let arriving = readable(handed_back.socket().try_clone_to_owned()?)?;
    loop {
        tokio::select! {
            biased;
            ready = arriving.readable() => {
                ready?.clear_ready();
                let more = handed_back.receive().map_err(io::Error::from)?;
                let terminal = handed_back.take_terminal();
                if terminal.is_some() || !more {
                    return Ok(terminal);
                }
            }
            ended = usher.0.readable() => {
                ended?.retain_ready();
                return Ok(handed_back.take_terminal());
            }
        }
    }
}

/// What the usher told of a program that has ended.
fn outcome(report: &AsyncFd<OwnedFd>) -> Result<ExecEnd, ExecError> {
    let mut end = None;
    let mut bytes = [0; RECORD_BYTES];
    while let Ok(RECORD_BYTES) = read(report, &mut bytes)? {
        match Record::from_bytes(&bytes) {
            Some(Record::Failed { stage: Stage::Exec, errno, .. }) => {
                let missing = [Errno::ENOENT, Errno::ENOTDIR].contains(&Errno::from_raw(errno));
                return Ok(if missing { ExecEnd::NotFound } else { ExecEnd::NotRunnable });
            }
            Some(Record::Failed { stage, errno, .. }) => {
                return Err(ExecError::Host(format!("{stage:?}: {}", Errno::from_raw(errno).desc())));
            }
            Some(Record::Ended { wait_status, .. }) => end = Some(wait_status),
            Some(Record::Started { .. }) | None => {}
        }
    }
    match end {
        Some(status) if libc::WIFEXITED(status) => Ok(ExecEnd::Exited(libc::WEXITSTATUS(status))),
        Some(status) => Ok(ExecEnd::Signaled(libc::WTERMSIG(status))),
        None => Err(ExecError::Host("its usher ended without a word".to_owned())),
    }
}
