//! One more program in a sandbox that runs, as `docker exec` does it, with every restriction of the job on it.
//!
//! In order: the job's environment and limits are taken over; an usher is cloned into the sandbox and starts the program in
//! the job's cgroup, namespaces and filter; what is typed goes in, what it writes is told, until it ends. It is killed when
//! the job ends, and when nobody waits for it any more. What it uses counts for the job.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use hutch_proto::{JobId, SeccompRefused};
use hutch_sandbox_sys::{
    Errno, IdRange, Launcher, Plan, Program, ProgramCgroup, RECORD_BYTES, Record, Stage, Usher, Ushered,
    WindowSize, process,
};
use tokio::io::unix::AsyncFd;

use crate::cgroup::{Entrance, GroupWatch};
use crate::observe::{Observer, Stream};
use crate::plan::{JobPlan, StepPlan, candidates, rlimits, text};
use crate::refusal::Refusal;
use crate::seccomp;
use crate::spawn::{FdList, Running, indices, output_pipe, pipe, with_source};
use crate::supervise::{Flow, arrival, attended, read, readable, settle, shown_at, taken_at, typed, watched};
use crate::terminal::{Stroke, Strokes, Terminal};

/// How often it is looked whether a sandbox can be entered by now, and how long between.
const TRIES: (u32, Duration) = (200, Duration::from_millis(10));
/// The name of a program's step, as its observer hears it.
const STEP: &str = "exec";
/// The most arguments and variables, and the most bytes of them: what a job's own command may have.
const MOST_TEXTS: usize = 4096;
const MOST_BYTES: usize = 1 << 20;

