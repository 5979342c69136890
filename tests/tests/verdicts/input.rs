//! What programs read: stdin, files that are written for them, and their environment.

use hutch_proto::Reason;
use serde_json::json;

use crate::row::{MIB, Row, argv, holds, py, row, sh, steps, text, within};

pub(crate) fn rows() -> Vec<Row> {
    [stdin(), files(), environment()].into_iter().flatten().collect()
}

fn stdin() -> Vec<Row> {
    let large = json!({"text": "0123456789abcde\n".repeat(4 << 16)});
    vec![
        row("stdin that is read to the end", argv(&["wc", "-c"]).set("stdin", large.clone()))
            .stdout("4194304\n"),
        row("stdin that nobody reads", sh("exit 3").set("stdin", large.clone())).exits(3),
        row("stdin of which a little is read", argv(&["head", "-n1"]).set("stdin", large.clone()))
            .stdout("0123456789abcde\n"),
        row("stdin that a child reads", sh("sh -c 'sh -c \"tail -n1\"'").set("stdin", large))
            .stdout("0123456789abcde\n"),
        row("no stdin is an empty one", sh("wc -c; read line; echo $?")).stdout("0\n1\n"),
        row(
            "stdin by its path",
            sh("cat /dev/stdin /dev/fd/0 /proc/self/fd/0").set("stdin", json!({"text": "in\n"})),
        )
        .stdout("in\nin\nin\n"),
        row("stdin of any bytes", argv(&["od", "-An", "-tx1"]).set("stdin", json!({"base64": "AP/+Cg=="})))
            .stdout(" 00 ff fe 0a\n"),
        row(
            "stdin that cannot be changed",
            sh("cp /dev/zero /dev/stdin; chmod 600 /dev/stdin; cat").set("stdin", json!({"text": "same\n"})),
        )
        .prints("same\n"),
        row(
            "each step has its own stdin, or the job's from the beginning",
            steps(json!([
                {"name": "a", "command": ["cat"]},
                {"name": "b", "command": ["cat"]},
                {"name": "c", "command": ["cat"], "stdin": {"text": "own\n"}},
            ]))
            .set("stdin", json!({"text": "job's\n"})),
        )
        .stdout("job's\njob's\nown\n"),
    ]
}

fn files() -> Vec<Row> {
    let refused = |name: &str, path: &str, words: &[&str]| {
        let spec = sh("exit 0").file("/box/file", "x", "0644").file(path, "y", "0644");
        row(name, spec).refused(Reason::SpecInvalid, words)
    };
    vec![
        row(
            "files with modes",
            sh("stat -c '%n %a %u:%g %s' /box/a /box/b /box/c/d /box/c")
                .file("/box/a", "aa", "0644")
                .file("/box/b", "#!/bin/sh\n", "0755")
                .file("/box/c/d", "", "0600"),
        )
        .stdout("/box/a 644 1001:1001 2\n/box/b 755 1001:1001 10\n/box/c/d 600 1001:1001 0\n/box/c 755 1001:1001\n"
            .replace("/box/c 755 1001:1001\n", "/box/c 755 1001:1001 60\n")
            .as_str()),
        row("files belong to the user", sh("stat -c %u:%g /box/a; rm /box/a && echo gone").file("/box/a", "", "0400").set("user", json!("7:8")))
            .stdout("7:8\ngone\n"),
        row("a file that is run", argv(&["/box/main.sh", "a b"]).file("/box/main.sh", "#!/bin/sh\necho \"<$1>\"\n", "0755"))
            .stdout("<a b>\n"),
        row("a file of any bytes", argv(&["od", "-An", "-tx1", "/box/x"]).set("files", json!([{"path": "/box/x", "base64": "AP/+Cg=="}])))
            .stdout(" 00 ff fe 0a\n"),
        row("a file that nobody may read", sh("cat /box/x; echo $?").file("/box/x", "secret", "0000"))
            .stdout("1\n"),
        row("a file over one of the layer's", sh("cat /etc/profile").file("/etc/profile", "mine\n", "0644")).stdout("mine\n"),
        row("a file below a link of the layer's", sh("cat /usr/lib/x/y; cat /lib/x/y").file("/lib/x/y", "there\n", "0644"))
            .owns_host_files()
            .stdout("there\nthere\n"),
        row("a large file", argv(&["wc", "-c", "/box/x"]).file("/box/x", &"x".repeat(4 << 20), "0644"))
            .stdout("4194304 /box/x\n")
            .usage("disk_bytes", 4 * MIB..=5 * MIB),
        row("many files", sh("cat /box/*/* | wc -c").set("files", (0..500).map(|n| json!({"path": format!("/box/{}/{n}", n % 7), "text": "1234"})).collect()))
            .stdout("2000\n")
            .usage("disk_inodes", 500..=520),
        refused("a file whose parent is a file", "/box/file/x", &["files[1]", "/box/file/x"]),
        refused("a file where a directory is", "/usr/bin", &["files[1]", "/usr/bin"]),
        row("files larger than the disk", sh("exit 0").limits(json!({"disk_bytes": 65536})).file("/box/x", &"x".repeat(100_000), "0644"))
            .refused(Reason::SpecInvalid, &["files[0]", "space"]),
    ]
}

