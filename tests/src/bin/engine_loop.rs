//! The engine without a queue, for tests that look at one process for long.
//!
//! - `engine_loop many DIR COUNT`: that many jobs of many kinds one after another; a line of JSON about this process
//!   and its launcher after 50 of them, and one at the end.
//! - `engine_loop sleep DIR COUNT`: that many jobs at one time, each of which sleeps; `ready` when all run, then what
//!   came of each.
//! - `engine_loop exec DIR ORDERS`: one job, and others in it while it runs; how each ended.
//! - `engine_loop acts DIR ACTS`: jobs one after another, and what is done to files between them; see `play`.
//! - `engine_loop once DIR SPEC [ALLOWED]`: one job, by the rules of a worker whose config allows nothing, or this
//!   one directory; the JobResult.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hutch_proto::{JobResult, JobSpec, Reason, Timestamp};
use hutch_sandbox::{
    Engine, EngineConfig, EngineHandle, ExecOrder, JobFacts, Launcher, Observer, Order, Stream, Stroke,
    Strokes, Unobserved, WindowSize,
};
use hutch_tests::processes::{Process, size};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let launcher = Launcher::fork()?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match words[..] {
        ["many", dir, count] => {
            let engine = Engine::new(launcher, open_config(dir, 1))?;
            runtime.block_on(many(&engine, Path::new(dir), count.parse()?))
        }
        ["sleep", dir, count] => {
            let slots = count.parse()?;
            let engine = Engine::new(launcher, open_config(dir, slots))?;
            runtime.block_on(sleep(engine, slots))
        }
        ["once", dir, spec, ref allowed @ ..] => {
            let mut config = EngineConfig::new(dir.into());
            config.allowed_host_paths = allowed.iter().map(PathBuf::from).collect();
            config.layer_dirs = config.allowed_host_paths.clone();
            let engine = Engine::new(launcher, config)?;
            let result = runtime.block_on(run(&engine, &serde_json::from_str(spec)?, 0, &Unobserved))?;
            say(&serde_json::to_value(result)?)
        }
        ["exec", dir, orders] => {
            let engine = Engine::new(launcher, open_config(dir, 1))?;
            runtime.block_on(exec(engine.into(), &serde_json::from_str(orders)?))
        }
        ["acts", dir, acts] => {
            let engine = Engine::new(launcher, open_config(dir, 1))?;
            runtime.block_on(play(&engine, &serde_json::from_str::<Vec<Value>>(acts)?))
        }
        _ => {
            Err("acts DIR ACTS, many DIR COUNT, sleep DIR COUNT, exec DIR ORDERS, or once DIR SPEC [ALLOWED]"
                .into())
        }
    }
}

/// Everything is allowed, as in `hutch run`.
fn open_config(dir: &str, slots: u32) -> EngineConfig {
    let mut config = EngineConfig::new(dir.into());
    config.slots = slots;
    config.allow_host_layer = true;
    config.layer_dirs = vec!["/".into()];
    config.allowed_host_paths = vec!["/".into()];
    config
}

fn say(value: &Value) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")?;
    Ok(out.flush()?)
}

