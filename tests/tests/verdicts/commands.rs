//! Commands that are found, and those that are not or cannot be run.

use hutch_proto::{Reason, Status};
use serde_json::json;

use crate::row::{Row, Spec, argv, row, sh, steps};

pub(crate) fn rows() -> Vec<Row> {
    [not_found(), found()].into_iter().flatten().collect()
}

/// A binary that names its interpreter at this place of the file: elf(5).
fn elf_naming(at: u32) -> Spec {
    let make = format!(
        "import os, struct\n\
         head = b'\\x7fELF\\x02\\x01\\x01' + bytes(9) + struct.pack('<HHIQQQIHHHHHH', 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)\n\
         open('/box/x', 'wb').write(head + struct.pack('<IIQQQQQQ', 3, 4, {at}, 0, 0, 9, 9, 1) + bytes(100))\n\
         os.chmod('/box/x', 0o755)"
    );
    let all =
        json!([{"name": "make", "command": ["python3", "-c", make]}, {"name": "run", "command": ["/box/x"]}]);
    steps(all).set("cwd", json!("/box"))
}

fn not_found() -> Vec<Row> {
    let refused = |name: &str, spec: Spec, words: &[&str]| {
        row(name, spec).refused(Reason::CommandNotFound, words).stdout("").stderr("")
    };
    let file = |text: &str, mode: &str| argv(&["/box/x"]).file("/box/x", text, mode);
    let elf = "f0VMRgIBAQAAAAAAAAAAAAIA8wABAAAAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAAAAEAAOAAAAAAAAAAAAA==";
    vec![
        refused(
            "no such command",
            argv(&["no-such-command", "x"]),
            &["not found", "no-such-command", "PATH"],
        ),
        refused("no such file", argv(&["/no/such/file"]), &["not found", "/no/such/file"]),
        refused("no such file in the working directory", argv(&["./x"]), &["./x"]),
        refused("a command that is a directory", argv(&["/usr/bin"]), &["/usr/bin", "directory"]),
        refused("a command in what is no directory", argv(&["/usr/bin/env/x"]), &["/usr/bin/env/x"]),
        refused("a file that is not executable", file("#!/bin/sh\n", "0644"), &["/box/x", "executable"]),
        refused(
            "a file that only root may execute",
            argv(&["/box/x"]).file("/box/x", "#!/bin/sh\n", "0644").set("user", json!("root")),
            &["/box/x"],
        ),
        refused(
            "an interpreter that is not there",
            file("#!/no/such/interpreter\n", "0755"),
            &["/box/x", "interpreter"],
        ),
        refused("a binary that ends before its interpreter's name", elf_naming(4000), &["/box/x"]),
        refused("a binary whose interpreter's name is empty", elf_naming(0), &["/box/x"]),
        refused("an interpreter that is a directory", file("#!/usr\n", "0755"), &["/box/x"]),
        refused("neither binary nor script", file("echo hello\n", "0755"), &["/box/x", "#!"]),
        refused("an empty file", file("", "0755"), &["/box/x"]),
        refused("a script that interprets itself", file("#!/box/x\n", "0755"), &["/box/x"]),
        refused(
            "a binary of another machine",
            argv(&["/box/x"]).set("files", json!([{"path": "/box/x", "base64": elf, "mode": "0755"}])),
            &["/box/x"],
        ),
        refused("a PATH of nowhere", argv(&["sh"]).set("env", json!({"PATH": "/nowhere"})), &["sh", "PATH"]),
        refused("an empty PATH", argv(&["sh"]).set("env", json!({"PATH": ""})), &["sh"]),
        refused("a name longer than names are", argv(&[&"x".repeat(300)]), &["xxx"]),
        row(
            "a step that is not found",
            steps(json!([{"name": "a", "command": ["true"]}, {"name": "b", "command": ["no-such-command"]}])),
        )
        .refused(Reason::CommandNotFound, &["no-such-command"])
        .ran(&[("a", Status::Succeeded, None), ("b", Status::Failed, Some(Reason::CommandNotFound))]),
    ]
}

fn found() -> Vec<Row> {
    let script = |says: &str| format!("#!/bin/sh\necho {says}\n");
    vec![
        row("a command in PATH", argv(&["echo", "hello"])).stdout("hello\n"),
        row("a command by its path", argv(&["/bin/echo", "hello"])).stdout("hello\n"),
        row(
            "a command in a PATH of the job's",
            argv(&["x"])
                .file("/box/x", &script("box"), "0755")
                .set("env", json!({"PATH": "/nowhere:/box:/bin"})),
        )
        .stdout("box\n"),
        row(
            "a command that is executable only further on in PATH",
            argv(&["x"])
                .file("/a/x", "", "0644")
                .file("/b/x", &script("b"), "0755")
                .set("env", json!({"PATH": "/a:/b"})),
        )
        .stdout("b\n"),
        row(
            "a command in the working directory, by PATH",
            argv(&["x"])
                .file("/box/x", &script("here"), "0755")
                .set("cwd", json!("/box"))
                .set("env", json!({"PATH": ":/bin"})),
        )
        .stdout("here\n"),
        row(
            "a command in the working directory, by its path",
            argv(&["./x"]).file("/box/x", &script("here"), "0755").set("cwd", json!("/box")),
        )
        .stdout("here\n"),
        row(
            "an interpreter with an argument",
            argv(&["/box/x"]).file("/box/x", "#!/bin/sh -e\nfalse\necho no\n", "0755"),
        )
        .exits(1)
        .stdout(""),
        row(
            "a script of a script",
            argv(&["/box/x"]).file("/box/x", "#!/box/y\n", "0755").file("/box/y", "#!/bin/echo\n", "0755"),
        )
        .stdout("/box/y /box/x\n"),
        row(
            "argv[0] is as it was written",
            sh("exit 0").set("command", json!(["sh", "-c", "tr '\\0' ' ' < /proc/$$/cmdline"])),
        )
        .prints("sh -c "),
        row("a shell's own 127", sh("no-such-command")).exits(127),
        row("a shell's own 126", sh("/usr")).exits(126),
    ]
}
