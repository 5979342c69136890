//! Sandboxes that are built before they are asked for: each is used once, and none that is out of date.

use std::fs;
use std::path::Path;
use std::process::Command;

use hutch_tests::hutch::{Home, can_run};
use serde_json::{Value, json};

/// What the jobs of these acts wrote, and how many had found their sandbox built by then.
fn play(acts: &[Value]) -> Vec<(String, u64)> {
    let home = Home::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine_loop"));
    let output = command.arg("acts").arg(home.path()).arg(json!(acts).to_string()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said.lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            let text = format!("{}{}", line["stdout"].as_str().unwrap(), line["message"].as_str().unwrap());
            (text, line["ahead"].as_u64().unwrap())
        })
        .collect()
}

/// A layer that is a directory with busybox and a file.
fn layer(dir: &Path, says: &str) {
    fs::create_dir_all(dir.join("bin")).unwrap();
    fs::copy("/bin/busybox", dir.join("bin/sh")).unwrap();
    fs::write(dir.join("says"), says).unwrap();
}

fn job(layer: &Path, script: &str) -> Value {
    json!({"job": {"layers": [format!("dir:{}", layer.display())], "command": ["/bin/sh", "-c", script]}})
}

#[test]
fn a_sandbox_built_ahead_is_used_once_and_shows_its_layers_as_they_are() {
    if !can_run("sandboxes built ahead") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (now, other) = (dir.path().join("now"), dir.path().join("other"));
    layer(&now, "one");
    layer(&other, "three");
    // What a job leaves in its file system, no other finds.
    let look = job(&now, "read it < /says; echo $it; read left < /left || echo nothing; echo left > /left");
    let away = dir.path().join("away");
    let said = play(&[
        look.clone(),
        look.clone(),
        look.clone(),
        json!({"write": [now.join("says"), "two"]}),
        look.clone(),
        json!({"rename": [now, away]}),
        json!({"rename": [other, now]}),
        look.clone(),
        look.clone(),
        look.clone(),
    ]);
    let texts: Vec<_> = said.iter().map(|(text, _)| text.lines().next().unwrap_or_default()).collect();
    assert_eq!(texts, ["one", "one", "one", "two", "three", "three", "three"], "{said:?}");
    assert!(said.iter().all(|(text, _)| text.contains("nothing")), "{said:?}");
    let ahead: Vec<_> = said.iter().map(|(_, ahead)| *ahead).collect();
    assert_eq!(
        ahead,
        [0, 0, 1, 2, 2, 3, 4],
        "used, but for the first, the second, and the one whose layer had gone"
    );
}

#[test]
fn jobs_that_differ_get_their_own_and_files_come_along() {
    if !can_run("sandboxes built ahead") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    layer(dir.path(), "base");
    let plain = job(dir.path(), "read it < /says; echo $it");
    let mut with_file = plain.clone();
    with_file["job"]["files"] = json!([{"path": "/says", "text": "file"}]);
    let mut small = job(dir.path(), "head -c 3000000 /dev/zero > /x || echo full");
    small["job"]["limits"] = json!({"disk_bytes": 1 << 20});
    let said = play(&[plain.clone(), plain.clone(), with_file, small, plain.clone()]);
    let texts: Vec<_> = said.iter().map(|(text, _)| text.lines().next().unwrap_or_default()).collect();
    assert_eq!(texts, ["base", "base", "file", "full", "base"], "{said:?}");
    assert_eq!(said.iter().map(|(_, ahead)| *ahead).collect::<Vec<_>>(), [0, 0, 1, 1, 1], "{said:?}");
}

#[test]
fn nobody_s_sandbox_is_let_go_after_a_while() {
    if !can_run("sandboxes built ahead") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    layer(dir.path(), "base");
    let plain = job(dir.path(), "read it < /says; echo $it");
    let said = play(&[plain.clone(), plain.clone(), json!({"idle": true}), plain.clone(), plain]);
    assert_eq!(said.iter().map(|(_, ahead)| *ahead).collect::<Vec<_>>(), [0, 0, 0, 1], "{said:?}");
}
