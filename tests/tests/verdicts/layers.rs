//! The file system: the host's own programs, directories stacked, and what of the changes is kept.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use hutch_proto::{OutputKind, Reason};
use serde_json::{Value, json};

use hutch_tests::programs::{self, Program};

use crate::fixture;
use crate::row::{Row, Spec, argv, holds, row, same, sh, text};

pub(crate) fn rows() -> Vec<Row> {
    [host(), outputs(), stacks(), without_host(), refused()].into_iter().flatten().collect()
}

fn root(script: &str, globs: &[&str]) -> Spec {
    sh(script).set("user", json!("root")).set("outputs", json!({"paths": globs}))
}

fn host() -> Vec<Row> {
    let canary = "/usr/share/hutch-test-canary";
    let untouched = move || {
        holds(!Path::new(canary).exists(), || format!("{canary} is on the host"))?;
        holds(Path::new("/usr/bin/env").exists(), || "/usr/bin/env is gone from the host".to_owned())?;
        let profile = fs::read_to_string("/etc/profile").unwrap_or_default();
        holds(!profile.contains("canary"), || "/etc/profile of the host was written".to_owned())
    };
    vec![
        row("the host's programs", sh("ls /usr/bin/env /bin/sh /etc/passwd && python3 -c 'print(6 * 7)'"))
            .stdout("/bin/sh\n/etc/passwd\n/usr/bin/env\n42\n"),
        row("changes of the host's files stay inside", root(
            &format!("echo canary > {canary} && echo canary >> /etc/profile && rm /usr/bin/env && chmod 0 /usr/bin/id && tail -n1 /etc/profile"),
            &["/usr/**", "/etc/**"],
        ))
        .stdout("canary\n")
        .output("/usr/share/hutch-test-canary", OutputKind::File)
        .output("/usr/bin/env", OutputKind::Deleted)
        .output("/usr/bin/id", OutputKind::File)
        .output("/etc/profile", OutputKind::File)
        .owns_host_files()
        .on_host(untouched)
        .then(sh("cat /usr/share/hutch-test-canary; grep -c canary /etc/profile; env true; id -u"))
        .stdout("0\n1001\n"),
        row("the default user cannot change the host's files", sh("touch /usr/x /etc/x /x; rm -f /usr/bin/env; exit 3"))
            .exits(3)
            .check(|result| same("refusals", &text(&result.stderr).matches("Permission denied").count(), &4)),
        row("nothing of the host's homes and secrets", root(
            "ls -A /root /home /boot /sys /run /srv /mnt /media /opt /var/lib /var/log 2> /dev/null; ls /etc/shadow /etc/ssh /etc/machine-id /etc/hostname 2> /dev/null; exit 0",
            &[],
        ))
        .check(|result| {
            let lines: Vec<_> = text(&result.stdout).lines().filter(|line| !line.is_empty() && !line.ends_with(':')).map(str::to_owned).collect();
            same("what is there", &lines, &vec!["job".to_owned()])
        }),
    ]
}

