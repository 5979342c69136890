//! Whom programs run as, and where.

use hutch_proto::Reason;
use serde_json::json;

use crate::row::{Row, Spec, row, sh, steps};

const WHO: &str = "id -u; id -g; echo $HOME $USER; pwd; stat -c %u:%g .";

fn who(user: &str) -> Spec {
    sh(WHO).set("user", json!(user))
}

pub(crate) fn rows() -> Vec<Row> {
    [users(), homes(), directories()].into_iter().flatten().collect()
}

fn users() -> Vec<Row> {
    let passwd = "root:x:0:0::/root:/bin/sh\nann:x:12:34:Ann:/srv/ann:/bin/sh\nbig:x:70000:70000::/:/bin/sh\n\
                  far:x:13:70000::/:/bin/sh\nbroken\n";
    let group = "root:x:0:\nstaff:x:50:ann,bob\nhuge:x:80000:ann\naudio:x:29:bob,ann\n";
    let own = |user: &str, script: &str| {
        sh(script)
            .file("/etc/passwd", passwd, "0644")
            .file("/etc/group", group, "0644")
            .set("user", json!(user))
    };
    vec![
        row("the default user", sh(WHO)).stdout("1001\n1001\n/home/job job\n/home/job\n1001:1001\n"),
        row("a user by name", who("job")).stdout("1001\n1001\n/home/job job\n/home/job\n1001:1001\n"),
        row("a user by name, of the layer's", who("daemon").set("cwd", json!("/box")))
            .stdout("1\n1\n/usr/sbin daemon\n/box\n1:1\n"),
        row("a user by number", who("1001")).stdout("1001\n1001\n/home/job job\n/home/job\n1001:1001\n"),
        row("a user by number, without an entry", who("1234"))
            .stdout("1234\n1234\n/home/job job\n/home/job\n1234:1234\n"),
        row("user and group by number", who("1234:4321"))
            .stdout("1234\n4321\n/home/job job\n/home/job\n1234:4321\n"),
        row("user and group by name", who("job:daemon").set("cwd", json!("/box")))
            .stdout("1001\n1\n/home/job job\n/box\n1001:1\n"),
        row("the highest numbers", who("65534:65534")).prints("65534\n65534\n"),
        row("root, inside", who("root")).stdout("0\n0\n/root root\n/root\n0:0\n"),
        row("root by number, inside", who("0:0")).stdout("0\n0\n/root root\n/root\n0:0\n"),
        row(
            "a user with a name, in the sandbox's passwd",
            sh("id -un; id -gn; whoami").set("user", json!("1234:4321")),
        )
        .stdout("job\njob\njob\n"),
        row(
            "a user by number has the name and the home to itself",
            sh("touch ~/x && grep -c ^job: /etc/passwd && grep -c ^job: /etc/group && getent passwd job | cut -d: -f3")
                .set("user", json!("1234")),
        )
        .stdout("1\n1\n1234\n"),
        row(
            "a user by number, where a layer has a user of that name",
            sh("id -un; id -gn; echo $HOME")
                .set("user", json!("1234"))
                .file("/etc/passwd", "root:x:0:0::/root:/bin/sh\njob:x:7:7:Job Smith:/srv:/bin/sh\n", "0644")
                .file("/etc/group", "root:x:0:\njob:x:7:ann\n", "0644"),
        )
        .stdout("job-1234\njob-1234\n/home/job-1234\n"),
        row(
            "each step of a user by number is the same user",
            steps(json!([
                {"name": "a", "command": ["sh", "-c", "id -un; touch ~/a"]},
                {"name": "b", "command": ["sh", "-c", "id -un; rm ~/a; grep -c ^job: /etc/passwd"]},
            ]))
            .set("user", json!("1234")),
        )
        .stdout("job\njob\n1\n"),
        row("groups of a user", own("ann", "id -u; id -g; id -G")).stdout("12\n34\n34 29 50\n"),
        row("an unknown user", who("nobody-here"))
            .refused(Reason::SpecInvalid, &["user", "nobody-here", "/etc/passwd"]),
        row("an unknown group", who("job:no-group"))
            .refused(Reason::SpecInvalid, &["user", "no-group", "/etc/group"]),
        row("a user that no sandbox has", own("big", "id")).refused(Reason::SpecInvalid, &["user"]),
        row("a group that no sandbox has", own("far", "id")).refused(Reason::SpecInvalid, &["user"]),
        row(
            "root without a passwd",
            sh("id -u; echo $HOME").set("user", json!("0")).file("/etc/passwd", "", "0644"),
        )
        .stdout("0\n/home/job\n"),
        row(
            "a passwd without an end of line",
            sh("cat /etc/passwd").file("/etc/passwd", "root:x:0:0::/root:/bin/sh", "0644"),
        )
        .stdout("root:x:0:0::/root:/bin/sh\njob:x:1001:1001:job:/home/job:/bin/sh\n"),
    ]
}

