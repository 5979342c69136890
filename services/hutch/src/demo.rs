//! `hutch up --demo`: four jobs that end in four ways.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use hutch_proto::{JobId, JobResult, JobSpec};
use hutch_queue::Queue;
use serde_json::{Value, json};

use crate::term::{self, Waiting, safe_line};
use crate::verdict;

/// One job, and what it is there to show.
struct Show {
    about: &'static str,
    spec: Value,
}

/// Hands the jobs in, waits for their verdicts, and shows them.
pub(crate) async fn show(queue: &dyn Queue, address: SocketAddr) -> anyhow::Result<()> {
    let shows = shows();
    let mut ids = Vec::new();
    for show in &shows {
        let job = JobSpec::parse(show.spec.to_string().as_bytes()).context("a demo job is wrong")?;
        queue.submit(&job).await?;
        ids.push(job.id);
    }
    let mut rows = vec![["JOB", "VERDICT", "TIME", "CPU", "MEMORY", "WHAT IT SAID"].map(str::to_owned)];
    let mut waiting = Waiting::new();
    for (show, id) in shows.iter().zip(&ids) {
        let result = result(queue, *id, &mut waiting).await?;
        rows.push(row(show.about, &result));
    }
    waiting.clear();
    term::text(format!("\n{}\n", table(&rows)));
    let first = ids.first().map(ToString::to_string).unwrap_or_default();
    term::text(format!(
        "Look at them:      http://{address}/\n\
         One as JSON:       curl http://{address}/v1/jobs/{first}\n\
         Metrics:           curl http://{address}/metrics\n\
         One of your own:   hutch submit job.json --follow --url http://{address}\n\
         To end:            Ctrl-C\n"
    ));
    Ok(())
}

fn shows() -> Vec<Show> {
    vec![program(), two_steps(), eats_memory(), never_ends()]
}

fn on_host(path: &str) -> bool {
    Path::new(path).exists()
}

fn job(show: &str, more: Value) -> Value {
    let mut spec = json!({"layers": ["host"], "labels": {"demo": show}});
    if let (Some(fields), Value::Object(more)) = (spec.as_object_mut(), more) {
        fields.extend(more);
    }
    spec
}

fn program() -> Show {
    if on_host("/usr/bin/python3") {
        let text = "numbers = [int(n) for n in input().split()]\nprint('the sum is', sum(numbers))\n";
        return Show {
            about: "a Python program",
            spec: job(
                "program",
                json!({
                    "command": ["python3", "main.py"], "cwd": "/box", "stdin": {"text": "1 2 39\n"},
                    "files": [{"path": "/box/main.py", "text": text}],
                }),
            ),
        };
    }
    Show {
        about: "a shell program",
        spec: job(
            "program",
            json!({
                "command": ["sh", "main.sh"], "cwd": "/box", "stdin": {"text": "1 2 39\n"},
                "files": [{"path": "/box/main.sh", "text": "read a b c; echo the sum is $((a + b + c))\n"}],
            }),
        ),
    }
}

fn two_steps() -> Show {
    if on_host("/usr/bin/cc") {
        let text = "#include <stdio.h>\nint main(void) { puts(\"compiled, then run\"); return 0; }\n";
        return Show {
            about: "C, compiled and run",
            spec: job(
                "steps",
                json!({
                    "cwd": "/box", "files": [{"path": "/box/main.c", "text": text}],
                    "steps": [{"name": "compile", "command": ["cc", "-O2", "-o", "main", "main.c"]},
                              {"name": "run", "command": ["./main"]}],
                }),
            ),
        };
    }
    Show {
        about: "two steps (no cc here)",
        spec: job(
            "steps",
            json!({
                "cwd": "/box",
                "steps": [{"name": "write", "command": ["sh", "-c", "echo 'echo written, then run' > main.sh"]},
                          {"name": "run", "command": ["sh", "main.sh"]}],
            }),
        ),
    }
}

fn eats_memory() -> Show {
    Show {
        about: "eats memory",
        spec: job(
            "memory",
            json!({
                "command": ["tail", "/dev/zero"], "limits": {"memory_bytes": 64 << 20, "wall_time_ms": 20_000},
            }),
        ),
    }
}

fn never_ends() -> Show {
    Show {
        about: "never ends",
        spec: job(
            "time",
            json!({
                "command": ["sh", "-c", "echo going round; while :; do :; done"], "limits": {"wall_time_ms": 1500},
            }),
        ),
    }
}

async fn result(queue: &dyn Queue, id: JobId, waiting: &mut Waiting) -> anyhow::Result<JobResult> {
    loop {
        let view = queue.get(id).await?.context("a demo job is gone")?;
        if let Some(result) = view.result {
            return Ok(result);
        }
        waiting.show("waiting for the demo's jobs");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn row(about: &str, result: &JobResult) -> [String; 6] {
    let usage = &result.usage;
    let said = String::from_utf8_lossy(&result.stdout.data);
    let said =
        said.lines().next().map(safe_line).filter(|line| !line.is_empty()).unwrap_or_else(|| "-".to_owned());
    let verdict = match (verdict::is_success(result), &result.limit) {
        (false, Some(limit)) => {
            format!("{}, at {}", verdict::short(result), limit_value(&limit.name, limit.allowed))
        }
        _ => verdict::short(result),
    };
    [
        about.to_owned(),
        verdict,
        verdict::time(usage.wall_time_ms),
        verdict::time(usage.cpu_user_ms + usage.cpu_system_ms),
        verdict::size(usage.memory_peak_bytes),
        if result.message.is_empty() || result.limit.is_some() { said } else { safe_line(&result.message) },
    ]
}

fn limit_value(name: &str, value: u64) -> String {
    match name {
        name if name.ends_with("_bytes") => verdict::size(value),
        name if name.ends_with("_ms") => verdict::time(value),
        _ => value.to_string(),
    }
}

/// Rows with columns that stand under each other.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: Vec<usize> =
        (0..N).map(|n| rows.iter().map(|row| row[n].chars().count()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_demo_job_is_valid() {
        for show in shows() {
            JobSpec::parse(show.spec.to_string().as_bytes()).expect(show.about);
        }
    }

    #[test]
    fn columns_stand_under_each_other() {
        let rows = [["a", "bb"], ["ccc", "d"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "a    bb\nccc  d\n");
    }
}