/// Jobs in one slot, and what happens to files between them; what each job wrote, and how many of them had found their
/// sandbox built by then. `"idle": true` waits until nothing waits for the next job, a minute at most.
async fn play(engine: &Engine, acts: &[Value]) -> Result<(), Failure> {
    let own = Process::of(std::process::id()).ok_or("no such process")?;
    for act in acts {
        let text = |name: &str, at: usize| act[name][at].as_str().unwrap_or_default().to_owned();
        if !act["write"].is_null() {
            std::fs::write(text("write", 0), text("write", 1))?;
        } else if !act["rename"].is_null() {
            std::fs::rename(text("rename", 0), text("rename", 1))?;
        } else if !act["idle"].is_null() {
            let patience = Instant::now() + Duration::from_secs(60);
            while own.children().iter().any(|launcher| !launcher.children().is_empty()) {
                if Instant::now() > patience {
                    return Err("something waits still".into());
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        } else {
            let result = run(engine, &act["job"], 0, &Unobserved).await?;
            let stdout = String::from_utf8_lossy(&result.stdout.data).into_owned();
            say(&json!({"stdout": stdout, "message": result.message, "ahead": engine.used_ahead()}))?;
        }
    }
    Ok(())
}

/// Keeps what a program writes.
#[derive(Default)]
struct Kept([Mutex<Vec<u8>>; 2]);

impl Observer for Kept {
    fn output(&self, _: &str, stream: Stream, bytes: &[u8]) {
        let at = usize::from(stream == Stream::Stderr);
        self.0[at].lock().expect("lock").extend_from_slice(bytes);
    }
}

impl Kept {
    fn text(&self, at: usize) -> String {
        String::from_utf8_lossy(&self.0[at].lock().expect("lock")).into_owned()
    }
}

/// Runs `job`, and in it, when its output has begun, one after another of `execs`; then, unless it is to `end` by itself,
/// calls it off. Says how all of them ended.
async fn exec(engine: EngineHandle, orders: &Value) -> Result<(), Failure> {
    let job = JobSpec::parse(orders["job"].to_string().as_bytes())?;
    let (id, cancel) = (job.id, CancellationToken::new());
    let order = Order { job, slot: 0, cancel: cancel.clone(), strokes: None };
    let seen = Arc::new(Kept::default());
    let running = {
        let (engine, seen) = (engine.clone(), Arc::clone(&seen));
        tokio::spawn(async move {
            let facts = JobFacts {
                id,
                attempt: 1,
                worker: "engine-loop".to_owned(),
                submitted_at: Timestamp::now(),
                labels: BTreeMap::new(),
            };
            engine.run(order, &*seen).await.into_result(facts)
        })
    };
    while seen.text(0).is_empty() && !running.is_finished() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut ends = Vec::new();
    for wanted in orders["execs"].as_array().into_iter().flatten() {
        let (strokes, typed) = Strokes::channel();
        if let Some(text) = wanted["stdin"].as_str() {
            strokes.send(Stroke::Typed(text.as_bytes().to_vec())).await?;
        }
        if let Some([rows, columns]) = wanted["resize"].as_array().map(Vec::as_slice) {
            let of = |value: &Value| value.as_u64().and_then(|value| u16::try_from(value).ok()).unwrap_or(0);
            strokes.send(Stroke::Resized(WindowSize { rows: of(rows), columns: of(columns) })).await?;
        }
        drop(strokes);
        let order = ExecOrder {
            command: serde_json::from_value(wanted["command"].clone())?,
            env: serde_json::from_value(wanted["env"].clone()).unwrap_or_default(),
            cwd: wanted["cwd"].as_str().map(str::to_owned),
            terminal: wanted["tty"].as_bool().map(|_| WindowSize { rows: 24, columns: 80 }),
        };
        let (output, mut written) = mpsc::channel(16);
        let heard = Kept::default();
        let (end, ()) = tokio::join!(
            async {
                let output = output;
                engine.exec(id, &order, &typed, &output).await
            },
            async {
                while let Some((stream, bytes)) = written.recv().await {
                    heard.output("", stream, &bytes);
                }
            }
        );
        let end = match end {
            Ok(end) => json!(end.code()),
            Err(error) => json!(error.to_string()),
        };
        ends.push(json!({"end": end, "stdout": heard.text(0), "stderr": heard.text(1)}));
    }
    if orders["end"].as_bool() != Some(true) {
        cancel.cancel();
    }
    say(&json!({"execs": ends, "result": running.await?}))
}

async fn run(
    engine: &Engine,
    spec: &Value,
    slot: u32,
    observer: &dyn Observer,
) -> Result<JobResult, Failure> {
    let job = JobSpec::parse(spec.to_string().as_bytes())?;
    let facts = JobFacts {
        id: job.id,
        attempt: 1,
        worker: "engine-loop".to_owned(),
        submitted_at: Timestamp::now(),
        labels: job.labels.clone(),
    };
    let order = Order { job, slot, cancel: CancellationToken::new(), strokes: None };
    Ok(engine.run(order, observer).await.into_result(facts))
}

/// Jobs that leave nothing behind, each in its own way.
fn kinds() -> Vec<(Value, Option<Reason>)> {
    let sh = |script: &str| json!({"layers": ["host"], "command": ["sh", "-c", script]});
    let with = |mut spec: Value, name: &str, value: Value| {
        spec[name] = value;
        spec
    };
    let volume = json!([{"volume": "kept", "target": "/a/b/kept"}]);
    let large = json!({"memory_bytes": 16 << 20, "disk_bytes": 64 << 20});
    vec![
        (sh("exit 0"), None),
        (sh("exit 3"), Some(Reason::NonzeroExit)),
        (sh("kill -SEGV $$"), Some(Reason::Signal)),
        (json!({"layers": ["host"], "command": ["no-such-command"]}), Some(Reason::CommandNotFound)),
        (json!({"layers": ["host"], "command": ["true"], "user": "nobody-here"}), Some(Reason::SpecInvalid)),
        (json!({"layers": ["host", "dir:/no/such/layer"], "command": ["true"]}), Some(Reason::ImageError)),
        (with(sh("head -c 300000 /dev/zero"), "limits", json!({"stdout_bytes": 1000})), None),
        (
            with(sh("cat; echo x > /box/y"), "stdin", json!({"text": "x".repeat(100_000)})),
            Some(Reason::NonzeroExit),
        ),
        (with(sh("setsid sleep 100 & (sleep 100 &) & exit 0"), "limits", json!({"pids": 20})), None),
        (with(sh("exec sleep 100"), "limits", json!({"wall_time_ms": 60})), Some(Reason::WallTime)),
        (with(sh("head -c 40000000 /dev/zero > /tmp/x; sleep 60"), "limits", large), Some(Reason::Memory)),
        (with(sh("echo same > /a/b/kept/file"), "volumes", volume), None),
        (
            with(
                sh("mkdir ~/d; seq 100 > ~/d/x; rm -r /tmp/*; exit 0"),
                "outputs",
                json!({"paths": ["/home/**"]}),
            ),
            None,
        ),
        (
            with(
                sh("cat /box/1/2/3"),
                "files",
                json!([{"path": "/box/1/2/3", "text": "three", "mode": "0600"}]),
            ),
            None,
        ),
        (
            json!({"layers": ["host"], "steps": [
                {"name": "a", "command": ["sh", "-c", "echo 1 > ~/x"]},
                {"name": "b", "command": ["sh", "-c", "cat ~/x; exit 1"], "allow_failure": true},
                {"name": "c", "command": ["cat", "/home/job/x"]},
            ]}),
            None,
        ),
    ]
}

async fn many(engine: &Engine, dir: &Path, count: usize) -> Result<(), Failure> {
    let kinds = kinds();
    for number in 0..count {
        let (spec, wanted) = &kinds[number % kinds.len()];
        let result = run(engine, spec, 0, &Unobserved).await?;
        if result.reason != *wanted {
            return Err(
                format!("job {number}: {:?}, not {wanted:?}: {}", result.reason, result.message).into()
            );
        }
        if number == 49 {
            say(&figures(dir, number + 1).await?)?;
        }
    }
    say(&figures(dir, count).await?)
}

/// What this process and its launcher hold, once nothing is on its way any more.
async fn figures(dir: &Path, jobs: usize) -> Result<Value, Failure> {
    let own = Process::of(std::process::id()).ok_or("no such process")?;
    // The launcher lets go of what it sent a moment after it was received.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let patience = Instant::now() + Duration::from_secs(5);
    let mut launchers = own.children();
    // One init waits for the slot's next job.
    while launchers.iter().any(|one| one.children().len() > 1) && Instant::now() < patience {
        tokio::time::sleep(Duration::from_millis(20)).await;
        launchers = own.children();
    }
    let [launcher] = launchers.as_slice() else {
        return Err(format!("{launchers:?} is not one launcher").into());
    };
    let (files, bytes) = size(dir);
    Ok(json!({
        "jobs": jobs,
        "fds": own.open_fds(),
        "rss_kb": own.resident_kb(),
        "mounts": own.mounts(),
        "cgroups": own.cgroups(),
        "data_files": files,
        "data_bytes": bytes,
        "launcher_fds": launcher.open_fds(),
        "launcher_rss_kb": launcher.resident_kb(),
        "launcher_mounts": launcher.mounts(),
        "launcher_files": launcher.root_entries(),
        "launcher_children": launcher.children().len(),
    }))
}

/// Counts the jobs whose program has begun.
struct Begun(Arc<AtomicU32>);

impl Observer for Begun {
    fn output(&self, _step: &str, _stream: Stream, _bytes: &[u8]) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

async fn sleep(engine: Engine, slots: u32) -> Result<(), Failure> {
    let begun = Arc::new(AtomicU32::new(0));
    let mut jobs = tokio::task::JoinSet::new();
    for slot in 0..slots {
        let (engine, begun) = (engine.clone(), Begun(begun.clone()));
        jobs.spawn(async move {
            // It begins to sleep with children that would rather not die, and a volume.
            let spec = json!({
                "layers": ["host"],
                "command": ["sh", "-c", "trap '' TERM HUP INT; setsid sleep 1000 & sleep 1000 & echo ready; sleep 1000"],
                "volumes": [{"volume": "kept", "target": "/kept"}],
                "limits": {"wall_time_ms": 120_000},
            });
            run(&engine, &spec, slot, &begun).await.map_err(|e| e.to_string())
        });
    }
    while begun.load(Ordering::Relaxed) < slots {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    say(&"ready".into())?;
    while let Some(done) = jobs.join_next().await {
        let result = done??;
        say(&json!({"status": result.status, "reason": result.reason, "message": result.message}))?;
    }
    Ok(())
}
