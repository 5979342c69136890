//! The figures as tables: on the terminal, and in docs/benchmarks.md between two marks, with a plot beside it.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::figures::{Series, Way, percentile};

const BEGIN: &str = "<!-- figures: written by `cargo xtask bench --document` -->";
const END: &str = "<!-- end of the figures -->";

/// The machine, in a line of Markdown for each thing that matters.
pub(crate) fn machine() -> anyhow::Result<String> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("read {path}"));
    let cpu = read("/proc/cpuinfo")?;
    let model =
        cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("", |it| it.1);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease")?;
    let memory = read("/proc/meminfo")?;
    let kib = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    let gib = kib.and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or_default() >> 20;
    let version = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() { 2 } else { 1 };
    let system = read("/etc/os-release")?;
    let system = system.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).unwrap_or_default();
    let load = read("/proc/loadavg")?;
    Ok(format!(
        "{processors} processors ({model}), {gib} GiB, Linux {}, {}, cgroup v{version}; load average at the start {}.\n",
        kernel.trim(),
        system.trim_matches('"'),
        load.split_whitespace().next().unwrap_or_default(),
    ))
}

/// All figures, on stdout.
pub(crate) fn print(all: &[Series]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for series in all {
        writeln!(out, "{}", table(series)?)?;
    }
    Ok(())
}

/// Writes the figures into a document, and the plot beside it.
pub(crate) fn write(path: &Path, machine: &str, all: &[Series]) -> anyhow::Result<()> {
    let document = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let Some((before, (_, after))) =
        document.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?)))
    else {
        bail!("{}: `{BEGIN}` and `{END}` are expected, around the place of the figures", path.display());
    };
    let plot = path.with_extension("svg");
    let arguments: Vec<_> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.contains('/') && argument != "--document")
        .collect();
    let mut text = format!("{BEGIN}\n\n`cargo xtask bench {}`: {machine}", arguments.join(" "));
    if let Some(series) = all.first() {
        let named = series.ways().filter(|way| !way.version.is_empty());
        let versions: Vec<_> = named.map(|way| way.version.as_str()).collect();
        writeln!(text, "Versions: {}.\n", versions.join(", "))?;
        fs::write(&plot, svg(series)?).with_context(|| format!("write {}", plot.display()))?;
        let name = plot.file_name().unwrap_or_default().to_string_lossy().into_owned();
        writeln!(text, "![Time to the answer beside a bare spawn]({name})\n")?;
        for way in series.ways() {
            writeln!(text, "- {}: {}", way.name, way.does)?;
        }
        text.push('\n');
    }
    for series in all {
        writeln!(text, "{}", table(series)?)?;
    }
    fs::write(path, format!("{before}{text}{END}{after}"))?;
    Ok(())
}

fn title(series: &Series) -> String {
    let quiet = if series.quiet.is_zero() {
        "back to back".to_owned()
    } else {
        format!("{} ms of quiet between", series.quiet.as_millis())
    };
    let rounds = series.peers.first().map_or(0, |bare| bare.times.len());
    format!("`{}`, {quiet}, {rounds} rounds", series.program)
}

/// One series as a table of Markdown.
fn table(series: &Series) -> anyhow::Result<String> {
    let mut text = format!("### {}\n\n", title(series));
    text.push_str("| | to the answer, p50 µs | p99 µs | p50 / bare p50 | p99 / bare p50 | to exec, p50 µs | to its first instruction / bare | with take-down, p50 µs | a second, 2 at a time | of the bare rate | CPU each, µs | with the kernel's threads |\n");
    text.push_str("|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    let bare = series.bare().as_secs_f64();
    for way in series.ways() {
        let (half, late) = (percentile(&way.times, 50), percentile(&way.times, 99));
        let micros = |values: &[Duration]| match values {
            [] => String::new(),
            some => percentile(some, 50).as_micros().to_string(),
        };
        let first = match &way.to_first_instruction[..] {
            [] => String::new(),
            some => format!("{:.2}", percentile(some, 50).as_secs_f64() / bare),
        };
        let rate = way.rate();
        let part = rate.zip(series.bare_rate()).map(|(rate, bare)| format!("{:.2}", rate / bare));
        let spent = way.spent_us();
        writeln!(
            text,
            "| {} | {} | {} | {:.2} | {:.2} | {} | {first} | {} | {} | {} | {} | {} |",
            way.name,
            half.as_micros(),
            late.as_micros(),
            half.as_secs_f64() / bare,
            late.as_secs_f64() / bare,
            micros(&way.to_exec),
            micros(&way.with_take_down),
            rate.map(|rate| format!("{rate:.0}")).unwrap_or_default(),
            part.unwrap_or_default(),
            spent.map(|(ours, _)| format!("{ours:.0}")).unwrap_or_default(),
            spent.map(|(_, all)| format!("{all:.0}")).unwrap_or_default(),
        )?;
    }
    Ok(text)
}

/// A bar for each way's median, on a logarithmic scale, with a line to its 99th percentile.
fn svg(series: &Series) -> anyhow::Result<String> {
    const LEFT: f64 = 190.0;
    const WIDTH: f64 = 520.0;
    const ROW: f64 = 26.0;
    let ways: Vec<&Way> = series.ways().collect();
    let bare = series.bare().as_secs_f64();
    let most = ways.iter().map(|way| percentile(&way.times, 99).as_secs_f64()).fold(bare, f64::max);
    let decades = (most / bare).log10().max(1.0).ceil();
    let place = |time: Duration| {
        LEFT + WIDTH * ((time.as_secs_f64() / bare).log10().max(0.0) + 0.1) / (decades + 0.1)
    };
    let mut text = String::new();
    let mut bottom = 40.0;
    for way in &ways {
        let (half, late) = (percentile(&way.times, 50), percentile(&way.times, 99));
        let (end, far, middle) = (place(half), place(late), bottom + ROW / 2.0);
        let fill = if way.name.starts_with("hutch") { "#1f6f54" } else { "#9aa5a0" };
        writeln!(
            text,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            middle + 4.0,
            way.name
        )?;
        writeln!(
            text,
            "<rect x=\"{LEFT}\" y=\"{:.0}\" width=\"{:.1}\" height=\"{:.0}\" fill=\"{fill}\"/>",
            bottom + 4.0,
            end - LEFT,
            ROW - 8.0
        )?;
        writeln!(
            text,
            "<path d=\"M{end:.1} {middle} H{far:.1} M{far:.1} {} v8\" stroke=\"#333\"/>",
            middle - 4.0
        )?;
        let times = format!("{:.2} ms, {:.1} times", half.as_secs_f64() * 1e3, half.as_secs_f64() / bare);
        writeln!(text, "<text x=\"{:.0}\" y=\"{:.0}\">{times}</text>", far + 8.0, middle + 4.0)?;
        bottom += ROW;
    }
    let (width, height) = (LEFT + WIDTH + 160.0, bottom + 14.0);
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n<text x=\"8\" y=\"22\" font-weight=\"bold\">\
         Time to the answer, median and 99th percentile, logarithmic: {}</text>\n{text}</svg>\n",
        title(series).replace('`', "")
    ))
}
