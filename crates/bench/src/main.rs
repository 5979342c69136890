//! Fresh sandboxes beside a bare spawn and beside bubblewrap, interleaved in one run.
//!
//! In order: a root file system with one static program is made; each round runs that program once
//! in each way; at the end each way's median, 99th percentile and ratio to the bare spawn are printed, the median with
//! all that is taken down afterwards, and how many a second there are with two at a time, taken down each. Then where
//! the engine's time goes. `cargo xtask bench` builds and runs this.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Parser;
use hutch_proto::{JobSpec, Status};
use hutch_sandbox::{Durations, Engine, EngineConfig, Launcher, Order, Remains, Unobserved};
use tokio_util::sync::CancellationToken;

#[derive(Parser)]
#[command(about = "Compare fresh sandboxes with a bare spawn and with bubblewrap")]
struct Args {
    /// How many rounds
    #[arg(long, default_value_t = 1000)]
    rounds: usize,
    /// Milliseconds of quiet between two runs
    #[arg(long, default_value_t = 0)]
    quiet_ms: u64,
    /// Seconds for which as many as possible are run, two at a time; 0 leaves that out
    #[arg(long, default_value_t = 5)]
    sustained_s: u64,
    /// A static busybox
    #[arg(long, default_value = "/bin/busybox")]
    busybox: PathBuf,
}

/// One way of running the program.
struct Way {
    name: &'static str,
    /// To the answer.
    times: Vec<Duration>,
    /// Until everything is taken down, and the next is prepared.
    whole: Vec<Duration>,
    rate: Option<f64>,
}

impl Way {
    fn new(name: &'static str) -> Self {
        Self { name, times: Vec::new(), whole: Vec::new(), rate: None }
    }
}

fn percentile<T: Ord + Copy + Default>(values: &[T], percent: usize) -> T {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let last = sorted.len().saturating_sub(1);
    sorted.get(last * percent / 100).copied().unwrap_or_default()
}

/// An engine, and where its time goes.
struct Hutch {
    runtime: tokio::runtime::Runtime,
    engine: Engine,
    root: PathBuf,
    durations: Mutex<Vec<Durations>>,
}

impl Hutch {
    fn new(launcher: Launcher, data: PathBuf, root: &Path, prepare_ahead: bool) -> anyhow::Result<Self> {
        let mut config = EngineConfig::new(data);
        config.slots = 2;
        config.layer_dirs = vec![root.to_owned()];
        config.prepare_ahead = prepare_ahead;
        Ok(Self {
            engine: Engine::new(launcher, config)?,
            runtime: tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?,
            root: root.to_owned(),
            durations: Mutex::default(),
        })
    }

    /// A job in a task of its own, as a worker's slot runs it.
    fn run(&self, slot: u32) -> anyhow::Result<Option<Remains>> {
        let spec = serde_json::json!({
            "layers": [format!("dir:{}", self.root.display())], "command": ["/bin/true"], "cwd": "/",
        });
        let job = JobSpec::parse(spec.to_string().as_bytes())?;
        let engine = self.engine.clone();
        let order = Order { job, slot, cancel: CancellationToken::new(), strokes: None };
        let task = self.runtime.spawn(async move { engine.run(order, &Unobserved).await });
        let report = self.runtime.block_on(task)?;
        if report.status != Status::Succeeded {
            bail!("{}: {}", report.status, report.message);
        }
        self.durations.lock().unwrap_or_else(PoisonError::into_inner).push(report.durations);
        Ok(report.remains)
    }
}

fn main() -> anyhow::Result<()> {
    // First of all, while there is one thread.
    let launchers = [Launcher::fork()?, Launcher::fork()?];
    let args = Args::parse();
    let dir = tempfile::tempdir()?;
    let root = root_file_system(dir.path(), &args.busybox)?;
    let [ahead, in_line] = launchers;
    let ahead = Hutch::new(ahead, dir.path().join("ahead"), &root, true)?;
    let in_line = Hutch::new(in_line, dir.path().join("in-line"), &root, false)?;
    let bubblewrap = Command::new("bwrap").arg("--version").stdout(Stdio::null()).status().is_ok();
    let mut ways = ["bare spawn", "bubblewrap", "hutch engine", "nothing ahead"].map(Way::new);
    for _ in 0..args.rounds {
        timed(&mut ways[0], args.quiet_ms, || spawn(&root))?;
        if bubblewrap {
            timed(&mut ways[1], args.quiet_ms, || wrap(&root))?;
        }
        timed(&mut ways[2], args.quiet_ms, || ahead.run(0))?;
        timed(&mut ways[3], args.quiet_ms, || in_line.run(0))?;
    }
    let durations = std::mem::take(&mut *ahead.durations.lock().unwrap_or_else(PoisonError::into_inner));
    if args.sustained_s > 0 {
        let time = Duration::from_secs(args.sustained_s);
        ways[0].rate = Some(sustained(time, |_| spawn(&root))?);
        if bubblewrap {
            ways[1].rate = Some(sustained(time, |_| wrap(&root))?);
        }
        ways[2].rate = Some(sustained(time, |slot| ahead.run(slot))?);
        ways[3].rate = Some(sustained(time, |slot| in_line.run(slot))?);
    }
    report(&ways, &durations, &args)
}

