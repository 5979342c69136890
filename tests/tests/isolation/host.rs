//! What jobs do to the host: nothing.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::{can_run, home, job, output, shell_as};

/// A directory that goes with the test, and that other users may enter.
fn directory() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("hutch-layer-").tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

/// Every path below these with what tells whether it was touched.
fn listing(places: &[&str]) -> Vec<String> {
    let mut all = Vec::new();
    let mut open: Vec<PathBuf> = places.iter().map(PathBuf::from).collect();
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            all.push(format!(
                "{} {:o} {}:{} {} {}.{}",
                entry.path().display(),
                meta.mode(),
                meta.uid(),
                meta.gid(),
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

#[test]
fn whatever_is_deleted_is_deleted_inside_alone() {
    const PLACES: [&str; 4] = ["/etc", "/usr/bin", "/usr/sbin", "/usr/lib/python3"];
    if !can_run("deleting the host's files") {
        return;
    }
    let canary = PathBuf::from(format!("/usr/lib/hutch-canary-{}", std::process::id()));
    fs::File::create(&canary).unwrap().write_all(b"alive\n").unwrap();
    let before = listing(&PLACES);
    assert!(before.len() > 100, "{} files", before.len());
    let script = format!(
        "cat {canary} && rm -rf --no-preserve-root /usr /etc /bin /lib /root /var 2> /dev/null; [ ! -e {canary} ] && echo gone; \
         [ ! -e /usr/bin/env ] && echo env gone; echo > /etc/passwd 2> /dev/null; exit 0",
        canary = canary.display()
    );
    let result = home().run(&job(&["sh", "-c", &script], &json!({"user": "root"})));
    let kept = fs::read_to_string(&canary);
    fs::remove_file(&canary).unwrap();
    assert_eq!(kept.unwrap(), "alive\n");
    let after = listing(&PLACES);
    let changed: Vec<_> = before.iter().filter(|line| after.binary_search(line).is_err()).take(10).collect();
    assert!(changed.is_empty(), "changed on the host: {changed:#?}");
    let result = result.unwrap();
    let said = String::from_utf8_lossy(&result.stdout.data);
    assert_eq!(said, "alive\ngone\nenv gone\n", "{}", result.message);
    // And the next job finds everything.
    assert_eq!(shell_as("root", "ls /usr/bin/env /bin/sh /etc/passwd | wc -l"), "3\n");
}

#[test]
fn setuid_programs_give_nothing() {
    if !can_run("setuid programs") {
        return;
    }
    let layer = directory();
    let id = layer.path().join("id");
    fs::copy("/usr/bin/id", &id).unwrap();
    fs::set_permissions(&id, fs::Permissions::from_mode(0o6755)).unwrap();
    let outside = Command::new(&id).arg("-u").uid(1001).gid(1001).output().unwrap();
    if String::from_utf8_lossy(&outside.stdout) != "0\n" {
        hutch_tests::skip("setuid programs", "they give nothing outside either");
        return;
    }
    let more = json!({"layers": ["host", format!("dir:{}", layer.path().display())]});
    let text = output(&job(&["sh", "-c", "stat -c %a /id; /id -u; /id -g; /id -ru"], &more));
    assert_eq!(text, "6755\n1001\n1001\n1001\n");
    // The host's own, too.
    let text = shell_as(
        "1001:1001",
        "for f in /usr/bin/su /usr/bin/passwd /usr/bin/mount; do [ -u $f ] && echo setuid; done; su -c id root < /dev/null 2>&1 | grep -c uid=0; true",
    );
    assert!(text.ends_with("0\n"), "{text}");
}

#[test]
fn file_capabilities_give_nothing() {
    if !can_run("file capabilities") {
        return;
    }
    let layer = directory();
    let file = layer.path().join("python");
    fs::copy(fs::canonicalize("/usr/bin/python3").unwrap(), &file).unwrap();
    // `struct vfs_cap_data`, revision 2: effective; permitted CAP_NET_RAW.
    let set = "import os, sys\nos.setxattr(sys.argv[1], 'security.capability', bytes.fromhex('0100000200200000000000000000000000000000'))";
    assert!(Command::new("python3").args(["-c", set]).arg(&file).status().unwrap().success());
    let show =
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('CapEff')][0])";
    let outside = Command::new(&file).args(["-c", show]).uid(1001).gid(1001).output().unwrap();
    if !String::from_utf8_lossy(&outside.stdout).contains("2000") {
        hutch_tests::skip("file capabilities", "they give nothing outside either");
        return;
    }
    let more = json!({"layers": ["host", format!("dir:{}", layer.path().display())]});
    assert_eq!(output(&job(&["/python", "-c", show], &more)), "0000000000000000\n");
}

#[test]
fn device_nodes_of_a_layer_cannot_be_opened() {
    if !can_run("device nodes of a layer") {
        return;
    }
    let layer = directory();
    let node = layer.path().join("zero");
    let made = Command::new("mknod").args(["-m", "666"]).arg(&node).args(["c", "1", "5"]).status().unwrap();
    if !made.success() || fs::File::open(&node).is_err() {
        hutch_tests::skip("device nodes of a layer", "they cannot be opened outside either");
        return;
    }
    let more = json!({"layers": ["host", format!("dir:{}", layer.path().display())], "user": "root"});
    let text = output(&job(
        &["sh", "-c", "test -c /zero && echo there; head -c1 /zero; cp -a /zero /z; true"],
        &more,
    ));
    assert_eq!(text, "there\n");
}

#[test]
fn signals_stay_inside() {
    if !can_run("signals") {
        return;
    }
    let mut bystander = Command::new("sleep").arg("1000").spawn().unwrap();
    let text = shell_as("root", "for n in TERM KILL HUP; do kill -$n -1 2> /dev/null; done; echo alive");
    let lives = bystander.try_wait().unwrap().is_none();
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    assert_eq!(text, "alive\n");
    assert!(lives, "a process of the host was killed");
}

#[test]
fn the_host_s_settings_are_as_before() {
    if !can_run("the host's settings") {
        return;
    }
    const SETTINGS: [&str; 6] = [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/hostname",
        "/proc/sys/kernel/panic",
        "/proc/sys/vm/overcommit_memory",
        "/proc/sys/fs/pipe-max-size",
        "/proc/sys/kernel/pid_max",
    ];
    let read = || SETTINGS.map(|path| fs::read_to_string(path).unwrap_or_default());
    let before = read();
    let script: String =
        SETTINGS.iter().map(|path| format!("echo 7 > {path} 2> /dev/null && echo {path}; ")).collect();
    // Those of a namespace of its own could be written by whoever is root in it; here nobody is.
    let own = "echo 7 > /proc/sys/kernel/msgmax && echo msgmax; echo 0 > /proc/sys/net/ipv4/ip_forward && echo forward; true";
    let text = shell_as("root", &format!("{script} {own}"));
    assert_eq!(text, "", "these could be written");
    assert_eq!(read(), before);
    assert!(Path::new("/proc/self").exists());
}

#[test]
fn the_binary_cannot_be_overwritten_from_inside() {
    if !can_run("overwriting the binary") {
        return;
    }
    let read = || fs::read(hutch_tests::hutch::binary()).unwrap();
    let before = read();
    let text = shell_as(
        "root",
        "(: > /proc/1/exe) 2> /dev/null && echo truncated; (: >> /proc/1/exe) 2> /dev/null && echo opened; \
         ls -l /proc/1/exe 2> /dev/null | grep -c hutch; ln /proc/1/exe /tmp/x 2> /dev/null && echo linked; true",
    );
    assert_eq!(text, "0\n");
    assert!(read() == before, "the binary has changed");
}