fn outputs() -> Vec<Row> {
    let box_glob = &["/box/**"][..];
    vec![
        row("files that were made", root("mkdir -p /box/a/b; echo hello > /box/a/b/c; echo x > /elsewhere", box_glob).set("cwd", json!("/")))
            .outputs(&["/box/a", "/box/a/b", "/box/a/b/c"])
            .check(|result| {
                let file = result.outputs.files.last().ok_or("no file")?;
                let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
                same("c", &(file.bytes, file.sha256.as_deref(), file.mode.map(|mode| mode.bits())), &(6, Some(sha256), Some(0o644)))
            })
            .check(|result| holds(result.outputs.archive.is_some() && !result.outputs.truncated, || "no archive".to_owned())),
        row("the outputs of a program that fails", sh("mkdir ~/out; echo log > ~/out/log; exit 9").set("outputs", json!({"paths": ["/home/job/out/**"]})))
            .exits(9)
            .outputs(&["/home/job/out/log"]),
        row("the outputs of a program that is killed", sh("echo log > ~/log; sleep 60").set("outputs", json!({"paths": ["/home/job/*"]})).limits(json!({"wall_time_ms": 400})))
            .hits(Reason::WallTime, "wall_time_ms", 400, 400..=10_000)
            .outputs(&["/home/job/log"]),
        row("no outputs asked for", sh("echo x > ~/x")).outputs(&[]).check(|result| same("archive", &result.outputs.archive, &None)),
        row("outputs that nothing matches", sh("echo x > ~/x").set("outputs", json!({"paths": ["/nowhere/**"]})))
            .outputs(&[])
            .check(|result| same("archive", &result.outputs.archive, &None)),
        row("files that are given and left alone", sh("exit 0").file("/box/x", "x", "0644").set("outputs", json!({"paths": ["/box/*"]})))
            .outputs(&["/box/x"]),
        row("a star stays in its directory", root("mkdir -p /box/a; touch /box/1.txt /box/2.log /box/a/3.txt", &["/box/*.txt"]))
            .outputs(&["/box/1.txt"]),
        row("what is no file is named and not read", root(
            "mkdir /box; cd /box; mkfifo fifo; ln -s /etc/shadow link; ln -s nowhere dangling; : > file; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"socket\")'",
            &["/box/*"],
        ).set("cwd", json!("/")))
        .outputs(&["/box/dangling", "/box/fifo", "/box/file", "/box/link", "/box/socket"])
        .output("/box/fifo", OutputKind::Special)
        .output("/box/socket", OutputKind::Special)
        .output("/box/link", OutputKind::Symlink)
        .output("/box/dangling", OutputKind::Symlink)
        .check(|result| {
            let link = result.outputs.files.iter().find(|file| file.path == "/box/link");
            same("the link's target", &link.and_then(|file| file.target.as_deref()), &Some("/etc/shadow"))
        }),
        row("what was deleted", root("rm -r /usr/share/doc /etc/profile; echo x > /tmp/gone; rm /tmp/gone", &["/usr/share/*", "/etc/*", "/tmp/*"]))
            .outputs(&["/etc/profile", "/usr/share/doc"])
            .owns_host_files()
            .output("/usr/share/doc", OutputKind::Deleted)
            .output("/etc/profile", OutputKind::Deleted),
        row("what was moved", root("mv /etc/profile /etc/moved", &["/etc/*"]))
            .outputs(&["/etc/moved", "/etc/profile"])
            .output("/etc/moved", OutputKind::File)
            .output("/etc/profile", OutputKind::Deleted),
        row("the outputs of all steps", crate::row::steps(json!([
            {"name": "a", "command": ["sh", "-c", "echo 1 > ~/a; echo 1 > ~/b"]},
            {"name": "b", "command": ["sh", "-c", "echo 2 > ~/b; rm ~/a; echo 2 > ~/c"]},
        ])).set("outputs", json!({"paths": ["/home/job/*"]})))
        .outputs(&["/home/job/b", "/home/job/c"]),
        row("names that are not UTF-8", root(r#"mkdir /box; cd /box; touch "$(printf 'a\377')" "$(printf 'b\nc')""#, &["/box/*"]).set("cwd", json!("/")))
            .outputs(&["/box/a\\xff", "/box/b\\x0ac"]),
        row("a file of another owner, that nobody may read", root("mkdir /box; echo x > /box/x; chown 5:6 /box/x; chmod 0 /box/x /box", &["/box/*"]).set("cwd", json!("/")))
            .outputs(&["/box/x"]),
        row("a large sparse file is not read", root("mkdir /box; truncate -s 1000000000000 /box/x", &["/box/*"]).set("cwd", json!("/")))
            .outputs(&["/box/x"])
            .check(|result| holds(result.outputs.truncated, || "not truncated".to_owned()))
            .check(|result| holds(result.timeline.collect_us < 10_000_000, || "it took long".to_owned())),
        row("directories as deep as they go", sh("i=0; while [ $i -lt 1000 ]; do mkdir d && cd d || break; i=$((i+1)); done; echo $i > x").set("outputs", json!({"paths": ["/home/job/**"]})).set("env", json!({"PATH": "/bin"})).limits(json!({"wall_time_ms": 600_000})))
            .check(|result| same("outputs", &result.outputs.files.len(), &1001)),
    ]
}

/// Directories that are stacked, base first.
fn layers(script: &str, dirs: &[&Path]) -> Spec {
    let layers: Vec<Value> = dirs.iter().map(|dir| json!(format!("dir:{}", dir.display()))).collect();
    sh(script).set("layers", [vec![json!("host")], layers].concat().into())
}

fn write(dir: &Path, path: &str, text: &str) {
    let file = dir.join(path);
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, text).unwrap();
}

fn stacks() -> Vec<Row> {
    let (low, high, top) = (fixture("low"), fixture("high"), fixture("top"));
    for (dir, name) in [(&low, "low"), (&high, "high"), (&top, "top")] {
        write(dir, &format!("data/{name}"), name);
        write(dir, "data/all", &format!("{name}\n"));
        write(dir, "usr/share/hutch-stack", &format!("{name}\n"));
    }
    write(&low, "data/hidden", "low");
    write(&low, "data/dir/a", "low");
    write(&high, "data/dir/b", "high");
    for whiteout in [high.join("data/hidden"), top.join("usr/bin/env")] {
        fs::create_dir_all(whiteout.parent().unwrap()).unwrap();
        let made = std::process::Command::new("mknod").arg(&whiteout).args(["c", "0", "0"]).status();
        assert!(made.is_ok_and(|status| status.success()), "mknod");
        assert!(fs::symlink_metadata(&whiteout).unwrap().file_type().is_char_device());
    }
    let before = listing(&low);
    let many: Vec<_> = (0..63)
        .map(|n| {
            let dir = fixture(&format!("many-{n}"));
            write(&dir, &format!("many/{n}"), "");
            write(&dir, "many/last", &format!("{n}\n"));
            write(&dir, &format!("usr/share/many/{n}"), "");
            dir
        })
        .collect();
    let many: Vec<&Path> = many.iter().map(std::path::PathBuf::as_path).collect();
    vec![
        row(
            "the top layer wins",
            layers("cat /data/all /usr/share/hutch-stack; ls /data", &[&low, &high, &top]),
        )
        .stdout("top\ntop\nall\ndir\nhigh\nlow\ntop\n"),
        row("the order is the list's", layers("cat /data/all", &[&top, &high, &low])).stdout("low\n"),
        row(
            "a whiteout hides what is below",
            layers("ls /data/hidden /data/dir; ls /usr/bin/env", &[&low, &high, &top]),
        )
        .exits(2)
        .stdout("/data/dir:\na\nb\n"),
        row("a whiteout hides nothing above", layers("cat /data/hidden", &[&high, &low])).stdout("low"),
        row(
            "layers are never written",
            layers("echo x > /data/all; rm /data/low; echo y > /data/new; cat /data/all; exit 0", &[&low])
                .set("user", json!("root")),
        )
        .stdout("x\n")
        .on_host(move || same("the layer", &listing(&low), &before)),
        row(
            "owners are those of the layer",
            layers("stat -c '%u:%g' /data/all /usr/share/hutch-stack", &[&high]),
        )
        .stdout("0:0\n0:0\n"),
        row(
            "as many layers as there may be",
            layers("ls /many | wc -l; cat /many/last; ls /usr/share/many | wc -l", &many),
        )
        .stdout("64\n62\n63\n"),
        row("the same layer twice", layers("ls /data; cat /data/all", &[&top, &high, &top]))
            .stdout("all\ndir\nhigh\ntop\ntop\n"),
    ]
}

/// Every path below a directory with its size and time of change.
fn listing(dir: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt as _;
    let mut all = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let meta = entry.metadata().unwrap();
            all.push(format!(
                "{} {} {}.{}",
                entry.path().display(),
                meta.len(),
                meta.ctime(),
                meta.ctime_nsec()
            ));
            if meta.is_dir() {
                open.push(entry.path());
            }
        }
    }
    all.sort();
    all
}