fn homes() -> Vec<Row> {
    let passwd = |home: &str| format!("root:x:0:0::/root:/bin/sh\njob:x:1001:1001::{home}:/bin/sh\n");
    vec![
        row(
            "HOME follows passwd",
            sh("echo $HOME; pwd; touch x").file("/etc/passwd", &passwd("/else/where"), "0644"),
        )
        .stdout("/else/where\n/else/where\n"),
        row("a HOME that is no path", sh("echo $HOME; pwd").file("/etc/passwd", &passwd("here"), "0644"))
            .stdout("here\n/\n"),
        row("no HOME in passwd", sh("pwd").file("/etc/passwd", &passwd(""), "0644")).stdout("/\n"),
        row("the home can be written to", sh("echo x > ~/y && cat ~/y")).stdout("x\n"),
        row(
            "HOME of the job's own",
            sh("echo $HOME $USER; pwd").set("env", json!({"HOME": "/x", "USER": "me"})),
        )
        .stdout("/x me\n/home/job\n"),
        row(
            "root's home can be written to, inside",
            sh("echo x > /root/y && cat /root/y").set("user", json!("root")),
        )
        .stdout("x\n"),
        row("others' homes cannot", sh("ls /root")).exits(2),
    ]
}

fn directories() -> Vec<Row> {
    let at = |cwd: &str| sh("pwd; stat -c %u:%g:%a .; touch x && echo made").set("cwd", json!(cwd));
    vec![
        row("a working directory that is made", at("/box/a/b")).stdout("/box/a/b\n1001:1001:755\nmade\n"),
        row("a working directory that is there", sh("pwd").set("cwd", json!("/usr/bin")))
            .stdout("/usr/bin\n"),
        row("a working directory by a link", sh("/bin/pwd").set("cwd", json!("/bin"))).stdout("/usr/bin\n"),
        row("a working directory in /tmp", at("/tmp")).prints("made"),
        row("a working directory that is a file", at("/box/x").file("/box/x", "", "0644"))
            .refused(Reason::SpecInvalid, &["cwd", "/box/x"]),
        row("a working directory below a file", at("/box/x/y").file("/box/x", "", "0644"))
            .refused(Reason::SpecInvalid, &["cwd", "/box/x/y"]),
        row("a working directory of root's", at("/root")).refused(Reason::SpecInvalid, &["cwd", "/root"]),
        row("a working directory behind a descriptor", at("/proc/self/fd/3"))
            .refused(Reason::SpecInvalid, &["cwd"]),
        row(
            "the working directory is made for a user",
            sh("stat -c %u:%g .").set("cwd", json!("/work")).set("user", json!("5:6")),
        )
        .stdout("5:6\n"),
        row(
            "each step has its own directory",
            steps(json!([
                {"name": "a", "command": ["pwd"]}, {"name": "b", "command": ["pwd"], "cwd": "/b"},
                {"name": "c", "command": ["pwd"]},
            ]))
            .set("cwd", json!("/a")),
        )
        .stdout("/a\n/b\n/a\n"),
    ]
}