/// One more program for a running job. It has the job's user, directories, environment, resource limits and filter; a call
/// that the filter refuses is answered with EPERM, also where the job's own program is told of, or killed.
#[derive(Debug)]
pub struct ExecOrder {
    /// Program and arguments; no shell. Looked up in the job's `PATH`.
    pub command: Vec<String>,
    /// Added to the job's environment.
    pub env: BTreeMap<String, String>,
    /// Where it runs; as the job's program if none. Made if missing.
    pub cwd: Option<String>,
    /// Its terminal, if it is to have one, and how large that is; otherwise its streams are pipes.
    pub terminal: Option<WindowSize>,
    /// What is typed. The end of it ends a pipe's input, and leaves a terminal open.
    pub strokes: Strokes,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
struct Attended(AsyncFd<OwnedFd>);

impl Drop for Attended {
    fn drop(&mut self) {
        let _ = process::signal(self.0.get_ref().as_fd(), libc::SIGTERM);
    }
}

/// A program on its way, our ends of its streams, and where its usher tells of it.
struct Entered {
    usher: Ushered,
    report: OwnedFd,
    stdin: Option<OwnedFd>,
    outputs: [OwnedFd; 2],
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

fn start(usher: Usher, inside: &Inside, mut program: Program) -> Result<Entered, ExecError> {
    let (report, report_end) = pipe()?;
    let input = if program.terminal.is_none() { Some(pipe()?) } else { None };
    let (stdin_end, stdin) = input.unzip();
    let (stdout, stdout_end) = output_pipe()?;
    let (stderr, stderr_end) = output_pipe()?;
    let mut fds = FdList::default();
    let report_index = fds.add([report_end.as_fd()]);
    program.stdin = stdin_end.as_ref().map(|end| fds.add([end.as_fd()]));
    program.outputs = [fds.add([stdout_end.as_fd()]), fds.add([stderr_end.as_fd()])];
    let unified;
    program.cgroup = match inside.group.entrance().map_err(|e| ExecError::Host(with_source(&e)))? {
        Entrance::Tasks(tasks) => ProgramCgroup::Tasks(indices(&mut fds, &tasks)),
        Entrance::Unified(dir, tasks) => {
            unified = dir;
            let dir = fds.add([unified.as_fd()]);
            ProgramCgroup::Unified(dir, indices(&mut fds, &tasks))
        }
    };
    let plan =
        Plan { hostname: String::new(), report: report_index, steps: Vec::new(), ids: inside.ids, program };
    let usher = usher.start(&plan, &fds.0).map_err(|e| ExecError::Host(e.desc().to_owned()))?;
    Ok(Entered { usher, report, stdin, outputs: [stdout, stderr] })
}

/// Runs a program in a sandbox that runs.
pub(crate) async fn exec(
    launcher: &Launcher,
    inside: &Inside,
    order: ExecOrder,
    observer: &dyn Observer,
) -> Result<ExecEnd, ExecError> {
    let program = inside.program(&order)?;
    let usher = find_usher(launcher, inside).await?;
    let Entered { usher: Ushered { process, mut handed_back }, report, stdin, outputs: [stdout, stderr] } =
        start(usher, inside, program)?;
    let usher = Attended(readable(process)?);
    let [report, stdout, stderr] = [watched(report)?, watched(stdout)?, watched(stderr)?];
    // A pipe to it is fed as a terminal is, and closed at the end.
    let mut input = stdin.map(attended).transpose()?.map(|fd| Terminal::new(fd, &[], false));
    let mut arriving = match order.terminal {
        Some(_) => Some(readable(handed_back.socket().try_clone_to_owned()?)?),
        None => None,
    };
    let mut terminal: Option<Terminal> = None;
    let (mut shows, mut types, mut open) = (true, true, [true; 2]);
    loop {
        let sink = terminal.as_ref().or(input.as_ref());
        tokio::select! {
            ready = usher.0.readable() => { ready?.retain_ready(); break }
            ready = stdout.readable(), if open[0] => {
                open[0] = settle(ready?, tell(&stdout, Stream::Stdout, observer, usize::MAX)?);
            }
            ready = stderr.readable(), if open[1] => {
                open[1] = settle(ready?, tell(&stderr, Stream::Stderr, observer, usize::MAX)?);
            }
            ready = arrival(arriving.as_ref()), if arriving.is_some() => {
                ready?;
                let more = handed_back.receive().map_err(io::Error::from)?;
                terminal = handed_back.take_terminal().map(attended).transpose()?
                    .map(|fd| Terminal::new(fd, &[], false));
                if !more || terminal.is_some() {
                    arriving = None;
                }
            }
            shown = shown_at(terminal.as_ref()), if terminal.is_some() && shows => {
                let (ready, fd) = shown?;
                shows = settle(ready, tell(fd, Stream::Stdout, observer, usize::MAX)?);
            }
            ready = taken_at(sink), if sink.is_some_and(Terminal::has_waiting) => {
                ready?;
                if let Some(sink) = terminal.as_mut().or(input.as_mut()) {
                    sink.type_waiting().await?;
                }
            }
            stroke = typed(Some(&order.strokes)), if types && sink.is_some_and(Terminal::takes_strokes) => {
                match (stroke, terminal.as_mut().or(input.as_mut())) {
                    (Some(Stroke::Resized(_)), Some(_)) if order.terminal.is_none() => {}
                    (Some(stroke), Some(sink)) => sink.stroke(stroke),
                    _ => types = false,
                }
            }
        }
        if !types && input.as_ref().is_some_and(|input| !input.has_waiting()) {
            input = None;
        }
    }
    // Another process of the job may hold its streams still, and write for ever: what is there now is told.
    tell(&stdout, Stream::Stdout, observer, LEFT)?;
    tell(&stderr, Stream::Stderr, observer, LEFT)?;
    if let Some(terminal) = terminal.filter(|_| shows) {
        tell(&terminal.fd, Stream::Stdout, observer, LEFT)?;
    }
    outcome(&report)
}

/// What a pipe or a terminal holds at most.
const LEFT: usize = 64 << 10;

/// Tells what a program wrote, so much at one time that a flood does not hold up the rest.
fn tell(from: &AsyncFd<OwnedFd>, stream: Stream, observer: &dyn Observer, most: usize) -> io::Result<Flow> {
    let mut bytes = [0; 16 << 10];
    let mut told = 0;
    for _ in 0..16 {
        let count = match read(from, &mut bytes)? {
            Err(flow) => return Ok(flow),
            Ok(count) => count,
        };
        observer.output(STEP, stream, &bytes[..count]);
        told += count;
        if told >= most {
            break;
        }
    }
    Ok(Flow::More)
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
