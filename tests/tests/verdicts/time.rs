//! Processor time, time on the clock, idle time, and the grace at the end.

use hutch_proto::Reason;
use serde_json::json;

use crate::row::{Row, Spec, holds, probe, py, row, sh, sh_probe, steps};

pub(crate) fn rows() -> Vec<Row> {
    [processor(), clock(), idle(), grace()].into_iter().flatten().collect()
}

/// A limit on processor time ends the job.
fn burns(name: &str, ms: u64, spec: Spec) -> Row {
    row(name, spec.limits(json!({"cpu_time_ms": ms})))
        .hits(Reason::CpuTime, "cpu_time_ms", ms, ms..=ms + 1500)
        .cpu_ms(ms..=ms + 1500)
        .says("cpu_time")
}

fn processor() -> Vec<Row> {
    vec![
        burns("processor time in the program", 300, probe("spin 60000")),
        burns("processor time in python", 400, py("while True: pass")),
        burns(
            "processor time in the kernel",
            300,
            sh("exec dd if=/dev/urandom of=/dev/null bs=64k 2> /dev/null"),
        ),
        burns("processor time in a child", 300, probe("spin-below 1 60000")),
        burns("processor time in a grandchild", 300, probe("spin-below 3 60000")),
        burns("processor time in short children, one after another", 500, probe("spin-in-turn 600 50")),
        burns(
            "processor time on two processors",
            800,
            sh_probe("$P spin 60000 & $P spin 60000 & wait").limits(json!({"cpu_millis": 2000})),
        ),
        burns(
            "processor time of a daemon, while the program waits",
            300,
            sh_probe("setsid $P spin 60000 & sleep 30"),
        ),
        row("processor time within the limit", probe("spin 200").limits(json!({"cpu_time_ms": 5000})))
            .cpu_ms(190..=1500)
            .usage("wall_time_ms", 190..=20_000),
        row("processor time of the children counts", probe("spin-in-turn 4 100")).cpu_ms(390..=2500),
        row("a sleeper uses no processor", sh("sleep 1").limits(json!({"cpu_time_ms": 500})))
            .usage("wall_time_ms", 990..=20_000)
            .cpu_ms(0..=400),
        row("a fifth of a processor", probe("spin 300").limits(json!({"cpu_millis": 200})))
            .usage("wall_time_ms", 1000..=30_000)
            // On a host that is busy enough a fifth is more than it would get: then it is not held back at all.
            .usage("cpu_throttled_ms", 0..=30_000),
    ]
}

fn clock() -> Vec<Row> {
    let late = |name: &str, spec: Spec| {
        row(name, spec.limits(json!({"wall_time_ms": 700})))
            .hits(Reason::WallTime, "wall_time_ms", 700, 700..=12_000)
            .usage("wall_time_ms", 700..=12_000)
            .says("wall_time")
    };
    vec![
        late("a sleep past the clock", sh("echo begun; sleep 60; echo survived")).stdout("begun\n"),
        late("a child's sleep past the clock", sh("sleep 60 & sleep 50 & wait")),
        late("a sleeper that ignores SIGTERM", sh("trap '' TERM HUP INT; sleep 60")).cpu_ms(0..=600),
        late("a burner past the clock", probe("spin 60000")).cpu_ms(100..=12_000),
        late("children all the time, past the clock", sh("while :; do true; sh -c :; done")),
        late("a reader of a terminal that is not there", sh("sleep 60 < /dev/null")),
        row("a short sleep", sh("sleep 0.3").limits(json!({"wall_time_ms": 20_000})))
            .usage("wall_time_ms", 290..=15_000),
        row(
            "each step has its own clock",
            steps(json!([
                {"name": "a", "command": ["sleep", "0.7"]}, {"name": "b", "command": ["sleep", "0.7"]},
                {"name": "c", "command": ["sleep", "60"], "limits": {"wall_time_ms": 500}},
            ]))
            .limits(json!({"wall_time_ms": 15_000})),
        )
        .hits(Reason::WallTime, "wall_time_ms", 500, 500..=12_000)
        .usage("wall_time_ms", 1890..=30_000),
    ]
}

