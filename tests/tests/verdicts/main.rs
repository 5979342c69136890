//! A table of small programs and the verdict that each of them must get.
//!
//! Every row goes through the real binary, `hutch run --json`, on a real kernel; a few run at a time. All rows that
//! fail are told together, each with its whole result. `HUTCH_ROWS=word` runs the rows whose names have the word.
//! Bounds are generous upwards, since machines are busy, and strict on the verdict.

mod bounds;
mod commands;
mod ends;
mod input;
mod io;
mod layers;
mod memory;
mod output;
mod outside;
mod row;
mod scratch;
mod steps;
mod time;
mod users;
mod volumes;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use hutch_tests::hutch::{Home, can_run};

use row::Row;

/// How many rows run at one time.
const AT_ONE_TIME: usize = 3;

#[test]
fn every_program_gets_its_verdict() {
    if !can_run("the table of verdicts") {
        return;
    }
    let home = Home::new();
    let mut rows = Vec::new();
    for part in [
        ends::rows,
        output::rows,
        memory::rows,
        time::rows,
        input::rows,
        bounds::rows,
        commands::rows,
        users::rows,
        steps::rows,
        layers::rows,
        volumes::rows,
        scratch::rows,
        io::rows,
    ] {
        rows.extend(part());
    }
    if let Ok(word) = std::env::var("HUTCH_ROWS") {
        rows.retain(|row| row.name.contains(&word));
    }
    let (next, failed, skipped) = (AtomicUsize::new(0), Mutex::new(Vec::new()), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONE_TIME {
            scope.spawn(|| {
                while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let begun = Instant::now();
                    match run(&home, row) {
                        Ok(true) => {}
                        Ok(false) => drop(skipped.fetch_add(1, Ordering::Relaxed)),
                        Err(report) => failed.lock().unwrap().push(report),
                    }
                    if begun.elapsed().as_secs() >= 10 {
                        eprintln!("row `{}` took {:?}", row.name, begun.elapsed());
                    }
                }
            });
        }
    });
    let (failed, skipped) = (failed.into_inner().unwrap(), skipped.into_inner());
    eprintln!("{} rows, {skipped} skipped, {} failed", rows.len(), failed.len());
    assert!(failed.is_empty(), "{} of {} rows failed:\n\n{}", failed.len(), rows.len(), failed.join("\n"));
}

/// Runs a row; false if it was skipped.
fn run(home: &Home, row: &Row) -> Result<bool, String> {
    if row.owns_host_files && !hutch_tests::has_idmapped_mounts(Path::new("/usr")) {
        hutch_tests::skip(&row.name, "the file system of /usr has no idmapped mounts");
        return Ok(false);
    }
    for (number, job) in row.jobs.iter().enumerate() {
        if job.spec["layers"].as_array().is_some_and(|layers| layers.iter().any(|layer| layer.is_null())) {
            hutch_tests::skip(&row.name, "it needs a program in C");
            return Ok(false);
        }
        let place = format!("row `{}`, job {}", row.name, number + 1);
        let mut command = home.command();
        command.envs(row.env.iter().copied());
        let result = home
            .run_with(command, &job.spec)
            .map_err(|e| format!("{place}:\n  {e}\n  spec: {}\n", short(&job.spec)))?;
        let faults = job.faults(&result);
        if !faults.is_empty() {
            let result = serde_json::to_value(&result).map_err(|e| e.to_string())?;
            let (spec, result) = (short(&job.spec), short(&result));
            return Err(format!("{place}:\n  {}\n  spec: {spec}\n  result: {result}\n", faults.join("\n  ")));
        }
    }
    let faults: Vec<String> = row.on_host.iter().filter_map(|check| check().err()).collect();
    if faults.is_empty() {
        Ok(true)
    } else {
        Err(format!("row `{}`:\n  {}\n", row.name, faults.join("\n  ")))
    }
}

/// JSON with its long texts cut.
fn short(value: &serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::String(text) if text.chars().count() > 2000 => {
            let start: String = text.chars().take(2000).collect();
            format!("{start}… ({} bytes)", text.len()).into()
        }
        Value::Array(items) => items.iter().map(short).collect(),
        Value::Object(fields) => fields.iter().map(|(name, value)| (name.clone(), short(value))).collect(),
        other => other.clone(),
    }
}

/// A fresh directory of the host for one row, gone with this program.
fn fixture(name: &str) -> PathBuf {
    static PARENT: std::sync::OnceLock<tempfile::TempDir> = std::sync::OnceLock::new();
    let parent = PARENT.get_or_init(|| tempfile::Builder::new().prefix("hutch-fixture-").tempdir().unwrap());
    let dir = parent.path().join(name);
    std::fs::create_dir(&dir).unwrap();
    dir
}
