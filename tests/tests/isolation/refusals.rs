//! Refused system calls: the profile `strict`, and what a job is told of them or killed for.

use hutch_proto::{JobResult, Reason, Status};
use serde_json::{Value, json};

use crate::{can_run, home, job, output};

const SOCKET_AND_EXEC: &str = "import os, socket, threading\n\
    def attempt(name, call):\n\
    \x20   try: call(); print(name, 'went through')\n\
    \x20   except OSError as e: print(name, e.errno)\n\
    attempt('socket', lambda: socket.socket(socket.AF_UNIX))\n\
    attempt('socketpair', lambda: socket.socketpair())\n\
    attempt('execve', lambda: os.spawnl(os.P_WAIT, '/bin/true', 'true') == 127 and os.execv('/bin/true', ['true']))\n\
    attempt('memfd', lambda: os.execve(os.memfd_create('x'), ['x'], {}))\n\
    thread = threading.Thread(target=lambda: print('a thread')); thread.start(); thread.join()\n\
    pid = os.fork()\n\
    if pid == 0: os._exit(3)\n\
    print('a fork', os.waitpid(pid, 0)[1] >> 8)\n";

fn python(script: &str, seccomp: &Value) -> Value {
    job(&["python3", "-c", script], &json!({"seccomp": seccomp}))
}

fn run(spec: &Value) -> JobResult {
    home().run(spec).unwrap()
}

#[test]
fn a_strict_program_has_no_sockets_and_starts_no_other() {
    if !can_run("the profile `strict`") {
        return;
    }
    let strict = output(&python(SOCKET_AND_EXEC, &json!({"profile": "strict"})));
    assert_eq!(strict, "socket 1\nsocketpair 1\nexecve 1\nmemfd 1\na thread\na fork 3\n");
    // The control: the same sandbox lets them through without it.
    let wide = output(&python(SOCKET_AND_EXEC, &json!({"profile": "default"})));
    assert!(
        wide.starts_with("socket went through\nsocketpair went through\nexecve went through\n"),
        "{wide}"
    );
}

#[test]
fn one_step_may_be_strict_after_another_that_is_not() {
    if !can_run("the profile `strict` of one step") {
        return;
    }
    let mut spec = job(
        &[],
        &json!({"user": "root", "steps": [
            {"name": "build", "command": ["sh", "-c", "cp /bin/echo /tmp/built; /tmp/built made"]},
            {"name": "run", "command": ["/tmp/built", "ran"], "seccomp": {"profile": "strict"}},
            {"name": "again", "command": ["sh", "-c", "/tmp/built no"], "seccomp": {"profile": "strict"}},
        ]}),
    );
    spec.as_object_mut().unwrap().remove("command");
    let result = run(&spec);
    let ends: Vec<_> = result.steps.iter().map(|step| step.exit_code).collect();
    assert_eq!(ends, [Some(0), Some(0), Some(126)], "{result:?}");
    assert_eq!(result.stdout.text(), Some("made\nran\n"));
}

#[test]
fn refused_calls_are_named_and_the_program_goes_on() {
    if !can_run("refused calls by name") {
        return;
    }
    // From a thread, from a child and from a child of a child, more than are answered at once.
    let script = "import ctypes, os, threading\n\
        libc = ctypes.CDLL(None, use_errno=True)\n\
        assert libc.ptrace(0, 0, 0, 0) == -1 and ctypes.get_errno() == 1\n\
        for _ in range(1500): assert libc.unshare(0x10000000) == -1\n\
        thread = threading.Thread(target=lambda: libc.mount(0, 0, 0, 0, 0)); thread.start(); thread.join()\n\
        if os.fork() == 0:\n\
        \x20   if os.fork() == 0: os._exit(libc.chroot(b'/') + 1)\n\
        \x20   os._exit(os.wait()[1])\n\
        print('alive', os.wait()[1])\n";
    let result = run(&python(script, &json!({"refused": "report"})));
    assert_eq!((result.status, result.stdout.text()), (Status::Succeeded, Some("alive 0\n")), "{result:?}");
    assert_eq!(result.refused_syscalls, ["chroot", "mount", "ptrace", "unshare"]);
    assert_eq!(result.steps[0].refused_syscalls, result.refused_syscalls);
    let quiet = run(&python(script, &json!({})));
    assert!(quiet.status == Status::Succeeded && quiet.refused_syscalls.is_empty(), "{quiet:?}");
    let innocent = "import threading, subprocess\n\
        t = threading.Thread(target=print); t.start(); t.join(); subprocess.run(['true'], check=True)";
    let none = run(&python(innocent, &json!({"refused": "kill"})));
    assert!(none.status == Status::Succeeded && none.refused_syscalls.is_empty(), "{none:?}");
}

#[test]
fn a_refused_call_of_any_process_ends_the_whole_job() {
    if !can_run("jobs that a refused call ends") {
        return;
    }
    // The child has a session of its own, blocks and ignores what can be; its parent waits for something else.
    let script = "import ctypes, os, signal, time\n\
        libc = ctypes.CDLL(None)\n\
        if os.fork() == 0:\n\
        \x20   os.setsid()\n\
        \x20   for n in range(1, 32):\n\
        \x20       if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\n\
        \x20   print('before', flush=True)\n\
        \x20   libc.ptrace(0, 0, 0, 0)\n\
        \x20   print('after', flush=True)\n\
        time.sleep(30)\n";
    for grace in [0, 20_000] {
        let mut spec = python(script, &json!({"refused": "kill"}));
        spec["limits"] = json!({"kill_grace_ms": grace});
        let result = run(&spec);
        assert_eq!(result.status, Status::LimitExceeded, "{result:?}");
        assert_eq!(result.reason, Some(Reason::Syscall), "{result:?}");
        assert!(result.message.contains("`ptrace`"), "{}", result.message);
        assert_eq!(result.stdout.text(), Some("before\n"), "{result:?}");
        assert_eq!((result.exit_code, result.signal.as_deref()), (None, Some("SIGKILL")));
        assert_eq!(result.refused_syscalls, ["ptrace"]);
    }
}
