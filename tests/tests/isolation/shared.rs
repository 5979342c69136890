//! What all sandboxes have of one host, and none may take from the others.

use hutch_proto::Reason;
use serde_json::json;

use crate::{can_run, home, job, python};

/// Python that asks for something until it is refused, and prints how often it was given.
fn until_refused(ask: &str) -> String {
    format!(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nn, kept = 0, []\n\
         try:\n  while n < 4000:\n    got = {ask}\n    if type(got) is int and got < 0: break\n    kept.append(got); n += 1\n\
         except OSError: pass\nprint(n)"
    )
}

#[test]
fn a_job_that_takes_every_watch_leaves_those_of_the_host() {
    if !can_run("inotify") {
        return;
    }
    let host = || {
        let script = until_refused("libc.inotify_init()");
        let python = std::process::Command::new("python3").args(["-c", &script]).output().unwrap();
        String::from_utf8_lossy(&python.stdout).trim().parse::<u32>().unwrap()
    };
    let before = host();
    assert!(before > 10, "the host has {before}");
    // It holds them until the host has counted its own.
    let script =
        until_refused("libc.inotify_init()") + "\nimport sys, time\nsys.stdout.flush()\ntime.sleep(3)";
    let running = std::thread::spawn(move || python(&script));
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let meanwhile = host();
    let taken: u32 = running.join().unwrap().trim().parse().unwrap();
    assert!(taken > 10, "the job took {taken}");
    assert!(meanwhile + 10 >= before, "the host had {before}, and {meanwhile} while a job held {taken}");
}

#[test]
fn the_host_s_pool_of_asynchronous_reads_is_not_there() {
    if !can_run("io_setup") {
        return;
    }
    let ask = "libc.syscall(206, 64, ctypes.byref(ctypes.c_ulong(0)))";
    if cfg!(target_arch = "x86_64") {
        assert_eq!(python(&until_refused(ask)), "0\n");
    }
}

#[test]
fn a_job_has_some_terminals_and_no_more() {
    if !can_run("terminals") {
        return;
    }
    let count: u32 = python(&until_refused("os.open('/dev/ptmx', os.O_RDWR)")).trim().parse().unwrap();
    assert!((10..=64).contains(&count), "{count} terminals");
}

#[test]
fn what_sockets_hold_is_within_the_job_s_memory() {
    if !can_run("memory of sockets") {
        return;
    }
    // Pairs that nobody reads, filled until they take no more.
    let script = "import socket\nserver = socket.create_server(('127.0.0.1', 0))\nkept, held = [], 0\n\
                  for n in range(100):\n  c = socket.create_connection(server.getsockname()); s = server.accept()[0]\n\
                  \x20 c.setblocking(False); kept += [c, s]\n\
                  \x20 try:\n    while True: held += c.send(bytes(1 << 16))\n\
                  \x20 except BlockingIOError: pass\nprint(held >> 20)";
    let limits = json!({"memory_bytes": 32 << 20, "wall_time_ms": 30_000});
    let spec = job(&["python3", "-c", script], &json!({"limits": limits}));
    let result = home().run(&spec).unwrap();
    let held: u64 = String::from_utf8_lossy(&result.stdout.data).trim().parse().unwrap_or(0);
    assert!(held < 64, "{held} MiB held by sockets: {result:?}");
    let ends = [None, Some(Reason::Memory), Some(Reason::WallTime), Some(Reason::NonzeroExit)];
    assert!(ends.contains(&result.reason), "{result:?}");
}

#[test]
fn init_is_a_stranger_to_the_job_s_root() {
    if !can_run("signals to init") {
        return;
    }
    let script = "import os, resource, signal\n\
                  for act in (lambda: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)), lambda: os.kill(1, signal.SIGTERM), lambda: os.setpriority(os.PRIO_PROCESS, 1, 5)):\n\
                  \x20 try: act(); print('done')\n\
                  \x20 except OSError as e: print(e.errno)";
    let spec = job(&["python3", "-c", script], &json!({"user": "root"}));
    assert_eq!(crate::output(&spec), "1\n1\n1\n");
}

#[test]
fn no_two_jobs_share_what_they_read_from() {
    if !can_run("stdin") {
        return;
    }
    let script = "import fcntl, os\nprint(oct(fcntl.fcntl(0, fcntl.F_GETFL)))\n\
                  fcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)";
    assert_eq!(python(script), python(script));
}