fn without_host() -> Vec<Row> {
    let Some(probe) = programs::on_host(Program::Probe) else { return Vec::new() };
    let alone = fixture("alone");
    fs::create_dir(alone.join("bin")).unwrap();
    fs::copy(&probe, alone.join("bin/probe")).unwrap();
    fs::set_permissions(alone.join("bin/probe"), fs::Permissions::from_mode(0o755)).unwrap();
    let bad = |name: &str, link: &str, to: &str| {
        let dir = fixture(name);
        symlink(to, dir.join(link)).unwrap();
        dir
    };
    let on = |arguments: &[&str], above: &[&Path]| {
        let dirs = [&[alone.as_path()], above].concat();
        let layers: Vec<_> = dirs.iter().map(|dir| format!("dir:{}", dir.display())).collect();
        argv(&[&["probe"][..], arguments].concat()).set("layers", json!(layers))
    };
    vec![
        row("a layer alone", on(&["exit", "7"], &[])).exits(7),
        row("a layer alone has its passwd made", on(&["show", "/etc/passwd"], &[]))
            .stdout("job:x:1001:1001:job:/home/job:/bin/sh\n"),
        row("a layer alone has a place for temporary files", on(&["write", "/tmp/x", "10"], &[])),
        row("a layer alone has its devices", on(&["write", "/dev/null", "10"], &[])),
        row("a layer alone has its processes", on(&["show", "/proc/self/comm"], &[])).stdout("probe\n"),
        row("nothing of the host's programs", on(&["show", "/usr/bin/env"], &[])).exits(90),
        row("a layer whose /proc is a link", on(&["exit", "0"], &[&bad("proc-link", "proc", "/etc")]))
            .refused(Reason::ImageError, &["layer"]),
        row("a layer whose /dev is a link", on(&["exit", "0"], &[&bad("dev-link", "dev", "/tmp")]))
            .refused(Reason::ImageError, &["layer"]),
        row(
            "a layer whose /tmp is a link out",
            on(&["write", "/tmp/x", "10"], &[&bad("tmp-link", "tmp", "../../../../../var/tmp/hutch-out")]),
        )
        .refused(Reason::ImageError, &["layer"])
        .on_host(|| holds(!Path::new("/var/tmp/hutch-out").exists(), || "made on the host".to_owned())),
        row(
            "a layer whose /tmp is a link within",
            on(&["write", "/tmp/x", "10"], &[&bad("tmp-bin", "tmp", "/bin")]),
        )
        .exits(90)
        .stderr("/tmp/x: Permission denied\n"),
        row(
            "a layer whose /etc is a link to the host's",
            on(&["show", "/etc/passwd"], &[&bad("etc-link", "etc", "/../../../etc")]),
        )
        .refused(Reason::SpecInvalid, &["/etc/passwd"]),
    ]
}

