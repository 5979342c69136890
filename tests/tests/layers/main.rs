//! Images in, layers out: what jobs stack and what they leave, against the tools that others use for images.

mod images;
mod stacks;
mod tars;

use hutch_tests::house::House;
use serde_json::{Value, json};

/// The applets that the tests' root file system has.
const APPLETS: &[&str] =
    &["sh", "ls", "cat", "echo", "mkdir", "rm", "ln", "id", "stat", "find", "md5sum", "sort", "env", "touch"];

/// A root file system of busybox alone, as a tar.
fn busybox() -> Vec<u8> {
    let mut tar = tars::Layer::new();
    tar.dir("bin", 0o755);
    tar.dir("tmp", 0o1777);
    tar.file("bin/busybox", &std::fs::read("/bin/busybox").expect("busybox-static"), 0o755);
    for applet in APPLETS {
        tar.link(&format!("bin/{applet}"), "busybox");
    }
    tar.bytes()
}

/// A house with sandboxes, and the image `test/busybox:1` in it.
fn house_with_busybox() -> Option<House> {
    let house = House::with_sandboxes()?;
    std::fs::write(house.path("busybox.tar"), busybox()).expect("write");
    let done = house.hutch(&["layer", "import", "busybox.tar", "--name", "test/busybox:1"]);
    assert_eq!((done.code, done.stdout.as_str()), (0, "image:docker.io/test/busybox:1\n"), "{done:?}");
    Some(house)
}

/// Runs a job here, to its result.
fn run(house: &House, job: &Value) -> Value {
    let done = house.hutch_with_stdin(&["run", "--json", "-"], job.to_string().as_bytes());
    assert_eq!(done.code, 0, "{done:?}");
    done.json()
}

/// What a shell script writes, as root on these layers.
fn output(house: &House, layers: &[&str], script: &str) -> String {
    let result = run(
        house,
        &json!({"layers": layers, "user": "0:0", "cwd": "/", "command": ["/bin/sh", "-c", script]}),
    );
    assert_eq!(result["status"], "succeeded", "{result}");
    result["stdout"]["text"].as_str().expect("text").to_owned()
}
