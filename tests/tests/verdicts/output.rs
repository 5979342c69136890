//! What programs write to stdout and stderr, and what becomes of too much of it.

use hutch_proto::{Reason, Status};
use serde_json::json;

use crate::row::{MIB, Row, holds, py, row, same, sh, steps, text};

pub(crate) fn rows() -> Vec<Row> {
    [plain(), floods(), bytes(), streams()].into_iter().flatten().collect()
}

fn plain() -> Vec<Row> {
    vec![
        row("a line", sh("echo hello")).stdout("hello\n").stderr(""),
        row("no newline", sh("printf hello")).stdout("hello"),
        row("both streams", sh("echo out; echo err >&2; exit 1")).exits(1).stdout("out\n").stderr("err\n"),
        row("nothing at all", sh(":")).stdout("").stderr(""),
        row("a last word before death", sh("printf last; kill -SEGV $$")).dies("SIGSEGV").stdout("last"),
        row(
            "a megabyte in one go, then the end",
            py("import os\nfor i in range(16): os.write(1, b'x' * 65536)"),
        )
        .check(|result| same("bytes", &(result.stdout.bytes, result.stdout.data.len()), &(MIB, 1 << 20)))
        .check(|result| holds(!result.stdout.truncated, || "truncated".to_owned())),
    ]
}

fn floods() -> Vec<Row> {
    let flood = |stream: u32| py(&format!("import os\nfor i in range(48): os.write({stream}, b'y' * 65536)"));
    let little = json!({"stdout_bytes": 65536, "stderr_bytes": 65536});
    let kill = json!({"stdout_bytes": 65536, "stderr_bytes": 65536, "output_overflow": "kill"});
    let exact = json!({"stdout_bytes": 1000, "output_overflow": "kill"});
    vec![
        row("a flood on stdout is cut", flood(1).limits(little.clone()))
            .check(|result| same("bytes", &(result.stdout.bytes, result.stdout.data.len()), &(3 * MIB, 65536)))
            .check(|result| holds(result.stdout.truncated, || "not truncated".to_owned())),
        row("a flood on stderr is cut", flood(2).limits(little.clone()))
            .check(|result| same("bytes", &(result.stderr.bytes, result.stderr.data.len()), &(3 * MIB, 65536)))
            .check(|result| holds(result.stderr.truncated, || "not truncated".to_owned()))
            .stdout(""),
        row("a flood on stdout kills", sh("yes").limits(kill.clone()))
            .hits(Reason::Output, "stdout_bytes", 65536, 65537..=64 * MIB)
            .check(|result| same("kept", &result.stdout.data.len(), &65536))
            .check(|result| holds(result.stdout.truncated, || "not truncated".to_owned())),
        row("a flood on stderr kills", sh("yes >&2").limits(kill.clone()))
            .hits(Reason::Output, "stderr_bytes", 65536, 65537..=64 * MIB),
        row("a flood from a grandchild kills", sh("sh -c 'sh -c yes'; sleep 30").limits(kill))
            .hits(Reason::Output, "stdout_bytes", 65536, 65537..=64 * MIB),
        row("as much as is kept is not too much", py("print('z' * 999)").limits(exact.clone()))
            .check(|result| same("bytes", &(result.stdout.bytes, result.stdout.truncated), &(1000, false))),
        row("one byte too many, then exit 0", py("print('z' * 1000)").limits(exact))
            .hits(Reason::Output, "stdout_bytes", 1000, 1001..=1001)
            .however_it_ended(),
        row("nothing is kept", sh("echo gone").limits(json!({"stdout_bytes": 0})))
            .check(|result| same("bytes", &(result.stdout.bytes, result.stdout.truncated), &(5, true)))
            .stdout(""),
        row("each stream has its own limit", sh("echo 12345678; echo abc >&2").limits(json!({"stdout_bytes": 4})))
            .stdout("1234")
            .stderr("abc\n"),
        row(
            "each step has its own limit",
            steps(json!([{"name": "a", "command": ["echo", "aaaaaa"]}, {"name": "b", "command": ["echo", "bbbbbb"]}]))
                .limits(json!({"stdout_bytes": 3})),
        )
        .stdout("aaabbb")
        .check(|result| same("bytes", &(result.stdout.bytes, result.stdout.truncated), &(14, true))),
    ]
}

fn bytes() -> Vec<Row> {
    vec![
        row("bytes that are not UTF-8", sh(r"printf 'a\377\376b'"))
            .check(|result| same("stdout", &result.stdout.data.as_slice(), &&b"a\xff\xfeb"[..]))
            .check(|result| {
                let json = serde_json::to_value(&result.stdout).map_err(|e| e.to_string())?;
                same(
                    "stdout on the wire",
                    &json,
                    &json!({"base64": "Yf/+Yg==", "bytes": 4, "truncated": false}),
                )
            }),
        row("many short lines are text, as far as they are kept", sh("yes | head -c 2000000")).check(
            |result| {
                let json = serde_json::to_value(&result.stdout).map_err(|e| e.to_string())?;
                let text = json["text"].as_str().map(str::len);
                same("stdout on the wire", &(text, &json["truncated"]), &(Some(1 << 20), &json!(true)))
            },
        ),
        row("a NUL byte is text", sh(r"printf 'a\000b'"))
            .check(|result| same("stdout", &result.stdout.data.as_slice(), &&b"a\0b"[..])),
        row("colours and bells are kept as they are", sh(r"printf '\033[31mred\007\r\n'"))
            .stdout("\x1b[31mred\x07\r\n"),
        row(
            "a letter that the cap cuts in two",
            sh(r"printf 'aa\303\244'").limits(json!({"stdout_bytes": 3})),
        )
        .stdout("aa")
        .check(|result| same("bytes", &(result.stdout.bytes, result.stdout.truncated), &(4, true))),
    ]
}

fn streams() -> Vec<Row> {
    vec![
        row("a program that closes its streams goes on", sh("exec >&- 2>&- <&-; sleep 0.3; exit 3"))
            .exits(3)
            .usage("wall_time_ms", 290..=20_000),
        row("stdout by its path", sh("echo one > /dev/stdout; echo two >> /dev/stdout")).stdout("one\ntwo\n"),
        row(
            "stderr by its path",
            sh("echo one > /dev/stderr; echo two | tee /dev/stderr > /dev/null; cat /dev/fd/0"),
        )
        .stderr("one\ntwo\n"),
        row("stdout by its path, as root", sh("echo one > /proc/self/fd/1").set("user", json!("root")))
            .stdout("one\n"),
        row("stdout by its path, in python", py("open('/dev/stdout', 'w').write('hello')")).stdout("hello"),
        row(
            "steps' output comes in order",
            steps(json!([
                {"name": "one", "command": ["sh", "-c", "echo 1; echo e1 >&2"]},
                {"name": "two", "command": ["sh", "-c", "echo 2; echo e2 >&2"]},
            ])),
        )
        .stdout("1\n2\n")
        .stderr("e1\ne2\n")
        .check(|result| {
            let each: Vec<_> = result.steps.iter().map(|step| text(&step.stdout)).collect();
            same("the steps' own", &each, &vec!["1\n".to_owned(), "2\n".to_owned()])
        })
        .ran(&[("one", Status::Succeeded, None), ("two", Status::Succeeded, None)]),
        row("a reader that ends makes a SIGPIPE", sh("yes | head -1; exit 0")).stdout("y\n"),
    ]
}