fn refused() -> Vec<Row> {
    let file = fixture("a-file").join("file");
    fs::write(&file, "").unwrap();
    let usr = fixture("usr-is-a-file");
    fs::write(usr.join("usr"), "").unwrap();
    let one = |layers: &[&str]| sh("exit 0").set("layers", json!(layers));
    vec![
        row("a layer that is not there", layers("exit 0", &[Path::new("/no/such/layer")]))
            .refused(Reason::ImageError, &["layers[1]", "/no/such/layer"]),
        row("a layer that is a file", layers("exit 0", &[&file])).refused(Reason::ImageError, &["layers[1]"]),
        row("a layer whose /usr is a file", layers("exit 0", &[&usr]))
            .refused(Reason::ImageError, &["layers[1]", "/usr"]),
        row("a layer that nobody stored", one(&[&format!("sha256:{}", "0".repeat(64))]))
            .refused(Reason::ImageError, &["layers[0]"]),
        row("an image that nobody has", one(&["image:registry.invalid/none:1"]))
            .refused(Reason::ImageError, &["layers[0]"]),
        row("a layer of a job that never was", one(&["job:0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34"]))
            .refused(Reason::ImageError, &["layers[0]"]),
        row("a command that needs a layer's word", Spec::bare(&["host"]))
            .refused(Reason::SpecInvalid, &["command"]),
    ]
}
