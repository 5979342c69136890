//! One step from its start to the death of its last process.
//!
//! Records, output, the clock, the processor's use, memory and the wish to cancel are watched at once;
//! the first cause to kill is the one that counts. When init is dead, so is the whole tree
//! (pid_namespaces(7)); only then is the rest of the pipes read, and what the kernel counted.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use hutch_proto::{Captured, Limits, OutputOverflow};
use hutch_sandbox_sys::defence::{Defence, without};
use hutch_sandbox_sys::{HandedBack, RECORD_BYTES, Record, process};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::time::Instant;

use crate::capture::{Capture, MOST_KEPT};
use crate::cgroup::{JobCgroup, Readings};
use crate::engine::Order;
use crate::observe::{Observer, Stream};
use crate::plan::StepPlan;
use crate::prepare::Prepared;
use crate::refusals::Refusals;
use crate::scratch::DiskUse;
use crate::spawn::Running;
use crate::terminal::{Stroke, Strokes, Terminal};
use crate::verdict::Cause;

/// How long set-up may take.
const SETUP_LIMIT: Duration = Duration::from_secs(60);
/// How often a running job's usage is told.
const USAGE_EVERY: Duration = Duration::from_secs(1);
/// Bounds of the time between two looks at the processor's use.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(500));

/// The time between two looks at the use of disks.
const LOOK_AT_IO: Duration = Duration::from_millis(50);

/// What a terminal holds at most of what was not read yet: TTYB_DEFAULT_MEM_LIMIT of the kernel.
const TERMINAL_HOLDS: u64 = 64 << 10;

/// A step whose last process is dead.
#[derive(Debug)]
pub(crate) struct Exited {
    pub(crate) cause: Option<Cause>,
    pub(crate) records: Records,
    pub(crate) readings: Readings,
    pub(crate) disk: DiskUse,
    /// How long it had been idle when that was too long.
    pub(crate) idle: Duration,
    pub(crate) stdout: Captured,
    pub(crate) stderr: Captured,
    /// Names of the system calls that were refused, where that is told.
    pub(crate) refused_syscalls: Vec<String>,
    /// CLOCK_MONOTONIC when the tree was dead, nanoseconds.
    pub(crate) dead_ns: u64,
    /// Its cgroup and its mount namespace, to be taken down when nobody waits.
    pub(crate) remains: (JobCgroup, OwnedFd),
    /// Where the scratch file system comes back for the next step.
    pub(crate) handed_back: HandedBack,
}

/// What came over the report pipe.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Records {
    pub(crate) failed: Option<Record>,
    pub(crate) started_ns: Option<u64>,
    pub(crate) ended: Option<(i32, u64)>,
}

/// The watch over one step.
struct Watch<'a> {
    limits: &'a Limits,
    step: &'a str,
    observer: &'a dyn Observer,
    init: AsyncFd<OwnedFd>,
    cgroup: JobCgroup,
    carried_bytes: u64,
    prepared: &'a Prepared,
    records: Records,
    stdout: Capture,
    stderr: Capture,
    cause: Option<Cause>,
    /// When SIGTERM's grace is over.
    kill_at: Option<Instant>,
    /// SIGKILL is on its way.
    ending: bool,
    setup_until: Instant,
    wall_until: Option<Instant>,
    look_at: Option<Instant>,
    io_at: Option<Instant>,
    usage_at: Instant,
    cpu_us: u64,
    active: Instant,
    idle: Duration,
    disk: DiskUse,
}

