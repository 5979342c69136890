//! What was measured, and what is said of it: medians, percentiles, ratios to the bare spawn.

use std::time::Duration;

use crate::ours::Ours;
use crate::peers::Peer;
use crate::usage::Spent;

/// One second of one way, two at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slice {
    pub(crate) runs: u32,
    pub(crate) time: Duration,
    pub(crate) spent: Spent,
}

/// One way of running the program.
#[derive(Debug)]
pub(crate) struct Way {
    pub(crate) name: &'static str,
    pub(crate) does: &'static str,
    pub(crate) version: String,
    /// To the answer.
    pub(crate) times: Vec<Duration>,
    /// From the order to execve(2).
    pub(crate) to_exec: Vec<Duration>,
    /// From the order to the program's first instruction, where it tells.
    pub(crate) to_first_instruction: Vec<Duration>,
    /// Until everything is taken down, and the next is prepared.
    pub(crate) with_take_down: Vec<Duration>,
    pub(crate) slices: Vec<Slice>,
}

impl Way {
    fn new(name: &'static str, does: &'static str, version: &str) -> Self {
        Self {
            name,
            does,
            version: version.to_owned(),
            times: Vec::new(),
            to_exec: Vec::new(),
            to_first_instruction: Vec::new(),
            with_take_down: Vec::new(),
            slices: Vec::new(),
        }
    }

    /// Runs per second: the median of the slices.
    pub(crate) fn rate(&self) -> Option<f64> {
        middle(&self.slices, |slice| f64::from(slice.runs) / slice.time.as_secs_f64())
    }

    /// Microseconds of processor time for each run, without and with the kernel's threads: medians of the slices.
    pub(crate) fn spent_us(&self) -> Option<(f64, f64)> {
        let each =
            |us: u64, slice: &Slice| Duration::from_micros(us).as_secs_f64() * 1e6 / f64::from(slice.runs);
        let ours = middle(&self.slices, |slice| each(slice.spent.ours_us, slice))?;
        let all = middle(&self.slices, |slice| each(slice.spent.ours_us + slice.spent.kernel_us, slice))?;
        Some((ours, all))
    }
}

/// One program, run in all ways.
#[derive(Debug)]
pub(crate) struct Series {
    pub(crate) program: String,
    pub(crate) quiet: Duration,
    pub(crate) peers: Vec<Way>,
    pub(crate) engines: Vec<Way>,
}

impl Series {
    pub(crate) fn new(program: &str, quiet: Duration, peers: &[Peer], engines: &[Ours]) -> Self {
        Self {
            program: program.to_owned(),
            quiet,
            peers: peers.iter().map(|peer| Way::new(peer.name, peer.does, &peer.version)).collect(),
            engines: engines
                .iter()
                .map(|engine| Way::new(engine.switches.name, engine.switches.does, ""))
                .collect(),
        }
    }

    /// All ways; the bare spawn is the first.
    pub(crate) fn ways(&self) -> impl Iterator<Item = &Way> {
        self.peers.iter().chain(&self.engines)
    }

    /// The bare spawn's median.
    pub(crate) fn bare(&self) -> Duration {
        self.peers.first().map_or(Duration::ZERO, |bare| percentile(&bare.times, 50))
    }

    /// The bare spawn's rate.
    pub(crate) fn bare_rate(&self) -> Option<f64> {
        self.peers.first().and_then(Way::rate)
    }
}

/// The value that so many percent are not above.
pub(crate) fn percentile(values: &[Duration], percent: usize) -> Duration {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let last = sorted.len().saturating_sub(1);
    sorted.get(last * percent / 100).copied().unwrap_or_default()
}

fn middle<T>(values: &[T], of: impl Fn(&T) -> f64) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().map(of).collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}
