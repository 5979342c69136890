//! Fresh sandboxes beside a bare spawn and beside others, interleaved in one run.
//!
//! In order: root file systems are made, with one program each; then each [`Series`] runs that program in every way,
//! round after round, and as often as possible with two at a time, slice after slice; what came of it is printed, and
//! written to a document with a plot if one is named. `cargo xtask bench` builds and runs this.

mod document;
mod figures;
mod ours;
mod peers;
mod tiny;
mod usage;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;
use hutch_sandbox::Launcher;
use nix::time::{ClockId, clock_gettime};

use figures::{Series, Slice, Way};
use ours::Ours;
use peers::Peer;
use usage::Spent;

/// How many run at one time where the rate is measured.
const CLIENTS: usize = 2;

#[derive(Parser)]
#[command(about = "Compare fresh sandboxes with a bare spawn and with others")]
struct Args {
    /// How many rounds back to back
    #[arg(long, default_value_t = 500)]
    rounds: usize,
    /// How many rounds with 100 ms of quiet between two runs
    #[arg(long, default_value_t = 50)]
    quiet_rounds: usize,
    /// For how many seconds each way is run as often as possible, two at a time
    #[arg(long, default_value_t = 5)]
    sustained_s: usize,
    /// Leave all out but the bare spawn and our engine
    #[arg(long)]
    no_peers: bool,
    /// The program that is run: `busybox`, `tiny` (200 bytes), or both one after the other
    #[arg(long, default_value = "both")]
    program: String,
    /// A static busybox
    #[arg(long, default_value = "/bin/busybox")]
    busybox: PathBuf,
    /// Write the figures to this document, between its marks, and a plot beside it
    #[arg(long)]
    document: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    // First of all, while there is one thread. Each engine has one of its own.
    let mut launchers = Vec::new();
    for _ in 0..2 * ours::ALL.len() {
        launchers.push(Launcher::fork()?);
    }
    let args = Args::parse();
    let dir = tempfile::tempdir()?;
    let begun = document::machine()?;
    let mut all = Vec::new();
    for program in ["busybox", "tiny"] {
        let engines = launchers.split_off(launchers.len() - ours::ALL.len());
        if args.program == program || args.program == "both" {
            all.extend(measure(program, engines, dir.path(), &args)?);
        }
    }
    document::print(&all)?;
    match &args.document {
        Some(path) => document::write(path, &begun, &all),
        None => Ok(()),
    }
}

/// Everything that is measured with one program.
fn measure(program: &str, launchers: Vec<Launcher>, dir: &Path, args: &Args) -> anyhow::Result<Vec<Series>> {
    let dir = dir.join(program);
    let root = root_file_system(&dir, program, &args.busybox)?;
    let own = std::env::current_exe()?;
    let hutch = own.parent().map(|dir| dir.join("hutch")).filter(|hutch| hutch.exists());
    let mut peers = peers::all(&dir, &root, "/bin/true", hutch.as_deref())?;
    if args.no_peers {
        peers.truncate(1);
    }
    let engines = launchers
        .into_iter()
        .zip(ours::ALL)
        .enumerate()
        .map(|(number, (launcher, switches))| {
            Ours::new(switches, launcher, dir.join(format!("data-{number}")), &root, "/bin/true")
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut all = Vec::new();
    for (rounds, quiet) in [(args.rounds, Duration::ZERO), (args.quiet_rounds, Duration::from_millis(100))] {
        if rounds > 0 {
            all.push(in_turn(program, &peers, &engines, rounds, quiet)?);
        }
    }
    if args.sustained_s > 0
        && let Some(series) = all.first_mut()
    {
        sustained(series, &peers, &engines, args.sustained_s)?;
    }
    Ok(all)
}

fn root_file_system(dir: &Path, program: &str, busybox: &Path) -> anyhow::Result<PathBuf> {
    let root = dir.join("root");
    for place in ["bin", "dev", "etc", "proc", "tmp", "sys"] {
        std::fs::create_dir_all(root.join(place))?;
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\njob:x:1001:1001::/:/bin/sh\n")?;
    std::fs::write(root.join("etc/group"), "root:x:0:\njob:x:1001:\n")?;
    if program == "tiny" {
        tiny::write(&root.join("bin/true"))?;
    } else {
        let hint = || format!("copy {}: install the package busybox-static", busybox.display());
        std::fs::copy(busybox, root.join("bin/true")).with_context(hint)?;
    }
    Ok(root)
}

/// Runs every way once in each round.
fn in_turn(
    program: &str,
    peers: &[Peer],
    engines: &[Ours],
    rounds: usize,
    quiet: Duration,
) -> anyhow::Result<Series> {
    let mut series = Series::new(program, quiet, peers, engines);
    for _ in 0..rounds {
        for (way, peer) in series.peers.iter_mut().zip(peers) {
            std::thread::sleep(quiet);
            let begun = Instant::now();
            peer.run(0).with_context(|| peer.name)?;
            way.times.push(begun.elapsed());
        }
        for (way, engine) in series.engines.iter_mut().zip(engines) {
            std::thread::sleep(quiet);
            time_ours(way, engine)?;
        }
    }
    Ok(series)
}

/// Times one run to its answer; what it leaves behind is taken down before the next.
fn time_ours(way: &mut Way, engine: &Ours) -> anyhow::Result<()> {
    let (begun, begun_ns) = (Instant::now(), Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?));
    let ran = engine.run(0).with_context(|| engine.switches.name)?;
    way.times.push(begun.elapsed());
    if let Some(first) = tiny::began_ns(&ran.stdout) {
        way.to_first_instruction.push(Duration::from_nanos(first).saturating_sub(begun_ns));
    }
    way.to_exec.push(Duration::from_micros(ran.durations.setup_us));
    drop(ran.remains);
    way.with_take_down.push(begun.elapsed());
    Ok(())
}

/// Runs as many as possible, two at a time, each way for a second in turn.
fn sustained(series: &mut Series, peers: &[Peer], engines: &[Ours], seconds: usize) -> anyhow::Result<()> {
    for _ in 0..seconds {
        for (way, peer) in series.peers.iter_mut().zip(peers) {
            way.slices.push(slice(|client| peer.run(client))?);
        }
        for (way, engine) in series.engines.iter_mut().zip(engines) {
            way.slices.push(slice(|client| engine.run(client).map(|ran| drop(ran.remains)))?);
        }
    }
    Ok(())
}

/// One second of one way, and what that cost; the kernel's threads get a moment to come to an end.
fn slice(run: impl Fn(usize) -> anyhow::Result<()> + Sync) -> anyhow::Result<Slice> {
    const LENGTH: Duration = Duration::from_secs(1);
    let (before, begun) = (Spent::now()?, Instant::now());
    let client = |client: usize| -> anyhow::Result<u32> {
        let mut count = 0;
        while begun.elapsed() < LENGTH {
            run(client)?;
            count += 1;
        }
        Ok(count)
    };
    let counts = std::thread::scope(|scope| {
        let client = &client;
        let clients: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(move || client(number))).collect();
        clients.into_iter().map(std::thread::ScopedJoinHandle::join).collect::<Vec<_>>()
    });
    let time = begun.elapsed();
    let mut runs = 0;
    for count in counts {
        runs += count.map_err(|_| anyhow::anyhow!("a client panicked"))??;
    }
    std::thread::sleep(Duration::from_millis(300));
    Ok(Slice { runs, time, spent: Spent::now()?.since(before) })
}