/// Watches a step until its last process is dead. `kept_before` is what the job's earlier steps keep in memory of their
/// stdout and stderr.
///
/// # Errors
/// If the descriptors cannot be watched; the sandbox is dead then too, by their closing and the launcher.
pub(crate) async fn supervise(
    running: Running,
    StepPlan { limits, name: step, stdin, refused, terminal: wants_terminal, .. }: &StepPlan,
    kept_before: (u64, u64),
    prepared: &Prepared,
    order: &Order,
    observer: &dyn Observer,
) -> io::Result<Exited> {
    let Running {
        init,
        mounts,
        mut handed_back,
        report,
        stdout,
        stderr,
        refusals,
        out_of_memory,
        cgroup,
        carried_bytes,
    } = running;
    let now = Instant::now();
    let [report, stdout, stderr] = [watched(report)?, watched(stdout)?, watched(stderr)?];
    let memory = out_of_memory.map(readable).transpose()?;
    let mut watch = Watch {
        limits,
        step,
        observer,
        // A pidfd and an event are only waited for, never read.
        init: readable(init)?,
        cgroup,
        carried_bytes,
        prepared,
        records: Records::default(),
        stdout: Capture::new(limits.stdout_bytes, MOST_KEPT.saturating_sub(kept_before.0)),
        stderr: Capture::new(limits.stderr_bytes, MOST_KEPT.saturating_sub(kept_before.1)),
        cause: None,
        kill_at: None,
        ending: false,
        setup_until: now + SETUP_LIMIT,
        wall_until: None,
        look_at: None,
        io_at: None,
        usage_at: now + USAGE_EVERY,
        cpu_us: 0,
        active: now,
        idle: Duration::ZERO,
        disk: DiskUse::default(),
    };
    let Order { cancel, strokes, .. } = order;
    let mut arriving =
        if *wants_terminal { Some(readable(handed_back.socket().try_clone_to_owned()?)?) } else { None };
    let mut terminal: Option<Terminal> = None;
    let (mut shows, mut types) = (true, strokes.is_some());
    let mut refusals = Refusals::new(refusals, *refused)?;
    let mut open = [true; 3];
    let mut memory_open = memory.is_some();
    loop {
        let next = watch.next_look();
        tokio::select! {
            ready = watch.init.readable() => { ready?.retain_ready(); break }
            ready = report.readable(), if open[0] => open[0] = settle(ready?, watch.read_records(&report)?),
            ready = stdout.readable(), if open[1] => {
                open[1] = settle(ready?, watch.read_output(&stdout, Stream::Stdout)?);
            }
            ready = stderr.readable(), if open[2] => {
                open[2] = settle(ready?, watch.read_output(&stderr, Stream::Stderr)?);
            }
            ready = arrival(arriving.as_ref()), if arriving.is_some() => {
                ready?;
                if !handed_back.receive()? {
                    arriving = None;
                }
                if let Some(fd) = handed_back.take_terminal() {
                    terminal = Some(Terminal::new(attended(fd)?, stdin, strokes.is_none()));
                    arriving = None;
                }
            }
            shown = shown_at(terminal.as_ref()), if terminal.is_some() && shows => {
                let (ready, fd) = shown?;
                shows = settle(ready, watch.read_output(fd, Stream::Stdout)?);
            }
            ready = taken_at(terminal.as_ref()), if terminal.as_ref().is_some_and(Terminal::has_waiting) => {
                ready?;
                if let Some(terminal) = &mut terminal {
                    terminal.type_waiting().await?;
                }
            }
            stroke = typed(strokes.as_ref()), if types && terminal.as_ref().is_some_and(Terminal::takes_strokes) => {
                match (stroke, &mut terminal) {
                    (Some(stroke), Some(terminal)) => terminal.stroke(stroke),
                    _ => types = false,
                }
            }
            () = out_of_memory_event(memory.as_ref()), if memory_open => { memory_open = false; watch.memory_ran_out() }
            () = refusals.ready() => if let Some(number) = refusals.take()? { watch.kill_now(Cause::Syscall(number)) },
            () = cancel.cancelled(), if watch.may_be_called_off() => watch.kill(Cause::Requested),
            () = tokio::time::sleep_until(next) => watch.look(),
        }
    }
    let dead_ns = process::monotonic_ns();
    // Every process of this sandbox is dead: what is left in the pipes is all that it wrote.
    if open[0] {
        watch.read_records(&report)?;
    }
    for (still_open, pipe, stream) in [(open[1], &stdout, Stream::Stdout), (open[2], &stderr, Stream::Stderr)]
    {
        if still_open {
            watch.drain(pipe, stream)?;
        }
    }
    if let Some(terminal) = terminal.filter(|_| shows) {
        watch.drain_up_to(&terminal.fd, Stream::Stdout, TERMINAL_HOLDS)?;
    }
    Ok(watch.finish(dead_ns, mounts, handed_back, refusals.names()))
}

/// What a pipe still has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// There may be more now.
    More,
    /// There is none now.
    Dry,
    /// There will be none.
    Closed,
}

