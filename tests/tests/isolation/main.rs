//! What a program sees from inside a sandbox, and what it cannot reach.
//!
//! Where a thing is refused inside, the same is tried outside, as root, to show that the test would see it: a probe
//! that fails there too proves nothing, and is skipped aloud.

mod calls;
mod host;
mod refusals;
mod shared;
mod view;

use std::sync::OnceLock;

use hutch_proto::{JobResult, Status};
use hutch_tests::hutch::{Home, can_run};
use hutch_tests::programs;
use serde_json::{Value, json};

/// One data directory for all of these tests.
fn home() -> &'static Home {
    static HOME: OnceLock<Home> = OnceLock::new();
    HOME.get_or_init(Home::new)
}

/// A job of the host's programs and the tests' own.
fn job(command: &[&str], more: &Value) -> Value {
    let mut layers = vec![json!("host")];
    layers.extend(programs::layer().map(|dir| json!(format!("dir:{}", dir.display()))));
    let mut spec = json!({"layers": layers, "command": command});
    for (name, value) in more.as_object().into_iter().flatten() {
        spec[name] = value.clone();
    }
    spec
}

/// What a job that must succeed writes to stdout.
fn output(spec: &Value) -> String {
    let result = home().run(spec).unwrap();
    succeeded(&result);
    String::from_utf8_lossy(&result.stdout.data).into_owned()
}

fn succeeded(result: &JobResult) {
    let said = String::from_utf8_lossy(&result.stderr.data);
    assert_eq!(result.status, Status::Succeeded, "{}; stderr: {said}", result.message);
}

/// What a shell's program writes, as this user.
fn shell_as(user: &str, script: &str) -> String {
    output(&job(&["sh", "-c", script], &json!({"user": user})))
}

/// What a shell's program writes, as the default user.
fn shell(script: &str) -> String {
    shell_as("1001:1001", script)
}

/// What a python program writes, as the default user.
fn python(script: &str) -> String {
    output(&job(&["python3", "-c", script], &Value::Null))
}
