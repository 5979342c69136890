//! Programs on a terminal of their own: what they see of it, what comes of it, and a person at it.

use hutch_tests::house::House;
use hutch_tests::person;
use serde_json::{Value, json};

fn run(house: &House, job: &Value) -> Value {
    let done = house.hutch_with_stdin(&["run", "--json", "-"], job.to_string().as_bytes());
    assert_eq!(done.code, 0, "{done:?}");
    done.json()
}

fn on_terminal(script: &str) -> Value {
    json!({"layers": ["host"], "command": ["sh", "-c", script], "tty": true})
}

#[test]
fn a_program_has_a_terminal_of_the_sandboxs_own() {
    let Some(house) = House::with_sandboxes() else { return };
    let script = "tty; stty size; echo $TERM; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo all; stat -c %u $(tty); \
                  ps -o tty= -p $$ 2>/dev/null | tr -d ' '; ls /dev/pts; echo err >&2; : < /dev/tty && echo controlling; exit 3";
    let result = run(&house, &on_terminal(script));
    assert_eq!((&result["reason"], &result["exit_code"]), (&json!("nonzero_exit"), &json!(3)), "{result}");
    let shown = result["stdout"]["text"].as_str().expect("text").replace("\r\n", "\n");
    for line in ["/dev/pts/0", "24 80", "xterm", "all", "1001", "err", "controlling"] {
        assert!(shown.lines().any(|shown| shown == line), "{line}: {shown}");
    }
    assert_eq!(result["stderr"]["bytes"], 0, "a terminal has one stream: {result}");
}

#[test]
fn what_the_spec_says_of_stdin_is_typed_and_then_the_input_ends() {
    let Some(house) = House::with_sandboxes() else { return };
    for (stdin, wanted) in [("one\ntwo\n", "2\n"), ("one\ntwo", "1\n"), ("", "0\n")] {
        let mut job = on_terminal("stty -echo; echo ready; wc -l");
        job["stdin"] = json!({"text": stdin});
        let result = run(&house, &job);
        let shown = result["stdout"]["text"].as_str().expect("text").replace("\r\n", "\n");
        assert!(shown.ends_with(wanted), "{stdin:?}: {shown:?} {result}");
        assert_eq!(result["status"], "succeeded", "{result}");
    }
}

#[test]
fn limits_hold_on_a_terminal() {
    let Some(house) = House::with_sandboxes() else { return };
    let mut job = on_terminal("while :; do echo flood; done");
    job["limits"] = json!({"wall_time_ms": 700, "stdout_bytes": 1000});
    let result = run(&house, &job);
    assert_eq!(result["reason"], "wall_time", "{result}");
    assert_eq!(result["stdout"]["truncated"], true, "{result}");
    job["limits"] = json!({"wall_time_ms": 20000, "stdout_bytes": 1000, "output_overflow": "kill"});
    assert_eq!(run(&house, &job)["reason"], "output");
    let mut waiting = on_terminal("stty raw; cat");
    waiting["limits"] = json!({"idle_time_ms": 300});
    assert_eq!(run(&house, &waiting)["reason"], "idle_time");
    let steps = json!({"layers": ["host"], "tty": true, "steps": [
        {"name": "one", "command": ["sh", "-c", "tty > /tmp/one"]}, {"name": "two", "command": ["sh", "-c", "cat /tmp/one; tty"]}]});
    let result = run(&house, &steps);
    assert_eq!(result["stdout"]["text"], "/dev/pts/0\r\n/dev/pts/0\r\n", "each step has its own: {result}");
    let mut missing = on_terminal("");
    missing["command"] = json!(["no-such-program"]);
    assert_eq!(run(&house, &missing)["reason"], "command_not_found");
}

/// Types into a terminal that cannot be one's own: TIOCSTI, refused by the policy.
#[test]
fn nobody_types_into_a_terminal_for_others() {
    let Some(house) = House::with_sandboxes() else { return };
    let inject = "import fcntl\ntry:\n  fcntl.ioctl(0, 0x5412, b'x')\n  print('typed')\nexcept OSError as e:\n  print(e.errno)";
    let job = json!({"layers": ["host"], "command": ["python3", "-c", inject], "tty": true});
    assert_eq!(run(&house, &job)["stdout"]["text"], "1\r\n");
}

#[test]
fn a_person_works_at_it() {
    let Some(house) = House::with_sandboxes() else { return };
    let data = house.path("data");
    let shell = ["run", "--quiet", "--tty", "--", "sh", "-c", person::SHELL];
    person::works(&house, &shell, &[("HUTCH__DATA_DIR", data.to_str().expect("utf-8"))]);
}