/// A descriptor that the runtime watches; reads of it do not block.
pub(crate) fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    unblocked(&fd)?;
    readable(fd)
}

/// The same for a descriptor that is written to as well.
pub(crate) fn attended(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    unblocked(&fd)?;
    #[expect(deprecated, reason = "as below")]
    AsyncFd::with_interest(fd, Interest::READABLE | Interest::WRITABLE)
}

fn unblocked(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    // The reading end has an open description of its own: the program's end goes on blocking.
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

pub(crate) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    #[expect(
        deprecated,
        reason = "an OwnedFd keeps its descriptor open, which is all that the new name asks for"
    )]
    AsyncFd::with_interest(fd, Interest::READABLE)
}

/// Tells the runtime what was found; true while the pipe is open.
pub(crate) fn settle(mut ready: AsyncFdReadyGuard<'_, OwnedFd>, flow: Flow) -> bool {
    match flow {
        Flow::More => ready.retain_ready(),
        Flow::Dry => ready.clear_ready(),
        Flow::Closed => {}
    }
    flow != Flow::Closed
}

/// Reads once: the bytes' count, or what the pipe has instead.
pub(crate) fn read(fd: &AsyncFd<OwnedFd>, bytes: &mut [u8]) -> io::Result<Result<usize, Flow>> {
    match nix::unistd::read(fd.get_ref(), bytes) {
        // A terminal says so when the program's side is closed.
        Ok(0) | Err(Errno::EIO) => Ok(Err(Flow::Closed)),
        Ok(count) => Ok(Ok(count)),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(Err(Flow::Dry)),
        Err(e) => Err(e.into()),
    }
}

/// Waits until a sandbox handed something back.
pub(crate) async fn arrival(socket: Option<&AsyncFd<OwnedFd>>) -> io::Result<()> {
    match socket {
        Some(socket) => socket.readable().await.map(|mut ready| ready.clear_ready()),
        None => std::future::pending().await,
    }
}

/// Waits until a terminal shows something.
pub(crate) async fn shown_at(
    terminal: Option<&Terminal>,
) -> io::Result<(AsyncFdReadyGuard<'_, OwnedFd>, &AsyncFd<OwnedFd>)> {
    match terminal {
        Some(Terminal { fd, .. }) => fd.readable().await.map(|ready| (ready, fd)),
        None => std::future::pending().await,
    }
}

/// Waits until a terminal takes what is typed.
pub(crate) async fn taken_at(terminal: Option<&Terminal>) -> io::Result<()> {
    match terminal {
        Some(terminal) => terminal.writable().await,
        None => std::future::pending().await,
    }
}

pub(crate) async fn typed(strokes: Option<&Strokes>) -> Option<Stroke> {
    match strokes {
        Some(strokes) => strokes.next().await,
        None => std::future::pending().await,
    }
}

async fn out_of_memory_event(event: Option<&AsyncFd<OwnedFd>>) {
    match event {
        Some(event) => drop(event.readable().await),
        None => std::future::pending().await,
    }
}

