//! What is decided before anything is made: `cargo bench --package hutch-bench`. These are the parts of a job's way that
//! are computation alone; all else is the kernel's.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use hutch_proto::JobSpec;
use hutch_sandbox::{EngineConfig, measured, seccomp};

const USUAL: &[u8] = br#"{"layers": ["host"], "command": ["python3", "main.py"], "cwd": "/box",
    "stdin": {"text": "1 2"}, "files": [{"path": "/box/main.py", "text": "print(3)"}],
    "limits": {"wall_time_ms": 10000, "cpu_time_ms": 5000, "memory_bytes": 268435456}}"#;

fn decisions(criterion: &mut Criterion) {
    let mut config = EngineConfig::new("/data".into());
    config.allow_host_layer = true;
    let spec = JobSpec::parse(USUAL);
    criterion.bench_function("parse a spec", |bench| bench.iter(|| JobSpec::parse(black_box(USUAL))));
    if let Ok(spec) = spec {
        criterion.bench_function("plan a job", |bench| {
            bench.iter(|| measured::plan(black_box(&spec), black_box(&config)));
        });
    }
    criterion.bench_function("compile the system call policies", |bench| bench.iter(seccomp::filters));
}

criterion_group!(benches, decisions);
criterion_main!(benches);
