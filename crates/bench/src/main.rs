//! Fresh sandboxes beside a bare spawn and beside bubblewrap, interleaved in one run.
//!
//! In order: a root file system with one static program is made; each round runs that program once
//! in each way; at the end each way's median, 99th percentile and ratio to the bare spawn are printed, and how many
//! a second there are with two at a time. `cargo xtask bench` builds and runs this.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Parser;
use hutch_proto::{JobSpec, Status};
use hutch_sandbox::{Engine, EngineConfig, Launcher, Order, Remains, Unobserved};
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
    times: Vec<Duration>,
    rate: f64,
}

impl Way {
    fn new(name: &'static str) -> Self {
        Self { name, times: Vec::new(), rate: 0.0 }
    }

    fn percentile(&self, percent: usize) -> Duration {
        let mut sorted = self.times.clone();
        sorted.sort_unstable();
        let last = sorted.len().saturating_sub(1);
        sorted.get(last * percent / 100).copied().unwrap_or_default()
    }
}

fn main() -> anyhow::Result<()> {
    // First of all, while there is one thread.
    let launcher = Launcher::fork()?;
    let args = Args::parse();
    let dir = tempfile::tempdir()?;
    let root = root_file_system(dir.path(), &args.busybox)?;
    let mut config = EngineConfig::new(dir.path().join("data"));
    config.slots = 2;
    config.layer_dirs = vec![root.clone()];
    let engine = Engine::new(launcher, config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let bubblewrap = Command::new("bwrap").arg("--version").stdout(Stdio::null()).status().is_ok();
    let mut ways = [Way::new("bare spawn"), Way::new("bubblewrap"), Way::new("hutch engine")];
    for _ in 0..args.rounds {
        timed(&mut ways[0], args.quiet_ms, || spawn(&root))?;
        if bubblewrap {
            timed(&mut ways[1], args.quiet_ms, || wrap(&root))?;
        }
        timed(&mut ways[2], args.quiet_ms, || runtime.block_on(as_a_task(&engine, &root, 0)))?;
    }
    if args.sustained_s > 0 {
        let time = Duration::from_secs(args.sustained_s);
        ways[0].rate = sustained(time, |_| spawn(&root))?;
        if bubblewrap {
            ways[1].rate = sustained(time, |_| wrap(&root))?;
        }
        ways[2].rate = sustained(time, |slot| runtime.block_on(as_a_task(&engine, &root, slot)))?;
    }
    report(&ways, &args)
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

/// A job in a task of its own, as a worker's slot runs it.
async fn as_a_task(engine: &Engine, root: &Path, slot: u32) -> anyhow::Result<Option<Remains>> {
    let (engine, root) = (engine.clone(), root.to_owned());
    tokio::spawn(async move { job(&engine, &root, slot).await }).await?
}

async fn job(engine: &Engine, root: &Path, slot: u32) -> anyhow::Result<Option<Remains>> {
    let spec = serde_json::json!({"layers": [format!("dir:{}", root.display())], "command": ["/bin/true"], "cwd": "/"});
    let job = JobSpec::parse(spec.to_string().as_bytes())?;
    let report = engine.run(Order { job, slot, cancel: CancellationToken::new() }, &Unobserved).await;
    if report.status != Status::Succeeded {
        bail!("{}: {}", report.status, report.message);
    }
    Ok(report.remains)
}

fn report(ways: &[Way], args: &Args) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let bare = ways[0].percentile(50).as_secs_f64();
    writeln!(out, "{} rounds, {} ms of quiet between runs", args.rounds, args.quiet_ms)?;
    writeln!(
        out,
        "{:<14} {:>10} {:>10} {:>8} {:>10} {:>8}",
        "", "p50 us", "p99 us", "p50 / bare", "per second", "/ bare"
    )?;
    for way in ways.iter().filter(|way| !way.times.is_empty()) {
        let (middle, high) = (way.percentile(50), way.percentile(99));
        writeln!(
            out,
            "{:<14} {:>10} {:>10} {:>8.2} {:>10.0} {:>8.2}",
            way.name,
            middle.as_micros(),
            high.as_micros(),
            middle.as_secs_f64() / bare,
            way.rate,
            way.rate / ways[0].rate,
        )?;
    }
    Ok(())
}