impl Watch<'_> {
    /// The next moment at which something may be due.
    fn next_look(&self) -> Instant {
        let setup = if self.records.started_ns.is_none() { Some(self.setup_until) } else { None };
        [self.kill_at, self.wall_until, self.look_at, self.io_at, setup]
            .into_iter()
            .flatten()
            .fold(self.usage_at, Instant::min)
    }

    /// Whatever is due by now.
    fn look(&mut self) {
        let now = Instant::now();
        if self.kill_at.is_some_and(|at| at <= now) {
            self.end();
        }
        if self.records.started_ns.is_none() && self.setup_until <= now {
            self.kill_now(Cause::Setup);
        }
        if self.wall_until.is_some_and(|at| at <= now) {
            self.wall_until = None;
            self.kill(Cause::WallTime);
        }
        if self.look_at.is_some_and(|at| at <= now) {
            self.look_at_processor(now);
        }
        if self.io_at.is_some_and(|at| at <= now) {
            self.look_at_disks(now);
        }
        if self.usage_at <= now {
            self.usage_at = now + USAGE_EVERY;
            self.note_disk();
            if self.records.started_ns.is_some() {
                let readings = self.readings();
                self.observer.usage(&crate::course::usage(&readings, self.running_ms(), self.disk));
            }
        }
    }

    fn running_ms(&self) -> u64 {
        let started = self.records.started_ns.unwrap_or_else(process::monotonic_ns);
        process::monotonic_ns().saturating_sub(started) / 1_000_000
    }

    /// Sees how much of the processor was used, and when to look again: as soon as the rest could be used up.
    fn look_at_processor(&mut self, now: Instant) {
        let used = self.cgroup.cpu_us();
        if used > self.cpu_us {
            self.cpu_us = used;
            self.active = now;
        }
        let mut wait = LOOK_AGAIN.1;
        if let Some(limit) = self.limits.cpu_time_ms {
            let left = (limit * 1000).saturating_sub(used);
            if left == 0 {
                self.kill(Cause::CpuTime);
            }
            let most = self.limits.cpu_millis.max(1);
            wait = wait.min(Duration::from_micros(left.saturating_mul(1000) / most));
        }
        if let Some(limit) = self.limits.idle_time_ms {
            let limit = Duration::from_millis(limit);
            let idle = now.saturating_duration_since(self.active);
            if idle >= limit && self.cause.is_none() {
                self.idle = idle;
                self.kill(Cause::IdleTime);
            }
            wait = wait.min(limit.saturating_sub(idle).min(limit / 4));
        }
        self.look_at = Some(now + wait.max(LOOK_AGAIN.0));
    }

    /// Sees how much was read from disks and written to them.
    fn look_at_disks(&mut self, now: Instant) {
        let (read, written) = self.cgroup.io_bytes();
        let passed = |limit: Option<u64>, used: u64| limit.is_some_and(|limit| used > limit);
        self.io_at = Some(now + LOOK_AT_IO);
        if passed(self.limits.io_read_bytes, read) || passed(self.limits.io_write_bytes, written) {
            self.io_at = None;
            self.kill(Cause::Io);
        }
    }

    fn note_disk(&mut self) {
        let now = self.prepared.scratch.disk_use();
        self.disk = DiskUse {
            bytes_full: self.disk.bytes_full || now.bytes_full,
            inodes_full: self.disk.inodes_full || now.inodes_full,
            ..now
        };
    }

    fn signal(&self, signal: libc::c_int) {
        // It may have died just now.
        let _ = process::signal(self.init.get_ref().as_fd(), signal);
    }

    /// Whether a wish to cancel makes a difference still.
    fn may_be_called_off(&self) -> bool {
        !self.ending && self.cause != Some(Cause::Requested)
    }

    /// Kills for a cause, with the grace that the limits give. A second cause ends the grace of the first.
    fn kill(&mut self, cause: Cause) {
        match self.cause {
            Some(first) if first != cause => return self.end(),
            Some(_) => return,
            None => {}
        }
        if self.limits.kill_grace_ms == 0 || self.records.started_ns.is_none() {
            self.kill_now(cause);
            return;
        }
        self.cause = Some(cause);
        self.kill_at = Some(Instant::now() + Duration::from_millis(self.limits.kill_grace_ms));
        self.signal(libc::SIGTERM);
    }

    fn kill_now(&mut self, cause: Cause) {
        if self.cause.is_none() {
            self.cause = Some(cause);
        }
        self.end();
    }

    fn end(&mut self) {
        self.kill_at = None;
        self.ending = true;
        self.signal(libc::SIGKILL);
        self.let_io_go();
    }

    /// What waits for a disk cannot die before it had its turn.
    fn let_io_go(&self) {
        let Limits {
            io_read_bytes_per_s, io_write_bytes_per_s, io_read_ops_per_s, io_write_ops_per_s, ..
        } = self.limits;
        let rates = [io_read_bytes_per_s, io_write_bytes_per_s, io_read_ops_per_s, io_write_ops_per_s];
        if rates.into_iter().any(Option::is_some) && !without(Defence::LiftedRates) {
            self.cgroup.lift_io_rates();
        }
    }

    /// The kernel killed a process for memory, or is about to: the rest goes too.
    fn memory_ran_out(&mut self) {
        // The event also comes when the group is removed, and before the kill is counted.
        self.kill_now(Cause::Memory);
    }

    /// Reads records until there are none for now.
    fn read_records(&mut self, report: &AsyncFd<OwnedFd>) -> io::Result<Flow> {
        let mut bytes = [0; RECORD_BYTES];
        loop {
            match read(report, &mut bytes)? {
                Err(flow) => return Ok(flow),
                Ok(RECORD_BYTES) => match Record::from_bytes(&bytes) {
                    Some(record) => self.note(record),
                    None => return Err(io::Error::other("a sandbox sent what is no record")),
                },
                Ok(_) => return Err(io::Error::other("a sandbox sent a part of a record")),
            }
        }
    }

    fn note(&mut self, record: Record) {
        match record {
            Record::Failed { .. } => self.records.failed = Some(record),
            Record::Ended { wait_status, at_ns } => {
                self.records.ended = Some((wait_status, at_ns));
                self.let_io_go();
            }
            Record::Started { at_ns } => {
                self.records.started_ns = Some(at_ns);
                let now = Instant::now();
                let since = Duration::from_nanos(process::monotonic_ns().saturating_sub(at_ns));
                let wall = Duration::from_millis(self.limits.wall_time_ms);
                self.wall_until = Some(now + wall.saturating_sub(since));
                self.active = now;
                if self.limits.cpu_time_ms.is_some() || self.limits.idle_time_ms.is_some() {
                    self.look_at_processor(now);
                }
                if self.limits.io_read_bytes.is_some() || self.limits.io_write_bytes.is_some() {
                    self.io_at = Some(now + LOOK_AT_IO);
                }
            }
        }
    }

    /// Reads output, so much at one time that a flood does not hold up the clock.
    fn read_output(&mut self, pipe: &AsyncFd<OwnedFd>, stream: Stream) -> io::Result<Flow> {
        let mut bytes = [0; 16 << 10];
        for _ in 0..16 {
            let count = match read(pipe, &mut bytes)? {
                Err(flow) => return Ok(flow),
                Ok(count) => count,
            };
            self.active = Instant::now();
            let (capture, name) = match stream {
                Stream::Stdout => (&mut self.stdout, "stdout_bytes"),
                Stream::Stderr => (&mut self.stderr, "stderr_bytes"),
            };
            let kept = capture.take(&bytes[..count]);
            let overflowed = capture.overflowed();
            if !kept.is_empty() {
                self.observer.output(self.step, stream, kept);
            }
            if overflowed && self.limits.output_overflow == OutputOverflow::Kill {
                self.kill(Cause::Output(name));
            }
        }
        Ok(Flow::More)
    }

    /// Reads what is left in a pipe, which is no more than it holds: its other end may have been handed to a process
    /// of another sandbox, over a socket in a shared volume, and that one may write for ever.
    fn drain(&mut self, pipe: &AsyncFd<OwnedFd>, stream: Stream) -> io::Result<()> {
        let capacity = fcntl(pipe.get_ref(), FcntlArg::F_GETPIPE_SZ)?;
        self.drain_up_to(pipe, stream, u64::try_from(capacity).unwrap_or(0))
    }

    fn drain_up_to(&mut self, from: &AsyncFd<OwnedFd>, stream: Stream, most: u64) -> io::Result<()> {
        let begun = self.captured(stream);
        while self.captured(stream) - begun < most && self.read_output(from, stream)? == Flow::More {}
        Ok(())
    }

    /// What the kernel counted, and what it counted elsewhere.
    fn readings(&self) -> Readings {
        let mut readings = self.cgroup.readings();
        readings.memory_peak_bytes += self.carried_bytes;
        readings
    }

    fn captured(&self, stream: Stream) -> u64 {
        match stream {
            Stream::Stdout => self.stdout.bytes(),
            Stream::Stderr => self.stderr.bytes(),
        }
    }

    fn finish(
        mut self,
        dead_ns: u64,
        mounts: OwnedFd,
        handed_back: HandedBack,
        refused_syscalls: Vec<String>,
    ) -> Exited {
        self.note_disk();
        let readings = self.readings();
        Exited {
            cause: self.cause,
            records: self.records,
            readings,
            disk: self.disk,
            idle: self.idle,
            stdout: self.stdout.done(),
            stderr: self.stderr.done(),
            refused_syscalls,
            dead_ns,
            remains: (self.cgroup, mounts),
            handed_back,
        }
    }
}