fn root_file_system(dir: &Path, busybox: &Path) -> anyhow::Result<PathBuf> {
    let root = dir.join("root");
    for place in ["bin", "dev", "etc", "proc", "tmp"] {
        std::fs::create_dir_all(root.join(place))?;
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\njob:x:1001:1001::/:/bin/sh\n")?;
    std::fs::write(root.join("etc/group"), "root:x:0:\njob:x:1001:\n")?;
    let hint = || format!("copy {}: install the package busybox-static", busybox.display());
    std::fs::copy(busybox, root.join("bin/true")).with_context(hint)?;
    Ok(root)
}

/// Times one run to its answer; what it leaves behind is taken down before the next.
fn timed<T>(way: &mut Way, quiet_ms: u64, run: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<()> {
    std::thread::sleep(Duration::from_millis(quiet_ms));
    let begun = Instant::now();
    let remains = run()?;
    way.times.push(begun.elapsed());
    drop(remains);
    way.whole.push(begun.elapsed());
    Ok(())
}

/// Runs per second with two at a time.
fn sustained<T>(time: Duration, run: impl Fn(u32) -> anyhow::Result<T> + Sync) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let client = |slot: u32| -> anyhow::Result<u32> {
        let mut count = 0;
        while begun.elapsed() < time {
            drop(run(slot)?);
            count += 1;
        }
        Ok(count)
    };
    let counts = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..2).map(|slot| scope.spawn(move || client(slot))).collect();
        clients.into_iter().map(std::thread::ScopedJoinHandle::join).collect::<Vec<_>>()
    });
    let mut all = 0;
    for count in counts {
        all += count.map_err(|_| anyhow::anyhow!("a client panicked"))??;
    }
    Ok(f64::from(all) / begun.elapsed().as_secs_f64())
}

fn spawn(root: &Path) -> anyhow::Result<()> {
    run(&mut Command::new(root.join("bin/true")))
}

fn wrap(root: &Path) -> anyhow::Result<()> {
    let mut command = Command::new("bwrap");
    command.args(["--unshare-all", "--die-with-parent", "--ro-bind"]).arg(root).arg("/");
    run(command.args(["--dev", "/dev", "--proc", "/proc", "/bin/true"]))
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

fn report(ways: &[Way], durations: &[Durations], args: &Args) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{} rounds, {} ms of quiet between runs; microseconds", args.rounds, args.quiet_ms)?;
    writeln!(
        out,
        "{:<14} {:>8} {:>8} {:>10} {:>12} {:>12}",
        "", "p50", "p99", "p50 / bare", "p50 + down", "per second"
    )?;
    let bare = percentile(&ways[0].times, 50).as_secs_f64();
    for way in ways.iter().filter(|way| !way.times.is_empty()) {
        let middle = percentile(&way.times, 50);
        writeln!(
            out,
            "{:<14} {:>8} {:>8} {:>10.2} {:>12} {:>12}",
            way.name,
            middle.as_micros(),
            percentile(&way.times, 99).as_micros(),
            middle.as_secs_f64() / bare,
            percentile(&way.whole, 50).as_micros(),
            way.rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.0}")),
        )?;
    }
    let part = |of: fn(&Durations) -> u64| percentile(&durations.iter().map(of).collect::<Vec<_>>(), 50);
    writeln!(
        out,
        "of the engine's: set-up {}, the program {}, its tree's end {}, collecting {}",
        part(|d| d.setup_us),
        part(|d| d.run_us),
        part(|d| d.teardown_us),
        part(|d| d.collect_us),
    )?;
    Ok(())
}