fn idle() -> Vec<Row> {
    vec![
        row("a quiet program is idle", sh("echo begun; exec sleep 60").limits(json!({"idle_time_ms": 600})))
            .hits(Reason::IdleTime, "idle_time_ms", 600, 600..=12_000)
            .usage("wall_time_ms", 600..=12_000)
            .stdout("begun\n")
            .says("idle_time"),
        row(
            "a tree that only waits is idle",
            sh("sleep 60 & sleep 60 & wait").limits(json!({"idle_time_ms": 600})),
        )
        .hits(Reason::IdleTime, "idle_time_ms", 600, 600..=12_000),
        row(
            "a program that is idle in the end",
            sh("for i in 1 2 3 4; do sleep 0.3; echo $i; done; exec sleep 60")
                .limits(json!({"idle_time_ms": 2000})),
        )
        .hits(Reason::IdleTime, "idle_time_ms", 2000, 2000..=15_000)
        .usage("wall_time_ms", 3190..=30_000)
        .stdout("1\n2\n3\n4\n"),
        row(
            "a program that prints is not idle",
            sh("for i in 1 2 3 4 5 6 7 8; do sleep 0.5; echo $i; done").limits(json!({"idle_time_ms": 2500})),
        )
        .usage("wall_time_ms", 3900..=60_000),
        row(
            "a program that computes silently is not idle",
            probe("spin 4000").limits(json!({"idle_time_ms": 2500})),
        )
        .cpu_ms(3900..=60_000),
        row(
            "a child that computes silently is not idle",
            sh_probe("$P spin 4000 & wait; sleep 0.5").limits(json!({"idle_time_ms": 2500})),
        )
        .cpu_ms(3900..=60_000),
        row(
            "more than is kept is output too",
            sh("for i in 1 2 3 4 5 6 7 8; do sleep 0.5; echo $i; done")
                .limits(json!({"idle_time_ms": 2500, "stdout_bytes": 1})),
        )
        .stdout("1"),
    ]
}

fn grace() -> Vec<Row> {
    let graceful = |grace: u64| json!({"wall_time_ms": 800, "kill_grace_ms": grace});
    let politely = "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.1; done";
    let never = "trap 'echo no' TERM; echo ready; while :; do sleep 0.1; done";
    vec![
        row("a program that ends within the grace", sh(politely).limits(graceful(20_000)))
            .hits(Reason::WallTime, "wall_time_ms", 800, 800..=15_000)
            .having_exited(0)
            .stdout("ready\nbye\n")
            .usage("wall_time_ms", 800..=15_000),
        row("a program that dies of SIGTERM within the grace", sh("exec sleep 60").limits(graceful(20_000)))
            .hits(Reason::WallTime, "wall_time_ms", 800, 800..=15_000)
            .having_died("SIGTERM"),
        row("a program that ignores SIGTERM", sh(never).limits(graceful(700)))
            .hits(Reason::WallTime, "wall_time_ms", 800, 1500..=20_000)
            .stdout("ready\nno\n")
            .usage("wall_time_ms", 1500..=20_000),
        row("no grace, no SIGTERM", sh(politely).limits(graceful(0)))
            .hits(Reason::WallTime, "wall_time_ms", 800, 800..=15_000)
            .stdout("ready\n"),
        row(
            "a child that outlives the program's grace",
            sh("(trap '' TERM; sleep 50) & trap 'exit 9' TERM; while :; do sleep 0.1; done")
                .limits(graceful(20_000)),
        )
        .hits(Reason::WallTime, "wall_time_ms", 800, 800..=15_000)
        .having_exited(9),
        row("a stopped program has no use for grace", probe("signal 19").limits(graceful(500))).hits(
            Reason::WallTime,
            "wall_time_ms",
            800,
            1300..=15_000,
        ),
        row(
            "grace after processor time",
            sh("trap 'echo bye; exit 0' TERM; while :; do :; done")
                .limits(json!({"cpu_time_ms": 300, "kill_grace_ms": 20_000})),
        )
        .hits(Reason::CpuTime, "cpu_time_ms", 300, 300..=15_000)
        .having_exited(0)
        .stdout("bye\n"),
        row(
            "a grace that is used to compute on",
            sh("trap '' TERM; while :; do :; done")
                .limits(json!({"cpu_time_ms": 1500}))
                .limits(graceful(60_000)),
        )
        .hits(Reason::WallTime, "wall_time_ms", 800, 800..=30_000)
        .cpu_ms(1400..=8000),
        row(
            "grace after idle time",
            sh("trap 'echo bye; exit 3' TERM; sleep 60 & wait")
                .limits(json!({"idle_time_ms": 500, "kill_grace_ms": 20_000})),
        )
        .hits(Reason::IdleTime, "idle_time_ms", 500, 500..=15_000)
        .having_exited(3)
        .check(|result| {
            holds(result.usage.wall_time_ms < 15_000, || "the whole grace was waited".to_owned())
        }),
    ]
}