fn environment() -> Vec<Row> {
    let standard = "HOME=/home/job\nLANG=C.UTF-8\nPATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nUSER=job\n";
    let sorted =
        "import os\nprint('\\n'.join(sorted(k + '=' + v for k, v in os.environ.items() if k != 'LC_CTYPE')))";
    vec![
        row("the environment, and nothing else", py(sorted)).stdout(standard),
        row("nothing of ours in the environment", sh("env; cat /proc/self/environ /proc/1/environ; true"))
            .never_prints("CARGO")
            .never_prints("HUTCH"),
        row(
            "what is set is passed as it is",
            py("import os\nfor k in ('A', 'LD_LIBRARY_PATH', 'EMPTY', 'LINES', 'HOME', 'ä'): print(repr(os.environ[k]))").set(
                "env",
                json!({"A": "b=c", "LD_LIBRARY_PATH": "/nowhere:/x", "EMPTY": "", "LINES": "1\n2", "HOME": "/h", "ä": "ö"}),
            ),
        )
        .stdout("'b=c'\n'/nowhere:/x'\n''\n'1\\n2'\n'/h'\n'ö'\n"),
        row("a library that is loaded first", sh("exec true").set("env", json!({"LD_PRELOAD": "/nowhere.so"})))
            .check(|result| {
                let said = text(&result.stderr);
                holds(said.contains("/nowhere.so"), || format!("the loader did not look: {said}"))
            }),
        row(
            "a step's environment is over the job's",
            steps(json!([
                {"name": "a", "command": ["sh", "-c", "echo $A $B $USER"], "env": {"B": "step"}},
                {"name": "b", "command": ["sh", "-c", "echo $A $B $USER"], "env": {"USER": "me"}},
            ]))
            .set("env", json!({"A": "job", "B": "job"})),
        )
        .stdout("job step job\njob job me\n"),
        row("a large environment", sh("echo ${#X}").set("env", json!({"X": "x".repeat(100_000)})))
            .stdout("100000\n"),
        row("many arguments", argv(&[&["printf", "%s"][..], &vec!["0123456789"; 4000]].concat()))
            .check(|result| within("bytes", result.stdout.bytes, &(40_000..=40_000))),
        row("arguments as they are", py("import sys\nprint(sys.argv[1:])").set("command", json!(["python3", "-c", "import sys; print(sys.argv[1:])", "", "a b", "*", "$HOME", "'", "ä"])))
            .stdout("['', 'a b', '*', '$HOME', \"'\", 'ä']\n"),
        row("no more arguments than the kernel takes", argv(&[&["true"][..], &["x".repeat(100_000).as_str(); 2]].concat()).limits(json!({"stack_bytes": 65_536})))
            .refused(Reason::SpecInvalid, &["command", "too long"]),
        row("limits as programs see them", sh("ulimit -n; ulimit -s; ulimit -c; ulimit -f; ulimit -l; ulimit -r").limits(json!({"open_files": 77, "stack_bytes": 1 << 20, "file_size_bytes": 5 * MIB})))
            .stdout("77\n1024\n0\n10240\n64\n0\n"),
        row("as many open files as allowed", py("import os\nn = 0\ntry:\n  while True: os.open('/dev/null', 0); n += 1\nexcept OSError as e: print(n, e.errno)").limits(json!({"open_files": 20})))
            .stdout("17 24\n"),
        row("a small umask, whatever ours is", sh("umask; touch x; stat -c %a x")).stdout("0022\n644\n"),
        row("nobody else's signals", argv(&["cat", "/proc/self/status"]))
            .prints("SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\nSigCgt:\t0000000000000000\n"),
    ]
}
