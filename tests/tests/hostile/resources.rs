//! What eats memory, processes, disk and time of others, and what will not end.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hutch_sandbox::Defence;
use serde_json::{Value, json};

use crate::attack::{Attack, Outcome, skipped};
use crate::site::{job, text};

fn shell(script: &str, more: &Value) -> Value {
    job(&["sh", "-c", script], more)
}

fn python(script: &str, more: &Value) -> Value {
    job(&["python3", "-c", script], more)
}

/// Held if the job ended for one of these reasons.
fn ended_for(result: &Value, reasons: &[&str]) -> Outcome {
    let reason = result["reason"].as_str().unwrap_or("none");
    Outcome::held_if(reasons.contains(&reason), format!("{reason}: {}", result["message"]))
}

/// The first of several that got through, or the last.
fn all(outcomes: impl IntoIterator<Item = Outcome>) -> Outcome {
    let mut held = Outcome::Held(String::new());
    for outcome in outcomes {
        match outcome {
            through @ Outcome::Through(_) => return through,
            outcome => held = outcome,
        }
    }
    held
}

#[test]
fn a32_signals_to_processes_of_the_host() {
    struct Canary(std::process::Child);
    impl Drop for Canary {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let canary = || Canary(Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().expect("sleep"));
    Attack::new(
        "32: signals to processes of the host, and to everybody: kill(-1)",
        "PID namespace; the job's root is nobody on the host",
        move |site| {
            let mut canary = canary();
            let kill = format!("kill -KILL {}; exit 0", canary.0.id());
            let _ = site.job(&shell(&kill, &json!({"user": "root"})));
            std::thread::sleep(Duration::from_millis(50));
            Outcome::held_if(
                canary.0.try_wait().expect("canary").is_none(),
                "a process of the host was not reached",
            )
        },
    )
    .control(|| Ok("this test kills it".to_owned()))
    .bites_without(&[Defence::PidNamespace, Defence::UserNamespace, Defence::Capabilities])
    .run();
}

#[test]
fn a32_signals_to_everybody() {
    Attack::new("32: kill(-1) as root of the sandbox", "PID namespace", |site| {
        let result = site.job(&shell("kill -KILL -1; echo still here", &json!({"user": "root"})));
        Outcome::held_if(
            result["status"] == "succeeded" || result["status"] == "failed",
            "its own processes alone",
        )
    })
    .has_no_switch("without it every process of the host would be killed, the tests among them")
    .run();
}

#[test]
fn a33_fork_bombs() {
    Attack::new("33: a fork bomb", "pids.max: fork(2) answers EAGAIN, and the refusals are counted", |site| {
        let limits = json!({"limits": {"pids": 32, "wall_time_ms": 3000}});
        let result = site.job(&python(
            "import os,time\nfor i in range(200):\n  try:\n    if os.fork() == 0:\n      time.sleep(1); os._exit(0)\n  except OSError: pass",
            &limits,
        ));
        let (peak, denied) = (result["usage"]["pids_peak"].as_u64(), result["usage"]["pids_denied"].as_u64());
        let bounded = Outcome::held_if(peak <= Some(32) && denied > Some(0), format!("{peak:?} at most, {denied:?} refused"));
        if !site.is_the_product() {
            return bounded;
        }
        let bomb = shell("b() { b | b & }; b; sleep 1", &json!({"limits": {"pids": 64, "wall_time_ms": 1500}}));
        all([bounded, Outcome::held_if(site.job(&bomb)["usage"]["pids_peak"].as_u64() <= Some(64), "a bomb of 64")])
    })
    .control(|| Ok("every process may fork".to_owned()))
    .bites_without(&[Defence::ProcessLimit])
    .run();
}

/// Children that leave their session and fork on, while they are being killed.
const BREEDING: &str =
    "import os\nwhile True:\n  try:\n    if os.fork() == 0: os.setsid()\n  except OSError: pass";

#[test]
fn a34_trees_that_fork_while_they_are_killed() {
    let rounds = if std::env::var_os("HUTCH_LONG_TESTS").is_some() { 1_000 } else { 40 };
    Attack::new(
        "34: fork and setsid while being killed; zombies",
        "init's end takes its namespace along; cgroup.kill",
        move |site| {
            let limits = json!({"limits": {"wall_time_ms": 150, "pids": 64}});
            let begun = Instant::now();
            for round in 0..rounds {
                let result = site.job(&python(BREEDING, &limits));
                if result["reason"] != "wall_time" {
                    return Outcome::Through(format!("round {round}: {result}"));
                }
                let teardown = result["timeline"]["teardown_us"].as_u64().unwrap_or(u64::MAX);
                if teardown > 2_000_000 {
                    return Outcome::Through(format!("round {round}: dead after {teardown} us"));
                }
            }
            Outcome::Held(format!(
                "{rounds} of {rounds} dead within 2 s; all in {} s",
                begun.elapsed().as_secs()
            ))
        },
    )
    .control(|| Ok("outside they go on for ever".to_owned()))
    .has_no_switch("a PID namespace without its end would be another kernel")
    .run();
}

#[test]
fn a35_pids_that_are_used_again() {
    skipped(
        "35: a pid that is used again for another process",
        "pidfd_open(2): nothing is ever signalled by number from outside of its namespace",
        "a pid cannot be made to come again in a reasonable time: pid_max is 4 million",
    );
}

#[test]
fn a36_memory_of_its_own() {
    Attack::new("36: anonymous memory, a deep stack, locked memory", "memory.max; the whole tree is killed", |site| {
        let limits = json!({"limits": {"memory_bytes": 48 << 20, "stack_bytes": 1 << 30}});
        let stack = "import threading,sys\nthreading.stack_size(256<<20)\n\
                     def f():\n  import ctypes\n  m=ctypes.CDLL(None).mmap\n  b=bytearray(200<<20)\nt=threading.Thread(target=f);t.start();t.join()";
        let tree = "import os,time\nif os.fork()==0:\n  b=bytearray(200<<20)\n  time.sleep(5)\nelse:\n  os.wait(); time.sleep(5)";
        all(["b = bytearray(200 << 20)", stack, tree]
            .map(|script| ended_for(&site.job(&python(script, &limits)), &["memory"])))
    })
    .control(|| Ok("outside 200 MiB are there".to_owned()))
    .bites_without(&[Defence::MemoryLimit])
    .run();
}

#[test]
fn a37_memory_in_files() {
    Attack::new(
        "37: memory by tmpfs, /dev/shm, memfd, the upper directory",
        "all of it is charged to the job's group",
        |site| {
            let limits = json!({"limits": {"memory_bytes": 48 << 20}, "user": "root"});
            let memfd = "import os\nf=os.memfd_create('x')\nfor i in range(100): os.write(f, b'x'*(1<<20))";
            let write = |path: &str| {
                format!("f=open('{path}','wb')\nfor i in range(100): f.write(b'x'*(1<<20)); f.flush()")
            };
            all([memfd.to_owned(), write("/dev/shm/x"), write("/tmp/x"), write("/usr/x")]
                .map(|script| ended_for(&site.job(&python(&script, &limits)), &["memory"])))
        },
    )
    .control(|| Ok("outside a file takes what there is".to_owned()))
    .bites_without(&[Defence::MemoryLimit])
    .run();
}

#[test]
fn a38_swap_and_huge_pages() {
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    let huge = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap_or_default();
    if swaps.lines().count() <= 1 && matches!(huge.trim(), "" | "0") {
        return skipped(
            "38: swap, huge pages",
            "memory.swap.max 0",
            "this host has neither swap nor huge pages",
        );
    }
    Attack::new("38: swap", "memory.swap.max, memory.memsw", |site| {
        let limits = json!({"limits": {"memory_bytes": 48 << 20}});
        ended_for(&site.job(&python("b = bytearray(200 << 20)", &limits)), &["memory"])
    })
    .bites_without(&[Defence::MemoryLimit])
    .run();
}

#[test]
fn a39_memory_of_the_kernel() {
    Attack::new("39: memory of the kernel: pipes, sockets, terminals", "kernel memory is charged", |site| {
        let limits = json!({"limits": {"memory_bytes": 24 << 20, "open_files": 1024}});
        let pipes = "import os,fcntl\nall=[]\nfor i in range(450):\n  r,w=os.pipe(); os.set_blocking(w,False); all.append((r,w))\n  \
                     try:\n    os.write(w,b'x'*65536)\n  except BlockingIOError: pass\nprint('all')";
        let sockets = "import socket\nall=[]\nfor i in range(300):\n  a,b=socket.socketpair(); a.setblocking(False); all.append((a,b))\n  \
                       try:\n    while True: a.send(b'x'*65536)\n  except BlockingIOError: pass\nprint('all')";
        all([pipes, sockets].map(|script| ended_for(&site.job(&python(script, &limits)), &["memory"])))
    })
    .control(|| Ok("outside they are filled".to_owned()))
    .bites_without(&[Defence::MemoryLimit])
    .run();
}

#[test]
fn a40_disks_that_are_filled() {
    Attack::new("40: fill the disk, use up its inodes", "a file system of the job's own size", |site| {
        let limits = json!({"limits": {"disk_bytes": 8 << 20, "disk_inodes": 200}, "user": "root"});
        let bytes = site.job(&shell("head -c 40000000 /dev/zero > /fill", &limits));
        let inodes =
            site.job(&shell("i=0; while [ $i -lt 400 ]; do : > /f$i || exit 1; i=$((i+1)); done", &limits));
        all([ended_for(&bytes, &["disk"]), ended_for(&inodes, &["disk"])])
    })
    .control(|| Ok("outside they fill what there is".to_owned()))
    .bites_without(&[Defence::SizedScratch])
    .run();
}

/// A job that has a directory of the host's disk.
fn on_disk(script: &str, limits: &Value) -> Value {
    shell(script, &json!({"limits": limits, "volumes": [{"volume": "storm", "target": "/v"}]}))
}

/// Writes outside what a job is to be held back from; an error where that is no disk.
fn write_outside(kib: u64) -> Result<String, String> {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let begun = Instant::now();
    let output = format!("of={}", dir.path().join("x").display());
    let count = format!("count={}", kib / 64);
    let done = Command::new("dd").args(["if=/dev/zero", "bs=64k", "oflag=direct", &count, &output]).output();
    let done = done.map_err(|e| e.to_string())?;
    let device = std::os::unix::fs::MetadataExt::dev(&dir.path().metadata().map_err(|e| e.to_string())?);
    if !done.status.success() || nix::sys::stat::major(device) == 0 {
        return Err("temporary files are not on a disk".to_owned());
    }
    Ok(format!("outside {kib} KiB are written in {:?}", begun.elapsed()))
}

#[test]
fn a49_storms_of_writes() {
    Attack::new("49: storms of fsync and of writes", "io.max, blkio.throttle", |site| {
        let limits = json!({"io_write_bytes_per_s": 512 << 10, "wall_time_ms": 120_000});
        let storm = "i=0; while [ $i -lt 64 ]; do dd if=/dev/zero of=/v/x bs=64k count=1 conv=fsync 2> /dev/null; i=$((i+1)); done";
        let result = site.job(&on_disk(storm, &limits));
        let took = result["usage"]["wall_time_ms"].as_u64().unwrap_or(0);
        // 4 MiB are 8 seconds' worth.
        Outcome::held_if(result["status"] == "succeeded" && took >= 6000, format!("4 MiB in {took} ms"))
    })
    .control(|| write_outside(4096))
    .bites_without(&[Defence::IoRates])
    .run();
}

#[test]
fn a52_writes_that_outlive_their_job() {
    Attack::new(
        "52: be killed while a write is held back",
        "rates are lifted when a job is killed",
        |site| {
            let limits = json!({"io_write_bytes_per_s": 64 << 10, "wall_time_ms": 500});
            let write = "dd if=/dev/zero of=/v/x bs=2M count=1 oflag=direct";
            let result = site.job(&on_disk(write, &limits));
            let took = result["usage"]["wall_time_ms"].as_u64().unwrap_or(u64::MAX);
            // 2 MiB are 32 seconds' worth.
            let held = result["reason"] == "wall_time" && took < 20_000;
            Outcome::held_if(held, format!("{} after {took} ms", result["reason"]))
        },
    )
    .control(|| write_outside(2048))
    .bites_without(&[Defence::LiftedRates])
    .run();
}

#[test]
fn a50_core_dumps() {
    Attack::new(
        "50: a core dump to the host's handler",
        "RLIMIT_CORE 0, and no dump of what holds privileges",
        |site| {
            let result = site.job(&shell(
                "ulimit -c unlimited 2>/dev/null; ulimit -c; kill -SEGV $$",
                &json!({"user": "root", "cwd": "/box", "outputs": {"paths": ["/**"]}}),
            ));
            let files = result["outputs"]["files"].to_string();
            Outcome::held_if(
                text(&result["stdout"]) == "0\n" && !files.contains("core") && result["signal"] == "SIGSEGV",
                format!("{} {files}", result["stdout"]),
            )
        },
    )
    .has_no_switch("whether a kernel dumps is its core_pattern's to say, which no test may change")
    .run();
}

#[test]
fn a51_processor_time_of_others() {
    Attack::new(
        "51: burn the processor, real-time scheduling, nice",
        "cpu.max; RLIMIT_RTPRIO and NICE 0",
        |site| {
            let burn = python(
                "import os,time\nfor i in range(3): os.fork()\nt=time.time()+1.5\nwhile time.time()<t: pass",
                &json!({"limits": {"cpu_millis": 200, "pids": 32}}),
            );
            let usage = site.job(&burn)["usage"].clone();
            let number = |name: &str| usage[name].as_u64().unwrap_or(0);
            let (used, wall) = (number("cpu_user_ms") + number("cpu_system_ms"), number("wall_time_ms"));
            // A quota counts in periods of 100 ms: the last may be used whole.
            let fair = wall * 200 / 1000 * 105 / 100 + 40;
            let priority = site.shell(
                "root",
                "chrt -f 1 true 2>/dev/null && echo fifo; nice -n -5 true 2>&1 | grep -v ermission; true",
            );
            all([
                Outcome::held_if(used <= fair, format!("{used} ms used in {wall} ms, {fair} allowed")),
                Outcome::held_if(priority.is_empty(), priority),
            ])
        },
    )
    .control(|| Ok("outside it uses all that there is".to_owned()))
    .bites_without(&[Defence::ProcessorLimit])
    .run();
}

#[test]
fn a52_programs_that_will_not_end() {
    Attack::new(
        "52: ignore SIGTERM, stop itself, sleep for ever",
        "a monotonic clock; SIGKILL to pid 1",
        |site| {
            all([
                "trap '' TERM; sleep 100; sleep 100",
                "kill -STOP $$",
                "sleep 1000",
                "trap '' TERM HUP INT; while :; do :; done",
            ]
            .map(|script| {
                let limits = json!({"limits": {"wall_time_ms": 300, "kill_grace_ms": 200}});
                let result = site.job(&shell(script, &limits));
                let ran = result["timeline"]["run_us"].as_u64().unwrap_or(u64::MAX);
                match ended_for(&result, &["wall_time"]) {
                    Outcome::Held(seen) => Outcome::held_if(ran < 5_000_000, format!("{seen}; {ran} us")),
                    through => through,
                }
            }))
        },
    )
    .control(|| Ok("outside they sleep on".to_owned()))
    .has_no_switch("a deadline that is not kept would be no test that ends")
    .run();
}
